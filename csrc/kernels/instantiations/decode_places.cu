#include "../decode_places.cuh"

namespace fusedkv {

cudaError_t run_decode_places(const DecodePlacesParams& params, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  if (params.page_size <= 0) return cudaErrorInvalidValue;
  return launch_decode_places(params, stream);
}

}  // namespace fusedkv

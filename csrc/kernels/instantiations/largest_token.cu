#include "../largest_token.cuh"

namespace fusedkv {

cudaError_t run_largest_token(const LargestTokenParams& params, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  if (params.vocab <= 0 || params.vocab > kMostVocab) return cudaErrorInvalidValue;
  return dispatch_float(
      params.dtype, [&](auto t) { return launch_largest_token<typename decltype(t)::type>(params, stream); });
}

}  // namespace fusedkv

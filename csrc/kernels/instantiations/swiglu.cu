#include "../swiglu.cuh"

namespace fusedkv {

cudaError_t run_swiglu(const SwigluParams& params, cudaStream_t stream) {
  if (params.rows == 0 || params.size == 0) return cudaSuccess;
  if (params.size < 0 || params.size % 8 != 0) return cudaErrorInvalidValue;
  return dispatch_half(params.dtype,
                       [&](auto t) { return launch_swiglu<typename decltype(t)::type>(params, stream); });
}

}  // namespace fusedkv

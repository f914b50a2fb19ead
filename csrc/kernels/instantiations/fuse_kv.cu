#include "../fuse_kv.cuh"

namespace fusedkv {

cudaError_t run_fuse_kv(const FuseKvParams& params, cudaStream_t stream) {
  if (params.rows == 0 || params.num_kv_heads == 0) return cudaSuccess;
  if (params.head_dim <= 0 || params.head_dim % 8 != 0) return cudaErrorInvalidValue;
  return dispatch_half(params.dtype,
                       [&](auto t) { return launch_fuse_kv<typename decltype(t)::type>(params, stream); });
}

}  // namespace fusedkv

#include "../fuse_kv_backward.cuh"

namespace fusedkv {

size_t fuse_kv_backward_workspace_bytes(const FuseKvBackwardParams& params) {
  if (params.num_kv_heads == 0) return 0;
  const size_t sums =
      size_t(params.k.num_sources + params.v.num_sources) * params.num_kv_heads * params.head_dim;
  return split_backward_rows(params).row_blocks * sums * sizeof(float);
}

cudaError_t run_fuse_kv_backward(const FuseKvBackwardParams& params, cudaStream_t stream) {
  if (params.num_kv_heads == 0) return cudaSuccess;
  if (params.head_dim <= 0 || params.head_dim % 8 != 0) return cudaErrorInvalidValue;
  return dispatch_half(params.dtype, [&](auto t) {
    return launch_fuse_kv_backward<typename decltype(t)::type>(params, stream);
  });
}

}  // namespace fusedkv

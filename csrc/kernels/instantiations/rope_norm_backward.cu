#include "../dispatch.h"
#include "../rope_norm_backward.cuh"

namespace fusedkv {

size_t rope_norm_backward_workspace_bytes(const RopeNormBackwardParams& params) {
  if (params.heads.q_norm == nullptr) return 0;
  const int d = params.heads.head_dim;
  const RopeBackwardSplit split =
      d == 64 ? split_rope_backward<64>(params) : split_rope_backward<128>(params);
  return split.blocks * d * sizeof(float);
}

cudaError_t run_rope_norm_backward(const RopeNormBackwardParams& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto t) {
    return dispatch_head_dim(params.heads.head_dim, [&](auto d) {
      return launch_rope_norm_backward<typename decltype(t)::type, decltype(d)::value>(params, stream);
    });
  });
}

}  // namespace fusedkv

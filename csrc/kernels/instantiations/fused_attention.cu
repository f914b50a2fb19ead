#include "../dispatch.h"
#include "../launch.h"

namespace fusedkv {

// Defined in fused_attention.cuh, compiled in fused_attention_<dtype>_d<head dim>.cu.
template <class T, int D>
size_t attention_workspace_bytes(const FusedAttentionParams& params);
template <class T, int D>
cudaError_t launch_attention(const FusedAttentionParams& params, cudaStream_t stream);

namespace {
template <class F>
cudaError_t dispatch_attention(const FusedAttentionParams& params, F&& f) {
  const auto one_or_two = [](int sources) { return sources == 1 || sources == 2; };
  if (params.cache_dtype != params.dtype || !one_or_two(params.num_k_sources) ||
      !one_or_two(params.num_v_sources)) {
    return cudaErrorInvalidValue;
  }
  return dispatch_half(params.dtype, [&](auto t) {
    return dispatch_head_dim(params.head_dim, [&](auto d) { return f(t, d); });
  });
}
}  // namespace

size_t fused_attention_workspace_bytes(const FusedAttentionParams& params) {
  size_t bytes = 0;
  dispatch_attention(params, [&](auto t, auto d) {
    bytes = attention_workspace_bytes<typename decltype(t)::type, decltype(d)::value>(params);
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t run_fused_attention(const FusedAttentionParams& params, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  return dispatch_attention(params, [&](auto t, auto d) {
    return launch_attention<typename decltype(t)::type, decltype(d)::value>(params, stream);
  });
}

}  // namespace fusedkv

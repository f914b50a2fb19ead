#include "../dispatch.h"
#include "../launch.h"

namespace fusedkv {

// Defined in fused_attention.cuh, compiled in fused_attention_<cache dtype>_d<head dim>.cu.
template <class T, class C, int D>
size_t attention_workspace_bytes(const FusedAttentionParams& params);
template <class T, class C, int D>
cudaError_t launch_attention(const FusedAttentionParams& params, cudaStream_t stream);

namespace {
// e4m3 fits f16 exactly, so with an e4m3 cache everything is multiplied in f16 whatever the dtype of q.
template <class F>
cudaError_t dispatch_attention(const FusedAttentionParams& params, F&& f) {
  const auto one_or_two = [](int sources) { return sources == 1 || sources == 2; };
  if (!one_or_two(params.num_k_sources) || !one_or_two(params.num_v_sources)) return cudaErrorInvalidValue;
  return dispatch_half_and_cache(params.dtype, params.cache_dtype, [&]<class T, class C>(Type<T>, Type<C>) {
    return dispatch_head_dim(params.head_dim, [&](auto d) {
      constexpr bool kConverted = std::is_same_v<C, e4m3>;
      return f(Type<std::conditional_t<kConverted, f16, T>>{}, Type<C>{}, d);
    });
  });
}
}  // namespace

size_t fused_attention_workspace_bytes(const FusedAttentionParams& params) {
  size_t bytes = 0;
  dispatch_attention(params, [&]<class T, class C, int D>(Type<T>, Type<C>, HeadDim<D>) {
    bytes = attention_workspace_bytes<T, C, D>(params);
    return cudaSuccess;
  });
  return bytes;
}

cudaError_t run_fused_attention(const FusedAttentionParams& params, cudaStream_t stream) {
  if (params.batch == 0) return cudaSuccess;
  return dispatch_attention(params, [&]<class T, class C, int D>(Type<T>, Type<C>, HeadDim<D>) {
    return launch_attention<T, C, D>(params, stream);
  });
}

}  // namespace fusedkv

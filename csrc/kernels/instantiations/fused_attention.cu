#include "../dispatch.h"
#include "../launch.h"

namespace fusedkv {

// Defined in fused_attention.cuh, compiled in fused_attention_<cache dtype>_d<head dim>.cu.
template <class T, class C, int D>
cudaError_t launch_attention(const FusedAttentionParams& params, cudaStream_t stream);

cudaError_t run_fused_attention(const FusedAttentionParams& params, cudaStream_t stream) {
  const auto one_or_two = [](int sources) { return sources == 1 || sources == 2; };
  if (!one_or_two(params.num_k_sources) || !one_or_two(params.num_v_sources)) return cudaErrorInvalidValue;
  if (params.batch == 0) return cudaSuccess;
  return dispatch_half_and_cache(params.dtype, params.cache_dtype, [&]<class T, class C>(Type<T>, Type<C>) {
    return dispatch_head_dim(params.head_dim, [&]<int D>(HeadDim<D>) {
      // e4m3 fits f16 exactly, so with an e4m3 cache everything is multiplied in f16 whatever the dtype of q.
      constexpr bool kConverted = std::is_same_v<C, e4m3>;
      return launch_attention<std::conditional_t<kConverted, f16, T>, C, D>(params, stream);
    });
  });
}

}  // namespace fusedkv

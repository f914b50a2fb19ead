#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace fusedkv::ops {

void write_kv(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache, const at::Tensor& v_cache,
              const at::Tensor& slot_mapping, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
              const OptionalTensor& k_copy, const OptionalTensor& v_copy) {
  const Checker check("write_kv", k);
  check.tensor("k", k, kHalf, {kAny, kAny, kAny});
  const int64_t tokens = k.size(0), heads = k.size(1), d = k.size(2);
  FUSEDKV_EXPECT(check.op, d > 0 && d % 8 == 0, "k", "a head dim that is a multiple of 8 on CUDA", d);
  check.channels(heads, d);
  check.tensor("v", v, k.scalar_type(), {tokens, heads, d});
  check.cache("k_cache", k_cache, heads, d, k, k_cache);
  check.cache("v_cache", v_cache, heads, d, k, k_cache);
  check.tensor("slot_mapping", slot_mapping, kInt64, {tokens});
  check.scale("k_scale", k_scale, heads, d);
  check.scale("v_scale", v_scale, heads, d);
  check.copies(k_cache, k_copy, v_copy);

  const c10::cuda::CUDAGuard guard(k.device());
  const at::Tensor aligned_k = aligned_or_copy(k), aligned_v = aligned_or_copy(v);
  const WriteKvParams params{
      .dtype = kernel_dtype(k),
      .cache_dtype = kernel_dtype(k_cache),
      .num_tokens = tokens,
      .num_kv_heads = static_cast<int>(heads),
      .head_dim = static_cast<int>(d),
      .k = aligned_k.const_data_ptr(),
      .v = aligned_v.const_data_ptr(),
      .k_token_stride = aligned_k.stride(0),
      .k_head_stride = aligned_k.stride(1),
      .v_token_stride = aligned_v.stride(0),
      .v_head_stride = aligned_v.stride(1),
      .k_cache = paged_cache(k_cache),
      .v_cache = paged_cache(v_cache),
      .k_copy = k_copy ? paged_cache(*k_copy) : PagedCache{},
      .v_copy = v_copy ? paged_cache(*v_copy) : PagedCache{},
      .cache = cache_geometry(k_cache),
      .slot_mapping = slot_mapping.const_data_ptr<int64_t>(),
      .k_scale = data_or_null<float>(k_scale),
      .v_scale = data_or_null<float>(v_scale),
  };
  check_launch(check.op, run_write_kv(params, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace fusedkv::ops

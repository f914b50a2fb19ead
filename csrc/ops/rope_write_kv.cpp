#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace fusedkv::ops {

void rope_write_kv(const at::Tensor& qkv, const OptionalTensor& q_out, const OptionalTensor& k_cache,
                   const OptionalTensor& v_cache, const at::Tensor& positions, const at::Tensor& cos_sin,
                   const OptionalTensor& q_norm, const OptionalTensor& k_norm, double eps, bool interleaved,
                   const OptionalTensor& slot_mapping, const OptionalTensor& k_scale,
                   const OptionalTensor& v_scale) {
  const Checker check("rope_write_kv", qkv);
  check.tensor("qkv", qkv, kHalf, {kAny, kAny, kAny});
  const int64_t tokens = qkv.size(0), num_heads = qkv.size(1);
  const int64_t d = check.rope(tokens, positions, cos_sin);
  check.norm("q_norm", q_norm, d, qkv.scalar_type());
  check.norm("k_norm", k_norm, d, qkv.scalar_type());
  FUSEDKV_EXPECT(check.op, qkv.size(2) == d, "qkv", c10::str("shape [*, *, ", d, "]"), qkv.sizes());
  FUSEDKV_EXPECT(check.op, qkv.numel() == 0 || qkv.stride(1) == d, "qkv", "heads packed without gaps",
                 c10::str("strides ", qkv.strides()));
  check.projection_outputs("qkv", num_heads, tokens, d, qkv, q_out, k_cache, v_cache, slot_mapping, k_scale,
                           v_scale);

  const c10::cuda::CUDAGuard guard(qkv.device());
  const at::Tensor heads = aligned_or_copy(qkv);
  const RopeWriteKvParams params{
      .dtype = kernel_dtype(qkv),
      .cache_dtype = kernel_dtype(k_cache.value_or(qkv)),
      .num_tokens = tokens,
      .num_q_heads = q_out ? static_cast<int>(q_out->size(1)) : 0,
      .num_kv_heads = k_cache ? static_cast<int>(k_cache->size(2)) : 0,
      .head_dim = static_cast<int>(d),
      .qkv = heads.const_data_ptr(),
      .qkv_token_stride = heads.stride(0),
      .q_out = q_out ? q_out->mutable_data_ptr() : nullptr,
      .k_cache = k_cache ? paged_cache(*k_cache) : PagedCache{},
      .v_cache = v_cache ? paged_cache(*v_cache) : PagedCache{},
      .cache = k_cache ? cache_geometry(*k_cache) : CacheGeometry{},
      .slot_mapping = data_or_null<int64_t>(slot_mapping),
      .positions = positions.const_data_ptr(),
      .positions_are_int64 = positions.scalar_type() == at::kLong,
      .cos_sin = cos_sin.const_data_ptr<float>(),
      .max_positions = cos_sin.size(0),
      .q_norm = data_or_null(q_norm),
      .k_norm = data_or_null(k_norm),
      .eps = static_cast<float>(eps),
      .interleaved = interleaved,
      .k_scale = data_or_null<float>(k_scale),
      .v_scale = data_or_null<float>(v_scale),
  };
  check_launch(check.op, run_rope_write_kv(params, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace fusedkv::ops

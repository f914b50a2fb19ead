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
                   const OptionalTensor& v_scale, const OptionalTensor& k_copy,
                   const OptionalTensor& v_copy) {
  const Checker check("rope_write_kv", qkv);
  check.tensor("qkv", qkv, kHalf, {kAny, kAny, kAny});
  const int64_t tokens = qkv.size(0), num_heads = qkv.size(1);
  const int64_t d = check.rope(tokens, positions, cos_sin);
  check.norm("q_norm", q_norm, d, qkv.scalar_type());
  check.norm("k_norm", k_norm, d, qkv.scalar_type());
  FUSEDKV_EXPECT(check.op, qkv.size(2) == d, "qkv", c10::str("shape [*, *, ", d, "]"), qkv.sizes());
  FUSEDKV_EXPECT(check.op, qkv.numel() == 0 || qkv.stride(1) == d, "qkv", "heads packed without gaps",
                 c10::str("strides ", qkv.strides()));
  RopeWriteKvParams params{};
  params.heads = check.head_outputs("qkv", num_heads, tokens, d, qkv, q_out, k_cache, v_cache, slot_mapping,
                                    k_scale, v_scale, k_copy, v_copy);
  fill_rope(params.heads, positions, cos_sin, q_norm, k_norm, eps, interleaved);

  const c10::cuda::CUDAGuard guard(qkv.device());
  const at::Tensor rows = aligned_or_copy(qkv);
  params.dtype = kernel_dtype(qkv);
  params.num_tokens = tokens;
  params.qkv = rows.const_data_ptr();
  params.qkv_token_stride = rows.stride(0);
  check_launch(check.op, run_rope_write_kv(params, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace fusedkv::ops

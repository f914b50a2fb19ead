#include <ATen/ops/empty.h>
#include <ATen/ops/rms_norm.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace fusedkv::ops {
namespace {

// Checks the inputs that both ops have and returns the head dim.
int64_t check_projection(const Checker& check, const at::Tensor& x, const at::Tensor& weight,
                         const at::Tensor& positions, const at::Tensor& cos_sin, const OptionalTensor& bias) {
  check.tensor("x", x, kHalf, {kAny, kAny});
  const int64_t hidden = x.size(1);
  const int64_t d = check.rope(x.size(0), positions, cos_sin);
  FUSEDKV_EXPECT(check.op, hidden > 0 && hidden % 8 == 0 && hidden <= kMaxInt, "x",
                 "a hidden size that is a multiple of 8", hidden);
  check.tensor("weight", weight, x.scalar_type(), {kAny, hidden});
  check.contiguous("weight", weight);
  check.aligned("weight", weight);
  const int64_t rows = weight.size(0);
  FUSEDKV_EXPECT(check.op, rows > 0 && rows % d == 0 && rows <= kMaxInt, "weight",
                 c10::str("rows that are a multiple of the head dim ", d), rows);
  if (bias) {
    check.tensor("bias", *bias, x.scalar_type(), {rows});
    check.aligned("bias", *bias);
  }
  return d;
}

// Fills the inputs of the product, once checked, and launches.
void project(const Checker& check, RopeKeyProjectionParams& params, const at::Tensor& x,
             const at::Tensor& weight, const OptionalTensor& bias, const OptionalTensor& input_norm = {},
             double eps = 0, bool early_weight = false) {
  fill_product(params, x, weight, early_weight);
  params.bias = data_or_null(bias);
  at::Tensor rows;
  if (input_norm && !takes_input_norm(params)) {
    const LibraryCall call;
    rows = at::rms_norm(x, x.size(1), input_norm, eps);
  } else {
    rows = rows_are_apart(x) ? aligned_or_copy(x) : packed_copy(x);
    params.input_norm = data_or_null(input_norm);
    params.input_eps = static_cast<float>(eps);
  }
  params.x = rows.const_data_ptr();
  params.x_stride = rows.stride(0);
  check_launch(check.op, run_rope_key_projection(params, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

at::Tensor rope_key_projection(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& positions,
                               const at::Tensor& cos_sin, const OptionalTensor& norm, double eps,
                               const OptionalTensor& bias, bool interleaved) {
  const Checker check("rope_key_projection", x);
  const int64_t d = check_projection(check, x, weight, positions, cos_sin, bias);
  check.norm("norm", norm, d, x.scalar_type());

  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor out = at::empty({x.size(0), weight.size(0) / d, d}, x.options());
  RopeKeyProjectionParams params{};
  params.heads.cache_dtype = kernel_dtype(x);
  params.heads.num_q_heads = static_cast<int>(out.size(1));
  params.heads.head_dim = static_cast<int>(d);
  params.heads.q_out = out.mutable_data_ptr();
  fill_rope(params.heads, positions, cos_sin, norm, std::nullopt, eps, interleaved);
  project(check, params, x, weight, bias);
  return out;
}

void rope_key_projection_write(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& q_out,
                               const OptionalTensor& k_cache, const OptionalTensor& v_cache,
                               const at::Tensor& positions, const at::Tensor& cos_sin,
                               const OptionalTensor& slot_mapping, const OptionalTensor& q_norm,
                               const OptionalTensor& k_norm, double eps, const OptionalTensor& bias,
                               bool interleaved, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                               const OptionalTensor& k_copy, const OptionalTensor& v_copy,
                               const OptionalTensor& input_norm, bool early_weight) {
  const Checker check("rope_key_projection_write", x);
  const int64_t d = check_projection(check, x, weight, positions, cos_sin, bias);
  check.norm("q_norm", q_norm, d, x.scalar_type());
  check.norm("k_norm", k_norm, d, x.scalar_type());
  check.norm("input_norm", input_norm, x.size(1), x.scalar_type());
  RopeKeyProjectionParams params{};
  params.heads = check.head_outputs("weight", weight.size(0) / d, x.size(0), d, x, q_out, k_cache, v_cache,
                                    slot_mapping, k_scale, v_scale, k_copy, v_copy);
  fill_rope(params.heads, positions, cos_sin, q_norm, k_norm, eps, interleaved);

  const c10::cuda::CUDAGuard guard(x.device());
  project(check, params, x, weight, bias, input_norm, eps, early_weight);
}

}  // namespace fusedkv::ops

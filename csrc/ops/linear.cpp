#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/rms_norm.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace fusedkv::ops {
namespace {

// More tokens are the library's work, and so is what the kernels' copies cannot take.
constexpr int64_t kMostFewTokens = 64;
constexpr int64_t kMostRows = int64_t{65535} * 128;  // of a weight: the grid's second dimension counts tiles

void check_matrices(const Checker& check, const at::Tensor& x, const at::Tensor& weight) {
  check.tensor("x", x, kHalf, {kAny, kAny});
  const int64_t hidden = x.size(1);
  FUSEDKV_EXPECT(check.op, hidden > 0 && hidden <= kMaxInt, "x", "a hidden size of 1 or more", hidden);
  check.tensor("weight", weight, x.scalar_type(), {kAny, hidden});
  FUSEDKV_EXPECT(check.op, weight.size(0) > 0 && weight.size(0) <= kMaxInt, "weight", "1 row or more",
                 weight.size(0));
}

bool are_few_tokens(const at::Tensor& x, const at::Tensor& weight) {
  return x.size(0) <= kMostFewTokens && x.size(1) % 8 == 0 && rows_are_apart(x) && is_aligned(x) &&
         is_aligned(weight) && weight.is_contiguous() && weight.size(0) <= kMostRows &&
         has_few_token_kernels();
}

}  // namespace

void linear_add(const at::Tensor& out, const at::Tensor& x, const at::Tensor& weight, bool early_weight) {
  const Checker check("linear_add", x);
  check_matrices(check, x, weight);
  check.tensor("out", out, x.scalar_type(), {x.size(0), weight.size(0)});
  const auto overlap = at::get_overlap_status(out, x);
  const bool apart = overlap != at::MemOverlapStatus::Full && overlap != at::MemOverlapStatus::Partial &&
                     at::has_internal_overlap(out) != at::MemOverlap::Yes;
  FUSEDKV_EXPECT(check.op, apart, "out", "memory of its own for every element", "an overlap");

  const c10::cuda::CUDAGuard guard(x.device());
  if (!are_few_tokens(x, weight) || weight.size(0) % 32 != 0 || !is_aligned(out)) {
    const LibraryCall call;
    at::Tensor(out).addmm_(x, weight.t());  // adds before it rounds, too
    return;
  }
  LinearAddParams params{};
  fill_product(params, x, weight, early_weight);
  params.size = static_cast<int>(weight.size(0));
  params.out = out.mutable_data_ptr();
  params.out_stride = out.stride(0);
  check_launch(check.op, run_linear_add(params, c10::cuda::getCurrentCUDAStream()));
}

at::Tensor swiglu_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& input_norm,
                         double eps, bool early_weight) {
  const Checker check("swiglu_linear", x);
  check_matrices(check, x, weight);
  FUSEDKV_EXPECT(check.op, weight.size(0) % 16 == 0, "weight", "2 * I rows, I a multiple of 8 on CUDA",
                 weight.size(0));
  check.norm("input_norm", input_norm, x.size(1), x.scalar_type());

  const c10::cuda::CUDAGuard guard(x.device());
  const bool fits = weight.size(0) % 32 == 0 && (!input_norm || x.scalar_type() == at::kBFloat16);
  if (!fits || !are_few_tokens(x, weight)) {
    const LibraryCall call;
    return swiglu(at::linear(input_norm ? at::rms_norm(x, x.size(1), input_norm, eps) : x, weight));
  }
  at::Tensor out = at::empty({x.size(0), weight.size(0) / 2}, x.options());
  SwigluLinearParams params{};
  fill_product(params, x, weight, early_weight);
  params.input_norm = data_or_null(input_norm);
  params.input_eps = static_cast<float>(eps);
  params.size = static_cast<int>(out.size(1));
  params.out = out.mutable_data_ptr();
  check_launch(check.op, run_swiglu_linear(params, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace fusedkv::ops

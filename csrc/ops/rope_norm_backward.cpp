#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace fusedkv::ops {

std::tuple<at::Tensor, at::Tensor> rope_norm_backward(const at::Tensor& grad, const OptionalTensor& heads,
                                                      const at::Tensor& positions, const at::Tensor& cos_sin,
                                                      const OptionalTensor& norm, double eps,
                                                      bool interleaved) {
  const Checker check("rope_norm_backward", grad);
  check.tensor("grad", grad, kHalf, {kAny, kAny, kAny});
  const int64_t d = check.rope(grad.size(0), positions, cos_sin);
  check.norm("norm", norm, d, grad.scalar_type());
  FUSEDKV_EXPECT(check.op, grad.size(2) == d, "grad", c10::str("shape [*, *, ", d, "]"), grad.sizes());
  check.channels(grad.size(1), d);
  FUSEDKV_EXPECT(check.op, heads.has_value() == norm.has_value(), "heads, norm", "both or none of them",
                 c10::str("only ", heads ? "heads" : "norm"));
  if (heads) check.tensor("heads", *heads, grad.scalar_type(), grad.sizes());

  const c10::cuda::CUDAGuard guard(grad.device());
  const Rows grad_rows = as_rows(grad), head_rows = heads ? as_rows(*heads) : grad_rows;
  const at::Tensor grad_heads = at::empty(grad.sizes(), grad.options());
  const at::Tensor grad_norm = at::empty({norm ? d : 0}, cos_sin.options());
  RopeNormBackwardParams params{};
  params.dtype = kernel_dtype(grad);
  params.num_tokens = grad.size(0);
  params.grad = grad_rows.tensor.const_data_ptr();
  params.projected = head_rows.tensor.const_data_ptr();
  params.grad_token_stride = grad_rows.stride;
  params.projected_token_stride = head_rows.stride;
  params.heads.num_q_heads = static_cast<int>(grad.size(1));
  params.heads.head_dim = static_cast<int>(d);
  params.heads.q_out = grad_heads.mutable_data_ptr();
  fill_rope(params.heads, positions, cos_sin, norm, std::nullopt, eps, interleaved);
  params.grad_norm = grad_norm.mutable_data_ptr<float>();
  const auto bytes = static_cast<int64_t>(rope_norm_backward_workspace_bytes(params));
  const at::Tensor workspace = at::empty({bytes}, grad.options().dtype(at::kByte));
  params.workspace = workspace.mutable_data_ptr();
  check_launch(check.op, run_rope_norm_backward(params, c10::cuda::getCurrentCUDAStream()));
  return {grad_heads, grad_norm};
}

}  // namespace fusedkv::ops

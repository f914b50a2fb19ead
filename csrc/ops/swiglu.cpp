#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace fusedkv::ops {

at::Tensor swiglu(const at::Tensor& gate_up) {
  const Checker check("swiglu", gate_up);
  FUSEDKV_EXPECT(check.op, gate_up.dim() >= 1, "gate_up", "at least 1 dimension", gate_up.dim());
  check.tensor("gate_up", gate_up, kHalf, std::vector<int64_t>(gate_up.dim(), kAny));
  const int64_t width = gate_up.size(-1);
  FUSEDKV_EXPECT(check.op, width > 0 && width % 16 == 0 && width <= kMaxInt, "gate_up",
                 "a last dimension of 2 * I, I a multiple of 8 on CUDA and below 2^30", width);

  const c10::cuda::CUDAGuard guard(gate_up.device());
  const Rows rows = as_rows(gate_up.unsqueeze(-2));  // a row is one head
  std::vector<int64_t> shape = gate_up.sizes().vec();
  shape.back() = width / 2;
  at::Tensor out = at::empty(shape, gate_up.options());
  const SwigluParams params{
      .dtype = kernel_dtype(gate_up),
      .rows = gate_up.numel() / width,
      .size = static_cast<int>(width / 2),
      .gate_up = rows.tensor.const_data_ptr(),
      .row_stride = rows.stride,
      .out = out.mutable_data_ptr(),
  };
  check_launch(check.op, run_swiglu(params, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace fusedkv::ops

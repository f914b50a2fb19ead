#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace fusedkv::ops {

at::Tensor largest_token(const at::Tensor& logits) {
  const Checker check("largest_token", logits);
  check.tensor("logits", logits, kHalfOrFloat, {kAny, kAny});
  const int64_t batch = logits.size(0), vocab = logits.size(1);
  FUSEDKV_EXPECT(check.op, vocab >= 1 && vocab <= kMostVocab, "logits", "1 to 2^30 tokens", vocab);
  FUSEDKV_EXPECT(check.op, batch < int64_t{1} << 28, "logits", "fewer than 2^28 rows", batch);

  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor out = at::empty({batch}, logits.options().dtype(at::kLong));
  const LargestTokenParams params{
      .dtype = kernel_dtype(logits),
      .batch = batch,
      .vocab = static_cast<int>(vocab),
      .logits = logits.const_data_ptr(),
      .row_stride = logits.stride(0),
      .out = out.mutable_data_ptr<int64_t>(),
  };
  check_launch(check.op, run_largest_token(params, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace fusedkv::ops

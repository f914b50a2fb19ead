#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace fusedkv::ops {

void accept_tokens(const at::Tensor& chosen, const at::Tensor& stop_tokens, const at::Tensor& active,
                   const at::Tensor& tokens, const at::Tensor& emitted, const at::Tensor& count,
                   const OptionalTensor& seq_lens, const OptionalTensor& rows,
                   const OptionalTensor& lengths) {
  const Checker check("accept_tokens", chosen);
  check.tensor("chosen", chosen, kInt64, {kAny});
  const int64_t batch = chosen.size(0);
  check.tensor("stop_tokens", stop_tokens, kInt64, {kAny});
  check.tensor("active", active, kBool, {batch});
  check.tensor("tokens", tokens, kInt64, {batch});
  check.tensor("emitted", emitted, kInt64, {kAny, batch});
  check.contiguous("emitted", emitted);
  check.tensor("count", count, kInt64, {1});
  const int given = seq_lens.has_value() + rows.has_value() + lengths.has_value();
  FUSEDKV_EXPECT(check.op, given == 0 || given == 3, "seq_lens, rows, lengths", "all or none of them",
                 c10::str(given, " of 3"));
  AcceptTokensParams params{
      .batch = batch,
      .steps = emitted.size(0),
      .num_stop_tokens = stop_tokens.size(0),
      .chosen = chosen.const_data_ptr<int64_t>(),
      .stop_tokens = stop_tokens.const_data_ptr<int64_t>(),
      .active = active.mutable_data_ptr<bool>(),
      .tokens = tokens.mutable_data_ptr<int64_t>(),
      .emitted = emitted.mutable_data_ptr<int64_t>(),
      .count = count.mutable_data_ptr<int64_t>(),
  };
  if (seq_lens) {
    check.tensor("seq_lens", *seq_lens, kInt32, {kAny});
    check.tensor("rows", *rows, kInt64, {batch});
    check.tensor("lengths", *lengths, kInt32, {batch});
    params.seq_lens = seq_lens->mutable_data_ptr<int>();
    params.num_rows = seq_lens->size(0);
    params.rows = rows->const_data_ptr<int64_t>();
    params.lengths = lengths->const_data_ptr<int>();
  }
  const c10::cuda::CUDAGuard guard(chosen.device());
  check_launch(check.op, run_accept_tokens(params, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace fusedkv::ops

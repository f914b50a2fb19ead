#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace fusedkv::ops {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> decode_places(
    const at::Tensor& seq_lens, const at::Tensor& block_table, const at::Tensor& rows,
    const OptionalTensor& active, int64_t page_size) {
  const Checker check("decode_places", seq_lens);
  check.tensor("seq_lens", seq_lens, kInt32, {kAny});
  check.tensor("block_table", block_table, kInt32, {seq_lens.size(0), kAny});
  const bool fits = block_table.numel() > 0 && block_table.size(1) <= kMaxInt;
  FUSEDKV_EXPECT(check.op, fits, "block_table", "at least one row and one page", block_table.sizes());
  check.tensor("rows", rows, kInt64, {kAny});
  const int64_t batch = rows.size(0), max_pages = block_table.size(1);
  FUSEDKV_EXPECT(check.op, batch <= kMaxInt, "rows", "fewer than 2^31 sequences", batch);
  if (active) check.tensor("active", *active, kBool, {batch});
  FUSEDKV_EXPECT(check.op, page_size >= 1 && page_size <= kMaxInt, "page_size", "1 to 2^31 - 1", page_size);

  const c10::cuda::CUDAGuard guard(seq_lens.device());
  at::Tensor positions = at::empty({batch}, seq_lens.options());
  at::Tensor slot_mapping = at::empty({batch}, rows.options());
  at::Tensor table = at::empty({batch, max_pages}, seq_lens.options());
  at::Tensor lens = at::empty({batch}, seq_lens.options());
  at::Tensor lengths = at::empty({batch}, seq_lens.options());
  const DecodePlacesParams params{
      .batch = batch,
      .num_rows = seq_lens.size(0),
      .max_pages = static_cast<int>(max_pages),
      .page_size = static_cast<int>(page_size),
      .seq_lens = seq_lens.const_data_ptr<int>(),
      .block_table = block_table.const_data_ptr<int>(),
      .block_table_stride = block_table.stride(0),
      .rows = rows.const_data_ptr<int64_t>(),
      .active = data_or_null<bool>(active),
      .positions = positions.mutable_data_ptr<int>(),
      .slot_mapping = slot_mapping.mutable_data_ptr<int64_t>(),
      .table = table.mutable_data_ptr<int>(),
      .lens = lens.mutable_data_ptr<int>(),
      .lengths = lengths.mutable_data_ptr<int>(),
  };
  check_launch(check.op, run_decode_places(params, c10::cuda::getCurrentCUDAStream()));
  return {positions, slot_mapping, table, lens, lengths};
}

}  // namespace fusedkv::ops

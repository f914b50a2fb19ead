#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace fusedkv::ops {

at::Tensor attention_schedule(const at::Tensor& seq_lens, int64_t max_seq_len, int64_t num_query_tokens,
                              int64_t num_query_heads, int64_t num_kv_heads, int64_t window) {
  const Checker check("attention_schedule", seq_lens);
  check.tensor("seq_lens", seq_lens, kInt32, {kAny});
  FUSEDKV_EXPECT(check.op, max_seq_len >= 0 && max_seq_len <= kMaxInt, "max_seq_len", "0 to 2^31 - 1",
                 max_seq_len);
  FUSEDKV_EXPECT(check.op, num_query_tokens >= 1 && num_query_tokens <= 16, "num_query_tokens", "1 to 16",
                 num_query_tokens);
  const bool divides = num_kv_heads > 0 && num_query_heads > 0 && num_query_heads % num_kv_heads == 0;
  FUSEDKV_EXPECT(check.op, divides, "num_query_heads", c10::str("a multiple of num_kv_heads ", num_kv_heads),
                 num_query_heads);
  check.window(window);
  const int64_t blocks = seq_lens.size(0) * (max_seq_len / kBlockTokens + 1 + kMostItemCost);
  const int64_t reads = head_rows(num_query_tokens, num_query_heads, num_kv_heads);
  FUSEDKV_EXPECT(check.op, blocks <= kMaxInt / reads, "max_seq_len",
                 c10::str("fewer than 2^31 blocks of 64 tokens in the batch, and ", kMostItemCost,
                          " more a sequence, each counted ", reads, " times"),
                 c10::str(seq_lens.size(0), " sequences of ", max_seq_len, " tokens"));

  const c10::cuda::CUDAGuard guard(seq_lens.device());
  const int64_t words = words_of_schedule(seq_lens.size(0), num_query_tokens, num_query_heads, num_kv_heads);
  at::Tensor schedule = at::empty({words}, seq_lens.options());
  const AttentionScheduleParams params{
      .batch = static_cast<int>(seq_lens.size(0)),
      .num_query_tokens = static_cast<int>(num_query_tokens),
      .num_q_heads = static_cast<int>(num_query_heads),
      .num_kv_heads = static_cast<int>(num_kv_heads),
      .window = static_cast<int>(window),
      .max_seq_len = max_seq_len,
      .seq_lens = seq_lens.const_data_ptr<int>(),
      .schedule = schedule.mutable_data_ptr<int>(),
  };
  check_launch(check.op, run_attention_schedule(params, c10::cuda::getCurrentCUDAStream()));
  return schedule;
}

}  // namespace fusedkv::ops

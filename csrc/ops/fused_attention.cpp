#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace fusedkv::ops {

at::Tensor fused_attention(const at::Tensor& q, at::TensorList k_sources, at::TensorList v_sources,
                           const OptionalTensor& key_weights, const OptionalTensor& value_weights,
                           const at::Tensor& block_table, const at::Tensor& seq_lens,
                           const at::Tensor& schedule, double scale, int64_t window, bool early_cache,
                           bool keep_sources) {
  const Checker check("fused_attention", q);
  check.tensor("q", q, kHalf, {kAny, kAny, kAny, kAny});
  const int64_t batch = q.size(0), num_tokens = q.size(1), num_q_heads = q.size(2), d = q.size(3);
  check.head_dim(d);
  FUSEDKV_EXPECT(check.op, num_tokens >= 1 && num_tokens <= 16, "q", "1 to 16 query tokens a sequence",
                 num_tokens);

  FUSEDKV_EXPECT(check.op, !k_sources.empty(), "k_sources", "1 or 2 tensors", 0);
  const at::Tensor& first = k_sources[0];
  FUSEDKV_EXPECT(check.op, first.dim() == 4, (Argument{"k_sources", 0}), "4 dimensions", first.dim());
  const int64_t num_kv_heads = first.size(2);
  FUSEDKV_EXPECT(check.op,
                 first.scalar_type() == q.scalar_type() || first.scalar_type() == at::kFloat8_e4m3fn,
                 (Argument{"k_sources", 0}),
                 "dtype " + dtype_name(q.scalar_type()) + ", that of q, or float8_e4m3fn on CUDA",
                 dtype_name(first.scalar_type()));
  const auto check_side = [&](const char* name, at::TensorList sources, const char* weights_name,
                              const OptionalTensor& weights) {
    const auto count = static_cast<int64_t>(sources.size());
    FUSEDKV_EXPECT(check.op, count == 1 || count == 2, name, "1 or 2 tensors", count);
    for (int64_t i = 0; i < count; ++i) {
      const Argument argument{name, i};
      check.cache(argument, sources[i], num_kv_heads, d, q, first);
      FUSEDKV_EXPECT(check.op, sources[i].strides() == sources[0].strides(), argument,
                     c10::str("strides ", sources[0].strides()), sources[i].strides());
    }
    check.fusion_weights(weights_name, weights, count, num_kv_heads, d);
  };
  check_side("k_sources", k_sources, "key_weights", key_weights);
  check_side("v_sources", v_sources, "value_weights", value_weights);

  FUSEDKV_EXPECT(check.op, num_kv_heads > 0 && num_q_heads > 0 && num_q_heads % num_kv_heads == 0, "q",
                 c10::str("query heads that are a multiple of ", num_kv_heads, " key/value heads"),
                 num_q_heads);
  check.tensor("block_table", block_table, kInt32, {batch, kAny});
  FUSEDKV_EXPECT(check.op, block_table.size(1) <= kMaxInt, "block_table", "fewer than 2^31 pages",
                 block_table.size(1));
  check.tensor("seq_lens", seq_lens, kInt32, {batch});
  check.tensor("schedule", schedule, kInt32,
               {words_of_schedule(batch, num_tokens, num_q_heads, num_kv_heads)});
  check.contiguous("schedule", schedule);
  check.aligned("schedule", schedule);
  check.window(window);

  const c10::cuda::CUDAGuard guard(q.device());
  at::Tensor out = at::empty(q.sizes(), q.options());
  if (batch == 0) return out;
  const at::Tensor queries = aligned_or_copy(q);
  const FusedAttentionParams params{
      .dtype = kernel_dtype(q),
      .cache_dtype = kernel_dtype(first),
      .batch = static_cast<int>(batch),
      .num_query_tokens = static_cast<int>(num_tokens),
      .num_q_heads = static_cast<int>(num_q_heads),
      .num_kv_heads = static_cast<int>(num_kv_heads),
      .head_dim = static_cast<int>(d),
      .q = queries.const_data_ptr(),
      .q_batch_stride = queries.stride(0),
      .q_token_stride = queries.stride(1),
      .q_head_stride = queries.stride(2),
      .out = out.mutable_data_ptr(),
      .num_k_sources = static_cast<int>(k_sources.size()),
      .num_v_sources = static_cast<int>(v_sources.size()),
      .k_sources = {paged_cache(k_sources[0]), paged_cache(k_sources.back())},
      .v_sources = {paged_cache(v_sources[0]), paged_cache(v_sources.back())},
      .cache = cache_geometry(first),
      .key_weights = data_or_null<float>(key_weights),
      .value_weights = data_or_null<float>(value_weights),
      .block_table = block_table.const_data_ptr<int>(),
      .block_table_stride = block_table.stride(0),
      .max_pages = static_cast<int>(block_table.size(1)),
      .seq_lens = seq_lens.const_data_ptr<int>(),
      .schedule = schedule.mutable_data_ptr<int>(),
      .scale = static_cast<float>(scale),
      .window = static_cast<int>(window),
      .early_cache = early_cache,
      .keep_sources = keep_sources,
  };
  check_launch(check.op, run_fused_attention(params, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace fusedkv::ops

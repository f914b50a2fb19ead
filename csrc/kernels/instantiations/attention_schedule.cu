#include <cub/block/block_scan.cuh>

#include "../launch.h"
#include "../schedule.cuh"

namespace fusedkv {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads) attention_schedule_kernel(const AttentionScheduleParams p) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  if (threadIdx.x == 0) p.schedule[0] = 0;
  int before = 0;
  for (int base = 0; base < p.batch; base += kThreads) {
    const int seq = base + threadIdx.x;
    int blocks = 0;
    if (seq < p.batch) {
      const int length = static_cast<int>(max(int64_t(0), min(int64_t(p.seq_lens[seq]), p.max_seq_len)));
      const int first = first_visible(length, p.num_query_tokens, p.window) / kBlockTokens;
      // An empty sequence gets a block too: whoever takes it writes the zeros of its output.
      blocks = max(1, ceil_div(length, kBlockTokens) - first);
    }
    int inclusive, total;
    Scan(storage).InclusiveSum(blocks, inclusive, total);
    if (seq < p.batch) p.schedule[seq + 1] = before + inclusive;
    before += total;
    __syncthreads();  // storage is used again
  }
  const int64_t counters =
      int64_t(p.batch) * p.num_kv_heads * num_row_blocks(p.num_q_heads, p.num_kv_heads, p.num_query_tokens);
  for (int64_t i = threadIdx.x; i < counters; i += kThreads) p.schedule[p.batch + 1 + i] = 0;
}

}  // namespace

cudaError_t run_attention_schedule(const AttentionScheduleParams& params, cudaStream_t stream) {
  attention_schedule_kernel<<<1, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace fusedkv

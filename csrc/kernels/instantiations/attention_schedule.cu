#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "../launch.h"
#include "../schedule.cuh"

namespace fusedkv {
namespace {

constexpr int kThreads = 512;

__global__ void __launch_bounds__(kThreads)
    attention_schedule_kernel(const AttentionScheduleParams p, int64_t counts, int64_t words) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  for (int64_t i = counts / 4 + int64_t(blockIdx.x) * kThreads + threadIdx.x; i < words / 4;
       i += int64_t(gridDim.x) * kThreads) {
    reinterpret_cast<uint4*>(p.schedule)[i] = {kEmpty, kEmpty, kEmpty, kEmpty};
  }
  if (blockIdx.x > 0) return;
  if (threadIdx.x == 0) p.schedule[0] = 0;
  if (p.batch + 1 + threadIdx.x < counts) p.schedule[p.batch + 1 + threadIdx.x] = 0;
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
}

}  // namespace

cudaError_t run_attention_schedule(const AttentionScheduleParams& params, cudaStream_t stream) {
  // The counts are one CTA's work; the others only help to fill the room for partial results.
  const int64_t words =
      words_of_schedule(params.batch, params.num_query_tokens, params.num_q_heads, params.num_kv_heads);
  constexpr int kWordsAThread = 16;
  const int blocks = static_cast<int>(std::min<int64_t>(words / (kThreads * kWordsAThread) + 1, 512));
  attention_schedule_kernel<<<blocks, kThreads, 0, stream>>>(params, counts_in_schedule(params.batch), words);
  return cudaGetLastError();
}

}  // namespace fusedkv

#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "../common/device.h"
#include "../launch.h"
#include "../schedule.cuh"

namespace fusedkv {
namespace {

constexpr int kThreads = 512;

__device__ int clamped_length(const AttentionScheduleParams& p, int seq) {
  return static_cast<int>(max(int64_t(0), min(int64_t(p.seq_lens[seq]), p.max_seq_len)));
}

// The place of a range, from the cumulative counts; `blocks`: of the batch.
__device__ RangePlace place_of(const AttentionScheduleParams& p, int blocks, int head_rows, bool in_step,
                               int ranges, int range, int unit_blocks) {
  const WorkSplit split(in_step ? blocks : blocks * head_rows, ranges, unit_blocks);
  RangePlace place{};
  if (range >= split.ranges || blocks == 0) return place;
  const int begin = split.begin(range), end = split.begin(range + 1);
  place.head_row = in_step ? 0 : begin / blocks;
  const int at = begin - place.head_row * blocks;
  int after = p.batch;  // the first sequence that begins after `at`
  for (int low = 0; low + 1 < after;) {
    const int middle = (low + after) / 2;
    (p.schedule[middle] <= at ? low : after) = middle;
    place.seq = low;
  }
  const int first = p.schedule[place.seq];
  place.block = at - first;
  place.blocks = p.schedule[place.seq + 1] - first;
  place.length = clamped_length(p, place.seq);
  place.remaining = end - begin;
  if (place.block > 0 && begin - place.block + place.blocks <= end)
    place.parts = range - split.range_of(begin - place.block) + 1;
  return place;
}

__global__ void __launch_bounds__(kThreads)
    attention_schedule_kernel(const AttentionScheduleParams p, int head_rows, bool in_step, int ranges,
                              int64_t counts, int64_t partials, int64_t words) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage storage;
  for (int64_t i = partials / 4 + int64_t(blockIdx.x) * kThreads + threadIdx.x; i < words / 4;
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
      const int length = clamped_length(p, seq);
      const int first = first_visible(length, p.num_query_tokens, p.window) / kBlockTokens;
      // An empty sequence gets a block too: whoever takes it writes the zeros of its output.
      blocks = max(1, ceil_div(length, kBlockTokens) - first);
    }
    int inclusive, total;
    Scan(storage).InclusiveSum(blocks, inclusive, total);
    if (seq < p.batch) p.schedule[seq + 1] = before + inclusive;
    before += total;
    __syncthreads();  // storage is used again, and the counts are read
  }
  auto* const places = reinterpret_cast<RangePlace*>(p.schedule + counts);
  for (int i = threadIdx.x; i < kUnitSizes * kMaxWorkers; i += kThreads)
    places[i] = place_of(p, before, head_rows, in_step, ranges, i % kMaxWorkers, 1 << i / kMaxWorkers);
}

}  // namespace

cudaError_t run_attention_schedule(const AttentionScheduleParams& params, cudaStream_t stream) {
  int multiprocessors;
  const cudaError_t error = count_sms(multiprocessors);
  if (error != cudaSuccess) return error;
  const int head_rows =
      params.num_kv_heads * num_row_blocks(params.num_q_heads, params.num_kv_heads, params.num_query_tokens);
  const dim3 grid = attention_grid(multiprocessors, head_rows);
  // Counts and places are one CTA's work; the others only help to fill the room for partial results.
  const int64_t words =
      words_of_schedule(params.batch, params.num_query_tokens, params.num_q_heads, params.num_kv_heads);
  constexpr int kWordsAThread = 16;
  const int blocks = static_cast<int>(std::min<int64_t>(words / (kThreads * kWordsAThread) + 1, 512));
  attention_schedule_kernel<<<blocks, kThreads, 0, stream>>>(params, head_rows, grid.x > 1 || head_rows == 1,
                                                             grid.y, counts_in_schedule(params.batch),
                                                             partials_in_schedule(params.batch), words);
  return cudaGetLastError();
}

}  // namespace fusedkv

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

// The last of counts 0 to `end` - 1 that is at most x; `count` gives them in ascending order.
template <class F>
__device__ int last_at_most(int x, int end, const F& count) {
  int found = 0;
  while (found + 1 < end) {
    const int middle = (found + end) / 2;
    (count(middle) <= x ? found : end) = middle;
  }
  return found;
}

// The work that is split: `blocks` of the batch for each of head_rows, or for one where they go in step.
struct Work {
  const int* counts;  // of blocks before each sequence
  int batch, blocks, head_rows;

  // The number of the first block of a range.
  __device__ int begin_of(const WorkSplit& split, int range) const {
    const int all = blocks + split.cost * batch;
    const int position = static_cast<int>(int64_t(range) * all * head_rows / split.ranges);
    const int head_row = position / all, at = position - head_row * all;
    const int seq = last_at_most(at, batch, [&](int i) { return counts[i] + split.cost * i; });
    const int block = at - counts[seq] - split.cost * (seq + 1);  // negative in what the item costs
    const int rounded = max(0, block + split.step / 2) / split.step * split.step;
    return head_row * blocks + min(counts[seq] + rounded, counts[seq + 1]);
  }

  // The number of the item that a block is in.
  __device__ int item_of(int block) const {
    const int head_row = block / blocks;
    return head_row * batch +
           last_at_most(block - head_row * blocks, batch, [&](int i) { return counts[i]; });
  }
  // How long a range takes, in blocks.
  __device__ int time_of(int begin, int end, int unit_blocks) const {
    if (begin == end) return 0;
    const int items = item_of(end - 1) - item_of(begin) + 1;
    return ceil_div(end - begin, unit_blocks) * unit_blocks + items * (unit_blocks / 2);
  }

  // `begins`: the number of the first block of each range, and of the end.
  __device__ RangePlace place_of(const AttentionScheduleParams& p, const int* begins, int range) const {
    const int begin = begins[range], end = begins[range + 1];
    RangePlace place{};
    if (begin == end) return place;
    place.head_row = begin / blocks;
    const int at = begin - place.head_row * blocks;
    place.seq = last_at_most(at, batch, [&](int i) { return counts[i]; });
    place.block = at - counts[place.seq];
    place.blocks = counts[place.seq + 1] - counts[place.seq];
    place.length = clamped_length(p, place.seq);
    place.remaining = end - begin;
    const int item = begin - place.block;
    if (place.block > 0) {
      const auto begin_of = [&](int i) { return begins[i]; };
      const int first = last_at_most(item, range + 1, begin_of);
      place.part = range - first;
      place.parts = last_at_most(item + place.blocks - 1, kMaxWorkers, begin_of) - first + 1;
    }
    return place;
  }
};

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
  // Of both splits of WorkSplit, that into fewer ranges last.
  constexpr int kSplits = 2 * kUnitSizes;
  __shared__ int begins[kSplits][kMaxWorkers + 1], longest[kSplits];
  const Work work{p.schedule, p.batch, before, in_step ? 1 : head_rows};
  if (threadIdx.x < kSplits) longest[threadIdx.x] = 0;
  for (int i = threadIdx.x; i < kSplits * (kMaxWorkers + 1); i += kThreads) {
    const int which = i / (kMaxWorkers + 1), range = i % (kMaxWorkers + 1);
    const WorkSplit split(before * work.head_rows, ranges, 1 << which % kUnitSizes, which >= kUnitSizes);
    begins[which][range] =
        range < split.ranges && before > 0 ? work.begin_of(split, range) : before * work.head_rows;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kSplits * kMaxWorkers; i += kThreads) {
    const int which = i / kMaxWorkers;
    const int* const begin = begins[which] + i % kMaxWorkers;
    atomicMax(longest + which, work.time_of(begin[0], begin[1], 1 << which % kUnitSizes));
  }
  __syncthreads();
  auto* const places = reinterpret_cast<RangePlace*>(p.schedule + counts);
  for (int i = threadIdx.x; i < kUnitSizes * kMaxWorkers; i += kThreads) {
    const int size = i / kMaxWorkers, fewer = size + kUnitSizes;
    const int which = longest[fewer] <= longest[size] ? fewer : size;
    places[i] = work.place_of(p, begins[which], i % kMaxWorkers);
  }
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

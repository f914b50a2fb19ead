// How fused_attention splits its work.
//
// The work is in blocks of 64 tokens of one sequence, read for one key/value head and up to 64 query rows (a
// row block). Each worker takes an equal range of them, so that every CTA reads the same number of bytes
// whatever the lengths are, and the device finds its share from B + 1 cumulative counts. The blocks of one
// (sequence, head, row block) are an item.
//
// Memory serves some SMs faster than others. So where there is much to do, the last blocks of the batch, the
// tail, are left out of the ranges and cut into chunks, which workers claim from a counter when they are done
// with their ranges. Ranges and chunks together are the intervals. They depend on the lengths alone: an item
// that crosses intervals leaves a partial result in each, and they are added in the order of the intervals,
// so that the result does not depend on who claimed what. Who arrives last at the item's counter adds them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"

namespace fusedkv {

__host__ __device__ inline int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// The first position that some query token of the sequence sees.
__host__ __device__ inline int first_visible(int length, int num_query_tokens, int window) {
  const int end = length - num_query_tokens + 1;  // subtracting the window first could overflow
  return window > 0 && end > window ? end - window : 0;
}

// Row blocks of one key/value head.
__host__ __device__ inline int num_row_blocks(int num_q_heads, int num_kv_heads, int num_query_tokens) {
  return ceil_div(num_q_heads / num_kv_heads * num_query_tokens, kBlockRows);
}

// Which blocks a worker takes. Positions count blocks: head_row * blocks + block in the batch, head_row being
// head * row blocks + row block. Where the heads fit the grid they go in step: one worker a head row reads a
// range of the batch at the same time, because the heads of a token are neighbours in memory, which DRAM
// reads together faster. Else all positions are split evenly. All in 32 bits and with few divisions: they
// take longer than a round trip to the L2. attention_schedule refuses batches of more.
//
// The grid is (head rows in step or 1, ranges).
inline dim3 attention_grid(int multiprocessors, int head_rows) {
  const bool in_step = multiprocessors / head_rows * head_rows * 10 >= multiprocessors * 9;
  return in_step ? dim3(head_rows, multiprocessors / head_rows) : dim3(1, multiprocessors);
}

// The tail. With more and smaller chunks the workers end closer together, and there is more to add up.
constexpr int kTailMinUnits = 16;   // of a range, for there to be a tail
constexpr int kTailSixteenths = 2;  // of all blocks
constexpr int kChunkMinUnits = 2;
constexpr int kChunksPerWorker = 6;  // at most, on average: the workspace has slots for so many
constexpr int kMaxClaims = 15;       // of a worker: a lane for each partial result, two an interval
constexpr int kMaxTailBatch = 512;   // sequences, which are searched for the beginning of a chunk
static_assert(kChunkMinUnits >= 2, "the next chunk is claimed before the last unit of this one");
static_assert(kChunksPerWorker <= kMaxClaims, "while chunks are left, some worker claims");

struct WorkSplit {
  int blocks;                 // of the batch, for one head row
  int ranges, share, extra;   // the first `extra` ranges are one block longer than `share`
  int chunk = 1, chunks = 0;  // blocks of a chunk, number of chunks: of one head row where those are in step

  __device__ WorkSplit(int batch_blocks, int head_rows, int unit_blocks, bool may_have_tail) {
    blocks = batch_blocks;
    int length = gridDim.x == 1 ? blocks * head_rows : blocks;
    // Never more than units: smaller shares would only make more partial results to merge.
    ranges = max(1, min(int(gridDim.y), ceil_div(length, unit_blocks)));
    share = length / ranges;
    if (may_have_tail && share >= kTailMinUnits * unit_blocks) {
      const int tail = length / 16 * kTailSixteenths;
      chunk = unit_blocks * max(kChunkMinUnits, ceil_div(tail, kChunksPerWorker * ranges * unit_blocks));
      chunks = tail / chunk;
      length -= chunks * chunk;
      share = length / ranges;
    }
    extra = length - share * ranges;
  }
  __device__ int tail_begin() const { return ranges * share + extra; }
  __device__ int begin(int interval) const {
    if (interval > ranges) return tail_begin() + (interval - ranges) * chunk;
    return interval * share + min(interval, extra);
  }
  __device__ int interval_of(int position) const {
    const int longer = extra * (share + 1), tail = tail_begin();
    int before = 0, from = 0, size = share + 1;  // the intervals before those of the position's size
    if (position >= longer) before = extra, from = longer, size = share;
    if (position >= tail) before = ranges, from = tail, size = chunk;
    return min(before + (position - from) / size, ranges + chunks - 1);
  }
};

}  // namespace fusedkv

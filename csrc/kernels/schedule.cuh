// How fused_attention splits its work.
//
// The work is in blocks of 64 tokens of one sequence, read for one key/value head and up to 64 query rows (a
// row block). The blocks of one (sequence, head, row block) are an item; to begin and to end one takes about
// as long as half a unit of several blocks does, whatever its length. Each worker takes an equal range of
// both, to the nearest unit of an item, so that all CTAs end together whatever the lengths are. An item that
// crosses workers leaves partial results, which the last of its workers merges, or attention_merge_kernel; of
// many, some of the workers before it merge groups first. For there to be few of them, some workers take no
// range where the longest of all then is no longer.
// Where each range begins is computed once for all layers, because its divisions take a kernel longer than a
// trip to the L2.
//
// Partial results need no counter and no fence: each of their words tells by itself whether it is there yet,
// because until then it is kEmpty, and whoever merges them makes it that again for the next launch. So a
// result is known one trip to the L2 and back after it was written. Workers wait for none but those before
// them in the grid, which are there already because a GPU starts CTAs in order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"

namespace fusedkv {

constexpr uint32_t kEmpty = 0xfff5eed5;  // a NaN, and none that arithmetic gives

// Of more partial results than that of one item, groups are merged first.
constexpr int kMostPartsAtOnce = 34, kGroupParts = 16;

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

// Which blocks a worker takes. They are numbered head_row * blocks of the batch + block in the batch,
// head_row being head * row blocks + row block. Positions count them too, and what each item costs before it.
// Where the heads fit the grid they go in step: one worker a head row reads a range of the batch at the same
// time, because the heads of a token are neighbours in memory, which DRAM reads together faster. Else all
// positions are split evenly. All in 32 bits: attention_schedule refuses batches of more.
//
// The grid is (head rows in step or 1, ranges).
inline dim3 attention_grid(int multiprocessors, int head_rows) {
  const int workers = min(multiprocessors, kMaxWorkers);
  const bool in_step = workers / head_rows * head_rows * 10 >= workers * 9;
  return in_step ? dim3(head_rows, workers / head_rows) : dim3(1, workers);
}

// How `blocks`, of all head rows that are split, are shared out.
struct WorkSplit {
  int ranges;
  int cost;  // what an item counts for besides its blocks, in blocks
  int step;  // ranges begin at multiples of it in their item

  // With `fewer`, as few ranges as the largest one would have units for, if the units were all there is.
  __device__ WorkSplit(int blocks, int most_ranges, int unit_blocks, bool fewer) {
    const int units = max(1, ceil_div(blocks, unit_blocks));
    ranges = fewer ? ceil_div(units, ceil_div(units, most_ranges)) : most_ranges;
    cost = unit_blocks / 2, step = unit_blocks;
    if (blocks / most_ranges >= unit_blocks + cost) return;
    // Short ranges, rounded, might be empty. And never more ranges than units: smaller shares would only make
    // more partial results to merge.
    ranges = min(most_ranges, units), cost = 0, step = 1;
  }
};
static_assert(kMostItemCost == 4 / 2, "a unit has 4 blocks at most");

// Where a range begins, as the schedule has it for each range and size of units.
struct alignas(16) RangePlace {
  int head_row;                    // 0 where the heads go in step
  int seq, block, blocks, length;  // of the sequence: block in it, its blocks and its length
  int remaining;                   // blocks of the range
  // The number of its partial result among those of the item it begins in, and how many that has; 0 and 0
  // where it begins an item.
  int part, parts;
};
static_assert(sizeof(RangePlace) == kWordsOfPlace * sizeof(int));

}  // namespace fusedkv

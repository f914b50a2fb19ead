// How fused_attention splits its work.
//
// A work unit is one block of 64 tokens of one sequence, read for one key/value head and up to 64 query
// rows. Units are ordered by sequence, then head, then row block, then token block; worker w of W takes the
// units [total * w / W, total * (w + 1) / W). So every CTA reads the same number of bytes whatever the
// lengths are, and the device finds its share from B + 1 cumulative counts. The units of one (sequence, head,
// row block) are an item; an item that crosses workers leaves partial results, which the last worker to
// arrive at the item's counter merges.
#pragma once

#include <cuda_runtime.h>

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

struct WorkSplit {
  int64_t total;
  int64_t workers;  // never more than there are units, so that no worker between two others is idle

  __device__ WorkSplit(int64_t total_units, int grid)
      : total(total_units), workers(min(int64_t(grid), total)) {}
  __device__ int64_t begin(int64_t worker) const { return total * worker / workers; }
  __device__ int64_t owner(int64_t unit) const { return ((unit + 1) * workers - 1) / total; }
};

}  // namespace fusedkv

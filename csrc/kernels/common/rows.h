// How the kernels that stream rows of Hkv * D channels share them out to threads.
//
// A thread keeps one column of 8 channels for all its rows, so that what belongs to a channel (weights,
// scales, sums) is loaded once and stays in registers. A CTA is threads.x columns wide and threads.y rows
// high.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

namespace fusedkv {

constexpr int kRowThreads = 256;

struct RowTiling {
  dim3 threads;
  unsigned column_blocks;
};

inline RowTiling row_tiling(int num_heads, int head_dim, int max_threads = kRowThreads) {
  const unsigned columns = num_heads * head_dim / 8;
  const unsigned column_blocks = (columns + max_threads - 1) / max_threads;
  const unsigned width = (columns + column_blocks - 1) / column_blocks;
  return {dim3(width, max_threads / width), column_blocks};
}

// Splits rows into at most `max_blocks` equal ranges, each a multiple of `step` rows but for the last one.
struct RowSplit {
  int64_t rows_per_block, row_blocks;
};

inline RowSplit split_rows(int64_t rows, int64_t step, int64_t max_blocks) {
  const int64_t steps = std::max<int64_t>(1, (rows + step - 1) / step);
  const int64_t blocks = std::max<int64_t>(1, std::min(steps, max_blocks));
  const int64_t rows_per_block = (steps + blocks - 1) / blocks * step;
  return {rows_per_block, (rows + rows_per_block - 1) / rows_per_block};
}

}  // namespace fusedkv

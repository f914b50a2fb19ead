// decode_places: where a decode step writes and what it reads, from the rows of the block table.
//
// Bound by latency: row, length and page are three loads, one after the other. A CTA takes a sequence; while
// its first thread finds the place, the others copy the pages.
#pragma once

#include "common/overlap.cuh"
#include "common/vec.cuh"
#include "launch.h"

namespace fusedkv {

constexpr int kPlaceThreads = 128;

__global__ void __launch_bounds__(kPlaceThreads)
    decode_places_kernel(const __grid_constant__ DecodePlacesParams p) {
  // The next kernel is not let in early: fused_attention may read lens and table before those before it end.
  wait_for_previous_kernels();
  const int64_t sequence = blockIdx.x, row = p.rows[sequence];
  const bool known = index_is_inside(row, p.num_rows);
  const int* const pages = p.block_table + (known ? row : 0) * p.block_table_stride;
  if (threadIdx.x == 0) {
    const int before = known ? p.seq_lens[row] : 0, column = before / p.page_size;
    const bool active = p.active == nullptr || p.active[sequence];
    const int64_t page = known && before >= 0 && column < p.max_pages ? pages[column] : -1;
    const bool written = active && page >= 0;
    p.positions[sequence] = before;
    p.slot_mapping[sequence] = written ? page * p.page_size + before % p.page_size : -1;
    p.lens[sequence] = written ? before + 1 : 0;
    p.lengths[sequence] = before + written;
  }
  int* const table = p.table + sequence * p.max_pages;
#pragma unroll 4
  for (int i = threadIdx.x; i < p.max_pages; i += kPlaceThreads) table[i] = known ? pages[i] : -1;
}

inline cudaError_t launch_decode_places(const DecodePlacesParams& p, cudaStream_t stream) {
  return launch_overlapping(decode_places_kernel, dim3(static_cast<unsigned>(p.batch)), dim3(kPlaceThreads),
                            0, stream, p);
}

}  // namespace fusedkv

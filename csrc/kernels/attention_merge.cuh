// Merges the partial results of items in a kernel of its own, where an item has many of them and there are
// few items: in fused_attention one CTA an item would do it, row after row, while all others have ended.
#pragma once

#include "attention_state.cuh"

namespace fusedkv {

constexpr int kMergeThreads = 256;

// A CTA merges one query row of an item: D / 4 threads share the row, and the parts are dealt out to groups
// of those, whose sums meet in shared memory. The order of all additions is fixed. `places`: of the ranges,
// for the units that were used; `heads_in_step` and `ranges`: the grid that left the parts. The grid of this
// kernel is (rows of a row block, sequences * head rows).
template <int D>
__global__ void __launch_bounds__(kMergeThreads)
    attention_merge_kernel(const __grid_constant__ AttentionParams p, const RangePlace* places,
                           int heads_in_step, int ranges) {
  constexpr int kRowThreads = D / 4, kGroups = kMergeThreads / kRowThreads;
  constexpr int kAtOnce = 5;  // with heads of 128, all parts of a row where four heads have 132 CTAs
  __shared__ int merger;      // the range in which the item ends, if it did not begin there
  __shared__ float2 stats_of[kGroups];
  __shared__ float4 sums[kGroups][kRowThreads];

  // The schedule is older than the kernel before this one, which has seen it.
  const int head_rows = p.num_kv_heads * p.row_blocks;
  const int seq = blockIdx.y / head_rows, head_row = blockIdx.y % head_rows;
  const int row_block = head_row % p.row_blocks, row = blockIdx.x;
  if (threadIdx.x == 0) merger = -1;
  __syncthreads();
  for (int i = threadIdx.x; i < ranges; i += kMergeThreads) {
    const RangePlace place = places[i];
    const bool same_head = heads_in_step > 1 || place.head_row == head_row;
    if (place.part > 0 && place.part + 1 == place.parts && place.seq == seq && same_head) merger = i;
  }
  __syncthreads();
  const int last = merger, count = last < 0 ? 0 : min(places[last].part, last) + 1;
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (count == 0 || row >= item_rows(p, row_block)) return;

  const int channel = threadIdx.x % kRowThreads * 4, group = threadIdx.x / kRowThreads;
  const int first_worker = (last + 1 - count) * heads_in_step + (heads_in_step > 1 ? head_row : 0);
  // See plan_merge().
  float* const parts = p.partials + 2 * first_worker * p.partial_words + row * partial_row(D);
  const auto part_at = [&](int i) {
    return parts + (2 * i * heads_in_step + (i == 0 ? 1 : 0)) * p.partial_words;
  };
  MergedRow merged;
#pragma unroll 1
  for (int first = group; first < count; first += kGroups * kAtOnce) {
    float4 y[kAtOnce];
    float2 stats[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      stats[i] = {kNothing, 0.f}, y[i] = {};
      if (first + i * kGroups >= count) continue;
      const float* const part = part_at(first + i * kGroups);
      stats[i] = load_published(reinterpret_cast<const float2*>(part + D));
      y[i] = load_published(reinterpret_cast<const float4*>(part + channel));
    }
    merged.add_all(stats, y);
  }
  if (channel == 0) stats_of[group] = {merged.max, merged.sum};
  sums[group][channel / 4] = {merged.x[0], merged.x[1], merged.x[2], merged.x[3]};
  __syncthreads();  // and all have read the statistics of the row
#pragma unroll 1
  for (int i = group; i < count; i += kGroups) clear_partial<D>(part_at(i), channel);
  if (group > 0) return;
#pragma unroll 1
  for (int other = 1; other < min(kGroups, count); ++other) {
    merged.rescale(fmaxf(merged.max, stats_of[other].x));
    merged.add(stats_of[other], sums[other][channel / 4]);
  }
  store_output<D>(item_output<D>(p, seq, head_row / p.row_blocks, row_block), row, channel, merged);
}

}  // namespace fusedkv

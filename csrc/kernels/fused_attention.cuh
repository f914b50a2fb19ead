// Attention of a few query tokens over a paged cache with one or two sources for keys and for values.
//
// scores = sum_s (a_s * q) K_s^T and out = sum_s b_s * (P V_s): the second source costs its bytes, and
// neither K_i nor V_i is ever formed. docs/kernels.md has the picture; in short:
//  - One CTA an SM walks a contiguous range of token blocks, then chunks that it claims (schedule.cuh), a
//  unit
//    at a time. Each warp keeps loading its own slice of each unit, a few units ahead, with 16-byte cp.async,
//    which serve any page size.
//  - The query rows of one key/value head (G heads x Q tokens) fill the columns of the tensor-core tile: a
//    warp has 8 or 16. More rows are shared out to a team of warps, each over the tokens of all of them. A
//    team keeps its own softmax state and meets nobody until its item ends: the main loop has one barrier per
//    unit among the warps of a team, and none where a team is one warp.
#pragma once

#include <algorithm>
#include <bit>

#include "attention_state.cuh"

namespace fusedkv {

template <class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    fused_attention_kernel(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(kRingAlignment) char ring[];
  __shared__ AttentionControl<S> control;

  // The first loads of all that is needed to find the first block, together.
  const SequenceInfo first_sequences = SequenceInfo::load(p, min(int(threadIdx.x % 32), p.batch - 1));
  const int stages = p.stages;
  const WorkSplit split(max(0, min(p.schedule[p.batch], p.max_blocks)), p.num_kv_heads * p.row_blocks,
                        S::kUnitBlocks, S::kHasTail && p.batch <= kMaxTailBatch);
  if (blockIdx.y >= split.ranges || split.blocks == 0) return;

  UnitLoader<S> loader(p, split, first_sequences);
  if (split.chunks > 0) {
    control.sequences.copy(p);
    if (threadIdx.x <= kMaxClaims) control.claims[threadIdx.x] = AttentionControl<S>::kUnknown;
  }

  // Each of the worker's partial results has a thread of its own, which counts the worker in at the item's
  // counter and keeps what that was. After a barrier, one thread's release covers what all of them wrote.
  int partials = 0, counted = -1;
  const auto is_to_count = [&] { return threadIdx.x < partials && counted < 0; };
  const auto merge_counter = [&] {
    const SharedItem& item = control.shared_items[threadIdx.x];
    return p.merge_counter(item.seq, item.head, item.row_block);
  };

  AttentionState<S> state;
  bool new_item = true;
  int load_stage = 0, read_stage = 0, units = 0;  // units: in the ring
  for (int step = stages > 1 ? 1 - stages : 0; loader.left > 0 || units > 0; ++step) {
    const bool reads = step >= 0;  // at first it only loads
    if (stages == 1) {
      __syncthreads();
    } else if (reads) {
      wait_for_oldest(stages);
      // A new item: all have loaded their share of the queries, and left the stage where the teams met.
      new_item ? __syncthreads() : team_barrier<S>();
    }
    // Into the stage of the unit before, which the team has left. This is the only place that loads, because
    // instructions are fetched from memory too: a copy of this code costs a short kernel a microsecond.
    if (loader.left > 0) {
      loader.load_unit(p, split, control, ring, load_stage, [&] {
        // At once: else whoever ends last would be the last of most of its items, and merge them all.
        if (new_item && is_to_count()) counted = count_release(merge_counter());
      });
      load_stage = load_stage + 1 == stages ? 0 : load_stage + 1;
      ++units;
    }
    cp_async_commit();  // empty groups keep the count of groups equal to the count of units
    if (!reads) continue;
    if (stages == 1) {
      cp_async_wait<0>();
      __syncthreads();
    }
    char* const stage = ring + read_stage * S::kStageBytes;
    const Unit& unit = control.units[read_stage][threadIdx.x / 32];
    if (new_item) {
      state.start(p, control, stage);
      __syncthreads();  // all have read the queries before somebody's next load overwrites them
      new_item = false;
    }
    state.add_unit(p, unit, stage, control.visible[read_stage]);
    read_stage = read_stage + 1 == stages ? 0 : read_stage + 1;
    --units;

    if (unit.ends) {
      __syncthreads();  // all teams have left the stage
      state.finish(control, stage);
      __syncthreads();
      const bool whole = unit.slot == Unit::kWhole;
      combine<S>(reinterpret_cast<const float*>(stage), S::kTeams, item_rows<S>(p, unit.row_block),
                 whole ? nullptr : static_cast<float*>(p.workspace) + unit.slot * S::kPartialFloats,
                 item_output<S>(p, unit.seq, unit.head, unit.row_block));
      partials += !whole;
      new_item = true;
    }
  }
  // Without a tail only now, for both items at once: a release waits for a round trip to the L2, and an item
  // that the worker begins in is not complete much earlier anyway.
  __syncthreads();
  if (is_to_count()) counted = count_arrival(merge_counter());
  if (threadIdx.x < partials) {
    int& parts = control.shared_items[threadIdx.x].parts;
    if (counted == parts - 1) {
      *merge_counter() = 0;
    } else {
      parts = 0;
    }
  }
  if (split.chunks > 0) {
    __threadfence();                        // what was counted in the loop comes before the reads below
    const bool counts = threadIdx.x == 32;  // not in the warp that has just waited for its counters
    if (counts && count_claim(p.done_counter()) == gridDim.x * gridDim.y - 1) {
      *p.claim_counter() = *p.done_counter() = 0;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < partials; ++i) {
    const SharedItem& item = control.shared_items[i];
    if (item.parts > 0) merge_partials<S>(p, item, ring);
  }
}

struct AttentionLaunch {
  int stages, multiprocessors;
  size_t shared_bytes;
};

// One CTA an SM, with as many stages as its shared memory holds.
template <class S>
cudaError_t plan_attention_launch(AttentionLaunch& launch) {
  int device, per_block;
  cudaError_t error = cudaGetDevice(&device);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  read(launch.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error != cudaSuccess) return error;
  launch.stages = min(kMaxStages, (per_block - int(sizeof(AttentionControl<S>))) / S::kStageBytes);
  if (launch.stages < 1) return cudaErrorInvalidConfiguration;
  launch.shared_bytes = launch.stages * S::kStageBytes;
  return cudaFuncSetAttribute(fused_attention_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(launch.shared_bytes));
}

// Calls f with the shape that fits the number of sources and of query rows.
template <class T, class C, int D, class F>
auto dispatch_attention_shape(const FusedAttentionParams& params, F&& f) {
  const int rows = params.num_q_heads / params.num_kv_heads * params.num_query_tokens;
  const auto with_rows = [&]<int kSources>() {
    if (rows <= 8) return f(AttentionShape<T, C, D, kSources, 1, 1>{});
    // Two tiles with two wide sources spill registers: up to 32 rows, more warps share them instead.
    constexpr bool kWide = kSources == 2 && D == 128 && sizeof(C) == 2;
    if (rows <= 16) return f(AttentionShape<T, C, D, kSources, kWide ? 1 : 2, kWide ? 2 : 1>{});
    if (rows <= 32) return f(AttentionShape<T, C, D, kSources, kWide ? 1 : 2, kWide ? 4 : 2>{});
    return f(AttentionShape<T, C, D, kSources, 2, 4>{});
  };
  if (params.num_k_sources == 1 && params.num_v_sources == 1) return with_rows.template operator()<1>();
  return with_rows.template operator()<2>();
}

template <class T, class C, int D>
size_t attention_workspace_bytes(const FusedAttentionParams& params) {
  return dispatch_attention_shape<T, C, D>(params, [](auto shape) -> size_t {
    using S = decltype(shape);
    AttentionLaunch launch;
    if (plan_attention_launch<S>(launch) != cudaSuccess) return 0;
    const size_t intervals = launch.multiprocessors * (1 + (S::kHasTail ? kChunksPerWorker : 0));
    return intervals * 2 * S::kPartialFloats * sizeof(float);
  });
}

template <class T, class C, int D>
cudaError_t launch_attention(const FusedAttentionParams& params, cudaStream_t stream) {
  return dispatch_attention_shape<T, C, D>(params, [&](auto shape) {
    using S = decltype(shape);
    AttentionLaunch launch;
    const cudaError_t error = plan_attention_launch<S>(launch);
    if (error != cudaSuccess) return error;
    const int group = params.num_q_heads / params.num_kv_heads, page_size = params.cache.page_size;
    const int row_blocks = num_row_blocks(params.num_q_heads, params.num_kv_heads, params.num_query_tokens);
    const int head_rows = params.num_kv_heads * row_blocks;
    const bool shifts = std::has_single_bit(static_cast<unsigned>(page_size));
    const AttentionParams p{
        params,
        group,
        row_blocks,
        shifts ? std::countr_zero(static_cast<unsigned>(page_size)) : -1,
        static_cast<int>(std::min<int64_t>(int64_t(params.max_pages) * page_size, INT32_MAX)),
        INT32_MAX / head_rows,
        launch.stages,
    };
    const dim3 grid = attention_grid(launch.multiprocessors, head_rows);
    fused_attention_kernel<S><<<grid, S::kThreads, launch.shared_bytes, stream>>>(p);
    return cudaGetLastError();
  });
}

}  // namespace fusedkv

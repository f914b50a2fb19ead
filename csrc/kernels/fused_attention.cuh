// Attention of a few query tokens over a paged cache with one or two sources for keys and for values.
//
// scores = sum_s (a_s * q) K_s^T and out = sum_s b_s * (P V_s): the second source costs its bytes, and
// neither K_i nor V_i is ever formed. docs/kernels.md has the picture; in short:
//  - One CTA an SM walks a contiguous range of token blocks (schedule.cuh), a unit at a time. Each warp
//    computes its slice of the unit. Slices are loaded a few units ahead, with 16-byte cp.async, which serve
//    any page size, by the warp itself or, where it has much to compute, by warps that only load.
//  - The query rows of one key/value head (G heads x Q tokens) fill the columns of the tensor-core tile: a
//    warp has 8 or 16. More rows are shared out to a team of warps, each over the tokens of all of them, or
//    to a warpgroup, where they are rows. A team keeps its own softmax state and meets nobody until its item
//    ends: it waits for its slices to be full, and says when they are empty.
#pragma once

#include <algorithm>
#include <bit>

#include "attention_merge.cuh"
#include "attention_state.cuh"
#include "attention_warpgroup.cuh"
#include "common/device.h"
#include "common/overlap.cuh"

namespace fusedkv {

// Brings the kernel's parameters into the constant cache, one of each line of it.
__device__ __forceinline__ void fetch_parameters(const AttentionParams& p) {
  const auto bits = [](const void* pointer) { return reinterpret_cast<uint64_t>(pointer); };
  need_here(bits(p.k_sources[0].data) ^ bits(p.v_sources[0].data) ^ bits(p.v_sources[1].data) ^
            p.cache.num_pages ^ bits(p.block_table) ^ p.group ^ bits(p.partials));
}

template <class S>
__global__ void __launch_bounds__(S::kCtaThreads, 1)
    fused_attention_kernel(const __grid_constant__ AttentionParams p) {
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (S::kWgmma) return;  // has_wgmma() sees that there is nothing here
#endif
  extern __shared__ __align__(kRowAlignment) char shared[];
  __shared__ AttentionControl<S> control;
  char* ring = shared;
  if constexpr (S::kWgmma) ring += -smem_address(shared) % S::kAlignment + S::kQueryBytes;

  fetch_parameters(p);
  if constexpr (!S::kLoadsItself) {
    control.ring.init(p.stages);
    __syncthreads();
  }
  if (!p.early_cache) wait_for_previous_kernels();
  // The first loads, together. The pages of a single sequence come into the L1, before it is known which ones
  // are needed.
  const RangePlace range = p.places[S::kUnitSize * kMaxWorkers + blockIdx.y];
  constexpr int kLine = 128 / sizeof(int);
  int pages = 0;
  if (p.batch == 1 && threadIdx.x * kLine < p.max_pages) pages = p.block_table[threadIdx.x * kLine];
  const uint64_t policy = source_policy(p);
  need_here(pages ^ policy);
  if (range.remaining <= 0) return wait_for_previous_kernels();  // else this launch might end before them
  BlockCursor from;
  from.begin_at(p, range, range.head_row + blockIdx.x);
  if constexpr (!S::kLoadsItself) {
    if (threadIdx.x >= S::kThreads) {
      if constexpr (S::kMovesRegisters) lower_registers<S::kLoaderRegisters>();
      UnitLoader<S>(from, policy).load_all(p, ring, control.ring);
      return;
    }
    if constexpr (S::kMovesRegisters) raise_registers<S::kRegisters>();
  }

  std::conditional_t<S::kLoadsItself, OwnLoader<S>, NoLoader> loader(p, from, policy);
  std::conditional_t<S::kLoadsItself, BlockPlace, BlockCursor> at = from;
  if (threadIdx.x == 0) {
    control.merge = plan_merge<S>(p, at, max(0, min(range.part, int(blockIdx.y))), range.parts);
  }
  if constexpr (!S::kLoadsItself) wait_for_previous_kernels();
  int ahead = p.stages - 1;  // units that a warp loads for itself before it computes the first
  const auto address = [](const auto& barrier) { return smem_address(&barrier); };
  const int team = threadIdx.x / 32 / S::kTeamWarps;
  uint32_t item_parities = 0;  // bits: of the stages
  RingPlace place;
  while (true) {
    std::conditional_t<S::kWgmma, WarpgroupState<S>, AttentionState<S>> state;
    if constexpr (S::kSharedQueries) state.queries = smem_address(ring) - S::kQueryBytes;
    if constexpr (!S::kLoadsItself) {
      mbarrier_wait(address(control.ring.item[place.stage]), item_parities >> place.stage & 1);
      item_parities ^= 1u << place.stage;
      state.start(p, control, ring + place.stage * S::kStageBytes);
      mbarrier_arrive(address(control.ring.started[place.stage]));
    }
    int left = at.item_blocks();
    // A worker has at most two partial results: of the item it begins in, and of the one it ends in.
    constexpr int kWhole = -1;
    const int partial = at.block > 0 ? 0 : left < at.blocks ? 1 : kWhole;
    bool started = false;  // where the warp loads for itself
    while (true) {
      if constexpr (S::kLoadsItself) {
        const bool reads = ahead == 0, waits_first = reads && p.stages > 1;
        if (waits_first) wait_for_oldest(p.stages);
        // All have loaded their share of the queries; or all lanes have left the stage of the unit before.
        waits_first && !started ? compute_barrier<S>() : __syncwarp();
        loader.load_unit(p, ring, control.ring);
        if (!reads) {
          --ahead;
          continue;
        }
        if (p.stages == 1) {
          cp_async_wait<0>();
          started ? __syncwarp() : compute_barrier<S>();
        }
        if (!started) {
          state.start(p, control, ring + place.stage * S::kStageBytes);
          compute_barrier<S>();  // all have read them before somebody's next load overwrites them
          started = true;
        }
      } else {
        mbarrier_wait(address(control.ring.full[place.stage][team]), place.parity);
      }
      if constexpr (S::kWgmma) fence_async_proxy();
      state.add_unit(p, at, ring + place.stage * S::kStageBytes, control.ring.visible[place.stage]);
      if (left <= S::kUnitBlocks) break;
      left -= S::kUnitBlocks, at.block += S::kUnitBlocks, at.remaining -= S::kUnitBlocks;
      if constexpr (!S::kLoadsItself) control.ring.leave(place, team);
      place.next(p.stages);
    }

    compute_barrier<S>();  // all teams have left the stage
    char* const stage = ring + place.stage * S::kStageBytes;
    state.finish(control, stage);
    compute_barrier<S>();
    const int slot = 2 * (blockIdx.y * gridDim.x + blockIdx.x) + partial;
    combine_teams<S>(p, control, reinterpret_cast<const float*>(stage), item_rows(p, at.row_block),
                     partial == kWhole ? nullptr : p.partials + slot * p.partial_words,
                     item_output<S::D>(p, at.seq, at.head, at.row_block));
    compute_barrier<S>();  // now the stage is free
    if constexpr (!S::kLoadsItself) control.ring.leave_meeting(place, team);
    place.next(p.stages);
    if constexpr (S::kLoadsItself) {
      at = control.ring.place[place.stage][threadIdx.x / 32];
    } else {
      at.advance(p, left);
    }
    if (at.remaining == 0) break;
  }
  let_next_kernel_start();  // not earlier: its CTAs would lie on the SMs in the order in which ours end
  // Last, because others may still be at work on their parts.
  if (control.merge.parts[1].count > 0) merge_parts<S>(p, control);
}

// More rows go to wgmma where there is one: a team of warps with mma.sync reads its tokens once a warp. For
// fewer of them mma.sync is faster, because its warps wait for nobody.
constexpr int kMostRowsWithoutWgmma = 32;

// A kernel of its own merges where there are more query rows than these, and for each item at least so many
// workers: a launch more takes as long as a CTA takes to merge few rows, or few parts.
constexpr int kMostRowsMergedWithin = 8, kWorkersToMergeApart = 8;

// How much of the L2 kept sources may fill: more does not stay there until the next attention, for all that
// is read in between.
constexpr float kKeptOfL2 = 1.f / 3;

struct AttentionLaunch {
  int stages, multiprocessors, l2_bytes;
  size_t shared_bytes;
};

// One CTA an SM, with as many stages as its shared memory holds.
template <class S>
cudaError_t plan_attention_launch(AttentionLaunch& launch) {
  int per_block;
  cudaError_t error = count_sms(launch.multiprocessors);
  if (error == cudaSuccess) error = device_attribute(launch.l2_bytes, cudaDevAttrL2CacheSize);
  if (error == cudaSuccess) error = device_attribute(per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error != cudaSuccess) return error;
  constexpr int kBefore = S::kAlignment - kRowAlignment + S::kQueryBytes;  // the ring
  launch.stages = min(kMaxStages, (per_block - kBefore - int(sizeof(AttentionControl<S>))) / S::kStageBytes);
  if (launch.stages < 1) return cudaErrorInvalidConfiguration;
  launch.shared_bytes = kBefore + launch.stages * S::kStageBytes;
  return cudaFuncSetAttribute(fused_attention_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(launch.shared_bytes));
}

// Whether the GPU would run the kernel and not return at once: only the code for sm_90a has shared variables,
// and the driver chooses it on GPUs of compute capability 9.0 alone.
template <class S>
bool has_wgmma() {
  cudaFuncAttributes compiled;
  return cudaFuncGetAttributes(&compiled, fused_attention_kernel<S>) == cudaSuccess &&
         compiled.sharedSizeBytes > 0;
}

// Calls f with the shape that fits the number of sources and of query rows.
template <class T, class C, int D, class F>
auto dispatch_attention_shape(const FusedAttentionParams& params, F&& f) {
  const int rows = params.num_q_heads / params.num_kv_heads * params.num_query_tokens;
  const auto with_rows = [&]<int kSources>() {
    if constexpr (sizeof(C) == 2) {
      using Warpgroups = AttentionShape<T, C, D, kSources, 2, 4, true>;
      // Two sources on one side only stay where they were: wgmma in a branch is not asynchronous.
      const bool same_sources = params.num_k_sources == params.num_v_sources;
      if (rows > kMostRowsWithoutWgmma && same_sources && has_wgmma<Warpgroups>()) return f(Warpgroups{});
    }
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

// False where one of the strides does not fit.
template <class C>
bool byte_strides(const PagedCache& cache, ByteStrides& strides) {
  const auto fits = [](int64_t elements) {
    return elements >= 0 && elements < (int64_t{1} << 32) / int64_t(sizeof(C));
  };
  strides = {uint32_t(cache.page_stride * sizeof(C)), uint32_t(cache.token_stride * sizeof(C)),
             uint32_t(cache.head_stride * sizeof(C))};
  return fits(cache.page_stride) && fits(cache.token_stride) && fits(cache.head_stride);
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
    const dim3 grid = attention_grid(launch.multiprocessors, head_rows);
    // Of a range: a share, and what rounding and the cost of items add.
    const int most_blocks =
        std::min<int64_t>(INT32_MAX / (grid.x > 1 ? head_rows : 1) / int(grid.y) + 8ll, INT32_MAX);
    const bool shifts = std::has_single_bit(static_cast<unsigned>(page_size));
    AttentionParams p{
        params,
        group,
        row_blocks,
        shifts ? std::countr_zero(static_cast<unsigned>(page_size)) : -1,
        static_cast<int>(std::min<int64_t>(int64_t(params.max_pages) * page_size, INT32_MAX)),
        most_blocks,
        launch.stages,
        reinterpret_cast<const RangePlace*>(params.schedule + counts_in_schedule(params.batch)),
        reinterpret_cast<float*>(params.schedule + partials_in_schedule(params.batch)),
        words_of_partial(params.num_query_tokens, params.num_q_heads, params.num_kv_heads),
    };
    const int rows = group * params.num_query_tokens;
    p.row_groups = std::max(1, RowAdders<S>::kSlots / rows);
    p.inverse_of_rows = 65536 / rows + 1;
    if (params.keep_sources) {
      const int sources = params.num_k_sources + params.num_v_sources;
      const float block_bytes = float(sources) * params.num_kv_heads * (kBlockTokens * D * int(sizeof(C)));
      p.kept_blocks = launch.l2_bytes * kKeptOfL2 / block_bytes;
    }
    p.in_slices = page_size % S::kSliceTokens == 0 && byte_strides<C>(p.k_sources[0], p.k_strides) &&
                  byte_strides<C>(p.v_sources[0], p.v_strides);
    const int64_t items = int64_t(params.batch) * head_rows;
    p.merges_apart = rows > kMostRowsMergedWithin && items * kWorkersToMergeApart <= int(grid.x * grid.y);
    const cudaError_t launched =
        launch_overlapping(fused_attention_kernel<S>, grid, S::kCtaThreads, launch.shared_bytes, stream, p);
    if (launched != cudaSuccess || !p.merges_apart) return launched;
    return launch_overlapping(attention_merge_kernel<D>, dim3(std::min(rows, kBlockRows), items),
                              kMergeThreads, 0, stream, p, p.places + S::kUnitSize * kMaxWorkers,
                              static_cast<int>(grid.x), static_cast<int>(grid.y));
  });
}

}  // namespace fusedkv

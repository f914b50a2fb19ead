// Attention of a few query tokens over a paged cache with one or two sources for keys and for values.
//
// scores = sum_s (a_s * q) K_s^T and out = sum_s b_s * (P V_s): the second source costs its bytes, and
// neither K_i nor V_i is ever formed. docs/kernels.md has the picture; in short:
//  - A CTA is 4 warps and walks a contiguous range of work units (schedule.cuh). Each warp keeps loading its
//    own 16 of a unit's 64 tokens, a few units ahead, with 16-byte cp.async, which serve any page size.
//  - The query rows of one key/value head (G heads x Q tokens) are packed into kRowTiles tiles of 16 rows.
//    kRowTiles warps form a team: one row tile each, over the team's 16 * kRowTiles tokens. A team keeps its
//    own softmax state and meets nobody until its item ends, so the main loop has one barrier per unit among
//    the warps of a team, and none for up to 16 rows.
#pragma once

#include "attention_state.cuh"

namespace fusedkv {

template <class S>
__global__ void __launch_bounds__(kAttentionThreads)
    fused_attention_kernel(const __grid_constant__ FusedAttentionParams p, int stages) {
  extern __shared__ __align__(128) char shared[];
  __shared__ AttentionControl control;
  char* const query = shared + stages * S::kStageBytes;

  const int row_blocks = num_row_blocks(p.num_q_heads, p.num_kv_heads, p.num_query_tokens);
  const int head_rows = p.num_kv_heads * row_blocks;
  const WorkSplit split(int64_t(p.schedule[p.batch]) * head_rows, gridDim.x);
  if (blockIdx.x >= split.workers) return;
  const int64_t begin = split.begin(blockIdx.x), end = split.begin(blockIdx.x + 1);

  UnitCursor at;
  at.seek(p, begin, head_rows);
  UnitLoader<S> loader;
  loader.at = at;
  loader.look_up(p);
  int64_t loaded = begin;
  int load_stage = 0;
  const auto load_next = [&] {
    if (loaded < end) {
      loader.issue(p, shared + load_stage * S::kStageBytes, control.visible[load_stage], row_blocks);
      load_stage = load_stage + 1 == stages ? 0 : load_stage + 1;
      if (++loaded < end) {
        loader.at.advance(p, head_rows);
        loader.look_up(p);
      }
    }
    cp_async_commit();  // empty groups keep the count of groups equal to the count of units
  };
  for (int i = 0; i < stages - 1; ++i) load_next();

  const int team = threadIdx.x / 32 / S::kRowTiles;
  AttentionState<S> state;
  bool new_item = true;
  int read_stage = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    if (new_item) {
      __syncthreads();  // the last item's query rows and scratch are no longer read
      load_query<S>(p, at, row_blocks, query);
      state.reset();
      __syncthreads();
      new_item = false;
    }
    if (stages == 1) {
      team_barrier<S>(team);
      load_next();
    }
    wait_for_oldest(stages);
    team_barrier<S>(team);
    if (stages > 1) load_next();  // into the stage of the unit before, which the team has left
    char* const stage = shared + read_stage * S::kStageBytes;
    state.add_unit(p, at, row_blocks, query, stage, control.visible[read_stage]);
    read_stage = read_stage + 1 == stages ? 0 : read_stage + 1;

    const bool ends = at.block + 1 == at.blocks;
    if (ends || unit + 1 == end) {
      const int64_t item_begin = max(int64_t(0), unit - at.block);
      const int64_t item_end = min(split.total, unit - at.block + at.blocks);
      const bool whole = item_begin >= begin && item_end <= end;
      __syncthreads();  // all teams have left the stage that finish() uses as scratch
      state.finish(p, at, row_blocks, control, stage);
      if (whole) {
        write_rows<S>(p, at, row_blocks, state, nullptr);
      } else {
        // A worker has at most two partial results: of the item it begins with, and of the one it ends with.
        float* const workspace = static_cast<float*>(p.workspace);
        constexpr int64_t kPairFloats = 2 * S::kPartialFloats;
        const int64_t first = split.owner(item_begin), last = split.owner(item_end - 1);
        write_rows<S>(p, at, row_blocks, state,
                      workspace + blockIdx.x * kPairFloats + (item_begin >= begin ? S::kPartialFloats : 0));
        __threadfence();
        __syncthreads();
        int* const counter = p.schedule + p.batch + 1 + int64_t(at.seq) * head_rows + at.head_row;
        if (threadIdx.x == 0) {
          control.is_last = atomicAdd(counter, 1) == last - first;
          if (control.is_last) *counter = 0;
          __threadfence();
        }
        __syncthreads();
        if (control.is_last) {
          merge_partials<S>(p, at, row_blocks, workspace + first * kPairFloats + S::kPartialFloats,
                            workspace + (first + 1) * kPairFloats, kPairFloats,
                            static_cast<int>(last - first) + 1);
        }
      }
      new_item = true;
    }
    if (unit + 1 < end) at.advance(p, head_rows);
  }
}

struct AttentionLaunch {
  int stages, grid;
  size_t shared_bytes;
};

// Two CTAs an SM when three stages of both fit, since one CTA's merge then hides behind the other's loads;
// else one CTA with all the memory there is.
template <class S>
cudaError_t plan_attention_launch(AttentionLaunch& launch) {
  int device, sms, per_sm, per_block, reserved;
  cudaError_t error = cudaGetDevice(&device);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  read(sms, cudaDevAttrMultiProcessorCount);
  read(per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  read(per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  if (error != cudaSuccess) return error;
  const int fixed = S::kQueryBytes + int(sizeof(AttentionControl)) + reserved;
  const int half = (per_sm / 2 - fixed) / S::kStageBytes;
  const int whole = (per_block + reserved - fixed) / S::kStageBytes;
  const int ctas = half >= 3 ? 2 : 1;
  launch.stages = min(kMaxStages, ctas == 2 ? half : whole);
  if (launch.stages < 1) return cudaErrorInvalidConfiguration;
  launch.grid = sms * ctas;
  launch.shared_bytes = launch.stages * S::kStageBytes + S::kQueryBytes;
  return cudaFuncSetAttribute(fused_attention_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(launch.shared_bytes));
}

// Calls f with the shape that fits the number of sources and of query rows.
template <class T, int D, class F>
auto dispatch_attention_shape(const FusedAttentionParams& params, F&& f) {
  const int rows = params.num_q_heads / params.num_kv_heads * params.num_query_tokens;
  const auto with_rows = [&]<int kKeySources, int kValueSources>() {
    if (rows <= 16) return f(AttentionShape<T, D, kKeySources, kValueSources, 1>{});
    if (rows <= 32) return f(AttentionShape<T, D, kKeySources, kValueSources, 2>{});
    return f(AttentionShape<T, D, kKeySources, kValueSources, 4>{});
  };
  if (params.num_k_sources == 1) {
    return params.num_v_sources == 1 ? with_rows.template operator()<1, 1>()
                                     : with_rows.template operator()<1, 2>();
  }
  return params.num_v_sources == 1 ? with_rows.template operator()<2, 1>()
                                   : with_rows.template operator()<2, 2>();
}

template <class T, int D>
size_t attention_workspace_bytes(const FusedAttentionParams& params) {
  return dispatch_attention_shape<T, D>(params, [](auto shape) -> size_t {
    using S = decltype(shape);
    AttentionLaunch launch;
    if (plan_attention_launch<S>(launch) != cudaSuccess) return 0;
    return size_t(launch.grid) * 2 * S::kPartialFloats * sizeof(float);
  });
}

template <class T, int D>
cudaError_t launch_attention(const FusedAttentionParams& params, cudaStream_t stream) {
  return dispatch_attention_shape<T, D>(params, [&](auto shape) {
    using S = decltype(shape);
    AttentionLaunch launch;
    const cudaError_t error = plan_attention_launch<S>(launch);
    if (error != cudaSuccess) return error;
    fused_attention_kernel<S>
        <<<launch.grid, kAttentionThreads, launch.shared_bytes, stream>>>(params, launch.stages);
    return cudaGetLastError();
  });
}

}  // namespace fusedkv

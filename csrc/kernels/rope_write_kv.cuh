// Norm, RoPE and cache write of a packed projection in one pass over memory.
//
// A lane group (see common/rope.cuh) takes a run of up to kHeads heads of one token, all q, all k or all v:
// it loads the token's row of the cos/sin table and its norm weights once, and all its heads before it uses
// the first. A CTA is blockDim.y runs of blockDim.z tokens; tokens with more runs take several CTAs in y.
#pragma once

#include "common/overlap.cuh"
#include "common/rope.cuh"
#include "launch.h"

namespace fusedkv {

constexpr int kRopeWriteThreads = 128, kMinBlocks = 4;  // an SM: 128 registers a thread

// Few tokens are bound by latency: one head a thread spreads them over all SMs. Many are bound by bandwidth:
// kManyHeads heads keep more bytes in flight and read the cos/sin table less often.
constexpr int kManyHeads = 4;
constexpr int64_t kFewThreads = int64_t{1} << 17;  // about what a large GPU holds at once

// A CTA has nothing in flight while it computes. So that the memory is busy all the same, each asks for the
// inputs of the token that comes this many bytes of the projection later: a few microseconds before its turn.
constexpr int64_t kAheadBytes = int64_t{8} << 20;

// Prefetches a run's heads and, with the first run of a token, the slot and the position. Returns the
// position, unchecked, for prefetch_angles: nobody waits for it before it is there.
template <class T, int D>
__device__ __forceinline__ int64_t prefetch_run(const RopeWriteKvParams& p, int64_t token, int head,
                                                int count, bool is_first) {
  constexpr int kLine = 128 / sizeof(T), kLines = HeadPart<D>::kLanes;  // of kManyHeads heads
  static_assert(kLines * kLine == kManyHeads * D, "a lane prefetches a line");
  if (token >= p.num_tokens) return -1;
  const T* row = static_cast<const T*>(p.qkv) + token * p.qkv_token_stride + head * D;
  if (threadIdx.x * kLine < count * D) prefetch_l2(row + threadIdx.x * kLine);
  if (!is_first) return -1;
  if (p.heads.num_kv_heads > 0) prefetch_l2(p.heads.slot_mapping + token);
  return raw_position(p.heads, token);
}

template <int D>
__device__ __forceinline__ void prefetch_angles(const HeadOutputs& p, int64_t position) {
  constexpr int kLine = 128 / sizeof(float);
  if (threadIdx.x * kLine >= D || !index_is_inside(position, p.max_positions)) return;
  prefetch_l2(p.cos_sin + position * D + threadIdx.x * kLine);
}

// Heads first .. first + count - 1 of the projection; count <= 0 for a run after the last.
template <int kHeads>
struct HeadRun {
  int first, count;

  __host__ __device__ static int number(int heads) { return (heads + kHeads - 1) / kHeads; }

  __device__ __forceinline__ HeadRun(const HeadOutputs& p, int run) {
    const int q_runs = number(p.num_q_heads), kv_runs = number(p.num_kv_heads);
    int end = p.num_q_heads;
    first = run * kHeads;
    if (run >= q_runs) {
      const bool is_value = run >= q_runs + kv_runs;
      end += is_value ? 2 * p.num_kv_heads : p.num_kv_heads;
      first = (run - q_runs - (is_value ? kv_runs : 0)) * kHeads + end - p.num_kv_heads;
    }
    count = min(kHeads, end - first);
  }
};

template <class T, int D, int kHeads>
__global__ void __launch_bounds__(kRopeWriteThreads, kMinBlocks)
    rope_write_kv_kernel(const __grid_constant__ RopeWriteKvParams p, int64_t tokens_ahead) {
  const int lane = threadIdx.x;
  const int64_t token = int64_t{blockIdx.x} * blockDim.z + threadIdx.z;
  const int run_index = blockIdx.y * blockDim.y + threadIdx.y;
  const HeadRun<kHeads> run(p.heads, run_index);
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (token >= p.num_tokens || run.count <= 0) return;

  const T* row = static_cast<const T*>(p.qkv) + token * p.qkv_token_stride + run.first * D;
  RawPart<T, D> x[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (i < run.count) x[i] = RawPart<T, D>::load(row + i * D, lane);
  }
  const HeadId head(p.heads, run.first);
  const int64_t slot = head.kind == HeadKind::kQuery ? -1 : p.heads.slot_mapping[token];
  const HeadNorm<T, D> norm(p.heads, head.kind, lane);
  const int64_t position = load_position(p.heads, token);
  const HeadAngles<D> angles(p.heads, head.kind, position, lane);
  int64_t later_position = -1;
  if constexpr (kHeads == kManyHeads) {
    later_position = prefetch_run<T, D>(p, token + tokens_ahead, run.first, run.count, run_index == 0);
  }
  HeadStore<T, D> store(p.heads, head, token, position < 0 ? -1 : slot, lane);
  float scale[kHeads];  // of all heads before the branches of the first one's store: side by side
#pragma unroll
  for (int i = 0; i < kHeads; ++i) scale[i] = norm_scale(p.heads, x[i].unpack(), norm);
  prefetch_angles<D>(p.heads, later_position);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    HeadPart<D> part = x[i].unpack();
    if (i < run.count) finish_head(p.heads, part, head.kind, scale[i], norm, angles, store);
    store.next_head();
  }
}

template <class T, int D, int kHeads>
cudaError_t launch_rope_write_runs(const RopeWriteKvParams& p, cudaStream_t stream) {
  constexpr int kLanes = HeadPart<D>::kLanes, kMaxRuns = kRopeWriteThreads / kLanes;
  const int runs =
      HeadRun<kHeads>::number(p.heads.num_q_heads) + 2 * HeadRun<kHeads>::number(p.heads.num_kv_heads);
  if (p.num_tokens == 0 || runs == 0) return cudaSuccess;
  const unsigned run_blocks = (runs + kMaxRuns - 1) / kMaxRuns;
  const unsigned block_runs = (runs + run_blocks - 1) / run_blocks, block_tokens = kMaxRuns / block_runs;
  const dim3 grid(static_cast<unsigned>((p.num_tokens + block_tokens - 1) / block_tokens), run_blocks);
  const dim3 threads(kLanes, block_runs, block_tokens);
  const int64_t tokens_ahead = kAheadBytes / (runs * kHeads * D * sizeof(T));
  return launch_overlapping(rope_write_kv_kernel<T, D, kHeads>, grid, threads, 0, stream, p, tokens_ahead);
}

template <class T, int D>
cudaError_t launch_rope_write_kv(const RopeWriteKvParams& p, cudaStream_t stream) {
  const int64_t heads = p.heads.num_q_heads + 2 * p.heads.num_kv_heads;
  const bool few = p.num_tokens * heads * HeadPart<D>::kLanes <= kFewThreads;
  return few ? launch_rope_write_runs<T, D, 1>(p, stream)
             : launch_rope_write_runs<T, D, kManyHeads>(p, stream);
}

}  // namespace fusedkv

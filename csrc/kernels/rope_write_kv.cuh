// Norm, RoPE and cache write of a packed projection: one lane group a head, one pass over memory.
#pragma once

#include "common/rope.cuh"
#include "launch.h"

namespace fusedkv {

constexpr int kRopeWriteThreads = 256;

template <class T, int D>
__global__ void __launch_bounds__(kRopeWriteThreads)
    rope_write_kv_kernel(const __grid_constant__ RopeWriteKvParams p) {
  constexpr int kLanes = HeadPart<D>::kLanes;
  const int lane = threadIdx.x % kLanes;
  const int num_heads = p.heads.num_q_heads + 2 * p.heads.num_kv_heads;
  const int64_t item = int64_t{blockIdx.x} * (kRopeWriteThreads / kLanes) + threadIdx.x / kLanes;
  const int64_t token = item / num_heads;
  if (token >= p.num_tokens) return;
  const int head = static_cast<int>(item - token * num_heads);

  const T* row = static_cast<const T*>(p.qkv) + token * p.qkv_token_stride + head * D;
  HeadPart<D> part{Vec8::load(row + 8 * lane), Vec8::load(row + D / 2 + 8 * lane)};
  const int64_t position = load_position(p.heads, token);
  finish_head<T>(p.heads, part, token, head, position, load_slot(p.heads, token, position), lane);
}

template <class T, int D>
cudaError_t launch_rope_write_kv(const RopeWriteKvParams& p, cudaStream_t stream) {
  constexpr int kHeadsPerBlock = kRopeWriteThreads / HeadPart<D>::kLanes;
  const int64_t items = p.num_tokens * (p.heads.num_q_heads + 2 * p.heads.num_kv_heads);
  if (items == 0) return cudaSuccess;
  const int64_t blocks = (items + kHeadsPerBlock - 1) / kHeadsPerBlock;
  rope_write_kv_kernel<T, D><<<static_cast<unsigned>(blocks), kRopeWriteThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace fusedkv

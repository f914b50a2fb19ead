// write_kv: cache[slot_mapping[t]] = saturate(x[t] / scale) for k and v in one launch.
//
// Bound by memory: every byte is read once and written once. Threads are laid out as common/rows.h says;
// a thread moves its column of kWriteTokens tokens of both k and v, all loads in flight at once.
#pragma once

#include "common/rows.h"
#include "common/vec.cuh"
#include "dispatch.h"
#include "launch.h"

namespace fusedkv {

constexpr int kWriteTokens = 2;  // with 1024 resident threads an SM has 64 KB of loads in flight

// One column of one cache side: what the tokens share.
template <class T, class C, bool kScaled>
struct WriteColumn {
  Vec8 scale;

  __device__ __forceinline__ explicit WriteColumn(const float* scales) {
    if constexpr (kScaled) {
      scale = {{1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f}};
      if (scales != nullptr) scale = Vec8::load(scales);
    }
  }

  __device__ __forceinline__ void store(const uint4& raw, C* to) const {
    if constexpr (sizeof(C) == sizeof(T) && !kScaled) {
      *reinterpret_cast<uint4*>(to) = raw;
    } else {
      Vec8 v = Vec8::load(reinterpret_cast<const T*>(&raw));
      if constexpr (kScaled) {
#pragma unroll
        for (int i = 0; i < 8; ++i) v.x[i] /= scale.x[i];
      }
      v.store(to);
    }
  }
};

template <class T, class C, bool kScaled>
__global__ void __launch_bounds__(kRowThreads, 3) write_kv_kernel(const __grid_constant__ WriteKvParams p) {
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  if (column * 8 >= p.num_kv_heads * p.head_dim) return;
  const int head = column * 8 / p.head_dim, channel = column * 8 % p.head_dim;
  const int64_t num_slots = p.cache.num_pages * p.cache.page_size;
  const int64_t first = int64_t(blockIdx.x) * blockDim.y * kWriteTokens + threadIdx.y;
  const T* k = static_cast<const T*>(p.k) + head * p.k_head_stride + channel;
  const T* v = static_cast<const T*>(p.v) + head * p.v_head_stride + channel;

  int64_t slot[kWriteTokens];
  uint4 k_raw[kWriteTokens], v_raw[kWriteTokens];
#pragma unroll
  for (int i = 0; i < kWriteTokens; ++i) {
    const int64_t token = first + i * blockDim.y;
    slot[i] = -1;
    if (token < p.num_tokens) {
      slot[i] = p.slot_mapping[token];
      k_raw[i] = *reinterpret_cast<const uint4*>(k + token * p.k_token_stride);
      v_raw[i] = *reinterpret_cast<const uint4*>(v + token * p.v_token_stride);
    }
  }
  const WriteColumn<T, C, kScaled> k_column(p.k_scale != nullptr ? p.k_scale + column * 8 : nullptr);
  const WriteColumn<T, C, kScaled> v_column(p.v_scale != nullptr ? p.v_scale + column * 8 : nullptr);
#pragma unroll
  for (int i = 0; i < kWriteTokens; ++i) {
    if (!index_is_inside(slot[i], num_slots)) continue;
    const auto to = [&](const PagedCache& c) {
      return static_cast<C*>(c.data) + slot_offset(c, p.cache.page_size, slot[i], head) + channel;
    };
    k_column.store(k_raw[i], to(p.k_cache));
    v_column.store(v_raw[i], to(p.v_cache));
  }
}

template <class T, class C>
cudaError_t launch_write_kv(const WriteKvParams& p, cudaStream_t stream) {
  const RowTiling tiling = row_tiling(p.num_kv_heads, p.head_dim);
  const int64_t tokens = int64_t(tiling.threads.y) * kWriteTokens;
  const dim3 grid(static_cast<unsigned>((p.num_tokens + tokens - 1) / tokens), tiling.column_blocks);
  if (p.k_scale == nullptr && p.v_scale == nullptr) {
    write_kv_kernel<T, C, false><<<grid, tiling.threads, 0, stream>>>(p);
  } else {
    write_kv_kernel<T, C, true><<<grid, tiling.threads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace fusedkv

// write_kv: cache[slot_mapping[t]] = saturate(x[t] / scale) for k and v in one launch; with copies the cache
// gets x[t] and the copy the quotient.
//
// Bound by memory: every byte is read once and written once. Threads are laid out as common/rows.h says;
// a thread moves its column of kTokens tokens of both k and v, all loads in flight at once.
#pragma once

#include "common/overlap.cuh"
#include "common/rows.h"
#include "common/vec.cuh"
#include "dispatch.h"
#include "launch.h"

namespace fusedkv {

// Many tokens: with 1024 resident threads an SM has 64 KB of loads in flight. Few: small CTAs of one token a
// thread spread them over all SMs.
constexpr int kManyWriteTokens = 2, kFewWriteThreads = 64;
constexpr int64_t kFewWriteColumns = int64_t{1} << 17;

// One column of the keys or of the values: what the tokens share.
template <class T, bool kMoveOnly>
struct WriteColumn {
  const PagedCache &cache, &copy;
  int head, channel;
  bool is_scaled, is_e4m3;
  Vec8 scale;

  __device__ __forceinline__ WriteColumn(const WriteKvParams& p, const PagedCache& cache,
                                         const PagedCache& copy, const float* scales, int column)
      : cache(cache), copy(copy) {
    head = column * 8 / p.head_dim, channel = column * 8 % p.head_dim;
    is_e4m3 = p.cache_dtype == DType::kE4M3;
    is_scaled = scales != nullptr;
    if (!kMoveOnly && is_scaled) scale = Vec8::load(scales + column * 8);
  }

  template <class C>
  __device__ __forceinline__ C* at(const PagedCache& cache, const CacheRow& row) const {
    return static_cast<C*>(cache.data) + row.elements(cache) + head * cache.head_stride + channel;
  }

  __device__ __forceinline__ void store(const uint4& raw, const CacheRow& row) const {
    if (kMoveOnly || copy.data != nullptr) *reinterpret_cast<uint4*>(at<T>(cache, row)) = raw;
    if constexpr (kMoveOnly) return;
    Vec8 v = Vec8::unpack<T>(raw);
    if (is_scaled) v.divide_by(scale);
    if (copy.data != nullptr) {
      v.store(at<e4m3>(copy, row));
    } else if (is_e4m3) {
      v.store(at<e4m3>(cache, row));
    } else {
      v.store(at<T>(cache, row));
    }
  }
};

template <class T, bool kMoveOnly, int kTokens>
__global__ void __launch_bounds__(kRowThreads, 3) write_kv_kernel(const __grid_constant__ WriteKvParams p) {
  const int column = blockIdx.y * blockDim.x + threadIdx.x;
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (column * 8 >= p.num_kv_heads * p.head_dim) return;
  const WriteColumn<T, kMoveOnly> k_column(p, p.k_cache, p.k_copy, p.k_scale, column);
  const WriteColumn<T, kMoveOnly> v_column(p, p.v_cache, p.v_copy, p.v_scale, column);
  const int64_t first = int64_t(blockIdx.x) * blockDim.y * kTokens + threadIdx.y;
  const T* k = static_cast<const T*>(p.k) + k_column.head * p.k_head_stride + k_column.channel;
  const T* v = static_cast<const T*>(p.v) + v_column.head * p.v_head_stride + v_column.channel;

  int64_t slot[kTokens];
  uint4 k_raw[kTokens], v_raw[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int64_t token = first + i * blockDim.y;
    slot[i] = -1;
    if (token < p.num_tokens) {
      slot[i] = p.slot_mapping[token];
      k_raw[i] = *reinterpret_cast<const uint4*>(k + token * p.k_token_stride);
      v_raw[i] = *reinterpret_cast<const uint4*>(v + token * p.v_token_stride);
    }
  }
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const CacheRow row(p.cache, slot[i]);
    if (!row.is_inside()) continue;
    k_column.store(k_raw[i], row);
    v_column.store(v_raw[i], row);
  }
}

template <class T, bool kMoveOnly>
cudaError_t launch_write_kv(const WriteKvParams& p, cudaStream_t stream) {
  const bool few = p.num_tokens * p.num_kv_heads * p.head_dim <= 8 * kFewWriteColumns;
  const RowTiling tiling = row_tiling(p.num_kv_heads, p.head_dim, few ? kFewWriteThreads : kRowThreads);
  const int64_t tokens = int64_t(tiling.threads.y) * (few ? 1 : kManyWriteTokens);
  const dim3 grid(static_cast<unsigned>((p.num_tokens + tokens - 1) / tokens), tiling.column_blocks);
  const auto kernel =
      few ? write_kv_kernel<T, kMoveOnly, 1> : write_kv_kernel<T, kMoveOnly, kManyWriteTokens>;
  return launch_overlapping(kernel, grid, tiling.threads, 0, stream, p);
}

}  // namespace fusedkv

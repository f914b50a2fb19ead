// fuse_kv: K_i = sum_s a_s * K_s and V_i = sum_s b_s * V_s, channel by channel.
//
// Bound by memory: every source is read once and every result written once. Threads are laid out as
// common/rows.h says, blockIdx.z picks keys or values, and a CTA owns one range of rows, so that the weights
// are loaded once.
#pragma once

#include "common/device.h"
#include "common/rows.h"
#include "common/vec.cuh"
#include "dispatch.h"
#include "launch.h"

namespace fusedkv {

// Kernels exist for up to 1, 2, 4 and 8 sources; a side with fewer skips the rest. `rows` are loaded together
// by a thread, so that about 128 bytes a thread are in flight whatever the number of sources.
template <int kSources>
struct FuseTuning {
  static constexpr int rows = kSources <= 2 ? 4 : 8 / kSources;
  static constexpr int blocks_per_sm = kSources == 1 ? 4 : kSources == 2 ? 3 : 2;  // no spills
};

template <int N>
struct SourceCount {
  static constexpr int value = N;
};

template <class F>
auto dispatch_sources(int k_sources, int v_sources, F&& f) {
  const int sources = std::max(k_sources, v_sources);
  if (sources <= 1) return f(SourceCount<1>{});
  if (sources <= 2) return f(SourceCount<2>{});
  if (sources <= 4) return f(SourceCount<4>{});
  return f(SourceCount<8>{});
}

// One range of rows for every CTA that the device holds at once.
inline RowSplit split_fuse_rows(int64_t rows, const RowTiling& tiling, int rows_per_thread,
                                int blocks_per_sm) {
  int sms = 1;
  count_sms(sms);  // the launch that follows reports what is wrong with the device
  return split_rows(rows, int64_t(tiling.threads.y) * rows_per_thread,
                    sms * blocks_per_sm / (2 * tiling.column_blocks));
}

template <class T>
__device__ __forceinline__ uint4 load_row(const void* base, int64_t row, int64_t stride, int channel) {
  return *reinterpret_cast<const uint4*>(static_cast<const T*>(base) + row * stride + channel);
}

template <class T>
__device__ __forceinline__ Vec8 unpack8(const uint4& raw) {
  return Vec8::load(reinterpret_cast<const T*>(&raw));
}

template <class T, int kSources>
__global__ void __launch_bounds__(kRowThreads, FuseTuning<kSources>::blocks_per_sm)
    fuse_kv_kernel(const __grid_constant__ FuseKvParams p, int64_t rows_per_block) {
  constexpr int kRows = FuseTuning<kSources>::rows;
  const FuseSide& side = blockIdx.z == 0 ? p.k : p.v;
  const int channels = p.num_kv_heads * p.head_dim;
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (channel >= channels) return;

  Vec8 weights[kSources];
#pragma unroll
  for (int s = 0; s < kSources; ++s) {
    if (s < side.num_sources) weights[s] = Vec8::load(side.weights + s * channels + channel);
  }
  const int64_t begin = blockIdx.x * rows_per_block, end = min(begin + rows_per_block, p.rows);
  for (int64_t first = begin + threadIdx.y; first < end; first += kRows * blockDim.y) {
    uint4 raw[kRows][kSources];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * blockDim.y;
#pragma unroll
      for (int s = 0; s < kSources; ++s) {
        if (row < end && s < side.num_sources) {
          raw[r][s] = load_row<T>(side.sources[s], row, side.row_strides[s], channel);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * blockDim.y;
      if (row >= end) break;
      Vec8 sum{};
#pragma unroll
      for (int s = 0; s < kSources; ++s) {
        if (s >= side.num_sources) break;
        const Vec8 x = unpack8<T>(raw[r][s]);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum.x[i] += weights[s].x[i] * x.x[i];
      }
      sum.store(static_cast<T*>(side.out) + row * channels + channel);
    }
  }
}

template <class T>
cudaError_t launch_fuse_kv(const FuseKvParams& p, cudaStream_t stream) {
  return dispatch_sources(p.k.num_sources, p.v.num_sources, [&](auto count) {
    constexpr int kSources = decltype(count)::value;
    using Tuning = FuseTuning<kSources>;
    const RowTiling tiling = row_tiling(p.num_kv_heads, p.head_dim);
    const RowSplit split = split_fuse_rows(p.rows, tiling, Tuning::rows, Tuning::blocks_per_sm);
    const dim3 grid(static_cast<unsigned>(split.row_blocks), tiling.column_blocks, 2);
    fuse_kv_kernel<T, kSources><<<grid, tiling.threads, 0, stream>>>(p, split.rows_per_block);
    return cudaGetLastError();
  });
}

}  // namespace fusedkv

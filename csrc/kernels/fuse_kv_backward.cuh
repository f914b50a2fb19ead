// fuse_kv_backward: grad_sources[s] = w_s * grad and grad_weights[s] = sum over rows of grad * sources[s],
// for keys and values, in one pass over memory.
//
// As in fuse_kv.cuh a thread keeps its column over a range of rows, so the weight gradients add up in
// registers. Each CTA leaves its sums in the workspace and a second, small kernel adds those up in their
// order: no atomics, so that every run gives the same bits.
#pragma once

#include "common/reduce.cuh"
#include "fuse_kv.cuh"

namespace fusedkv {

template <int kSources>
struct FuseBackwardTuning {
  static constexpr int rows = kSources == 1 ? 4 : kSources == 2 ? 3 : 1;
  static constexpr int blocks_per_sm = kSources <= 4 ? 2 : 1;  // no spills
};

inline RowSplit split_backward_rows(const FuseKvBackwardParams& p) {
  return dispatch_sources(p.k.num_sources, p.v.num_sources, [&](auto count) {
    using Tuning = FuseBackwardTuning<decltype(count)::value>;
    return split_fuse_rows(p.rows, row_tiling(p.num_kv_heads, p.head_dim), Tuning::rows,
                           Tuning::blocks_per_sm);
  });
}

// grad_sources[s] = w_s * grad_out, and this CTA's part of grad_weights[s] = sum over rows of grad_out *
// sources[s]. The workspace is float32 [row blocks, k sources + v sources, Hkv, D].
template <class T, int kSources>
__global__ void __launch_bounds__(kRowThreads, FuseBackwardTuning<kSources>::blocks_per_sm)
    fuse_kv_backward_kernel(const __grid_constant__ FuseKvBackwardParams p, int64_t rows_per_block) {
  constexpr int kRows = FuseBackwardTuning<kSources>::rows;
  __shared__ alignas(16) float shared[kRowThreads * 8];
  const FuseBackwardSide& side = blockIdx.z == 0 ? p.k : p.v;
  const int channels = p.num_kv_heads * p.head_dim, first_channel = blockIdx.y * blockDim.x * 8;
  const int channel = first_channel + threadIdx.x * 8;
  const bool has_column = channel < channels;

  Vec8 weights[kSources], sums[kSources] = {};
#pragma unroll
  for (int s = 0; s < kSources; ++s) {
    if (has_column && s < side.num_sources) weights[s] = Vec8::load(side.weights + s * channels + channel);
  }
  const int64_t begin = blockIdx.x * rows_per_block;
  const int64_t end = has_column ? min(begin + rows_per_block, p.rows) : begin;
  for (int64_t first = begin + threadIdx.y; first < end; first += kRows * blockDim.y) {
    uint4 grad_raw[kRows], raw[kRows][kSources];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * blockDim.y;
      if (row >= end) break;
      grad_raw[r] = load_row<T>(side.grad_out, row, side.grad_out_row_stride, channel);
#pragma unroll
      for (int s = 0; s < kSources; ++s) {
        if (s < side.num_sources) raw[r][s] = load_row<T>(side.sources[s], row, side.row_strides[s], channel);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * blockDim.y;
      if (row >= end) break;
      const Vec8 grad = unpack8<T>(grad_raw[r]);
#pragma unroll
      for (int s = 0; s < kSources; ++s) {
        if (s >= side.num_sources) break;
        const Vec8 x = unpack8<T>(raw[r][s]);
        Vec8 grad_source;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          grad_source.x[i] = weights[s].x[i] * grad.x[i];
          sums[s].x[i] += grad.x[i] * x.x[i];
        }
        grad_source.store(static_cast<T*>(side.grad_sources[s]) + row * channels + channel);
      }
    }
  }

  const int num_partials = p.k.num_sources + p.v.num_sources, first_partial = blockIdx.z * p.k.num_sources;
  const int width = min(static_cast<int>(blockDim.x) * 8, channels - first_channel);
  float* partials = static_cast<float*>(p.workspace) +
                    (int64_t(blockIdx.x) * num_partials + first_partial) * channels + first_channel;
#pragma unroll
  for (int s = 0; s < kSources; ++s) {
    if (s < side.num_sources) sum_over_block_rows(sums[s], shared, partials + int64_t(s) * channels, width);
  }
}

constexpr int kSumWidth = 32, kSumHeight = 16;

static __global__ void __launch_bounds__(kSumWidth* kSumHeight)
    fuse_kv_sum_weights_kernel(const __grid_constant__ FuseKvBackwardParams p, int64_t row_blocks) {
  const int channels = p.num_kv_heads * p.head_dim, k_count = p.k.num_sources * channels;
  const int count = k_count + p.v.num_sources * channels;
  const int i =
      blockIdx.x * kSumWidth + threadIdx.x;  // channels are a multiple of 8: not always of kSumWidth
  const bool inside = i < count;
  const float sum = sum_partials<kSumWidth, kSumHeight>(static_cast<const float*>(p.workspace) + i,
                                                        inside ? row_blocks : 0, count);
  if (threadIdx.y == 0 && inside) {
    (i < k_count ? p.k.grad_weights[i] : p.v.grad_weights[i - k_count]) = sum;
  }
}

template <class T>
cudaError_t launch_fuse_kv_backward(const FuseKvBackwardParams& p, cudaStream_t stream) {
  const RowTiling tiling = row_tiling(p.num_kv_heads, p.head_dim);
  const RowSplit split = split_backward_rows(p);
  const dim3 grid(static_cast<unsigned>(split.row_blocks), tiling.column_blocks, 2);
  if (p.rows > 0) {
    dispatch_sources(p.k.num_sources, p.v.num_sources, [&](auto count) {
      fuse_kv_backward_kernel<T, decltype(count)::value>
          <<<grid, tiling.threads, 0, stream>>>(p, split.rows_per_block);
    });
  }
  const int sums = (p.k.num_sources + p.v.num_sources) * p.num_kv_heads * p.head_dim;
  fuse_kv_sum_weights_kernel<<<(sums + kSumWidth - 1) / kSumWidth, dim3(kSumWidth, kSumHeight), 0, stream>>>(
      p, split.row_blocks);
  return cudaGetLastError();
}

}  // namespace fusedkv

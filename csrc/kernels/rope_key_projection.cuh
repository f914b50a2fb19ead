// x @ weight^T on tensor cores, with norm, RoPE and the cache write as its epilogue. Every N tile holds whole
// heads, so that the epilogue sees all channels of a head: they go through shared memory in fp32 and come
// back in the layout of HeadPart.
#pragma once

#include "common/mma.cuh"
#include "common/rope.cuh"
#include "launch.h"

namespace fusedkv {

constexpr int kProjectionThreads = 128;
constexpr int kProjectionDepth = 64;  // channels of x a stage: 128 bytes a row, all banks once
constexpr int kRowChunks = kProjectionDepth / 8;

// Output tile of one CTA: tokens x channels of heads. A warp computes rows / warps_m x cols / warps_n of it.
struct ProjectionTile {
  int rows, cols;
  int warps_m, warps_n;
  int stages;
};

constexpr ProjectionTile projection_tile(int rows, int head_dim) {
  ProjectionTile tile{};
  tile.rows = rows;
  // 128 x 128 gives a warp 64 x 64, the largest that its registers hold, because shared memory bandwidth
  // bounds mma.sync. With fewer tokens one head a CTA spreads the weight over more SMs.
  tile.cols = rows == 128 ? 128 : head_dim;
  tile.warps_m = rows >= 64 ? 2 : 1;
  tile.warps_n = kProjectionThreads / 32 / tile.warps_m;
  // 96 KB at most: one CTA fits where an SM has 99 KB (sm_86, sm_89), two fit on sm_90.
  const int stages = 96 * 1024 / ((rows + tile.cols) * kProjectionDepth * 2);
  tile.stages = stages < 8 ? stages : 8;
  return tile;
}

// Small tiles waste no tensor work on absent tokens; from 512 tokens on there are enough large ones.
constexpr int projection_rows(int64_t num_tokens) {
  return num_tokens <= 16 ? 16 : num_tokens <= 32 ? 32 : num_tokens <= 512 ? 64 : 128;
}

template <class T, int D, int kRows>
struct Projection {
  static constexpr ProjectionTile kTile = projection_tile(kRows, D);
  static constexpr int kCols = kTile.cols, kStages = kTile.stages;
  static constexpr int kWarpRows = kRows / kTile.warps_m, kWarpCols = kCols / kTile.warps_n;
  static constexpr int kMFragments = kWarpRows / 16, kNFragments = kWarpCols / 8;
  static constexpr int kStageBytes = (kRows + kCols) * kProjectionDepth * 2;
  // 8 more floats a row: the accumulators' float2 stores of four rows then fall in different banks.
  static constexpr int kOutStride = kCols + 8;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSmemBytes = kRingBytes + kRows * 2 * sizeof(int64_t);
  static_assert(kCols % D == 0 && kNFragments % 2 == 0 && kStages >= 2);
  static_assert(kRows * kOutStride * sizeof(float) <= kRingBytes, "the epilogue reuses the ring");
};

// Byte offset of 16-byte chunk `chunk` of row `row` of a stage. The XOR puts one chunk of eight neighbouring
// rows, which is what ldmatrix reads at once, in eight different bank groups.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return (row * kRowChunks + (chunk ^ (row % 8))) * 16;
}

// Column of the fp32 tile where column `col` of row `row` is kept. Flipping bit 2 for every second block of
// 32 columns and every second row lets eight lanes' 16-byte reads, 32 bytes apart, use all banks.
__device__ __forceinline__ int swizzled_column(int row, int col) {
  return col ^ (((row ^ (col / 32)) & 1) * 4);
}

// Asynchronously copies rows x 64 elements, channels k0 and on, of a row-major matrix; zeros outside of it.
template <int kRows>
__device__ __forceinline__ void load_stage(uint32_t smem, const uint16_t* matrix, int64_t stride,
                                           int64_t row0, int64_t num_rows, int k0, int hidden) {
  constexpr int kRowsAtOnce = kProjectionThreads / kRowChunks;
  static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0);
  const int chunk = threadIdx.x % kRowChunks, first = threadIdx.x / kRowChunks;
  const int k = k0 + 8 * chunk;
  const int rows_left = static_cast<int>(min(num_rows - row0, int64_t{kRows}));
  const uint16_t* from = matrix + (row0 + first) * stride + k;
#pragma unroll
  for (int i = 0; i < kRows / kRowsAtOnce; ++i, from += kRowsAtOnce * stride) {
    const bool valid = first + i * kRowsAtOnce < rows_left && k < hidden;
    // Rows a multiple of 8 apart have the same XOR.
    const uint32_t to = smem + swizzled(first, chunk) + swizzled(i * kRowsAtOnce, 0);
    cp_async_16(to, valid ? from : matrix, valid);
  }
}

template <class T, int D, int kRows>
__global__ void __launch_bounds__(kProjectionThreads)
    rope_key_projection_kernel(const __grid_constant__ RopeKeyProjectionParams p, int row_tiles,
                               int col_tiles) {
  using Shape = Projection<T, D, kRows>;
  constexpr int kCols = Shape::kCols, kStages = Shape::kStages;
  extern __shared__ __align__(128) unsigned char smem[];
  int64_t* positions = reinterpret_cast<int64_t*>(smem + Shape::kRingBytes);
  int64_t* slots = positions + kRows;

  // Eight row tiles go through all columns together: their part of x and the weight's tiles stay in L2.
  constexpr int kGroup = 8;
  const int group = blockIdx.x / (kGroup * col_tiles), in_group = blockIdx.x % (kGroup * col_tiles);
  const int group_rows = min(kGroup, row_tiles - group * kGroup);
  const int64_t row0 = int64_t{group * kGroup + in_group % group_rows} * kRows;
  const int col0 = in_group / group_rows * kCols;

  if (threadIdx.x < kRows) {
    const int64_t token = row0 + threadIdx.x;
    const bool present = token < p.num_tokens;
    const int64_t position = present ? load_position(p.heads, token) : -1;
    positions[threadIdx.x] = position;
    slots[threadIdx.x] = position >= 0 && p.heads.num_kv_heads > 0 ? p.heads.slot_mapping[token] : -1;
  }

  const int num_heads = p.heads.num_q_heads + 2 * p.heads.num_kv_heads;
  const int k_tiles = (p.hidden + kProjectionDepth - 1) / kProjectionDepth;
  const uint32_t ring = smem_address(smem);
  const auto load = [&](int k_tile) {
    if (k_tile < k_tiles) {
      const uint32_t stage = ring + k_tile % kStages * Shape::kStageBytes;
      const int k0 = k_tile * kProjectionDepth;
      load_stage<kRows>(stage, static_cast<const uint16_t*>(p.x), p.x_stride, row0, p.num_tokens, k0,
                        p.hidden);
      load_stage<kCols>(stage + kRows * kProjectionDepth * 2, static_cast<const uint16_t*>(p.weight),
                        p.hidden, col0, int64_t{num_heads} * D, k0, p.hidden);
    }
    cp_async_commit();  // also when empty, so that the count of groups in flight stays the same
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) load(i);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / Shape::kTile.warps_n * Shape::kWarpRows;
  const int warp_col = warp % Shape::kTile.warps_n * Shape::kWarpCols;
  float acc[Shape::kMFragments][Shape::kNFragments][4] = {};

  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is complete, and nobody reads the one that the next load overwrites
    load(k_tile + kStages - 1);
    const uint32_t a_stage = ring + k_tile % kStages * Shape::kStageBytes;
    const uint32_t b_stage = a_stage + kRows * kProjectionDepth * 2;
#pragma unroll
    for (int k = 0; k < kProjectionDepth / 16; ++k) {
      uint32_t a[Shape::kMFragments][4];
#pragma unroll
      for (int m = 0; m < Shape::kMFragments; ++m) {
        ldmatrix_x4(a[m], a_stage + swizzled(warp_row + 16 * m + lane % 16, 2 * k + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < Shape::kNFragments; n += 2) {
        // Rows of the weight are columns of the product, so b needs no transposition.
        uint32_t b[4];
        ldmatrix_x4(b, b_stage + swizzled(warp_col + 8 * n + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < Shape::kMFragments; ++m) {
          mma_16x8x16<T>(acc[m][n], a[m], b[0], b[1]);
          mma_16x8x16<T>(acc[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  cp_async_wait<0>();
  __syncthreads();
  float* out = reinterpret_cast<float*>(smem);
#pragma unroll
  for (int m = 0; m < Shape::kMFragments; ++m) {
#pragma unroll
    for (int n = 0; n < Shape::kNFragments; ++n) {
      const int row = warp_row + 16 * m + lane / 4, col = warp_col + 8 * n + lane % 4 * 2;
      const auto store = [&](int r, float x, float y) {
        *reinterpret_cast<float2*>(out + r * Shape::kOutStride + swizzled_column(r, col)) = make_float2(x, y);
      };
      store(row, acc[m][n][0], acc[m][n][1]);
      store(row + 8, acc[m][n][2], acc[m][n][3]);
    }
  }
  __syncthreads();

  constexpr int kLanes = HeadPart<D>::kLanes;
  const int head_lane = threadIdx.x % kLanes;
  const auto load8 = [&](int row, int col) -> Vec8 {
    const float* p = out + row * Shape::kOutStride;
    const float4 a = *reinterpret_cast<const float4*>(p + swizzled_column(row, col));
    const float4 b = *reinterpret_cast<const float4*>(p + swizzled_column(row, col + 4));
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  };
#pragma unroll
  for (int h = 0; h < kCols / D; ++h) {
    if (col0 / D + h >= num_heads) break;
    const HeadId head(p.heads, col0 / D + h);
    const HeadNorm<T, D> norm(p.heads, head.kind, head_lane);
    HeadPart<D> bias{};
    if (p.bias != nullptr) {
      bias = HeadPart<D>::load(static_cast<const T*>(p.bias) + col0 + h * D, head_lane);
    }
    for (int row = threadIdx.x / kLanes; row < kRows; row += kProjectionThreads / kLanes) {
      const int64_t token = row0 + row;
      HeadPart<D> part{{load8(row, h * D + 8 * head_lane), load8(row, h * D + D / 2 + 8 * head_lane)}};
#pragma unroll
      for (int i = 0; i < 16; ++i) part[i] += bias[i];
      const HeadAngles<D> angles(p.heads, head.kind, positions[row], head_lane);
      const HeadStore<T, D> store(p.heads, head, token, slots[row], head_lane);
      const float scale = norm_scale(p.heads, part, norm);
      if (token < p.num_tokens) finish_head(p.heads, part, head.kind, scale, norm, angles, store);
    }
  }
}

template <class T, int D, int kRows>
cudaError_t launch_projection_tile(const RopeKeyProjectionParams& p, cudaStream_t stream) {
  using Shape = Projection<T, D, kRows>;
  const auto kernel = rope_key_projection_kernel<T, D, kRows>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSmemBytes);
  if (error != cudaSuccess) return error;
  const int64_t cols = int64_t{p.heads.num_q_heads + 2 * p.heads.num_kv_heads} * D;
  const int64_t row_tiles = (p.num_tokens + kRows - 1) / kRows;
  const int64_t col_tiles = (cols + Shape::kCols - 1) / Shape::kCols;
  kernel<<<static_cast<unsigned>(row_tiles * col_tiles), kProjectionThreads, Shape::kSmemBytes, stream>>>(
      p, static_cast<int>(row_tiles), static_cast<int>(col_tiles));
  return cudaGetLastError();
}

template <class T, int D>
cudaError_t launch_rope_key_projection(const RopeKeyProjectionParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.heads.num_q_heads + 2 * p.heads.num_kv_heads == 0) return cudaSuccess;
  switch (projection_rows(p.num_tokens)) {
    case 16:
      return launch_projection_tile<T, D, 16>(p, stream);
    case 32:
      return launch_projection_tile<T, D, 32>(p, stream);
    case 64:
      return launch_projection_tile<T, D, 64>(p, stream);
    default:
      return launch_projection_tile<T, D, 128>(p, stream);
  }
}

}  // namespace fusedkv

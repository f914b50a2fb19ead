// rope_key_projection for few tokens, which is bound by reading the weight: once, by all SMs.
//
// A cluster of CTAs takes kFewRows rows of the weight (one head of 128 channels, two of 64) and splits the
// contraction. Products are transposed: rows of the weight fill the 16 rows of the tensor-core tile and
// tokens its 8 columns, so that one token costs one column tile. Each CTA sends its partial sums to the CTAs
// that finish the tokens; those add them up in the order of the ranks, so that every run gives the same bits.
#pragma once

#include "common/cluster.cuh"
#include "common/mma.cuh"
#include "common/overlap.cuh"
#include "common/rope.cuh"
#include "launch.h"

namespace fusedkv {

constexpr int kFewRows = 128;             // of the weight, a cluster
constexpr int kFewThreads = kFewRows;     // a warp computes 32 rows of it
constexpr int kFewDepth = 64;             // channels of x a stage: 128 bytes a row
constexpr int kMaxCluster = 8;            // what every GPU with clusters takes
constexpr int kPrefetchedStages = 8;      // of the weight, while the kernels before this one still run
constexpr int kFewStride = kFewRows + 4;  // floats a token of partial sums: banks differ between tokens

// kTokens: a capacity. At most 99 KB, so that two CTAs share an SM and one fits on sm_86.
template <int D, int kTokens>
struct FewTokens {
  static constexpr int kHeads = kFewRows / D;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kXOffset = kFewRows * kFewDepth * 2;
  static constexpr int kStageBytes = kXOffset + kTokens * kFewDepth * 2;
  static constexpr int kStages = kTokens <= 8 ? 5 : 4;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSumBytes = kTokens * kFewStride * sizeof(float);
  // Memory of their own lets partial sums arrive while a CTA still multiplies.
  static constexpr bool kSumsApart = kTokens <= 32;
  static constexpr int kSumOffset = kSumsApart ? kRingBytes : 0;
  static constexpr int kIndexOffset = kRingBytes + (kSumsApart ? kSumBytes : 0);
  static constexpr int kSmemBytes = kIndexOffset + kTokens * 2 * sizeof(int64_t);
  static_assert(kSmemBytes <= 99 * 1024 && kSumBytes <= kRingBytes && kTokens >= kMaxCluster);
};

// Asynchronously copies rows x 64 elements from channel k0 on; zeros outside of the matrix. 16-byte chunks
// are XORed with row / kRowsAlike, so that the eight rows which ldmatrix reads at once are in different
// banks.
template <int kRows, int kRowsAlike>
__device__ __forceinline__ void load_few_rows(uint32_t smem, const uint16_t* matrix, int64_t stride,
                                              int num_rows, int k0, int hidden) {
  constexpr int kChunks = kFewDepth / 8, kRowsAtOnce = kFewThreads / kChunks;
  const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks, k = k0 + 8 * chunk;
  const uint16_t* from = matrix + first * stride + k;
#pragma unroll
  for (int i = 0; i < kRows; i += kRowsAtOnce, from += kRowsAtOnce * stride) {
    const int row = i + first;
    if (kRows < kRowsAtOnce && row >= kRows) break;
    const bool valid = row < num_rows && k < hidden;
    const uint32_t to = smem + (row * kChunks + (chunk ^ row / kRowsAlike % kChunks)) * 16;
    cp_async_16(to, valid ? from : matrix, valid);
  }
}

// Where channel c of the tile is among a token's partial sums: XORed so that the lanes that read a token, 8
// channels apart, fall into different banks.
__device__ __forceinline__ int few_column(int c) { return c ^ ((c >> 5 ^ c >> 6) & 1) * 4; }

// Asks the L2 for bytes that nobody has to wait for; address and count are multiples of 16.
__device__ __forceinline__ void prefetch_l2_bulk(const void* p, int bytes) {
#if __CUDA_ARCH__ >= 900
  if (p != nullptr) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
#endif
}

template <class T, int D, int kTokens>
__global__ void __launch_bounds__(kFewThreads, 2)
    rope_key_projection_few_kernel(const __grid_constant__ RopeKeyProjectionParams p) {
  using Shape = FewTokens<D, kTokens>;
  constexpr int kStages = Shape::kStages, kTokenTiles = Shape::kTokenTiles;
  extern __shared__ __align__(128) unsigned char smem[];
  float* const sums = reinterpret_cast<float*>(smem + Shape::kSumOffset);
  int64_t* const positions = reinterpret_cast<int64_t*>(smem + Shape::kIndexOffset);
  int64_t* const slots = positions + kTokens;
  let_next_kernel_start();

  const int rank = cluster_rank(), ranks = cluster_size();
  const int head0 = blockIdx.x / ranks * Shape::kHeads;
  const int num_heads = min(Shape::kHeads, p.heads.num_q_heads + 2 * p.heads.num_kv_heads - head0);
  const int k_tiles = (p.hidden + kFewDepth - 1) / kFewDepth;
  const int first_tile = k_tiles * rank / ranks, num_tiles = k_tiles * (rank + 1) / ranks - first_tile;
  const auto* const weight = static_cast<const uint16_t*>(p.weight) + int64_t{head0} * D * p.hidden;
  const auto* const x = static_cast<const uint16_t*>(p.x);

  constexpr int kPrefetch = 64 / sizeof(T);  // what a request brings at least
  const int k_end = min((first_tile + min(num_tiles, kPrefetchedStages)) * kFewDepth, p.hidden);
#pragma unroll 1
  for (int row = threadIdx.x / 8; row < num_heads * D; row += kFewThreads / 8) {
#pragma unroll 1
    for (int k = first_tile * kFewDepth + threadIdx.x % 8 * kPrefetch; k < k_end; k += 8 * kPrefetch) {
      prefetch_l2(weight + int64_t{row} * p.hidden + k);
    }
  }
  if (threadIdx.x < num_heads) {
    const HeadId head(p.heads, head0 + threadIdx.x);
    const bool is_query = head.kind == HeadKind::kQuery;
    prefetch_l2_bulk(is_query ? p.heads.q_norm : p.heads.k_norm, D * sizeof(T));
    const float* scale = head.kind == HeadKind::kValue ? p.heads.v_scale : p.heads.k_scale;
    if (!is_query && scale != nullptr) prefetch_l2_bulk(scale + head.index * D, D * sizeof(float));
    if (p.bias != nullptr) {
      prefetch_l2_bulk(static_cast<const T*>(p.bias) + (head0 + threadIdx.x) * D, D * sizeof(T));
    }
  }
  // A CTA may be sent partial sums once it has started, and no longer uses the memory for them otherwise.
  if constexpr (Shape::kSumsApart) cluster_announce();
  wait_for_previous_kernels();

  // The tokens that this CTA finishes.
  const int owned = kTokens / ranks, token0 = rank * owned;
  const int num_tokens = static_cast<int>(p.num_tokens);
  const int num_owned = max(0, min(owned, num_tokens - token0));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t ring = smem_address(smem);
  // Row r of MMA tile m is channel 4 * (r % 8) + 2 * m + r / 8 of the warp's: a lane's sums of a token are
  // then four neighbours.
  const int channel = 32 * warp + lane % 8 * 4 + lane / 8 % 2;
  const uint32_t a_offset = channel * kFewDepth * 2 + (lane / 16 ^ lane % 8) * 16;
  const uint32_t b_offset = Shape::kXOffset + lane % 8 * kFewDepth * 2 + (lane / 8 ^ lane % 8) * 16;
  float acc[2][kTokenTiles][4] = {};
  // Asked for here, used when the ring is full: nobody waits for them alone.
  int64_t position = -1, slot = -1;
  if (threadIdx.x < num_owned) {
    position = raw_position(p.heads, token0 + threadIdx.x);
    if (p.heads.num_kv_heads > 0) slot = p.heads.slot_mapping[token0 + threadIdx.x];
  }

  // Step i loads stage i and multiplies the one that was loaded kStages - 1 steps ago.
#pragma unroll 1
  for (int i = 0; i < num_tiles + kStages - 1; ++i) {
    if (i >= kStages - 1) {
      cp_async_wait<kStages - 2>();
      __syncthreads();  // the stage is complete, and nobody reads the one that is loaded next
    }
    if (i < num_tiles) {
      const uint32_t stage = ring + i % kStages * Shape::kStageBytes;
      const int k0 = (first_tile + i) * kFewDepth;
      load_few_rows<kFewRows, 4>(stage, weight, p.hidden, num_heads * D, k0, p.hidden);
      load_few_rows<kTokens, 1>(stage + Shape::kXOffset, x, p.x_stride, num_tokens, k0, p.hidden);
    }
    cp_async_commit();  // also when empty, so that the count of groups in flight stays the same
    if (i == kStages - 2 && threadIdx.x < num_owned) {
      const bool known = index_is_inside(position, p.heads.max_positions);
      positions[threadIdx.x] = known ? position : -1;
      slots[threadIdx.x] = known ? slot : -1;
      if (known) prefetch_l2_bulk(p.heads.cos_sin + position * D, D * sizeof(float));
    }
    if (i < kStages - 1) continue;
    const uint32_t stage = ring + (i - (kStages - 1)) % kStages * Shape::kStageBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // 32 channels of x
      uint32_t a[2][2][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          ldmatrix_x4(a[k][m], ((stage + a_offset) ^ (2 * half + k) * 32) + m * 2 * kFewDepth * 2);
        }
      }
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        uint32_t b[4];
        ldmatrix_x4(b, ((stage + b_offset) ^ half * 64) + n * 8 * kFewDepth * 2);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
#pragma unroll
          for (int m = 0; m < 2; ++m) mma_16x8x16<T>(acc[m][n], a[k][m], b[2 * k], b[2 * k + 1]);
        }
      }
    }
  }

  if constexpr (!Shape::kSumsApart) cluster_arrive();
  cluster_wait();
  float* const to = sums + rank * owned * kFewStride + few_column(32 * warp + lane / 4 * 4);
#pragma unroll
  for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = n * 8 + lane % 4 * 2 + i;
      const float4 part = {acc[0][n][i], acc[0][n][2 + i], acc[1][n][i], acc[1][n][2 + i]};
      if (token < num_tokens) {
        float* const row = to + (token & (owned - 1)) * kFewStride;  // owned is a power of two
        store_in_cluster(reinterpret_cast<float4*>(row), token * ranks / kTokens, part);
      }
    }
  }
  cluster_arrive();

  constexpr int kLanes = HeadPart<D>::kLanes, kGroups = kFewThreads / kLanes;
  const int head_lane = threadIdx.x % kLanes;
  const int num_items = num_owned * Shape::kHeads;
  int first = 0;
#pragma unroll 1
  do {  // once at least, because all must wait; a group without an item of its own repeats the last one
    const int own_item = first + threadIdx.x / kLanes, item = max(0, min(own_item, num_items - 1));
    const int token = item / Shape::kHeads, in_tile = item % Shape::kHeads;
    const bool present = own_item < num_items && in_tile < num_heads;
    const int head_index = head0 + min(in_tile, num_heads - 1);
    const HeadId head(p.heads, head_index);
    const HeadNorm<T, D> norm(p.heads, head.kind, head_lane);
    HeadPart<D> part{};
    if (p.bias != nullptr) {
      part = HeadPart<D>::load(static_cast<const T*>(p.bias) + head_index * D, head_lane);
    }
    const HeadAngles<D> angles(p.heads, head.kind, num_owned > 0 ? positions[token] : -1, head_lane);
    const HeadStore<T, D> store(p.heads, head, token0 + token, num_owned > 0 ? slots[token] : -1, head_lane);
    if (first == 0) cluster_wait();
    HeadPart<D> sum{};
#pragma unroll 4
    for (int r = 0; r < ranks; ++r) {
      const float* const row = sums + (r * owned + token) * kFewStride;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = in_tile * D + i / 2 * (D / 2) + head_lane * 8 + i % 2 * 4;
        const float4 four = *reinterpret_cast<const float4*>(row + few_column(c));
        sum[4 * i] += four.x, sum[4 * i + 1] += four.y, sum[4 * i + 2] += four.z, sum[4 * i + 3] += four.w;
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) part[i] += sum[i];
    const float scale = norm_scale(p.heads, part, norm);
    if (present) finish_head(p.heads, part, head.kind, scale, norm, angles, store);
    first += kGroups;
  } while (first < num_items);
}

// CTAs of a cluster: as many as two an SM, which evens out how many bytes each SM reads.
inline int few_tokens_cluster(int64_t clusters, int k_tiles, int num_sms) {
  int size = 1;
  while (size < kMaxCluster && 2 * size * clusters <= 2 * num_sms && 2 * size <= k_tiles) size *= 2;
  return size;
}

template <class T, int D, int kTokens>
cudaError_t launch_few_tokens_tile(const RopeKeyProjectionParams& p, cudaStream_t stream) {
  using Shape = FewTokens<D, kTokens>;
  const auto kernel = rope_key_projection_few_kernel<T, D, kTokens>;
  int device, num_sms;
  cudaFuncAttributes compiled;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, kernel);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSmemBytes);
  }
  if (error != cudaSuccess) return error;

  const int64_t heads = p.heads.num_q_heads + 2 * p.heads.num_kv_heads;
  const int64_t clusters = (heads + Shape::kHeads - 1) / Shape::kHeads;
  const int k_tiles = (p.hidden + kFewDepth - 1) / kFewDepth;
  // Code for an older GPU, compiled for this one by the driver, knows neither clusters nor how to wait.
  const bool is_hopper_code = compiled.ptxVersion >= 90;
  const int size = is_hopper_code ? few_tokens_cluster(clusters, k_tiles, num_sms) : 1;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * size));
  config.blockDim = dim3(kFewThreads);
  config.dynamicSmemBytes = Shape::kSmemBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = is_hopper_code ? 2 : 0;
  return cudaLaunchKernelEx(&config, kernel, p);
}

// For at most 64 tokens.
template <class T, int D>
cudaError_t launch_few_tokens(const RopeKeyProjectionParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.heads.num_q_heads + 2 * p.heads.num_kv_heads == 0) return cudaSuccess;
  if (p.num_tokens <= 8) return launch_few_tokens_tile<T, D, 8>(p, stream);
  if (p.num_tokens <= 32) return launch_few_tokens_tile<T, D, 32>(p, stream);
  return launch_few_tokens_tile<T, D, 64>(p, stream);
}

}  // namespace fusedkv

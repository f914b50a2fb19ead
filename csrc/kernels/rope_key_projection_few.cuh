// rope_key_projection for few tokens on Hopper, which is bound by reading the weight: once, by all SMs.
//
// A cluster of CTAs takes kFewRows rows of the weight (one head of 128 channels, two of 64) and splits the
// contraction. In each CTA one warp copies tiles into a ring of stages and a warpgroup multiplies them, while
// the others load what heads are finished with. Products are transposed: rows of the weight are rows of the
// accumulators and tokens their columns, of which there may be as few as eight. The partial sums of a token
// go to the CTA that finishes it, which adds them up in the order of the ranks, so that every run gives the
// same bits.
//
// With more than eight tokens x is a good part of what the L2 delivers. Clusters then take several tiles of
// the weight's rows, whose CTAs of the same rank each copy a part of a stage's tokens to all of them.
#pragma once

#include <algorithm>

#include "common/cluster.cuh"
#include "common/device.h"
#include "common/hopper.cuh"
#include "common/overlap.cuh"
#include "common/rope.cuh"
#include "common/tensor_map.h"
#include "launch.h"

namespace fusedkv {

constexpr int kFewRows = 128;  // of the weight, a cluster
constexpr int kFewDepth = 64;  // channels of x a stage: 128 bytes a row, what the swizzle spans
constexpr int kFewThreads = 256;
constexpr int kFewProductThreads = 128;   // the first
constexpr int kFewCopyWarp = 7;           // the last
constexpr int kFewMaxCluster = 8;         // what every GPU with clusters takes
constexpr int kFewStride = kFewRows + 4;  // floats of a token's partial sums: banks differ between tokens

// kTokens: a capacity.
template <int kTokens>
struct FewTokens {
  static constexpr int kWeightBytes = kFewRows * kFewDepth * 2;
  static constexpr int kStageBytes = kWeightBytes + kTokens * kFewDepth * 2;
  // Partial sums have memory of their own: they arrive while a CTA still multiplies. Every rank may have
  // room for a token too many.
  static constexpr int kSumBytes = (kTokens + kFewMaxCluster) * kFewStride * sizeof(float);
  // An SM's: the more is asked for, the sooner the weight is there. With few tokens half of one, so that the
  // next kernel's CTAs have room while this one's still run.
  static constexpr int kMostBytes = (kTokens == 8 ? 113 : 226) * 1024;
  static constexpr int kStages = (kMostBytes - 1024 - 256 - kSumBytes) / kStageBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kFullOffset = kRingBytes + kSumBytes;  // barriers
  static constexpr int kEmptyOffset = kFullOffset + kStages * 8;
  static constexpr int kArrivedOffset = kEmptyOffset + kStages * 8;
  static constexpr int kSmemBytes = kArrivedOffset + 8 + 1024;  // the swizzle wants multiples of 1024
  static_assert(kStages >= 2 && kSmemBytes <= kMostBytes);
};

// A cluster: ranks in x, in y the tiles of the weight's rows that share copies of x, a power of two.
// Divisions are the host's: they would be a good part of what a CTA runs.
struct FewSplit {
  int ranks, sharers, sharer_bits;
  int tiles, longer;            // of the contraction, a rank: one more below rank `longer`
  int owned, inverse_of_owned;  // tokens of a tile that a rank finishes
  unsigned rank_0;              // the CTAs of rank 0, as bits

  // tokens: of a tile, at most.
  __host__ FewSplit(int ranks, int sharer_bits, int k_tiles, int tokens)
      : ranks(ranks),
        sharers(1 << sharer_bits),
        sharer_bits(sharer_bits),
        tiles(k_tiles / ranks),
        longer(k_tiles % ranks),
        owned((tokens + ranks - 1) / ranks),
        inverse_of_owned(65536 / owned + 1),
        rank_0(0) {
    for (int i = 0; i < sharers; ++i) rank_0 |= 1u << i * ranks;
  }
  __device__ __forceinline__ int first_tile(int rank) const { return rank * tiles + min(rank, longer); }
  __device__ __forceinline__ int num_tiles(int rank) const { return tiles + (rank < longer); }
  __device__ __forceinline__ int owner(int token) const { return token * inverse_of_owned >> 16; }
};

template <class T, int D, int kTokens>
struct FewProjection {
  using Shape = FewTokens<kTokens>;
  using Place = RingPlace<Shape::kStages>;
  static constexpr int kHeads = kFewRows / D;

  const RopeKeyProjectionParams& p;
  const FewSplit& split;
  const uint32_t ring;
  const int rank = blockIdx.x, row_tile = blockIdx.y;
  const int sharer = row_tile & (split.sharers - 1);
  const int64_t token0 = int64_t{blockIdx.z} * kTokens;

  __device__ __forceinline__ uint32_t full(int stage) const { return ring + Shape::kFullOffset + 8 * stage; }
  __device__ __forceinline__ uint32_t empty(int stage) const {
    return ring + Shape::kEmptyOffset + 8 * stage;
  }
  __device__ __forceinline__ uint32_t arrived() const { return ring + Shape::kArrivedOffset; }
  __device__ __forceinline__ int num_tokens() const {  // of the tile
    return static_cast<int>(min(p.num_tokens - token0, int64_t{kTokens}));
  }
  __device__ __forceinline__ int num_owned() const {
    return max(0, min(split.owned, num_tokens() - rank * split.owned));
  }
  // Which CTA of the cluster has this row tile's sums of that rank.
  __device__ __forceinline__ int cta_of(int rank) const { return sharer * split.ranks + rank; }

  // One thread.
  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < Shape::kStages; ++i) {
      mbarrier_init(full(i), 1);
      mbarrier_init(empty(i), kFewProductThreads / 32 * split.sharers);
    }
    mbarrier_init(arrived(), 1 + kFewProductThreads / 32);
    fence_mbarrier_init();
    const int others = split.ranks - 1;
    mbarrier_arrive_expect(arrived(), num_owned() * others * kFewRows * int{sizeof(float)});
  }

  // One warp: loops that all its threads run cost fewer instructions than those of a single one.
  __device__ __forceinline__ void copy(const CUtensorMap& x_map, const CUtensorMap& weight_map) const {
    const int num_tiles = split.num_tiles(rank), part = kTokens >> split.sharer_bits;
    const uint32_t x = ring + Shape::kWeightBytes + sharer * part * (kFewDepth * 2);
    const int token = static_cast<int>(token0) + sharer * part;
    int k = split.first_tile(rank) * kFewDepth;
    Place at;
#pragma unroll 1
    for (int i = 0; i < num_tiles; ++i, k += kFewDepth, at.next()) {
      // By the products of all CTAs that this one copies to.
      if (i >= Shape::kStages) mbarrier_wait(empty(at.stage), at.parity ^ 1);
      const uint32_t offset = at.stage * Shape::kStageBytes, barrier = full(at.stage);
      if (elect_thread()) {
        mbarrier_arrive_expect(barrier, Shape::kStageBytes);
        copy_box_5d<1>(ring + offset, weight_map, barrier, k, 0, 0, row_tile * (kFewRows / 32), 0);
      }
      if (i == 0) cluster_wait();  // x goes to the others' memory; by then a first copy is under way
      if (elect_thread()) {
        if (split.sharers == 1) {
          copy_box_2d(x + offset, x_map, barrier, k, token);
        } else {
          share_box_2d(x + offset, x_map, barrier, k, token, split.rank_0 << rank);
        }
      }
    }
  }

  // A warpgroup.
  __device__ __forceinline__ void multiply(float (&acc)[2][kTokens / 2]) const {
    const int num_tiles = split.num_tiles(rank), lane = threadIdx.x % 32;
    int last = 0;
    Place at;
#pragma unroll 1
    for (int i = 0; i < num_tiles; ++i, at.next()) {
      const uint32_t stage = ring + at.stage * Shape::kStageBytes;
      const uint64_t weight = wgmma_matrix(stage), x = wgmma_matrix(stage + Shape::kWeightBytes);
      mbarrier_wait(full(at.stage), at.parity);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kFewDepth / 16; ++k) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          wgmma_64x16<T>(acc[m], weight + m * (Shape::kWeightBytes / 2 / 16) + 2 * k, x + 2 * k,
                         i > 0 || k > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();  // of the stage before
      // Only while somebody waits for it: later the other CTA may have ended.
      const bool is_refilled = i > 0 && i - 1 + Shape::kStages < num_tiles;
      if (is_refilled && lane < split.sharers) mbarrier_arrive_at(empty(last), lane * split.ranks + rank);
      last = at.stage;
    }
    wgmma_wait<0>();
    fence_registers(acc[0]);
    fence_registers(acc[1]);
  }

  // Where channel c of the tile is among a token's partial sums: XORed so that the lanes that read a token, 8
  // channels apart, fall into different banks.
  __device__ __forceinline__ static int column(int c) { return c ^ ((c >> 5 ^ c >> 6) & 1) * 4; }

  // Row 8 * h + r of a warp's 16 rows of acc[m] is channel 4 * r + 2 * m + h of its 32: a lane's sums of a
  // token are then four neighbours.
  __device__ __forceinline__ void send(float (&acc)[2][kTokens / 2]) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t to = ring + Shape::kRingBytes + column(32 * warp + lane / 4 * 4) * sizeof(float);
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = n * 8 + lane % 4 * 2 + i;
        // Beyond the last token there may be no owner, and nothing is stored.
        const int owner = min(split.owner(token), split.ranks - 1),
                  row = rank * split.owned + token - owner * split.owned;
        const float4 part = {acc[0][4 * n + i], acc[0][4 * n + 2 + i], acc[1][4 * n + i],
                             acc[1][4 * n + 2 + i]};
        const uint32_t at = to + row * (kFewStride * sizeof(float));
        const bool is_own = owner == rank, is_token = token < num_tokens();
        store_in_cluster(address_in_cluster(at, cta_of(owner)), address_in_cluster(arrived(), cta_of(owner)),
                         part, is_token && !is_own);
        store_shared_floats(at, part, is_token && is_own);
      }
    }
    __syncwarp();
    if (lane == 0) mbarrier_arrive(arrived());
  }

  // Loads all that a head is finished with before it waits for its sums.
  __device__ __forceinline__ void finish(const float* sums) const {
    constexpr int kLanes = HeadPart<D>::kLanes, kWarpItems = 32 / kLanes;
    const int head_lane = threadIdx.x % kLanes;
    const int head0 = row_tile * kHeads;
    const int64_t first_token = token0 + rank * split.owned;
    const int num_heads = min(kHeads, p.heads.num_q_heads + 2 * p.heads.num_kv_heads - head0);
    const int num_items = num_owned() * kHeads;
    // The warps that do not multiply come first. Lanes without an item of their own repeat the last one.
    const int first_item = (threadIdx.x ^ kFewProductThreads) / kLanes;
#pragma unroll 1
    for (int own_item = first_item; own_item - own_item % kWarpItems < num_items;
         own_item += kFewThreads / kLanes) {
      const int item = min(own_item, num_items - 1);
      const int token = item / kHeads, in_tile = item % kHeads;
      const bool present = own_item == item && in_tile < num_heads;
      const int head_index = head0 + min(in_tile, num_heads - 1);
      const HeadId head(p.heads, head_index);
      const int64_t position = raw_position(p.heads, first_token + token);
      const int64_t slot = head.kind == HeadKind::kQuery ? -1 : p.heads.slot_mapping[first_token + token];
      const HeadNorm<T, D> norm(p.heads, head.kind, head_lane);
      HeadPart<D> part{};
      if (p.bias != nullptr) {
        part = HeadPart<D>::load(static_cast<const T*>(p.bias) + head_index * D, head_lane);
      }
      const bool known = index_is_inside(position, p.heads.max_positions);
      const HeadAngles<D> angles(p.heads, head.kind, known ? position : -1, head_lane);
      const HeadStore<T, D> store(p.heads, head, first_token + token, known ? slot : -1, head_lane);
      if (store.scale != nullptr) prefetch_l2(store.scale), prefetch_l2(store.scale + D / 2);

      mbarrier_wait_for_cluster(arrived(), 0);
      const float* row = sums + token * kFewStride;
      HeadPart<D> sum{};
#pragma unroll 4
      for (int r = 0; r < split.ranks; ++r, row += split.owned * kFewStride) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int c = in_tile * D + i / 2 * (D / 2) + head_lane * 8 + i % 2 * 4;
          const float4 four = *reinterpret_cast<const float4*>(row + column(c));
          sum[4 * i] += four.x, sum[4 * i + 1] += four.y, sum[4 * i + 2] += four.z, sum[4 * i + 3] += four.w;
        }
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) part[i] += sum[i];
      const float scale = norm_scale(p.heads, part, norm);
      if (present) finish_head(p.heads, part, head.kind, scale, norm, angles, store);
    }
  }
};

// The grid: ranks, tiles of the weight's rows, tiles of tokens.
template <class T, int D, int kTokens>
__global__ void __launch_bounds__(kFewThreads, 1)
    rope_key_projection_few_kernel(const __grid_constant__ RopeKeyProjectionParams p,
                                   const __grid_constant__ CUtensorMap x_map,
                                   const __grid_constant__ CUtensorMap weight_map,
                                   const __grid_constant__ FewSplit split) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ unsigned char smem[];
  const uint32_t start = smem_address(smem), ring = (start + 1023) / 1024 * 1024;
  const FewProjection<T, D, kTokens> projection{p, split, ring};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that warps agree on it

  if (warp == kFewCopyWarp) {
    if (elect_thread()) {
      prefetch_tensor_map(weight_map);
      prefetch_tensor_map(x_map);
      projection.init_barriers();
    }
    __syncwarp();
    cluster_announce();
    wait_for_previous_kernels();
    let_next_kernel_start();
    projection.copy(x_map, weight_map);
  } else {
    cluster_announce();
    wait_for_previous_kernels();
    cluster_wait();  // for the barriers, of this CTA and of those that are sent sums
  }
  if (warp < kFewProductThreads / 32) {
    float acc[2][kTokens / 2];
    projection.multiply(acc);
    projection.send(acc);
  }
  // A CTA stays until all sums for it have arrived.
  const unsigned char* sums = smem + (ring - start) + FewTokens<kTokens>::kRingBytes;
  projection.finish(reinterpret_cast<const float*>(sums));
#else
  __trap();  // run_rope_key_projection chooses this kernel only where the other branch was compiled
#endif
}

template <class T, int D, int kTokens>
cudaError_t launch_few_tokens_tile(const RopeKeyProjectionParams& p, cudaStream_t stream) {
  using Shape = FewTokens<kTokens>;
  const cuuint64_t tokens = p.num_tokens, hidden = p.hidden;
  const cuuint64_t cols = cuuint64_t(p.heads.num_q_heads + 2 * p.heads.num_kv_heads) * D;
  int sms = 0;
  cudaError_t error = count_sms(sms);
  if (error != cudaSuccess) return error;

  const int token_tiles = static_cast<int>((tokens + kTokens - 1) / kTokens);
  const int row_tiles = static_cast<int>((cols + kFewRows - 1) / kFewRows);
  const int k_tiles = (p.hidden + kFewDepth - 1) / kFewDepth;
  // Not all SMs: a cluster needs those of one GPC, and GPCs have some to spare. More would also exchange more
  // partial sums.
  const int ranks = std::clamp(sms * 3 / 4 / (row_tiles * token_tiles), 1, std::min(kFewMaxCluster, k_tiles));
  // Of whole groups of eight tokens, which is what the swizzle repeats after.
  int sharer_bits = 0;
  while ((2 * ranks << sharer_bits) <= kFewMaxCluster && kTokens >> sharer_bits >= 16 &&
         row_tiles % (2 << sharer_bits) == 0) {
    ++sharer_bits;
  }

  CUtensorMap x_map, weight_map;
  // The stride of a single row may be anything.
  const cuuint64_t x_stride = tokens == 1 ? hidden : cuuint64_t(p.x_stride);
  error = encode_tensor_map<T, 2>(x_map, p.x, {hidden, tokens}, {x_stride},
                                  {kFewDepth, cuuint32_t{kTokens} >> sharer_bits});
  if (error != cudaSuccess) return error;
  // The weight's rows as [cols / 32, 8, 2, 2], which a box reads as [2, cols / 32, 2, 8]: see send().
  error = encode_tensor_map<T, 5>(weight_map, p.weight, {hidden, 8, 2, cols / 32, 2},
                                  {4 * hidden, hidden, 32 * hidden, 2 * hidden},
                                  {kFewDepth, 8, 2, kFewRows / 32, 2});
  if (error != cudaSuccess) return error;
  const auto kernel = rope_key_projection_few_kernel<T, D, kTokens>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSmemBytes);
  if (error != cudaSuccess) return error;
  const int in_tile = static_cast<int>(std::min(tokens, cuuint64_t{kTokens}));
  return launch_overlapping_clusters(
      kernel, dim3(ranks, 1 << sharer_bits), dim3(ranks, row_tiles, token_tiles), kFewThreads,
      Shape::kSmemBytes, stream, p, x_map, weight_map, FewSplit(ranks, sharer_bits, k_tiles, in_tile));
}

// Where has_hopper_kernel(), for any number of tokens.
template <class T, int D>
cudaError_t launch_few_tokens(const RopeKeyProjectionParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0 || p.heads.num_q_heads + 2 * p.heads.num_kv_heads == 0) return cudaSuccess;
  if (p.num_tokens <= 8) return launch_few_tokens_tile<T, D, 8>(p, stream);
  if (p.num_tokens <= 32) return launch_few_tokens_tile<T, D, 32>(p, stream);
  return launch_few_tokens_tile<T, D, 64>(p, stream);
}

}  // namespace fusedkv

// Products for few tokens on Hopper, which are bound by reading the weight: once, by all SMs.
//
// A cluster of CTAs takes 128 rows of the weight and splits the contraction. In each CTA one warp copies
// tiles into a ring of stages and a warpgroup multiplies them, while the others load what the sums are
// finished with. Products are transposed: rows of the weight are rows of the accumulators and tokens their
// columns, of which there may be as few as eight. The partial sums of a token go to the CTA that finishes it,
// which adds them up in the order of the ranks, so that every run gives the same bits.
//
// With more than eight tokens x is a good part of what the L2 delivers. Clusters then take several tiles of
// the weight's rows, whose CTAs of the same rank each copy a part of a stage's tokens to all of them.
//
// An input norm costs no launch either: two warps multiply each tile of x by the norm's weights where it lies
// and add up its squares, which travel with the partial sums; the sums are at last divided by their root
// mean.
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
constexpr int kFewProductThreads = 128;  // the first
constexpr int kFewNormWarp = 5, kFewNormWarps = 2;
constexpr int kFewCopyWarp = 7;           // the last
constexpr int kFewEarly = 3;              // stages asked for early: more would hold up the kernel before
constexpr int kFewMaxCluster = 8;         // what every GPU with clusters takes
constexpr int kFewStride = kFewRows + 4;  // floats of a token's sums: its rows and its squares

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
  static constexpr int kStages = (kMostBytes - 1024 - 384 - kSumBytes) / kStageBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kFullOffset = kRingBytes + kSumBytes;  // barriers
  static constexpr int kNormedOffset = kFullOffset + kStages * 8;
  static constexpr int kEmptyOffset = kNormedOffset + kStages * 8;
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

// Which rows of the weight are which of a tile's 128 accumulator rows: group g of a tile's four, a half m of
// the accumulators, and in a warp's 16 rows number 8 * h + r. A lane's sums of a token, of both h and m, are
// neighbours among the token's partial sums, at 32 * g + 4 * r + 2 * m + h.
struct FewRowOrder {
  int r_stride, m_stride, group_stride;  // in rows of the weight; that of h is 1
  int groups;                            // of the weight
};

// Rows in their order.
constexpr FewRowOrder rows_in_order(int rows) { return {4, 2, 32, rows / 32}; }

// What finishes sums, E, has
//  - Params, which derive from ProductParams, and kTakesNorm, whether they may have an input norm;
//  - D: a tile has 128 / D items a token, and an item D / 16 lanes, each with 16 sums, a HeadPart<D>;
//  - a constructor (params, token, row_tile, item, lane), which loads all that finishing needs;
//  - column(i): where the lane's sums 4 * i and on are among those of the token;
//  - finish(sums, present), which whole warps call.
template <class T, class E, int kTokens, bool kNormed>
struct FewProduct {
  using Params = typename E::Params;
  using Shape = FewTokens<kTokens>;
  static constexpr int kItems = kFewRows / E::D;
  static constexpr int kReaders =
      kFewProductThreads / 32 + (kNormed ? kFewNormWarps : 0);  // warps, of a stage

  const Params& p;
  const FewSplit& split;
  const uint32_t ring;
  const int rank = blockIdx.x, row_tile = blockIdx.y;
  const int sharer = row_tile & (split.sharers - 1);
  const int64_t token0 = int64_t{blockIdx.z} * kTokens;

  __device__ __forceinline__ uint32_t full(int stage) const { return ring + Shape::kFullOffset + 8 * stage; }
  __device__ __forceinline__ uint32_t normed(int stage) const {
    return ring + Shape::kNormedOffset + 8 * stage;
  }
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
      if constexpr (kNormed) mbarrier_init(normed(i), kFewNormWarps);
      mbarrier_init(empty(i), kReaders * split.sharers);
    }
    // Every lane tells of its own sums, and not one of a warp after __syncwarp: what compute-sanitizer
    // follows.
    mbarrier_init(arrived(), 1 + kFewProductThreads + (kNormed ? 32 * kFewNormWarps : 0));
    fence_mbarrier_init();
    const int others = split.ranks - 1, floats = kFewRows + (kNormed ? 4 : 0);
    mbarrier_arrive_expect(arrived(), num_owned() * others * floats * int{sizeof(float)});
  }

  // One warp: loops that all its threads run cost fewer instructions than those of a single one.
  __device__ __forceinline__ void copy(const CUtensorMap& x_map, const CUtensorMap& weight_map) const {
    const int num_tiles = split.num_tiles(rank), part = kTokens >> split.sharer_bits;
    const uint32_t x = ring + Shape::kWeightBytes + sharer * part * (kFewDepth * 2);
    const int token = static_cast<int>(token0) + sharer * part, k0 = split.first_tile(rank) * kFewDepth;
    const auto copy_weight = [&](int stage, int i) {
      if (!elect_thread()) return;
      mbarrier_arrive_expect(full(stage), Shape::kStageBytes);
      stream_box_5d(ring + stage * Shape::kStageBytes, weight_map, full(stage), k0 + i * kFewDepth, 0, 0,
                    row_tile * (kFewRows / 32), 0);
    };
    const auto copy_x = [&](int stage, int i) {
      if (!elect_thread()) return;
      const uint32_t to = x + stage * Shape::kStageBytes;
      if (split.sharers == 1) {
        copy_box_2d(to, x_map, full(stage), k0 + i * kFewDepth, token);
      } else {
        share_box_2d(to, x_map, full(stage), k0 + i * kFewDepth, token, split.rank_0 << rank);
      }
    };
    const int first = min(num_tiles, Shape::kStages), early = min(first, kFewEarly);
    if (!p.early_weight) wait_for_previous_kernels();
#pragma unroll 1
    for (int i = 0; i < early; ++i) copy_weight(i, i);
    if (p.early_weight) wait_for_previous_kernels();
    cluster_wait();  // x goes to the others' memory
#pragma unroll 1
    for (int i = 0; i < first; ++i) {
      if (i >= early) copy_weight(i, i);
      copy_x(i, i);
    }
    RingPlace at;
#pragma unroll 1
    for (int i = first; i < num_tiles; ++i, at.next(Shape::kStages)) {
      mbarrier_wait(empty(at.stage), at.parity);  // by the readers in all CTAs that this one copies to
      copy_weight(at.stage, i);
      copy_x(at.stage, i);
    }
    let_next_kernel_start();  // not earlier: its first copies would share the memory's rate with these
  }

  // A warp is through with a stage, which the CTAs that copy x to it may fill again.
  __device__ __forceinline__ void release(int stage) const {
    const int lane = threadIdx.x % 32;
    if (lane < split.sharers) mbarrier_arrive_at(empty(stage), lane * split.ranks + rank);
  }

  // The norm's warps. Thread i has chunk i % 8 of tokens i / 8, i / 8 + 8, ...
  __device__ __forceinline__ void norm_inputs() const {
    constexpr int kTurns = kTokens / (kFewNormWarps * 4);
    const int thread = threadIdx.x - 32 * kFewNormWarp, chunk = thread % 8, row = thread / 8;
    const int num_tiles = split.num_tiles(rank);
    float squares[kTurns] = {};
    const uint32_t x = ring + Shape::kWeightBytes + row * 128 + (chunk ^ row) * 16;  // 8 rows share a swizzle
    int channel = split.first_tile(rank) * kFewDepth + chunk * 8;
    const auto load = [&] {
      return channel < p.hidden
                 ? *reinterpret_cast<const uint4*>(static_cast<const T*>(p.input_norm) + channel)
                 : uint4{};
    };
    uint4 next = load();
    RingPlace at;
#pragma unroll 1
    for (int i = 0; i < num_tiles; ++i, at.next(Shape::kStages)) {
      const Vec8 weights = Vec8::unpack<T>(next);
      channel += kFewDepth;
      if (i + 1 < num_tiles) next = load();
      mbarrier_wait(full(at.stage), at.parity);
#pragma unroll
      for (int j = 0; j < kTurns; ++j) {
        const uint32_t address = x + at.stage * Shape::kStageBytes + j * 8 * 128;
        Vec8 values = Vec8::unpack<T>(load_shared_16(address));
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          squares[j] += values.x[c] * values.x[c];
          values.x[c] *= weights.x[c];
        }
        store_shared_16(address, values.pack<T>());
      }
      fence_async_proxy();
      __syncwarp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(normed(at.stage));
      if (i + Shape::kStages < num_tiles) release(at.stage);
    }
#pragma unroll
    for (int j = 0; j < kTurns; ++j) {
      const float sum = sum_over_lanes<8>(squares[j]);
      send_row(row + 8 * j, kFewRows, {sum, 0.f, 0.f, 0.f}, chunk == 0);
    }
    mbarrier_arrive(arrived());
  }

  // A warpgroup.
  __device__ __forceinline__ void multiply(float (&acc)[2][kTokens / 2]) const {
    const int num_tiles = split.num_tiles(rank);
    int last = 0;
    RingPlace at;
#pragma unroll 1
    for (int i = 0; i < num_tiles; ++i, at.next(Shape::kStages)) {
      const uint32_t stage = ring + at.stage * Shape::kStageBytes;
      const uint64_t weight = wgmma_matrix(stage), x = wgmma_matrix(stage + Shape::kWeightBytes);
      mbarrier_wait(full(at.stage), at.parity);
      if constexpr (kNormed) mbarrier_wait(normed(at.stage), at.parity);
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
      if (i > 0 && i - 1 + Shape::kStages < num_tiles) release(last);
      last = at.stage;
    }
    wgmma_wait<0>();
    fence_registers(acc[0]);
    fence_registers(acc[1]);
  }

  // Where number c of a token's sums is: XORed so that the lanes that read a token, 8 channels apart, fall
  // into different banks.
  __device__ __forceinline__ static int column(int c) { return c ^ ((c >> 5 ^ c >> 6) & 1) * 4; }

  // Four numbers of a token, at `at` among its sums, to the CTA that finishes it.
  __device__ __forceinline__ void send_row(int token, int at, float4 part, bool valid) const {
    // Beyond the last token there may be no owner, and nothing is stored.
    const int owner = min(split.owner(token), split.ranks - 1),
              row = rank * split.owned + token - owner * split.owned;
    const uint32_t to = ring + Shape::kRingBytes + (row * kFewStride + at) * sizeof(float);
    const bool is_own = owner == rank, is_token = valid && token < num_tokens();
    store_in_cluster(address_in_cluster(to, cta_of(owner)), address_in_cluster(arrived(), cta_of(owner)),
                     part, is_token && !is_own);
    store_shared_floats(to, part, is_token && is_own);
  }

  __device__ __forceinline__ void send(float (&acc)[2][kTokens / 2]) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int at = column(32 * warp + lane / 4 * 4);
#pragma unroll
    for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 part = {acc[0][4 * n + i], acc[0][4 * n + 2 + i], acc[1][4 * n + i],
                             acc[1][4 * n + 2 + i]};
        send_row(n * 8 + lane % 4 * 2 + i, at, part, true);
      }
    }
    mbarrier_arrive(arrived());
  }

  // Loads all that an item is finished with before it waits for its sums.
  __device__ __forceinline__ void finish(const float* sums) const {
    constexpr int kLanes = HeadPart<E::D>::kLanes, kWarpItems = 32 / kLanes;
    const int64_t first_token = token0 + rank * split.owned;
    const int num_items = num_owned() * kItems;
    // The warps that do not multiply come first. Lanes without an item of their own repeat the last one.
    const int first_item = (threadIdx.x ^ kFewProductThreads) / kLanes;
#pragma unroll 1
    for (int own_item = first_item; own_item - own_item % kWarpItems < num_items;
         own_item += kFewThreads / kLanes) {
      const int item = min(own_item, num_items - 1), token = item / kItems;
      E end(p, first_token + token, row_tile, item % kItems, threadIdx.x % kLanes);

      mbarrier_wait_for_cluster(arrived(), 0);
      const float* row = sums + token * kFewStride;
      HeadPart<E::D> sum{};
      float squares = 0.f;
#pragma unroll 4
      for (int r = 0; r < split.ranks; ++r, row += split.owned * kFewStride) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float4 four = *reinterpret_cast<const float4*>(row + column(end.column(i)));
          sum[4 * i] += four.x, sum[4 * i + 1] += four.y, sum[4 * i + 2] += four.z, sum[4 * i + 3] += four.w;
        }
        if constexpr (kNormed) squares += row[kFewRows];
      }
      if constexpr (kNormed) {
        const float scale = rsqrtf(squares / p.hidden + p.input_eps);
#pragma unroll
        for (int i = 0; i < 16; ++i) sum[i] *= scale;
      }
      end.finish(sum, own_item == item);
    }
  }
};

// The grid: ranks, tiles of the weight's rows, tiles of tokens.
template <class T, class E, int kTokens, bool kNormed>
__global__ void __launch_bounds__(kFewThreads, 1)
    few_tokens_kernel(const __grid_constant__ typename E::Params p, const __grid_constant__ CUtensorMap x_map,
                      const __grid_constant__ CUtensorMap weight_map,
                      const __grid_constant__ FewSplit split) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ unsigned char smem[];
  const uint32_t start = smem_address(smem), ring = (start + 1023) / 1024 * 1024;
  const FewProduct<T, E, kTokens, kNormed> product{p, split, ring};
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that warps agree on it

  if (warp == kFewCopyWarp) {
    if (elect_thread()) {
      prefetch_tensor_map(weight_map);
      prefetch_tensor_map(x_map);
      product.init_barriers();
    }
    __syncwarp();
    cluster_announce();
    product.copy(x_map, weight_map);
  } else {
    cluster_announce();
    wait_for_previous_kernels();
    cluster_wait();  // for the barriers, of this CTA and of those that are sent sums
  }
  if (warp < kFewProductThreads / 32) {
    float acc[2][kTokens / 2];
    product.multiply(acc);
    product.send(acc);
  }
  if (kNormed && warp >= kFewNormWarp && warp < kFewNormWarp + kFewNormWarps) product.norm_inputs();
  // A CTA stays until all sums for it have arrived.
  const unsigned char* sums = smem + (ring - start) + FewTokens<kTokens>::kRingBytes;
  product.finish(reinterpret_cast<const float*>(sums));
#else
  __trap();  // launched only where the other branch was compiled: see has_hopper_kernel()
#endif
}

template <class T, class E, int kTokens, bool kNormed>
cudaError_t launch_few_product_tile(const typename E::Params& p, int rows, const FewRowOrder& order,
                                    cudaStream_t stream) {
  using Shape = FewTokens<kTokens>;
  const cuuint64_t tokens = p.num_tokens, hidden = p.hidden;
  int sms = 0;
  cudaError_t error = count_sms(sms);
  if (error != cudaSuccess) return error;

  const int token_tiles = static_cast<int>((tokens + kTokens - 1) / kTokens);
  const int row_tiles = (rows + kFewRows - 1) / kFewRows;
  const int k_tiles = (p.hidden + kFewDepth - 1) / kFewDepth;
  // Of up to eight tokens two CTAs fit an SM. But not all there is room for: a cluster needs SMs of one GPC,
  // and GPCs have some to spare. More would also exchange more partial sums.
  constexpr int kMostOfSms = kTokens == 8 ? 6 : 3;  // quarters
  const int ranks =
      std::clamp(sms * kMostOfSms / 4 / (row_tiles * token_tiles), 1, std::min(kFewMaxCluster, k_tiles));
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
  const cuuint64_t groups = order.groups;
  error = encode_tensor_map<T, 5>(
      weight_map, p.weight, {hidden, 8, 2, groups, 2},
      {order.r_stride * hidden, hidden, order.group_stride * hidden, order.m_stride * hidden},
      {kFewDepth, 8, 2, kFewRows / 32, 2});
  if (error != cudaSuccess) return error;
  const auto kernel = few_tokens_kernel<T, E, kTokens, kNormed>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSmemBytes);
  if (error != cudaSuccess) return error;
  const int in_tile = static_cast<int>(std::min(tokens, cuuint64_t{kTokens}));
  return launch_overlapping_clusters(
      kernel, dim3(ranks, 1 << sharer_bits), dim3(ranks, row_tiles, token_tiles), kFewThreads,
      Shape::kSmemBytes, stream, p, x_map, weight_map, FewSplit(ranks, sharer_bits, k_tiles, in_tile));
}

// Where has_hopper_kernel(), for any number of tokens. rows: of the weight.
template <class T, class E>
cudaError_t launch_few_product(const typename E::Params& p, int rows, const FewRowOrder& order,
                               cudaStream_t stream) {
  if (p.num_tokens == 0 || rows == 0) return cudaSuccess;
  const auto launch = [&]<bool kNormed>() {
    if (p.num_tokens <= 8) return launch_few_product_tile<T, E, 8, kNormed>(p, rows, order, stream);
    if (p.num_tokens <= 32) return launch_few_product_tile<T, E, 32, kNormed>(p, rows, order, stream);
    return launch_few_product_tile<T, E, 64, kNormed>(p, rows, order, stream);
  };
  if (p.input_norm == nullptr) return launch.template operator()<false>();
  if constexpr (std::is_same_v<T, bf16> && E::kTakesNorm) return launch.template operator()<true>();
  return cudaErrorInvalidValue;
}

}  // namespace fusedkv

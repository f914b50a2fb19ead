// rope_key_projection for many tokens on Hopper: one CTA an SM walks over output tiles of 128 tokens. One
// warp copies tiles of x and of the weight into rings of stages, two warpgroups multiply 64 tokens each, and
// three warps finish the heads of a tile while the next one is multiplied. The products reach them through
// shared memory, rounded to the dtype as those of a library product are.
//
// The weight's rows arrive permuted, so that eight of a lane's accumulators are neighbouring channels: 16
// bytes to store.
#pragma once

#include <algorithm>
#include <bit>

#include "common/cluster.cuh"
#include "common/device.h"
#include "common/hopper.cuh"
#include "common/overlap.cuh"
#include "common/rope.cuh"
#include "common/tensor_map.h"
#include "launch.h"

namespace fusedkv {

constexpr int kHopperRows = 128;  // tokens of a tile, half of them a warpgroup's
constexpr int kHopperDepth = 64;  // channels of x a stage: 128 bytes a row, what the swizzle spans
constexpr int kHopperThreads = 384;
// Stages that the first warpgroup is ahead: it stores its products while the other one multiplies.
constexpr int kHopperLead = 1;
// CTAs of a cluster, on successive rows of tiles; each copies a part of the weight's tile to both, which
// halves what the L2 must deliver.
constexpr int kHopperCtas = 2;
constexpr int kLeadBarrier = 1;
constexpr int kHopperRingBytes = 224 * 1024;  // the most for the stages and the products of a tile

// kCols: channels of heads of a tile.
template <int kCols>
struct HopperTile {
  static constexpr int kWeightBytes = kCols * kHopperDepth * 2;
  static constexpr int kXBytes = kHopperRows * kHopperDepth * 2;
  static constexpr int kRowBytes = kCols * 2, kProductBytes = kHopperRows * kRowBytes;
  // Three of the weight for 256 columns; a fourth that the products lend was slower, because it filled late.
  // What is left is for x, which comes from memory and not from the L2: four. Six of each for 128 columns.
  static constexpr int kStages = (kHopperRingBytes - kProductBytes) / (kWeightBytes + kXBytes);
  static constexpr int kXStages = (kHopperRingBytes - kProductBytes - kStages * kWeightBytes) / kXBytes;
  static constexpr int kSmemBytes =
      kProductBytes + kStages * kWeightBytes + kXStages * kXBytes + 1024;  // for the swizzle's alignment
  static constexpr int kClusterRows = kHopperCtas * kHopperRows;
  static constexpr int kAccumulators = kCols / 2;  // a thread
};

// 32 columns of a tile are 4 lanes' 8 channels each. A weight row 32 * g + 8 * lane + 2 * pair + c of the
// tile becomes the product's column 8 * (pair * kCols / 32 + g) + 2 * lane + c, which is where wgmma gives a
// lane its pairs: the copy of one `pair` is one box, and the boxes follow one another.
constexpr int kWeightBoxes = 4;

template <int kCols>
__device__ __forceinline__ constexpr int accumulator_of(int group, int row_half, int channel) {
  return (channel / 2 * (kCols / 32) + group) * 4 + row_half * 2 + channel % 2;
}

constexpr int kMostTilesOfOneRow = 12;  // more go eight rows at a time: docs/kernels.md has the times

// A cluster's tiles. Those of a row follow one another, so that clusters read the same x at the same time;
// where there are many of them, eight rows go through all columns together, so that the weight's tiles stay
// in the L2.
struct HopperTiles {
  int row_tiles, col_tiles;  // of clusters

  __device__ __forceinline__ int count() const { return row_tiles * col_tiles; }
  __device__ __forceinline__ void place(int tile, int& row_tile, int& col_tile) const {
    const int rows = col_tiles > kMostTilesOfOneRow ? 8 : 1;
    const int group = tile / (rows * col_tiles), in_group = tile % (rows * col_tiles);
    const int group_rows = min(rows, row_tiles - group * rows);
    row_tile = group * rows + in_group % group_rows;
    col_tile = in_group / group_rows;
  }
};

// The tile that a CTA takes as its `number`th.
struct HopperTurn {
  int row, col_tile;  // the CTA's first row

  __device__ __forceinline__ HopperTurn(const HopperTiles& tiles, int number) {
    const int cluster = blockIdx.x / kHopperCtas, rank = blockIdx.x % kHopperCtas;
    const int clusters = gridDim.x / kHopperCtas;
    int row_tile;
    tiles.place(cluster + number * clusters, row_tile, col_tile);
    row = (row_tile * kHopperCtas + rank) * kHopperRows;
  }
  static __device__ __forceinline__ int count(const HopperTiles& tiles) {  // at least 1
    const int cluster = blockIdx.x / kHopperCtas, clusters = gridDim.x / kHopperCtas;
    return (tiles.count() - cluster + clusters - 1) / clusters;
  }
};

// Where this lane's channels of a head go from all rows of a tile, if no dtype or scale changes on the way:
// HeadStore, made anew for every row, was a fifth of the instructions.
template <class T, int D>
struct HeadRows {
  char* data;
  int64_t page_stride, token_stride, head_stride;  // bytes; the last to the next head of the kind

  __device__ __forceinline__ HeadRows(const HeadOutputs& p, HeadId head, int lane) {
    constexpr int64_t kSize = sizeof(T);
    if (head.kind == HeadKind::kQuery) {
      data = static_cast<char*>(p.q_out) + (head.index * D + 8 * lane) * kSize;
      page_stride = 0, token_stride = p.num_q_heads * D * kSize, head_stride = D * kSize;
    } else {
      const PagedCache& cache = head.kind == HeadKind::kKey ? p.k_cache : p.v_cache;
      data = static_cast<char*>(cache.data) + (head.index * cache.head_stride + 8 * lane) * kSize;
      page_stride = cache.page_stride * kSize, token_stride = cache.token_stride * kSize;
      head_stride = cache.head_stride * kSize;
    }
  }

  // offset: of a query, its token.
  __device__ __forceinline__ char* at(int64_t page, int64_t offset) const {
    return data + page * page_stride + offset * token_stride;
  }
};

// A token's position and slot as they are given, or -1: nothing has waited for them.
struct HopperToken {
  int64_t position = -1, slot = -1;
};

// What a tile's heads are: all values, or all queries or all keys, stored in the projection's dtype; or
// others, of which each head has to ask what it is.
enum class HopperHeads { kValues, kRotated, kMixed };

template <class T, int D, int kCols>
struct HopperProjection {
  using Tile = HopperTile<kCols>;
  static constexpr int kHeads = kCols / D, kParts = D / 64;  // kParts: HeadParts of a head in one lane

  const RopeKeyProjectionParams& p;
  const HopperTiles tiles;
  const int page_shift;  // log2 of the cache's page size, or -1 when it is no power of two
  // Shared memory. Barriers, the first of: stages full and empty, of the weight and of x, products of each
  // warpgroup ready; and one for the products' place, free.
  const uint32_t products, full, empty, x_full, x_empty, ready, free;
  const uint32_t ring = products + Tile::kProductBytes, x_ring = ring + Tile::kStages * Tile::kWeightBytes;
  const int k_tiles = (p.hidden + kHopperDepth - 1) / kHopperDepth;
  const int turns = HopperTurn::count(tiles);

  // ------------------------------------------------------------------------------------------- one thread

  // A stage of the weight is empty when all warps that read it, in both CTAs of the cluster, have said so:
  // each CTA writes into the other's stage. Copies of x are a stage ahead of it.
  __device__ __forceinline__ void copy(const CUtensorMap& x_map, const CUtensorMap& weight_map) const {
    constexpr int kBoxes = kWeightBoxes / kHopperCtas;
    const int first_box = blockIdx.x % kHopperCtas * kBoxes;
    RingPlace at, x_at;
    int x_number = 0, x_k = 0, x_row = HopperTurn(tiles, 0).row;
    const auto copy_x = [&] {
      if (x_number == turns) return;
      const uint32_t barrier = x_full + x_at.stage * 8;
      mbarrier_wait(x_empty + x_at.stage * 8, x_at.parity ^ 1);
      mbarrier_arrive_expect(barrier, Tile::kXBytes);
      copy_box_2d(x_ring + x_at.stage * Tile::kXBytes, x_map, barrier, x_k * kHopperDepth, x_row);
      x_at.next(Tile::kXStages);
      if (++x_k < k_tiles) return;
      x_k = 0;
      if (++x_number < turns) x_row = HopperTurn(tiles, x_number).row;
    };
    copy_x();
    for (int number = 0; number < turns; ++number) {
      const HopperTurn turn(tiles, number);
      for (int k = 0; k < k_tiles; ++k, at.next(Tile::kStages)) {
        const uint32_t weight = ring + at.stage * Tile::kWeightBytes, barrier = full + at.stage * 8;
        mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
        mbarrier_arrive_expect(barrier, Tile::kWeightBytes);
#pragma unroll
        for (int pair = 0; pair < kBoxes; ++pair) {
          copy_box_5d<kHopperCtas>(weight + (first_box + pair) * (Tile::kWeightBytes / kWeightBoxes),
                                   weight_map, barrier, k * kHopperDepth, 0, first_box + pair, 0,
                                   turn.col_tile * (kCols / 32));
        }
        copy_x();
      }
    }
  }

  // --------------------------------------------------------------------------------------- two warpgroups

  // Lane i of a warp tells CTA i of the cluster that the warp is done with what the barrier guards.
  __device__ __forceinline__ void tell_cluster(uint32_t barrier) const {
    if (threadIdx.x % 32 < kHopperCtas) mbarrier_arrive_at(barrier, threadIdx.x % 32);
  }

  // The warp has read its part of a stage of the weight and of x. later: stages of all tiles that follow.
  __device__ __forceinline__ void leave(int stage, int x_stage, int later) const {
    if (threadIdx.x % 32 == 0) mbarrier_arrive(x_empty + x_stage * 8);
    // Only while somebody waits for it: later the other CTA may have ended.
    if (later >= Tile::kStages) tell_cluster(empty + stage * 8);
  }

  __device__ __forceinline__ void multiply(int warpgroup) const {
    const int lead = min(kHopperLead, k_tiles);
    RingPlace at, x_at;
    int later = turns * k_tiles;
    for (int number = 0; number < turns; ++number) {
      const HopperTurn turn(tiles, number);
      if (kHopperLead > 0 && number == 0 && warpgroup == 1) named_barrier_wait<kLeadBarrier, 256>();
      float acc[Tile::kAccumulators];
      int last = 0, x_last = 0;
      for (int k = 0; k < k_tiles; ++k, at.next(Tile::kStages), x_at.next(Tile::kXStages)) {
        const uint64_t weight = wgmma_matrix(ring + at.stage * Tile::kWeightBytes);
        const uint64_t x =
            wgmma_matrix(x_ring + x_at.stage * Tile::kXBytes + warpgroup * (Tile::kXBytes / 2));
        mbarrier_wait(full + at.stage * 8, at.parity);
        mbarrier_wait(x_full + x_at.stage * 8, x_at.parity);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kHopperDepth / 16; ++i) {
          wgmma_64x16<T>(acc, x + 2 * i, weight + 2 * i, k > 0 || i > 0);
        }
        wgmma_commit();
        if (kHopperLead > 0 && number == 0 && warpgroup == 0 && k == lead - 1) {
          named_barrier_arrive<kLeadBarrier, 256>();
        }
        wgmma_wait<1>();  // of the stage before: the tensor cores always have the next one's work
        if (k > 0) leave(last, x_last, --later);
        last = at.stage, x_last = x_at.stage;
      }
      wgmma_wait<0>();
      fence_registers(acc);
      leave(last, x_last, --later);

      if (p.bias != nullptr) add_bias(acc, turn.col_tile);
      // The products of the tile before have been read by then, except where tiles are short.
      if (number > 0) mbarrier_wait(free, (number - 1) & 1);
      store_products(acc, warpgroup);
      mbarrier_arrive(ready + warpgroup * 8);
    }
  }

  __device__ __forceinline__ void add_bias(float (&acc)[Tile::kAccumulators], int col_tile) const {
    const int num_cols = (p.heads.num_q_heads + 2 * p.heads.num_kv_heads) * D;
#pragma unroll
    for (int group = 0; group < kCols / 32; ++group) {
      // A copy first: unpacked from where it lies, it would be loaded byte by byte.
      Bits8<T> bits{};
      const int col = col_tile * kCols + 32 * group + threadIdx.x % 4 * 8;
      if (col < num_cols) bits = static_cast<const Bits8<T>*>(p.bias)[col / 8];
      const Vec8 bias = Vec8::unpack<T>(bits);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[accumulator_of<kCols>(group, r, i)] += bias.x[i];
      }
    }
  }

  // Where eight channels of a row wait. Eight lanes that store or load together have four chunks of two
  // neighbouring rows or eight of one: all banks, when every other row swaps its chunks by fours.
  __device__ __forceinline__ uint32_t products_at(int row, int chunk) const {
    return products + row * Tile::kRowBytes + (chunk ^ row % 2 * 4) * 16;
  }

  __device__ __forceinline__ void store_products(const float (&acc)[Tile::kAccumulators],
                                                 int warpgroup) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int row = warpgroup * 64 + warp * 16 + lane / 4;
    const uint32_t even = products_at(row, lane % 4), odd = products_at(row, 4 + lane % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int group = 0; group < kCols / 32; ++group) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          pairs[i] = pack2<T>(acc[accumulator_of<kCols>(group, r, 2 * i)],
                              acc[accumulator_of<kCols>(group, r, 2 * i + 1)]);
        }
        store_shared_16((group % 2 ? odd : even) + group / 2 * 128 + r * (8 * Tile::kRowBytes),
                        {pairs[0], pairs[1], pairs[2], pairs[3]});
      }
    }
  }

  // --------------------------------------------------------- three warps, for the last tile all but one

  __device__ __forceinline__ static int first_row() { return (static_cast<int>(threadIdx.x) / 32 - 1) * 8; }

  // Of this lane's row among those from `first` on.
  __device__ __forceinline__ HopperToken look_up(const HopperTurn& turn, int first) const {
    const int row = first + threadIdx.x % 32 / 4;
    const int64_t index = turn.row + row;
    HopperToken token;
    if (row < kHopperRows && index < p.num_tokens) {
      token.position = raw_position(p.heads, index);
      if (p.heads.num_kv_heads > 0) token.slot = p.heads.slot_mapping[index];
    }
    return token;
  }

  __device__ __forceinline__ HopperToken look_up_first(int number) const {
    return look_up(HopperTurn(tiles, number), first_row());
  }

  // As floats, because all rows use them; ones without a norm. Returns whether there is one.
  __device__ __forceinline__ bool load_norm(HeadKind kind, HeadPart<D> (&weights)[kParts]) const {
    bool is_given = false;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const HeadNorm<T, D> norm(p.heads, kind, 4 * part + threadIdx.x % 4);
      is_given = norm.is_given;
      if (is_given) {
        weights[part] = norm.weights.unpack();
      } else {
#pragma unroll
        for (int i = 0; i < 16; ++i) weights[part][i] = 1.f;
      }
    }
    return is_given;
  }

  // Four lanes have a row's heads, as HeadParts 4 * part + lane; a warp has eight rows at once. token: that
  // of look_up_first.
  __device__ __forceinline__ void finish(int number, HopperToken token) const {
    const int first_head = HopperTurn(tiles, number).col_tile * kHeads;
    const int num_heads = p.heads.num_q_heads + 2 * p.heads.num_kv_heads;
    const HeadKind first = HeadId(p.heads, first_head).kind;
    const HeadKind last = HeadId(p.heads, first_head + kHeads - 1).kind;
    const bool keeps_dtype = p.heads.cache_dtype != DType::kE4M3 && p.heads.k_copy.data == nullptr &&
                             p.heads.k_scale == nullptr && p.heads.v_scale == nullptr;
    const bool alike =
        first == last && first_head + kHeads <= num_heads && (first == HeadKind::kQuery || keeps_dtype);
    if (!alike) {
      finish_rows<HopperHeads::kMixed>(number, token, first, keeps_dtype);
    } else if (first == HeadKind::kValue) {
      finish_rows<HopperHeads::kValues>(number, token, first, true);
    } else {
      finish_rows<HopperHeads::kRotated>(number, token, first, true);
    }
    if (number < turns - 1) mbarrier_arrive(free);
  }

  // first_kind: of the tile's first head.
  template <HopperHeads heads>
  __device__ __forceinline__ void finish_rows(int number, HopperToken token, HeadKind first_kind,
                                              bool keeps_dtype) const {
    constexpr bool kMixed = heads == HopperHeads::kMixed;
    const HopperTurn turn(tiles, number);
    const int row_step = (number == turns - 1 ? 11 : 3) * 8;
    const int lane = threadIdx.x % 4;
    const int first_head = turn.col_tile * kHeads;
    HeadKind kind = first_kind;
    HeadPart<D> weights[kParts];
    bool has_norm = false;
    if constexpr (heads != HopperHeads::kValues) has_norm = load_norm(kind, weights);
    const HeadRows<T, D> rows(p.heads, HeadId(p.heads, first_head), lane);
#pragma unroll 1
    for (int first = first_row(); first < kHopperRows; first += row_step) {
      const int row = first + threadIdx.x % 32 / 4;
      const int64_t index = turn.row + row;
      const bool is_known = index_is_inside(token.position, p.heads.max_positions);
      HeadAngles<D> angles[kParts];
      if constexpr (heads != HopperHeads::kValues) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          // When the first head is a value, all are.
          angles[part] = {p.heads, first_kind, is_known ? token.position : -1, 4 * part + lane};
        }
      }
      const CacheRow cache_row(p.heads.cache, is_known ? token.slot : -1, page_shift);
      token = look_up(turn, first + row_step);
      const auto is_stored = [&](HeadKind kind) {
        return index < p.num_tokens && (kind == HeadKind::kQuery || cache_row.is_inside());
      };
      const auto start_of = [&](const HeadRows<T, D>& rows, HeadKind kind) {
        return rows.at(cache_row.page, kind == HeadKind::kQuery ? index : cache_row.offset);
      };
      char* const start = start_of(rows, first_kind);
      const bool all_stored = is_stored(first_kind);

      mbarrier_wait(ready + first / 64 * 8, number & 1);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        RawPart<T, D> raw[kParts];
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            raw[part].half[i] =
                load_shared_16(products_at(row, h * (D / 8) + i * (D / 16) + 4 * part + lane));
          }
        }
        if constexpr (kMixed) {
          const HeadId head(p.heads, first_head + h);
          const int num_heads = p.heads.num_q_heads + 2 * p.heads.num_kv_heads;
          if (head.kind != kind && head.kind != HeadKind::kValue) {
            kind = head.kind;
            has_norm = load_norm(kind, weights);
          }
          HeadPart<D> x[kParts];
          rotate_head(x, raw, weights, has_norm, angles, head.kind != HeadKind::kValue);
          if (first_head + h >= num_heads || !is_stored(head.kind)) continue;
          HeadStore<T, D> store;
          const bool keeps_bits = keeps_dtype || head.kind == HeadKind::kQuery;
          if (!keeps_bits) store = {p.heads, head, index, cache_row, lane};
          T* const to = reinterpret_cast<T*>(start_of(HeadRows<T, D>(p.heads, head, lane), head.kind));
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            if (keeps_bits) {
              x[part].store(to + 32 * part);
            } else {
              store.store(x[part]);
              store.skip_channels(32);
            }
          }
        } else {
          T* const to = reinterpret_cast<T*>(start + h * rows.head_stride);
          if constexpr (heads == HopperHeads::kValues) {
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
              if (all_stored) raw[part].store(to + 32 * part);
            }
          } else {
            HeadPart<D> x[kParts];
            rotate_head(x, raw, weights, has_norm, angles, true);
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
              if (all_stored) x[part].store(to + 32 * part);
            }
          }
        }
      }
    }
  }

  // rotates: else it is a value, and only unpacked.
  __device__ __forceinline__ void rotate_head(HeadPart<D> (&x)[kParts], const RawPart<T, D> (&raw)[kParts],
                                              HeadPart<D> (&weights)[kParts], bool has_norm,
                                              const HeadAngles<D> (&angles)[kParts], bool rotates) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) x[part] = raw[part].unpack();
    if (!rotates) return;
    float squares = 0.f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) squares += sum_of_squares(x[part]);
    const float mean = sum_over_lanes<4>(squares) / D;
    const float scale = has_norm ? rsqrtf(mean + p.heads.eps) : 1.f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < 16; ++i) x[part][i] *= scale * weights[part][i];
      rotate(x[part], angles[part], p.heads.interleaved);
    }
  }
};

template <class T, int D, int kCols>
__global__ void __launch_bounds__(kHopperThreads, 1)
    rope_key_projection_hopper_kernel(const __grid_constant__ RopeKeyProjectionParams p,
                                      const __grid_constant__ CUtensorMap x_map,
                                      const __grid_constant__ CUtensorMap weight_map, HopperTiles tiles,
                                      int page_shift) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Tile = HopperTile<kCols>;
  using Projection = HopperProjection<T, D, kCols>;
  extern __shared__ unsigned char smem[];
  __shared__ uint64_t full[Tile::kStages], empty[Tile::kStages], x_full[Tile::kXStages],
      x_empty[Tile::kXStages], ready[2], free;
  const Projection projection{p,
                              tiles,
                              page_shift,
                              (smem_address(smem) + 1023) / 1024 * 1024,
                              smem_address(full),
                              smem_address(empty),
                              smem_address(x_full),
                              smem_address(x_empty),
                              smem_address(ready),
                              smem_address(&free)};
  if (threadIdx.x == 0) {
    prefetch_tensor_map(x_map);
    prefetch_tensor_map(weight_map);
    for (int i = 0; i < Tile::kStages; ++i) {
      mbarrier_init(projection.full + 8 * i, 1);
      mbarrier_init(projection.empty + 8 * i, 8 * kHopperCtas);  // warps
    }
    for (int i = 0; i < Tile::kXStages; ++i) {
      mbarrier_init(projection.x_full + 8 * i, 1);
      mbarrier_init(projection.x_empty + 8 * i, 8);
    }
    // Threads, each for its own stores and loads, and not warps after __syncwarp: compute-sanitizer follows
    // it.
    for (int i = 0; i < 2; ++i) mbarrier_init(projection.ready + 8 * i, 128);
    mbarrier_init(projection.free, 96);
    fence_mbarrier_init();
  }
  cluster_arrive();  // no CTA touches the other's barriers before they exist
  cluster_wait();
  wait_for_previous_kernels();
  let_next_kernel_start();

  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // tells the compiler that warps agree on it
  if (warp == 0) {
    if (threadIdx.x == 0) projection.copy(x_map, weight_map);
  } else {
    // The warps that multiply look up their tokens of the last tile before its products are there.
    int number = warp >= 4 ? projection.turns - 1 : 0;
    HopperToken token = projection.look_up_first(number);
    if (warp >= 4) projection.multiply(warp / 4 - 1);
    while (true) {
      projection.finish(number, token);
      if (++number == projection.turns) break;
      token = projection.look_up_first(number);
    }
  }
#else
  __trap();  // launch_hopper chooses this kernel only where the other branch was compiled
#endif
}

template <class T, int D, int kCols>
cudaError_t launch_hopper_tile(const RopeKeyProjectionParams& p, cudaStream_t stream) {
  using Tile = HopperTile<kCols>;
  const cuuint64_t tokens = p.num_tokens, hidden = p.hidden;
  const cuuint64_t cols = cuuint64_t(p.heads.num_q_heads + 2 * p.heads.num_kv_heads) * D;
  if (tokens == 0 || cols == 0) return cudaSuccess;
  CUtensorMap x_map, weight_map;
  cudaError_t error = encode_tensor_map<T, 2>(x_map, p.x, {hidden, tokens}, {cuuint64_t(p.x_stride)},
                                              {kHopperDepth, kHopperRows});
  if (error != cudaSuccess) return error;
  // The weight's rows as [cols / 32, 4 lanes, 4 pairs, 2]; a box has one of the pairs.
  error = encode_tensor_map<T, 5>(weight_map, p.weight, {hidden, 2, 4, 4, cols / 32},
                                  {hidden, 2 * hidden, 8 * hidden, 32 * hidden},
                                  {kHopperDepth, 2, 1, 4, kCols / 32});
  if (error != cudaSuccess) return error;
  const auto kernel = rope_key_projection_hopper_kernel<T, D, kCols>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSmemBytes);
  if (error != cudaSuccess) return error;
  int sms = 0;
  error = count_sms(sms);
  if (error != cudaSuccess) return error;

  const HopperTiles tiles{static_cast<int>((tokens + Tile::kClusterRows - 1) / Tile::kClusterRows),
                          static_cast<int>((cols + kCols - 1) / kCols)};
  const unsigned page_size = p.heads.cache.page_size;
  const dim3 grid(std::min(sms / kHopperCtas, tiles.row_tiles * tiles.col_tiles) * kHopperCtas);
  return launch_overlapping_clusters(kernel, kHopperCtas, grid, kHopperThreads, Tile::kSmemBytes, stream, p,
                                     x_map, weight_map, tiles,
                                     std::has_single_bit(page_size) ? std::countr_zero(page_size) : -1);
}

// Whether the GPU would run the kernel and not its stand-in: only the machine code for sm_90a has barriers in
// shared memory, and the driver chooses that code on GPUs of compute capability 9.0 alone. Asked of the
// runtime and not of the build, which may hold code for sm_90 beside it.
template <class T, int D>
bool has_hopper_kernel() {
  cudaFuncAttributes compiled;
  return cudaFuncGetAttributes(&compiled, rope_key_projection_hopper_kernel<T, D, 256>) == cudaSuccess &&
         compiled.sharedSizeBytes > 0 && tensor_map_encoder() != nullptr;
}

// How long the last SM works, in halves of a tile of 256 columns. Narrow tiles read more for every product
// and take more than half of the time, so that they pay only where wide ones leave SMs idle.
inline double hopper_time(int64_t tokens, int64_t cols, int tile_cols, int sms) {
  const int64_t tile_rows = kHopperCtas * kHopperRows, clusters = sms / kHopperCtas;
  const int64_t tiles = (tokens + tile_rows - 1) / tile_rows * ((cols + tile_cols - 1) / tile_cols);
  return static_cast<double>((tiles + clusters - 1) / clusters) * (tile_cols == 256 ? 2.0 : 1.25);
}

template <class T, int D>
cudaError_t launch_hopper(const RopeKeyProjectionParams& p, cudaStream_t stream) {
  int sms = 0;
  const cudaError_t error = count_sms(sms);
  if (error != cudaSuccess) return error;
  const int64_t cols = int64_t{p.heads.num_q_heads + 2 * p.heads.num_kv_heads} * D;
  const double wide = hopper_time(p.num_tokens, cols, 256, sms);
  const double narrow = hopper_time(p.num_tokens, cols, 128, sms);
  return wide <= narrow ? launch_hopper_tile<T, D, 256>(p, stream) : launch_hopper_tile<T, D, 128>(p, stream);
}

}  // namespace fusedkv

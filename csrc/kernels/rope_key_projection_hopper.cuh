// rope_key_projection for many tokens on Hopper: one CTA an SM walks over output tiles of 128 tokens. One
// thread copies tiles of x and of the weight into a ring of stages; two warpgroups of 64 tokens each multiply
// them and finish the heads in their registers.
//
// Two tricks keep the epilogue small. The weight's rows arrive permuted, so that the accumulators of a lane
// are parts of heads as HeadPart has them: nothing is exchanged but sums of squares. And the two warpgroups
// share the stages but nothing else, the first some stages ahead: while one finishes its heads, the other has
// the tensor cores to itself.
#pragma once

#include <cudaTypedefs.h>

#include <algorithm>

#include "common/cluster.cuh"
#include "common/hopper.cuh"
#include "common/overlap.cuh"
#include "common/rope.cuh"
#include "launch.h"

namespace fusedkv {

constexpr int kHopperRows = 128;     // tokens of a tile, half of them a warpgroup's
constexpr int kHopperDepth = 64;     // channels of x a stage: 128 bytes a row, what the swizzle spans
constexpr int kHopperThreads = 384;  // a warpgroup for the copies, two for the products
constexpr int kHopperLead = 2;       // stages that the first warpgroup is ahead
constexpr int kCopyRegisters = 24, kProductRegisters = 240;  // a thread; 64512 in all
constexpr int kLeadBarrier = 1;

// kCols: channels of heads of a tile. kCtas: CTAs of a cluster, on successive rows of tiles; each copies a
// part of the weight's tile to both, which halves what the L2 must deliver.
template <int kCols, int kCtas>
struct HopperTile {
  static constexpr int kXBytes = kHopperRows * kHopperDepth * 2;
  static constexpr int kWeightBytes = kCols * kHopperDepth * 2;
  static constexpr int kStageBytes = kXBytes + kWeightBytes;
  static constexpr int kStages = 192 * 1024 / kStageBytes;
  static constexpr int kSmemBytes = kStages * kStageBytes + 1024;  // the swizzle wants multiples of 1024
  static constexpr int kClusterRows = kCtas * kHopperRows;
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

// A cluster's tiles: eight rows of tiles go through all columns together, so that their part of x and the
// weight's tiles stay in the L2.
struct HopperTiles {
  int row_tiles, col_tiles;  // of clusters

  __device__ __forceinline__ int count() const { return row_tiles * col_tiles; }
  __device__ __forceinline__ void place(int tile, int& row_tile, int& col_tile) const {
    constexpr int kGroup = 8;
    const int group = tile / (kGroup * col_tiles), in_group = tile % (kGroup * col_tiles);
    const int group_rows = min(kGroup, row_tiles - group * kGroup);
    row_tile = group * kGroup + in_group % group_rows;
    col_tile = in_group / group_rows;
  }
};

// A place in the ring, and the parity of the phase that its barriers are in.
template <int kStages>
struct RingPlace {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

template <class T, int D, int kCols, int kCtas>
struct HopperProjection {
  using Tile = HopperTile<kCols, kCtas>;
  using Ring = RingPlace<Tile::kStages>;
  static constexpr int kHeads = kCols / D, kParts = D / 64;  // kParts: HeadParts of a head in one lane

  const RopeKeyProjectionParams& p;
  const HopperTiles tiles;
  const uint32_t ring, full, empty;  // full, empty: barriers of the first stage
  const int k_tiles = (p.hidden + kHopperDepth - 1) / kHopperDepth;

  // One thread. A stage is empty when all warps that read it, in both CTAs of the cluster where there are
  // two, have said so: each CTA writes into the other's stage.
  __device__ __forceinline__ void copy(const CUtensorMap& x_map, const CUtensorMap& weight_map) const {
    const int rank = blockIdx.x % kCtas;
    Ring at;
    for (int tile = blockIdx.x / kCtas; tile < tiles.count(); tile += gridDim.x / kCtas) {
      int row_tile, col_tile;
      tiles.place(tile, row_tile, col_tile);
      for (int k = 0; k < k_tiles; ++k, at.next()) {
        const uint32_t x_stage = ring + at.stage * Tile::kStageBytes, weight_stage = x_stage + Tile::kXBytes;
        const uint32_t barrier = full + at.stage * 8;
        mbarrier_wait(empty + at.stage * 8, at.parity ^ 1);
        mbarrier_arrive_expect(barrier, Tile::kStageBytes);
        copy_box_2d(x_stage, x_map, barrier, k * kHopperDepth, (row_tile * kCtas + rank) * kHopperRows);
#pragma unroll
        for (int i = 0; i < kWeightBoxes / kCtas; ++i) {
          const int pair = rank * (kWeightBoxes / kCtas) + i;
          copy_box_5d<kCtas>(weight_stage + pair * (Tile::kWeightBytes / kWeightBoxes), weight_map, barrier,
                             k * kHopperDepth, 0, pair, 0, col_tile * (kCols / 32));
        }
      }
    }
  }

  // Lane i of a warp tells CTA i of the cluster that the warp has read a stage.
  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % 32 < kCtas) mbarrier_arrive_at(empty + stage * 8, threadIdx.x % 32);
  }

  __device__ __forceinline__ void multiply(int warpgroup) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int rank = blockIdx.x % kCtas;
    const int lead = min(kHopperLead, k_tiles);
    bool is_first = true;
    Ring at;
    for (int tile = blockIdx.x / kCtas; tile < tiles.count(); tile += gridDim.x / kCtas) {
      int row_tile, col_tile;
      tiles.place(tile, row_tile, col_tile);
      // This lane's two rows. Their positions and slots arrive during the product: nothing looks at them
      // before.
      const int64_t token0 =
          int64_t{row_tile * kCtas + rank} * kHopperRows + warpgroup * 64 + warp * 16 + lane / 4;
      int64_t position[2], slot[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t token = token0 + 8 * r;
        const bool present = token < p.num_tokens;
        position[r] = present ? raw_position(p.heads, token) : -1;
        slot[r] = present && p.heads.num_kv_heads > 0 ? p.heads.slot_mapping[token] : -1;
      }

      if (is_first && warpgroup == 1) named_barrier_wait(kLeadBarrier, 256);
      float acc[Tile::kAccumulators];
      int last = 0;
      for (int k = 0; k < k_tiles; ++k, at.next()) {
        const uint32_t stage = ring + at.stage * Tile::kStageBytes;
        const uint64_t x = wgmma_matrix(stage + warpgroup * (Tile::kXBytes / 2));
        const uint64_t weight = wgmma_matrix(stage + Tile::kXBytes);
        mbarrier_wait(full + at.stage * 8, at.parity);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kHopperDepth / 16; ++i) {
          wgmma_64x16<T>(acc, x + 2 * i, weight + 2 * i, k > 0 || i > 0);
        }
        wgmma_commit();
        if (is_first && warpgroup == 0 && k == lead - 1) named_barrier_arrive(kLeadBarrier, 256);
        wgmma_wait<1>();  // of the stage before: the tensor cores always have the next one's work
        if (k > 0) release(last);
        last = at.stage;
      }
      is_first = false;
      finish(acc, token0, col_tile, position, slot, last);
    }
  }

  // Waits for the product's last stage, and finishes and stores the heads of this lane's two rows.
  __device__ __forceinline__ void finish(float (&acc)[Tile::kAccumulators], int64_t token0, int col_tile,
                                         const int64_t (&position)[2], const int64_t (&slot)[2],
                                         int last_stage) const {
    const int lane = threadIdx.x % 4;
    const int num_heads = p.heads.num_q_heads + 2 * p.heads.num_kv_heads;
    const HeadId first(p.heads, col_tile * kHeads);
    HeadAngles<D> angles[kParts];
    const auto load_angles = [&](int r, int part) {
      const bool known = index_is_inside(position[r], p.heads.max_positions);
      // When the first head is a value, all are.
      angles[part] = {p.heads, first.kind, known ? position[r] : -1, 4 * part + lane};
    };
    HeadNorm<T, D> norms[kParts];
    const auto load_norms = [&](HeadKind kind) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) norms[part] = {p.heads, kind, 4 * part + lane};
    };
    // In the shadow of the last products.
    HeadKind norms_kind = first.kind;
#pragma unroll
    for (int part = 0; part < kParts; ++part) load_angles(0, part);
    load_norms(norms_kind);

    wgmma_wait<0>();
    fence_registers(acc);
    release(last_stage);

    if (p.bias != nullptr) add_bias(acc, col_tile);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t token = token0 + 8 * r;
      const bool known = index_is_inside(position[r], p.heads.max_positions);
      const CacheRow row(p.heads.cache, known ? slot[r] : -1);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const HeadId head(p.heads, col_tile * kHeads + h);
        if (head.kind != norms_kind) load_norms(norms_kind = head.kind);
        HeadPart<D> x[kParts];
        float squares = 0.f;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            x[part][i] = acc[accumulator_of<kCols>(h * (D / 32) + i / 8 * (D / 64) + part, r, i % 8)];
          }
          squares += sum_of_squares(x[part]);
        }
        const float scale = norm_scale(p.heads, sum_over_lanes<4>(squares) / D, norms[0]);
        HeadStore<T, D> store(p.heads, head, token, row, lane);
        const bool stored = token < p.num_tokens && col_tile * kHeads + h < num_heads && store.to != nullptr;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          if (stored) {
            if (part > 0) store.skip_channels(32);
            finish_head(p.heads, x[part], head.kind, scale, norms[part], angles[part], store);
          }
          // The other row's, as soon as there are registers: they arrive while its norm is computed.
          if (r == 0 && h == kHeads - 1) load_angles(1, part);
        }
      }
    }
  }

  __device__ __forceinline__ void add_bias(float (&acc)[Tile::kAccumulators], int col_tile) const {
    const int lane = threadIdx.x % 4, num_cols = (p.heads.num_q_heads + 2 * p.heads.num_kv_heads) * D;
#pragma unroll
    for (int group = 0; group < kCols / 32; ++group) {
      const int col = col_tile * kCols + 32 * group;
      if (col >= num_cols) break;
      // A copy first: unpacked from where it lies, it would be loaded byte by byte.
      const Bits8<T> bits = static_cast<const Bits8<T>*>(p.bias)[col / 8 + lane];
      const Vec8 bias = Vec8::unpack<T>(bits);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) acc[accumulator_of<kCols>(group, r, i)] += bias.x[i];
      }
    }
  }
};

template <class T, int D, int kCols, int kCtas>
__global__ void __launch_bounds__(kHopperThreads, 1)
    rope_key_projection_hopper_kernel(const __grid_constant__ RopeKeyProjectionParams p,
                                      const __grid_constant__ CUtensorMap x_map,
                                      const __grid_constant__ CUtensorMap weight_map, HopperTiles tiles) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Tile = HopperTile<kCols, kCtas>;
  extern __shared__ unsigned char smem[];
  __shared__ uint64_t full[Tile::kStages], empty[Tile::kStages];
  const uint32_t ring = (smem_address(smem) + 1023) / 1024 * 1024;
  const HopperProjection<T, D, kCols, kCtas> projection{p, tiles, ring, smem_address(full),
                                                        smem_address(empty)};
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    prefetch_tensor_map(x_map);
    prefetch_tensor_map(weight_map);
    for (int i = 0; i < Tile::kStages; ++i) {
      mbarrier_init(projection.full + 8 * i, 1);
      mbarrier_init(projection.empty + 8 * i, 8 * kCtas);  // warps
    }
    fence_mbarrier_init();
  }
  cluster_arrive();  // no CTA touches the other's barriers before they exist
  cluster_wait();
  wait_for_previous_kernels();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // tells the compiler that warps agree on it
  if (warpgroup == 0) {
    give_registers<kCopyRegisters>();
    if (threadIdx.x == 0) projection.copy(x_map, weight_map);
  } else {
    take_registers<kProductRegisters>();
    projection.multiply(warpgroup - 1);
  }
  __syncwarp();  // the warp of the copying thread arrives as one
  // A CTA must stay while the other still writes to its barriers.
  cluster_arrive();
  cluster_wait();
#else
  __trap();  // launch_hopper chooses this kernel only where the other branch was compiled
#endif
}

// cuTensorMapEncodeTiled of the driver, found at run time so that nothing links to libcuda; null where the
// driver lacks it.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &result);
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function) : nullptr;
  }();
  return encoder;
}

// A row-major matrix seen with `rank` dimensions, innermost first. strides: of all but the first, in
// elements.
template <class T, int rank>
cudaError_t encode_tensor_map(CUtensorMap& map, const void* data, const cuuint64_t (&sizes)[rank],
                              const cuuint64_t (&strides)[rank - 1], const cuuint32_t (&box)[rank]) {
  cuuint64_t byte_strides[rank - 1];
  cuuint32_t steps[rank];
  for (int i = 0; i < rank; ++i) steps[i] = 1;
  for (int i = 0; i < rank - 1; ++i) byte_strides[i] = strides[i] * sizeof(T);
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const CUresult result = encode(
      &map, std::is_same_v<T, f16> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank,
      const_cast<void*>(data), sizes, byte_strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t count_sms(int& sms) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
}

template <class T, int D, int kCols, int kCtas>
cudaError_t launch_hopper_tile(const RopeKeyProjectionParams& p, cudaStream_t stream) {
  using Tile = HopperTile<kCols, kCtas>;
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
  const auto kernel = rope_key_projection_hopper_kernel<T, D, kCols, kCtas>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSmemBytes);
  if (error != cudaSuccess) return error;
  int sms = 0;
  error = count_sms(sms);
  if (error != cudaSuccess) return error;

  const HopperTiles tiles{static_cast<int>((tokens + Tile::kClusterRows - 1) / Tile::kClusterRows),
                          static_cast<int>((cols + kCols - 1) / kCols)};
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {kCtas, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min(sms / kCtas, tiles.row_tiles * tiles.col_tiles) * kCtas);
  config.blockDim = dim3(kHopperThreads);
  config.dynamicSmemBytes = Tile::kSmemBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, p, x_map, weight_map, tiles);
}

// Whether the GPU would run the kernel and not its stand-in: only the machine code for sm_90a has barriers in
// shared memory, and the driver chooses that code on GPUs of compute capability 9.0 alone. Asked of the
// runtime and not of the build, which may hold code for sm_90 beside it.
template <class T, int D>
bool has_hopper_kernel() {
  cudaFuncAttributes compiled;
  return cudaFuncGetAttributes(&compiled, rope_key_projection_hopper_kernel<T, D, 256, 2>) == cudaSuccess &&
         compiled.sharedSizeBytes > 0 && tensor_map_encoder() != nullptr;
}

// How long the last SM works, in halves of a tile of 256 columns. Narrow tiles read more for every product
// and take more than half of the time, so that they pay only where wide ones leave SMs idle.
inline double hopper_time(int64_t tokens, int64_t cols, int tile_cols, int ctas, int sms) {
  const int64_t tile_rows = int64_t{ctas} * kHopperRows, clusters = sms / ctas;
  const int64_t tiles = (tokens + tile_rows - 1) / tile_rows * ((cols + tile_cols - 1) / tile_cols);
  return static_cast<double>((tiles + clusters - 1) / clusters) * (tile_cols == 256 ? 2.0 : 1.25);
}

template <class T, int D>
cudaError_t launch_hopper(const RopeKeyProjectionParams& p, cudaStream_t stream) {
  int sms = 0;
  const cudaError_t error = count_sms(sms);
  if (error != cudaSuccess) return error;
  const int64_t cols = int64_t{p.heads.num_q_heads + 2 * p.heads.num_kv_heads} * D;
  const auto time = [&](int tile_cols, int ctas) {
    return hopper_time(p.num_tokens, cols, tile_cols, ctas, sms);
  };
  if (time(256, 2) <= time(128, 2)) return launch_hopper_tile<T, D, 256, 2>(p, stream);
  return launch_hopper_tile<T, D, 128, 2>(p, stream);
}

}  // namespace fusedkv

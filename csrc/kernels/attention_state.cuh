// The running softmax and weighted sum of one item, and how warps and workers merge theirs.
//
// Products are transposed: a warp forms K q^T and V^T P^T, so that tokens and channels fill the 16 rows of
// the tensor-core tile and the few query rows its 8 columns. A lane then holds, of each tile, two tokens (or
// channels) for two query rows: 2 * (lane % 4) and the next one.
#pragma once

#include "attention_units.cuh"
#include "common/publish.cuh"

namespace fusedkv {

// Where the output rows of an item go.
struct ItemOutput {
  uint16_t* rows;        // of its first query row: f16 or bf16
  int64_t token_stride;  // elements; 0 where there is one token
  int group, first_row;  // heads a token; number of the row block's first row
  bool is_bf16;
};

// Partial results of one item in device memory, where workers publish them.
struct Parts {
  char* data;
  int count;
  unsigned pitch, first_offset;  // bytes: from one to the next, and by which the first one stands further on

  __device__ __forceinline__ char* at(int part, bool is_first) const {
    return data + uint64_t{pitch} * unsigned(part) + (is_first ? first_offset : 0);
  }
};

// What a worker merges when it is through. Worked out while the kernel waits for its first loads.
struct Merge {
  // Sums of groups of parts, if there are so many; and parts, or none if there is nothing to merge.
  Parts parts[2];
  int rows;
  float* partial;  // where the result goes, as a partial one, or null
  ItemOutput output;
  // Here because compute-sanitizer's racecheck slows shared memory alone: so it slows those who wait as much
  // as those whom they wait for.
  int patience;
};

template <class S>
struct AttentionControl {
  RingControl<S> ring;
  float value_weights[S::kSources][S::D];  // of the item
  Merge merge;
  alignas(16) float4 sums[S::kRows == 8 ? S::kThreads : 1];  // see RowAdders
  float2 stats[S::kRows == 8 ? S::kThreads : 1];
};

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// f16 has less range than the bf16 that q may be. NaN stays NaN.
__device__ __forceinline__ float clamp_to_f16(float x) {
  float y;
  asm("{.reg .f32 low; max.NaN.f32 low, %1, %2; min.NaN.f32 %0, low, %3;}"
      : "=f"(y)
      : "f"(x), "f"(-65504.f), "f"(65504.f));
  return y;
}

// The maximum of a row that has seen nothing. Not -inf, because differences of maxima must be numbers.
constexpr float kNothing = -1.5e38f;

__device__ __forceinline__ float inverse_or_zero(float sum) {
  return sum == 0.f ? 0.f : __fdividef(1.f, sum);
}

// Operands of as many k-steps as one ldmatrix brings: 16 channels of f16 or bf16, or 32 of e4m3.
template <class S>
constexpr int kStepsAtOnce = 2 / sizeof(typename S::C);

// Keys as the 16 x 16 left operand, for 16 tokens. The two e4m3 pairs of a register are neighbours in memory
// but k-columns 2j and 2j + 8 of the operand; start() orders the channels of q alike.
template <class S>
__device__ __forceinline__ void load_keys(uint32_t (&a)[kStepsAtOnce<S>][4], uint32_t address) {
  uint32_t r[4];
  ldmatrix_x4(r, address);
  if constexpr (sizeof(typename S::C) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[0][i] = r[i];
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      e4m3_to_f16(r[2 * i], a[i][0], a[i][2]);
      e4m3_to_f16(r[2 * i + 1], a[i][1], a[i][3]);
    }
  }
}

// Values as the 16 x 16 left operand: 16 channels by 16 tokens. The transposing load moves two bytes at a
// time, so for e4m3 the pair in its low and high bytes becomes rows j and j + 8: see value_channel().
template <class S>
__device__ __forceinline__ void load_values(uint32_t (&a)[kStepsAtOnce<S>][4], uint32_t address) {
  uint32_t r[4];
  ldmatrix_x4_trans(r, address);
  if constexpr (sizeof(typename S::C) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[0][i] = r[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t by_channel = __byte_perm(r[i], 0, 0x3120);
      e4m3_to_f16(by_channel, a[i / 2][i % 2 * 2], a[i / 2][i % 2 * 2 + 1]);
    }
  }
}

// The channel of row lane / 4 (+ 8 for half 1) of value tile d.
template <class S>
__device__ __forceinline__ int value_channel(int d, int half) {
  const int row = threadIdx.x % 32 / 4;
  return d * 16 + (sizeof(typename S::C) == 2 ? row + 8 * half : 2 * row + half);
}

// `weights`: of an item, as copy_item() leaves them.
template <class S>
__device__ __forceinline__ void keep_value_weights(const AttentionParams& p, AttentionControl<S>& control,
                                                   const float* weights) {
#pragma unroll 1
  for (int i = threadIdx.x; i < S::kSources * S::D; i += S::kThreads) {
    const bool given = p.value_weights && i / S::D < p.num_v_sources;
    control.value_weights[i / S::D][i % S::D] = given ? weights[S::kSources * S::D + i] : 1.f;
  }
}

// By how much the maximum that exponents are taken from may lag behind the true one: 2^8 fits f16 with room
// for the sum, and rescaling becomes rare.
constexpr float kMaxLag = 8.f;

// One warp's running result: 8 * kRowTiles query rows over all channels.
template <class S>
struct AttentionState {
  using T = typename S::T;
  uint32_t query[S::kSources][S::kRowTiles][S::D / 16][2];
  float out[S::kSources][S::kRowTiles][S::D / 16][4];
  // Exponents are taken from row_max, which lags behind the true maximum by at most kMaxLag. The sum is the
  // lane's own part until finish().
  float row_max[S::kRowTiles][2], row_sum[S::kRowTiles][2];

  // Starts an item: its queries, weighted with a_s and rounded once, become right operands of the products.
  __device__ void start(const AttentionParams& p, AttentionControl<S>& control, const char* stage) {
    const int lane = threadIdx.x % 32;
    const int first = threadIdx.x / 32 % S::kTeamWarps * S::kWarpRows;
    const float* const weights = reinterpret_cast<const float*>(stage + S::kWeightOffset);
    keep_value_weights(p, control, weights);
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) {
      const int row = first + n * 8 + lane / 4;
#pragma unroll
      for (int k = 0; k < S::D / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // See load_keys() for the order of channels with e4m3.
          constexpr bool kWide = sizeof(typename S::C) == 2;
          const int channel = k * 16 + (kWide ? lane % 4 * 2 + i * 8 : lane % 4 * 4 + i * 2);
          const uint32_t pair = *reinterpret_cast<const uint32_t*>(
              stage + S::kQueryOffset + swizzled<S::D / 8>(row, channel / 8) + channel % 8 * 2);
          const float2 q = !kWide && p.dtype == DType::kBF16 ? unpack2<bf16>(pair) : unpack2<T>(pair);
#pragma unroll
          for (int s = 0; s < S::kSources; ++s) {
            float2 a = make_float2(1.f, 1.f);
            if (p.key_weights) a = *reinterpret_cast<const float2*>(weights + s * S::D + channel);
            float2 weighted = make_float2(q.x * a.x, q.y * a.y);
            if constexpr (!kWide) weighted = {clamp_to_f16(weighted.x), clamp_to_f16(weighted.y)};
            query[s][n][k][i] = pack2<T>(weighted.x, weighted.y);
          }
        }
      }
#pragma unroll
      for (int s = 0; s < S::kSources; ++s)
#pragma unroll
        for (int d = 0; d < S::D / 16; ++d)
#pragma unroll
          for (int j = 0; j < 4; ++j) out[s][n][d][j] = 0.f;
      row_max[n][0] = row_max[n][1] = kNothing;
      row_sum[n][0] = row_sum[n][1] = 0.f;
    }
  }

  __device__ __forceinline__ void add_unit(const AttentionParams& p, const BlockPlace& at, const char* stage,
                                           const uint8_t* visible) {
    const int first = threadIdx.x / 32 / S::kTeamWarps * S::kTeamTokens;
#pragma unroll 1
    for (int token = first; token < first + S::kTeamTokens; token += S::kStepTokens) {
      const uint8_t* const bits = visible + token / 8;
      uint32_t seen;
      if constexpr (S::kStepTokens == 32) {
        seen = *reinterpret_cast<const uint32_t*>(bits);
      } else {
        seen = *reinterpret_cast<const uint16_t*>(bits) * 0x10001u;
      }
      if (seen) add_tokens(p, at, stage, token, seen);
    }
  }

  // Adds kStepTokens tokens, from number `token` of the unit.
  __device__ __forceinline__ void add_tokens(const AttentionParams& p, const BlockPlace& at,
                                             const char* stage, int token, uint32_t seen) {
    constexpr int kTiles = S::kStepTokens / 16, kSteps = kStepsAtOnce<S>;
    // A chain of dependent products is latency: where there is one tile only, odd and even steps have their
    // own.
    constexpr int kChains = kTiles * S::kRowTiles == 1 ? 2 : 1;
    const int lane = threadIdx.x % 32;
    const uint32_t unit = smem_address(stage);
    const uint32_t keys = unit + swizzled<S::kRowChunks>(token + lane % 16, lane / 16);
    float scores[kTiles][S::kRowTiles][4], chains[kChains][kTiles][S::kRowTiles][4] = {};
#pragma unroll
    for (int s = 0; s < S::kSources; ++s) {
      if (s > 0 && p.num_k_sources == 1) break;
#pragma unroll
      for (int at_once = 0; at_once < S::D / 16 / kSteps; ++at_once) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          uint32_t a[kSteps][4];
          load_keys<S>(a, (keys ^ at_once * 32) + s * S::kPlaneBytes + m * 16 * S::kRowBytes);
#pragma unroll
          for (int i = 0; i < kSteps; ++i) {
            const int k = at_once * kSteps + i;
#pragma unroll
            for (int n = 0; n < S::kRowTiles; ++n) {
              mma_16x8x16<T>(chains[k % kChains][m][n], a[i], query[s][n][k][0], query[s][n][k][1]);
            }
          }
        }
      }
    }
    const float scale = p.scale * 1.4426950408889634f;  // exponents to base 2
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int n = 0; n < S::kRowTiles; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float sum = chains[0][m][n][j];
          if constexpr (kChains == 2) sum += chains[1][m][n][j];
          scores[m][n][j] = sum * scale;
        }
    mask_scores(p, at, token, seen, scores);

    bool ahead = false;
    float best[S::kRowTiles][2];  // of the lane's own tokens
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        best[n][j] = fmaxf(scores[0][n][j], scores[0][n][j + 2]);
        if constexpr (kTiles == 2)
          best[n][j] = fmaxf(best[n][j], fmaxf(scores[1][n][j], scores[1][n][j + 2]));
        ahead |= best[n][j] > row_max[n][j] + kMaxLag;
      }
    if (__any_sync(~0u, ahead)) raise_max(best);

    uint32_t probabilities[kTiles][S::kRowTiles][2];
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float first = exp2_fast(scores[m][n][2 * half] - row_max[n][0]);
          const float second = exp2_fast(scores[m][n][2 * half + 1] - row_max[n][1]);
          row_sum[n][0] += first, row_sum[n][1] += second;
          probabilities[m][n][half] = transpose_8x8(pack2<T>(first, second));
        }
      }
    }

    const int value_row = sizeof(typename S::C) == 2 ? lane % 8 + lane / 16 * 8 : lane % 16;
    const int value_chunk = sizeof(typename S::C) == 2 ? lane / 8 % 2 : lane / 16;
    const uint32_t values =
        unit + S::kSources * S::kPlaneBytes + swizzled<S::kRowChunks>(token + value_row, value_chunk);
#pragma unroll
    for (int s = 0; s < S::kSources; ++s) {
      if (s > 0 && p.num_v_sources == 1) break;
#pragma unroll
      for (int at_once = 0; at_once < S::D / 16 / kSteps; ++at_once) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          uint32_t a[kSteps][4];
          load_values<S>(a, (values ^ at_once * 32) + s * S::kPlaneBytes + m * 16 * S::kRowBytes);
#pragma unroll
          for (int i = 0; i < kSteps; ++i) {
#pragma unroll
            for (int n = 0; n < S::kRowTiles; ++n) {
              mma_16x8x16<T>(out[s][n][at_once * kSteps + i], a[i], probabilities[m][n][0],
                             probabilities[m][n][1]);
            }
          }
        }
      }
    }
  }

  // Makes row_max the true maximum, best being that of the lane's new tokens.
  __device__ __forceinline__ void raise_max(const float (&best)[S::kRowTiles][2]) {
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) {
      float rescale[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float all = fmaxf(row_max[n][j], best[n][j]);
        all = fmaxf(all, __shfl_xor_sync(~0u, all, 4));
        all = fmaxf(all, __shfl_xor_sync(~0u, all, 8));
        all = fmaxf(all, __shfl_xor_sync(~0u, all, 16));
        rescale[j] = exp2_fast(row_max[n][j] - all);
        row_max[n][j] = all;
        row_sum[n][j] *= rescale[j];
      }
#pragma unroll
      for (int s = 0; s < S::kSources; ++s)
#pragma unroll
        for (int d = 0; d < S::D / 16; ++d)
#pragma unroll
          for (int j = 0; j < 4; ++j) out[s][n][d][j] *= rescale[j % 2];
    }
  }

  __device__ __forceinline__ void mask_scores(const AttentionParams& p, const BlockPlace& at, int token,
                                              uint32_t seen,
                                              float (&scores)[S::kStepTokens / 16][S::kRowTiles][4]) {
    constexpr int kTiles = S::kStepTokens / 16;
    const int lane = threadIdx.x % 32;
    if (seen != ~0u) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (seen >> (m * 16 + half * 8 + lane / 4) & 1) continue;
#pragma unroll
          for (int n = 0; n < S::kRowTiles; ++n)
            scores[m][n][2 * half] = scores[m][n][2 * half + 1] = -INFINITY;
        }
    }
    // With one query token, or far from the edges, all rows see the same tokens: the bits above say it all.
    const int start = at.start() + token;
    const bool at_end = start + S::kStepTokens > at.length - p.num_query_tokens + 1;
    const bool at_window = p.window > 0 && start < at.length - p.window;
    if (p.num_query_tokens == 1 || !(at_end || at_window)) return;
    const int first_row =
        at.row_block * S::kRows + threadIdx.x / 32 % S::kTeamWarps * S::kWarpRows + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int query = at.length - p.num_query_tokens + (first_row + n * 8 + j) / p.group;
        const int oldest = p.window > 0 ? query - p.window + 1 : 0;
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int key = start + m * 16 + half * 8 + lane / 4;
            if (key > query || key < oldest) scores[m][n][2 * half + j] = -INFINITY;
          }
      }
  }

  // Weights and adds the value sources and leaves the team's partial result in `stage`, the one that was read
  // last.
  __device__ void finish(const AttentionControl<S>& control, char* stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* const partial = reinterpret_cast<float*>(stage) + warp / S::kTeamWarps * S::kPartialFloats;
    // All loaded before anything is stored, which for all that the compiler knows might change them.
    float weights[S::kSources][S::D / 16][2];
#pragma unroll
    for (int s = 0; s < S::kSources; ++s)
#pragma unroll
      for (int d = 0; d < S::D / 16; ++d)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          weights[s][d][half] = control.value_weights[s][value_channel<S>(d, half)];
#pragma unroll
    for (int n = 0; n < S::kRowTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = warp % S::kTeamWarps * S::kWarpRows + n * 8 + lane % 4 * 2 + j;
        float sum = row_sum[n][j];
        sum += __shfl_xor_sync(~0u, sum, 4);
        sum += __shfl_xor_sync(~0u, sum, 8);
        sum += __shfl_xor_sync(~0u, sum, 16);
        float* const to = partial + row * S::kPartialRow;
        if (lane / 4 == 0) *reinterpret_cast<float2*>(to + S::D) = make_float2(row_max[n][j], sum);
#pragma unroll
        for (int d = 0; d < S::D / 16; ++d) {
          float total[2];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            total[half] = 0.f;
#pragma unroll
            for (int s = 0; s < S::kSources; ++s) {
              total[half] += weights[s][d][half] * out[s][n][d][2 * half + j];
            }
          }
          if constexpr (sizeof(typename S::C) == 1) {
            *reinterpret_cast<float2*>(to + value_channel<S>(d, 0)) = make_float2(total[0], total[1]);
          } else {
            to[value_channel<S>(d, 0)] = total[0];
            to[value_channel<S>(d, 1)] = total[1];
          }
        }
      }
    }
  }
};

// Waits for so many trips to the L2 and back, some seconds, before it takes words as they are, NaN: with a
// wrong schedule a worker may wait for one that nobody writes.
constexpr int kPatience = 1 << 22;

// The weighted sum of some rows of partial results: 4 channels, and the row's maximum and sum of
// exponentials.
struct MergedRow {
  float max = kNothing, sum = 0.f, x[4] = {};

  __device__ __forceinline__ void rescale(float new_max) {
    const float weight = exp2_fast(max - new_max);
    max = new_max, sum *= weight;
#pragma unroll
    for (float& value : x) value *= weight;
  }
  __device__ __forceinline__ void add(float2 stats, float4 y) {  // stats: maximum, sum
    const float weight = exp2_fast(stats.x - max);
    sum += weight * stats.y;
    x[0] += weight * y.x, x[1] += weight * y.y, x[2] += weight * y.z, x[3] += weight * y.w;
  }
  template <int count>
  __device__ __forceinline__ void add_all(const float2 (&stats)[count], const float4 (&y)[count]) {
    float new_max = max;
#pragma unroll
    for (int i = 0; i < count; ++i) new_max = fmaxf(new_max, stats[i].x);
    rescale(new_max);
#pragma unroll
    for (int i = 0; i < count; ++i) add(stats[i], y[i]);
  }
};

// Makes a row of a published partial result empty again; `channel` of each thread: the first of its four.
template <int D>
__device__ __forceinline__ void clear_partial(float* row, int channel) {
  const float empty = __uint_as_float(kEmpty);
  *reinterpret_cast<float4*>(row + channel) = {empty, empty, empty, empty};
  if (channel == 0) *reinterpret_cast<float2*>(row + D) = {empty, empty};
}

// Four channels of an output row.
template <int D>
__device__ __forceinline__ void store_output(const ItemOutput& output, int row, int channel,
                                             const MergedRow& merged) {
  const float inverse = inverse_or_zero(merged.sum);
  float x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = merged.x[i] * inverse;
  const int item_row = output.first_row + row;
  int64_t to = item_row * D + channel;
  if (output.token_stride > 0) {
    to = item_row / output.group * output.token_stride + item_row % output.group * D + channel;
  }
  *reinterpret_cast<uint2*>(output.rows + to) =
      output.is_bf16 ? make_uint2(pack2<bf16>(x[0], x[1]), pack2<bf16>(x[2], x[3]))
                     : make_uint2(pack2<f16>(x[0], x[1]), pack2<f16>(x[2], x[3]));
}

// Who adds up the partial results of a row: D / 4 threads, a lane four channels. Where there are threads for
// several times the rows of the item, the parts are dealt out to groups of them, whose sums meet in shared
// memory; else rows follow each other. The order of all additions is fixed, so every run gives the same bits.
// What runs once a kernel runs at the latency of each instruction: so the host divides by the rows.
template <class S>
struct RowAdders {
  static constexpr int kLanes = S::D / 4, kSlots = S::kThreads / kLanes;
  const int lane = threadIdx.x % kLanes, channel = lane * 4;
  const uint32_t lanes = kLanes == 32 ? ~0u : 0xffffu << (threadIdx.x & 16);
  const int rows, groups, group;
  int row;

  __device__ __forceinline__ RowAdders(const AttentionParams& p, int rows)
      : rows(rows),
        groups(S::kRows == 8 ? p.row_groups : 1),
        group(S::kRows == 8 ? threadIdx.x / kLanes * p.inverse_of_rows >> 16 : 0),
        row(threadIdx.x / kLanes - group * rows) {}

  // The first part that the thread adds, of `count`.
  __device__ __forceinline__ int first(int count) const {
    return row < rows && group < groups ? group : count;
  }
  // Leaves the sum of all groups with those for which it returns true.
  __device__ __forceinline__ bool meet(AttentionControl<S>& control, MergedRow& merged) const {
    if (groups > 1) {
      control.stats[threadIdx.x] = {merged.max, merged.sum};
      control.sums[threadIdx.x] = {merged.x[0], merged.x[1], merged.x[2], merged.x[3]};
      __syncwarp();  // with heads of 64, the halves of a warp may have parted
      compute_barrier<S>();
#pragma unroll 1
      for (int other = 1; other < groups && group == 0; ++other) {
        const int thread = threadIdx.x + other * rows * kLanes;
        const float2 stats = control.stats[thread];
        merged.rescale(fmaxf(merged.max, stats.x));
        merged.add(stats, control.sums[thread]);
      }
    }
    return group == 0 && row < rows;
  }
  // To `partial`, in the form of a partial result, or where that is null to the output.
  __device__ __forceinline__ void store(const MergedRow& merged, float* partial,
                                        const ItemOutput& output) const {
    if (!partial) return store_output<S::D>(output, row, channel, merged);
    float* const to = partial + row * S::kPartialRow;
    publish(reinterpret_cast<float4*>(to + channel),
            float4{merged.x[0], merged.x[1], merged.x[2], merged.x[3]});
    if (channel == 0) publish(reinterpret_cast<float2*>(to + S::D), float2{merged.max, merged.sum});
  }
  __device__ __forceinline__ bool next_row() { return S::kRows > kSlots && (row += kSlots) < rows; }
};

// Adds the results of the teams, in shared memory. All threads that compute call it.
template <class S>
__device__ __forceinline__ void combine_teams(const AttentionParams& p, AttentionControl<S>& control,
                                              const float* teams, int rows, float* partial,
                                              const ItemOutput& output) {
  constexpr int kAtOnce = S::kRows == 8 ? 4 : S::kTeams;  // with few rows, teams are dealt out to groups
  RowAdders<S> at(p, rows);
#pragma unroll 1
  do {
    MergedRow merged;
#pragma unroll 1
    for (int first = at.first(S::kTeams); first < S::kTeams; first += at.groups * kAtOnce) {
      float4 y[kAtOnce];
      float2 stats[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int team = first + i * at.groups;
        const float* const from = teams + team * S::kPartialFloats + at.row * S::kPartialRow;
        stats[i] = {kNothing, 0.f}, y[i] = {};
        if (team >= S::kTeams) continue;
        stats[i] = *reinterpret_cast<const float2*>(from + S::D);
        y[i] = *reinterpret_cast<const float4*>(from + at.channel);
      }
      merged.add_all(stats, y);
    }
    if (at.meet(control, merged)) at.store(merged, partial, output);
  } while (at.next_row());
}

// Waits for parts and adds them to `merged`, but for the sum of exponentials, of which each lane gets a
// share.
template <class S>
__device__ __forceinline__ void add_parts(const Parts parts, const RowAdders<S>& at, MergedRow& merged,
                                          const volatile int& patience, int& tries) {
  // A trip to the L2 takes long: with 256 threads, all parts of a row of four where four heads have 132 CTAs.
  // With more rows registers are short in the main loop.
  constexpr int kAtOnce = S::kRows == 8 ? S::D / 8 + 1 : 4;
  const int row_offset = at.row * S::kPartialRow * int(sizeof(float));
#pragma unroll 1
  for (int first = at.first(parts.count); first < parts.count; first += at.groups * kAtOnce) {
    // A lane has the maximum and the sum of one part, and four channels of all.
    const int own = first + at.lane * at.groups;
    const bool has_stats = at.lane < kAtOnce && own < parts.count;
    const auto* const own_stats =
        reinterpret_cast<const float2*>(parts.at(own, own == 0) + row_offset) + S::D / 2;
    float2 stats = {kNothing, 0.f};
    float4 y[kAtOnce];
    bool missing;
#pragma unroll 1
    do {
      if (has_stats) stats = load_published(own_stats);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int part = first + i * at.groups;
        y[i] = {};
        if (part < parts.count)
          y[i] = load_published(
              reinterpret_cast<const float4*>(parts.at(part, i == 0 && first == 0) + row_offset) + at.lane);
      }
      const uint32_t empty = after_load(y[kAtOnce - 1].x, kEmpty);
      const auto is_empty = [&](float x) { return __float_as_uint(x) == empty; };
      missing = is_empty(stats.x) || is_empty(stats.y);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        missing |= is_empty(y[i].x) || is_empty(y[i].y) || is_empty(y[i].z) || is_empty(y[i].w);
    } while (missing && ++tries < patience);
    float largest = stats.x;
#pragma unroll
    for (int i = 1; i < at.kLanes; i *= 2) largest = fmaxf(largest, __shfl_xor_sync(at.lanes, largest, i));
    merged.rescale(fmaxf(merged.max, largest));
    const float weight = exp2_fast(stats.x - merged.max);
    merged.sum += weight * stats.y;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float of_part = __shfl_sync(at.lanes, weight, i, at.kLanes);
      merged.x[0] += of_part * y[i].x, merged.x[1] += of_part * y[i].y;
      merged.x[2] += of_part * y[i].z, merged.x[3] += of_part * y[i].w;
    }
  }
}

// Merges what the worker has to merge, and makes the places of the parts empty again for the next launch. All
// threads that compute call it.
template <class S>
__device__ __forceinline__ void merge_parts(const AttentionParams& p, AttentionControl<S>& control) {
  const Merge& merge = control.merge;
  RowAdders<S> at(p, merge.rows);
  int tries = 0;
#pragma unroll 1
  do {
    MergedRow merged;
#pragma unroll 1  // one copy of the code: instructions are fetched from memory too
    for (int i = 0; i < 2; ++i) add_parts<S>(merge.parts[i], at, merged, merge.patience, tries);
#pragma unroll
    for (int i = 1; i < at.kLanes; i *= 2) merged.sum += __shfl_xor_sync(at.lanes, merged.sum, i);
    if (at.meet(control, merged)) at.store(merged, merge.partial, merge.output);
    __syncwarp(at.lanes);  // all have read the statistics of the row
#pragma unroll 1
    for (const Parts parts : merge.parts) {
#pragma unroll 2
      for (int i = at.first(parts.count); i < parts.count; i += at.groups)
        clear_partial<S::D>(reinterpret_cast<float*>(parts.at(i, i == 0)) + at.row * S::kPartialRow,
                            at.channel);
    }
  } while (at.next_row());
}

// Only items of kBlockRows rows are not the first of their head.
template <int D>
__device__ __forceinline__ ItemOutput item_output(const AttentionParams& p, int seq, int head,
                                                  int row_block) {
  const int64_t stride = int64_t(p.num_q_heads) * D;
  return {static_cast<uint16_t*>(p.out) + seq * p.num_query_tokens * stride + head * p.group * D,
          p.num_query_tokens == 1 ? 0 : stride,  // with one token no row needs a division to be found
          p.group, row_block * kBlockRows, p.dtype == DType::kBF16};
}

__device__ __forceinline__ int item_rows(const AttentionParams& p, int row_block) {
  return min(kBlockRows, p.group * p.num_query_tokens - row_block * kBlockRows);
}

// What the worker has to merge: the parts of the item it begins in, if its own is the last of them, or the
// last of a group of many. `part` is the number of its own among `parts`; 0 where it begins the item.
template <class S>
__device__ __forceinline__ Merge plan_merge(const AttentionParams& p, const BlockPlace& at, int part,
                                            int parts) {
  Merge merge{};
  const bool is_last = part + 1 == parts, in_groups = parts > kMostPartsAtOnce;
  const bool ends_group = in_groups && (part + 1) % kGroupParts == 0;
  if (part == 0 || p.merges_apart || !(is_last || ends_group)) return merge;
  const int group = in_groups ? part / kGroupParts : 0, first = group * kGroupParts;
  // A worker has room for a part of the item it begins in, and one of the item it ends in, where the first
  // part of an item lies. The sum of a group lies there too, with the group's last worker, who ends in none.
  const unsigned part_bytes = p.partial_words * sizeof(float), pitch = gridDim.x * 2 * part_bytes;
  char* const own =
      reinterpret_cast<char*>(p.partials) + uint64_t{blockIdx.y * gridDim.x + blockIdx.x} * 2 * part_bytes;
  const auto of_part = [&](int number) { return own - uint64_t{pitch} * unsigned(part - number); };
  if (is_last && group > 0)
    merge.parts[0] = {of_part(kGroupParts - 1) + part_bytes, group, pitch * kGroupParts, 0};
  merge.parts[1] = {of_part(first), part + 1 - first, pitch, first == 0 ? part_bytes : 0};
  merge.rows = item_rows(p, at.row_block), merge.patience = kPatience;
  merge.partial = is_last ? nullptr : reinterpret_cast<float*>(own + part_bytes);
  merge.output = item_output<S::D>(p, at.seq, at.head, at.row_block);
  return merge;
}

}  // namespace fusedkv

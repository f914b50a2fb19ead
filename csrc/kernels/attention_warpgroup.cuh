// What attention_state.cuh does for teams of warps, for a team that is a warpgroup: Hopper's wgmma, from 33
// query rows on and for sources in 16 bits, as many of keys as of values.
//
// The four warps have 16 rows each, and their tensor cores read every key and value from shared memory once
// for all 64. The products are not transposed here: a lane holds tokens (or channels) 8j + 2 * (lane % 4) and
// the next one of two query rows, lane / 4 and lane / 4 + 8 of its warp's; so the maximum of a row is a
// matter of four lanes, and the probabilities are the next product's left operand as they are.
#pragma once

#include "attention_state.cuh"
#include "common/hopper.cuh"

namespace fusedkv {

template <class S>
struct WarpgroupState {
  using T = typename S::T;
  static constexpr int kTokens = S::kTeamTokens;
  uint32_t query[S::kSharedQueries ? 1 : S::kSources][S::D / 16][4];
  uint32_t queries;  // where they are in shared memory
  float out[S::kSources][S::D / 2];
  float row_max[2], row_sum[2];  // as in AttentionState

  // The warp's first row.
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 32 % 4 * 16; }

  __device__ void start(const AttentionParams& p, AttentionControl<S>& control, const char* stage) {
    const int lane = threadIdx.x % 32;
    const float* const weights = reinterpret_cast<const float*>(stage + S::kWeightOffset);
    keep_value_weights(p, control, weights);
#pragma unroll
    for (int k = 0; k < S::D / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_row() + lane / 4 + i % 2 * 8;
        const int channel = k * 16 + i / 2 * 8 + lane % 4 * 2;
        const float2 q = unpack2<T>(*reinterpret_cast<const uint32_t*>(
            stage + S::kQueryOffset + swizzled<S::D / 8>(row, channel / 8) + channel % 8 * 2));
#pragma unroll
        for (int s = 0; s < S::kSources; ++s) {
          float2 a = make_float2(1.f, 1.f);
          if (p.key_weights) a = *reinterpret_cast<const float2*>(weights + s * S::D + channel);
          const uint32_t weighted = pack2<T>(q.x * a.x, q.y * a.y);
          if constexpr (S::kSharedQueries) {
            if (threadIdx.x / 128 != s) continue;  // a warpgroup a source
            const int tile = s * (S::D / 64) + k / 4;
            store_shared_4(
                queries + tile * S::kQueryTileBytes + swizzled<8>(row, channel % 64 / 8) + channel % 8 * 2,
                weighted);
          } else {
            query[s][k][i] = weighted;
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < S::kSources; ++s)
#pragma unroll
      for (int i = 0; i < S::D / 2; ++i) out[s][i] = 0.f;
    row_max[0] = row_max[1] = kNothing;
    row_sum[0] = row_sum[1] = 0.f;
    if constexpr (S::kSharedQueries) {
      fence_async_proxy();
      compute_barrier<S>();
    }
  }

  __device__ __forceinline__ void add_unit(const AttentionParams& p, const BlockPlace& at, const char* stage,
                                           const uint8_t* visible) {
    const int token = threadIdx.x / 128 * kTokens;
    uint32_t seen[kTokens / 32], any = 0, all = ~0u;
#pragma unroll
    for (int i = 0; i < kTokens / 32; ++i) {
      seen[i] = reinterpret_cast<const uint32_t*>(visible + token / 8)[i];
      any |= seen[i], all &= seen[i];
    }
    if (any == 0) return;  // all four warps agree

    float scores[kTokens / 2];
    const uint32_t unit = smem_address(stage) + token * 128;
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < S::kSources; ++s) {
#pragma unroll
      for (int k = 0; k < S::D / 16; ++k) {
        const uint64_t keys = wgmma_matrix(unit + s * S::kPlaneBytes + k / 4 * S::kTileBytes + k % 4 * 32);
        if constexpr (S::kSharedQueries) {
          const int tile = s * (S::D / 64) + k / 4;
          wgmma_64x16<T>(scores, wgmma_matrix(queries + tile * S::kQueryTileBytes + k % 4 * 32), keys,
                         s > 0 || k > 0);
        } else {
          wgmma_registers_64x16<T, false>(scores, query[s][k], keys, s > 0 || k > 0);
        }
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    fence_registers(scores);

    const float scale = p.scale * 1.4426950408889634f;  // exponents to base 2
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) scores[i] *= scale;
    if (all != ~0u) mask_unseen(seen, scores);
    mask_edges(p, at, token, scores);

    float best[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) best[i / 2 % 2] = fmaxf(best[i / 2 % 2], scores[i]);
    if (__any_sync(~0u, best[0] > row_max[0] + kMaxLag || best[1] > row_max[1] + kMaxLag)) raise_max(best);

    uint32_t probabilities[kTokens / 16][4];
#pragma unroll
    for (int i = 0; i < kTokens / 2; i += 2) {
      const int row = i / 2 % 2;
      const float first = exp2_fast(scores[i] - row_max[row]),
                  second = exp2_fast(scores[i + 1] - row_max[row]);
      row_sum[row] += first + second;
      probabilities[i / 8][i / 2 % 4] = pack2<T>(first, second);
    }

    const uint32_t values = unit + S::kSources * S::kPlaneBytes;
#pragma unroll
    for (int s = 0; s < S::kSources; ++s) fence_registers(out[s]);  // they may have been rescaled
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < S::kSources; ++s) {
#pragma unroll
      for (int i = 0; i < kTokens / 16; ++i) {
        wgmma_registers_64x16<T, true>(out[s], probabilities[i],
                                       wgmma_rows(values + s * S::kPlaneBytes + i * 2048, S::kTileBytes), 1);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int s = 0; s < S::kSources; ++s) fence_registers(out[s]);
  }

  // Makes row_max the true maximum, best being that of the lane's new tokens.
  __device__ __forceinline__ void raise_max(const float (&best)[2]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float all = fmaxf(row_max[j], best[j]);
      all = fmaxf(all, __shfl_xor_sync(~0u, all, 1));
      all = fmaxf(all, __shfl_xor_sync(~0u, all, 2));
      const float rescale = exp2_fast(row_max[j] - all);
      row_max[j] = all;
      row_sum[j] *= rescale;
#pragma unroll
      for (int s = 0; s < S::kSources; ++s)
#pragma unroll
        for (int i = 0; i < S::D / 2; ++i)
          if (i / 2 % 2 == j) out[s][i] *= rescale;
    }
  }

  static __device__ __forceinline__ void mask_unseen(const uint32_t (&seen)[kTokens / 32],
                                                     float (&scores)[kTokens / 2]) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int token = i / 4 * 8 + i % 2;
      if (!(seen[token / 32] >> (token % 32 + threadIdx.x % 4 * 2) & 1)) scores[i] = -INFINITY;
    }
  }

  // With one query token, or far from the edges, all rows see the same tokens.
  static __device__ __forceinline__ void mask_edges(const AttentionParams& p, const BlockPlace& at, int token,
                                                    float (&scores)[kTokens / 2]) {
    const int start = at.start() + token;
    const bool at_end = start + kTokens > at.length - p.num_query_tokens + 1;
    const bool at_window = p.window > 0 && start < at.length - p.window;
    if (p.num_query_tokens == 1 || !(at_end || at_window)) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int row = at.row_block * S::kRows + first_row() + threadIdx.x % 32 / 4 + j * 8;
      const int query = at.length - p.num_query_tokens + row / p.group;
      const int oldest = p.window > 0 ? query - p.window + 1 : 0;
#pragma unroll
      for (int i = 0; i < kTokens / 2; ++i) {
        const int key = start + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        if (i / 2 % 2 == j && (key > query || key < oldest)) scores[i] = -INFINITY;
      }
    }
  }

  __device__ void finish(const AttentionControl<S>& control, char* stage) {
    const int lane = threadIdx.x % 32;
    float* const to = reinterpret_cast<float*>(stage) + threadIdx.x / 128 * S::kPartialFloats +
                      (first_row() + lane / 4) * S::kPartialRow;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float sum = row_sum[j];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == 0) {
        *reinterpret_cast<float2*>(to + j * 8 * S::kPartialRow + S::D) = make_float2(row_max[j], sum);
      }
    }
    constexpr int kAtOnce = 4;  // weights that are loaded before anything is stored, as in AttentionState
#pragma unroll
    for (int first = 0; first < S::D / 8; first += kAtOnce) {
      const int channel = first * 8 + lane % 4 * 2;
      float2 weights[S::kSources][kAtOnce];
#pragma unroll
      for (int s = 0; s < S::kSources; ++s)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          weights[s][i] = *reinterpret_cast<const float2*>(&control.value_weights[s][channel + i * 8]);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float2 total = make_float2(0.f, 0.f);
#pragma unroll
          for (int s = 0; s < S::kSources; ++s) {
            const float* const sums = out[s] + (first + i) * 4 + j * 2;
            total.x += weights[s][i].x * sums[0], total.y += weights[s][i].y * sums[1];
          }
          *reinterpret_cast<float2*>(to + j * 8 * S::kPartialRow + channel + i * 8) = total;
        }
    }
  }
};

}  // namespace fusedkv

// The running softmax and weighted sum of one item, and how warps and workers merge theirs.
#pragma once

#include "attention_units.cuh"

namespace fusedkv {

// One warp's running result: 16 query rows, of which a lane holds two, over all channels.
template <class S>
struct AttentionState {
  using T = typename S::T;
  float out[S::kValueSources][S::D / 8][4];
  float row_max[2], row_sum[2];  // the sum is the lane's own part until finish()

  __device__ void reset() {
#pragma unroll
    for (int s = 0; s < S::kValueSources; ++s)
#pragma unroll
      for (int i = 0; i < S::D / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) out[s][i][j] = 0.f;
    row_max[0] = row_max[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.f;
  }

  __device__ void add_unit(const FusedAttentionParams& p, const UnitCursor& at, int row_blocks,
                           const char* query, const char* stage, const uint32_t (&visible)[kAttentionWarps]) {
    constexpr int kGroups = S::kRowTiles;  // 16-token groups of the team
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tile = warp % S::kRowTiles, first_token = warp / S::kRowTiles * 16 * kGroups;

    float scores[2 * kGroups][4] = {};
#pragma unroll
    for (int s = 0; s < S::kKeySources; ++s) {
#pragma unroll
      for (int k = 0; k < S::D / 16; ++k) {
        uint32_t a[4];
        ldmatrix_x4(a, smem_address(query + s * S::kRows * S::D * 2 +
                                    swizzled<S::D>(tile * 16 + lane % 16, 2 * k + lane / 16)));
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          uint32_t b[4];
          const int token = first_token + g * 16 + lane % 8 + lane / 16 * 8;
          ldmatrix_x4(b,
                      smem_address(stage + s * S::kPlaneBytes + swizzled<S::D>(token, 2 * k + lane / 8 % 2)));
          mma_16x8x16<T>(scores[2 * g], a, b[0], b[1]);
          mma_16x8x16<T>(scores[2 * g + 1], a, b[2], b[3]);
        }
      }
    }

    const float scale = p.scale * 1.4426950408889634f;  // exponents to base 2
#pragma unroll
    for (int n = 0; n < 2 * kGroups; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[n][j] *= scale;
    mask_scores(p, at, row_blocks, visible, scores);

    float safe_max[2], rescale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float best = row_max[r];
#pragma unroll
      for (int n = 0; n < 2 * kGroups; ++n) best = fmaxf(best, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
      safe_max[r] = best == -INFINITY ? 0.f : best;  // -inf - -inf would be NaN
      rescale[r] = exp2f(row_max[r] - safe_max[r]);
      row_max[r] = best;
      row_sum[r] *= rescale[r];
    }
    if (__any_sync(~0u, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
      for (int s = 0; s < S::kValueSources; ++s)
#pragma unroll
        for (int i = 0; i < S::D / 8; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) out[s][i][j] *= rescale[j / 2];
    }

    uint32_t probabilities[kGroups][4];
#pragma unroll
    for (int n = 0; n < 2 * kGroups; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float low = exp2f(scores[n][2 * r] - safe_max[r]);
        const float high = exp2f(scores[n][2 * r + 1] - safe_max[r]);
        row_sum[r] += low + high;
        probabilities[n / 2][n % 2 * 2 + r] = pack2<T>(low, high);
      }
    }

#pragma unroll
    for (int s = 0; s < S::kValueSources; ++s) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int d = 0; d < S::D / 16; ++d) {
          uint32_t b[4];
          const int token = first_token + g * 16 + lane % 16;
          ldmatrix_x4_trans(b, smem_address(stage + (S::kKeySources + s) * S::kPlaneBytes +
                                            swizzled<S::D>(token, 2 * d + lane / 16)));
          mma_16x8x16<T>(out[s][2 * d], probabilities[g], b[0], b[1]);
          mma_16x8x16<T>(out[s][2 * d + 1], probabilities[g], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void mask_scores(const FusedAttentionParams& p, const UnitCursor& at,
                                              int row_blocks, const uint32_t (&visible)[kAttentionWarps],
                                              float (&scores)[2 * S::kRowTiles][4]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int team = warp / S::kRowTiles;
#pragma unroll
    for (int g = 0; g < S::kRowTiles; ++g) {
      const uint32_t seen = visible[team * S::kRowTiles + g];
      if (seen == 0xffffu) continue;
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int column = n * 8 + lane % 4 * 2 + j % 2;
          if (!(seen >> column & 1)) scores[2 * g + n][j] = -INFINITY;
        }
    }
    // With one query token, or far from the edges, all rows see the same tokens: the bits above say it all.
    const int start = (at.first_block + at.block) * kBlockTokens;
    const bool at_end = start + kBlockTokens > at.length - p.num_query_tokens + 1;
    const bool at_window = p.window > 0 && start < at.length - p.window;
    if (p.num_query_tokens == 1 || !(at_end || at_window)) return;
    const int group = p.num_q_heads / p.num_kv_heads;
    const int first_row = at.head_row % row_blocks * S::kRows + warp % S::kRowTiles * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = at.length - p.num_query_tokens + (first_row + 8 * r) / group;
      const int oldest = p.window > 0 ? query - p.window + 1 : 0;
#pragma unroll
      for (int n = 0; n < 2 * S::kRowTiles; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = start + team * 16 * S::kRowTiles + n * 8 + lane % 4 * 2 + j;
          if (key > query || key < oldest) scores[n][2 * r + j] = -INFINITY;
        }
    }
  }

  // Weights and adds the value sources, then merges the teams; team 0 ends with the item's rows in out[0].
  // `scratch` is the stage that was read last: nothing is loaded into it before the next unit.
  __device__ void finish(const FusedAttentionParams& p, const UnitCursor& at, int row_blocks,
                         AttentionControl& control, char* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tile = warp % S::kRowTiles, team = warp / S::kRowTiles;
    const int head = at.head_row / row_blocks;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 2);
    }
    float rescale[2] = {1.f, 1.f};
    if constexpr (S::kTeams > 1) {
      if (lane % 4 == 0) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          control.row_max[warp][lane / 4 + 8 * r] = row_max[r];
          control.row_sum[warp][lane / 4 + 8 * r] = row_sum[r];
        }
      }
      __syncthreads();
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = lane / 4 + 8 * r;
        float best = -INFINITY, sum = 0.f;
#pragma unroll
        for (int t = 0; t < S::kTeams; ++t) best = fmaxf(best, control.row_max[t * S::kRowTiles + tile][row]);
        const float safe = best == -INFINITY ? 0.f : best;
#pragma unroll
        for (int t = 0; t < S::kTeams; ++t) {
          const int other = t * S::kRowTiles + tile;
          sum += control.row_sum[other][row] * exp2f(control.row_max[other][row] - safe);
        }
        rescale[r] = exp2f(row_max[r] - safe);
        row_max[r] = best;
        row_sum[r] = sum;
      }
    }
#pragma unroll
    for (int i = 0; i < S::D / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float total[2] = {0.f, 0.f};
#pragma unroll
        for (int s = 0; s < S::kValueSources; ++s) {
          const int channel = i * 8 + lane % 4 * 2 + j;
          const float b =
              p.value_weights ? p.value_weights[(s * p.num_kv_heads + head) * S::D + channel] : 1.f;
          total[0] += b * out[s][i][j];
          total[1] += b * out[s][i][2 + j];
        }
        out[0][i][j] = total[0] * rescale[0];
        out[0][i][2 + j] = total[1] * rescale[1];
      }
    }
#pragma unroll
    for (int half = S::kTeams / 2; half >= 1; half /= 2) {
      // Fragments travel in lane order, so that no two lanes meet in a bank.
      float4* buffer = reinterpret_cast<float4*>(scratch) + lane;
      if (team >= half && team < 2 * half) {
        float4* to = buffer + ((team - half) * S::kRowTiles + tile) * 32 * (S::D / 8);
#pragma unroll
        for (int i = 0; i < S::D / 8; ++i)
          to[i * 32] = make_float4(out[0][i][0], out[0][i][1], out[0][i][2], out[0][i][3]);
      }
      __syncthreads();
      if (team < half) {
        const float4* from = buffer + (team * S::kRowTiles + tile) * 32 * (S::D / 8);
#pragma unroll
        for (int i = 0; i < S::D / 8; ++i) {
          const float4 other = from[i * 32];
          out[0][i][0] += other.x, out[0][i][1] += other.y, out[0][i][2] += other.z, out[0][i][3] += other.w;
        }
      }
      if (half > 1) __syncthreads();
    }
  }
};

// Address of query row `row` of the item in the output.
template <class S>
__device__ __forceinline__ typename S::T* out_row(const FusedAttentionParams& p, const UnitCursor& at,
                                                  int head, int row) {
  const int group = p.num_q_heads / p.num_kv_heads;
  const int64_t token = int64_t(at.seq) * p.num_query_tokens + row / group;
  return static_cast<typename S::T*>(p.out) + (token * p.num_q_heads + head * group + row % group) * S::D;
}

__device__ __forceinline__ float inverse_or_zero(float sum) { return sum == 0.f ? 0.f : 1.f / sum; }

// Writes team 0's rows: to the output when the whole item was this worker's, else as a partial result.
template <class S>
__device__ void write_rows(const FusedAttentionParams& p, const UnitCursor& at, int row_blocks,
                           const AttentionState<S>& state, float* partial) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= S::kRowTiles) return;
  const int rows = p.num_q_heads / p.num_kv_heads * p.num_query_tokens;
  const int head = at.head_row / row_blocks, first_row = at.head_row % row_blocks * S::kRows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int local = warp * 16 + lane / 4 + 8 * r, row = first_row + local;
    if (row >= rows) continue;
    if (partial) {
      if (lane % 4 == 0) {
        partial[S::kRows * S::D + local] = state.row_max[r];
        partial[S::kRows * (S::D + 1) + local] = state.row_sum[r];
      }
#pragma unroll
      for (int i = 0; i < S::D / 8; ++i) {
        *reinterpret_cast<float2*>(partial + local * S::D + i * 8 + lane % 4 * 2) =
            make_float2(state.out[0][i][2 * r], state.out[0][i][2 * r + 1]);
      }
    } else {
      const float inverse = inverse_or_zero(state.row_sum[r]);
      auto* to = out_row<S>(p, at, head, row);
#pragma unroll
      for (int i = 0; i < S::D / 8; ++i) {
        *reinterpret_cast<uint32_t*>(to + i * 8 + lane % 4 * 2) =
            pack2<typename S::T>(state.out[0][i][2 * r] * inverse, state.out[0][i][2 * r + 1] * inverse);
      }
    }
  }
}

// Adds up the partial results of an item in the order of the workers, so that every run gives the same bits.
template <class S>
__device__ void merge_partials(const FusedAttentionParams& p, const UnitCursor& at, int row_blocks,
                               const float* first, const float* rest, int64_t stride, int parts) {
  const int rows = p.num_q_heads / p.num_kv_heads * p.num_query_tokens;
  const int head = at.head_row / row_blocks, first_row = at.head_row % row_blocks * S::kRows;
  const int count = min(S::kRows, rows - first_row);
  for (int i = threadIdx.x; i < count * (S::D / 4); i += kAttentionThreads) {
    const int local = i / (S::D / 4), channel = i % (S::D / 4) * 4;
    const auto part = [&](int k) { return k == 0 ? first : rest + (k - 1) * stride; };
    float best = -INFINITY;
    for (int k = 0; k < parts; ++k) best = fmaxf(best, __ldcg(part(k) + S::kRows * S::D + local));
    const float safe = best == -INFINITY ? 0.f : best;
    float sum = 0.f, x[4] = {};
#pragma unroll 4
    for (int k = 0; k < parts; ++k) {
      const float weight = exp2f(__ldcg(part(k) + S::kRows * S::D + local) - safe);
      const float4 o = __ldcg(reinterpret_cast<const float4*>(part(k) + local * S::D + channel));
      sum += weight * __ldcg(part(k) + S::kRows * (S::D + 1) + local);
      x[0] += weight * o.x, x[1] += weight * o.y, x[2] += weight * o.z, x[3] += weight * o.w;
    }
    const float inverse = inverse_or_zero(sum);
    *reinterpret_cast<uint2*>(out_row<S>(p, at, head, first_row + local) + channel) =
        make_uint2(pack2<typename S::T>(x[0] * inverse, x[1] * inverse),
                   pack2<typename S::T>(x[2] * inverse, x[3] * inverse));
  }
}

}  // namespace fusedkv

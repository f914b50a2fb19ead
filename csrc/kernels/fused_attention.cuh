// Attention of a few query tokens over a paged cache with one or two sources for keys and for values.
//
// scores = sum_s (a_s * q) K_s^T and out = sum_s b_s * (P V_s): the second source costs its bytes, and
// neither K_i nor V_i is ever formed. docs/kernels.md has the picture; in short:
//  - A CTA is 4 warps and walks a contiguous range of work units (schedule.cuh). Each warp keeps loading its
//    own 16 of a unit's 64 tokens, a few units ahead, with 16-byte cp.async, which serve any page size.
//  - The query rows of one key/value head (G heads x Q tokens) are packed into ROW_TILES tiles of 16 rows.
//    ROW_TILES warps form a team: one row tile each, over the team's 16 * ROW_TILES tokens. A team keeps its
//    own softmax state and meets nobody until its item ends, so the main loop has one barrier per unit among
//    the warps of a team, and none for up to 16 rows.
#pragma once

#include <cmath>

#include "common/mma.cuh"
#include "schedule.cuh"

namespace fusedkv {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
constexpr int kMaxStages = 6;

template <class T_, int D_, int K_SOURCES_, int V_SOURCES_, int ROW_TILES_>
struct AttentionShape {
  using T = T_;
  static constexpr int D = D_, K_SOURCES = K_SOURCES_, V_SOURCES = V_SOURCES_, ROW_TILES = ROW_TILES_;
  static constexpr int SOURCES = K_SOURCES + V_SOURCES;
  static constexpr int TEAMS = kAttentionWarps / ROW_TILES;
  static constexpr int ROWS = 16 * ROW_TILES;
  static constexpr int CHUNKS = D / 8;                // 16-byte chunks of a row
  static constexpr int PLANE = kBlockTokens * D * 2;  // bytes of one source's block
  static constexpr int STAGE = SOURCES * PLANE;
  static constexpr int QUERY = K_SOURCES * ROWS * D * 2;
  static constexpr int PARTIAL = ROWS * (D + 2);  // floats of one partial result: rows, then max, sum
};

struct AttentionControl {
  uint32_t visible[kMaxStages][kAttentionWarps];  // bit t: token t of the warp's 16 may be seen
  float row_max[kAttentionWarps][16];
  float row_sum[kAttentionWarps][16];
  bool is_last;
};

// Byte offset of a 16-byte chunk in a tile of D columns. Rows that ldmatrix reads together fall into
// different banks because the row number is XORed into the chunk's.
template <int D>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * D * 2 + ((chunk ^ (row & 7)) << 4);
}

// A place in the order of work units.
struct UnitCursor {
  int seq, head_row, block;         // head_row = head * row_blocks + row block
  int blocks, length, first_block;  // of the sequence

  __device__ void enter_sequence(const FusedAttentionParams& p) {
    const int64_t capacity = int64_t(p.max_pages) * p.cache.page_size;
    blocks = p.schedule[seq + 1] - p.schedule[seq];
    length = static_cast<int>(max(int64_t(0), min(int64_t(p.seq_lens[seq]), capacity)));
    first_block = first_visible(length, p.num_query_tokens, p.window) / kBlockTokens;
  }

  __device__ void seek(const FusedAttentionParams& p, int64_t unit, int head_rows) {
    const int lane = threadIdx.x % 32;
    seq = 0;
    for (int base = 0; base < p.batch; base += 32) {
      const int i = base + lane + 1;
      const bool before = i < p.batch && int64_t(p.schedule[i]) * head_rows <= unit;
      seq += __popc(__ballot_sync(~0u, before));
    }
    enter_sequence(p);
    const int64_t inside = unit - int64_t(p.schedule[seq]) * head_rows;
    head_row = static_cast<int>(inside / blocks);
    block = static_cast<int>(inside % blocks);
  }

  __device__ void advance(const FusedAttentionParams& p, int head_rows) {
    if (++block < blocks) return;
    block = 0;
    if (++head_row < head_rows) return;
    head_row = 0;
    ++seq;
    enter_sequence(p);
  }
};

// Loads one warp's 16 tokens of each unit. The page of the next unit is looked up one unit early, so that
// the look-up's latency hides behind a unit's work.
template <class S>
struct UnitLoader {
  using T = typename S::T;
  UnitCursor at;
  int page, offset_in_page;

  __device__ void look_up(const FusedAttentionParams& p) {
    const int token = threadIdx.x / 32 * 16 + threadIdx.x % 16;
    const int position = (at.first_block + at.block) * kBlockTokens + token;
    const bool inside =
        position < at.length && position >= first_visible(at.length, p.num_query_tokens, p.window);
    const unsigned page_size = p.cache.page_size;
    offset_in_page = unsigned(position) % page_size;
    page = -1;
    if (inside) page = p.block_table[at.seq * p.block_table_stride + unsigned(position) / page_size];
  }

  __device__ void issue(const FusedAttentionParams& p, char* stage, uint32_t (&visible)[kAttentionWarps],
                        int row_blocks) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t head = at.head_row / row_blocks;
    const bool inside = index_is_inside(page, p.cache.num_pages);
    const uint32_t mask = __ballot_sync(~0u, inside);
    if (lane == 0) visible[warp] = mask & 0xffffu;
    const int64_t row_page = inside ? page : 0, row_offset = inside ? offset_in_page : 0;
    copy_rows(p.k_sources, S::K_SOURCES, row_page, row_offset, head, mask, stage);
    copy_rows(p.v_sources, S::V_SOURCES, row_page, row_offset, head, mask, stage + S::K_SOURCES * S::PLANE);
  }

  __device__ __forceinline__ void copy_rows(const PagedCache (&sources)[2], int count, int64_t row_page,
                                            int64_t row_offset, int64_t head, uint32_t mask, char* planes) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const PagedCache& layout = sources[0];  // sources of one side share their strides
    const int64_t own = row_page * layout.page_stride + row_offset * layout.token_stride;
    const int chunk = lane % S::CHUNKS;
    constexpr int ROWS_AT_ONCE = 32 / S::CHUNKS;
#pragma unroll
    for (int i = 0; i < 16 / ROWS_AT_ONCE; ++i) {
      const int row = i * ROWS_AT_ONCE + lane / S::CHUNKS;
      const int64_t from = __shfl_sync(~0u, own, row) + head * layout.head_stride + chunk * 8;
      const bool valid = mask >> row & 1;
      const int to = swizzled<S::D>(warp * 16 + row, chunk);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (s < count) {
          cp_async_16(smem_address(planes + s * S::PLANE + to), static_cast<const T*>(sources[s].data) + from,
                      valid);
        }
      }
    }
  }
};

__device__ __forceinline__ void wait_for_oldest(int stages) {
  switch (stages) {  // leave stages - 2 groups in flight; the instruction takes constants only
    case 1:
    case 2:
      return cp_async_wait<0>();
    case 3:
      return cp_async_wait<1>();
    case 4:
      return cp_async_wait<2>();
    case 5:
      return cp_async_wait<3>();
    default:
      return cp_async_wait<kMaxStages - 2>();
  }
}

template <class S>
__device__ __forceinline__ void team_barrier(int team) {
  if constexpr (S::ROW_TILES == 1) {
    __syncwarp();
  } else if constexpr (S::TEAMS == 1) {
    __syncthreads();
  } else if (team == 0) {  // constant numbers: with a variable one the kernel would claim all 16 barriers
    asm volatile("bar.sync 1, %0;" ::"n"(32 * S::ROW_TILES) : "memory");
  } else {
    asm volatile("bar.sync 2, %0;" ::"n"(32 * S::ROW_TILES) : "memory");
  }
}

// Puts a_s * q of one item into shared memory, rows token * G + head, rounded once.
template <class S>
__device__ void load_query(const FusedAttentionParams& p, const UnitCursor& at, int row_blocks, char* query) {
  using T = typename S::T;
  const int group = p.num_q_heads / p.num_kv_heads, rows = group * p.num_query_tokens;
  const int head = at.head_row / row_blocks, first_row = at.head_row % row_blocks * S::ROWS;
  for (int i = threadIdx.x; i < S::ROWS * S::CHUNKS; i += kAttentionThreads) {
    const int local = i / S::CHUNKS, chunk = i % S::CHUNKS, row = first_row + local;
    Vec8 q = {};
    if (row < rows) {
      q = Vec8::load(static_cast<const T*>(p.q) + at.seq * p.q_batch_stride + row / group * p.q_token_stride +
                     (head * group + row % group) * p.q_head_stride + chunk * 8);
    }
#pragma unroll
    for (int s = 0; s < S::K_SOURCES; ++s) {
      Vec8 scaled = q;
      if (p.key_weights) {
        const Vec8 a = Vec8::load(p.key_weights + (s * p.num_kv_heads + head) * S::D + chunk * 8);
#pragma unroll
        for (int j = 0; j < 8; ++j) scaled.x[j] *= a.x[j];
      }
      scaled.store(reinterpret_cast<T*>(query + s * S::ROWS * S::D * 2 + swizzled<S::D>(local, chunk)));
    }
  }
}

// One warp's running result: 16 query rows, of which a lane holds two, over all channels.
template <class S>
struct AttentionState {
  using T = typename S::T;
  float out[S::V_SOURCES][S::D / 8][4];
  float row_max[2], row_sum[2];  // the sum is the lane's own part until finish()

  __device__ void reset() {
#pragma unroll
    for (int s = 0; s < S::V_SOURCES; ++s)
#pragma unroll
      for (int i = 0; i < S::D / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) out[s][i][j] = 0.f;
    row_max[0] = row_max[1] = -INFINITY;
    row_sum[0] = row_sum[1] = 0.f;
  }

  __device__ void add_unit(const FusedAttentionParams& p, const UnitCursor& at, int row_blocks,
                           const char* query, const char* stage, const uint32_t (&visible)[kAttentionWarps]) {
    constexpr int GROUPS = S::ROW_TILES;  // 16-token groups of the team
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tile = warp % S::ROW_TILES, first_token = warp / S::ROW_TILES * 16 * GROUPS;

    float scores[2 * GROUPS][4] = {};
#pragma unroll
    for (int s = 0; s < S::K_SOURCES; ++s) {
#pragma unroll
      for (int k = 0; k < S::D / 16; ++k) {
        uint32_t a[4];
        ldmatrix_x4(a, smem_address(query + s * S::ROWS * S::D * 2 +
                                    swizzled<S::D>(tile * 16 + lane % 16, 2 * k + lane / 16)));
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
          uint32_t b[4];
          const int token = first_token + g * 16 + lane % 8 + lane / 16 * 8;
          ldmatrix_x4(b, smem_address(stage + s * S::PLANE + swizzled<S::D>(token, 2 * k + lane / 8 % 2)));
          mma_16x8x16<T>(scores[2 * g], a, b[0], b[1]);
          mma_16x8x16<T>(scores[2 * g + 1], a, b[2], b[3]);
        }
      }
    }

    const float scale = p.scale * 1.4426950408889634f;  // exponents to base 2
#pragma unroll
    for (int n = 0; n < 2 * GROUPS; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) scores[n][j] *= scale;
    mask_scores(p, at, row_blocks, visible, scores);

    float safe_max[2], rescale[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float best = row_max[r];
#pragma unroll
      for (int n = 0; n < 2 * GROUPS; ++n) best = fmaxf(best, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
      safe_max[r] = best == -INFINITY ? 0.f : best;  // -inf - -inf would be NaN
      rescale[r] = exp2f(row_max[r] - safe_max[r]);
      row_max[r] = best;
      row_sum[r] *= rescale[r];
    }
    if (__any_sync(~0u, rescale[0] != 1.f || rescale[1] != 1.f)) {
#pragma unroll
      for (int s = 0; s < S::V_SOURCES; ++s)
#pragma unroll
        for (int i = 0; i < S::D / 8; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) out[s][i][j] *= rescale[j / 2];
    }

    uint32_t probabilities[GROUPS][4];
#pragma unroll
    for (int n = 0; n < 2 * GROUPS; ++n) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float low = exp2f(scores[n][2 * r] - safe_max[r]);
        const float high = exp2f(scores[n][2 * r + 1] - safe_max[r]);
        row_sum[r] += low + high;
        probabilities[n / 2][n % 2 * 2 + r] = pack2<T>(low, high);
      }
    }

#pragma unroll
    for (int s = 0; s < S::V_SOURCES; ++s) {
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) {
#pragma unroll
        for (int d = 0; d < S::D / 16; ++d) {
          uint32_t b[4];
          const int token = first_token + g * 16 + lane % 16;
          ldmatrix_x4_trans(b, smem_address(stage + (S::K_SOURCES + s) * S::PLANE +
                                            swizzled<S::D>(token, 2 * d + lane / 16)));
          mma_16x8x16<T>(out[s][2 * d], probabilities[g], b[0], b[1]);
          mma_16x8x16<T>(out[s][2 * d + 1], probabilities[g], b[2], b[3]);
        }
      }
    }
  }

  __device__ __forceinline__ void mask_scores(const FusedAttentionParams& p, const UnitCursor& at,
                                              int row_blocks, const uint32_t (&visible)[kAttentionWarps],
                                              float (&scores)[2 * S::ROW_TILES][4]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int team = warp / S::ROW_TILES;
#pragma unroll
    for (int g = 0; g < S::ROW_TILES; ++g) {
      const uint32_t seen = visible[team * S::ROW_TILES + g];
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
    const int first_row = at.head_row % row_blocks * S::ROWS + warp % S::ROW_TILES * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = at.length - p.num_query_tokens + (first_row + 8 * r) / group;
      const int oldest = p.window > 0 ? query - p.window + 1 : 0;
#pragma unroll
      for (int n = 0; n < 2 * S::ROW_TILES; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = start + team * 16 * S::ROW_TILES + n * 8 + lane % 4 * 2 + j;
          if (key > query || key < oldest) scores[n][2 * r + j] = -INFINITY;
        }
    }
  }

  // Weights and adds the value sources, then merges the teams; team 0 ends with the item's rows in out[0].
  // `scratch` is the stage that was read last: nothing is loaded into it before the next unit.
  __device__ void finish(const FusedAttentionParams& p, const UnitCursor& at, int row_blocks,
                         AttentionControl& control, char* scratch) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tile = warp % S::ROW_TILES, team = warp / S::ROW_TILES;
    const int head = at.head_row / row_blocks;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(~0u, row_sum[r], 2);
    }
    float rescale[2] = {1.f, 1.f};
    if constexpr (S::TEAMS > 1) {
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
        for (int t = 0; t < S::TEAMS; ++t) best = fmaxf(best, control.row_max[t * S::ROW_TILES + tile][row]);
        const float safe = best == -INFINITY ? 0.f : best;
#pragma unroll
        for (int t = 0; t < S::TEAMS; ++t) {
          const int other = t * S::ROW_TILES + tile;
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
        for (int s = 0; s < S::V_SOURCES; ++s) {
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
    for (int half = S::TEAMS / 2; half >= 1; half /= 2) {
      // Fragments travel in lane order, so that no two lanes meet in a bank.
      float4* buffer = reinterpret_cast<float4*>(scratch) + lane;
      if (team >= half && team < 2 * half) {
        float4* to = buffer + ((team - half) * S::ROW_TILES + tile) * 32 * (S::D / 8);
#pragma unroll
        for (int i = 0; i < S::D / 8; ++i)
          to[i * 32] = make_float4(out[0][i][0], out[0][i][1], out[0][i][2], out[0][i][3]);
      }
      __syncthreads();
      if (team < half) {
        const float4* from = buffer + (team * S::ROW_TILES + tile) * 32 * (S::D / 8);
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
  if (warp >= S::ROW_TILES) return;
  const int rows = p.num_q_heads / p.num_kv_heads * p.num_query_tokens;
  const int head = at.head_row / row_blocks, first_row = at.head_row % row_blocks * S::ROWS;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int local = warp * 16 + lane / 4 + 8 * r, row = first_row + local;
    if (row >= rows) continue;
    if (partial) {
      if (lane % 4 == 0) {
        partial[S::ROWS * S::D + local] = state.row_max[r];
        partial[S::ROWS * (S::D + 1) + local] = state.row_sum[r];
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
  const int head = at.head_row / row_blocks, first_row = at.head_row % row_blocks * S::ROWS;
  const int count = min(S::ROWS, rows - first_row);
  for (int i = threadIdx.x; i < count * (S::D / 4); i += kAttentionThreads) {
    const int local = i / (S::D / 4), channel = i % (S::D / 4) * 4;
    const auto part = [&](int k) { return k == 0 ? first : rest + (k - 1) * stride; };
    float best = -INFINITY;
    for (int k = 0; k < parts; ++k) best = fmaxf(best, __ldcg(part(k) + S::ROWS * S::D + local));
    const float safe = best == -INFINITY ? 0.f : best;
    float sum = 0.f, x[4] = {};
#pragma unroll 4
    for (int k = 0; k < parts; ++k) {
      const float weight = exp2f(__ldcg(part(k) + S::ROWS * S::D + local) - safe);
      const float4 o = __ldcg(reinterpret_cast<const float4*>(part(k) + local * S::D + channel));
      sum += weight * __ldcg(part(k) + S::ROWS * (S::D + 1) + local);
      x[0] += weight * o.x, x[1] += weight * o.y, x[2] += weight * o.z, x[3] += weight * o.w;
    }
    const float inverse = inverse_or_zero(sum);
    *reinterpret_cast<uint2*>(out_row<S>(p, at, head, first_row + local) + channel) =
        make_uint2(pack2<typename S::T>(x[0] * inverse, x[1] * inverse),
                   pack2<typename S::T>(x[2] * inverse, x[3] * inverse));
  }
}

template <class S>
__global__ void __launch_bounds__(kAttentionThreads)
    fused_attention_kernel(const __grid_constant__ FusedAttentionParams p, int stages) {
  extern __shared__ __align__(128) char shared[];
  __shared__ AttentionControl control;
  char* const query = shared + stages * S::STAGE;

  const int row_blocks = num_row_blocks(p.num_q_heads, p.num_kv_heads, p.num_query_tokens);
  const int head_rows = p.num_kv_heads * row_blocks;
  const WorkSplit split(int64_t(p.schedule[p.batch]) * head_rows, gridDim.x);
  if (blockIdx.x >= split.workers) return;
  const int64_t begin = split.begin(blockIdx.x), end = split.begin(blockIdx.x + 1);

  UnitCursor at;
  at.seek(p, begin, head_rows);
  UnitLoader<S> loader;
  loader.at = at;
  loader.look_up(p);
  int64_t loaded = begin;
  int load_stage = 0;
  const auto load_next = [&] {
    if (loaded < end) {
      loader.issue(p, shared + load_stage * S::STAGE, control.visible[load_stage], row_blocks);
      load_stage = load_stage + 1 == stages ? 0 : load_stage + 1;
      if (++loaded < end) {
        loader.at.advance(p, head_rows);
        loader.look_up(p);
      }
    }
    cp_async_commit();  // empty groups keep the count of groups equal to the count of units
  };
  for (int i = 0; i < stages - 1; ++i) load_next();

  const int team = threadIdx.x / 32 / S::ROW_TILES;
  AttentionState<S> state;
  bool new_item = true;
  int read_stage = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    if (new_item) {
      __syncthreads();  // the last item's query rows and scratch are no longer read
      load_query<S>(p, at, row_blocks, query);
      state.reset();
      __syncthreads();
      new_item = false;
    }
    if (stages == 1) {
      team_barrier<S>(team);
      load_next();
    }
    wait_for_oldest(stages);
    team_barrier<S>(team);
    if (stages > 1) load_next();  // into the stage of the unit before, which the team has left
    char* const stage = shared + read_stage * S::STAGE;
    state.add_unit(p, at, row_blocks, query, stage, control.visible[read_stage]);
    read_stage = read_stage + 1 == stages ? 0 : read_stage + 1;

    const bool ends = at.block + 1 == at.blocks;
    if (ends || unit + 1 == end) {
      const int64_t item_begin = unit - at.block, item_end = item_begin + at.blocks;
      const bool whole = item_begin >= begin && item_end <= end;
      __syncthreads();  // all teams have left the stage that finish() uses as scratch
      state.finish(p, at, row_blocks, control, stage);
      if (whole) {
        write_rows<S>(p, at, row_blocks, state, nullptr);
      } else {
        // A worker has at most two partial results: of the item it begins with, and of the one it ends with.
        float* const workspace = static_cast<float*>(p.workspace);
        constexpr int64_t PAIR = 2 * S::PARTIAL;
        const int64_t first = split.owner(item_begin), last = split.owner(item_end - 1);
        write_rows<S>(p, at, row_blocks, state,
                      workspace + blockIdx.x * PAIR + (item_begin >= begin ? S::PARTIAL : 0));
        __threadfence();
        __syncthreads();
        int* const counter = p.schedule + p.batch + 1 + int64_t(at.seq) * head_rows + at.head_row;
        if (threadIdx.x == 0) {
          control.is_last = atomicAdd(counter, 1) == last - first;
          if (control.is_last) *counter = 0;
          __threadfence();
        }
        __syncthreads();
        if (control.is_last) {
          merge_partials<S>(p, at, row_blocks, workspace + first * PAIR + S::PARTIAL,
                            workspace + (first + 1) * PAIR, PAIR, static_cast<int>(last - first) + 1);
        }
      }
      new_item = true;
    }
    if (unit + 1 < end) at.advance(p, head_rows);
  }
}

struct AttentionLaunch {
  int stages, grid;
  size_t shared_bytes;
};

// Two CTAs an SM when three stages of both fit, since one CTA's merge then hides behind the other's loads;
// else one CTA with all the memory there is.
template <class S>
cudaError_t plan_attention_launch(AttentionLaunch& launch) {
  int device, sms, per_sm, per_block, reserved;
  cudaError_t error = cudaGetDevice(&device);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  read(sms, cudaDevAttrMultiProcessorCount);
  read(per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  read(per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  read(reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  if (error != cudaSuccess) return error;
  const int fixed = S::QUERY + int(sizeof(AttentionControl)) + reserved;
  const int half = (per_sm / 2 - fixed) / S::STAGE;
  const int whole = (per_block + reserved - fixed) / S::STAGE;
  const int ctas = half >= 3 ? 2 : 1;
  launch.stages = min(kMaxStages, ctas == 2 ? half : whole);
  if (launch.stages < 1) return cudaErrorInvalidConfiguration;
  launch.grid = sms * ctas;
  launch.shared_bytes = launch.stages * S::STAGE + S::QUERY;
  return cudaFuncSetAttribute(fused_attention_kernel<S>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(launch.shared_bytes));
}

// Calls f with the shape that fits the number of sources and of query rows.
template <class T, int D, class F>
auto dispatch_attention_shape(const FusedAttentionParams& params, F&& f) {
  const int rows = params.num_q_heads / params.num_kv_heads * params.num_query_tokens;
  const auto with_rows = [&]<int K_SOURCES, int V_SOURCES>() {
    if (rows <= 16) return f(AttentionShape<T, D, K_SOURCES, V_SOURCES, 1>{});
    if (rows <= 32) return f(AttentionShape<T, D, K_SOURCES, V_SOURCES, 2>{});
    return f(AttentionShape<T, D, K_SOURCES, V_SOURCES, 4>{});
  };
  if (params.num_k_sources == 1) {
    return params.num_v_sources == 1 ? with_rows.template operator()<1, 1>()
                                     : with_rows.template operator()<1, 2>();
  }
  return params.num_v_sources == 1 ? with_rows.template operator()<2, 1>()
                                   : with_rows.template operator()<2, 2>();
}

template <class T, int D>
size_t attention_workspace_bytes(const FusedAttentionParams& params) {
  return dispatch_attention_shape<T, D>(params, [](auto shape) -> size_t {
    using S = decltype(shape);
    AttentionLaunch launch;
    if (plan_attention_launch<S>(launch) != cudaSuccess) return 0;
    return size_t(launch.grid) * 2 * S::PARTIAL * sizeof(float);
  });
}

template <class T, int D>
cudaError_t launch_attention(const FusedAttentionParams& params, cudaStream_t stream) {
  return dispatch_attention_shape<T, D>(params, [&](auto shape) {
    using S = decltype(shape);
    AttentionLaunch launch;
    const cudaError_t error = plan_attention_launch<S>(launch);
    if (error != cudaSuccess) return error;
    fused_attention_kernel<S>
        <<<launch.grid, kAttentionThreads, launch.shared_bytes, stream>>>(params, launch.stages);
    return cudaGetLastError();
  });
}

}  // namespace fusedkv

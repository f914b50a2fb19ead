// Where a worker of fused_attention is in its range of units, and how it brings units and queries into
// shared memory.
#pragma once

#include <cmath>

#include "common/mma.cuh"
#include "schedule.cuh"

namespace fusedkv {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = 32 * kAttentionWarps;
constexpr int kMaxStages = 6;

template <class Element, int head_dim, int key_sources, int value_sources, int row_tiles>
struct AttentionShape {
  using T = Element;
  static constexpr int D = head_dim, kKeySources = key_sources, kValueSources = value_sources;
  static constexpr int kRowTiles = row_tiles;
  static constexpr int kSources = kKeySources + kValueSources;
  static constexpr int kTeams = kAttentionWarps / kRowTiles;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kChunks = D / 8;                     // 16-byte chunks of a row
  static constexpr int kPlaneBytes = kBlockTokens * D * 2;  // bytes of one source's block
  static constexpr int kStageBytes = kSources * kPlaneBytes;
  static constexpr int kQueryBytes = kKeySources * kRows * D * 2;
  static constexpr int kPartialFloats = kRows * (D + 2);  // floats of one partial result: rows, then max, sum
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

// A place in the order of work units. Like every number in device memory the schedule is not trusted: with
// any contents the place stays inside the batch, so that a wrong schedule gives wrong results and no more.
struct UnitCursor {
  int seq, head_row, block;         // head_row = head * row_blocks + row block
  int blocks, length, first_block;  // of the sequence

  __device__ void enter_sequence(const FusedAttentionParams& p) {
    const int64_t capacity = int64_t(p.max_pages) * p.cache.page_size;
    blocks = max(1, p.schedule[seq + 1] - p.schedule[seq]);
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
    head_row = static_cast<int>(max(int64_t(0), min(inside / blocks, int64_t(head_rows) - 1)));
    block = static_cast<int>(max(int64_t(0), inside % blocks));
  }

  __device__ void advance(const FusedAttentionParams& p, int head_rows) {
    if (++block < blocks) return;
    block = 0;
    if (++head_row < head_rows) return;
    head_row = 0;
    seq = min(seq + 1, p.batch - 1);
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
    copy_rows(p.k_sources, S::kKeySources, row_page, row_offset, head, mask, stage);
    copy_rows(p.v_sources, S::kValueSources, row_page, row_offset, head, mask,
              stage + S::kKeySources * S::kPlaneBytes);
  }

  __device__ __forceinline__ void copy_rows(const PagedCache (&sources)[2], int count, int64_t row_page,
                                            int64_t row_offset, int64_t head, uint32_t mask, char* planes) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const PagedCache& layout = sources[0];  // sources of one side share their strides
    const int64_t own = row_page * layout.page_stride + row_offset * layout.token_stride;
    const int chunk = lane % S::kChunks;
    constexpr int kRowsAtOnce = 32 / S::kChunks;
#pragma unroll
    for (int i = 0; i < 16 / kRowsAtOnce; ++i) {
      const int row = i * kRowsAtOnce + lane / S::kChunks;
      const int64_t from = __shfl_sync(~0u, own, row) + head * layout.head_stride + chunk * 8;
      const bool valid = mask >> row & 1;
      const int to = swizzled<S::D>(warp * 16 + row, chunk);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (s < count) {
          cp_async_16(smem_address(planes + s * S::kPlaneBytes + to),
                      static_cast<const T*>(sources[s].data) + from, valid);
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
  if constexpr (S::kRowTiles == 1) {
    __syncwarp();
  } else if constexpr (S::kTeams == 1) {
    __syncthreads();
  } else if (team == 0) {  // constant numbers: with a variable one the kernel would claim all 16 barriers
    asm volatile("bar.sync 1, %0;" ::"n"(32 * S::kRowTiles) : "memory");
  } else {
    asm volatile("bar.sync 2, %0;" ::"n"(32 * S::kRowTiles) : "memory");
  }
}

// Puts a_s * q of one item into shared memory, rows token * G + head, rounded once.
template <class S>
__device__ void load_query(const FusedAttentionParams& p, const UnitCursor& at, int row_blocks, char* query) {
  using T = typename S::T;
  const int group = p.num_q_heads / p.num_kv_heads, rows = group * p.num_query_tokens;
  const int head = at.head_row / row_blocks, first_row = at.head_row % row_blocks * S::kRows;
  for (int i = threadIdx.x; i < S::kRows * S::kChunks; i += kAttentionThreads) {
    const int local = i / S::kChunks, chunk = i % S::kChunks, row = first_row + local;
    Vec8 q = {};
    if (row < rows) {
      q = Vec8::load(static_cast<const T*>(p.q) + at.seq * p.q_batch_stride + row / group * p.q_token_stride +
                     (head * group + row % group) * p.q_head_stride + chunk * 8);
    }
#pragma unroll
    for (int s = 0; s < S::kKeySources; ++s) {
      Vec8 scaled = q;
      if (p.key_weights) {
        const Vec8 a = Vec8::load(p.key_weights + (s * p.num_kv_heads + head) * S::D + chunk * 8);
#pragma unroll
        for (int j = 0; j < 8; ++j) scaled.x[j] *= a.x[j];
      }
      scaled.store(reinterpret_cast<T*>(query + s * S::kRows * S::D * 2 + swizzled<S::D>(local, chunk)));
    }
  }
}

}  // namespace fusedkv

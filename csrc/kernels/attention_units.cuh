// Where a worker of fused_attention is in its range of blocks, and how it brings units of them, queries and
// fusion weights into shared memory.
#pragma once

#include <cmath>

#include "common/mma.cuh"
#include "common/overlap.cuh"
#include "schedule.cuh"

namespace fusedkv {

constexpr int kMaxStages = 6;
constexpr int kRowAlignment = 256;  // the widest row

// Strides of the caches of one side in bytes, where they fit: 64-bit products are several instructions.
struct ByteStrides {
  uint32_t page, token, head;
};

// What the kernel gets: the op's arguments, and what the host derives from them once.
struct AttentionParams : FusedAttentionParams {
  int group;          // query heads of a key/value head
  int row_blocks;     // of a key/value head
  int page_shift;     // log2 of the page size, or -1 when it is no power of two
  int capacity;       // tokens of a sequence's pages
  int max_blocks;     // of the batch that positions can count
  int stages;         // of the ring
  float* partials;    // two for each worker: of the item it begins in, and of the one it ends in
  int partial_words;  // from one to the next
  bool in_slices;     // the tokens of a warp's slice lie in one page, and the strides are these
  ByteStrides k_strides, v_strides;
};

// A unit is what a CTA loads at a time: one slice of tokens for each warp. A warp computes the attention of
// 8 * row_tiles query rows; team_warps warps with rows of their own share the slices of all of them. With
// `wgmma` a team is a warpgroup, and WarpgroupState does what AttentionState does for the others.
template <class Compute, class Cache, int head_dim, int max_sources, int row_tiles, int team_warps,
          bool wgmma = false>
struct AttentionShape {
  using T = Compute;  // of the tensor-core operands: f16 or bf16
  using C = Cache;    // of the sources: T or e4m3
  static constexpr int D = head_dim, kSources = max_sources;
  static constexpr int kRowTiles = row_tiles, kTeamWarps = team_warps;
  static constexpr bool kWgmma = wgmma;
  static constexpr int kRowBytes = D * sizeof(C), kRowChunks = kRowBytes / 16;
  static constexpr int kTokenBytes = 2 * kSources * kRowBytes;
  // Slices of 8 KB for 8 warps, so that a unit is 64 KB: what an SM must have in flight. A warp alone needs
  // 16 tokens to fill a tensor-core tile, so where those take 16 KB there are 4 warps.
  static constexpr int kFullSlice = 8192 / kTokenBytes;
  static constexpr int kSliceTokens =
      kFullSlice > 32 ? 32 : (kFullSlice * kTeamWarps < 16 ? 16 / kTeamWarps : kFullSlice);
  static constexpr int kWarps = kSliceTokens * kTokenBytes <= 8192 ? 8 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTeams = kWarps / kTeamWarps;
  static constexpr int kWarpRows = 8 * kRowTiles, kRows = kWarpRows * kTeamWarps;
  static constexpr int kUnitTokens = kWarps * kSliceTokens, kUnitBlocks = kUnitTokens / kBlockTokens;
  static constexpr int kTeamTokens = kTeamWarps * kSliceTokens;
  static constexpr int kStepTokens = kTeamTokens < 32 ? 16 : 32;  // that one step of the softmax takes
  static constexpr int kPlaneBytes = kUnitTokens * kRowBytes;     // of one source in a unit
  // For wgmma a row lies in pieces of 128 bytes, each in a tile of its own.
  static constexpr int kPieceBytes = kWgmma ? 128 : kRowBytes, kPieceChunks = kPieceBytes / 16;
  static constexpr int kTileBytes = kUnitTokens * kPieceBytes;
  // A stage holds the planes of a unit and, where an item begins, its query rows and fusion weights.
  static constexpr int kQueryOffset = 2 * kSources * kPlaneBytes,
                       kWeightOffset = kQueryOffset + kRows * D * 2;
  static constexpr int kAlignment = kWgmma ? 1024 : kRowAlignment;
  // Where the weighted queries of two wide sources would not fit into registers, they lie before the ring.
  static constexpr bool kSharedQueries = kWgmma && kSources == 2 && D == 128;
  static constexpr int kQueryTileBytes = 64 * 128;  // of 64 channels
  static constexpr int kQueryBytes = kSharedQueries ? kSources * (D / 64) * kQueryTileBytes : 0;
  static constexpr int kStageBytes =
      (kWeightOffset + 2 * kSources * D * 4 + kAlignment - 1) / kAlignment * kAlignment;
  // A partial result, of a team or of a worker: query rows of D weighted sums, the maximum and the sum. The
  // four floats after the channels also make lanes that finish a tile fall into different banks.
  static constexpr int kPartialRow = D + 4, kPartialFloats = kRows * kPartialRow;
  static_assert(kTeams * kPartialFloats * 4 <= kStageBytes, "a stage is where the teams meet");
  static_assert(!kWgmma || (team_warps == 4 && kWarps == 8 && kTeamTokens % 32 == 0 && sizeof(C) == 2));
};

// Where chunk 0 of a row goes: a row's 16-byte chunks are XORed with a number that differs between the rows
// that ldmatrix reads together, so that they fall into different banks. Only the low bits of the row matter.
template <int chunks>
__device__ __forceinline__ int row_swizzle(int row) {
  static_assert(chunks == 4 || chunks % 8 == 0);
  return chunks == 4 ? row / 2 & 3 : row & 7;
}

// Byte offset of a chunk in a tile of rows.
template <int chunks>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  return (row * chunks + (chunk ^ row_swizzle<chunks>(row))) * 16;
}

// What is known of a sequence: its blocks in the schedule, and its length.
struct SequenceInfo {
  int begin, end, length;

  __device__ static SequenceInfo load(const AttentionParams& p, int seq) {
    return {p.schedule[seq], p.schedule[seq + 1], p.seq_lens[seq]};
  }
  // Of the first 32 sequences, one a lane; of the last one for lanes beyond the batch.
  __device__ static SequenceInfo load_first(const AttentionParams& p) {
    return load(p, min(int(threadIdx.x % 32), p.batch - 1));
  }
};

// A place in the order of blocks. Like every number in device memory the schedule is not trusted: with any
// contents the place stays inside the batch, so that a wrong schedule gives wrong results and no more.
struct BlockCursor {
  int seq, head, row_block, block;
  int blocks, length, first;  // of the sequence; first: position of the first token that is seen
  SequenceInfo next;          // loaded long before it is needed: see UnitLoader

  // Position of the first token of the block.
  __device__ int start() const { return first / kBlockTokens * kBlockTokens + block * kBlockTokens; }

  __device__ void enter_sequence(const AttentionParams& p, const SequenceInfo& info) {
    blocks = max(1, info.end - info.begin);
    length = max(0, min(info.length, p.capacity));
    first = first_visible(length, p.num_query_tokens, p.window);
    next = SequenceInfo::load(p, seq + 1 < p.batch ? seq + 1 : 0);
  }

  // To block `at` of the batch. `info`: from load_first().
  __device__ void seek(const AttentionParams& p, int head_row, int at, SequenceInfo info) {
    const int lane = threadIdx.x % 32;
    SequenceInfo own = info;
    seq = 0;
    for (int base = 0; p.batch > 1;) {
      const int found = __popc(__ballot_sync(~0u, base + lane < p.batch && info.begin <= at));
      const int last = max(found - 1, 0);
      const SequenceInfo candidate = {__shfl_sync(~0u, info.begin, last), __shfl_sync(~0u, info.end, last),
                                      __shfl_sync(~0u, info.length, last)};
      if (found > 0 || base == 0) seq = base + last, own = candidate;
      base += 32;
      if (found < 32 || base >= p.batch) break;
      info = SequenceInfo::load(p, min(base + lane, p.batch - 1));
    }
    enter_sequence(p, own);
    head_row = min(head_row, p.num_kv_heads * p.row_blocks - 1);
    head = head_row, row_block = 0;
    if (p.row_blocks > 1) head = head_row / p.row_blocks, row_block = head_row % p.row_blocks;
    block = max(0, min(at - own.begin, blocks - 1));
  }

  __device__ void advance(const AttentionParams& p, int count) {
    block += count;
    if (block < blocks) return;
    block = 0;
    if (++seq == p.batch) {
      seq = 0;
      if (++row_block == p.row_blocks) row_block = 0, head = min(head + 1, p.num_kv_heads - 1);
    }
    if (p.batch > 1) enter_sequence(p, SequenceInfo(next));  // a copy, because it overwrites `next`
  }

  // Blocks of the unit here: up to the end of the item and of the worker's range.
  template <class S>
  __device__ int unit_blocks(int left) const {
    return min(min(S::kUnitBlocks, blocks - block), left);
  }
};

// Loads one warp's slice of each unit. An ordinary load returns after the asynchronous copies that were
// issued before it, however near its data is; so what the next unit needs (its pages, the next sequence) is
// asked for before the copies of this one, and queries and weights are copied with their unit.
template <class S>
struct UnitLoader {
  using C = typename S::C;
  BlockCursor at;
  int left;                  // blocks
  bool new_item = true;      // the unit is the first of its item, or of the worker
  bool inside;               // the lane's token may be seen, if its page is in the cache
  int page, offset_in_page;  // of the slice's first token where it lies in one page, else of the lane's token

  __device__ UnitLoader(const AttentionParams& p, const BlockCursor& start, int blocks)
      : at(start), left(blocks) {
    look_up(p);
  }

  // Issues the copies of the unit here and moves to the next.
  __device__ __forceinline__ void load_unit(const AttentionParams& p, char* stage, uint8_t* visible) {
    const UnitLoader unit = *this;
    const uint32_t mask = __ballot_sync(~0u, inside && index_is_inside(page, p.cache.num_pages));
    const int count = at.unit_blocks<S>(left);
    left -= count;
    if (left > 0) {
      at.advance(p, count);
      new_item = at.block == 0;
      look_up(p);
    }
    unit.issue(p, stage, visible, mask);
  }

 private:
  __device__ void look_up(const AttentionParams& p) {
    const int slice = threadIdx.x / 32 * S::kSliceTokens, token = slice + threadIdx.x % S::kSliceTokens;
    const int start = at.start(), end = min(at.unit_blocks<S>(left) * kBlockTokens, at.length - start);
    inside = token < end && start + token >= at.first;
    const int paged = p.in_slices ? slice : token;
    const unsigned position = start + paged, page_size = p.cache.page_size;
    const unsigned entry = p.page_shift >= 0 ? position >> p.page_shift : position / page_size;
    offset_in_page = position - entry * page_size;
    page = -1;
    if (paged < end && position < unsigned(at.length))
      page = p.block_table[at.seq * p.block_table_stride + entry];
  }

  __device__ __forceinline__ void issue(const AttentionParams& p, char* stage, uint8_t* visible,
                                        uint32_t mask) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) {
      if constexpr (S::kSliceTokens == 32) reinterpret_cast<uint32_t*>(visible)[warp] = mask;
      if constexpr (S::kSliceTokens == 16) reinterpret_cast<uint16_t*>(visible)[warp] = mask;
      if constexpr (S::kSliceTokens == 8) visible[warp] = mask;
    }
    if (new_item) copy_item(p, stage);
    char* const values = stage + S::kSources * S::kPlaneBytes;
    if (p.in_slices) {
      copy_slice(p.k_sources, p.num_k_sources, p.k_strides, mask, stage);
      copy_slice(p.v_sources, p.num_v_sources, p.v_strides, mask, values);
    } else {
      copy_rows(p.k_sources, p.num_k_sources, mask, stage);
      copy_rows(p.v_sources, p.num_v_sources, mask, values);
    }
  }

  static constexpr int kRowsAtOnce = 32 / S::kRowChunks, kCopies = S::kSliceTokens / kRowsAtOnce;

  // Shared address of this lane's chunk of its i-th row; `own` is that of its first. Offsets in a row are
  // XORed into whole addresses.
  static __device__ __forceinline__ uint32_t destination(uint32_t own, int i) {
    return (own ^ row_swizzle<S::kPieceChunks>(i * kRowsAtOnce) * 16) + i * kRowsAtOnce * S::kPieceBytes;
  }
  static __device__ __forceinline__ uint32_t first_destination(const char* planes) {
    const int row = threadIdx.x / 32 * S::kSliceTokens + threadIdx.x % 32 / S::kRowChunks;
    const int chunk = threadIdx.x % S::kRowChunks;
    return smem_address(planes + chunk / S::kPieceChunks * S::kTileBytes +
                        swizzled<S::kPieceChunks>(row, chunk % S::kPieceChunks));
  }
  static __device__ __forceinline__ void copy_chunk(uint32_t to, const void* from, bool valid) {
    constexpr int kFetch = S::kRowBytes < 128 ? 256 : 128;
    cp_async_16<kFetch>(to, from, valid);
  }

  // The rows of a slice that lies in one page are at equal distances.
  __device__ __forceinline__ void copy_slice(const PagedCache (&sources)[2], int count,
                                             const ByteStrides& strides, uint32_t mask, char* planes) const {
    const unsigned row = threadIdx.x % 32 / S::kRowChunks, chunk = threadIdx.x % S::kRowChunks;
    const auto product = [](unsigned a, unsigned b) { return uint64_t{a} * b; };  // one instruction
    const uint64_t from = product(mask ? page : 0, strides.page) + product(at.head, strides.head) +
                          product(offset_in_page + row, strides.token) + chunk * 16;
    const uint32_t to = first_destination(planes), valid = mask >> row;
#pragma unroll
    for (int s = 0; s < S::kSources; ++s) {
      if (s > 0 && count == 1) break;
      const char* const source = static_cast<const char*>(sources[s].data) + from;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        copy_chunk(destination(to, i) + s * S::kPlaneBytes, source + product(strides.token, i * kRowsAtOnce),
                   valid >> i * kRowsAtOnce & 1);
      }
    }
  }

  __device__ __forceinline__ void copy_rows(const PagedCache (&sources)[2], int count, uint32_t mask,
                                            char* planes) const {
    const int lane = threadIdx.x % 32;
    const PagedCache& layout = sources[0];  // sources of one side share their strides
    const bool visible = mask >> lane % S::kSliceTokens & 1;
    const int64_t own = visible ? page * layout.page_stride + offset_in_page * layout.token_stride : 0;
    const uint32_t to = first_destination(planes);
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const int row = i * kRowsAtOnce + lane / S::kRowChunks;
      const int64_t from = __shfl_sync(~0u, own, row) + at.head * layout.head_stride +
                           threadIdx.x % S::kRowChunks * (16 / sizeof(C));
#pragma unroll 1
      for (int s = 0; s < count; ++s) {
        copy_chunk(destination(to, i) + s * S::kPlaneBytes, static_cast<const C*>(sources[s].data) + from,
                   mask >> row & 1);
      }
    }
  }

  // Query rows in the order token * G + head, and weights.
  __device__ __forceinline__ void copy_item(const AttentionParams& p, char* stage) const {
    const int group = p.group, rows = group * p.num_query_tokens;
    const int head = at.head, first_row = at.row_block * S::kRows;
    constexpr int kChunks = S::D / 8;
#pragma unroll 1
    for (int i = threadIdx.x; i < S::kRows * kChunks; i += S::kThreads) {
      const int local = i / kChunks, chunk = i % kChunks, row = first_row + local;
      const bool valid = row < rows;
      int64_t from = at.seq * p.q_batch_stride + (head * group + row) * p.q_head_stride + chunk * 8;
      if (p.num_query_tokens > 1) from += row / group * (p.q_token_stride - group * p.q_head_stride);
      cp_async_16(smem_address(stage + S::kQueryOffset + swizzled<kChunks>(local, chunk)),
                  static_cast<const typename S::T*>(p.q) + (valid ? from : 0), valid);
    }
    constexpr int kSide = S::kSources * S::D / 4;  // 16-byte chunks of the weights of one side
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * kSide; i += S::kThreads) {
      const bool values = i >= kSide;
      const int s = i % kSide / (S::D / 4), chunk = i % (S::D / 4);
      const float* const weights = values ? p.value_weights : p.key_weights;
      if (weights && s < (values ? p.num_v_sources : p.num_k_sources)) {
        cp_async_16(smem_address(stage + S::kWeightOffset + i * 16),
                    weights + (s * p.num_kv_heads + head) * S::D + chunk * 4, true);
      }
    }
  }
};

__device__ __forceinline__ void wait_for_oldest(int stages) {
  switch (stages) {  // leave stages - 2 groups in flight; the instruction takes constants only
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

// Meets the other warps of this warp's team.
template <class S>
__device__ __forceinline__ void team_barrier() {
  if constexpr (S::kTeamWarps == 1) {
    __syncwarp();
  } else {
    const int team = threadIdx.x / 32 / S::kTeamWarps;
    static_assert(S::kTeams == 2 || S::kTeams == 4);
    constexpr int kThreads = 32 * S::kTeamWarps;
    if (team == 0) named_barrier_wait<1, kThreads>();
    if (team == 1) named_barrier_wait<2, kThreads>();
    if (S::kTeams > 2 && team == 2) named_barrier_wait<3, kThreads>();
    if (S::kTeams > 2 && team == 3) named_barrier_wait<4, kThreads>();
  }
}

}  // namespace fusedkv

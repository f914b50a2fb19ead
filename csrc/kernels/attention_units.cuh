// Where a worker of fused_attention is in its range of blocks, and how it brings units of them, queries and
// fusion weights into shared memory.
#pragma once

#include <cmath>

#include "common/l2_policy.cuh"
#include "common/mbarrier.cuh"
#include "common/mma.cuh"
#include "common/overlap.cuh"
#include "schedule.cuh"

namespace fusedkv {

constexpr int kMaxStages = 6;
constexpr int kRowAlignment = 256;      // the widest row
constexpr float kLeastKept = 1.f / 16;  // of the sources: to keep less saves less than it costs the rest

// Strides of the caches of one side in bytes, where they fit: 64-bit products are several instructions.
struct ByteStrides {
  uint32_t page, token, head;
};

// What the kernel gets: the op's arguments, and what the host derives from them once.
struct AttentionParams : FusedAttentionParams {
  int group;       // query heads of a key/value head
  int row_blocks;  // of a key/value head
  int page_shift;  // log2 of the page size, or -1 when it is no power of two
  int capacity;    // tokens of a sequence's pages
  int max_blocks;  // of a range, at most
  int stages;      // of the ring
  const RangePlace* places;
  float* partials;                  // two for each worker: see plan_merge()
  int partial_words;                // from one to the next
  int row_groups, inverse_of_rows;  // see RowAdders; 65536 / rows of an item, rounded up
  float kept_blocks;                // so many blocks' bytes of the sources stay in the L2
  bool merges_apart;                // attention_merge_kernel merges them
  bool in_slices;                   // the tokens of a warp's slice lie in one page, and the strides are these
  ByteStrides k_strides, v_strides;
};

// Floats of a query row's partial result: D weighted sums, the maximum and the sum of exponentials. The four
// after the channels also make lanes that finish a tile fall into different banks.
__host__ __device__ constexpr int partial_row(int head_dim) { return head_dim + 4; }

// A unit is what a CTA loads at a time: one slice of tokens for each warp that computes. Such a warp computes
// the attention of 8 * row_tiles query rows; team_warps warps with rows of their own share the slices of all
// of them. With `wgmma` a team is a warpgroup, and WarpgroupState does what AttentionState does for the
// others.
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
  static constexpr int kThreads = 32 * kWarps;  // that compute, the first of the CTA
  // Where a warp computes little it loads its slices itself: with one tile of query rows, and one source in
  // 16 bits or two of D = 64. Elsewhere other warps load for it, which takes longer at the start and then
  // less: docs/kernels.md has the times.
  static constexpr bool kLoadsItself =
      row_tiles == 1 && team_warps == 1 && (max_sources == 1 ? sizeof(Cache) == 2 : head_dim == 64);
  static constexpr int kLoaderWarps = kLoadsItself ? 0 : 4;
  static constexpr int kLoadingThreads = kLoadsItself ? kThreads : 32 * kLoaderWarps;
  static constexpr int kFirstLoader = kLoadsItself ? 0 : kWarps;
  static constexpr int kCtaThreads = kThreads + 32 * kLoaderWarps;
  // Where 168 registers a thread, what 12 warps get, are too few to compute, the loaders hand some over.
  static constexpr bool kMovesRegisters =
      !kLoadsItself && kWarps == 8 && (kWgmma || kSources * kRowTiles * D == 512);
  static constexpr int kLoaderRegisters = 104, kRegisters = 200;
  static constexpr int kTeams = kWarps / kTeamWarps;
  static constexpr int kWarpRows = 8 * kRowTiles, kRows = kWarpRows * kTeamWarps;
  static constexpr int kUnitTokens = kWarps * kSliceTokens, kUnitBlocks = kUnitTokens / kBlockTokens;
  static constexpr int kTeamTokens = kTeamWarps * kSliceTokens;
  static_assert(kUnitBlocks == 1 || kUnitBlocks == 2 || kUnitBlocks == 4);
  static constexpr int kUnitSize = kUnitBlocks / 2;               // see RangePlace
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
  // A partial result, of a team or of a worker, is as many rows as the item has.
  static constexpr int kPartialRow = partial_row(D), kPartialFloats = kRows * kPartialRow;
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

constexpr int kMostBlocks = INT32_MAX / kBlockTokens;  // of a sequence

// What is known of a sequence: its blocks in the schedule, and its length.
struct SequenceInfo {
  int begin, end, length;

  __device__ static SequenceInfo load(const AttentionParams& p, int seq) {
    return {p.schedule[seq], p.schedule[seq + 1], p.seq_lens[seq]};
  }
};

// A place in the order of blocks. Like every number in device memory the schedule is not trusted: with any
// contents the place stays inside the batch, so that a wrong schedule gives wrong results and no more.
struct BlockPlace {
  int seq, head, row_block, block;
  int blocks, length, first;  // of the sequence; first: position of the first token that is seen
  int remaining;              // blocks of the worker, from here on

  // Blocks up to the end of the item or of the worker's range.
  __device__ int item_blocks() const { return min(blocks - block, remaining); }
  // Position of the first token of the block.
  __device__ int start() const { return first / kBlockTokens * kBlockTokens + block * kBlockTokens; }
  // Of the first query token, from start(): the tokens before it may be loaded early.
  __device__ int newest(const AttentionParams& p) const { return length - p.num_query_tokens - start(); }
};

// A place that moves on.
struct BlockCursor : BlockPlace {
  SequenceInfo next;  // asked for long before it is needed: see load_next

  __device__ void enter_sequence(const AttentionParams& p, const SequenceInfo& info) {
    blocks = max(1, min(info.end - info.begin, kMostBlocks));
    length = max(0, min(info.length, p.capacity));
    first = first_visible(length, p.num_query_tokens, p.window);
  }
  __device__ void load_next(const AttentionParams& p) {
    if (p.batch > 1) next = SequenceInfo::load(p, seq + 1 < p.batch ? seq + 1 : 0);
  }

  // To where a range begins.
  __device__ void begin_at(const AttentionParams& p, const RangePlace& range, int head_row) {
    seq = max(0, min(range.seq, p.batch - 1));
    enter_sequence(p, {0, range.blocks, range.length});
    load_next(p);
    block = max(0, min(range.block, blocks - 1));
    remaining = min(range.remaining, p.max_blocks);
    head_row = max(0, min(head_row, p.num_kv_heads * p.row_blocks - 1));
    head = head_row, row_block = 0;
    if (p.row_blocks > 1) head = head_row / p.row_blocks, row_block = head_row % p.row_blocks;
  }

  // The end of the worker's range is in its last item.
  __device__ void advance(const AttentionParams& p, int count) {
    block += count, remaining -= count;
    if (block < blocks || remaining == 0) return;
    block = 0;
    if (++seq == p.batch) {
      seq = 0;
      if (++row_block == p.row_blocks) row_block = 0, head = min(head + 1, p.num_kv_heads - 1);
    }
    if (p.batch > 1) enter_sequence(p, next);
    load_next(p);
  }
};

// How long the L2 keeps the sources.
__device__ __forceinline__ uint64_t source_policy(const AttentionParams& p) {
  if (p.kept_blocks == 0.f) return stream_policy();
  const float share = __fdividef(p.kept_blocks, max(1, p.schedule[p.batch]));
  return share < kLeastKept ? stream_policy() : keep_policy(fminf(1.f, share));
}

// How loaders and the warps that compute tell each other about the stages of the ring. A warp that loads for
// itself waits for its own copies and needs no barriers.
template <class S>
struct RingControl {
  alignas(8) uint8_t visible[kMaxStages][S::kUnitTokens / 8];  // one bit a token: it may be seen
  static constexpr int kBarriers = S::kLoadsItself ? 1 : kMaxStages;
  uint64_t full[kBarriers][S::kTeams], empty[kBarriers][S::kTeams];  // the slices of a team
  // The queries and weights of an item that begins in the stage: there, and read by all.
  uint64_t item[kBarriers], started[kBarriers];
  // Empty, where an item ended. All threads that compute used the stage then; that those of other teams have
  // left it follows from what the loader waits for anyway, but only this says it to racecheck.
  uint64_t met[kBarriers];
  // Where each warp loads for itself: the item that begins in the stage, or the end of all.
  BlockPlace place[S::kLoadsItself ? kMaxStages : 1][S::kLoadsItself ? S::kWarps : 1];

  __device__ void init(int stages) {
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // in a uniform register
    if (threadIdx.x % 32 > 0) return;
#pragma unroll 1
    for (int i = 0; i < stages; ++i) {
      if (warp < S::kTeams) {
        mbarrier_init(smem_address(&full[i][warp]), S::kTeamWarps * (32 + 1));  // copies, and the bits
        mbarrier_init(smem_address(&empty[i][warp]), S::kTeamWarps * 32);
      }
      if (warp == 0) mbarrier_init(smem_address(&item[i]), S::kLoadingThreads);
      if (warp == 0) mbarrier_init(smem_address(&started[i]), S::kThreads);
      if (warp == 0) mbarrier_init(smem_address(&met[i]), S::kThreads);
    }
  }

  // The thread has read its team's slices.
  __device__ __forceinline__ void leave(const RingPlace& place, int team) {
    mbarrier_arrive(smem_address(&empty[place.stage][team]));
  }
  // And the stage in which the teams met.
  __device__ __forceinline__ void leave_meeting(const RingPlace& place, int team) {
    leave(place, team);
    mbarrier_arrive(smem_address(&met[place.stage]));
  }
};

// Copies a slice, or a thread's share of the queries and weights, into a stage.
template <class S>
struct StageCopies {
  using C = typename S::C;

  // Bits: of the tokens of the slice.
  static __device__ __forceinline__ void write_visible(uint8_t* visible, int slice, uint32_t mask) {
    if constexpr (S::kSliceTokens == 32) reinterpret_cast<uint32_t*>(visible)[slice] = mask;
    if constexpr (S::kSliceTokens == 16) reinterpret_cast<uint16_t*>(visible)[slice] = mask;
    if constexpr (S::kSliceTokens == 8) visible[slice] = mask;
  }

  // `page` and `offset`: of the slice's first token where it lies in one page, else of the lane's token.
  static __device__ __forceinline__ void copy_sources(const AttentionParams& p, int head, int page,
                                                      int offset, uint32_t mask, char* stage, int slice,
                                                      uint64_t policy) {
    const uint32_t keys = first_destination(stage, slice);
    const uint32_t values = first_destination(stage + S::kSources * S::kPlaneBytes, slice);
    if (p.in_slices) {
      copy_slice(p.k_sources, p.num_k_sources, p.k_strides, head, page, offset, mask, keys, policy);
      copy_slice(p.v_sources, p.num_v_sources, p.v_strides, head, page, offset, mask, values, policy);
    } else {
      copy_rows(p.k_sources, p.num_k_sources, head, page, offset, mask, keys, policy);
      copy_rows(p.v_sources, p.num_v_sources, head, page, offset, mask, values, policy);
    }
  }

  // Query rows in the order token * G + head, and weights.
  static __device__ __forceinline__ void copy_item(const AttentionParams& p, int seq, int head, int row_block,
                                                   char* stage) {
    const int group = p.group, rows = group * p.num_query_tokens;
    const int first_row = row_block * S::kRows;
    constexpr int kChunks = S::D / 8;
#pragma unroll 1
    for (int i = threadIdx.x - 32 * S::kFirstLoader; i < S::kRows * kChunks; i += S::kLoadingThreads) {
      const int local = i / kChunks, chunk = i % kChunks, row = first_row + local;
      const bool valid = row < rows;
      int64_t from = seq * p.q_batch_stride + (head * group + row) * p.q_head_stride + chunk * 8;
      if (p.num_query_tokens > 1) from += row / group * (p.q_token_stride - group * p.q_head_stride);
      cp_async_16(smem_address(stage + S::kQueryOffset + swizzled<kChunks>(local, chunk)),
                  static_cast<const typename S::T*>(p.q) + (valid ? from : 0), valid);
    }
    constexpr int kSide = S::kSources * S::D / 4;  // 16-byte chunks of the weights of one side
#pragma unroll 1
    for (int i = threadIdx.x - 32 * S::kFirstLoader; i < 2 * kSide; i += S::kLoadingThreads) {
      const bool values = i >= kSide;
      const int s = i % kSide / (S::D / 4), chunk = i % (S::D / 4);
      const float* const weights = values ? p.value_weights : p.key_weights;
      if (weights && s < (values ? p.num_v_sources : p.num_k_sources)) {
        cp_async_16(smem_address(stage + S::kWeightOffset + i * 16),
                    weights + (s * p.num_kv_heads + head) * S::D + chunk * 4, true);
      }
    }
  }

 private:
  static constexpr int kRowsAtOnce = 32 / S::kRowChunks, kCopies = S::kSliceTokens / kRowsAtOnce;

  // Shared address of this lane's chunk of its i-th row; `own` is that of its first. Offsets in a row are
  // XORed into whole addresses.
  static __device__ __forceinline__ uint32_t destination(uint32_t own, int i) {
    return (own ^ row_swizzle<S::kPieceChunks>(i * kRowsAtOnce) * 16) + i * kRowsAtOnce * S::kPieceBytes;
  }
  static __device__ __forceinline__ uint32_t first_destination(const char* planes, int slice) {
    const int row = slice * S::kSliceTokens + threadIdx.x % 32 / S::kRowChunks;
    const int chunk = threadIdx.x % S::kRowChunks;
    const uint32_t start =
        smem_address(planes + chunk / S::kPieceChunks * S::kTileBytes + row * S::kPieceBytes);
    // Not swizzled(): of an address that is a sum, one part in a uniform register, ptxas 13.0 makes an
    // illegal instruction where there is a policy.
    return start ^ (chunk % S::kPieceChunks ^ row_swizzle<S::kPieceChunks>(row)) * 16;
  }

  // The rows of a slice that lies in one page are at equal distances.
  static __device__ __forceinline__ void copy_slice(const PagedCache (&sources)[2], int count,
                                                    const ByteStrides& strides, int head, int page,
                                                    int offset, uint32_t mask, uint32_t to, uint64_t policy) {
    const unsigned row = threadIdx.x % 32 / S::kRowChunks, chunk = threadIdx.x % S::kRowChunks;
    const auto product = [](unsigned a, unsigned b) { return uint64_t{a} * b; };  // one instruction
    const uint64_t from = product(mask ? page : 0, strides.page) + product(head, strides.head) +
                          product(offset + row, strides.token) + chunk * 16;
    const uint32_t valid = mask >> row;
#pragma unroll
    for (int s = 0; s < S::kSources; ++s) {
      if (s > 0 && count == 1) break;
      const char* const source = static_cast<const char*>(sources[s].data) + from;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        cp_async_16(destination(to, i) + s * S::kPlaneBytes, source + product(strides.token, i * kRowsAtOnce),
                    valid >> i * kRowsAtOnce & 1, policy);
      }
    }
  }

  // `page` and `offset`: of the lane's token.
  static __device__ __forceinline__ void copy_rows(const PagedCache (&sources)[2], int count, int head,
                                                   int page, int offset, uint32_t mask, uint32_t to,
                                                   uint64_t policy) {
    const int lane = threadIdx.x % 32;
    const PagedCache& layout = sources[0];  // sources of one side share their strides
    const bool visible = mask >> lane % S::kSliceTokens & 1;
    const int64_t own = visible ? page * layout.page_stride + offset * layout.token_stride : 0;
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const int row = i * kRowsAtOnce + lane / S::kRowChunks;
      const int64_t from = __shfl_sync(~0u, own, row) + head * layout.head_stride +
                           threadIdx.x % S::kRowChunks * (16 / sizeof(C));
#pragma unroll 1
      for (int s = 0; s < count; ++s) {
        cp_async_16(destination(to, i) + s * S::kPlaneBytes, static_cast<const C*>(sources[s].data) + from,
                    mask >> row & 1, policy);
      }
    }
  }
};

// Loads the slices of some warps, of each unit. An ordinary load returns after the asynchronous copies that
// were issued before it, however near its data is; so the pages of the units to come (and the next sequence)
// are asked for many units at a time, those of a window, before the copies of the window before, and queries
// and weights are copied with their unit.
template <class S>
struct UnitLoader {
  static constexpr int kSlices = S::kWarps / S::kLoaderWarps;
  static constexpr int kPages = kSlices * S::kSliceTokens <= 32 ? 1 : kSlices * S::kSliceTokens / 32;

  // Successive units of an item.
  struct Window {
    int steps = 0;  // slices to load, kSlices of each unit
    int seq, head, row_block;
    bool new_item;   // the first unit is the first of its item, or of the worker
    bool ends_item;  // the last unit is the last of its item
    // Tokens that may be seen, if their pages are in the cache, and the query tokens among them; counted from
    // the first token of the window.
    int first, end, newest;
    // Of the first token of step `lane` where slices lie in one page each; else of tokens lane, lane + 32,
    // and so on of the window, which then is one unit.
    int page[kPages], offset_in_page[kPages];
  };
  BlockCursor at;  // the end of the last window
  const uint64_t policy;
  bool new_item = true;
  const int first_slice = (int(threadIdx.x) / 32 - S::kFirstLoader) * kSlices;

  __device__ UnitLoader(const BlockCursor& start, uint64_t policy) : at(start), policy(policy) {}

  __device__ __forceinline__ void load_all(const AttentionParams& p, char* ring, RingControl<S>& control) {
    RingPlace place;
    Window window;
    // Bits: the stages in which an item ended; the parities of `met`, and of `started`.
    uint32_t met = 0, met_parities = 0, started_parities = ~0u;
    do {  // the first time only looks up
      const Window now = window;
      window.steps = 0;
      if (at.remaining > 0) look_up(p, window);
#pragma unroll 1
      for (int step = 0; step < now.steps; ++step) {
        const uint32_t bit = 1u << place.stage;
        if (met & bit) {
          mbarrier_wait(smem_address(&control.met[place.stage]), (met_parities & bit) != 0);
          met ^= bit, met_parities ^= bit;
        }
        char* const stage = ring + place.stage * S::kStageBytes;
        if (step_token(step) + S::kSliceTokens > now.newest) wait_for_previous_kernels();
        load_slice(p, now, step, place, stage, control);
        if (now.new_item && step == kSlices - 1) {
          // By a barrier of its own: within an item teams may be any number of rounds apart, of which `empty`
          // only tells whether they are odd.
          mbarrier_wait(smem_address(&control.started[place.stage]), (started_parities & bit) != 0);
          started_parities ^= bit;
          // Last, because the kernel before this one made the queries.
          wait_for_previous_kernels();
          StageCopies<S>::copy_item(p, now.seq, now.head, now.row_block, stage);
          mbarrier_arrive_after_copies(smem_address(&control.item[place.stage]));
        }
        if ((step + 1) % kSlices > 0) continue;
        if (now.ends_item && step + 1 == now.steps) met |= bit;
        place.next(p.stages);
      }
    } while (window.steps > 0);
  }

 private:
  // Of the first token of a step, from the first one of the window.
  __device__ __forceinline__ int step_token(int step) const {
    return step / kSlices * S::kUnitTokens + (first_slice + step % kSlices) * S::kSliceTokens;
  }

  // The next window.
  __device__ __forceinline__ void look_up(const AttentionParams& p, Window& window) {
    const int lane = threadIdx.x % 32, start = at.start();
    const int blocks = min(at.item_blocks(), (p.in_slices ? 32 / kSlices : 1) * S::kUnitBlocks);
    window = {(blocks + S::kUnitBlocks - 1) / S::kUnitBlocks * kSlices,
              at.seq,
              at.head,
              at.row_block,
              new_item,
              false,
              at.first - start,
              min(blocks * kBlockTokens, at.length - start),
              at.newest(p)};
#pragma unroll
    for (int i = 0; i < kPages; ++i) {
      const int token = p.in_slices ? step_token(lane) : step_token(0) + lane + 32 * i;
      const unsigned position = start + token, page_size = p.cache.page_size;
      const unsigned entry = p.page_shift >= 0 ? position >> p.page_shift : position / page_size;
      window.offset_in_page[i] = position - entry * page_size;
      window.page[i] = -1;
      if (token < window.end && position < unsigned(at.length))
        window.page[i] = p.block_table[at.seq * p.block_table_stride + entry];
    }
    at.advance(p, blocks);
    window.ends_item = new_item = at.block == 0;
  }

  __device__ __forceinline__ void load_slice(const AttentionParams& p, const Window& window, int step,
                                             const RingPlace& place, char* stage,
                                             RingControl<S>& control) const {
    const int lane = threadIdx.x % 32, slice = first_slice + step % kSlices;
    const int token = step_token(step) + lane % S::kSliceTokens;
    const int from = p.in_slices ? step : step * S::kSliceTokens + lane % S::kSliceTokens;
    const auto of_step = [&](const int (&values)[kPages]) {
      int value = __shfl_sync(~0u, values[0], from % 32);
#pragma unroll
      for (int i = 1; i < kPages; ++i) {  // all are exchanged: one chosen before would lie in local memory
        const int other = __shfl_sync(~0u, values[i], from % 32);
        if (!p.in_slices && from / 32 == i) value = other;
      }
      return value;
    };
    const int page = of_step(window.page), offset = of_step(window.offset_in_page);
    const bool inside = token >= window.first && token < window.end;
    const uint32_t mask = __ballot_sync(~0u, inside && index_is_inside(page, p.cache.num_pages));

    const int team = slice / S::kTeamWarps;
    mbarrier_wait(smem_address(&control.empty[place.stage][team]), place.parity ^ 1);
    __syncwarp();
    const uint32_t full = smem_address(&control.full[place.stage][team]);
    if (lane == 0) {
      StageCopies<S>::write_visible(control.visible[place.stage], slice, mask);
      mbarrier_arrive(full);
    }
    StageCopies<S>::copy_sources(p, window.head, page, offset, mask, stage, slice, policy);
    mbarrier_arrive_after_copies(full);
  }
};

// Leaves stages - 2 groups of copies in flight; the instruction takes constants only.
__device__ __forceinline__ void wait_for_oldest(int stages) {
  switch (stages) {
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

// Loads a warp's own slice of each unit. The pages of the next unit (and the next sequence) are asked for
// before the copies of this one, not in windows, because a warp that also computes would fetch more
// instructions for those.
template <class S>
struct OwnLoader {
  BlockCursor at;
  const uint64_t policy;
  bool new_item = true;      // the unit is the first of its item, or of the worker
  bool inside;               // the lane's token may be seen, if its page is in the cache
  int page, offset_in_page;  // of the slice's first token where it lies in one page, else of the lane's token
  int stage = 0;             // where the unit goes

  __device__ OwnLoader(const AttentionParams& p, const BlockCursor& start, uint64_t policy)
      : at(start), policy(policy) {
    look_up(p);
  }

  // Issues the copies of the next unit, if there is one, as a group. Called in one place of the kernel,
  // because instructions are fetched from memory too: a copy of this code costs a short kernel a microsecond.
  __device__ __forceinline__ void load_unit(const AttentionParams& p, char* ring, RingControl<S>& control) {
    if (at.remaining > 0) {
      const OwnLoader unit = *this;
      const uint32_t mask = __ballot_sync(~0u, inside && index_is_inside(page, p.cache.num_pages));
      const int slice = threadIdx.x / 32;
      at.advance(p, min(at.item_blocks(), S::kUnitBlocks));
      new_item = at.block == 0;
      if (at.remaining > 0) look_up(p);
      char* const to = ring + stage * S::kStageBytes;
      if (threadIdx.x % 32 == 0) StageCopies<S>::write_visible(control.visible[stage], slice, mask);
      if ((slice + 1) * S::kSliceTokens > unit.at.newest(p)) wait_for_previous_kernels();
      StageCopies<S>::copy_sources(p, unit.at.head, unit.page, unit.offset_in_page, mask, to, slice, policy);
      if (unit.new_item) {  // last: the kernel before this one made the queries
        wait_for_previous_kernels();
        StageCopies<S>::copy_item(p, unit.at.seq, unit.at.head, unit.at.row_block, to);
      }
      stage = stage + 1 == p.stages ? 0 : stage + 1;
      if ((new_item || at.remaining == 0) && threadIdx.x % 32 == 0) control.place[stage][slice] = at;
    }
    cp_async_commit();  // empty groups keep the count of groups equal to the count of units
  }

 private:
  __device__ void look_up(const AttentionParams& p) {
    const int slice = threadIdx.x / 32 * S::kSliceTokens, token = slice + threadIdx.x % S::kSliceTokens;
    const int start = at.start(),
              end = min(min(at.item_blocks(), S::kUnitBlocks) * kBlockTokens, at.length - start);
    inside = token < end && start + token >= at.first;
    const int paged = p.in_slices ? slice : token;
    const unsigned position = start + paged, page_size = p.cache.page_size;
    const unsigned entry = p.page_shift >= 0 ? position >> p.page_shift : position / page_size;
    offset_in_page = position - entry * page_size;
    page = -1;
    if (paged < end && position < unsigned(at.length))
      page = p.block_table[at.seq * p.block_table_stride + entry];
  }
};

// Where other warps load.
struct NoLoader {
  __device__ NoLoader(const AttentionParams&, const BlockCursor&, uint64_t) {}
};

// Meets the warps that compute.
template <class S>
__device__ __forceinline__ void compute_barrier() {
  named_barrier_wait<1, S::kThreads>();
}

}  // namespace fusedkv

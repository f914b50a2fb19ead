// Where a worker of fused_attention is in its intervals of blocks, and how it brings units of them, queries
// and fusion weights into shared memory.
#pragma once

#include <cmath>

#include "common/mma.cuh"
#include "schedule.cuh"

namespace fusedkv {

constexpr int kMaxStages = 6;
constexpr int kRingAlignment = 256;  // the widest row
static_assert(kTailMinUnits * (16 - kTailSixteenths) / 16 > kMaxStages,
              "the first unit is there, and with it the sequences, before a chunk is looked for");

// What the kernel gets: the op's arguments, and what the host derives from them once.
struct AttentionParams : FusedAttentionParams {
  int group;       // query heads of a key/value head
  int row_blocks;  // of a key/value head
  int page_shift;  // log2 of the page size, or -1 when it is no power of two
  int capacity;    // tokens of a sequence's pages
  int max_blocks;  // of the batch that positions can count
  int stages;      // of the ring

  // Counters in the schedule, zero between launches: chunks claimed, workers that claim no more, and the
  // partial results of each item.
  __device__ int* claim_counter() const { return schedule + batch + 1; }
  __device__ int* done_counter() const { return schedule + batch + 2; }
  __device__ int* merge_counter(int seq, int head, int row_block) const {
    return schedule + batch + 3 + (int64_t(seq) * num_kv_heads + head) * row_blocks + row_block;
  }
};

// A unit is what a CTA loads at a time: one slice of tokens for each warp. A warp computes the attention of
// 8 * row_tiles query rows; team_warps warps with rows of their own share the slices of all of them.
template <class Compute, class Cache, int head_dim, int max_sources, int row_tiles, int team_warps>
struct AttentionShape {
  using T = Compute;  // of the tensor-core operands: f16 or bf16
  using C = Cache;    // of the sources: T or e4m3
  static constexpr int D = head_dim, kSources = max_sources;
  static constexpr int kRowTiles = row_tiles, kTeamWarps = team_warps;
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
  // More rows than one warp has are bound by more than memory, and their partial results are large.
  static constexpr bool kHasTail = kRows <= 16;
  static constexpr int kMaxSharedItems = kHasTail ? 2 + 2 * kMaxClaims : 2;
  static_assert(kMaxSharedItems <= 32, "a lane counts the worker in at one of them");
  // A stage holds the planes of a unit and, where an item begins, its query rows and fusion weights.
  static constexpr int kQueryOffset = 2 * kSources * kPlaneBytes,
                       kWeightOffset = kQueryOffset + kRows * D * 2;
  static constexpr int kStageBytes = kWeightOffset + 2 * kSources * D * 4;
  // A partial result, of a team or of a worker: query rows of D weighted sums, the maximum and the sum. The
  // four floats after the channels also make lanes that finish a tile fall into different banks.
  static constexpr int kPartialRow = D + 4, kPartialFloats = kRows * kPartialRow;
  static_assert(kTeams * kPartialFloats * 4 <= kStageBytes, "a stage is where the teams meet");
  static_assert(kStageBytes % kRingAlignment == 0, "offsets in a row are XORed into whole addresses");
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

// Adds 1 to a counter in device memory and returns what it was; nothing waits for that until it is used. Not
// `atom.add`, which is compiled into one for the whole warp, and a wait to hand out the results.
__device__ __forceinline__ int count_claim(int* counter) {
  int before;
  asm volatile("atom.inc.relaxed.gpu.global.u32 %0, [%1], 0x7fffffff;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// Adds 1 after the writes of this thread and those that it has seen.
__device__ __forceinline__ int count_release(int* counter) {
  int before;
  asm volatile("atom.add.release.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// And before its reads, which wait.
__device__ __forceinline__ int count_arrival(int* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

// What is known of a sequence: its blocks in the schedule, and its length.
struct SequenceInfo {
  int begin, end, length;

  __device__ static SequenceInfo load(const AttentionParams& p, int seq) {
    return {p.schedule[seq], p.schedule[seq + 1], p.seq_lens[seq]};
  }
};

// The batch in shared memory, for chunks: there is no time to wait for it behind the copies of the ring.
template <int max_batch>
struct SequenceTable {
  int begins[max_batch + 1], lengths[max_batch + 1];

  // Asks for it; it is there with the copies of the first unit.
  __device__ void copy(const AttentionParams& p) {
#pragma unroll 1
    for (int i = threadIdx.x; i <= p.batch; i += blockDim.x) {
      cp_async_4(smem_address(begins + i), p.schedule + i);
      if (i < p.batch) cp_async_4(smem_address(lengths + i), p.seq_lens + i);
    }
  }
};

// An item of which this worker has left a partial result in the slots of some interval. The parts are those
// of `parts` intervals; the first has number first_place.
struct SharedItem {
  int seq, head, row_block, first_place, parts;
};

// What a warp needs to know about a unit when it gets to it.
struct alignas(16) Unit {
  static constexpr int kWhole = -1;
  int seq, head, row_block;
  int start;   // position of its first token
  int length;  // of the sequence
  int slot;    // of the workspace that the item's partial result goes to, or kWhole
  bool ends;   // it is the last of its item in this interval
};

template <class S>
struct AttentionControl {
  alignas(4) uint8_t visible[kMaxStages][S::kUnitTokens / 8];  // one bit a token: it may be seen
  Unit units[kMaxStages][S::kWarps];
  float value_weights[S::kSources][S::D];  // of the item
  SharedItem shared_items[S::kMaxSharedItems];
  // What the worker has claimed, in its order: the numbers of chunks, then kNothingLeft.
  static constexpr int kUnknown = -2, kNothingLeft = -1;
  volatile int claims[kMaxClaims + 1];
  SequenceTable<S::kHasTail ? kMaxTailBatch : 0> sequences;
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

  // To block `at` of the batch. `info`: of the first 32 sequences, one a lane; the last for lanes beyond the
  // batch.
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
    place(p, head_row, at, own);
  }

  template <int max_batch>
  __device__ void seek(const AttentionParams& p, int head_row, int at,
                       const SequenceTable<max_batch>& table) {
    int found = 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < p.batch; i += 32) found += table.begins[i] <= at;
    seq = max(int(__reduce_add_sync(~0u, found)) - 1, 0);
    place(p, head_row, at, {table.begins[seq], table.begins[seq + 1], table.lengths[seq]});
  }

  __device__ void place(const AttentionParams& p, int head_row, int at, const SequenceInfo& own) {
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

  // Blocks of the unit here: up to the end of the item and of the interval.
  template <class S>
  __device__ int unit_blocks(int left) const {
    return min(min(S::kUnitBlocks, blocks - block), left);
  }
};

// Loads one warp's slice of each unit. An ordinary load returns after the asynchronous copies that were
// issued before it, however near its data is; so what the next unit needs (its pages, the next sequence, the
// next chunk) is asked for before the copies of this one, and queries and weights are copied with their unit.
template <class S>
struct UnitLoader {
  using C = typename S::C;
  using Control = AttentionControl<S>;
  int left;  // blocks of the interval; 0 when there is nothing more to load

  // Starts with the worker's range. `first_sequences`: see BlockCursor::seek.
  __device__ UnitLoader(const AttentionParams& p, const WorkSplit& split,
                        const SequenceInfo& first_sequences) {
    enter(p, split, blockIdx.y, blockIdx.x, first_sequences);
  }

  // Issues the copies of the unit here and moves to the next. `ask` makes requests to memory of the kernel's,
  // which with a tail go out before the copies too.
  template <class Ask>
  __device__ __forceinline__ void load_unit(const AttentionParams& p, const WorkSplit& split,
                                            Control& control, char* ring, int stage, Ask&& ask) {
    const UnitLoader unit = *this;
    const uint32_t mask = __ballot_sync(~0u, index_is_inside(page, p.cache.num_pages));
    const int count = at.unit_blocks<S>(left);
    if (split.chunks > 0) {
      ask();
      claim(p, count);
    }
    left -= count;
    if (left > 0) {
      at.advance(p, count);
      new_item = at.block == 0;
      look_up(p);
    } else if (split.chunks > 0) {
      enter_claimed(p, split, control);
    }
    unit.issue(p, control.visible[stage], ring + stage * S::kStageBytes, mask);
    // While the copies are under way.
    if (unit.new_item) slot = unit.item_slot(p);
    if (threadIdx.x % 32 == 0) {
      const bool ends = unit.at.block + count == unit.at.blocks || count == unit.left;
      control.units[stage][threadIdx.x / 32] =
          Unit{unit.at.seq, unit.at.head, unit.at.row_block, unit.at.start(), unit.at.length, slot, ends};
    }
    if (unit.new_item && slot != Unit::kWhole) {
      if (threadIdx.x == 0) control.shared_items[shared_items] = unit.shared_item(p, split);
      ++shared_items;
    }
  }

 private:
  BlockCursor at;
  int interval;   // that the unit is in
  bool new_item;  // the unit is the first of its item, or of the interval
  int slot;       // of the item: see Unit
  int page, offset_in_page;
  int shared_items = 0;                 // so far
  int claims = 0;                       // that have been answered
  int claimed = Control::kNothingLeft;  // thread 0: what the next one brings

  // The head row that shares its range with others, or 0: see attention_grid().
  __device__ int column(const AttentionParams& p) const {
    return gridDim.x > 1 ? at.head * p.row_blocks + at.row_block : 0;
  }

  // To the beginning of an interval. `sequences` is what the cursor seeks in.
  template <class Sequences>
  __device__ __forceinline__ void enter(const AttentionParams& p, const WorkSplit& split, int new_interval,
                                        int column, const Sequences& sequences) {
    interval = new_interval;
    int begin = split.begin(interval), head_row = column;
    left = split.begin(interval + 1) - begin;
    if (gridDim.x == 1 && p.num_kv_heads * p.row_blocks > 1) {
      head_row = begin / split.blocks;
      begin -= head_row * split.blocks;
    }
    at.seek(p, head_row, begin, sequences);
    new_item = true;
    look_up(p);
  }

  // Asks for the next chunk, before the last unit or units of this interval. The answer comes before the
  // last.
  __device__ void claim(const AttentionParams& p, int count) {
    const bool now = left > S::kUnitBlocks && left - count <= S::kUnitBlocks;
    if (now && claims < kMaxClaims && threadIdx.x == 0) claimed = count_claim(p.claim_counter());
  }

  // Tells all warps what thread 0 has claimed. None waits for long: before the next barrier all get here.
  __device__ void enter_claimed(const AttentionParams& p, const WorkSplit& split, Control& control) {
    volatile int& shared = control.claims[claims++];
    if (threadIdx.x == 0) {
      shared = unsigned(claimed) < split.chunks * gridDim.x ? claimed : Control::kNothingLeft;
      claimed = Control::kNothingLeft;
    }
    __syncwarp();
    int chunk = shared;
    while (chunk == Control::kUnknown) chunk = shared;
    __syncwarp();
    // Neighbouring chunks are the same tokens of the heads that go in step.
    if (chunk != Control::kNothingLeft) {
      enter(p, split, split.ranges + chunk / gridDim.x, chunk % gridDim.x, control.sequences);
    }
  }

  // Where the partial result of the item goes. An interval has at most two: of the item that it begins in,
  // and of the one that it ends in.
  __device__ int item_slot(const AttentionParams& p) const {
    const bool begins = at.block == 0, ends = at.blocks - at.block <= left;
    return begins && ends ? Unit::kWhole : 2 * (interval * int(gridDim.x) + column(p)) + begins;
  }

  // Of the first unit of an item that this interval shares with others.
  __device__ SharedItem shared_item(const AttentionParams& p, const WorkSplit& split) const {
    const int begin = max(0, split.begin(interval + 1) - left - at.block);
    const int first = split.interval_of(begin), last = split.interval_of(begin + at.blocks - 1);
    return {at.seq, at.head, at.row_block, first * int(gridDim.x) + column(p), last - first + 1};
  }

  __device__ void look_up(const AttentionParams& p) {
    const int token = threadIdx.x / 32 * S::kSliceTokens + threadIdx.x % S::kSliceTokens;
    const unsigned position = at.start() + token, page_size = p.cache.page_size;
    const bool inside = token < at.unit_blocks<S>(left) * kBlockTokens && position < unsigned(at.length) &&
                        position >= unsigned(at.first);
    const unsigned entry = p.page_shift >= 0 ? position >> p.page_shift : position / page_size;
    offset_in_page = position - entry * page_size;
    page = -1;
    if (inside) page = p.block_table[at.seq * p.block_table_stride + entry];
  }

  __device__ __forceinline__ void issue(const AttentionParams& p, uint8_t* visible, char* stage,
                                        uint32_t mask) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t head = at.head;
    if (lane == 0) {
      if constexpr (S::kSliceTokens == 32) reinterpret_cast<uint32_t*>(visible)[warp] = mask;
      if constexpr (S::kSliceTokens == 16) reinterpret_cast<uint16_t*>(visible)[warp] = mask;
      if constexpr (S::kSliceTokens == 8) visible[warp] = mask;
    }
    if (new_item) copy_item(p, stage);
    if (p.cache.page_size % S::kSliceTokens == 0) {
      // The slice lies in one page: its rows are at equal distances. Take the page from a token that has one.
      const int token = mask == 0 ? 0 : __ffs(mask) - 1;
      const int64_t row_page = mask == 0 ? 0 : __shfl_sync(~0u, page, token);
      const int64_t offset = mask == 0 ? 0 : __shfl_sync(~0u, offset_in_page, token) - token;
      copy_slice(p.k_sources, p.num_k_sources, row_page, offset, head, mask, stage);
      copy_slice(p.v_sources, p.num_v_sources, row_page, offset, head, mask,
                 stage + S::kSources * S::kPlaneBytes);
    } else {
      copy_rows(p.k_sources, p.num_k_sources, head, mask, stage);
      copy_rows(p.v_sources, p.num_v_sources, head, mask, stage + S::kSources * S::kPlaneBytes);
    }
  }

  static constexpr int kRowsAtOnce = 32 / S::kRowChunks, kCopies = S::kSliceTokens / kRowsAtOnce;

  // Shared address of this lane's chunk of its i-th row; `own` is that of its first.
  static __device__ __forceinline__ uint32_t destination(uint32_t own, int i) {
    return (own ^ row_swizzle<S::kRowChunks>(i * kRowsAtOnce) * 16) + i * kRowsAtOnce * S::kRowBytes;
  }
  static __device__ __forceinline__ uint32_t first_destination(const char* planes) {
    const int row = threadIdx.x / 32 * S::kSliceTokens + threadIdx.x % 32 / S::kRowChunks;
    return smem_address(planes + swizzled<S::kRowChunks>(row, threadIdx.x % S::kRowChunks));
  }
  static __device__ __forceinline__ void copy_chunk(uint32_t to, const C* from, bool valid) {
    constexpr int kFetch = S::kRowBytes < 128 ? 256 : 128;
    cp_async_16<kFetch>(to, from, valid);
  }

  __device__ __forceinline__ void copy_slice(const PagedCache (&sources)[2], int count, int64_t row_page,
                                             int64_t offset, int64_t head, uint32_t mask,
                                             char* planes) const {
    const int row = threadIdx.x % 32 / S::kRowChunks, chunk = threadIdx.x % S::kRowChunks;
    const PagedCache& layout = sources[0];  // sources of one side share their strides
    const int64_t from = row_page * layout.page_stride + (offset + row) * layout.token_stride +
                         head * layout.head_stride + chunk * (16 / sizeof(C));
    const uint32_t to = first_destination(planes);
#pragma unroll
    for (int s = 0; s < S::kSources; ++s) {
      if (s > 0 && count == 1) break;
      const C* source = static_cast<const C*>(sources[s].data) + from;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        copy_chunk(destination(to, i) + s * S::kPlaneBytes, source, mask >> (row + i * kRowsAtOnce) & 1);
        source += kRowsAtOnce * layout.token_stride;
      }
    }
  }

  __device__ __forceinline__ void copy_rows(const PagedCache (&sources)[2], int count, int64_t head,
                                            uint32_t mask, char* planes) const {
    const int lane = threadIdx.x % 32;
    const PagedCache& layout = sources[0];
    const bool inside = mask >> lane % S::kSliceTokens & 1;
    const int64_t own = inside ? page * layout.page_stride + offset_in_page * layout.token_stride : 0;
    const uint32_t to = first_destination(planes);
#pragma unroll 1
    for (int i = 0; i < kCopies; ++i) {
      const int row = i * kRowsAtOnce + lane / S::kRowChunks;
      const int64_t from = __shfl_sync(~0u, own, row) + head * layout.head_stride +
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
      const int64_t from = at.seq * p.q_batch_stride + row / group * p.q_token_stride +
                           (head * group + row % group) * p.q_head_stride + chunk * 8;
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
    // Constant numbers: with a variable one the kernel would claim all 16 barriers.
    const int team = threadIdx.x / 32 / S::kTeamWarps;
    static_assert(S::kTeams == 2 || S::kTeams == 4);
    constexpr int threads = 32 * S::kTeamWarps;
    if (team == 0) asm volatile("bar.sync 1, %0;" ::"n"(threads) : "memory");
    if (team == 1) asm volatile("bar.sync 2, %0;" ::"n"(threads) : "memory");
    if (S::kTeams > 2 && team == 2) asm volatile("bar.sync 3, %0;" ::"n"(threads) : "memory");
    if (S::kTeams > 2 && team == 3) asm volatile("bar.sync 4, %0;" ::"n"(threads) : "memory");
  }
}

}  // namespace fusedkv

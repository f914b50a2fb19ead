// One plain struct an op: everything its kernels need, with the shape beside every pointer.
// No torch here: the bench programs fill these structs themselves.
//
// Dimensions: T tokens, B sequences, Q query tokens a sequence, Hq query heads, Hkv key/value heads,
// G = Hq / Hkv, D head dim. Strides count elements; the last dimension always has stride 1.
#pragma once

#include <cstdint>

namespace fusedkv {

constexpr int kMaxSources = 8;    // sources that fuse_kv mixes; fused_attention takes 1 or 2
constexpr int kBlockTokens = 64;  // tokens of one work unit of fused_attention
constexpr int kMostItemCost = 2;  // blocks that a sequence counts for besides its own: see schedule.cuh
constexpr int kBlockRows = 64;    // query rows (heads of a group x query tokens) that one work unit serves

enum class DType { kF16, kBF16, kE4M3, kF32 };

// A cache of one layer's keys or values: [num_pages, page_size, Hkv, D].
struct PagedCache {
  void* data;
  int64_t page_stride, token_stride, head_stride;
};

// slot = page * page_size + offset in the page. A slot outside [0, num_pages * page_size) is skipped.
struct CacheGeometry {
  int64_t num_pages;
  int page_size;
};

struct WriteKvParams {
  DType dtype;        // of k and v: f16 or bf16
  DType cache_dtype;  // the same, or e4m3
  int64_t num_tokens;
  int num_kv_heads, head_dim;
  const void* k;  // [T, Hkv, D]
  const void* v;  // [T, Hkv, D]
  int64_t k_token_stride, k_head_stride, v_token_stride, v_head_stride;
  PagedCache k_cache, v_cache;
  PagedCache k_copy, v_copy;    // e4m3, both or neither (data == null); cache_dtype is then dtype
  CacheGeometry cache;          // of caches and copies
  const int64_t* slot_mapping;  // [T]
  const float* k_scale;  // [Hkv, D] or null: stored = saturate(k / k_scale), in the copy where there is one
  const float* v_scale;  // [Hkv, D] or null
};

// What the heads of a projection go through: RMSNorm over each q and k head, RoPE of q and k, the store of q
// and the cache write of k and v. Heads come in the order q (Hq), k (Hkv), v (Hkv).
struct HeadOutputs {
  DType cache_dtype;                        // that of the projection, or e4m3
  int num_q_heads, num_kv_heads, head_dim;  // num_kv_heads == 0: only q, no cache
  void* q_out;                              // [T, Hq, D] contiguous; null when num_q_heads == 0
  PagedCache k_cache, v_cache;
  PagedCache k_copy, v_copy;    // as in WriteKvParams
  CacheGeometry cache;          // of caches and copies
  const int64_t* slot_mapping;  // [T]
  const void* positions;        // [T], int32 or int64
  bool positions_are_int64;
  const float* cos_sin;  // [max_positions, D]: cos in the first D/2 columns, sin in the others
  int64_t max_positions;
  const void* q_norm;  // [D] of dtype, or null for no norm
  const void* k_norm;  // [D] of dtype, or null
  float eps;
  bool interleaved;      // pairs (2j, 2j+1) instead of (j, j + D/2)
  const float* k_scale;  // [Hkv, D] or null; as in WriteKvParams
  const float* v_scale;  // [Hkv, D] or null
};

struct RopeWriteKvParams {
  DType dtype;
  int64_t num_tokens;
  const void* qkv;  // [T, Hq + 2 * Hkv, D], heads and channels contiguous
  int64_t qkv_token_stride;
  HeadOutputs heads;
};

// x @ weight^T. With an input norm x is RMSNorm(x): x * input_norm is rounded to the dtype once, and what x
// is divided by is applied to the product. Only the kernels for few tokens have it, and only in bf16, because
// before that division f16 might overflow.
struct ProductParams {
  DType dtype;
  int64_t num_tokens;
  int hidden;              // K of the product, a multiple of 8
  const void* x;           // [T, hidden]
  int64_t x_stride;        // between rows
  const void* weight;      // [rows, hidden] contiguous
  const void* input_norm;  // [hidden] of dtype, or null
  float input_eps;
  // The kernel before this one in the stream does not write the weight, so that it may be read before that
  // one has ended: the kernels for few tokens do.
  bool early_weight;
};

// The product (+ bias) makes the heads.
struct RopeKeyProjectionParams : ProductParams {  // weight: [(Hq + 2 * Hkv) * D, hidden]
  const void* bias;                               // [(Hq + 2 * Hkv) * D] or null
  HeadOutputs heads;
};

// out += x @ weight^T, rounded once.
struct LinearAddParams : ProductParams {
  int size;   // rows of the weight, a multiple of 32
  void* out;  // [T, size]
  int64_t out_stride;
};

// out = silu(gate) * up, where x @ weight^T is gate and then up.
struct SwigluLinearParams : ProductParams {
  int size;   // I, a multiple of 16; the weight has 2 * I rows
  void* out;  // [T, I] contiguous
};

// The gradient through norm and RoPE of projected heads, all of one kind and with one norm.
struct RopeNormBackwardParams {
  DType dtype;
  int64_t num_tokens;
  const void* grad;       // [T, H, D], heads and channels contiguous: of the rotated heads
  const void* projected;  // likewise: the heads before the norm; only used with one
  int64_t grad_token_stride, projected_token_stride;
  HeadOutputs heads;  // as for H query heads; q_out takes the gradient of `projected`
  float* grad_norm;   // [D]; only used with a norm
  void* workspace;    // rope_norm_backward_workspace_bytes(params) bytes
};

// One side (keys or values) of fuse_kv: out = sum_s weights[s] * sources[s], channel by channel.
struct FuseSide {
  int num_sources;                   // 1 .. kMaxSources
  const void* sources[kMaxSources];  // each [rows, Hkv, D], heads and channels contiguous
  int64_t row_strides[kMaxSources];
  const float* weights;  // [num_sources, Hkv, D]
  void* out;             // [rows, Hkv, D] contiguous
};

struct FuseKvParams {
  DType dtype;
  int64_t rows;
  int num_kv_heads, head_dim;
  FuseSide k, v;
};

struct FuseBackwardSide {
  int num_sources;
  const void* sources[kMaxSources];
  int64_t row_strides[kMaxSources];
  const float* weights;  // [num_sources, Hkv, D]
  const void* grad_out;  // [rows, Hkv, D], heads and channels contiguous
  int64_t grad_out_row_stride;
  void* grad_sources[kMaxSources];  // each [rows, Hkv, D] contiguous
  float* grad_weights;              // [num_sources, Hkv, D]
};

struct FuseKvBackwardParams {
  DType dtype;
  int64_t rows;
  int num_kv_heads, head_dim;
  FuseBackwardSide k, v;
  void* workspace;  // fuse_kv_backward_workspace_bytes(params) bytes
};

struct SwigluParams {
  DType dtype;
  int64_t rows;
  int size;             // I, a multiple of 8
  const void* gate_up;  // [rows, 2 * I]: gate, then up
  int64_t row_stride;
  void* out;  // [rows, I] contiguous
};

// A row of the block table outside [0, num_rows) is as one without pages.
struct DecodePlacesParams {
  int64_t batch, num_rows;
  int max_pages, page_size;
  const int* seq_lens;     // [num_rows]
  const int* block_table;  // [num_rows, max_pages]
  int64_t block_table_stride;
  const int64_t* rows;    // [B]
  const bool* active;     // [B] or null: all are
  int* positions;         // [B]
  int64_t* slot_mapping;  // [B]
  int* table;             // [B, max_pages] contiguous
  int* lens;              // [B]
  int* lengths;           // [B]
};

struct LargestTokenParams {
  DType dtype;  // f16, bf16 or f32
  int64_t batch;
  int vocab;           // 1 to kMostVocab
  const void* logits;  // [B, vocab]
  int64_t row_stride;
  int64_t* out;  // [B]
};
constexpr int kMostVocab = 1 << 30;

constexpr int64_t kDone = -1;  // what a finished sequence emits

struct AcceptTokensParams {
  int64_t batch, steps, num_stop_tokens;
  const int64_t* chosen;       // [B]
  const int64_t* stop_tokens;  // [num_stop_tokens]
  bool* active;                // [B]
  int64_t* tokens;             // [B]
  int64_t* emitted;            // [steps, B] contiguous
  int64_t* count;              // [1]; outside [0, steps) nothing is emitted
  int* seq_lens;               // [num_rows] or null: seq_lens[rows] = lengths, but for rows outside
  int64_t num_rows;
  const int64_t* rows;  // [B]
  const int* lengths;   // [B]
};

// Words of a schedule of fused_attention, see schedule.cuh: B + 1 cumulative counts of 64-token blocks,
// filled up to 16 bytes, a place for each worker and size of its units, then room for two partial results of
// each worker.
constexpr int kMaxWorkers = 192;  // CTAs of the grid at most: no GPU has more multiprocessors
constexpr int kUnitSizes = 3;     // units of 1, 2 or 4 blocks
constexpr int kWordsOfPlace = 8;
constexpr int kMaxPartialRow = 128 + 4;  // words of a query row's partial result: channels, maximum, sum

constexpr int64_t counts_in_schedule(int64_t batch) { return (batch + 4) / 4 * 4; }
constexpr int64_t partials_in_schedule(int64_t batch) {
  return counts_in_schedule(batch) + kUnitSizes * kMaxWorkers * kWordsOfPlace;
}
constexpr int words_of_partial(int num_query_tokens, int num_q_heads, int num_kv_heads) {
  const int64_t rows = (int64_t(num_q_heads / num_kv_heads) * num_query_tokens + 7) / 8 * 8;
  return int(rows < kBlockRows ? rows : kBlockRows) * kMaxPartialRow;
}
constexpr int64_t words_of_schedule(int64_t batch, int num_query_tokens, int num_q_heads, int num_kv_heads) {
  return partials_in_schedule(batch) +
         int64_t(2 * kMaxWorkers) * words_of_partial(num_query_tokens, num_q_heads, num_kv_heads);
}

struct AttentionScheduleParams {
  int batch, num_query_tokens, num_q_heads, num_kv_heads;
  int window;           // 0: no window
  int64_t max_seq_len;  // lengths are clamped to [0, max_seq_len]
  const int* seq_lens;  // [B]
  int* schedule;        // [words_of_schedule()]
};

// Query token j of a sequence stands at position seq_len - Q + j and sees the positions up to its own, the
// last `window` of them when window > 0.
struct FusedAttentionParams {
  DType dtype;        // of q and out
  DType cache_dtype;  // of every source
  int batch, num_query_tokens, num_q_heads, num_kv_heads, head_dim;
  const void* q;  // [B, Q, Hq, D]
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  void* out;                         // [B, Q, Hq, D] contiguous
  int num_k_sources, num_v_sources;  // 1 or 2 each
  PagedCache k_sources[2], v_sources[2];
  CacheGeometry cache;
  const float* key_weights;    // [num_k_sources, Hkv, D] or null for ones
  const float* value_weights;  // [num_v_sources, Hkv, D] or null for ones
  const int* block_table;      // [B, max_pages]; an entry outside [0, num_pages) makes its tokens invisible
  int64_t block_table_stride;
  int max_pages;
  const int* seq_lens;  // [B]
  int* schedule;        // from run_attention_schedule; if it was right, it is after the launch as before
  float scale;
  int window;
  // The kernel before this one has written none of block_table, seq_lens, the counts and places that
  // run_attention_schedule left, and the sources but for the query tokens' own rows, nor did it let this one
  // start before those that have were through: all this is read while it still runs.
  bool early_cache;
  bool keep_sources;  // a hint: launches soon after read them again
};

}  // namespace fusedkv

// write_kv and rope_write_kv: the storage layers' cache writes.
#include "bench_common.h"

namespace fusedkv::bench {
namespace {

using f16 = __half;
using bf16 = __nv_bfloat16;
using e4m3 = __nv_fp8_e4m3;

// Slot of token t: scattered over the cache, but for a skipped one and two outside, and no two the same.
std::vector<int64_t> ragged_slots(int64_t tokens, int64_t slots) {
  std::vector<int64_t> mapping;
  for (int64_t t = 0; t < tokens; ++t) mapping.push_back((t * 7 + 3) % slots);
  if (tokens > 1) mapping[1] = -1;
  if (tokens > 2) mapping[2] = slots;
  if (tokens > 3) mapping[3] = int64_t(1) << 40;
  return mapping;
}

// Pages that hold more than `tokens` slots, a number that 7 does not divide: 7 * t modulo it never repeats.
int64_t ragged_pages(int64_t tokens, int page_size) {
  int64_t pages = tokens / page_size + 1;
  while (pages * page_size % 7 == 0) ++pages;
  return pages;
}

// A K|V pool [pages, page_size, Hkv, 2, D]: both caches are views with gaps, which must stay NaN.
template <class C>
struct Pool {
  Pool(int64_t tokens, int page_size, int heads, int d)
      : geometry{ragged_pages(tokens, page_size), page_size},
        slots(geometry.num_pages * page_size),
        token(heads * 2 * d),
        head(2 * d),
        values(slots * token) {}

  PagedCache view(int side) const {
    return {values.data() + side * (head / 2), geometry.page_size * token, token, head};
  }
  size_t at(int side, int64_t slot, int h, int i) const {
    return slot * token + h * head + side * (head / 2) + i;
  }

  CacheGeometry geometry;
  int64_t slots, token, head;
  Array<C> values;
};

template <class C>
double saturate(double x) {
  return std::is_same_v<C, e4m3> ? std::clamp(x, -448.0, 448.0) : x;
}

// e4m3 and f16 have subnormals near: half a spacing of those is no longer relative.
template <class C>
constexpr double kSmallest = std::is_same_v<C, e4m3> ? 0x1p-9 : 1e-5;

template <class T, class C>
bool verify_write_kv(int64_t tokens, int heads, int d, int page_size, bool scaled) {
  Pool<C> pool(tokens, page_size, heads, d);
  const int64_t k_token = heads * d + 8, v_token = heads * d;
  const auto k = Array<T>::normal(tokens * k_token, 1), v = Array<T>::normal(tokens * v_token, 2);
  const auto scales = Array<float>::normal(2 * heads * d, 3, 0.5f, 0.1f);  // of k, then of v
  const Array<int64_t> slots(ragged_slots(tokens, pool.slots));
  const WriteKvParams params{
      .dtype = dtype_of<T>(),
      .cache_dtype = dtype_of<C>(),
      .num_tokens = tokens,
      .num_kv_heads = heads,
      .head_dim = d,
      .k = k.data(),
      .v = v.data(),
      .k_token_stride = k_token,
      .k_head_stride = d,
      .v_token_stride = v_token,
      .v_head_stride = d,
      .k_cache = pool.view(0),
      .v_cache = pool.view(1),
      .cache = pool.geometry,
      .slot_mapping = slots.data(),
      .k_scale = scaled ? scales.data() : nullptr,
      .v_scale = scaled ? scales.data() + heads * d : nullptr,
  };
  CUDA_CHECK(run_write_kv(params, nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());

  std::vector<double> expected(pool.values.size(), NAN);
  const auto k_host = k.host(), v_host = v.host();
  const auto scales_host = scaled ? scales.host() : std::vector<float>(2 * heads * d, 1.0f);
  const auto slots_host = slots.host();
  for (int64_t t = 0; t < tokens; ++t) {
    if (slots_host[t] < 0 || slots_host[t] >= pool.slots) continue;
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < d; ++i) {
        const int64_t channel = h * d + i;
        expected[pool.at(0, slots_host[t], h, i)] =
            saturate<C>(to_double(k_host[t * k_token + channel]) / scales_host[channel]);
        expected[pool.at(1, slots_host[t], h, i)] =
            saturate<C>(to_double(v_host[t * v_token + channel]) / scales_host[heads * d + channel]);
      }
    }
  }
  const std::string what = std::string("write_kv ") + name_of<T>() + " to " + name_of<C>() + ", " +
                           std::to_string(tokens) + " tokens, page " + std::to_string(page_size);
  return matches(what, pool.values.host(), expected, kSmallest<C>);
}

struct RopeCase {
  int64_t tokens;
  int q_heads, kv_heads, d, page_size;
  bool normed, interleaved, scaled;
};

template <class T, class C>
bool verify_rope_write_kv(const RopeCase& c) {
  constexpr int64_t kPositions = 97;
  constexpr float kEps = 1e-6f;
  const int heads = c.q_heads + 2 * c.kv_heads, d = c.d;
  const int64_t stride = heads * d + 16;
  Pool<C> pool(c.tokens, c.page_size, c.kv_heads, d);
  const auto qkv = Array<T>::normal(c.tokens * stride, 1);
  const auto q_norm = Array<T>::normal(d, 2, 1.0f, 0.2f), k_norm = Array<T>::normal(d, 3, 1.0f, 0.2f);
  const auto v_scale = Array<float>::normal(c.kv_heads * d, 4, 0.5f, 0.1f);
  const std::vector<float> table = rope_table(kPositions, d);
  const Array<float> cos_sin(table);
  const std::vector<int64_t> slots_host = ragged_slots(c.tokens, pool.slots);
  std::vector<int32_t> positions_host;
  for (int64_t t = 0; t < c.tokens; ++t) positions_host.push_back(static_cast<int32_t>(t * 31 % kPositions));
  if (c.tokens > 4) positions_host[4] = kPositions;  // outside the table: NaN in q_out, no cache write
  const Array<int64_t> slots(slots_host);
  const Array<int32_t> positions(positions_host);
  const Array<T> q_out(c.tokens * c.q_heads * d);
  const RopeWriteKvParams params{
      .dtype = dtype_of<T>(),
      .num_tokens = c.tokens,
      .qkv = qkv.data(),
      .qkv_token_stride = stride,
      .heads =
          {
              .cache_dtype = dtype_of<C>(),
              .num_q_heads = c.q_heads,
              .num_kv_heads = c.kv_heads,
              .head_dim = d,
              .q_out = c.q_heads > 0 ? q_out.data() : nullptr,
              .k_cache = pool.view(0),
              .v_cache = pool.view(1),
              .cache = pool.geometry,
              .slot_mapping = slots.data(),
              .positions = positions.data(),
              .positions_are_int64 = false,
              .cos_sin = cos_sin.data(),
              .max_positions = kPositions,
              .q_norm = c.normed ? q_norm.data() : nullptr,
              .k_norm = c.normed ? k_norm.data() : nullptr,
              .eps = kEps,
              .interleaved = c.interleaved,
              .k_scale = nullptr,
              .v_scale = c.scaled ? v_scale.data() : nullptr,
          },
  };
  CUDA_CHECK(run_rope_write_kv(params, nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());

  const auto x = qkv.host(), q_weights = q_norm.host(), k_weights = k_norm.host();
  const auto scales = v_scale.host();
  const auto doubles = [](const std::vector<T>& v) {
    std::vector<double> out;
    for (const T& value : v) out.push_back(to_double(value));
    return out;
  };
  const std::vector<double> q_weight = doubles(q_weights), k_weight = doubles(k_weights);
  std::vector<double> q_expected(q_out.size(), NAN), cache_expected(pool.values.size(), NAN);
  for (int64_t t = 0; t < c.tokens; ++t) {
    if (positions_host[t] >= kPositions) continue;
    const float* angles = table.data() + positions_host[t] * d;
    const auto head = [&](int h) {
      const auto first = x.begin() + t * stride + h * d;
      return doubles(std::vector<T>(first, first + d));
    };
    for (int h = 0; h < c.q_heads; ++h) {
      const auto q = rotate_head(head(h), c.normed ? &q_weight : nullptr, kEps, angles, c.interleaved);
      std::copy(q.begin(), q.end(), q_expected.begin() + (t * c.q_heads + h) * d);
    }
    if (slots_host[t] < 0 || slots_host[t] >= pool.slots) continue;
    for (int h = 0; h < c.kv_heads; ++h) {
      const auto k =
          rotate_head(head(c.q_heads + h), c.normed ? &k_weight : nullptr, kEps, angles, c.interleaved);
      const auto v = head(c.q_heads + c.kv_heads + h);
      for (int i = 0; i < d; ++i) {
        cache_expected[pool.at(0, slots_host[t], h, i)] = saturate<C>(k[i]);
        cache_expected[pool.at(1, slots_host[t], h, i)] =
            saturate<C>(v[i] / (c.scaled ? scales[h * d + i] : 1.0f));
      }
    }
  }
  const std::string what = std::string("rope_write_kv ") + name_of<T>() + " to " + name_of<C>() + ", " +
                           std::to_string(c.tokens) + " tokens, " + std::to_string(c.q_heads) + "/" +
                           std::to_string(c.kv_heads) + " heads of " + std::to_string(d);
  return matches(what + ", q", q_out.host(), q_expected, kSmallest<T>) &&
         matches(what + ", cache", pool.values.host(), cache_expected, kSmallest<C>);
}

template <class T, class C>
bool verify_dtypes() {
  for (const bool scaled : {false, true}) {
    if (!verify_write_kv<T, C>(1, 1, 8, 1, scaled) || !verify_write_kv<T, C>(37, 3, 40, 16, scaled) ||
        !verify_write_kv<T, C>(130, 8, 128, 64, scaled) || !verify_write_kv<T, C>(21, 36, 88, 100, scaled)) {
      return false;
    }
  }
  for (const RopeCase& c :
       {RopeCase{1, 1, 1, 64, 1, true, false, false}, RopeCase{37, 6, 2, 128, 16, true, false, true},
        RopeCase{23, 5, 5, 64, 100, false, true, false}, RopeCase{9, 0, 3, 128, 64, true, true, true}}) {
    if (!verify_rope_write_kv<T, C>(c)) return false;
  }
  return true;
}

bool verify() {
  return verify_dtypes<f16, f16>() && verify_dtypes<f16, e4m3>() && verify_dtypes<bf16, bf16>() &&
         verify_dtypes<bf16, e4m3>();
}

// Distinct slots in an order that no prefetcher guesses, one permutation a set.
std::vector<int64_t> shuffled_slots(int sets, int64_t tokens) {
  std::vector<int64_t> slots;
  uint64_t state = 1;
  for (int set = 0; set < sets; ++set) {
    const size_t first = slots.size();
    for (int64_t t = 0; t < tokens; ++t) slots.push_back(t);
    for (int64_t t = tokens - 1; t > 0; --t) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(slots[first + t], slots[first + (state >> 33) % (t + 1)]);
    }
  }
  return slots;
}

template <class C>
void time_tokens(const Args& args, int64_t tokens, const Ceilings& ceilings, std::vector<Row>& rows) {
  const int q_heads = static_cast<int>(args.integer("q-heads")),
            d = static_cast<int>(args.integer("head-dim"));
  const int heads = static_cast<int>(args.integer("kv-heads"));
  const int page_size = static_cast<int>(args.integer("page-size"));
  const int64_t pages = (tokens + page_size - 1) / page_size, packed = (q_heads + 2 * heads) * int64_t(d);
  const int64_t side = tokens * heads * d, cache_size = pages * page_size * heads * d;
  const double write_bytes = 2.0 * side * (sizeof(bf16) + sizeof(C)) + 8.0 * tokens;
  const double rope_bytes =
      tokens * (2.0 * packed + 2.0 * q_heads * d + 2.0 * heads * d * sizeof(C) + 4.0 * d + 12);
  const int sets = cold_sets(static_cast<size_t>(write_bytes));
  const auto qkv = Array<bf16>::normal(sets * tokens * packed, 1);
  const Array<bf16> q_out(sets * tokens * q_heads * d);
  const Array<C> k_cache(sets * cache_size), v_cache(sets * cache_size);
  const Array<int64_t> slots(shuffled_slots(sets, tokens));
  std::vector<int32_t> order(tokens);
  for (int64_t t = 0; t < tokens; ++t) order[t] = static_cast<int32_t>(t);
  const Array<int32_t> positions(order);
  const Array<float> cos_sin(rope_table(tokens, d));
  const auto norm = Array<bf16>::normal(d, 2, 1.0f, 0.1f);
  const auto cache = [&](const Array<C>& values, int set) {
    return PagedCache{values.data() + set * cache_size, int64_t(page_size) * heads * d, int64_t(heads) * d,
                      d};
  };

  const Timing write = time_launches(sets, args.repeats(), [&](int set, cudaStream_t stream) {
    const bf16* k = qkv.data() + set * 2 * side;
    const WriteKvParams params{
        .dtype = DType::kBF16,
        .cache_dtype = dtype_of<C>(),
        .num_tokens = tokens,
        .num_kv_heads = heads,
        .head_dim = d,
        .k = k,
        .v = k + side,
        .k_token_stride = heads * d,
        .k_head_stride = d,
        .v_token_stride = heads * d,
        .v_head_stride = d,
        .k_cache = cache(k_cache, set),
        .v_cache = cache(v_cache, set),
        .cache = {pages, page_size},
        .slot_mapping = slots.data() + set * tokens,
        .k_scale = nullptr,
        .v_scale = nullptr,
    };
    return run_write_kv(params, stream);
  });
  const Timing rope = time_launches(sets, args.repeats(), [&](int set, cudaStream_t stream) {
    const RopeWriteKvParams params{
        .dtype = DType::kBF16,
        .num_tokens = tokens,
        .qkv = qkv.data() + set * tokens * packed,
        .qkv_token_stride = packed,
        .heads =
            {
                .cache_dtype = dtype_of<C>(),
                .num_q_heads = q_heads,
                .num_kv_heads = heads,
                .head_dim = d,
                .q_out = q_out.data() + set * tokens * q_heads * d,
                .k_cache = cache(k_cache, set),
                .v_cache = cache(v_cache, set),
                .cache = {pages, page_size},
                .slot_mapping = slots.data() + set * tokens,
                .positions = positions.data(),
                .positions_are_int64 = false,
                .cos_sin = cos_sin.data(),
                .max_positions = tokens,
                .q_norm = norm.data(),
                .k_norm = norm.data(),
                .eps = 1e-6f,
                .interleaved = false,
                .k_scale = nullptr,
                .v_scale = nullptr,
            },
    };
    return run_rope_write_kv(params, stream);
  });
  const std::string suffix =
      std::string(" bf16 to ") + name_of<C>() + ", " + std::to_string(tokens) + " tokens";
  const auto copy = [&](const char* name, double bytes) {
    const auto half = static_cast<size_t>(bytes / 2);
    const Timing timing = time_ceiling<true>(half, args.repeats());
    rows.push_back(
        {std::string("  plain copy of as many bytes as ") + name, timing, 2.0 * half, ceilings.copy_gb_s});
  };
  rows.push_back({"write_kv" + suffix, write, write_bytes, ceilings.copy_gb_s});
  copy("write_kv", write_bytes);
  rows.push_back({"rope_write_kv" + suffix, rope, rope_bytes, ceilings.copy_gb_s});
  copy("rope_write_kv", rope_bytes);
}

}  // namespace
}  // namespace fusedkv::bench

int main(int argc, char** argv) {
  using namespace fusedkv::bench;
  const Args args(argc, argv, "Cache writes of the storage layers: write_kv and rope_write_kv.",
                  {{"tokens", "0", "tokens written; 0: sweep 1, 128 and 8192"},
                   {"q-heads", "32", "query heads (rope_write_kv)"},
                   {"kv-heads", "8", "key/value heads"},
                   {"head-dim", "128", "channels a head, 64 or 128"},
                   {"page-size", "64", "tokens a cache page"}});
  for (const char* name : {"kv-heads", "head-dim", "page-size"}) {
    if (args.integer(name) < 1)
      args.fail(std::string("--") + name + ": expected at least 1, got " + args.text(name));
  }
  if (args.integer("tokens") < 0 || args.integer("q-heads") < 0)
    args.fail("--tokens, --q-heads: expected 0 or more");
  if (!verify()) return 1;
  std::fprintf(stderr, "verified against the CPU oracle\n");
  if (args.verify_only()) return 0;

  const Ceilings ceilings = measure_ceilings(args.repeats());
  std::vector<Row> rows;
  std::vector<int64_t> sweep = {1, 128, 8192};
  if (args.integer("tokens") > 0) sweep = {args.integer("tokens")};
  for (const int64_t tokens : sweep) {
    time_tokens<__nv_bfloat16>(args, tokens, ceilings, rows);
    time_tokens<__nv_fp8_e4m3>(args, tokens, ceilings, rows);
  }
  print_results(args, "bench_cache_write", ceilings, rows);
}

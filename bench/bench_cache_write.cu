// write_kv and rope_write_kv: the storage layers' cache writes, with and without e4m3 copies. Verifies, then
// times with a cold L2.
#include <memory>

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

template <class C>
double saturate(double x) {
  return std::is_same_v<C, e4m3> ? std::clamp(x, -448.0, 448.0) : x;
}

// e4m3 and f16 have subnormals near: half a spacing of those is no longer relative.
template <class C>
constexpr double kSmallest = std::is_same_v<C, e4m3> ? 0x1p-9 : 1e-5;

// A K|V pool [pages, page_size, Hkv, 2, D] with a gap after each token: both caches are views, and what lies
// between them must stay NaN.
template <class C>
struct Pool {
  Pool(int64_t tokens, int page_size, int heads, int d, int gap)
      : geometry{ragged_pages(tokens, page_size), page_size},
        slots(geometry.num_pages * page_size),
        token(heads * 2 * d + gap),
        head(2 * d),
        values(slots * token),
        expected(values.size(), NAN) {}

  PagedCache view(int side) const {
    return {values.data() + side * (head / 2), geometry.page_size * token, token, head};
  }
  void expect(int side, int64_t slot, int h, int i, double x) {
    expected[slot * token + h * head + side * (head / 2) + i] = saturate<C>(x);
  }
  bool holds_expected(const std::string& what) const {
    return matches(what, values.host(), expected, kSmallest<C>);
  }

  CacheGeometry geometry;
  int64_t slots, token, head;
  Array<C> values;
  std::vector<double> expected;
};

// The caches and, if `copied`, their e4m3 copies.
template <class C>
struct Caches {
  Caches(int64_t tokens, int page_size, int heads, int d, bool copied)
      : cache(tokens, page_size, heads, d, 16) {
    if (copied) copy = std::make_unique<Pool<e4m3>>(tokens, page_size, heads, d, 48);
  }
  PagedCache copy_view(int side) const { return copy ? copy->view(side) : PagedCache{}; }

  void expect(int side, int64_t slot, int h, int i, double x, double scale) {
    cache.expect(side, slot, h, i, copy ? x : x / scale);
    if (copy) copy->expect(side, slot, h, i, x / scale);
  }
  bool hold_expected(const std::string& what) const {
    return cache.holds_expected(what + ", cache") && (!copy || copy->holds_expected(what + ", copy"));
  }

  Pool<C> cache;
  std::unique_ptr<Pool<e4m3>> copy;
};

template <class T, class C>
bool verify_write_kv(int64_t tokens, int heads, int d, int page_size, bool scaled, bool copied) {
  Caches<C> caches(tokens, page_size, heads, d, copied);
  const int64_t k_token = heads * d + 8, v_token = heads * d;
  const auto k = Array<T>::normal(tokens * k_token, 1), v = Array<T>::normal(tokens * v_token, 2);
  const auto scales = Array<float>::normal(2 * heads * d, 3, 0.5f, 0.1f);  // of k, then of v
  const Array<int64_t> slots(ragged_slots(tokens, caches.cache.slots));
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
      .k_cache = caches.cache.view(0),
      .v_cache = caches.cache.view(1),
      .k_copy = caches.copy_view(0),
      .v_copy = caches.copy_view(1),
      .cache = caches.cache.geometry,
      .slot_mapping = slots.data(),
      .k_scale = scaled ? scales.data() : nullptr,
      .v_scale = scaled ? scales.data() + heads * d : nullptr,
  };
  CUDA_CHECK(run_write_kv(params, nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());

  const auto k_host = k.host(), v_host = v.host();
  const auto scales_host = scaled ? scales.host() : std::vector<float>(2 * heads * d, 1.0f);
  const auto slots_host = slots.host();
  for (int64_t t = 0; t < tokens; ++t) {
    if (slots_host[t] < 0 || slots_host[t] >= caches.cache.slots) continue;
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < d; ++i) {
        const int64_t channel = h * d + i;
        caches.expect(0, slots_host[t], h, i, to_double(k_host[t * k_token + channel]), scales_host[channel]);
        caches.expect(1, slots_host[t], h, i, to_double(v_host[t * v_token + channel]),
                      scales_host[heads * d + channel]);
      }
    }
  }
  return caches.hold_expected(std::string("write_kv ") + name_of<T>() + " to " + name_of<C>() + ", " +
                              std::to_string(tokens) + " tokens, page " + std::to_string(page_size));
}

struct RopeCase {
  int64_t tokens;
  int q_heads, kv_heads, d, page_size;
  bool normed, interleaved, scaled;
};

template <class T, class C>
bool verify_rope_write_kv(const RopeCase& c, bool copied) {
  constexpr int64_t kPositions = 97;
  constexpr float kEps = 1e-6f;
  const int heads = c.q_heads + 2 * c.kv_heads, d = c.d;
  const int64_t stride = heads * d + 16;
  Caches<C> caches(c.tokens, c.page_size, c.kv_heads, d, copied);
  const auto qkv = Array<T>::normal(c.tokens * stride, 1);
  const auto q_norm = Array<T>::normal(d, 2, 1.0f, 0.2f), k_norm = Array<T>::normal(d, 3, 1.0f, 0.2f);
  const auto scales = Array<float>::normal(2 * c.kv_heads * d, 4, 0.5f, 0.1f);  // of k, then of v
  const std::vector<float> table = rope_table(kPositions, d);
  const Array<float> cos_sin(table);
  const std::vector<int64_t> slots_host = ragged_slots(c.tokens, caches.cache.slots);
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
              .k_cache = caches.cache.view(0),
              .v_cache = caches.cache.view(1),
              .k_copy = caches.copy_view(0),
              .v_copy = caches.copy_view(1),
              .cache = caches.cache.geometry,
              .slot_mapping = slots.data(),
              .positions = positions.data(),
              .positions_are_int64 = false,
              .cos_sin = cos_sin.data(),
              .max_positions = kPositions,
              .q_norm = c.normed ? q_norm.data() : nullptr,
              .k_norm = c.normed ? k_norm.data() : nullptr,
              .eps = kEps,
              .interleaved = c.interleaved,
              .k_scale = c.scaled ? scales.data() : nullptr,
              .v_scale = c.scaled ? scales.data() + c.kv_heads * d : nullptr,
          },
  };
  CUDA_CHECK(run_rope_write_kv(params, nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());

  const auto x = qkv.host();
  const auto scales_host = c.scaled ? scales.host() : std::vector<float>(2 * c.kv_heads * d, 1.0f);
  const auto doubles = [](const std::vector<T>& v) {
    std::vector<double> out;
    for (const T& value : v) out.push_back(to_double(value));
    return out;
  };
  const std::vector<double> q_weight = doubles(q_norm.host()), k_weight = doubles(k_norm.host());
  std::vector<double> q_expected(q_out.size(), NAN);
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
    if (slots_host[t] < 0 || slots_host[t] >= caches.cache.slots) continue;
    for (int h = 0; h < c.kv_heads; ++h) {
      const auto k =
          rotate_head(head(c.q_heads + h), c.normed ? &k_weight : nullptr, kEps, angles, c.interleaved);
      const auto v = head(c.q_heads + c.kv_heads + h);
      for (int i = 0; i < d; ++i) {
        caches.expect(0, slots_host[t], h, i, k[i], scales_host[h * d + i]);
        caches.expect(1, slots_host[t], h, i, v[i], scales_host[(c.kv_heads + h) * d + i]);
      }
    }
  }
  const std::string what = std::string("rope_write_kv ") + name_of<T>() + " to " + name_of<C>() + ", " +
                           std::to_string(c.tokens) + " tokens, " + std::to_string(c.q_heads) + "/" +
                           std::to_string(c.kv_heads) + " heads of " + std::to_string(d);
  return matches(what + ", q", q_out.host(), q_expected, kSmallest<T>) && caches.hold_expected(what);
}

// Both launches of each kernel: the few tokens of most cases take the one for small batches, the last of each
// list the other.
template <class T, class C>
bool verify_dtypes(bool copied) {
  for (const bool scaled : {false, true}) {
    if (!verify_write_kv<T, C>(1, 1, 16, 1, scaled, copied) ||
        !verify_write_kv<T, C>(37, 3, 48, 16, scaled, copied) ||
        !verify_write_kv<T, C>(21, 36, 96, 100, scaled, copied) ||
        !verify_write_kv<T, C>(1301, 8, 128, 64, scaled, copied)) {
      return false;
    }
  }
  for (const RopeCase& c :
       {RopeCase{1, 1, 1, 64, 1, true, false, false}, RopeCase{37, 6, 2, 128, 16, true, false, true},
        RopeCase{23, 5, 5, 64, 100, false, true, false}, RopeCase{9, 0, 3, 128, 64, true, true, true},
        RopeCase{1301, 9, 3, 128, 64, true, false, true}, RopeCase{2001, 17, 1, 64, 16, true, true, false}}) {
    if (!verify_rope_write_kv<T, C>(c, copied)) return false;
  }
  return true;
}

bool verify() {
  return verify_dtypes<f16, f16>(false) && verify_dtypes<f16, e4m3>(false) && verify_dtypes<f16, f16>(true) &&
         verify_dtypes<bf16, bf16>(false) && verify_dtypes<bf16, e4m3>(false) &&
         verify_dtypes<bf16, bf16>(true);
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

struct Shape {
  int64_t tokens;
  int q_heads, kv_heads, d, page_size;
  bool copied;
};

// Scales are given where there is an e4m3 cache or copy.
template <class T, class C>
void time_shape(const Args& args, const Shape& s, const Ceilings& ceilings, std::vector<Row>& rows) {
  const int64_t tokens = s.tokens, kv = int64_t(s.kv_heads) * s.d, packed = s.q_heads * int64_t(s.d) + 2 * kv;
  const int64_t pages = (tokens + s.page_size - 1) / s.page_size, cache_size = pages * s.page_size * kv;
  const bool scaled = s.copied || std::is_same_v<C, e4m3>;
  const double stored = 2.0 * kv * (sizeof(C) + s.copied);  // bytes of a token in caches and copies
  const double write_bytes = tokens * (2.0 * kv * sizeof(T) + stored + 8.0);
  const double rope_bytes =
      tokens * (1.0 * packed * sizeof(T) + s.q_heads * s.d * sizeof(T) + stored + 4.0 * s.d + 12.0);
  const int sets = cold_sets(static_cast<size_t>(write_bytes));
  const auto qkv = Array<T>::normal(sets * tokens * packed, 1);
  const Array<T> q_out(sets * tokens * s.q_heads * s.d);
  const Array<C> caches(2 * sets * cache_size);
  const Array<e4m3> copies(s.copied ? 2 * sets * cache_size : 0);
  const auto scales = Array<float>::normal(kv, 3, 0.05f, 0.01f);
  const Array<int64_t> slots(shuffled_slots(sets, tokens));
  std::vector<int32_t> order(tokens);
  for (int64_t t = 0; t < tokens; ++t) order[t] = static_cast<int32_t>(t);
  const Array<int32_t> positions(order);
  const Array<float> cos_sin(rope_table(tokens, s.d));
  const auto norm = Array<T>::normal(s.d, 2, 1.0f, 0.1f);
  const float* scale = scaled ? scales.data() : nullptr;
  const auto cache = [&](const auto& values, int set, int side) {
    if (values.size() == 0) return PagedCache{};
    return PagedCache{values.data() + (2 * set + side) * cache_size, s.page_size * kv, kv, s.d};
  };

  const Timing write = time_launches(sets, args.repeats(), [&](int set, cudaStream_t stream) {
    const T* k = qkv.data() + set * 2 * tokens * kv;
    const WriteKvParams params{
        .dtype = dtype_of<T>(),
        .cache_dtype = dtype_of<C>(),
        .num_tokens = tokens,
        .num_kv_heads = s.kv_heads,
        .head_dim = s.d,
        .k = k,
        .v = k + tokens * kv,
        .k_token_stride = kv,
        .k_head_stride = s.d,
        .v_token_stride = kv,
        .v_head_stride = s.d,
        .k_cache = cache(caches, set, 0),
        .v_cache = cache(caches, set, 1),
        .k_copy = cache(copies, set, 0),
        .v_copy = cache(copies, set, 1),
        .cache = {pages, s.page_size},
        .slot_mapping = slots.data() + set * tokens,
        .k_scale = scale,
        .v_scale = scale,
    };
    return run_write_kv(params, stream);
  });
  const Timing rope = time_launches(sets, args.repeats(), [&](int set, cudaStream_t stream) {
    const RopeWriteKvParams params{
        .dtype = dtype_of<T>(),
        .num_tokens = tokens,
        .qkv = qkv.data() + set * tokens * packed,
        .qkv_token_stride = packed,
        .heads =
            {
                .cache_dtype = dtype_of<C>(),
                .num_q_heads = s.q_heads,
                .num_kv_heads = s.kv_heads,
                .head_dim = s.d,
                .q_out = q_out.data() + set * tokens * s.q_heads * s.d,
                .k_cache = cache(caches, set, 0),
                .v_cache = cache(caches, set, 1),
                .k_copy = cache(copies, set, 0),
                .v_copy = cache(copies, set, 1),
                .cache = {pages, s.page_size},
                .slot_mapping = slots.data() + set * tokens,
                .positions = positions.data(),
                .positions_are_int64 = false,
                .cos_sin = cos_sin.data(),
                .max_positions = tokens,
                .q_norm = norm.data(),
                .k_norm = norm.data(),
                .eps = 1e-6f,
                .interleaved = false,
                .k_scale = scale,
                .v_scale = scale,
            },
    };
    return run_rope_write_kv(params, stream);
  });
  const std::string shape = " " + args.text("heads") + " " + name_of<T>() + " to " + name_of<C>() +
                            (s.copied ? " and e4m3" : "") + ", " + std::to_string(tokens) + " tokens";
  const auto copy = [&](const char* name, double bytes) {
    const auto half = static_cast<size_t>(bytes / 2);
    const Timing timing = time_ceiling<true>(half, args.repeats());
    rows.push_back(
        {std::string("  plain copy of as many bytes as ") + name, timing, 2.0 * half, ceilings.copy_gb_s});
  };
  rows.push_back({"write_kv" + shape, write, write_bytes, ceilings.copy_gb_s});
  copy("write_kv", write_bytes);
  rows.push_back({"rope_write_kv" + shape, rope, rope_bytes, ceilings.copy_gb_s});
  copy("rope_write_kv", rope_bytes);
}

std::vector<int> numbers(const Args& args, const std::string& option, int least) {
  std::vector<int> values;
  for (const std::string& item : split(args.text(option), ',')) {
    char* end = nullptr;
    const int64_t value = std::strtoll(item.c_str(), &end, 10);
    if (item.empty() || *end != '\0' || value < least || value > 1 << 30)
      args.fail("--" + option + ": expected integers of at least " + std::to_string(least) + ", got '" +
                item + "'");
    values.push_back(static_cast<int>(value));
  }
  return values;
}

}  // namespace
}  // namespace fusedkv::bench

int main(int argc, char** argv) {
  using namespace fusedkv::bench;
  const Args args(argc, argv, "Cache writes of the storage layers: write_kv and rope_write_kv.",
                  {{"heads", "32,8,128", "query heads (of rope_write_kv), key/value heads, head dim"},
                   {"tokens", "64,512,8192", "numbers of tokens to time"},
                   {"page-size", "64", "tokens a page"},
                   {"dtype", "bf16", "f16 or bf16, of the projection"},
                   {"cache-dtype", "same", "same or e4m3"},
                   {"copy", "none", "none, or e4m3: copies beside the caches"}});
  const auto one_of = [&](const char* option, const char* first, const char* second) {
    const std::string& value = args.text(option);
    if (value != first && value != second)
      args.fail(std::string("--") + option + ": expected " + first + " or " + second + ", got " + value);
    return value == second;
  };
  const bool is_bf16 = one_of("dtype", "f16", "bf16"), is_e4m3 = one_of("cache-dtype", "same", "e4m3");
  const bool copied = one_of("copy", "none", "e4m3");
  if (is_e4m3 && copied) args.fail("--copy: expected none beside e4m3 caches, got e4m3");
  const std::vector<int> heads = numbers(args, "heads", 0), tokens = numbers(args, "tokens", 1);
  if (heads.size() != 3 || heads[1] < 1 || (heads[2] != 64 && heads[2] != 128))
    args.fail("--heads: expected Hq,Hkv,D with D 64 or 128, got " + args.text("heads"));
  const int page_size = static_cast<int>(args.integer("page-size"));
  if (page_size < 1) args.fail("--page-size: expected at least 1, got " + args.text("page-size"));
  if (!verify()) return 1;
  std::fprintf(stderr, "verified against the CPU oracle\n");
  if (args.verify_only()) return 0;

  const Ceilings ceilings = measure_ceilings(args.repeats());
  std::vector<Row> rows;
  for (const int count : tokens) {
    const Shape shape{count, heads[0], heads[1], heads[2], page_size, copied};
    const auto time = is_bf16 ? (is_e4m3 ? time_shape<bf16, e4m3> : time_shape<bf16, bf16>)
                              : (is_e4m3 ? time_shape<f16, e4m3> : time_shape<f16, f16>);
    time(args, shape, ceilings, rows);
  }
  print_results(args, "bench_cache_write", ceilings, rows);
}

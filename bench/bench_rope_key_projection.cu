// rope_key_projection: x @ weight^T with norm, RoPE and the cache write as its epilogue. Each of its kernels
// is verified by itself, and can be timed by itself.
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "bench_common.h"
#include "kernels/dispatch.h"
#include "kernels/launch.h"

namespace fusedkv {

// What run_rope_key_projection chooses from.
template <class T, int D>
cudaError_t launch_few_tokens(const RopeKeyProjectionParams& params, cudaStream_t stream);
template <class T, int D>
cudaError_t launch_rope_key_projection(const RopeKeyProjectionParams& params, cudaStream_t stream);
template <class T, int D>
bool has_hopper_kernel();
template <class T, int D>
cudaError_t launch_hopper(const RopeKeyProjectionParams& params, cudaStream_t stream);
template <class T, int D, int kCols>
cudaError_t launch_hopper_tile(const RopeKeyProjectionParams& params, cudaStream_t stream);

}  // namespace fusedkv

namespace fusedkv::bench {
namespace {

using f16 = __half;
using bf16 = __nv_bfloat16;
using e4m3 = __nv_fp8_e4m3;

// hopper_C: tiles of C columns.
enum class Path { kAuto, kPortable, kFew, kHopper, kHopper128, kHopper256 };
const std::vector<std::string> kPathNames = {"auto", "portable", "few", "hopper", "hopper_128", "hopper_256"};

template <class T, int D>
cudaError_t launch_path(Path path, const RopeKeyProjectionParams& p, cudaStream_t stream) {
  switch (path) {
    case Path::kAuto:
      return run_rope_key_projection(p, stream);
    case Path::kPortable:
      return launch_rope_key_projection<T, D>(p, stream);
    case Path::kFew:
      return launch_few_tokens<T, D>(p, stream);
    case Path::kHopper:
      return launch_hopper<T, D>(p, stream);
    case Path::kHopper128:
      return launch_hopper_tile<T, D, 128>(p, stream);
    case Path::kHopper256:
      return launch_hopper_tile<T, D, 256>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch(Path path, const RopeKeyProjectionParams& p, cudaStream_t stream) {
  return dispatch_head_dim(p.heads.head_dim,
                           [&](auto d) { return launch_path<T, decltype(d)::value>(path, p, stream); });
}

bool can_run(Path path, int64_t tokens) {
  if (path == Path::kFew && tokens > 1024) return false;
  return path < Path::kFew || has_hopper_kernel<bf16, 128>();
}

struct Case {
  int64_t tokens;
  int hidden, num_q_heads, num_kv_heads, head_dim;
  int page_size = 16, x_gap = 0;  // x_gap: elements between the rows of x
  bool interleaved = false, norm = true, bias = false, int64_positions = true, scales = false, copies = false;
  bool input_norm = false;

  int num_heads() const { return num_q_heads + 2 * num_kv_heads; }
  int64_t num_pages() const { return 2 * tokens / page_size + 1; }
  int64_t num_slots() const { return num_pages() * page_size; }
  int64_t max_positions() const { return tokens + 3; }
  size_t cache_elements() const { return num_slots() * num_kv_heads * head_dim; }

  std::string name() const {
    return std::to_string(tokens) + " x " + std::to_string(hidden) + " -> " + std::to_string(num_q_heads) +
           "/" + std::to_string(num_kv_heads) + "/" + std::to_string(head_dim);
  }
  std::string options() const {
    const auto flag = [](bool on, const char* name) { return on ? std::string(" ") + name : std::string(); };
    return flag(interleaved, "interleaved") + flag(norm, "norm") + flag(bias, "bias") +
           flag(int64_positions, "int64") + flag(scales, "scales") + flag(copies, "copies") +
           flag(input_norm, "input norm") + " page " + std::to_string(page_size) + " gap " +
           std::to_string(x_gap);
  }
};

// Any order of distinct slots, spread over the pages.
std::vector<int64_t> scattered_slots(const Case& c) {
  std::vector<int64_t> slots(c.tokens);
  for (int64_t t = 0; t < c.tokens; ++t) slots[t] = c.num_slots() - 1 - 2 * t;
  return slots;
}

std::vector<int64_t> reversed_positions(const Case& c) {
  std::vector<int64_t> positions(c.tokens);
  for (int64_t t = 0; t < c.tokens; ++t) positions[t] = c.tokens - 1 - t;
  return positions;
}

// From 0.001, with which e4m3 saturates, upwards.
std::vector<float> scale_values(const Case& c) {
  std::vector<float> scale(c.scales ? c.num_kv_heads * c.head_dim : 0);
  for (size_t i = 0; i < scale.size(); ++i) scale[i] = 0.001f + 0.02f * static_cast<float>(i % 9);
  return scale;
}

// One call's arrays. T is the dtype of the product, C the cache's.
template <class T, class C>
struct Problem {
  Problem(const Case& c, const std::vector<int64_t>& position_values, const std::vector<int64_t>& slot_values,
          uint64_t seed)
      : c(c),
        x(Array<T>::normal(c.tokens * (c.hidden + c.x_gap), seed)),
        weight(Array<T>::normal(size_t(c.num_heads()) * c.head_dim * c.hidden, seed + 1, 0.0f,
                                1.0f / std::sqrt(static_cast<float>(c.hidden)))),
        bias(Array<T>::normal(c.num_heads() * c.head_dim, seed + 2)),
        q_norm(Array<T>::normal(c.head_dim, seed + 3, 1.0f, 0.3f)),
        k_norm(Array<T>::normal(c.head_dim, seed + 4, 1.0f, 0.3f)),
        input_norm(Array<T>::normal(c.hidden, seed + 5, 1.0f, 0.3f)),
        q_out(c.tokens * c.num_q_heads * c.head_dim),
        caches{Array<C>(c.cache_elements()), Array<C>(c.cache_elements())},
        copies{Array<e4m3>(c.copies ? c.cache_elements() : 0),
               Array<e4m3>(c.copies ? c.cache_elements() : 0)},
        cos_sin(rope_table(c.max_positions(), c.head_dim)),
        scale(scale_values(c)),
        positions64(position_values),
        positions32(std::vector<int>(position_values.begin(), position_values.end())),
        slots(slot_values) {}

  RopeKeyProjectionParams params() const {
    const auto cache = [&](void* data) -> PagedCache {
      return {data, int64_t{c.page_size} * c.num_kv_heads * c.head_dim, int64_t{c.num_kv_heads} * c.head_dim,
              c.head_dim};
    };
    RopeKeyProjectionParams p{};
    p.dtype = dtype_of<T>();
    p.heads.cache_dtype = dtype_of<C>();
    p.num_tokens = c.tokens;
    p.hidden = c.hidden;
    p.heads.num_q_heads = c.num_q_heads;
    p.heads.num_kv_heads = c.num_kv_heads;
    p.heads.head_dim = c.head_dim;
    p.x = x.data();
    p.x_stride = c.hidden + c.x_gap;
    p.weight = weight.data();
    p.bias = c.bias ? bias.data() : nullptr;
    p.input_norm = c.input_norm ? input_norm.data() : nullptr;
    p.input_eps = 1e-6f;
    p.early_weight = true;  // a model's weights are there long before
    p.heads.q_out = c.num_q_heads > 0 ? q_out.data() : nullptr;
    if (c.num_kv_heads > 0) {
      p.heads.k_cache = cache(caches[0].data());
      p.heads.v_cache = cache(caches[1].data());
      if (c.copies) p.heads.k_copy = cache(copies[0].data()), p.heads.v_copy = cache(copies[1].data());
      p.heads.cache = {c.num_pages(), c.page_size};
      p.heads.slot_mapping = slots.data();
    }
    p.heads.positions = c.int64_positions ? static_cast<const void*>(positions64.data()) : positions32.data();
    p.heads.positions_are_int64 = c.int64_positions;
    p.heads.cos_sin = cos_sin.data();
    p.heads.max_positions = c.max_positions();
    p.heads.q_norm = c.norm ? q_norm.data() : nullptr;
    p.heads.k_norm = c.norm ? k_norm.data() : nullptr;
    p.heads.eps = 1e-6f;
    p.heads.interleaved = c.interleaved;
    p.heads.k_scale = p.heads.v_scale = c.scales ? scale.data() : nullptr;
    return p;
  }

  size_t bytes() const {
    return x.bytes() + weight.bytes() + q_out.bytes() + size_t(c.tokens) * kv_row_bytes();
  }
  size_t kv_row_bytes() const {
    return 2 * size_t(c.num_kv_heads) * c.head_dim * (sizeof(C) + (c.copies ? 1 : 0));
  }

  Case c;
  Array<T> x, weight, bias, q_norm, k_norm, input_norm;
  mutable Array<T> q_out;
  mutable Array<C> caches[2];     // keys, values
  mutable Array<e4m3> copies[2];  // empty without copies
  Array<float> cos_sin, scale;
  Array<int64_t> positions64;
  Array<int> positions32;
  Array<int64_t> slots;
};

// What an array should hold, and the length of the rotated pair that a value is part of, in the same unit: of
// this, a rounding of the product before norm and rotation may leave its relative error in the value.
struct ExpectedArray {
  explicit ExpectedArray(size_t count = 0) : values(count, NAN), pairs(count, 0.0) {}
  std::vector<double> values, pairs;
};

struct Expected {
  ExpectedArray q_out, caches[2], copies[2];
};

template <class T>
std::vector<double> doubles(const Array<T>& array) {
  std::vector<double> values;
  values.reserve(array.size());
  for (const T value : array.host()) values.push_back(to_double(value));
  return values;
}

// Eight sums side by side: one would wait for itself at every step.
double dot(const double* a, const double* b, int count) {
  double sums[8] = {};
  for (int i = 0; i < count; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
  }
  return (sums[0] + sums[1] + sums[2] + sums[3]) + (sums[4] + sums[5] + sums[6] + sums[7]);
}

template <class T, class C>
Expected oracle(const Problem<T, C>& problem) {
  const Case& c = problem.c;
  const int d = c.head_dim;
  const auto weight = doubles(problem.weight), bias = doubles(problem.bias);
  const auto input_norm = doubles(problem.input_norm);
  auto x = doubles(problem.x);
  std::vector<double> input_scale(c.tokens, 1.0);
  for (int64_t t = 0; c.input_norm && t < c.tokens; ++t) {  // see ProductParams
    double squares = 0;
    for (int k = 0; k < c.hidden; ++k) {
      double& value = x[t * (c.hidden + c.x_gap) + k];
      squares += value * value;
      value = to_double(T(static_cast<float>(value * input_norm[k])));
    }
    input_scale[t] = 1.0 / std::sqrt(squares / c.hidden + 1e-6);
  }
  const auto q_norm = doubles(problem.q_norm), k_norm = doubles(problem.k_norm);
  const auto cos_sin = problem.cos_sin.host(), scale = problem.scale.host();
  const auto positions = problem.positions64.host(), slots = problem.slots.host();
  Expected e;
  e.q_out = ExpectedArray(problem.q_out.size());
  for (int side = 0; side < 2; ++side) {
    e.caches[side] = ExpectedArray(problem.caches[side].size());
    e.copies[side] = ExpectedArray(problem.copies[side].size());
  }
  const auto finish_token = [&](int64_t t) {
    std::vector<double> y(d), pairs(d);
    const bool known = positions[t] >= 0 && positions[t] < c.max_positions();
    for (int head = 0; head < c.num_heads(); ++head) {
      const int kv_head = head - c.num_q_heads;
      const bool is_q = kv_head < 0, is_v = kv_head >= c.num_kv_heads;
      if (!is_q && (!known || slots[t] < 0 || slots[t] >= c.num_slots())) continue;
      for (int i = 0; i < d; ++i) {
        const size_t row = size_t(head) * d + i;
        y[i] = input_scale[t] * dot(&x[t * (c.hidden + c.x_gap)], &weight[row * c.hidden], c.hidden) +
               (c.bias ? bias[row] : 0.0);
      }
      if (!is_v && known) {
        const auto& norm = is_q ? q_norm : k_norm;
        y = rotate_head(y, c.norm ? &norm : nullptr, 1e-6, cos_sin.data() + positions[t] * d, c.interleaved);
      } else if (!is_v) {
        y.assign(d, NAN);
      }
      for (int i = 0; i < d; ++i) {
        const int other = c.interleaved ? i ^ 1 : (i + d / 2) % d;
        pairs[i] = is_v ? 0.0 : std::hypot(y[i], y[other]);
      }
      if (is_q) {
        const size_t at = (t * c.num_q_heads + head) * d;
        std::copy(y.begin(), y.end(), e.q_out.values.begin() + at);
        std::copy(pairs.begin(), pairs.end(), e.q_out.pairs.begin() + at);
        continue;
      }
      const int h = is_v ? kv_head - c.num_kv_heads : kv_head;
      const size_t at = (slots[t] * c.num_kv_heads + h) * d;
      for (int i = 0; i < d; ++i) {
        const double unit = c.scales ? scale[h * d + i] : 1.0, cache_unit = c.copies ? 1.0 : unit;
        const double saturated = std::max(-448.0, std::min(448.0, y[i] / unit));
        ExpectedArray &cache = e.caches[is_v], &copy = e.copies[is_v];
        cache.values[at + i] = !c.copies && sizeof(C) == 1 ? saturated : y[i] / cache_unit;
        cache.pairs[at + i] = pairs[i] / cache_unit;
        if (c.copies) copy.values[at + i] = saturated, copy.pairs[at + i] = pairs[i] / unit;
      }
    }
  };
  std::vector<std::thread> threads;
  const int count = std::max(1u, std::thread::hardware_concurrency());
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&finish_token, &c, i, count] {
      for (int64_t t = i; t < c.tokens; t += count) finish_token(t);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return e;
}

// Like matches() of bench_common.h, but says where in rows of `width` the first mismatches stand.
// product_error: the relative error of the product before norm and rotation.
template <class T>
bool rows_match(const std::string& what, const Array<T>& array, const ExpectedArray& expected,
                double product_error, int width) {
  // fp32 sums; e4m3 has the spacing 2^-9 near zero, and stores values that the scale has enlarged.
  const double absolute = sizeof(T) == 1 ? 0x1p-9 : 2e-5;
  const std::vector<T> actual = array.host();
  size_t wrong = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double got = to_double(actual[i]), want = expected.values[i];
    const double allowed = epsilon_of<T>() * std::abs(want) + product_error * expected.pairs[i] + absolute;
    const bool same = std::isnan(want) ? std::isnan(got) : std::abs(got - want) <= allowed;
    if (same || ++wrong > 6) continue;
    std::fprintf(stderr, "FAILED %s: row %zu column %zu: got %.6g, expected %.6g\n", what.c_str(), i / width,
                 i % width, got, want);
  }
  if (wrong > 0) {
    std::fprintf(stderr, "FAILED %s: %zu of %zu values\n", what.c_str(), wrong, actual.size());
  }
  return wrong == 0;
}

// The bytes of everything that a call writes.
template <class T, class C>
std::vector<char> all_bytes(const Problem<T, C>& problem) {
  std::vector<char> bytes;
  const auto append = [&](const auto& array) {
    const auto values = array.host();
    const char* begin = reinterpret_cast<const char*>(values.data());
    bytes.insert(bytes.end(), begin, begin + array.bytes());
  };
  append(problem.q_out);
  for (const auto& cache : problem.caches) append(cache);
  for (const auto& copy : problem.copies) append(copy);
  return bytes;
}

template <class T, class C>
void run_poisoned(Path path, const Problem<T, C>& problem) {
  problem.q_out.poison();
  for (auto& cache : problem.caches) cache.poison();
  for (auto& copy : problem.copies) copy.poison();
  CUDA_CHECK(launch<T>(path, problem.params(), nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());
}

// Every path against one oracle, and against itself in a second run.
template <class T, class C>
bool verify(const Case& c, const std::optional<Path>& only) {
  auto positions = reversed_positions(c), slots = scattered_slots(c);
  for (int64_t t = 0; t < c.tokens; ++t) {
    if (t % 5 == 1) positions[t] = t % 2 ? -1 : c.max_positions();
    if (t % 5 == 2) slots[t] = t % 2 ? -1 : c.num_slots();
  }
  const Problem<T, C> problem(c, positions, slots, 7);
  const Expected e = oracle(problem);
  bool passed = true;
  for (size_t i = 0; i < kPathNames.size(); ++i) {
    const Path path = static_cast<Path>(i);
    if ((only && path != *only) || !can_run(path, c.tokens)) continue;
    if (c.input_norm && path != Path::kFew) continue;
    const std::string name =
        kPathNames[i] + ": " + c.name() + " " + name_of<T>() + " " + name_of<C>() + c.options();
    run_poisoned(path, problem);
    // The Hopper kernels round the product, as a library's product would be.
    const bool is_rounded = path >= Path::kHopper || (path == Path::kAuto && c.tokens > 64);
    const double error = is_rounded ? epsilon_of<T>() / 2 : 0.0;
    passed &= rows_match(name + ", q_out", problem.q_out, e.q_out, error, c.num_q_heads * c.head_dim);
    const int width = c.num_kv_heads * c.head_dim;
    for (int side = 0; side < 2; ++side) {
      const std::string letter = side == 0 ? ", k_" : ", v_";
      passed &= rows_match(name + letter + "cache", problem.caches[side], e.caches[side], error, width);
      passed &= rows_match(name + letter + "copy", problem.copies[side], e.copies[side], error, width);
    }
    const std::vector<char> first = all_bytes(problem);
    run_poisoned(path, problem);
    if (all_bytes(problem) != first) {
      std::fprintf(stderr, "FAILED %s: another run gave other bits\n", name.c_str());
      passed = false;
    }
  }
  return passed;
}

// Ragged last tiles in all directions, contractions shorter and longer than a ring of stages, every option.
bool verify_options(Case c, const std::optional<Path>& only) {
  bool passed = verify<bf16, bf16>(c, only);
  if (c.tokens <= 129) {
    c.input_norm = true;
    passed &= verify<bf16, bf16>(c, only);
    c.input_norm = false;
  }
  c.interleaved = c.bias = true;
  c.int64_positions = false;
  c.x_gap = 8;
  passed &= verify<f16, f16>(c, only);
  c.scales = true;
  c.page_size = 1;
  passed &= verify<bf16, e4m3>(c, only);
  c.interleaved = c.norm = false;
  c.num_q_heads = 0;
  passed &= verify<f16, e4m3>(c, only);
  c.norm = c.copies = true;
  c.num_q_heads = 3;
  c.page_size = 5;
  passed &= verify<bf16, bf16>(c, only);
  c.scales = c.bias = false;
  c.num_q_heads = 0;
  c.num_kv_heads = 3;
  passed &= verify<f16, f16>(c, only);
  return passed;
}

bool verify_all(const std::optional<Path>& only) {
  int device, sms;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  bool passed = true;
  for (const int d : {64, 128}) {
    for (const int64_t tokens : {1, 7, 19, 50, 64, 129, 257, 600}) {
      const int hidden = tokens % 2 == 0 ? 264 : tokens == 19 ? 72 : 712;
      passed &= verify_options({tokens, hidden, 2, 1, d}, only);
    }
    passed &= verify<bf16, bf16>({600, 8, 3, 0, d}, only);
    // Longer than the rings of a cluster of eight together.
    passed &= verify<bf16, bf16>({7, 7112, 1, 1, d}, only);
    passed &= verify<bf16, bf16>({50, 7112, 1, 1, d}, only);
    passed &= verify<bf16, bf16>({.tokens = 50,
                                  .hidden = 7112,
                                  .num_q_heads = 1,
                                  .num_kv_heads = 1,
                                  .head_dim = d,
                                  .input_norm = true},
                                 only);
    // More tiles of every size than the GPU has SMs, so that CTAs walk from tile to tile at every place of
    // the ring; the last two shapes make three rounds, of tiles that are shorter and longer than what the
    // ring's first stage waits for.
    passed &= verify<bf16, bf16>({int64_t{sms} * 22 + 96, 328, 1024 / d, 256 / d, d}, only);
    passed &= verify<f16, f16>({int64_t{sms} * 22 - 4, 136, 2560 / d - 5, 3, d}, only);
    passed &= verify<f16, f16>({int64_t{sms} * 37 + 116, 72, 1024 / d, 512 / d, d}, only);
    passed &= verify<bf16, bf16>({int64_t{sms} * 37 + 116, 968, 1024 / d, 512 / d, d}, only);
  }
  return passed;
}

template <class T, class C>
Row time_case(const Case& c, Path path, const Args& args, const Ceilings& ceilings) {
  std::vector<Problem<T, C>> sets;
  sets.emplace_back(c, reversed_positions(c), scattered_slots(c), 0);
  const size_t bytes = sets[0].bytes();
  const int count = args.integer("sets") > 0 ? static_cast<int>(args.integer("sets")) : cold_sets(bytes);
  for (int i = 1; i < count; ++i) sets.emplace_back(c, reversed_positions(c), scattered_slots(c), 10 * i);
  const Timing timing = time_launches(count, args.repeats(), [&](int set, cudaStream_t stream) {
    return launch<T>(path, sets[set].params(), stream);
  });
  const double flops = 2.0 * c.tokens * c.hidden * c.num_heads() * c.head_dim;
  const std::string name = c.name() + " " + kPathNames[static_cast<size_t>(path)];
  return {name, timing, static_cast<double>(bytes), ceilings.copy_gb_s, flops};
}

// The index of an option's value among those allowed.
size_t one_of(const Args& args, const std::string& option, const std::vector<std::string>& values) {
  const auto found = std::find(values.begin(), values.end(), args.text(option));
  if (found != values.end()) return found - values.begin();
  std::string expected;
  for (const std::string& value : values) expected += (expected.empty() ? "" : ", ") + value;
  args.fail("--" + option + ": expected one of " + expected + ", got " + args.text(option));
}

// Comma-separated positive integers.
std::vector<int64_t> numbers(const Args& args, const std::string& option) {
  std::vector<int64_t> values;
  for (const std::string& item : split(args.text(option), ',')) {
    char* rest = nullptr;
    const long long value = std::strtoll(item.c_str(), &rest, 10);
    if (item.empty() || *rest != '\0' || value < 1 || value > 1 << 30) {
      args.fail("--" + option + ": expected positive integers, got " + args.text(option));
    }
    values.push_back(value);
  }
  return values;
}

int run(int argc, char** argv) {
  const Args args(argc, argv, "rope_key_projection: tokens x hidden -> Hq/Hkv/D",
                  {{"tokens", "0", "rows of x, several with commas; 0: a list of shapes"},
                   {"hidden", "2048", "columns of x, several with commas"},
                   {"heads", "0,8,128", "query heads, key/value heads, head dim; several with +"},
                   {"dtype", "bf16", "f16 or bf16"},
                   {"cache-dtype", "same", "same or e4m3"},
                   {"path", "auto", "one kernel, or all: auto and every kernel that can run"},
                   {"sets", "0", "sets of buffers to rotate over; 0: so many that the L2 is cold"}});
  std::vector<std::string> path_choices = kPathNames;
  path_choices.push_back("all");
  const size_t chosen = one_of(args, "path", path_choices);
  const bool all_paths = chosen == kPathNames.size();
  const bool is_bf16 = one_of(args, "dtype", {"f16", "bf16"}),
             is_e4m3 = one_of(args, "cache-dtype", {"same", "e4m3"});
  std::vector<Case> cases;
  if (args.text("tokens") != "0") {
    for (const std::string& text : split(args.text("heads"), '+')) {
      const std::vector<std::string> heads = split(text, ',');
      if (heads.size() != 3) args.fail("--heads: expected three numbers, got " + text);
      for (const int64_t hidden : numbers(args, "hidden")) {
        for (const int64_t tokens : numbers(args, "tokens")) {
          cases.push_back({tokens, static_cast<int>(hidden), std::atoi(heads[0].c_str()),
                           std::atoi(heads[1].c_str()), std::atoi(heads[2].c_str())});
        }
      }
    }
  } else {
    for (const int64_t tokens : {1, 8, 32, 64, 256, 1024}) cases.push_back({tokens, 2048, 16, 16, 128});
    for (const int64_t tokens : {8192, 16384}) {
      for (const int hidden : {2048, 4096}) {
        // Keys and values alone, and packed projections: 1024, 2048, 3072 and 6144 columns.
        cases.push_back({tokens, hidden, 0, 4, 128});
        cases.push_back({tokens, hidden, 0, 8, 128});
        cases.push_back({tokens, hidden, 16, 4, 128});
        cases.push_back({tokens, hidden, 16, 16, 128});
      }
    }
    cases.push_back({8192, 2048, 32, 8, 64});
  }

  const std::optional<Path> only =
      all_paths || chosen == 0 ? std::nullopt : std::optional<Path>(static_cast<Path>(chosen));
  if (!verify_all(only)) return 1;
  if (args.verify_only()) {
    std::printf("rope_key_projection: verified\n");
    return 0;
  }
  const Ceilings ceilings = measure_ceilings(args.repeats());
  std::vector<Row> rows;
  for (const Case& c : cases) {
    for (size_t i = 0; i < kPathNames.size(); ++i) {
      const Path path = static_cast<Path>(i);
      if ((!all_paths && i != chosen) || !can_run(path, c.tokens)) continue;
      const auto time = is_bf16 ? (is_e4m3 ? time_case<bf16, e4m3> : time_case<bf16, bf16>)
                                : (is_e4m3 ? time_case<f16, e4m3> : time_case<f16, f16>);
      rows.push_back(time(c, path, args, ceilings));
    }
  }
  print_results(args, "rope_key_projection", ceilings, rows);
  return 0;
}

}  // namespace
}  // namespace fusedkv::bench

int main(int argc, char** argv) { return fusedkv::bench::run(argc, argv); }

// rope_key_projection: x @ weight^T with norm, RoPE and the cache write as its epilogue.
#include <cmath>
#include <string>
#include <vector>

#include "bench_common.h"
#include "kernels/launch.h"

namespace fusedkv::bench {
namespace {

struct Case {
  int64_t tokens;
  int hidden, num_q_heads, num_kv_heads, head_dim;
  int page_size = 16;
  bool interleaved = false, norm = true, bias = false, int64_positions = true, scales = false;

  int num_heads() const { return num_q_heads + 2 * num_kv_heads; }
  int64_t num_pages() const { return 2 * tokens / page_size + 1; }
  int64_t num_slots() const { return num_pages() * page_size; }
  int64_t max_positions() const { return tokens + 3; }
  size_t cache_elements() const { return num_slots() * num_kv_heads * head_dim; }

  std::string name() const {
    return std::to_string(tokens) + " x " + std::to_string(hidden) + " -> " + std::to_string(num_q_heads) +
           "/" + std::to_string(num_kv_heads) + "/" + std::to_string(head_dim);
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
        x(Array<T>::normal(c.tokens * c.hidden, seed)),
        weight(Array<T>::normal(size_t(c.num_heads()) * c.head_dim * c.hidden, seed + 1, 0.0f,
                                1.0f / std::sqrt(static_cast<float>(c.hidden)))),
        bias(Array<T>::normal(c.num_heads() * c.head_dim, seed + 2)),
        q_norm(Array<T>::normal(c.head_dim, seed + 3, 1.0f, 0.3f)),
        k_norm(Array<T>::normal(c.head_dim, seed + 4, 1.0f, 0.3f)),
        q_out(c.tokens * c.num_q_heads * c.head_dim),
        k_cache(c.cache_elements()),
        v_cache(c.cache_elements()),
        cos_sin(rope_table(c.max_positions(), c.head_dim)),
        scale(scale_values(c)),
        positions64(position_values),
        positions32(std::vector<int>(position_values.begin(), position_values.end())),
        slots(slot_values) {}

  RopeKeyProjectionParams params() const {
    const PagedCache strides{nullptr, int64_t{c.page_size} * c.num_kv_heads * c.head_dim,
                             int64_t{c.num_kv_heads} * c.head_dim, c.head_dim};
    RopeKeyProjectionParams p{};
    p.dtype = dtype_of<T>();
    p.heads.cache_dtype = dtype_of<C>();
    p.num_tokens = c.tokens;
    p.hidden = c.hidden;
    p.heads.num_q_heads = c.num_q_heads;
    p.heads.num_kv_heads = c.num_kv_heads;
    p.heads.head_dim = c.head_dim;
    p.x = x.data();
    p.x_stride = c.hidden;
    p.weight = weight.data();
    p.bias = c.bias ? bias.data() : nullptr;
    p.heads.q_out = q_out.data();
    p.heads.k_cache = p.heads.v_cache = strides;
    p.heads.k_cache.data = k_cache.data();
    p.heads.v_cache.data = v_cache.data();
    p.heads.cache = {c.num_pages(), c.page_size};
    p.heads.slot_mapping = slots.data();
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
  size_t kv_row_bytes() const { return 2 * size_t(c.num_kv_heads) * c.head_dim * sizeof(C); }

  Case c;
  Array<T> x, weight, bias, q_norm, k_norm, q_out;
  Array<C> k_cache, v_cache;
  Array<float> cos_sin, scale;
  Array<int64_t> positions64;
  Array<int> positions32;
  Array<int64_t> slots;
};

struct Expected {
  std::vector<double> q_out, k_cache, v_cache;
};

template <class T, class C>
Expected oracle(const Problem<T, C>& problem) {
  const Case& c = problem.c;
  const int d = c.head_dim;
  const auto x = problem.x.host(), weight = problem.weight.host(), bias = problem.bias.host();
  const auto q_norm = problem.q_norm.host(), k_norm = problem.k_norm.host();
  const auto cos_sin = problem.cos_sin.host(), scale = problem.scale.host();
  const auto positions = problem.positions64.host(), slots = problem.slots.host();
  Expected e{std::vector<double>(problem.q_out.size()), std::vector<double>(c.cache_elements(), NAN),
             std::vector<double>(c.cache_elements(), NAN)};
  for (int64_t t = 0; t < c.tokens; ++t) {
    const bool known = positions[t] >= 0 && positions[t] < c.max_positions();
    for (int head = 0; head < c.num_heads(); ++head) {
      const int kv_head = head - c.num_q_heads;
      const bool is_q = kv_head < 0, is_v = kv_head >= c.num_kv_heads;
      std::vector<double> y(d), norm(d);
      for (int i = 0; i < d; ++i) {
        const size_t row = size_t(head) * d + i;
        norm[i] = to_double((is_q ? q_norm : k_norm)[i]);
        y[i] = c.bias ? to_double(bias[row]) : 0.0;
        for (int k = 0; k < c.hidden; ++k) {
          y[i] += to_double(x[t * c.hidden + k]) * to_double(weight[row * c.hidden + k]);
        }
      }
      if (!is_v && known) {
        y = rotate_head(y, c.norm ? &norm : nullptr, 1e-6, cos_sin.data() + positions[t] * d, c.interleaved);
      } else if (!is_v) {
        y.assign(d, NAN);
      }
      if (is_q) {
        std::copy(y.begin(), y.end(), e.q_out.begin() + (t * c.num_q_heads + head) * d);
      } else if (known && slots[t] >= 0 && slots[t] < c.num_slots()) {
        const int h = is_v ? kv_head - c.num_kv_heads : kv_head;
        const double limit = sizeof(C) == 1 ? 448.0 : INFINITY;
        for (int i = 0; i < d; ++i) {
          const double value = c.scales ? y[i] / scale[h * d + i] : y[i];
          (is_v ? e.v_cache : e.k_cache)[(slots[t] * c.num_kv_heads + h) * d + i] =
              std::max(-limit, std::min(limit, value));
        }
      }
    }
  }
  return e;
}

template <class T, class C>
bool verify(const Case& c) {
  auto positions = reversed_positions(c), slots = scattered_slots(c);
  for (int64_t t = 0; t < c.tokens; ++t) {
    if (t % 5 == 1) positions[t] = t % 2 ? -1 : c.max_positions();
    if (t % 5 == 2) slots[t] = t % 2 ? -1 : c.num_slots();
  }
  const Problem<T, C> problem(c, positions, slots, 7);
  CUDA_CHECK(run_rope_key_projection(problem.params(), nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());
  const Expected e = oracle(problem);
  const std::string name = c.name() + " " + name_of<T>() + " " + name_of<C>();
  // fp32 sums; e4m3 has the spacing 2^-9 near zero, and stores values that the scale has enlarged.
  const double absolute = 2e-5, cache_absolute = sizeof(C) == 1 ? 0x1p-9 : absolute;
  return matches(name + " q_out", problem.q_out.host(), e.q_out, absolute) &&
         matches(name + " k_cache", problem.k_cache.host(), e.k_cache, cache_absolute) &&
         matches(name + " v_cache", problem.v_cache.host(), e.v_cache, cache_absolute);
}

// Every tile height with ragged last tiles in all directions, more stages than a ring has, every option.
bool verify_all() {
  bool passed = true;
  for (const int d : {64, 128}) {
    for (const int64_t tokens : {1, 19, 50, 600}) {
      const int hidden = tokens == 600 ? 264 : 712;
      Case c{tokens, hidden, 2, 1, d};
      passed &= verify<__nv_bfloat16, __nv_bfloat16>(c);
      c.interleaved = c.bias = true;
      c.int64_positions = false;
      passed &= verify<__half, __half>(c);
      c.scales = true;
      c.page_size = 1;
      passed &= verify<__nv_bfloat16, __nv_fp8_e4m3>(c);
      c.interleaved = c.norm = false;
      c.num_q_heads = 0;
      passed &= verify<__half, __nv_fp8_e4m3>(c);
    }
    passed &= verify<__nv_bfloat16, __nv_bfloat16>({600, 8, 3, 0, d});
  }
  return passed;
}

Row time_case(const Case& c, int repeats, const Ceilings& ceilings) {
  using Bf16Problem = Problem<__nv_bfloat16, __nv_bfloat16>;
  std::vector<Bf16Problem> sets;
  sets.emplace_back(c, reversed_positions(c), scattered_slots(c), 0);
  const size_t bytes = sets[0].bytes();
  const int count = cold_sets(bytes);
  for (int i = 1; i < count; ++i) sets.emplace_back(c, reversed_positions(c), scattered_slots(c), 10 * i);
  const Timing timing = time_launches(count, repeats, [&](int set, cudaStream_t stream) {
    return run_rope_key_projection(sets[set].params(), stream);
  });
  const double flops = 2.0 * c.tokens * c.hidden * c.num_heads() * c.head_dim;
  return {c.name(), timing, static_cast<double>(bytes), ceilings.copy_gb_s, flops};
}

int run(int argc, char** argv) {
  const Args args(argc, argv, "rope_key_projection in bf16: tokens x hidden -> Hq/Hkv/D");
  if (!verify_all()) return 1;
  if (args.verify_only()) {
    std::printf("rope_key_projection: verified\n");
    return 0;
  }
  const Ceilings ceilings = measure_ceilings(args.repeats());
  std::vector<Row> rows;
  for (const int64_t tokens : {1, 16, 64, 256, 1024}) {
    rows.push_back(time_case({tokens, 2048, 16, 16, 128}, args.repeats(), ceilings));
  }
  // The prefill shapes: the whole packed projection, then keys and values alone.
  rows.push_back(time_case({8192, 2048, 16, 16, 128}, args.repeats(), ceilings));
  rows.push_back(time_case({8192, 2048, 32, 8, 64}, args.repeats(), ceilings));
  rows.push_back(time_case({8192, 2048, 0, 4, 128}, args.repeats(), ceilings));
  rows.push_back(time_case({16384, 2048, 0, 8, 128}, args.repeats(), ceilings));
  rows.push_back(time_case({16384, 4096, 0, 4, 128}, args.repeats(), ceilings));
  print_results(args, "rope_key_projection", ceilings, rows);
  return 0;
}

}  // namespace
}  // namespace fusedkv::bench

int main(int argc, char** argv) { return fusedkv::bench::run(argc, argv); }

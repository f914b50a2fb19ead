// linear_add and swiglu_linear: the products of a decode step that make no heads.
#include <cstring>

#include "bench_common.h"

namespace fusedkv::bench {
namespace {

using f16 = __half;
using bf16 = __nv_bfloat16;

struct Shape {
  int64_t tokens;
  int hidden, size;  // size: columns of the output
  int gap = 0;       // elements between the rows of x, and of the output of linear_add; they are NaN
};

std::string name(const Shape& s) {
  return std::to_string(s.tokens) + " x " + std::to_string(s.hidden) + " -> " + std::to_string(s.size);
}

template <class T>
std::vector<T> rows_with_gaps(const Array<T>& values, int64_t rows, int width, int gap) {
  const auto from = values.host();
  std::vector<T> to(rows * (width + gap), T(NAN));
  for (int64_t row = 0; row < rows; ++row) {
    std::copy_n(from.begin() + row * width, width, to.begin() + row * (width + gap));
  }
  return to;
}

// Rows of a product in float64. With a norm's weights x * weight is rounded to T, as params.h says.
template <class T>
std::vector<double> product(const std::vector<T>& x, const std::vector<T>& weight, const std::vector<T>& norm,
                            const Shape& s, int rows, double eps) {
  std::vector<double> y(s.tokens * rows);
  for (int64_t t = 0; t < s.tokens; ++t) {
    std::vector<double> row(s.hidden);
    double squares = 0;
    for (int k = 0; k < s.hidden; ++k) {
      row[k] = to_double(x[t * (s.hidden + s.gap) + k]);
      squares += row[k] * row[k];
      if (!norm.empty()) row[k] = to_double(T(static_cast<float>(row[k] * to_double(norm[k]))));
    }
    const double scale = norm.empty() ? 1.0 : 1.0 / std::sqrt(squares / s.hidden + eps);
    for (int n = 0; n < rows; ++n) {
      double sum = 0;
      for (int k = 0; k < s.hidden; ++k) sum += row[k] * to_double(weight[size_t(n) * s.hidden + k]);
      y[t * rows + n] = scale * sum;
    }
  }
  return y;
}

template <class T, class Params>
Params params_of(const Shape& s, const Array<T>& x, const Array<T>& weight, const Array<T>* norm) {
  Params p{};
  p.dtype = dtype_of<T>();
  p.num_tokens = s.tokens;
  p.hidden = s.hidden;
  p.x = x.data();
  p.x_stride = s.hidden + s.gap;
  p.weight = weight.data();
  p.input_norm = norm ? norm->data() : nullptr;
  p.input_eps = 1e-6f;
  p.early_weight = true;
  p.size = s.size;
  return p;
}

template <class T>
Array<T> random_weight(int rows, int hidden) {
  return Array<T>::normal(size_t(rows) * hidden, 2, 0.0f, 1.0f / std::sqrt(static_cast<float>(hidden)));
}

// Whether two runs gave the same bits.
template <class T>
bool same_bits(const std::string& what, const Array<T>& a, const Array<T>& b) {
  const auto x = a.host(), y = b.host();
  const bool same = std::memcmp(x.data(), y.data(), a.bytes()) == 0;
  if (!same) std::fprintf(stderr, "FAILED %s: another run gave other bits\n", what.c_str());
  return same;
}

template <class T>
bool verify_add(const Shape& s) {
  const Array<T> x(rows_with_gaps(Array<T>::normal(s.tokens * s.hidden, 1), s.tokens, s.hidden, s.gap));
  const auto weight = random_weight<T>(s.size, s.hidden);
  const auto before = rows_with_gaps(Array<T>::normal(s.tokens * s.size, 3), s.tokens, s.size, s.gap);
  const auto y = product<T>(x.host(), weight.host(), {}, s, s.size, 0);
  std::vector<double> expected(before.size());
  for (size_t i = 0; i < before.size(); ++i) {
    const size_t row = i / (s.size + s.gap), column = i % (s.size + s.gap);
    expected[i] = to_double(before[i]) + (column < size_t(s.size) ? y[row * s.size + column] : 0.0);
  }
  const Array<T> out(before), again(before);
  auto p = params_of<T, LinearAddParams>(s, x, weight, nullptr);
  p.out_stride = s.size + s.gap;
  for (const Array<T>* to : {&out, &again}) {
    p.out = const_cast<T*>(to->data());
    p.early_weight = to == &again;
    CUDA_CHECK(run_linear_add(p, nullptr));
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  const std::string what = std::string("linear_add ") + name_of<T>() + " " + name(s);
  return matches(what, out.host(), expected, 2e-5) && same_bits(what, out, again);
}

template <class T>
bool verify_swiglu(const Shape& s, bool normed) {
  const Array<T> x(rows_with_gaps(Array<T>::normal(s.tokens * s.hidden, 1), s.tokens, s.hidden, s.gap));
  const auto weight = random_weight<T>(2 * s.size, s.hidden);
  const auto norm = Array<T>::normal(s.hidden, 4, 1.0f, 0.3f);
  const auto y =
      product<T>(x.host(), weight.host(), normed ? norm.host() : std::vector<T>(), s, 2 * s.size, 1e-6);
  std::vector<double> expected(s.tokens * s.size);
  for (int64_t t = 0; t < s.tokens; ++t) {
    for (int i = 0; i < s.size; ++i) {
      const double gate = y[t * 2 * s.size + i], up = y[t * 2 * s.size + s.size + i];
      expected[t * s.size + i] = gate / (1.0 + std::exp(-gate)) * up;
    }
  }
  const Array<T> out(expected.size()), again(expected.size());
  auto p = params_of<T, SwigluLinearParams>(s, x, weight, normed ? &norm : nullptr);
  for (const Array<T>* to : {&out, &again}) {
    p.out = const_cast<T*>(to->data());
    p.early_weight = to == &again;
    CUDA_CHECK(run_swiglu_linear(p, nullptr));
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  const std::string what = std::string("swiglu_linear ") + name_of<T>() + (normed ? " norm " : " ") + name(s);
  return matches(what, out.host(), expected, 2e-5) && same_bits(what, out, again);
}

// Every capacity of tokens, several tiles of them, contractions that come round a ring of stages or are
// shorter than one, and sizes that end inside a tile.
bool verify_all() {
  bool passed = true;
  for (const int64_t tokens : {0, 1, 7, 8, 19, 33, 64, 70}) {
    const int gap = tokens % 2 * 8;
    for (const int hidden : {72, 1160}) {
      passed &= verify_add<bf16>({tokens, hidden, 160, gap}) && verify_add<f16>({tokens, hidden, 256, gap});
      passed &= verify_swiglu<bf16>({tokens, hidden, 112, gap}, true) &&
                verify_swiglu<bf16>({tokens, hidden, 64, gap}, false) &&
                verify_swiglu<f16>({tokens, hidden, 128, gap}, false);
    }
  }
  return passed && verify_add<bf16>({3, 8192, 2048}) && verify_swiglu<bf16>({17, 4104, 1024}, true) &&
         verify_swiglu<bf16>({5, 8192, 64}, true) && verify_swiglu<bf16>({5, 8, 64}, true);
}

// One launch reads its weight, x and what is already there, and writes the output.
template <class Params>
void time_shape(const char* op, const Args& args, const Shape& s, bool normed, const Ceilings& ceilings,
                std::vector<Row>& results) {
  constexpr bool kAdds = std::is_same_v<Params, LinearAddParams>;
  const int rows = kAdds ? s.size : 2 * s.size;
  const double bytes = 2.0 * (double(rows) * s.hidden + double(s.tokens) * (s.hidden + s.size * (1 + kAdds)));
  const int sets = cold_sets(static_cast<size_t>(bytes));
  const size_t weight_size = size_t(rows) * s.hidden, x_size = s.tokens * s.hidden,
               y_size = s.tokens * s.size;
  const auto weight = Array<bf16>::normal(sets * weight_size, 1, 0.0f, 0.02f);
  const auto x = Array<bf16>::normal(sets * x_size, 2);
  const auto norm = Array<bf16>::normal(s.hidden, 3, 1.0f, 0.3f);
  const auto out = Array<bf16>::normal(sets * y_size, 4);
  const Timing timing = time_launches(sets, args.repeats(), [&](int set, cudaStream_t stream) {
    auto p = params_of<bf16, Params>(s, x, weight, normed ? &norm : nullptr);
    p.x = x.data() + set * x_size;
    p.weight = weight.data() + set * weight_size;
    p.out = const_cast<bf16*>(out.data()) + set * y_size;
    if constexpr (kAdds) {
      p.out_stride = s.size;
      return run_linear_add(p, stream);
    } else {
      return run_swiglu_linear(p, stream);
    }
  });
  results.push_back({std::string(op) + " bf16, " + name(s), timing, bytes, ceilings.read_gb_s});
}

}  // namespace
}  // namespace fusedkv::bench

int main(int argc, char** argv) {
  using namespace fusedkv::bench;
  const Args args(argc, argv, "The products of a decode step that make no heads: linear_add, swiglu_linear.",
                  {{"tokens", "0", "rows of x; 0: sweep 1, 8, 32 and 64"},
                   {"hidden", "2048", "of the model, a multiple of 32"},
                   {"intermediate", "5632", "of its MLP, a multiple of 32"}});
  const auto expect = [&](const char* name, bool condition, const char* expected) {
    if (!condition)
      args.fail(std::string("--") + name + ": expected " + expected + ", got " + args.text(name));
  };
  expect("tokens", args.integer("tokens") >= 0, "0 or more");
  for (const char* name : {"hidden", "intermediate"})
    expect(name, args.integer(name) >= 32 && args.integer(name) % 32 == 0, "a multiple of 32");
  if (!fusedkv::has_few_token_kernels()) {
    std::fprintf(stderr, "needs a Hopper GPU and kernels for sm_90a\n");
    return args.verify_only() ? 0 : 1;
  }
  if (!verify_all()) return 1;
  std::fprintf(stderr, "verified against the CPU oracle\n");
  if (args.verify_only()) return 0;

  const Ceilings ceilings = measure_ceilings(args.repeats());
  const int hidden = static_cast<int>(args.integer("hidden"));
  const int intermediate = static_cast<int>(args.integer("intermediate"));
  std::vector<Row> results;
  std::vector<int64_t> token_sweep = {1, 8, 32, 64};
  if (args.integer("tokens") > 0) token_sweep = {args.integer("tokens")};
  using fusedkv::LinearAddParams, fusedkv::SwigluLinearParams;
  for (const int64_t tokens : token_sweep) {
    time_shape<LinearAddParams>("linear_add", args, {tokens, hidden, hidden}, false, ceilings, results);
    time_shape<LinearAddParams>("linear_add", args, {tokens, intermediate, hidden}, false, ceilings, results);
    time_shape<SwigluLinearParams>("swiglu_linear with norm", args, {tokens, hidden, intermediate}, true,
                                   ceilings, results);
  }
  print_results(args, "bench_linear", ceilings, results);
}

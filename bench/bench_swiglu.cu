// swiglu: the gated activation between the two products of an MLP.
#include "bench_common.h"

namespace fusedkv::bench {
namespace {

using f16 = __half;
using bf16 = __nv_bfloat16;

// Rows of gate_up are `gap` elements apart, and the gaps are NaN.
template <class T>
bool verify_case(int64_t rows, int size, int gap) {
  const int64_t stride = 2 * size + gap;
  auto values = Array<T>::normal(rows * stride, 1, 0.0f, 4.0f).host();
  std::vector<double> expected(rows * size);
  for (int64_t row = 0; row < rows; ++row) {
    T* const x = values.data() + row * stride;
    std::fill(x + 2 * size, x + stride, T(NAN));
    if (row % 7 == 3) x[row % size] = T(NAN);
    for (int i = 0; i < size; ++i) {
      const double gate = to_double(x[i]), up = to_double(x[size + i]);
      expected[row * size + i] = gate / (1.0 + std::exp(-gate)) * up;
    }
  }
  const Array<T> gate_up(values), out(rows * size);
  const SwigluParams params{.dtype = dtype_of<T>(),
                            .rows = rows,
                            .size = size,
                            .gate_up = gate_up.data(),
                            .row_stride = stride,
                            .out = out.data()};
  CUDA_CHECK(run_swiglu(params, nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());
  const std::string what = std::string("swiglu ") + name_of<T>() + " [" + std::to_string(rows) + ", 2 * " +
                           std::to_string(size) + "]";
  return matches(what, out.host(), expected, 1e-7);  // f16 is spaced by 6e-8 near zero
}

// The last two are on both sides of the size from which a thread computes two vectors.
template <class T>
bool verify_dtype() {
  return verify_case<T>(0, 64, 0) && verify_case<T>(1, 8, 0) && verify_case<T>(1, 4096, 0) &&
         verify_case<T>(33, 88, 8) && verify_case<T>(700, 8, 24) && verify_case<T>(256, 4096, 0) &&
         verify_case<T>(257, 4104, 16);
}

void time_rows(const Args& args, int64_t rows, const Ceilings& ceilings, std::vector<Row>& results) {
  const int size = static_cast<int>(args.integer("size"));
  const int64_t outputs = rows * size;
  const double bytes = 2.0 * 3 * outputs;
  const int sets = cold_sets(static_cast<size_t>(bytes));
  const auto gate_up = Array<bf16>::normal(sets * outputs * 2, 1);
  const Array<bf16> out(sets * outputs);
  const Timing timing = time_launches(sets, args.repeats(), [&](int set, cudaStream_t stream) {
    const SwigluParams params{.dtype = DType::kBF16,
                              .rows = rows,
                              .size = size,
                              .gate_up = gate_up.data() + set * outputs * 2,
                              .row_stride = 2 * size,
                              .out = out.data() + set * outputs};
    return run_swiglu(params, stream);
  });
  const std::string shape = "swiglu bf16, " + std::to_string(rows) + " rows of 2 * " + std::to_string(size);
  const auto half = static_cast<size_t>(bytes / 2);
  results.push_back({shape, timing, bytes, ceilings.copy_gb_s});
  results.push_back({"  plain copy of as many bytes", time_ceiling<true>(half, args.repeats()), 2.0 * half,
                     ceilings.copy_gb_s});
}

}  // namespace
}  // namespace fusedkv::bench

int main(int argc, char** argv) {
  using namespace fusedkv::bench;
  const Args args(argc, argv, "The gated activation of an MLP: swiglu.",
                  {{"rows", "0", "tokens; 0: sweep 1, 8, 64, 1024, 8192 and 65536"},
                   {"size", "5632", "outputs a row, a multiple of 8"}});
  const auto expect = [&](const char* name, bool condition, const char* expected) {
    if (!condition)
      args.fail(std::string("--") + name + ": expected " + expected + ", got " + args.text(name));
  };
  expect("rows", args.integer("rows") >= 0, "0 or more");
  expect("size", args.integer("size") >= 8 && args.integer("size") % 8 == 0, "a multiple of 8");
  if (!verify_dtype<f16>() || !verify_dtype<bf16>()) return 1;
  std::fprintf(stderr, "verified against the CPU oracle\n");
  if (args.verify_only()) return 0;

  const Ceilings ceilings = measure_ceilings(args.repeats());
  std::vector<Row> results;
  std::vector<int64_t> row_sweep = {1, 8, 64, 1024, 8192, 65536};
  if (args.integer("rows") > 0) row_sweep = {args.integer("rows")};
  for (const int64_t rows : row_sweep) time_rows(args, rows, ceilings, results);
  print_results(args, "bench_swiglu", ceilings, results);
}

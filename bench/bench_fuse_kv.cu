// fuse_kv and its backward: keys and values of a reconstruction layer formed once, for many queries.
#include "bench_common.h"

namespace fusedkv::bench {
namespace {

using f16 = __half;
using bf16 = __nv_bfloat16;

// The tensors of one side. Rows of the sources are `gap` elements apart, and the gaps are NaN.
template <class T>
struct Side {
  Side(int num_sources, int64_t rows, int channels, int gap, uint64_t seed)
      : channels(channels),
        stride(channels + gap),
        weights(Array<float>::normal(size_t(num_sources) * channels, seed)),
        out(rows * channels),
        grad(Array<T>::normal(rows * channels, seed + 1)),
        grad_weights(size_t(num_sources) * channels) {
    for (int s = 0; s < num_sources; ++s) {
      auto values = Array<T>::normal(rows * stride, seed + 2 + s).host();
      for (int64_t i = 0; i < rows * stride; ++i) {
        if (i % stride >= channels) values[i] = T(NAN);
      }
      sources.emplace_back(values);
      grad_sources.emplace_back(rows * channels);
    }
  }

  FuseSide forward() const {
    FuseSide side{
        .num_sources = static_cast<int>(sources.size()), .weights = weights.data(), .out = out.data()};
    fill_sources(side);
    return side;
  }

  FuseBackwardSide backward() const {
    FuseBackwardSide side{.num_sources = static_cast<int>(sources.size()),
                          .weights = weights.data(),
                          .grad_out = grad.data(),
                          .grad_out_row_stride = channels,
                          .grad_weights = grad_weights.data()};
    fill_sources(side);
    for (size_t s = 0; s < sources.size(); ++s) side.grad_sources[s] = grad_sources[s].data();
    return side;
  }

  int64_t channels, stride;
  Array<float> weights;
  Array<T> out, grad;
  Array<float> grad_weights;
  std::vector<Array<T>> sources, grad_sources;

 private:
  template <class S>
  void fill_sources(S& side) const {
    for (size_t s = 0; s < sources.size(); ++s) {
      side.sources[s] = sources[s].data();
      side.row_strides[s] = stride;
    }
  }
};

template <class T>
bool verify_side(const std::string& what, const Side<T>& side, int64_t rows) {
  const auto weights = side.weights.host();
  const auto grad = side.grad.host();
  const int64_t channels = side.channels;
  std::vector<double> out(rows * channels), grad_weights(weights.size());
  for (size_t s = 0; s < side.sources.size(); ++s) {
    const auto source = side.sources[s].host();
    std::vector<double> grad_source(rows * channels);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < channels; ++c) {
        const double x = to_double(source[row * side.stride + c]), g = to_double(grad[row * channels + c]);
        const double w = weights[s * channels + c];
        out[row * channels + c] += w * x;
        grad_source[row * channels + c] = w * g;
        grad_weights[s * channels + c] += g * x;
      }
    }
    if (!matches(what + ", grad_sources", side.grad_sources[s].host(), grad_source, 1e-5)) return false;
  }
  return matches(what + ", out", side.out.host(), out, 1e-5) &&
         matches(what + ", grad_weights", side.grad_weights.host(), grad_weights, 1e-6 * (rows + 1));
}

template <class T>
bool verify_case(int64_t rows, int heads, int d, int k_sources, int v_sources) {
  Side<T> keys(k_sources, rows, heads * d, 8, 1), values(v_sources, rows, heads * d, 24, 100);
  FuseKvParams forward{.dtype = dtype_of<T>(), .rows = rows, .num_kv_heads = heads, .head_dim = d};
  forward.k = keys.forward();
  forward.v = values.forward();
  CUDA_CHECK(run_fuse_kv(forward, nullptr));

  FuseKvBackwardParams backward{.dtype = dtype_of<T>(), .rows = rows, .num_kv_heads = heads, .head_dim = d};
  backward.k = keys.backward();
  backward.v = values.backward();
  const Array<uint8_t> workspace(fuse_kv_backward_workspace_bytes(backward));
  backward.workspace = workspace.data();
  CUDA_CHECK(run_fuse_kv_backward(backward, nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());
  const std::string what = std::string("fuse_kv ") + name_of<T>() + " [" + std::to_string(rows) + ", " +
                           std::to_string(heads) + ", " + std::to_string(d) + "], " +
                           std::to_string(k_sources) + "+" + std::to_string(v_sources) + " sources";
  if (!verify_side(what + ", keys", keys, rows) || !verify_side(what + ", values", values, rows))
    return false;

  const auto first = keys.grad_weights.host(), first_values = values.grad_weights.host();
  CUDA_CHECK(run_fuse_kv_backward(backward, nullptr));
  CUDA_CHECK(cudaDeviceSynchronize());
  return identical(what + ", grad_weights of a second run", keys.grad_weights.host(), first) &&
         identical(what + ", grad_weights of a second run", values.grad_weights.host(), first_values);
}

template <class T>
bool verify_dtype() {
  return verify_case<T>(1, 1, 8, 1, 1) && verify_case<T>(33, 2, 64, 2, 2) &&
         verify_case<T>(70, 3, 40, 1, 2) && verify_case<T>(5, 36, 88, 3, 2) &&
         verify_case<T>(700, 8, 128, 2, 1) && verify_case<T>(19, 4, 64, 8, 5) &&
         verify_case<T>(700, 1, 8, 4, 7) && verify_case<T>(0, 2, 64, 2, 2);
}

// One set of buffers for a timed launch is one slice of each of these.
void time_rows(const Args& args, int64_t rows, int num_sources, const Ceilings& ceilings,
               std::vector<Row>& results) {
  const int heads = static_cast<int>(args.integer("kv-heads")),
            d = static_cast<int>(args.integer("head-dim"));
  const int64_t channels = heads * d, size = rows * channels;
  const double tensor_bytes = 2.0 * size;
  const double forward_bytes = tensor_bytes * 2 * (num_sources + 1);
  const double backward_bytes = tensor_bytes * 2 * (2 * num_sources + 1);
  const int sets = cold_sets(static_cast<size_t>(forward_bytes));
  const auto sources = Array<bf16>::normal(sets * size * 2 * num_sources, 1);
  const auto weights = Array<float>::normal(num_sources * channels, 2);
  const auto grad = Array<bf16>::normal(sets * size * 2, 3);
  const Array<bf16> out(sets * size * 2), grad_sources(sets * size * 2 * num_sources);
  const Array<float> grad_weights(2 * num_sources * channels);
  const auto slice = [&](const Array<bf16>& x, int set, int of, int index) {
    return x.data() + (int64_t(set) * of + index) * size;
  };

  const Timing forward = time_launches(sets, args.repeats(), [&](int set, cudaStream_t stream) {
    FuseKvParams params{.dtype = DType::kBF16, .rows = rows, .num_kv_heads = heads, .head_dim = d};
    for (int i = 0; i < 2; ++i) {
      FuseSide& side = i == 0 ? params.k : params.v;
      side = {.num_sources = num_sources, .weights = weights.data(), .out = slice(out, set, 2, i)};
      for (int s = 0; s < num_sources; ++s) {
        side.sources[s] = slice(sources, set, 2 * num_sources, i * num_sources + s);
        side.row_strides[s] = channels;
      }
    }
    return run_fuse_kv(params, stream);
  });

  FuseKvBackwardParams sized{.dtype = DType::kBF16, .rows = rows, .num_kv_heads = heads, .head_dim = d};
  sized.k.num_sources = sized.v.num_sources = num_sources;
  const Array<uint8_t> workspace(fuse_kv_backward_workspace_bytes(sized));
  const Timing backward = time_launches(sets, args.repeats(), [&](int set, cudaStream_t stream) {
    FuseKvBackwardParams params = sized;
    params.workspace = workspace.data();
    for (int i = 0; i < 2; ++i) {
      FuseBackwardSide& side = i == 0 ? params.k : params.v;
      side.weights = weights.data();
      side.grad_out = slice(grad, set, 2, i);
      side.grad_out_row_stride = channels;
      side.grad_weights = grad_weights.data() + i * num_sources * channels;
      for (int s = 0; s < num_sources; ++s) {
        side.sources[s] = slice(sources, set, 2 * num_sources, i * num_sources + s);
        side.row_strides[s] = channels;
        side.grad_sources[s] = slice(grad_sources, set, 2 * num_sources, i * num_sources + s);
      }
    }
    return run_fuse_kv_backward(params, stream);
  });

  const std::string suffix =
      " bf16, " + std::to_string(rows) + " rows, " + std::to_string(num_sources) + " sources a side";
  const auto copy = [&](const char* name, double bytes) {
    const auto half = static_cast<size_t>(bytes / 2);
    const Timing timing = time_ceiling<true>(half, args.repeats());
    results.push_back(
        {std::string("  plain copy of as many bytes as ") + name, timing, 2.0 * half, ceilings.copy_gb_s});
  };
  results.push_back({"fuse_kv" + suffix, forward, forward_bytes, ceilings.copy_gb_s});
  copy("fuse_kv", forward_bytes);
  results.push_back({"fuse_kv_backward" + suffix, backward, backward_bytes, ceilings.copy_gb_s});
  copy("fuse_kv_backward", backward_bytes);
}

}  // namespace
}  // namespace fusedkv::bench

int main(int argc, char** argv) {
  using namespace fusedkv::bench;
  const Args args(argc, argv, "Forming keys and values from their sources: fuse_kv and fuse_kv_backward.",
                  {{"rows", "0", "tokens; 0: sweep 512, 8192 and 65536"},
                   {"sources", "0", "sources a side, 1 to 8; 0: sweep 1, 2 and 8"},
                   {"kv-heads", "8", "key/value heads"},
                   {"head-dim", "128", "channels a head, a multiple of 8"}});
  const auto expect = [&](const char* name, bool condition, const char* expected) {
    if (!condition)
      args.fail(std::string("--") + name + ": expected " + expected + ", got " + args.text(name));
  };
  expect("rows", args.integer("rows") >= 0, "0 or more");
  expect("sources", args.integer("sources") >= 0 && args.integer("sources") <= 8, "0 to 8");
  expect("kv-heads", args.integer("kv-heads") >= 1, "at least 1");
  expect("head-dim", args.integer("head-dim") >= 8 && args.integer("head-dim") % 8 == 0, "a multiple of 8");
  if (!verify_dtype<f16>() || !verify_dtype<bf16>()) return 1;
  std::fprintf(stderr, "verified against the CPU oracle\n");
  if (args.verify_only()) return 0;

  const Ceilings ceilings = measure_ceilings(args.repeats());
  std::vector<Row> results;
  std::vector<int64_t> row_sweep = {512, 8192, 65536}, source_sweep = {1, 2, 8};
  if (args.integer("rows") > 0) row_sweep = {args.integer("rows")};
  if (args.integer("sources") > 0) source_sweep = {args.integer("sources")};
  for (const int64_t rows : row_sweep) {
    for (const int64_t sources : source_sweep) {
      time_rows(args, rows, static_cast<int>(sources), ceilings, results);
    }
  }
  print_results(args, "bench_fuse_kv", ceilings, results);
}

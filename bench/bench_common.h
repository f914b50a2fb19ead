// What the bench programs share: arguments, device arrays, oracle comparison, cold-L2 timing, ceilings,
// tables. A program verifies against a CPU oracle first and exits 1 on a mismatch; only then does it time
// anything.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/launch.h"

#define CUDA_CHECK(call)                                                                              \
  do {                                                                                                \
    const cudaError_t error_ = (call);                                                                \
    if (error_ != cudaSuccess) {                                                                      \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_)); \
      std::exit(1);                                                                                   \
    }                                                                                                 \
  } while (0)

namespace fusedkv::bench {

// ---------------------------------------------------------------------------------------------- arguments

struct Option {
  std::string name, value, help;  // value: the default
};

// The parts of a text between separators; at least one.
inline std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

// `--name value` for every option of the program, and --json, --verify-only, --repeats, --help for all.
class Args {
 public:
  Args(int argc, char** argv, std::string description, std::vector<Option> options = {})
      : program_(argv[0]), description_(std::move(description)), options_(std::move(options)) {
    options_.push_back({"repeats", "20", "timed graph replays a measurement"});
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      if (argument == "--help") {
        print_usage(stdout);
        std::exit(0);
      } else if (argument == "--json") {
        json_ = true;
      } else if (argument == "--verify-only") {
        verify_only_ = true;
      } else {
        const auto option = std::find_if(options_.begin(), options_.end(),
                                         [&](const Option& o) { return argument == "--" + o.name; });
        if (option == options_.end()) fail("unknown argument " + argument);
        if (i + 1 == argc) fail(argument + " needs a value");
        given_[option->name] = argv[++i];
      }
    }
    if (integer("repeats") < 1) fail("--repeats: expected at least 1, got " + text("repeats"));
  }

  bool json() const { return json_; }
  bool verify_only() const { return verify_only_; }
  int repeats() const { return static_cast<int>(integer("repeats")); }

  const std::string& text(const std::string& name) const {
    for (const Option& o : options_) {
      const auto given = given_.find(name);
      if (o.name == name) return given == given_.end() ? o.value : given->second;
    }
    std::abort();  // the program asked for an option that it did not declare
  }

  int64_t integer(const std::string& name) const {
    const std::string& value = text(name);
    char* end = nullptr;
    const int64_t number = std::strtoll(value.c_str(), &end, 10);
    if (value.empty() || *end != '\0') fail("--" + name + ": expected an integer, got '" + value + "'");
    return number;
  }

  [[noreturn]] void fail(const std::string& message) const {
    std::fprintf(stderr, "%s\n\n", message.c_str());
    print_usage(stderr);
    std::exit(2);
  }

 private:
  void print_usage(FILE* out) const {
    std::fprintf(out, "%s\n\nusage: %s [options]\n", description_.c_str(), program_.c_str());
    const auto line = [&](const std::string& left, const std::string& help) {
      std::fprintf(out, "  %-24s %s\n", left.c_str(), help.c_str());
    };
    for (const Option& o : options_) line("--" + o.name + " " + o.value, o.help);
    line("--json", "print JSON instead of a table");
    line("--verify-only", "compare small ragged shapes with the CPU oracle and stop");
    line("--help", "print this and stop");
  }

  std::string program_, description_;
  std::vector<Option> options_;
  std::map<std::string, std::string> given_;
  bool json_ = false, verify_only_ = false;
};

// ------------------------------------------------------------------------------------------ element types

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, __half>) return DType::kF16;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return DType::kBF16;
  if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) return DType::kE4M3;
  if constexpr (std::is_same_v<T, float>) return DType::kF32;
}

template <class T>
const char* name_of() {
  if constexpr (std::is_same_v<T, __half>) return "f16";
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return "bf16";
  if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) return "e4m3";
  if constexpr (std::is_same_v<T, float>) return "f32";
}

// The spacing of values just above 1. Rounding to nearest is wrong by at most half of it.
template <class T>
constexpr double epsilon_of() {
  if constexpr (std::is_same_v<T, __half>) return 0x1p-10;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return 0x1p-7;
  if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) return 0x1p-3;
  if constexpr (std::is_same_v<T, float>) return 0x1p-23;
}

template <class T>
double to_double(T x) {
  return static_cast<double>(static_cast<float>(x));
}

// ------------------------------------------------------------------------------------------ device arrays

__device__ inline uint64_t mix_bits(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

template <class T>
__global__ void fill_normal_kernel(T* p, size_t count, uint64_t seed, float mean, float deviation) {
  const size_t step = size_t(gridDim.x) * blockDim.x;
  for (size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint64_t bits = mix_bits((seed + 1) * 0x9e3779b97f4a7c15ull + mix_bits(i + 1));
    const float u = (static_cast<uint32_t>(bits) + 1.0f) * 0x1p-32f, angle = (bits >> 32) * 0x1p-31f;
    p[i] = T(mean + deviation * sqrtf(-2.0f * logf(u)) * cospif(angle));
  }
}

// An array on the device that starts as NaN (integers: -1), so that a kernel which reads or forgets an
// element that it should not is caught by the comparison.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : count_(count) {
    CUDA_CHECK(cudaMalloc(&device_, std::max<size_t>(bytes(), 16)));
    poison();
  }
  explicit Array(const std::vector<T>& values) : Array(values.size()) {
    CUDA_CHECK(cudaMemcpy(device_, values.data(), bytes(), cudaMemcpyHostToDevice));
    // The copy of pageable memory may still be under way, and streams that launch do not wait for this one.
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  Array(Array&& other) noexcept : device_(std::exchange(other.device_, nullptr)), count_(other.count_) {}
  Array& operator=(Array&&) = delete;
  ~Array() { cudaFree(device_); }

  // Normal values that depend on the seed and the index only.
  static Array normal(size_t count, uint64_t seed, float mean = 0.0f, float deviation = 1.0f) {
    Array array(count);
    const auto blocks = static_cast<unsigned>(std::clamp<size_t>((count + 255) / 256, 1, 1024));
    fill_normal_kernel<<<blocks, 256>>>(array.device_, count, seed, mean, deviation);
    CUDA_CHECK(cudaGetLastError());
    CUDA_CHECK(cudaDeviceSynchronize());
    return array;
  }

  void poison() { CUDA_CHECK(cudaMemset(device_, 0xff, std::max<size_t>(bytes(), 16))); }

  std::vector<T> host() const {
    std::vector<T> values(count_);
    CUDA_CHECK(cudaMemcpy(values.data(), device_, bytes(), cudaMemcpyDeviceToHost));
    return values;
  }

  T* data() const { return device_; }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  T* device_ = nullptr;
  size_t count_;
};

// ------------------------------------------------------------------------------------------ verification

// True when |actual - expected| <= epsilon of T * |expected| + absolute everywhere (twice the error of one
// rounding) and NaN stands exactly where it is expected; else prints the first mismatch.
template <class T>
bool matches(const std::string& what, const std::vector<T>& actual, const std::vector<double>& expected,
             double absolute = 0.0) {
  if (actual.size() != expected.size()) {
    std::fprintf(stderr, "FAILED %s: %zu values, expected %zu\n", what.c_str(), actual.size(),
                 expected.size());
    return false;
  }
  for (size_t i = 0; i < actual.size(); ++i) {
    const double got = to_double(actual[i]), want = expected[i];
    const bool same = std::isnan(want) ? std::isnan(got)
                                       : std::abs(got - want) <= epsilon_of<T>() * std::abs(want) + absolute;
    if (!same) {
      std::fprintf(stderr, "FAILED %s: element %zu of %zu: got %.9g, expected %.9g\n", what.c_str(), i,
                   actual.size(), got, want);
      return false;
    }
  }
  return true;
}

// True when both hold the same bits.
template <class T>
bool identical(const std::string& what, const std::vector<T>& actual, const std::vector<T>& expected) {
  const auto* a = reinterpret_cast<const unsigned char*>(actual.data());
  const auto* e = reinterpret_cast<const unsigned char*>(expected.data());
  const size_t bytes = actual.size() * sizeof(T);
  const auto difference = std::mismatch(a, a + bytes, e);
  if (actual.size() == expected.size() && difference.first == a + bytes) return true;
  const size_t i = (difference.first - a) / sizeof(T);
  std::fprintf(stderr, "FAILED %s: element %zu of %zu differs\n", what.c_str(), i, actual.size());
  return false;
}

// RMSNorm (with weights, unless null) and rotation of one head, in double.
inline std::vector<double> rotate_head(const std::vector<double>& x, const std::vector<double>* norm,
                                       double eps, const float* cos_sin, bool interleaved) {
  const int d = static_cast<int>(x.size());
  double squares = 0.0;
  for (const double value : x) squares += value * value;
  std::vector<double> y = x, out(d);
  if (norm != nullptr) {
    for (int i = 0; i < d; ++i) y[i] *= (*norm)[i] / std::sqrt(squares / d + eps);
  }
  for (int j = 0; j < d / 2; ++j) {
    const int a = interleaved ? 2 * j : j, b = interleaved ? 2 * j + 1 : j + d / 2;
    const double c = cos_sin[j], s = cos_sin[d / 2 + j];
    out[a] = y[a] * c - y[b] * s;
    out[b] = y[b] * c + y[a] * s;
  }
  return out;
}

// cos_sin for theta 10000.
inline std::vector<float> rope_table(int64_t positions, int d) {
  std::vector<float> table(positions * d);
  for (int64_t p = 0; p < positions; ++p) {
    for (int j = 0; j < d / 2; ++j) {
      const double angle = p * std::pow(10000.0, -2.0 * j / d);
      table[p * d + j] = static_cast<float>(std::cos(angle));
      table[p * d + d / 2 + j] = static_cast<float>(std::sin(angle));
    }
  }
  return table;
}

// ------------------------------------------------------------------------------------------------- timing

struct Timing {
  double median_us, p10_us, p90_us;  // of one launch
};

inline size_t l2_bytes() {
  int device = 0, bytes = 0;
  CUDA_CHECK(cudaGetDevice(&device));
  CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
  return bytes;
}

// How many sets of buffers a measurement must rotate over so that each launch finds the L2 cold: four times
// the L2 in all. At most kMaxSets: launches that small are bound by latency, not by memory.
constexpr int kMaxSets = 1024;

inline int cold_sets(size_t bytes_per_launch) {
  const size_t sets = 4 * l2_bytes() / std::max<size_t>(bytes_per_launch, 1) + 2;
  return static_cast<int>(std::min<size_t>(sets, kMaxSets));
}

// Time of one launch: a CUDA graph launches all sets in turn, 16 launches or more, and its replays are queued
// back to back, so that neither the graph's own launch nor the host is timed.
inline Timing time_launches(int num_sets, int repeats,
                            const std::function<cudaError_t(int set, cudaStream_t)>& launch) {
  cudaStream_t stream;
  CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CUDA_CHECK(launch(0, stream));  // loads the kernel, which a capture must not do
  CUDA_CHECK(cudaStreamSynchronize(stream));
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  const int launches = (std::max(num_sets, 16) + num_sets - 1) / num_sets * num_sets;
  CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) CUDA_CHECK(launch(i % num_sets, stream));
  CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  CUDA_CHECK(cudaGraphInstantiate(&replay, graph, 0));
  constexpr int kWarmUp = 3;
  std::vector<cudaEvent_t> events(kWarmUp + repeats + 1);
  for (cudaEvent_t& event : events) CUDA_CHECK(cudaEventCreate(&event));
  CUDA_CHECK(cudaEventRecord(events[0], stream));
  for (size_t i = 1; i < events.size(); ++i) {
    CUDA_CHECK(cudaGraphLaunch(replay, stream));
    CUDA_CHECK(cudaEventRecord(events[i], stream));
  }
  CUDA_CHECK(cudaStreamSynchronize(stream));
  std::vector<double> us;
  for (int i = 0; i < repeats; ++i) {
    float ms = 0.0f;
    CUDA_CHECK(cudaEventElapsedTime(&ms, events[kWarmUp + i], events[kWarmUp + i + 1]));
    us.push_back(ms * 1e3 / launches);
  }
  for (cudaEvent_t& event : events) CUDA_CHECK(cudaEventDestroy(event));
  CUDA_CHECK(cudaGraphExecDestroy(replay));
  CUDA_CHECK(cudaGraphDestroy(graph));
  CUDA_CHECK(cudaStreamDestroy(stream));
  std::sort(us.begin(), us.end());
  const auto quantile = [&](double q) { return us[std::lround(q * (us.size() - 1))]; };
  return {quantile(0.5), quantile(0.1), quantile(0.9)};
}

// ----------------------------------------------------------------------------------------------- ceilings

// Reads 16 bytes a thread, four loads in flight; writes them too when kCopy.
template <bool kCopy>
__global__ void __launch_bounds__(512) ceiling_kernel(const uint4* in, uint4* out, size_t count) {
  const size_t first = size_t(blockIdx.x) * blockDim.x * 4 + threadIdx.x;
  uint4 v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const size_t at = first + i * blockDim.x;
    v[i] = at < count ? in[at] : uint4{0, 0, 0, 0};
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const size_t at = first + i * blockDim.x;
    // Random data never equals this pattern; the test only keeps the compiler from dropping the loads.
    const bool write = kCopy || (v[i].x == 0x12345678u && v[i].y == 0x9abcdef0u && v[i].z == v[i].w);
    if (at < count && write) out[at] = v[i];
  }
}

// A plain copy of `bytes` bytes (2 * bytes of traffic) or a plain read, cold, in the same graph timing.
template <bool kCopy>
Timing time_ceiling(size_t bytes, int repeats) {
  const size_t count = bytes / 16;
  const int sets = cold_sets(kCopy ? 2 * bytes : bytes);
  const auto in = Array<float>::normal(sets * count * 4, 1);
  const Array<float> out((kCopy ? sets : 1) * count * 4);
  return time_launches(sets, repeats, [&](int set, cudaStream_t stream) {
    const auto* from = reinterpret_cast<const uint4*>(in.data()) + set * count;
    auto* to = reinterpret_cast<uint4*>(out.data()) + (kCopy ? set * count : 0);
    const auto blocks = static_cast<unsigned>((count + 2047) / 2048);
    ceiling_kernel<kCopy><<<blocks, 512, 0, stream>>>(from, to, count);
    return cudaGetLastError();
  });
}

struct Ceilings {
  double copy_gb_s, read_gb_s;  // of 1 GiB
};

inline Ceilings measure_ceilings(int repeats) {
  const size_t bytes = size_t(1) << 30;
  return {2e-3 * bytes / time_ceiling<true>(bytes, repeats).median_us,
          1e-3 * bytes / time_ceiling<false>(bytes, repeats).median_us};
}

// ------------------------------------------------------------------------------------------------ results

struct Row {
  std::string name;
  Timing timing;
  double bytes;         // memory traffic of one launch
  double ceiling_gb_s;  // what to compare with: Ceilings::copy_gb_s or read_gb_s
  double flops = 0.0;   // arithmetic of one launch; 0 leaves the column empty
};

// Prints a table, or JSON with --json, to stdout.
inline void print_results(const Args& args, const std::string& title, const Ceilings& ceilings,
                          const std::vector<Row>& rows) {
  cudaDeviceProp device;
  int runtime = 0, id = 0;
  CUDA_CHECK(cudaGetDevice(&id));
  CUDA_CHECK(cudaGetDeviceProperties(&device, id));
  CUDA_CHECK(cudaRuntimeGetVersion(&runtime));
  if (args.json()) {
    std::printf("{\"bench\": \"%s\", \"device\": \"%s\", \"cuda\": \"%d.%d\", ", title.c_str(), device.name,
                runtime / 1000, runtime % 1000 / 10);
    std::printf("\"copy_ceiling_gb_s\": %.1f, \"read_ceiling_gb_s\": %.1f, \"rows\": [", ceilings.copy_gb_s,
                ceilings.read_gb_s);
    for (size_t i = 0; i < rows.size(); ++i) {
      const Row& r = rows[i];
      const double gb_s = r.bytes * 1e-3 / r.timing.median_us;
      std::printf("%s\n  {\"case\": \"%s\", \"us\": %.3f, \"p10_us\": %.3f, \"p90_us\": %.3f, ", i ? "," : "",
                  r.name.c_str(), r.timing.median_us, r.timing.p10_us, r.timing.p90_us);
      std::printf("\"bytes\": %.0f, \"gb_s\": %.1f, \"percent_of_ceiling\": %.1f, \"tflop_s\": %.2f}",
                  r.bytes, gb_s, 100.0 * gb_s / r.ceiling_gb_s, r.flops * 1e-6 / r.timing.median_us);
    }
    std::printf("\n]}\n");
    return;
  }
  std::printf("%s on %s, CUDA %d.%d, CUDA graph, median of %d replays\n", title.c_str(), device.name,
              runtime / 1000, runtime % 1000 / 10, args.repeats());
  std::printf("L2 cold, but for launches of less than %zu KB: those find it warm\n",
              4 * l2_bytes() / kMaxSets / 1024);
  std::printf("ceilings in this run: copy %.0f GB/s, read %.0f GB/s\n\n", ceilings.copy_gb_s,
              ceilings.read_gb_s);
  size_t width = 4;
  for (const Row& r : rows) width = std::max(width, r.name.size());
  const int name_width = static_cast<int>(width);
  std::printf("%-*s %10s %21s %9s %10s %9s\n", name_width, "case", "us", "p10 - p90", "GB/s", "% ceiling",
              "TFLOP/s");
  for (const Row& r : rows) {
    const double gb_s = r.bytes * 1e-3 / r.timing.median_us;
    std::printf("%-*s %10.2f %10.2f - %8.2f %9.0f %10.1f", name_width, r.name.c_str(), r.timing.median_us,
                r.timing.p10_us, r.timing.p90_us, gb_s, 100.0 * gb_s / r.ceiling_gb_s);
    if (r.flops > 0) std::printf(" %9.1f", r.flops * 1e-6 / r.timing.median_us);
    std::printf("\n");
  }
}

}  // namespace fusedkv::bench

// Checks of the arguments of the CUDA implementations: fusedkv_ext/checks.py with what the kernels need on
// top (16-byte alignment). Every message has the form `op: argument: expected ..., got ...`.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#include <array>
#include <limits>
#include <ostream>
#include <sstream>
#include <string>

#include "kernels/params.h"
#include "ops/layout.h"
#include "ops/ops.h"

namespace fusedkv::ops {

// A macro, so that `expected` and `got` are formatted for a failing check only: these run on every call.
#define FUSEDKV_EXPECT(op, condition, argument, expected, got) \
  TORCH_CHECK_VALUE(condition, op, ": ", argument, ": expected ", expected, ", got ", got)

inline constexpr int64_t kAny = -1;  // in a shape: any size
inline constexpr int64_t kMaxInt = std::numeric_limits<int>::max();

inline constexpr std::array kHalf = {at::kHalf, at::kBFloat16};
inline constexpr std::array kHalfOrFloat = {at::kHalf, at::kBFloat16, at::kFloat};
inline constexpr std::array kFloat = {at::kFloat};
inline constexpr std::array kE4M3 = {at::kFloat8_e4m3fn};
inline constexpr std::array kBool = {at::kBool};
inline constexpr std::array kInt32 = {at::kInt};
inline constexpr std::array kInt64 = {at::kLong};
inline constexpr std::array kIndex = {at::kInt, at::kLong};

// The name of an argument, or of one tensor of a list: `k_sources[1]`.
struct Argument {
  Argument(const char* name, int64_t index = -1) : name(name), index(index) {}
  friend std::ostream& operator<<(std::ostream& out, const Argument& a) {
    return a.index < 0 ? out << a.name : out << a.name << '[' << a.index << ']';
  }
  const char* name;
  int64_t index;
};

inline std::string dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kFloat8_e4m3fn:
      return "float8_e4m3fn";
    case at::kBool:
      return "bool";
    case at::kInt:
      return "int32";
    case at::kLong:
      return "int64";
    default:
      return c10::toString(dtype);
  }
}

inline std::string dtype_names(at::ArrayRef<at::ScalarType> dtypes) {
  std::string names;
  for (const at::ScalarType dtype : dtypes) names += (names.empty() ? "" : " or ") + dtype_name(dtype);
  return names;
}

inline std::string shape_name(at::IntArrayRef shape) {
  std::ostringstream out;
  for (size_t i = 0; i < shape.size(); ++i) {
    out << (i == 0 ? "[" : ", ");
    if (shape[i] == kAny) {
      out << '*';
    } else {
      out << shape[i];
    }
  }
  out << ']';
  return out.str();
}

// For dtypes that a check has let through.
inline DType kernel_dtype(const at::Tensor& x) {
  if (x.scalar_type() == at::kHalf) return DType::kF16;
  if (x.scalar_type() == at::kFloat) return DType::kF32;
  return x.scalar_type() == at::kBFloat16 ? DType::kBF16 : DType::kE4M3;
}

// Times that fused_attention reads a token: once a key/value head and block of query rows.
inline int64_t head_rows(int64_t num_query_tokens, int64_t num_q_heads, int64_t num_kv_heads) {
  const int64_t rows = num_q_heads / num_kv_heads * num_query_tokens;
  return num_kv_heads * ((rows + kBlockRows - 1) / kBlockRows);
}

inline PagedCache paged_cache(const at::Tensor& cache) {
  return {cache.data_ptr(), cache.stride(0), cache.stride(1), cache.stride(2)};
}

inline CacheGeometry cache_geometry(const at::Tensor& cache) {
  return {cache.size(0), static_cast<int>(cache.size(1))};
}

template <class T = void>
const T* data_or_null(const OptionalTensor& x) {
  return x ? static_cast<const T*>(x->data_ptr()) : nullptr;
}

// Checks of one call of one op; every tensor must be on the device of `first`.
class Checker {
 public:
  Checker(const char* op, const at::Tensor& first) : op(op), device_(first.device()) {}

  // Device, dtype, shape, and unit stride of the last dimension.
  void tensor(Argument name, const at::Tensor& x, at::ArrayRef<at::ScalarType> dtypes,
              at::IntArrayRef shape) const {
    FUSEDKV_EXPECT(op, x.device() == device_, name, c10::str("device ", device_), x.device());
    bool known = false;
    for (const at::ScalarType dtype : dtypes) known |= x.scalar_type() == dtype;
    FUSEDKV_EXPECT(op, known, name, "dtype " + dtype_names(dtypes), dtype_name(x.scalar_type()));
    bool fits = x.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] == kAny || shape[i] == x.size(i);
    FUSEDKV_EXPECT(op, fits, name, "shape " + shape_name(shape), x.sizes());
    const bool unit = x.dim() == 0 || x.numel() == 0 || x.size(-1) == 1 || x.stride(-1) == 1;
    FUSEDKV_EXPECT(op, unit, name, "stride 1 in the last dimension", x.stride(-1));
  }

  void contiguous(Argument name, const at::Tensor& x) const {
    FUSEDKV_EXPECT(op, x.is_contiguous(), name, "a contiguous tensor", c10::str("strides ", x.strides()));
  }

  // What 16-byte loads need: an aligned start, and strides that keep every row aligned.
  void aligned(Argument name, const at::Tensor& x) const {
    if (x.numel() == 0) return;
    const auto address = reinterpret_cast<uintptr_t>(x.const_data_ptr());
    FUSEDKV_EXPECT(op, address % 16 == 0, name, "a start aligned to 16 bytes", address % 16);
    FUSEDKV_EXPECT(op, is_aligned(x), name, "strides that are multiples of 16 bytes",
                   c10::str("strides ", x.strides(), " of ", x.element_size(), " byte elements"));
  }

  // Channels of a token that the kernels' 32-bit arithmetic takes.
  void channels(int64_t heads, int64_t d) const {
    FUSEDKV_EXPECT(op, heads <= (int64_t{1} << 27) / d, "heads", "at most 2^27 channels a token",
                   c10::str(heads, " heads of ", d));
  }

  void head_dim(int64_t d) const {
    FUSEDKV_EXPECT(op, d == 64 || d == 128, "head_dim", "64 or 128 on CUDA", d);
  }

  // A cache [pages, page_size, heads, d] that holds keys or values of the dtype of `like`, or e4m3; pages,
  // page size and dtype are those of `other`.
  void cache(Argument name, const at::Tensor& cache, int64_t heads, int64_t d, const at::Tensor& like,
             const at::Tensor& other) const {
    FUSEDKV_EXPECT(op, other.dim() == 4, name, "4 dimensions", other.dim());
    const std::array dtypes = {like.scalar_type(), at::kFloat8_e4m3fn};
    tensor(name, cache, dtypes, {other.size(0), other.size(1), heads, d});
    FUSEDKV_EXPECT(op, cache.scalar_type() == other.scalar_type(), name,
                   "dtype " + dtype_name(other.scalar_type()), dtype_name(cache.scalar_type()));
    FUSEDKV_EXPECT(op, cache.size(1) <= kMaxInt, name, "a page size below 2^31", cache.size(1));
    aligned(name, cache);
  }

  // e4m3 copies: both or none, of the caches' shape, beside caches that are not e4m3.
  void copies(const at::Tensor& k_cache, const OptionalTensor& k_copy, const OptionalTensor& v_copy) const {
    FUSEDKV_EXPECT(op, k_copy.has_value() == v_copy.has_value(), "k_copy, v_copy", "both or none of them",
                   c10::str("only ", k_copy ? "k_copy" : "v_copy"));
    if (!k_copy) return;
    FUSEDKV_EXPECT(op, k_cache.scalar_type() != at::kFloat8_e4m3fn, "k_cache",
                   "the dtype of the input beside copies", "float8_e4m3fn");
    tensor("k_copy", *k_copy, kE4M3, k_cache.sizes());
    tensor("v_copy", *v_copy, kE4M3, k_cache.sizes());
    aligned("k_copy", *k_copy);
    aligned("v_copy", *v_copy);
  }

  void scale(Argument name, const OptionalTensor& scale, int64_t heads, int64_t d) const {
    if (!scale) return;
    tensor(name, *scale, kFloat, {heads, d});
    contiguous(name, *scale);
    aligned(name, *scale);
  }

  void fusion_weights(Argument name, const OptionalTensor& weights, int64_t num_sources, int64_t heads,
                      int64_t d) const {
    if (!weights) return;
    tensor(name, *weights, kFloat, {num_sources, heads, d});
    contiguous(name, *weights);
    aligned(name, *weights);
  }

  void window(int64_t window) const {
    FUSEDKV_EXPECT(op, window >= 0 && window <= kMaxInt, "window", "0 (none) to 2^31 - 1", window);
  }

  void norm(Argument name, const OptionalTensor& norm, int64_t d, at::ScalarType dtype) const {
    if (!norm) return;
    tensor(name, *norm, dtype, {d});
    aligned(name, *norm);
  }

  // Positions and the cos/sin table; returns the head dim.
  int64_t rope(int64_t tokens, const at::Tensor& positions, const at::Tensor& cos_sin) const {
    tensor("positions", positions, kIndex, {tokens});
    tensor("cos_sin", cos_sin, kFloat, {kAny, kAny});
    contiguous("cos_sin", cos_sin);
    aligned("cos_sin", cos_sin);
    head_dim(cos_sin.size(1));
    FUSEDKV_EXPECT(op, cos_sin.size(0) > 0, "cos_sin", "at least one position", cos_sin.size(0));
    return cos_sin.size(1);
  }

  // Checks the outputs of a packed projection of `num_heads` heads, which `packed` ("qkv" or "weight") holds,
  // and fills those fields.
  HeadOutputs head_outputs(const char* packed, int64_t num_heads, int64_t tokens, int64_t d,
                           const at::Tensor& like, const OptionalTensor& q_out, const OptionalTensor& k_cache,
                           const OptionalTensor& v_cache, const OptionalTensor& slot_mapping,
                           const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                           const OptionalTensor& k_copy, const OptionalTensor& v_copy) const {
    HeadOutputs heads{};
    heads.cache_dtype = kernel_dtype(like);
    heads.head_dim = static_cast<int>(d);
    if (q_out) {
      tensor("q_out", *q_out, like.scalar_type(), {tokens, kAny, d});
      contiguous("q_out", *q_out);
      aligned("q_out", *q_out);
      heads.num_q_heads = static_cast<int>(q_out->size(1));
      heads.q_out = q_out->mutable_data_ptr();
    }
    const int given = k_cache.has_value() + v_cache.has_value() + slot_mapping.has_value();
    FUSEDKV_EXPECT(op, given == 0 || given == 3, "k_cache, v_cache, slot_mapping", "all or none of them",
                   c10::str(given, " of 3"));
    if (k_cache) {
      FUSEDKV_EXPECT(op, k_cache->dim() == 4, "k_cache", "4 dimensions", k_cache->dim());
      const int64_t num_kv = k_cache->size(2);
      cache("k_cache", *k_cache, num_kv, d, like, *k_cache);
      cache("v_cache", *v_cache, num_kv, d, like, *k_cache);
      tensor("slot_mapping", *slot_mapping, kInt64, {tokens});
      scale("k_scale", k_scale, num_kv, d);
      scale("v_scale", v_scale, num_kv, d);
      copies(*k_cache, k_copy, v_copy);
      heads.cache_dtype = kernel_dtype(*k_cache);
      heads.num_kv_heads = static_cast<int>(num_kv);
      heads.k_cache = paged_cache(*k_cache);
      heads.v_cache = paged_cache(*v_cache);
      if (k_copy) {
        heads.k_copy = paged_cache(*k_copy);
        heads.v_copy = paged_cache(*v_copy);
      }
      heads.cache = cache_geometry(*k_cache);
      heads.slot_mapping = slot_mapping->const_data_ptr<int64_t>();
      heads.k_scale = data_or_null<float>(k_scale);
      heads.v_scale = data_or_null<float>(v_scale);
    } else {
      FUSEDKV_EXPECT(op, !k_copy && !v_copy, "k_copy, v_copy", "none without caches", "a copy");
    }
    FUSEDKV_EXPECT(op, num_heads == int64_t{heads.num_q_heads} + 2 * int64_t{heads.num_kv_heads}, packed,
                   c10::str(heads.num_q_heads, " (q_out) + 2 * ", heads.num_kv_heads,
                            " (k_cache, v_cache) heads of ", d, " channels"),
                   c10::str(num_heads, " heads"));
    return heads;
  }

  const char* const op;

 private:
  at::Device device_;
};

// Fills the inputs of norm and RoPE, once `Checker::rope` and `Checker::norm` have let them through.
inline void fill_rope(HeadOutputs& heads, const at::Tensor& positions, const at::Tensor& cos_sin,
                      const OptionalTensor& q_norm, const OptionalTensor& k_norm, double eps,
                      bool interleaved) {
  heads.positions = positions.const_data_ptr();
  heads.positions_are_int64 = positions.scalar_type() == at::kLong;
  heads.cos_sin = cos_sin.const_data_ptr<float>();
  heads.max_positions = cos_sin.size(0);
  heads.q_norm = data_or_null(q_norm);
  heads.k_norm = data_or_null(k_norm);
  heads.eps = static_cast<float>(eps);
  heads.interleaved = interleaved;
}

// Fills the product x @ weight^T of checked matrices; x as it is, so that the caller may give an aligned
// copy.
inline void fill_product(ProductParams& params, const at::Tensor& x, const at::Tensor& weight,
                         bool early_weight) {
  params.dtype = kernel_dtype(x);
  params.num_tokens = x.size(0);
  params.hidden = static_cast<int>(x.size(1));
  params.x = x.const_data_ptr();
  params.x_stride = x.stride(0);
  params.weight = weight.const_data_ptr();
  params.early_weight = early_weight;
}

// Around calls of torch's own ops from inside an op: no graph is recorded and autocast changes no dtype.
struct LibraryCall {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard without_autocast{c10::autocast_dispatch_keyset};
};

// Turns what a run_* function returned into an error.
inline void check_launch(const char* op, cudaError_t status) {
  FUSEDKV_EXPECT(op, status != cudaErrorInvalidValue, "arguments",
                 "dtypes and sizes that the CUDA kernels were compiled for", cudaGetErrorString(status));
  TORCH_CHECK(status == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(status));
}

}  // namespace fusedkv::ops

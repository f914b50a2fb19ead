// Inputs in the layouts that the kernels load: aligned to 16 bytes, and as rows with one stride.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>

namespace fusedkv::ops {

inline at::Tensor packed_copy(const at::Tensor& x) { return x.clone(at::MemoryFormat::Contiguous); }

// Whether 16-byte loads of the last dimension are aligned everywhere.
inline bool is_aligned(const at::Tensor& x) {
  if (x.numel() == 0) return true;
  bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  aligned &= x.size(-1) == 1 || x.stride(-1) == 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    aligned &= x.size(i) == 1 || x.stride(i) * x.element_size() % 16 == 0;
  }
  return aligned;
}

// Whether no row of a matrix shares memory with the next, as those of an expanded one do: what TMA takes.
inline bool rows_are_apart(const at::Tensor& x) { return x.size(0) < 2 || x.stride(0) >= x.size(1); }

inline at::Tensor aligned_or_copy(const at::Tensor& x) { return is_aligned(x) ? x : packed_copy(x); }

// A tensor [..., Hkv, D] as [rows, Hkv, D] with heads and channels contiguous.
struct Rows {
  at::Tensor tensor;
  int64_t stride;
};

inline Rows as_rows(const at::Tensor& x) {
  const int64_t heads = x.size(-2), d = x.size(-1);
  const at::Tensor aligned = aligned_or_copy(x);
  bool packed = heads == 1 || aligned.stride(-2) == d;
  int64_t stride = 0, outer = -1;  // outer: what the next dimension's stride must be, -1 before the first
  for (int64_t i = x.dim() - 3; i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (outer < 0) stride = aligned.stride(i);
    packed &= outer < 0 || aligned.stride(i) == outer;
    outer = aligned.stride(i) * x.size(i);
  }
  if (packed) return {aligned, stride};
  return {packed_copy(x), heads * d};
}

}  // namespace fusedkv::ops

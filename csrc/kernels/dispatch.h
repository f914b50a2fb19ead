// Run-time dtype and head dim to template arguments; nothing else.
#pragma once

#include <cuda_runtime_api.h>

#include "common/vec.cuh"

namespace fusedkv {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the element type of `dtype`, f16 or bf16.
template <class F>
cudaError_t dispatch_half(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF16:
      return f(Type<f16>{});
    case DType::kBF16:
      return f(Type<bf16>{});
    default:
      return cudaErrorInvalidValue;
  }
}

// The same, or float.
template <class F>
cudaError_t dispatch_float(DType dtype, F&& f) {
  return dtype == DType::kF32 ? f(Type<float>{}) : dispatch_half(dtype, f);
}

// Calls f(Type<T>{}, Type<C>{}) with the element type and the cache's: the same, or e4m3.
template <class F>
cudaError_t dispatch_half_and_cache(DType dtype, DType cache_dtype, F&& f) {
  return dispatch_half(dtype, [&](auto t) {
    if (cache_dtype == dtype) return f(t, t);
    if (cache_dtype == DType::kE4M3) return f(t, Type<e4m3>{});
    return cudaErrorInvalidValue;
  });
}

template <int D>
struct HeadDim {
  static constexpr int value = D;
};

// Calls f(HeadDim<D>{}) for the compiled head dims.
template <class F>
cudaError_t dispatch_head_dim(int head_dim, F&& f) {
  switch (head_dim) {
    case 64:
      return f(HeadDim<64>{});
    case 128:
      return f(HeadDim<128>{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fusedkv

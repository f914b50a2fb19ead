// Element types, 8-element vectors in float, and cache slots: what every kernel loads and stores with.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../params.h"

namespace fusedkv {

using f16 = __half;
using bf16 = __nv_bfloat16;
using e4m3 = __nv_fp8_e4m3;

__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(e4m3 x) { return static_cast<float>(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ e4m3 from_float<e4m3>(float x) {
  return e4m3(x);  // saturates to +-448
}

// Two floats rounded into one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Eight consecutive elements, computed with in float: 16 bytes in memory for f16 and bf16, 8 for e4m3. Both
// need the address aligned to that size.
struct Vec8 {
  float x[8];

  template <class T>
  __device__ __forceinline__ static Vec8 load(const T* p) {
    using Bits = std::conditional_t<sizeof(T) == 2, uint4, uint2>;
    const Bits bits = *reinterpret_cast<const Bits*>(p);
    T raw[8];
    memcpy(raw, &bits, sizeof(bits));
    Vec8 v;
#pragma unroll
    for (int i = 0; i < 8; ++i) v.x[i] = to_float(raw[i]);
    return v;
  }

  __device__ __forceinline__ static Vec8 load(const float* p) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  }

  template <class T>
  __device__ __forceinline__ void store(T* p) const {
    T raw[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) raw[i] = from_float<T>(x[i]);
    std::conditional_t<sizeof(T) == 2, uint4, uint2> bits;
    memcpy(&bits, raw, sizeof(bits));
    *reinterpret_cast<decltype(bits)*>(p) = bits;
  }
};

// Traps in a debug build when a device-side index lies outside what it indexes; true when it lies inside.
__device__ __forceinline__ bool index_is_inside(int64_t index, int64_t count) {
  const bool inside = index >= 0 && index < count;
#ifdef FUSEDKV_DEBUG
  if (!inside && index != -1) __trap();
#endif
  return inside;
}

// Elements from the start of a cache to head `head` of slot `slot`; the slot must be inside the cache.
__device__ __forceinline__ int64_t slot_offset(const PagedCache& cache, int page_size, int64_t slot,
                                               int head) {
  const int64_t page = slot / page_size, offset = slot % page_size;
  return page * cache.page_stride + offset * cache.token_stride + head * cache.head_stride;
}

}  // namespace fusedkv

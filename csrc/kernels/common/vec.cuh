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

// Two floats rounded, the first in the low half: 32 bits for f16 and bf16, 16 for e4m3.
template <class T>
using Bits2 = std::conditional_t<sizeof(T) == 2, uint32_t, uint16_t>;

template <class T>
__device__ __forceinline__ Bits2<T> pack2(float low, float high);
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
template <>
__device__ __forceinline__ uint16_t pack2<e4m3>(float low, float high) {  // saturates to +-448
  return __nv_cvt_float2_to_fp8x2({low, high}, __NV_SATFINITE, __NV_E4M3);
}

// The two floats of a register, the first from the low half.
template <class T>
__device__ __forceinline__ float2 unpack2(Bits2<T> bits);
template <>
__device__ __forceinline__ float2 unpack2<f16>(uint32_t bits) {
  __half2 pair;
  memcpy(&pair, &bits, sizeof(bits));
  return __half22float2(pair);
}
template <>
__device__ __forceinline__ float2 unpack2<bf16>(uint32_t bits) {  // a bf16 is the high half of a float
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
}

// Eight consecutive elements as they lie in memory: 16 bytes for f16 and bf16, 8 for e4m3. Loads and stores
// need the address aligned to that size.
template <class T>
using Bits8 = std::conditional_t<sizeof(T) == 2, uint4, uint2>;

// Approximate: an exact division is ten instructions for bits that rounding drops.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Eight elements, computed with in float.
struct Vec8 {
  float x[8];

  template <class T>
  __device__ __forceinline__ static Vec8 unpack(const Bits8<T>& bits) {
    Bits2<T> pairs[4];
    memcpy(pairs, &bits, sizeof(bits));
    Vec8 v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack2<T>(pairs[i]);
      v.x[2 * i] = pair.x, v.x[2 * i + 1] = pair.y;
    }
    return v;
  }

  template <class T>
  __device__ __forceinline__ static Vec8 load(const T* p) {
    const Bits8<T> bits = *reinterpret_cast<const Bits8<T>*>(p);  // by value, else memcpy may load bytes
    return unpack<T>(bits);
  }

  __device__ __forceinline__ static Vec8 load(const float* p) {
    const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  }

  __device__ __forceinline__ void divide_by(const Vec8& other) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] *= reciprocal(other.x[i]);
  }

  template <class T>
  __device__ __forceinline__ Bits8<T> pack() const {
    Bits2<T> pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pack2<T>(x[2 * i], x[2 * i + 1]);
    Bits8<T> bits;
    memcpy(&bits, pairs, sizeof(bits));
    return bits;
  }

  template <class T>
  __device__ __forceinline__ void store(T* p) const {
    *reinterpret_cast<Bits8<T>*>(p) = pack<T>();
  }
};

// silu(gate) * up.
__device__ __forceinline__ Vec8 gated(Vec8 gate, const Vec8& up) {
  Vec8 denominator;
#pragma unroll
  for (int i = 0; i < 8; ++i) denominator.x[i] = 1.0f + expf(-gate.x[i]);
  gate.divide_by(denominator);  // before the product, which may overflow where the result does not
#pragma unroll
  for (int i = 0; i < 8; ++i) gate.x[i] *= up.x[i];
  return gate;
}

// Traps in a debug build when a device-side index lies outside what it indexes; true when it lies inside.
__device__ __forceinline__ bool index_is_inside(int64_t index, int64_t count) {
  const bool inside = index >= 0 && index < count;
#ifdef FUSEDKV_DEBUG
  if (!inside && index != -1) __trap();
#endif
  return inside;
}

// A slot of a cache, taken apart once for all heads and for every cache of the same geometry.
struct CacheRow {
  int64_t page;  // -1: not inside the cache
  int64_t offset;

  // page_shift: log2 of the page size, which saves the division, or -1.
  __device__ __forceinline__ CacheRow(const CacheGeometry& cache, int64_t slot, int page_shift = -1)
      : page(-1), offset(0) {
    if (!index_is_inside(slot, cache.num_pages * cache.page_size)) return;
    const uint64_t index = slot, page_size = cache.page_size;
    if (page_shift >= 0) {
      page = index >> page_shift, offset = index & (page_size - 1);
    } else {
      page = index / page_size, offset = index % page_size;
    }
  }

  __device__ __forceinline__ bool is_inside() const { return page >= 0; }

  // Elements from the start of the cache to head 0 of this row.
  __device__ __forceinline__ int64_t elements(const PagedCache& cache) const {
    return page * cache.page_stride + offset * cache.token_stride;
  }
};

}  // namespace fusedkv

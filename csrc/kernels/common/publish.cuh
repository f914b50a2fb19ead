// Words that one CTA leaves in device memory for another of the same kernel, which finds out by reading them
// whether they are there. No access is ordered after another: every word has to speak for itself.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fusedkv {

__device__ __forceinline__ void publish(float4* to, float4 x) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}
__device__ __forceinline__ void publish(float2* to, float2 x) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "f"(x.x),
               "f"(x.y)
               : "memory");
}

__device__ __forceinline__ float4 load_published(const float4* from) {
  float4 x;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return x;
}
__device__ __forceinline__ float2 load_published(const float2* from) {
  float2 x;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];"
               : "=f"(x.x), "=f"(x.y)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return x;
}

// x, but not before the load of `word` is issued: else the compiler may wait for one word before it asks for
// the next.
__device__ __forceinline__ uint32_t after_load(float word, uint32_t x) {
  uint32_t y;
  asm volatile("{.reg .u32 larger; max.u32 larger, %1, %2; min.u32 %0, larger, %2;}"
               : "=r"(y)
               : "r"(__float_as_uint(word)), "r"(x));
  return y;
}

}  // namespace fusedkv

// Words that one CTA leaves in device memory for another of the same kernel, which finds out by reading them
// whether they are there. No access is ordered after another: every word has to speak for itself.
#pragma once

#include <cuda_runtime.h>

namespace fusedkv {

__device__ __forceinline__ void publish(float4* to, float4 x) {
  asm volatile("st.relaxed.gpu.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}
__device__ __forceinline__ void publish(float2* to, float2 x) {
  asm volatile("st.relaxed.gpu.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x.x), "f"(x.y) : "memory");
}

__device__ __forceinline__ float4 load_published(const float4* from) {
  float4 x;
  asm volatile("ld.relaxed.gpu.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(from)
               : "memory");
  return x;
}
__device__ __forceinline__ float2 load_published(const float2* from) {
  float2 x;
  asm volatile("ld.relaxed.gpu.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(from) : "memory");
  return x;
}

}  // namespace fusedkv

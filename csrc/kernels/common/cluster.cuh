// Clusters of CTAs that share their memory (sm_90). On older GPUs, and in a launch without clusters, a
// cluster is one CTA.
#pragma once

#include <cstdint>

#include "mma.cuh"

namespace fusedkv {

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// A barrier of all threads of the cluster, in two halves: what they wrote to shared memory before they
// arrived is visible to all after they have waited. Every thread calls both in
// turn.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

// The first half for a CTA that has written nothing and only says that it has started: without the fence.
__device__ __forceinline__ void cluster_announce() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Stores to the shared memory of another CTA of the cluster, where this CTA has `p`.
__device__ __forceinline__ void store_in_cluster(float4* p, uint32_t rank, float4 value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; st.shared::cluster.v4.f32 [remote], {%2, "
      "%3, "
      "%4, %5};}" ::"r"(smem_address(p)),
      "r"(rank), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
      : "memory");
#else
  *p = value;
#endif
}

}  // namespace fusedkv

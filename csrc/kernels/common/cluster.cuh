// Clusters of CTAs that share their memory. Only code for sm_90 and later may call these.
#pragma once

#include <cstdint>

namespace fusedkv {

// A barrier of all threads of the cluster, in two halves: what they wrote to shared memory before they
// arrived is visible to all after they have waited. Every thread calls both in turn.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}

// The first half for threads that have written nothing but barriers that a fence has made visible: without
// the wait for their stores.
__device__ __forceinline__ void cluster_announce() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Where CTA `rank` of the cluster has what this CTA has at `smem`.
__device__ __forceinline__ uint32_t address_in_cluster(uint32_t smem, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(smem), "r"(rank));
  return there;
}

// Stores to another CTA's memory, if `valid`, and goes on; the phase of `barrier`, in the same CTA, counts
// the bytes. Addresses are those of address_in_cluster.
__device__ __forceinline__ void store_in_cluster(uint32_t to, uint32_t barrier, float4 value, bool valid) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %6, 0;"
      "@p st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];}" ::
          "r"(to),
      "r"(barrier), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w), "r"(int{valid})
      : "memory");
}

// Stores to another CTA's memory, at an address of address_in_cluster; the cluster's barrier makes it
// visible.
__device__ __forceinline__ void store_8_in_cluster(uint32_t to, uint64_t value) {
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(to), "l"(value) : "memory");
}

// As mbarrier_wait, for what other CTAs of the cluster have stored.
__device__ __forceinline__ void mbarrier_wait_for_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, "
        "1, "
        "0, p;}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!ended);
}

}  // namespace fusedkv

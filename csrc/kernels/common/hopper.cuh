// Hopper's own instructions, one wrapper each: more of mbarriers, bulk tensor copies (TMA), and the matrix
// product of a warpgroup (wgmma). Only code under __CUDA_ARCH_FEAT_SM90_ALL may call them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "l2_policy.cuh"
#include "mbarrier.cuh"
#include "mma.cuh"

namespace fusedkv {

// ----------------------------------------------------------------------------------------- shared memory

__device__ __forceinline__ void store_shared_16(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

__device__ __forceinline__ void store_shared_4(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// If `valid`; no branch.
__device__ __forceinline__ void store_shared_floats(uint32_t address, float4 x, bool valid) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p, %5, 0; @p st.shared.v4.f32 [%0], {%1, %2, %3, %4};}" ::"r"(address),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(int{valid})
      : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// --------------------------------------------------------------------------------------------- mbarriers

// Makes the inits of this thread visible to the cluster and to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and makes the phase wait for that many bytes of copies too.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives at the barrier that has this address in the shared memory of CTA `rank` of the cluster.
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// ------------------------------------------------------------------------------------------ bulk copies

// True in one thread of a whole warp. The compiler knows that it is one, and issues copies without a loop
// over the threads that may want one.
__device__ __forceinline__ bool elect_thread() {
  uint32_t elected;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected;
}

// map: a __grid_constant__ parameter of the kernel.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the box at these coordinates, innermost first; what lies outside of the tensor becomes zeros. The
// barrier's current phase counts the bytes of the whole box.
__device__ __forceinline__ void copy_box_2d(uint32_t smem, const CUtensorMap& map, uint32_t barrier, int x,
                                            int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], "
      "[%2];" ::"r"(smem),
      "l"(&map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

// The same to all CTAs of the cluster whose bits are set: to the same address of each, counted by the barrier
// at the same address of each.
__device__ __forceinline__ void share_box_2d(uint32_t smem, const CUtensorMap& map, uint32_t barrier, int x,
                                             int y, unsigned ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "h"(static_cast<uint16_t>(ctas))
      : "memory");
}

// A copy in five dimensions of what is read once and not soon again: see stream_policy().
__device__ __forceinline__ void stream_box_5d(uint32_t smem, const CUtensorMap& map, uint32_t barrier, int x0,
                                              int x1, int x2, int x3, int x4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem),
      "l"(&map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "l"(stream_policy())
      : "memory");
}

// One without a policy, to the first `ctas` CTAs of the cluster: to the same address of each, counted by the
// barrier at the same address of each.
template <int ctas>
__device__ __forceinline__ void copy_box_5d(uint32_t smem, const CUtensorMap& map, uint32_t barrier, int x0,
                                            int x1, int x2, int x3, int x4) {
  const uint16_t mask = (1 << ctas) - 1;
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem),
      "l"(&map), "r"(barrier), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "h"(mask)
      : "memory");
}

// ------------------------------------------------------------------------------------------------- wgmma

// What this thread has written to shared memory, cp.async that it has waited for included, is there for wgmma
// and copies that are issued after this and after a barrier.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Rows of 64 16-bit elements as a copy with the 128-byte swizzle leaves them: 1024 bytes every eight rows, at
// an address that is a multiple of 1024. Columns 16 and on are at the descriptor + 2, and so forth: the
// swizzle is a function of the address, so that a matrix may start inside it.
__device__ __forceinline__ uint64_t wgmma_matrix(uint32_t smem) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;  // the other stride: the swizzle implies it
  return kSwizzle128 | kEightRows | kUnused | smem >> 4;
}

// The same rows as a right operand that is not transposed: 16 rows, with as many columns as they have. They
// lie in tiles of 64 columns, each that many bytes after the one before.
__device__ __forceinline__ uint64_t wgmma_rows(uint32_t smem, int tile_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | uint64_t(tile_bytes >> 4) << 16 | smem >> 4;
}

// The tensor cores own the accumulators from this fence until wgmma_wait.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `groups` committed groups are unfinished.
template <int groups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}

// Keeps arithmetic on the accumulators, which nothing ties to a wait, behind it.
template <int count>
__device__ __forceinline__ void fence_registers(float (&d)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The operands' numbers and the operands of 64 x 8, 32, 64, 128 and 256 accumulators.
// clang-format off
#define FUSEDKV_REGISTERS_4 "%0,%1,%2,%3"
#define FUSEDKV_REGISTERS_16 FUSEDKV_REGISTERS_4 ",%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define FUSEDKV_REGISTERS_32 \
  FUSEDKV_REGISTERS_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FUSEDKV_REGISTERS_64 \
  FUSEDKV_REGISTERS_32 "," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FUSEDKV_REGISTERS_128 \
  FUSEDKV_REGISTERS_64 "," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define FUSEDKV_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FUSEDKV_16(d, i) FUSEDKV_4(d, i), FUSEDKV_4(d, i + 4), FUSEDKV_4(d, i + 8), FUSEDKV_4(d, i + 12)
#define FUSEDKV_32(d, i) FUSEDKV_16(d, i), FUSEDKV_16(d, i + 16)
#define FUSEDKV_64(d, i) FUSEDKV_32(d, i), FUSEDKV_32(d, i + 32)
#define FUSEDKV_128(d, i) FUSEDKV_64(d, i), FUSEDKV_64(d, i + 64)
#define FUSEDKV_WGMMA(columns, type, numbers, a_number, b_number, accumulate_number, ...)                \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " accumulate_number ", 0;"                                 \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" numbers "}, "   \
               a_number ", " b_number ", p, 1, 1, 0, 0;}"                                                \
               : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate))
#define FUSEDKV_WGMMA_REGISTERS(columns, type, numbers, a_numbers, b_number, accumulate_number,          \
                                transposes_number, ...)                                                  \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " accumulate_number ", 0;"                                 \
               "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" numbers "}, {"  \
               a_numbers "}, " b_number ", p, 1, 1, " transposes_number ";}"                             \
               : __VA_ARGS__                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(rows_b))
#define FUSEDKV_OF_T(product, columns, ...)           \
  if constexpr (std::is_same_v<T, f16>) {             \
    product(columns, "f16", __VA_ARGS__);             \
  } else {                                            \
    product(columns, "bf16", __VA_ARGS__);            \
  }
#define FUSEDKV_WGMMA_OF_T(...) FUSEDKV_OF_T(FUSEDKV_WGMMA, __VA_ARGS__)
#define FUSEDKV_WGMMA_REGISTERS_OF_T(...) FUSEDKV_OF_T(FUSEDKV_WGMMA_REGISTERS, __VA_ARGS__)
// clang-format on

// d[64 x 2 * count] (+)= a[64 x 16] * b[2 * count x 16]^T, asynchronously, by a warpgroup; overwrites d when
// `accumulate` is 0. Warp w holds rows 16w to 16w + 15; d[4 * j + c] is what mma_16x8x16 calls c[c] of
// columns 8j to 8j + 7.
template <class T, int count>
__device__ __forceinline__ void wgmma_64x16(float (&d)[count], uint64_t a, uint64_t b, int accumulate) {
  static_assert(count == 4 || count == 16 || count == 32 || count == 64 || count == 128);
  if constexpr (count == 4) {
    FUSEDKV_WGMMA_OF_T("8", FUSEDKV_REGISTERS_4, "%4", "%5", "%6", FUSEDKV_4(d, 0))
  } else if constexpr (count == 16) {
    FUSEDKV_WGMMA_OF_T("32", FUSEDKV_REGISTERS_16, "%16", "%17", "%18", FUSEDKV_16(d, 0))
  } else if constexpr (count == 32) {
    FUSEDKV_WGMMA_OF_T("64", FUSEDKV_REGISTERS_32, "%32", "%33", "%34", FUSEDKV_32(d, 0))
  } else if constexpr (count == 64) {
    FUSEDKV_WGMMA_OF_T("128", FUSEDKV_REGISTERS_64, "%64", "%65", "%66", FUSEDKV_64(d, 0))
  } else {
    FUSEDKV_WGMMA_OF_T("256", FUSEDKV_REGISTERS_128, "%128", "%129", "%130", FUSEDKV_128(d, 0))
  }
}

// The same with the left operand in registers, as mma_16x8x16 has it, of the warp's 16 rows. They must stay
// as they are until the wait. rows_b: b is what wgmma_rows() describes.
template <class T, bool rows_b, int count>
__device__ __forceinline__ void wgmma_registers_64x16(float (&d)[count], const uint32_t (&a)[4], uint64_t b,
                                                      int accumulate) {
  static_assert(count == 16 || count == 32 || count == 64);
  if constexpr (count == 16) {
    FUSEDKV_WGMMA_REGISTERS_OF_T("32", FUSEDKV_REGISTERS_16, "%16,%17,%18,%19", "%20", "%21", "%22",
                                 FUSEDKV_16(d, 0))
  } else if constexpr (count == 32) {
    FUSEDKV_WGMMA_REGISTERS_OF_T("64", FUSEDKV_REGISTERS_32, "%32,%33,%34,%35", "%36", "%37", "%38",
                                 FUSEDKV_32(d, 0))
  } else {
    FUSEDKV_WGMMA_REGISTERS_OF_T("128", FUSEDKV_REGISTERS_64, "%64,%65,%66,%67", "%68", "%69", "%70",
                                 FUSEDKV_64(d, 0))
  }
}

#undef FUSEDKV_WGMMA_REGISTERS_OF_T
#undef FUSEDKV_WGMMA_OF_T
#undef FUSEDKV_OF_T
#undef FUSEDKV_WGMMA_REGISTERS
#undef FUSEDKV_WGMMA
#undef FUSEDKV_128
#undef FUSEDKV_64
#undef FUSEDKV_32
#undef FUSEDKV_16
#undef FUSEDKV_4
#undef FUSEDKV_REGISTERS_128
#undef FUSEDKV_REGISTERS_64
#undef FUSEDKV_REGISTERS_32
#undef FUSEDKV_REGISTERS_16
#undef FUSEDKV_REGISTERS_4

}  // namespace fusedkv

// The instructions that kernels/common wraps in assembly, with the same names and arguments.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "cuda_runtime.h"
#include "emulator.h"
#include "tensor_map.h"

namespace fusedkv {

using emulator::current;
using emulator::fail;
using emulator::meet;
using emulator::shared_pointer;

// Of the bits of an f16 or bf16.
template <class T>
float to_float(uint16_t bits) {
  static const auto table = [] {
    std::vector<float> values(65536);
    for (uint32_t i = 0; i < 65536; ++i) {
      const auto half = static_cast<uint16_t>(i);
      T x;
      std::memcpy(&x, &half, sizeof(x));
      values[i] = static_cast<float>(x);
    }
    return values;
  }();
  return table[bits];
}

// c[rows][cols] += a[rows][16] * b[16][cols].
template <int rows, int cols>
void multiply(const float (&a)[rows][16], const float (*b)[cols], float (*c)[cols]) {
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < 16; ++k) {
      const float x = a[row][k];
      for (int col = 0; col < cols; ++col) c[row][col] += x * b[k][col];
    }
  }
}

// ------------------------------------------------------------------------------------------------ numbers

inline float reciprocal(float x) { return 1.0f / x; }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float clamp_to_f16(float x) { return std::isnan(x) ? x : std::min(std::max(x, -65504.f), 65504.f); }

// ------------------------------------------------------------------------------- kernels before and after

inline void wait_for_previous_kernels() {}
inline void let_next_kernel_start() {}
inline void prefetch_l2(const void*) {}
inline void need_here(uint64_t) {}
template <int registers>
inline void lower_registers() {}
template <int registers>
inline void raise_registers() {}
inline void publish(float4* to, float4 x) { *to = x; }
inline void publish(float2* to, float2 x) { *to = x; }
inline float4 load_published(const float4* from) { return *from; }
inline float2 load_published(const float2* from) { return *from; }
inline uint32_t after_load(float, uint32_t x) { return x; }

// ----------------------------------------------------------------------------------------- shared memory

inline uint32_t smem_address(const void* p) { return emulator::shared_address(p); }

inline void store_shared_16(uint32_t address, uint4 x) { std::memcpy(shared_pointer(address, 16), &x, 16); }
inline void store_shared_4(uint32_t address, uint32_t x) { std::memcpy(shared_pointer(address, 4), &x, 4); }

inline void store_shared_floats(uint32_t address, float4 x, bool valid) {
  if (valid) std::memcpy(shared_pointer(address, 16), &x, 16);
}

inline uint4 load_shared_16(uint32_t address) {
  uint4 x;
  std::memcpy(&x, shared_pointer(address, 16), 16);
  return x;
}

inline uint64_t stream_policy() { return 0; }
inline uint64_t keep_policy(float fraction) {
  if (!(fraction > 0.f && fraction <= 1.f)) fail("a policy for a fraction of %g", fraction);
  return 0;
}

// Takes effect now, or when its group is waited for.
inline void cp_async_16(uint32_t smem, const void* global, bool valid, uint64_t = 0) {
  if (reinterpret_cast<uintptr_t>(global) % 16) fail("cp.async from %p", global);
  char* const to = shared_pointer(smem, 16);
  const auto copy = [=] { valid ? std::memcpy(to, global, 16) : std::memset(to, 0, 16); };
  if (emulator::coin()) return copy();
  current->copies.back().effects.push_back(copy);
}

inline void cp_async_commit() { current->copies.emplace_back(); }

inline void wait_for_groups(std::vector<emulator::Group>& groups, size_t in_flight) {
  while (groups.size() > in_flight + 1) {  // the last group is not committed
    for (const auto& effect : groups.front().effects) effect();
    groups.erase(groups.begin());
  }
}

template <int N>
inline void cp_async_wait() {
  wait_for_groups(current->copies, N);
}

template <int barrier, int threads>
inline void named_barrier_wait() {
  meet("bar.sync", ~0u, nullptr, [](void**) {});
  emulator::barrier_wait(barrier, threads);
}

template <int barrier, int threads>
inline void named_barrier_arrive() {
  meet("bar.arrive", ~0u, nullptr, [](void**) {});
  emulator::barrier_arrive(barrier, threads);
}

// ------------------------------------------------------------------------------------- products of a warp

struct MatrixOperand {
  uint32_t address;
  uint32_t* result;
};

inline void load_matrices(uint32_t (&r)[4], uint32_t smem, bool transposed) {
  MatrixOperand own{smem, r};
  meet("ldmatrix", ~0u, &own, [transposed](void** operands) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t x[8][8];
      for (int row = 0; row < 8; ++row) {
        const auto& from = *static_cast<MatrixOperand*>(operands[8 * matrix + row]);
        std::memcpy(x[row], shared_pointer(from.address, 16), 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint16_t first = transposed ? x[j][i] : x[i][j],
                       second = transposed ? x[j + 1][i] : x[i][j + 1];
        static_cast<MatrixOperand*>(operands[lane])->result[matrix] = first | uint32_t{second} << 16;
      }
    }
  });
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) { load_matrices(r, smem, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) { load_matrices(r, smem, true); }

inline uint32_t transpose_8x8(uint32_t x) {
  meet("movmatrix", ~0u, &x, [](void** operands) {
    uint32_t from[32];
    for (int lane = 0; lane < 32; ++lane) from[lane] = *static_cast<uint32_t*>(operands[lane]);
    const auto element = [&](int row, int col) { return from[4 * row + col / 2] >> col % 2 * 16 & 0xffffu; };
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, col = lane % 4 * 2;
      *static_cast<uint32_t*>(operands[lane]) = element(col, row) | element(col + 1, row) << 16;
    }
  });
  return x;
}

struct ProductOperand {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  ProductOperand own{c, a, {b0, b1}};
  meet("mma", ~0u, &own, [](void** operands) {
    float a[16][16], b[16][8], c[16][8];
    const auto each = [&](auto&& f) {  // of a lane: its operands, and its row and column
      for (int lane = 0; lane < 32; ++lane) {
        f(*static_cast<ProductOperand*>(operands[lane]), lane / 4, lane % 4 * 2);
      }
    };
    each([&](const ProductOperand& from, int row, int col) {
      for (int i = 0; i < 4; ++i) c[row + i / 2 * 8][col + i % 2] = from.c[i];
      for (int i = 0; i < 2; ++i) {
        const auto element = [i](uint32_t pair) { return to_float<T>(pair >> 16 * i & 0xffffu); };
        for (int j = 0; j < 4; ++j) a[row + j % 2 * 8][col + j / 2 * 8 + i] = element(from.a[j]);
        for (int j = 0; j < 2; ++j) b[col + j * 8 + i][row] = element(from.b[j]);
      }
    });
    multiply(a, b, c);
    each([&](ProductOperand& to, int row, int col) {
      for (int i = 0; i < 4; ++i) to.c[i] = c[row + i / 2 * 8][col + i % 2];
    });
  });
}

// --------------------------------------------------------------------------------------------- mbarriers

struct Mbarrier {
  uint32_t phase : 1, arrivals : 15, pending : 16;
  int32_t bytes;  // that this phase waits for

  void check() {
    if (pending == 0 && bytes == 0) phase ^= 1, pending = arrivals;
  }
  void arrive() {
    if (pending == 0) fail("an mbarrier gets more than its %d arrivals", arrivals);
    --pending;
    check();
  }
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& mbarrier_at(uint32_t barrier) {
  return *reinterpret_cast<Mbarrier*>(shared_pointer(barrier, 8));
}

inline void mbarrier_init(uint32_t barrier, int arrivals) {
  mbarrier_at(barrier) = {0, uint32_t(arrivals), uint32_t(arrivals), 0};
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint32_t barrier) { mbarrier_at(barrier).arrive(); }
inline void mbarrier_arrive_after_copies(uint32_t barrier) {
  if (current->copies.size() > 1) fail("cp.async that both a group and a barrier wait for");
  const auto batch = std::make_shared<emulator::Batch>(
      emulator::Batch{std::exchange(current->copies.back(), {}), std::move(current->batch)});
  current->batch = batch;
  current->cta->cluster->in_flight.push_back([batch, &at = mbarrier_at(barrier)] {
    batch->land();
    at.arrive();
  });
}
inline void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  mbarrier_at(barrier).bytes += bytes;
  mbarrier_at(barrier).arrive();
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  const Mbarrier& at = mbarrier_at(barrier);
  emulator::wait_until("an mbarrier", [&] { return at.phase != parity; });
}

// ---------------------------------------------------------------------------------------------- clusters

inline void cluster_arrive() {
  emulator::Cluster& cluster = *current->cta->cluster;
  current->cluster_phase = cluster.phase;
  if (++cluster.arrived == cluster.alive) cluster.arrived = 0, ++cluster.phase;
}
inline void cluster_announce() { cluster_arrive(); }
inline void cluster_wait() {
  const emulator::Cluster& cluster = *current->cta->cluster;
  emulator::wait_until("the cluster's barrier",
                       [&, phase = current->cluster_phase] { return cluster.phase != phase; });
}
inline uint32_t address_in_cluster(uint32_t smem, uint32_t rank) {
  return smem | (rank + 1) << emulator::kRankShift;
}
inline void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
  mbarrier_arrive(address_in_cluster(barrier, rank));
}
inline void mbarrier_wait_for_cluster(uint32_t barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }

inline void store_8_in_cluster(uint32_t to, uint64_t value) { std::memcpy(shared_pointer(to, 8), &value, 8); }

inline void store_in_cluster(uint32_t to, uint32_t barrier, float4 value, bool valid) {
  if (!valid) return;
  char* const there = shared_pointer(to, 16);
  Mbarrier& at = mbarrier_at(barrier);
  current->cta->cluster->in_flight.push_back([=, &at] {
    std::memcpy(there, &value, 16);
    at.bytes -= 16;
    at.check();
  });
}

// ------------------------------------------------------------------------------------------- bulk copies

inline bool elect_thread() {
  meet("elect.sync", ~0u, nullptr, [](void**) {});
  return current->lane() == 0;
}
inline void prefetch_tensor_map(const CUtensorMap&) {}

// The 128-byte swizzle, of a shared address.
constexpr uint32_t swizzled_address(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// ctas: bits of those of the cluster that get it, or 0 for the own one alone.
inline void copy_box(uint32_t smem, const CUtensorMap& map, uint32_t barrier, unsigned ctas,
                     const int (&coordinates)[5]) {
  const emulator::TensorMap tensor = emulator::decode(map);
  const uint32_t elements = tensor.box_elements();
  for (int rank = 0; rank < (ctas == 0 ? 1 : 16); ++rank) {
    if (ctas != 0 && !(ctas >> rank & 1)) continue;
    const auto here = [&](uint32_t address) {
      return ctas == 0 ? address : address_in_cluster(address, rank);
    };
    if (smem % 1024) fail("a copy with the 128-byte swizzle to address %u", smem);
    char* const to = shared_pointer(here(smem), elements * 2) - smem;
    Mbarrier& at = mbarrier_at(here(barrier));
    current->cta->cluster->in_flight.push_back([=, &at] {
      for (uint32_t i = 0; i < elements; i += 8) {  // 16 bytes are inside or outside as a whole
        uint32_t rest = i;
        const char* from = tensor.data;
        bool inside = true;
        for (int d = 0; d < tensor.rank; ++d) {
          const int64_t coordinate = int64_t{coordinates[d]} + rest % tensor.box[d];
          rest /= tensor.box[d];
          inside = inside && coordinate >= 0 && coordinate < int64_t(tensor.sizes[d]);
          from += coordinate * int64_t(tensor.byte_strides[d]);
        }
        char* const element = to + swizzled_address(smem + 2 * i);
        inside ? std::memcpy(element, from, 16) : std::memset(element, 0, 16);
      }
      at.bytes -= static_cast<int>(elements * 2);
      at.check();
    });
  }
}

inline void copy_box_2d(uint32_t smem, const CUtensorMap& map, uint32_t barrier, int x, int y) {
  copy_box(smem, map, barrier, 0, {x, y, 0, 0, 0});
}
inline void share_box_2d(uint32_t smem, const CUtensorMap& map, uint32_t barrier, int x, int y,
                         unsigned ctas) {
  copy_box(smem, map, barrier, ctas, {x, y, 0, 0, 0});
}

inline void stream_box_5d(uint32_t smem, const CUtensorMap& map, uint32_t barrier, int x0, int x1, int x2,
                          int x3, int x4) {
  copy_box(smem, map, barrier, 0, {x0, x1, x2, x3, x4});
}

template <int ctas>
inline void copy_box_5d(uint32_t smem, const CUtensorMap& map, uint32_t barrier, int x0, int x1, int x2,
                        int x3, int x4) {
  copy_box(smem, map, barrier, (1 << ctas) - 1, {x0, x1, x2, x3, x4});
}

// ------------------------------------------------------------------------------- products of a warpgroup

inline void fence_async_proxy() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  meet("wgmma.commit_group", ~0u, nullptr, [](void**) { current->warp->products.emplace_back(); });
}
template <int groups>
inline void wgmma_wait() {
  meet("wgmma.wait_group", ~0u, nullptr, [](void**) { wait_for_groups(current->warp->products, groups); });
}
template <int count>
inline void fence_registers(float (&)[count]) {}

// 16 columns of the matrix that a descriptor stands for; to(row, column, element).
template <class T, class F>
void load_wgmma_rows(uint64_t matrix, int first, int count, F&& to) {
  const uint32_t start = static_cast<uint32_t>(matrix & 0x3fff) << 4;
  const uint32_t eight_rows = static_cast<uint32_t>(matrix >> 32 & 0x3fff) << 4;
  if (matrix >> 62 != 1) fail("a matrix without the 128-byte swizzle");
  for (int row = first; row < first + count; ++row) {
    for (int half = 0; half < 2; ++half) {
      uint16_t x[8];
      const uint32_t address = start + row / 8 * eight_rows + row % 8 * 128 + half * 16;
      std::memcpy(x, shared_pointer(swizzled_address(address), 16), 16);
      for (int k = 0; k < 8; ++k) to(row - first, 8 * half + k, to_float<T>(x[k]));
    }
  }
}

// 16 rows and `columns` columns of the matrix that wgmma_rows() describes; to(row, column, element).
template <class T, class F>
void load_wgmma_columns(uint64_t matrix, int columns, F&& to) {
  const uint32_t start = static_cast<uint32_t>(matrix & 0x3fff) << 4;
  const uint32_t tile = static_cast<uint32_t>(matrix >> 16 & 0x3fff) << 4;
  const uint32_t eight_rows = static_cast<uint32_t>(matrix >> 32 & 0x3fff) << 4;
  if (matrix >> 62 != 1) fail("a matrix without the 128-byte swizzle");
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < columns; column += 8) {
      uint16_t x[8];
      const uint32_t address =
          start + column / 64 * tile + row / 8 * eight_rows + row % 8 * 128 + column % 64 * 2;
      std::memcpy(x, shared_pointer(swizzled_address(address), 16), 16);
      for (int i = 0; i < 8; ++i) to(row, column + i, to_float<T>(x[i]));
    }
  }
}

struct WgmmaOperands {
  float* d;
  const uint32_t* a;  // where it is in registers
};

// load_left(registers of the lanes, left) and load_right(right) bring the operands. Takes effect when its
// group is waited for, or now if all before it have.
template <int count, class Left, class Right>
inline void multiply_warpgroup(float (&d)[count], const uint32_t* a, int accumulate, Left load_left,
                               Right load_right) {
  WgmmaOperands own{d, a};
  meet("wgmma", ~0u, &own, [=](void** operands) {
    std::array<float*, 32> lanes;
    std::array<const uint32_t*, 32> registers;
    for (int lane = 0; lane < 32; ++lane) {
      lanes[lane] = static_cast<WgmmaOperands*>(operands[lane])->d;
      registers[lane] = static_cast<WgmmaOperands*>(operands[lane])->a;
    }
    const auto product = [=] {
      float left[16][16], right[16][2 * count], sums[16][2 * count];
      load_left(registers, left);
      load_right(right);
      const auto each = [&](auto&& f) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < count; ++i) {
            f(lanes[lane][i], sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + lane % 4 * 2 + i % 2]);
          }
        }
      };
      each([&](float from, float& sum) { sum = accumulate ? from : 0.f; });
      multiply(left, right, sums);
      each([&](float& to, float sum) { to = sum; });
    };
    auto& groups = current->warp->products;
    bool idle = true;
    for (const auto& group : groups) idle = idle && group.effects.empty();
    if (idle && emulator::coin()) return product();
    groups.back().effects.push_back(product);
  });
}

template <class T, int count>
inline void wgmma_64x16(float (&d)[count], uint64_t a, uint64_t b, int accumulate) {
  const int first_row = current->number / 32 % 4 * 16;
  multiply_warpgroup(
      d, nullptr, accumulate,
      [=](const auto&, auto& left) {
        load_wgmma_rows<T>(a, first_row, 16, [&](int row, int k, float x) { left[row][k] = x; });
      },
      [=](auto& right) {
        load_wgmma_rows<T>(b, 0, 2 * count, [&](int row, int k, float x) { right[k][row] = x; });
      });
}

template <class T, bool rows_b, int count>
inline void wgmma_registers_64x16(float (&d)[count], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  multiply_warpgroup(
      d, a, accumulate,
      [](const auto& registers, auto& left) {
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 8; ++i) {
            left[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i / 4 * 8 + i % 2] =
                to_float<T>(registers[lane][i / 2] >> 16 * (i % 2) & 0xffffu);
          }
        }
      },
      [=](auto& right) {
        if constexpr (rows_b) {
          load_wgmma_columns<T>(b, 2 * count, [&](int k, int column, float x) { right[k][column] = x; });
        } else {
          load_wgmma_rows<T>(b, 0, 2 * count, [&](int row, int k, float x) { right[k][row] = x; });
        }
      });
}

}  // namespace fusedkv

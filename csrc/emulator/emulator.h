// A GPU for the kernels of this library on a CPU, so that their code is tested where there is no GPU: every
// CUDA thread is a fiber, and what makes a GPU hard to program happens on purpose. Threads run in random
// order, warps at random speeds, asynchronous copies and products take effect as early or as late as they
// may, memory starts as NaN, and its ends are guarded. What would hang or trap ends the program with the
// reason.
//
// CTAs run one after another, clusters of them together, in the order of the grid: a GPU starts them so, and
// those of fused_attention wait for earlier ones. Not emulated: the memory model (every access takes effect
// at once), kernels that overlap, and time.
//
// This file: threads, barriers and memory. instructions.h: what kernels/common wraps in assembly.
// translate.py: from CUDA C++ to C++.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

namespace emulator {

struct Cluster;
struct Warp;

constexpr size_t kSharedBytesAtMost = 227 * 1024;  // of a CTA, as on sm_90
constexpr size_t kSharedGapsAtMost = 4096;
constexpr size_t kDynamicOffset = 256;  // nobody may rely on more alignment than this
constexpr int kRankShift = 24;          // a shared address of another CTA: rank + 1 above its own

struct Barrier {
  int arrived = 0;
  uint64_t phase = 0;
};

struct Cta {
  Cluster* cluster = nullptr;
  uint3 index{};
  int alive = 0;  // threads that have not returned
  char* shared = nullptr;
  size_t declared_bytes = 0, shared_bytes = 0;  // the latter with the gaps for alignment
  Barrier barriers[16];
  std::vector<std::pair<const void*, size_t>> variables;  // static shared ones, and where they are
};

// Something asynchronous that a thread has started: groups that are complete but for their effects.
struct Group {
  std::vector<std::function<void()>> effects;
};

// What a barrier counts as one arrival: copies of a thread, and all it has issued before them.
struct Batch {
  Group copies;
  std::shared_ptr<Batch> before;

  void land() {
    if (before) before->land(), before.reset();
    for (const auto& effect : copies.effects) effect();
    copies.effects.clear();
  }
};

struct Thread {
  uint3 index{};
  int number = 0;  // in the CTA
  Cta* cta = nullptr;
  Warp* warp = nullptr;
  std::vector<Group> copies;     // cp.async; the last one is not committed
  std::shared_ptr<Batch> batch;  // the last one that a barrier counts
  uint64_t cluster_phase = 0;

  int lane() const { return number % 32; }
};

// A warp-wide instruction that some lanes have reached.
struct Meeting {
  const char* what = nullptr;
  uint32_t mask = 0, arrived = 0;
  uint64_t number = 0;
  void* operands[32]{};
};

struct Warp {
  Meeting meetings[8];
  uint32_t exited = 0;
  double pace = 1.0;            // the probability that it runs when it and others could
  std::vector<Group> products;  // wgmma; the last one is not committed
};

struct Cluster {
  dim3 grid{}, block{};
  std::vector<Cta> ctas;
  std::vector<std::function<void()>> in_flight;  // effects of the copy engine
  int arrived = 0, alive = 0;                    // of the cluster barrier
  uint64_t phase = 0;
};

extern Thread* current;

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
bool coin();  // random, the same in every run with the same EMULATOR_SEED

// Lets other threads run until `ready` says so.
void wait_until(const char* what, const std::function<bool()>& ready);

// All lanes of the mask meet; the last one calls act(operands), indexed by lane, for all.
void meet(const char* what, uint32_t mask, void* operand, const std::function<void(void**)>& act);

void barrier_wait(int barrier, int threads);  // threads 0: all of the CTA that have not returned
void barrier_arrive(int barrier, int threads);

// ------------------------------------------------------------------------------------------------- memory

uint32_t shared_address(const void* p);
// The memory at a shared address, of this CTA or of another one in the cluster.
char* shared_pointer(uint32_t address, size_t bytes);

char* static_shared(const void* key, size_t bytes);

template <class T>
T& static_shared() {
  static const char key = 0;
  return *reinterpret_cast<T*>(static_shared(&key, sizeof(T)));
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(current->cta->shared + kDynamicOffset);
}

// ------------------------------------------------------------------------------------------------ launches

struct Launch {
  const void* kernel;  // null where its limit of shared memory is not checked
  dim3 grid, block;
  size_t shared_bytes;
  dim3 cluster;  // CTAs in x and y
};

cudaError_t run(const Launch& launch, const std::function<void()>& thread);

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...)
template <class Kernel>
auto launch(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes = 0, cudaStream_t = nullptr) {
  return [=](auto&&... arguments) {
    run({nullptr, grid, block, shared_bytes, dim3(1)}, [&] { kernel(arguments...); });
  };
}

}  // namespace emulator

// --------------------------------------------------------------------------------- the language's own names

#undef __forceinline__
#define __forceinline__ inline
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __noinline__
#define __noinline__ __attribute__((noinline))
#define __CUDA_ARCH_FEAT_SM90_ALL
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline void __syncthreads() { emulator::barrier_wait(0, 0); }
inline void __syncwarp(uint32_t mask = ~0u) {
  emulator::meet("__syncwarp", mask, nullptr, [](void**) {});
}
[[noreturn]] inline void __trap() { emulator::fail("__trap()"); }

namespace emulator {

template <class T>
struct Shuffled {
  T value, result;
  int from;
};

template <class T>
T shuffle(uint32_t mask, T value, int from) {
  Shuffled<T> own{value, value, from & 31};
  meet("__shfl_sync", mask, &own, [](void** operands) {
    for (int lane = 0; lane < 32; ++lane) {
      if (operands[lane] == nullptr) continue;
      auto& to = *static_cast<Shuffled<T>*>(operands[lane]);
      if (operands[to.from] == nullptr) fail("__shfl_sync from lane %d, which takes no part", to.from);
      to.result = static_cast<Shuffled<T>*>(operands[to.from])->value;
    }
  });
  return own.result;
}

}  // namespace emulator

template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32) {
  return emulator::shuffle(mask, value, emulator::current->lane() / width * width + from % width);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return emulator::shuffle(mask, value, emulator::current->lane() ^ lanes);
}

inline int atomicMax(int* to, int x) { return std::exchange(*to, std::max(*to, x)); }

inline uint32_t __ballot_sync(uint32_t mask, bool vote) {
  struct Vote {
    bool vote;
    uint32_t all;
  } own{vote, 0};
  emulator::meet("__ballot_sync", mask, &own, [](void** operands) {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (operands[lane]) all |= uint32_t{static_cast<Vote*>(operands[lane])->vote} << lane;
    }
    for (int lane = 0; lane < 32; ++lane) {
      if (operands[lane]) static_cast<Vote*>(operands[lane])->all = all;
    }
  });
  return own.all;
}
inline bool __any_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) != 0; }

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float cospif(float x) { return static_cast<float>(std::cos(M_PI * x)); }
inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}

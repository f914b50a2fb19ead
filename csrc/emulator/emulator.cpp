// The scheduler, and the part of the CUDA runtime that launches and memory need.
#include "emulator.h"

#include <cudaTypedefs.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <string>

#include "tensor_map.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Thread* current = nullptr;

namespace {

// splitmix64: a seed costs nothing, and each launch gets its own.
struct Generator {
  using result_type = uint64_t;
  uint64_t state = 0;

  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t{0}; }
  uint64_t operator()() {
    uint64_t x = state += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
  }
};
Generator generator;

int environment(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}
const int kSeed = environment("EMULATOR_SEED", 1), kMultiprocessors = environment("EMULATOR_SMS", 8);
constexpr double kSlowPace = 0.1;     // of every fourth warp; as many run only when nobody else can
constexpr double kLandingRate = 0.1;  // of what the copy engine has in flight, a turn of all warps

bool chance(double probability) { return generator() * 0x1p-64 < probability; }

// ------------------------------------------------------------------------------------------------- fibers

constexpr size_t kStackBytes = 256 * 1024;

// A stack with a function that runs `work` again and again. Switching is by setjmp, which unlike swapcontext
// makes no system call.
struct Fiber {
  ucontext_t first{};
  std::jmp_buf here{};
  bool started = false, done = true;
  const std::function<void()>* work = nullptr;
  const char* waits_for = nullptr;
  const std::function<bool()>* ready = nullptr;
  Thread thread;
};

std::jmp_buf scheduler;
Fiber* running = nullptr;

void fiber_main() {
  for (;;) {
    (*running->work)();
    running->done = true;
    if (_setjmp(running->here) == 0) _longjmp(scheduler, 1);
  }
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  running = &fiber;
  current = &fiber.thread;
  threadIdx = current->index, blockIdx = current->cta->index;
  blockDim = current->cta->cluster->block, gridDim = current->cta->cluster->grid;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.first);
  }
  current = nullptr;
}

__attribute__((noinline)) void suspend() {
  if (_setjmp(running->here) == 0) _longjmp(scheduler, 1);
}

Fiber* make_fiber() {
  auto* const fiber = new Fiber;
  void* const stack =
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) fail("no memory for a stack");
  getcontext(&fiber->first);
  fiber->first.uc_stack.ss_sp = stack;
  fiber->first.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber->first, fiber_main, 0);
  return fiber;
}

// ------------------------------------------------------------------------------------------------- memory

// Memory that ends, to 16 bytes, where a page begins that nobody may touch.
char* guarded(size_t bytes, size_t& mapped) {
  const size_t page = sysconf(_SC_PAGESIZE), used = (bytes + 15) / 16 * 16;
  mapped = (used + page - 1) / page * page + page;
  char* const start = static_cast<char*>(
      mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (start == MAP_FAILED) return nullptr;
  mprotect(start + mapped - page, page, PROT_NONE);
  return start + mapped - page - used;
}

std::map<void*, std::pair<void*, size_t>> allocations;  // by what cudaMalloc gave
std::map<const void*, int> shared_limits;               // of kernels

void on_segmentation_fault(int) {
  if (current != nullptr) fail("an access outside of memory");
  std::signal(SIGSEGV, SIG_DFL);
  raise(SIGSEGV);
}

// ------------------------------------------------------------------------------------------------- a cluster

// Runs the CTAs of one cluster after another, and keeps their stacks.
class Scheduler {
 public:
  void run(const Launch& launch, uint3 first, const std::function<void()>& work) {
    cluster_ = {};
    cluster_.grid = launch.grid, cluster_.block = launch.block;
    const unsigned ctas = launch.cluster.x * launch.cluster.y;
    cluster_.ctas.resize(ctas);
    const int threads = launch.block.x * launch.block.y * launch.block.z;
    const int warps = (threads + 31) / 32;
    cluster_.alive = threads * static_cast<int>(ctas);
    warps_.assign(warps * ctas, {});
    while (fibers_.size() < ctas * threads) fibers_.push_back(make_fiber());
    while (shared_.size() < ctas) {
      size_t mapped;
      shared_.push_back(guarded(kSharedBytesAtMost + kSharedGapsAtMost, mapped));
    }
    for (unsigned rank = 0; rank < ctas; ++rank) {
      Cta& cta = cluster_.ctas[rank];
      const unsigned x = rank % launch.cluster.x, y = rank / launch.cluster.x;
      cta.cluster = &cluster_, cta.index = {first.x + x, first.y + y, first.z}, cta.alive = threads;
      cta.shared = shared_[rank];
      cta.declared_bytes = launch.shared_bytes;
      cta.shared_bytes = kDynamicOffset + (launch.shared_bytes + 255) / 256 * 256;
      std::memset(cta.shared, 0xff, cta.shared_bytes);
      for (int i = 0; i < threads; ++i) {
        Fiber& fiber = *fibers_[rank * threads + i];
        const unsigned x = i % launch.block.x, y = i / launch.block.x % launch.block.y;
        fiber.done = false, fiber.work = &work, fiber.ready = nullptr, fiber.waits_for = nullptr;
        fiber.thread = {{x, y, i / (launch.block.x * launch.block.y)},
                        i,
                        &cta,
                        &warps_[rank * warps + i / 32],
                        {},
                        {},
                        0};
        fiber.thread.copies.emplace_back();
      }
      for (int w = 0; w < warps; ++w) {
        Warp& warp = warps_[rank * warps + w];
        if (threads - 32 * w < 32) warp.exited = ~0u << (threads - 32 * w);
        warp.pace = coin() ? 1.0 : coin() ? kSlowPace : 0.0;
        warp.products.emplace_back();
      }
    }
    run_all(threads);
    if (!cluster_.in_flight.empty()) fail("a CTA has returned before a copy to it has landed");
  }

 private:
  void land(size_t i) {
    const auto effect = std::move(cluster_.in_flight[i]);
    if (i + 1 < cluster_.in_flight.size()) cluster_.in_flight[i] = std::move(cluster_.in_flight.back());
    cluster_.in_flight.pop_back();
    effect();
  }

  void run_all(int threads) {
    const int warps = (threads + 31) / 32;
    std::vector<int> order(warps_.size());
    std::iota(order.begin(), order.end(), 0);
    left_ = threads * static_cast<int>(cluster_.ctas.size());
    // Where nothing moves, what is in flight lands, then all that are slow may run, then those without a
    // pace.
    for (int idle = 0; left_ > 0;) {
      bool moved = false;
      for (size_t i = cluster_.in_flight.size(); i-- > 0;) {
        if (chance(kLandingRate)) land(i), moved = true;
      }
      std::shuffle(order.begin(), order.end(), generator);
      for (const int w : order) {
        if (warps_[w].exited == ~0u) continue;
        const double pace = warps_[w].pace;
        const bool may_run = idle == 2 || (idle == 1 && pace > 0) || chance(pace);
        if (!may_run) continue;
        const int first = w % warps * 32;
        Fiber** const lanes = &fibers_[w / warps * threads + first];
        while (run_lanes(lanes, std::min(32, threads - first))) {
          moved = true;
          if (chance(0.1)) break;
        }
      }
      if (moved) {
        idle = 0;
      } else if (!cluster_.in_flight.empty()) {
        land(generator() % cluster_.in_flight.size());
      } else if (++idle > 2) {
        hang();
      }
    }
  }

  // Lets every lane of a warp run until it waits; false when none could.
  bool run_lanes(Fiber** lanes, int count) {
    bool moved = false;
    const int turn = static_cast<int>(generator() % count);
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = *lanes[(i + turn) % count];
      if (fiber.done) continue;
      current = &fiber.thread;
      if (fiber.ready != nullptr && !(*fiber.ready)()) continue;
      fiber.ready = nullptr;
      resume(fiber);
      moved = true;
      if (fiber.done) end(fiber.thread);
    }
    return moved;
  }

  void end(Thread& thread) {
    --left_;
    --thread.cta->alive;
    thread.warp->exited |= 1u << thread.lane();
    // The ends of threads count at the barriers of all.
    Barrier& barrier = thread.cta->barriers[0];
    if (thread.cta->alive > 0 && barrier.arrived == thread.cta->alive) barrier.arrived = 0, ++barrier.phase;
    --cluster_.alive;
    if (cluster_.alive > 0 && cluster_.arrived == cluster_.alive) cluster_.arrived = 0, ++cluster_.phase;
  }

  [[noreturn]] void hang() {
    std::map<std::string, std::string> waiting;
    for (const Fiber* at : fibers_) {
      const Fiber& fiber = *at;
      if (fiber.done) continue;
      std::string& threads = waiting[fiber.waits_for];
      if (threads.size() < 200) {
        threads +=
            " " + std::to_string(fiber.thread.cta->index.x) + ":" + std::to_string(fiber.thread.number);
      }
    }
    for (const auto& [what, threads] : waiting) {
      std::fprintf(stderr, "waiting at %s: (CTA:thread)%s\n", what.c_str(), threads.c_str());
    }
    current = nullptr;
    fail("no thread can go on");
  }

  Cluster cluster_;
  int left_ = 0;  // threads that have not returned
  std::vector<Warp> warps_;
  std::vector<Fiber*> fibers_;
  std::vector<char*> shared_;  // multiples of 1024
};

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "emulator: ");
  std::vfprintf(stderr, format, arguments);
  if (current != nullptr) {
    const uint3 cta = current->cta->index, thread = current->index;
    std::fprintf(stderr, " (CTA %u,%u,%u thread %u,%u,%u)", cta.x, cta.y, cta.z, thread.x, thread.y,
                 thread.z);
  }
  std::fprintf(stderr, "\n");
  std::_Exit(3);
}

bool coin() { return chance(0.5); }

void wait_until(const char* what, const std::function<bool()>& ready) {
  if (ready()) return;
  running->waits_for = what;
  running->ready = &ready;
  suspend();
}

void meet(const char* what, uint32_t mask, void* operand, const std::function<void(void**)>& act) {
  Warp& warp = *current->warp;
  const int lane = current->lane();
  if (!(mask >> lane & 1)) fail("%s by a lane that is not in its mask %08x", what, mask);
  Meeting* meeting = nullptr;
  for (Meeting& open : warp.meetings) {
    if (open.arrived && open.mask == mask && !std::strcmp(open.what, what) && !(open.arrived >> lane & 1)) {
      meeting = &open;
      break;
    }
  }
  for (Meeting& open : warp.meetings) {
    if (meeting == nullptr && open.arrived == 0) meeting = &open;
  }
  if (meeting == nullptr) fail("%s: the warp is in too many places at once", what);
  meeting->what = what, meeting->mask = mask, meeting->arrived |= 1u << lane;
  meeting->operands[lane] = operand;
  const auto complete = [meeting, number = meeting->number, mask, &warp, &act] {
    if (meeting->number != number) return true;
    if (meeting->arrived != (mask & ~warp.exited)) return false;  // those that have returned need not come
    meeting->arrived = 0;
    ++meeting->number;
    act(meeting->operands);
    std::fill_n(meeting->operands, 32, nullptr);
    return true;
  };
  if (!complete()) wait_until(what, complete);
}

void barrier_arrive(int number, int threads) {
  Barrier& barrier = current->cta->barriers[number];
  if (++barrier.arrived == (threads == 0 ? current->cta->alive : threads))
    barrier.arrived = 0, ++barrier.phase;
}

void barrier_wait(int number, int threads) {
  const Barrier& barrier = current->cta->barriers[number];
  const uint64_t phase = barrier.phase;
  barrier_arrive(number, threads);
  wait_until(number == 0 ? "__syncthreads" : "a named barrier", [&] { return barrier.phase != phase; });
}

uint32_t shared_address(const void* p) {
  const Cta& cta = *current->cta;
  const ptrdiff_t offset = static_cast<const char*>(p) - cta.shared;
  if (offset < 0 || size_t(offset) > cta.shared_bytes) fail("not an address of shared memory: %p", p);
  return static_cast<uint32_t>(offset);
}

char* shared_pointer(uint32_t address, size_t bytes) {
  Cta* cta = current->cta;
  if (const uint32_t rank = address >> kRankShift) {
    if (rank > cta->cluster->ctas.size())
      fail("CTA %u of a cluster of %zu", rank - 1, cta->cluster->ctas.size());
    cta = &cta->cluster->ctas[rank - 1];
    if (cta->alive == 0) fail("an access to the memory of CTA %u, which has returned", rank - 1);
  }
  const uint32_t offset = address & ((1u << kRankShift) - 1);
  if (offset + bytes > cta->shared_bytes || offset % std::min<size_t>(bytes, 16)) {
    fail("%zu bytes at %u of %zu bytes of shared memory", bytes, offset, cta->shared_bytes);
  }
  return cta->shared + offset;
}

char* static_shared(const void* key, size_t bytes) {
  Cta& cta = *current->cta;
  for (const auto& [variable, offset] : cta.variables) {
    if (variable == key) return cta.shared + offset;
  }
  const size_t offset = cta.shared_bytes;
  cta.shared_bytes += (bytes + 255) / 256 * 256;
  cta.declared_bytes += bytes;
  if (cta.declared_bytes > kSharedBytesAtMost) fail("%zu bytes of shared memory", cta.declared_bytes);
  std::memset(cta.shared + offset, 0xff, bytes);
  cta.variables.emplace_back(key, offset);
  return cta.shared + offset;
}

cudaError_t run(const Launch& launch, const std::function<void()>& work) {
  static const auto handler = std::signal(SIGSEGV, on_segmentation_fault);
  static uint64_t launches = 0;
  ++launches;
  (void)handler;
  const size_t threads = size_t{launch.block.x} * launch.block.y * launch.block.z;
  const size_t ctas = size_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  if (threads == 0 || threads > 1024 || ctas == 0) fail("a launch of %zu CTAs of %zu threads", ctas, threads);
  const unsigned cluster = launch.cluster.x * launch.cluster.y;
  if (cluster == 0 || cluster > 8 || launch.grid.x % launch.cluster.x || launch.grid.y % launch.cluster.y) {
    fail("clusters of %u x %u in a grid of %u x %u", launch.cluster.x, launch.cluster.y, launch.grid.x,
         launch.grid.y);
  }
  const auto limit = shared_limits.find(launch.kernel);
  const size_t most = launch.kernel == nullptr       ? kSharedBytesAtMost
                      : limit == shared_limits.end() ? 48 * 1024
                                                     : limit->second;
  if (launch.shared_bytes > most)
    fail("%zu bytes of shared memory, %zu are allowed", launch.shared_bytes, most);

  const size_t clusters = ctas / cluster;
  const size_t in_row = launch.grid.x / launch.cluster.x, rows = launch.grid.y / launch.cluster.y;
  static Scheduler scheduler;
  generator.state = uint64_t(kSeed) << 32 | launches;
  for (size_t i = 0; i < clusters; ++i) {
    const uint3 first = {unsigned(i % in_row * launch.cluster.x),
                         unsigned(i / in_row % rows * launch.cluster.y), unsigned(i / in_row / rows)};
    scheduler.run(launch, first, work);
  }
  return cudaSuccess;
}

}  // namespace emulator

// -------------------------------------------------------------------------------------- the CUDA runtime

using namespace emulator;

extern "C" {

cudaError_t cudaMalloc(void** p, size_t bytes) {
  size_t mapped;
  *p = guarded(bytes, mapped);
  if (*p == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*p, 0xff, bytes);
  allocations[*p] = {static_cast<char*>(*p) + (bytes + 15) / 16 * 16 + sysconf(_SC_PAGESIZE) - mapped,
                     mapped};
  return cudaSuccess;
}

cudaError_t cudaFree(void* p) {
  if (p == nullptr) return cudaSuccess;
  const auto at = allocations.find(p);
  if (at == allocations.end()) return cudaErrorInvalidValue;
  munmap(at->second.first, at->second.second);
  allocations.erase(at);
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kSharedBytesAtMost;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 1 << 20;
      return cudaSuccess;
    default:
      fail("device attribute %d", attribute);
  }
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) fail("function attribute %d", attribute);
  if (value > int{kSharedBytesAtMost}) return cudaErrorInvalidValue;
  shared_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = 90;
  attributes->sharedSizeBytes = 8;  // any: a kernel that is compiled has its variables
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled")) fail("driver function %s", name);
  const PFN_cuTensorMapEncodeTiled_v12000 encode = encode_tensor_map;
  *function = reinterpret_cast<void*>(encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// What only timing needs.
#define UNSUPPORTED(name, ...) \
  cudaError_t name(__VA_ARGS__) { return cudaErrorNotSupported; }
UNSUPPORTED(cudaStreamCreateWithFlags, cudaStream_t*, unsigned)
UNSUPPORTED(cudaStreamSynchronize, cudaStream_t)
UNSUPPORTED(cudaStreamDestroy, cudaStream_t)
UNSUPPORTED(cudaStreamBeginCapture, cudaStream_t, cudaStreamCaptureMode)
UNSUPPORTED(cudaStreamEndCapture, cudaStream_t, cudaGraph_t*)
UNSUPPORTED(cudaGraphInstantiate, cudaGraphExec_t*, cudaGraph_t, unsigned long long)
UNSUPPORTED(cudaGraphLaunch, cudaGraphExec_t, cudaStream_t)
UNSUPPORTED(cudaGraphExecDestroy, cudaGraphExec_t)
UNSUPPORTED(cudaGraphDestroy, cudaGraph_t)
UNSUPPORTED(cudaEventCreate, cudaEvent_t*)
UNSUPPORTED(cudaEventRecord, cudaEvent_t, cudaStream_t)
UNSUPPORTED(cudaEventDestroy, cudaEvent_t)
UNSUPPORTED(cudaEventElapsedTime, float*, cudaEvent_t, cudaEvent_t)
UNSUPPORTED(cudaGetDeviceProperties, cudaDeviceProp*, int)
UNSUPPORTED(cudaRuntimeGetVersion, int*)

}  // extern "C"

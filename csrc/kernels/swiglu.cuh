// swiglu: out = silu(gate) * up, where a row holds gate and then up.
//
// Bound by memory: every byte is read once and written once. Threads are numbered by 8 outputs, whatever row
// they lie in, so that neighbours move neighbouring bytes and no lane idles at the end of a row.
#pragma once

#include "common/overlap.cuh"
#include "common/vec.cuh"
#include "dispatch.h"
#include "launch.h"

namespace fusedkv {

// Many outputs: two vectors a thread, so that 64 bytes of loads are in flight for each. Few, as in a decode
// step: small CTAs of one vector a thread spread them over all SMs.
constexpr int kManySwigluVectors = 2, kManySwigluThreads = 256, kFewSwigluThreads = 64;
constexpr int64_t kFewSwigluVectors = int64_t{1} << 17;  // of all threads

template <class T, int kVectors>
__global__ void __launch_bounds__(kManySwigluThreads)
    swiglu_kernel(const __grid_constant__ SwigluParams p, uint64_t count) {
  const uint64_t columns = p.size / 8;
  const uint64_t first = uint64_t(blockIdx.x) * blockDim.x * kVectors + threadIdx.x;
  int64_t from[kVectors];  // before the wait, because a division takes long
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint64_t at = first + i * blockDim.x;
    from[i] = at / columns * p.row_stride + at % columns * 8;
  }
  wait_for_previous_kernels();
  let_next_kernel_start();
  uint4 gate[kVectors], up[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (first + i * blockDim.x >= count) break;
    const T* x = static_cast<const T*>(p.gate_up) + from[i];
    gate[i] = *reinterpret_cast<const uint4*>(x);
    up[i] = *reinterpret_cast<const uint4*>(x + p.size);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const uint64_t at = first + i * blockDim.x;
    if (at >= count) break;
    gated(Vec8::unpack<T>(gate[i]), Vec8::unpack<T>(up[i])).store(static_cast<T*>(p.out) + at * 8);
  }
}

template <class T>
cudaError_t launch_swiglu(const SwigluParams& p, cudaStream_t stream) {
  const int64_t count = p.rows * (p.size / 8);
  const bool few = count <= kFewSwigluVectors;
  const int threads = few ? kFewSwigluThreads : kManySwigluThreads;
  const int64_t vectors = threads * (few ? 1 : kManySwigluVectors);
  const dim3 grid(static_cast<unsigned>((count + vectors - 1) / vectors));
  const auto kernel = few ? swiglu_kernel<T, 1> : swiglu_kernel<T, kManySwigluVectors>;
  return launch_overlapping(kernel, grid, dim3(threads), 0, stream, p, static_cast<uint64_t>(count));
}

}  // namespace fusedkv

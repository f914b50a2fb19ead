// largest_token: the place of the largest of each row, of equals the first; NaN is larger than all numbers.
//
// The logits have just been written, so the L2 has them, but one SM takes microseconds to read a row. On
// Hopper a cluster takes it, unless there are rows for all SMs; elsewhere a CTA does. Which thread finds the
// largest is all the same: value and place are compared as one number.
#pragma once

#include "common/cluster.cuh"
#include "common/device.h"
#include "common/mma.cuh"
#include "common/overlap.cuh"
#include "common/vec.cuh"
#include "dispatch.h"
#include "launch.h"

namespace fusedkv {

constexpr int kLargestThreads = 512;
constexpr int kLargestCtas = 8;     // of a cluster: what every GPU with clusters takes
constexpr int kLargestVectors = 4;  // loads of 16 bytes that a thread has in flight

struct Largest {
  float value = -INFINITY;
  int place = 0;  // the answer for a row of nothing but -inf

  // Places come in ascending order.
  __device__ __forceinline__ void compare(float x, int at) {
    const bool larger = !(x <= value) && value == value;
    value = larger ? x : value;
    place = larger ? at : place;
  }

  // The larger the value and then the smaller the place, the larger the key.
  __device__ __forceinline__ uint64_t key() const {
    const uint32_t bits = __float_as_uint(value + 0.0f);  // -0 becomes the 0 that it equals
    const uint32_t order = bits >> 31 ? ~bits : bits | 0x80000000u;
    return uint64_t{value == value ? order : ~0u} << 32 | ~uint32_t(place);
  }
  __device__ __forceinline__ static int64_t place_of(uint64_t key) { return ~uint32_t(key); }
};

template <class T>
__device__ __forceinline__ void compare_vector(Largest& largest, const uint4& raw, int at) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      largest.compare(__uint_as_float(words[i]), at + i);
    } else {
      const float2 pair = unpack2<T>(words[i]);
      largest.compare(pair.x, at + 2 * i);
      largest.compare(pair.y, at + 2 * i + 1);
    }
  }
}

// Of what one of `threads` threads reads of a row, which may start anywhere.
template <class T>
__device__ __forceinline__ uint64_t largest_of_thread(const T* row, int size, int thread, int threads) {
  constexpr int kWidth = 16 / sizeof(T);
  const int head = min(size, int(-reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T)));
  const int vectors = (size - head) / kWidth, tail = head + vectors * kWidth + thread;
  const uint4* const aligned = reinterpret_cast<const uint4*>(row + head);
  Largest largest;
  if (thread < head) largest.compare(static_cast<float>(row[thread]), thread);
  for (int first = thread; first < vectors; first += kLargestVectors * threads) {
    uint4 raw[kLargestVectors];
#pragma unroll
    for (int i = 0; i < kLargestVectors; ++i) {
      if (first + i * threads < vectors) raw[i] = aligned[first + i * threads];
    }
#pragma unroll
    for (int i = 0; i < kLargestVectors; ++i) {
      const int at = first + i * threads;
      if (at < vectors) compare_vector<T>(largest, raw[i], head + at * kWidth);
    }
  }
  if (tail < size) largest.compare(static_cast<float>(row[tail]), tail);
  return largest.key();
}

template <class T, int kCtas>
__global__ void __launch_bounds__(kLargestThreads)
    largest_token_kernel(const __grid_constant__ LargestTokenParams p) {
  constexpr int kWarps = kLargestThreads / 32;
  __shared__ uint64_t keys[kWarps + kCtas];  // of the warps, then of the cluster's CTAs
  const int64_t row = blockIdx.x / kCtas;
  const int rank = blockIdx.x % kCtas;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kCtas > 1) cluster_announce();
#endif
  wait_for_previous_kernels();
  let_next_kernel_start();
  uint64_t key = largest_of_thread(static_cast<const T*>(p.logits) + row * p.row_stride, p.vocab,
                                   rank * kLargestThreads + threadIdx.x, kCtas * kLargestThreads);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) key = max(key, __shfl_xor_sync(~0u, key, lanes));
  if (threadIdx.x % 32 == 0) keys[threadIdx.x / 32] = key;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWarps; ++i) key = max(key, keys[i]);
  }
  if constexpr (kCtas > 1) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    cluster_wait();  // the first CTA is there
    if (threadIdx.x == 0) store_8_in_cluster(address_in_cluster(smem_address(keys + kWarps + rank), 0), key);
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x == 0 && rank == 0) {
      for (int i = 0; i < kCtas; ++i) key = max(key, keys[kWarps + i]);
    }
#else
    __trap();  // launched only where the other branch was compiled
#endif
  }
  if (threadIdx.x == 0 && rank == 0) p.out[row] = Largest::place_of(key);
}

template <class T>
cudaError_t launch_largest_token(const LargestTokenParams& p, cudaStream_t stream) {
  int sms = 0;
  const cudaError_t error = count_sms(sms);
  if (error != cudaSuccess) return error;
  if (has_few_token_kernels() && p.batch < sms) {
    return launch_overlapping_clusters(largest_token_kernel<T, kLargestCtas>, dim3(kLargestCtas),
                                       dim3(static_cast<unsigned>(p.batch) * kLargestCtas),
                                       dim3(kLargestThreads), 0, stream, p);
  }
  return launch_overlapping(largest_token_kernel<T, 1>, dim3(static_cast<unsigned>(p.batch)),
                            dim3(kLargestThreads), 0, stream, p);
}

}  // namespace fusedkv

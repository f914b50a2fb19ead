// Sums over rows in a fixed order, so that every run gives the same bits.
#pragma once

#include "vec.cuh"

namespace fusedkv {

// Adds `value` up over threadIdx.y. out[i] gets channel i of the CTA's columns (8 a thread), i < count.
// `shared` holds 8 floats a thread. Every thread of the CTA must call this.
__device__ __forceinline__ void sum_over_block_rows(const Vec8& value, float* shared, float* out, int count) {
  const int width = blockDim.x * 8, thread = threadIdx.y * blockDim.x + threadIdx.x;
  __syncthreads();  // the previous call's sums have been read
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    reinterpret_cast<float4*>(shared + thread * 8)[i / 4] = {value.x[i], value.x[i + 1], value.x[i + 2],
                                                             value.x[i + 3]};
  }
  __syncthreads();
  for (int i = thread; i < count; i += blockDim.x * blockDim.y) {
    float sum = 0.0f;
    for (int row = 0; row < blockDim.y; ++row) sum += shared[row * width + i];
    out[i] = sum;
  }
}

// The sum of partial[block * stride], block < count, by the threads of one column x of a kWidth x kHeight
// CTA; the thread with threadIdx.y == 0 gets it. Every thread of the CTA must call this.
template <int kWidth, int kHeight>
__device__ __forceinline__ float sum_partials(const float* partial, int64_t count, int64_t stride) {
  __shared__ float shared[kHeight][kWidth];
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t block = threadIdx.y; block < count; block += kHeight) sum += partial[block * stride];
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y == 0) {
    for (int row = 1; row < kHeight; ++row) sum += shared[row][threadIdx.x];
  }
  return sum;
}

}  // namespace fusedkv

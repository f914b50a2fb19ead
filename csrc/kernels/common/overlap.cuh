// Programmatic dependent launch: a kernel starts while the one before it in the stream still runs, and does
// early what depends on nobody's result: it fetches its instructions and asks the L2 for what it will read.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace fusedkv {

// Returns when all kernels before this one have ended and their writes are visible. A kernel that
// launch_overlapping() launches calls it in every thread before it writes device memory or reads what the
// kernel before it may write; prefetches to the L2 may come earlier, because nobody sees what they brought
// but through a later load.
__device__ __forceinline__ void wait_for_previous_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start, if it was launched to overlap, as soon as all CTAs of this one have said so or
// have ended and there is room for it on an SM.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Asks the L2 for the 128 bytes that the address lies in.
__device__ __forceinline__ void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// Makes the compiler load x before here and not where it is first used, behind a branch that ends some CTAs:
// what the code does depends on x, though it only sleeps a nanosecond for one value.
__device__ __forceinline__ void need_here(uint64_t x) {
  asm volatile("{.reg .pred p; setp.eq.u64 p, %0, 1; @p nanosleep.u32 1;}" ::"l"(x));
}

// Launches a kernel that waits by itself for those before it, in clusters of that shape; 0 for none.
template <class... Params, class... Args>
cudaError_t launch_overlapping_clusters(void (*kernel)(Params...), dim3 cluster, dim3 grid, dim3 block,
                                        size_t shared_bytes, cudaStream_t stream, Args&&... args) {
  // Code for an older GPU, compiled for this one by the driver, does not wait and knows no clusters.
  cudaFuncAttributes compiled;
  const cudaError_t error = cudaFuncGetAttributes(&compiled, kernel);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster.x, cluster.y, cluster.z};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = compiled.ptxVersion < 90 ? 0 : cluster.x == 0 ? 1 : 2;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

template <class... Params, class... Args>
cudaError_t launch_overlapping(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                               cudaStream_t stream, Args&&... args) {
  return launch_overlapping_clusters(kernel, 0, grid, block, shared_bytes, stream,
                                     std::forward<Args>(args)...);
}

}  // namespace fusedkv

// How long the L2 keeps what a copy brings: an argument of the copies that take one.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fusedkv {

// Dropped before anything else: for what is read once and not soon again.
__device__ __forceinline__ uint64_t stream_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// A fraction, above 0 and up to 1, of the lines is dropped after everything else, the rest before: for what
// is read again, and is more than the L2 holds.
__device__ __forceinline__ uint64_t keep_policy(float fraction) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_last.L2::evict_first.b64 %0, %1;" : "=l"(policy) : "f"(fraction));
  return policy;
}

}  // namespace fusedkv

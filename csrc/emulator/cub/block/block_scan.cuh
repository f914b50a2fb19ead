// In the place of CUB's: what attention_schedule uses of it.
#pragma once

#include "../../emulator.h"

namespace cub {

template <class T, int threads>
struct BlockScan {
  struct TempStorage {
    T values[threads];
  };
  TempStorage& storage;

  explicit BlockScan(TempStorage& s) : storage(s) {}

  void InclusiveSum(T value, T& sum, T& total) {
    storage.values[threadIdx.x] = value;
    __syncthreads();
    total = 0;
    for (int i = 0; i < threads; ++i) {
      total += storage.values[i];
      if (i == static_cast<int>(threadIdx.x)) sum = total;
    }
  }
};

}  // namespace cub

// Tensor maps of the copy engine: what the driver's cuTensorMapEncodeTiled makes opaque.
#pragma once

#include <cuda.h>

#include <cstring>

#include "emulator.h"

namespace emulator {

struct TensorMap {
  const char* data;
  int rank, element_bytes;
  uint64_t sizes[5], byte_strides[5];
  uint32_t box[5];

  uint32_t box_elements() const {
    uint32_t count = 1;
    for (int i = 0; i < rank; ++i) count *= box[i];
    return count;
  }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

inline TensorMap decode(const CUtensorMap& map) {
  TensorMap tensor;
  std::memcpy(&tensor, &map, sizeof(tensor));
  return tensor;
}

// With the checks that the driver makes, and for rows of whole 16 bytes only.
inline CUresult encode_tensor_map(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                  const cuuint64_t* sizes, const cuuint64_t* byte_strides,
                                  const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                                  CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                  CUtensorMapFloatOOBfill) {
  TensorMap tensor{static_cast<const char*>(data), static_cast<int>(rank), 2, {}, {2}, {}};
  bool valid = swizzle == CU_TENSOR_MAP_SWIZZLE_128B && sizes[0] % 8 == 0 &&
               reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (unsigned i = 0; i < rank; ++i) {
    tensor.sizes[i] = sizes[i], tensor.box[i] = box[i];
    if (i > 0) tensor.byte_strides[i] = byte_strides[i - 1];
    valid = valid && sizes[i] > 0 && box[i] > 0 && box[i] <= 256;
    if (i > 0) valid = valid && byte_strides[i - 1] % 16 == 0 && byte_strides[i - 1] < uint64_t{1} << 40;
  }
  if (!valid || box[0] * 2 > 128) return CUDA_ERROR_INVALID_VALUE;
  std::memcpy(map, &tensor, sizeof(tensor));
  return CUDA_SUCCESS;
}

}  // namespace emulator

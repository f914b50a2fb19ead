// What the host needs to launch kernels that copy boxes of tensors (TMA).
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "vec.cuh"

namespace fusedkv {

// cuTensorMapEncodeTiled of the driver, found at run time so that nothing links to libcuda; null where the
// driver lacks it.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &result);
    const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return found ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function) : nullptr;
  }();
  return encoder;
}

// A row-major matrix seen with `rank` dimensions, innermost first. strides: of all but the first, in
// elements. T: f16 or bf16.
template <class T, int rank>
cudaError_t encode_tensor_map(CUtensorMap& map, const void* data, const cuuint64_t (&sizes)[rank],
                              const cuuint64_t (&strides)[rank - 1], const cuuint32_t (&box)[rank]) {
  cuuint64_t byte_strides[rank - 1];
  cuuint32_t steps[rank];
  for (int i = 0; i < rank; ++i) steps[i] = 1;
  for (int i = 0; i < rank - 1; ++i) byte_strides[i] = strides[i] * sizeof(T);
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const CUresult result = encode(
      &map, std::is_same_v<T, f16> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank,
      const_cast<void*>(data), sizes, byte_strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace fusedkv

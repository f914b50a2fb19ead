// What the host asks of the current device.
#pragma once

#include <cuda_runtime_api.h>

namespace fusedkv {

inline cudaError_t device_attribute(int& value, cudaDeviceAttr attribute) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(&value, attribute, device);
}

inline cudaError_t count_sms(int& sms) { return device_attribute(sms, cudaDevAttrMultiProcessorCount); }

}  // namespace fusedkv

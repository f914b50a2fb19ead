#include "../rope_key_projection_hopper.cuh"

namespace fusedkv {

template cudaError_t launch_hopper<f16, 64>(const RopeKeyProjectionParams&, cudaStream_t);
template bool has_hopper_kernel<f16, 64>();
template cudaError_t launch_hopper_tile<f16, 64, 128>(const RopeKeyProjectionParams&, cudaStream_t);
template cudaError_t launch_hopper_tile<f16, 64, 256>(const RopeKeyProjectionParams&, cudaStream_t);

}  // namespace fusedkv

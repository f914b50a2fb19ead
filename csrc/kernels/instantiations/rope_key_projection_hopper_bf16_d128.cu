#include "../rope_key_projection_hopper.cuh"

namespace fusedkv {

template cudaError_t launch_hopper<bf16, 128>(const RopeKeyProjectionParams&, cudaStream_t);
template bool has_hopper_kernel<bf16, 128>();
template cudaError_t launch_hopper_tile<bf16, 128, 128>(const RopeKeyProjectionParams&, cudaStream_t);
template cudaError_t launch_hopper_tile<bf16, 128, 256>(const RopeKeyProjectionParams&, cudaStream_t);

}  // namespace fusedkv

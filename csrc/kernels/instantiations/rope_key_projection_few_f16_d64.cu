#include "../rope_key_projection_few.cuh"

namespace fusedkv {

template cudaError_t launch_few_tokens<f16, 64>(const RopeKeyProjectionParams&, cudaStream_t);

}  // namespace fusedkv

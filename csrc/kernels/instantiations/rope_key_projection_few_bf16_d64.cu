#include "../rope_key_projection_few.cuh"

namespace fusedkv {

template bool are_few_tokens<bf16, 64>(const RopeKeyProjectionParams&);
template cudaError_t launch_few_tokens<bf16, 64>(const RopeKeyProjectionParams&, cudaStream_t);

}  // namespace fusedkv

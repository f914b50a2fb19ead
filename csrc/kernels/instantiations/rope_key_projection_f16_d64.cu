#include "../rope_key_projection.cuh"

namespace fusedkv {

template cudaError_t launch_rope_key_projection<f16, 64>(const RopeKeyProjectionParams&, cudaStream_t);

}  // namespace fusedkv

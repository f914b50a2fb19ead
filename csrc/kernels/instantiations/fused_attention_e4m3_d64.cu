#include "../fused_attention.cuh"

namespace fusedkv {
template cudaError_t launch_attention<f16, e4m3, 64>(const FusedAttentionParams&, cudaStream_t);
}  // namespace fusedkv

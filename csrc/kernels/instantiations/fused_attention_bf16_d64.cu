#include "../fused_attention.cuh"

namespace fusedkv {
template cudaError_t launch_attention<bf16, bf16, 64>(const FusedAttentionParams&, cudaStream_t);
}  // namespace fusedkv

#include "../fused_attention.cuh"

namespace fusedkv {
template size_t attention_workspace_bytes<bf16, bf16, 64>(const FusedAttentionParams&);
template cudaError_t launch_attention<bf16, bf16, 64>(const FusedAttentionParams&, cudaStream_t);
}  // namespace fusedkv

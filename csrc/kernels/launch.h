// The kernel library's whole interface: one function an op, launching on the current device and the given
// stream. Arguments are trusted to match params.h; the ops/ files and the bench programs check them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "params.h"

namespace fusedkv {

cudaError_t run_write_kv(const WriteKvParams& params, cudaStream_t stream);
cudaError_t run_rope_write_kv(const RopeWriteKvParams& params, cudaStream_t stream);
cudaError_t run_rope_key_projection(const RopeKeyProjectionParams& params, cudaStream_t stream);
// Whether run_rope_key_projection would take an input norm with these.
bool takes_input_norm(const RopeKeyProjectionParams& params);

size_t rope_norm_backward_workspace_bytes(const RopeNormBackwardParams& params);
cudaError_t run_rope_norm_backward(const RopeNormBackwardParams& params, cudaStream_t stream);

cudaError_t run_fuse_kv(const FuseKvParams& params, cudaStream_t stream);
size_t fuse_kv_backward_workspace_bytes(const FuseKvBackwardParams& params);
cudaError_t run_fuse_kv_backward(const FuseKvBackwardParams& params, cudaStream_t stream);

cudaError_t run_swiglu(const SwigluParams& params, cudaStream_t stream);

cudaError_t run_decode_places(const DecodePlacesParams& params, cudaStream_t stream);
cudaError_t run_largest_token(const LargestTokenParams& params, cudaStream_t stream);
cudaError_t run_accept_tokens(const AcceptTokensParams& params, cudaStream_t stream);

// Kernels for few tokens (any number is right) that only Hopper has; elsewhere they are the library's work.
bool has_few_token_kernels();
cudaError_t run_linear_add(const LinearAddParams& params, cudaStream_t stream);
cudaError_t run_swiglu_linear(const SwigluLinearParams& params, cudaStream_t stream);

cudaError_t run_attention_schedule(const AttentionScheduleParams& params, cudaStream_t stream);
cudaError_t run_fused_attention(const FusedAttentionParams& params, cudaStream_t stream);

}  // namespace fusedkv

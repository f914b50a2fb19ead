#include "../accept_tokens.cuh"

namespace fusedkv {

cudaError_t run_accept_tokens(const AcceptTokensParams& params, cudaStream_t stream) {
  return launch_accept_tokens(params, stream);
}

}  // namespace fusedkv

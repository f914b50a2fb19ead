#include "../write_kv.cuh"

namespace fusedkv {

cudaError_t run_write_kv(const WriteKvParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.num_kv_heads == 0) return cudaSuccess;
  if (params.head_dim <= 0 || params.head_dim % 8 != 0) return cudaErrorInvalidValue;
  return dispatch_half_and_cache(params.dtype, params.cache_dtype, [&](auto t, auto c) {
    return launch_write_kv<typename decltype(t)::type, typename decltype(c)::type>(params, stream);
  });
}

}  // namespace fusedkv

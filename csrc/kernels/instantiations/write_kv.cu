#include "../write_kv.cuh"

namespace fusedkv {

cudaError_t run_write_kv(const WriteKvParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.num_kv_heads == 0) return cudaSuccess;
  if (params.head_dim <= 0 || params.head_dim % 8 != 0) return cudaErrorInvalidValue;
  if (params.cache_dtype != params.dtype && params.cache_dtype != DType::kE4M3) return cudaErrorInvalidValue;
  const bool moves_only = params.cache_dtype == params.dtype && params.k_copy.data == nullptr &&
                          params.k_scale == nullptr && params.v_scale == nullptr;
  return dispatch_half(params.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return moves_only ? launch_write_kv<T, true>(params, stream) : launch_write_kv<T, false>(params, stream);
  });
}

}  // namespace fusedkv

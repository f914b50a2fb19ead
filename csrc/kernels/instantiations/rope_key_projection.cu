#include "../common/device.h"
#include "../dispatch.h"
#include "../launch.h"

namespace fusedkv {

template <class T, int D>
cudaError_t launch_few_tokens(const RopeKeyProjectionParams& params, cudaStream_t stream);
template <class T, int D>
bool has_hopper_kernel();
template <class T, int D>
cudaError_t launch_hopper(const RopeKeyProjectionParams& params, cudaStream_t stream);
template <class T, int D>
cudaError_t launch_rope_key_projection(const RopeKeyProjectionParams& params, cudaStream_t stream);

namespace {
// Up to 64 tokens, and more where columns are so few that the tiles of the kernel for many tokens would leave
// most SMs idle: with at most three quarters of them busy, tiles of 64 tokens and 128 columns take less time.
bool are_few_tokens(const RopeKeyProjectionParams& p) {
  int sms = 0;
  if (p.num_tokens <= 64 || count_sms(sms) != cudaSuccess) return true;
  const int64_t cols = int64_t{p.heads.num_q_heads + 2 * p.heads.num_kv_heads} * p.heads.head_dim;
  return 4 * ((p.num_tokens + 63) / 64) * ((cols + 127) / 128) <= 3 * sms;
}
}  // namespace

bool takes_input_norm(const RopeKeyProjectionParams& params) {
  return params.dtype == DType::kBF16 && are_few_tokens(params) && has_few_token_kernels();
}

cudaError_t run_rope_key_projection(const RopeKeyProjectionParams& params, cudaStream_t stream) {
  if (params.input_norm != nullptr && !takes_input_norm(params)) return cudaErrorInvalidValue;
  return dispatch_half(params.dtype, [&](auto t) {
    return dispatch_head_dim(params.heads.head_dim, [&](auto d) {
      using T = typename decltype(t)::type;
      constexpr int D = decltype(d)::value;
      if (has_hopper_kernel<T, D>()) {
        return are_few_tokens(params) ? launch_few_tokens<T, D>(params, stream)
                                      : launch_hopper<T, D>(params, stream);
      }
      return launch_rope_key_projection<T, D>(params, stream);
    });
  });
}

}  // namespace fusedkv

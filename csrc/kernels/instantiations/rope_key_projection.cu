#include "../dispatch.h"
#include "../launch.h"

namespace fusedkv {

template <class T, int D>
bool are_few_tokens(const RopeKeyProjectionParams& params);
template <class T, int D>
cudaError_t launch_few_tokens(const RopeKeyProjectionParams& params, cudaStream_t stream);
template <class T, int D>
bool has_hopper_kernel();
template <class T, int D>
cudaError_t launch_hopper(const RopeKeyProjectionParams& params, cudaStream_t stream);
template <class T, int D>
cudaError_t launch_rope_key_projection(const RopeKeyProjectionParams& params, cudaStream_t stream);

cudaError_t run_rope_key_projection(const RopeKeyProjectionParams& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto t) {
    return dispatch_head_dim(params.heads.head_dim, [&](auto d) {
      using T = typename decltype(t)::type;
      constexpr int D = decltype(d)::value;
      if (has_hopper_kernel<T, D>()) {
        return are_few_tokens<T, D>(params) ? launch_few_tokens<T, D>(params, stream)
                                            : launch_hopper<T, D>(params, stream);
      }
      return launch_rope_key_projection<T, D>(params, stream);
    });
  });
}

}  // namespace fusedkv

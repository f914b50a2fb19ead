#include "../dispatch.h"
#include "../launch.h"

namespace fusedkv {

template <class T, int D>
cudaError_t launch_rope_key_projection(const RopeKeyProjectionParams& params, cudaStream_t stream);

cudaError_t run_rope_key_projection(const RopeKeyProjectionParams& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto t) {
    return dispatch_head_dim(params.heads.head_dim, [&](auto d) {
      return launch_rope_key_projection<typename decltype(t)::type, decltype(d)::value>(params, stream);
    });
  });
}

}  // namespace fusedkv

#include "../dispatch.h"
#include "../rope_write_kv.cuh"

namespace fusedkv {

cudaError_t run_rope_write_kv(const RopeWriteKvParams& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto t) {
    return dispatch_head_dim(params.heads.head_dim, [&](auto d) {
      return launch_rope_write_kv<typename decltype(t)::type, decltype(d)::value>(params, stream);
    });
  });
}

}  // namespace fusedkv

#include "../dispatch.h"
#include "../linear_few.cuh"

namespace fusedkv {

template <class T, int D>
bool has_hopper_kernel();

bool has_few_token_kernels() { return has_hopper_kernel<bf16, 128>(); }

cudaError_t run_linear_add(const LinearAddParams& params, cudaStream_t stream) {
  return dispatch_half(params.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return launch_few_product<T, FewAdd<T>>(params, params.size, rows_in_order(params.size), stream);
  });
}

cudaError_t run_swiglu_linear(const SwigluLinearParams& params, cudaStream_t stream) {
  // Half 0 of the accumulators has gates, half 1 ups, 16 of each a group.
  const FewRowOrder order{2, params.size, 16, params.size / 16};
  return dispatch_half(params.dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    return launch_few_product<T, FewSwiglu<T>>(params, 2 * params.size, order, stream);
  });
}

}  // namespace fusedkv

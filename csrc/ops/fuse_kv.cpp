#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/launch.h"
#include "ops/checks.h"
#include "ops/ops.h"

namespace fusedkv::ops {
namespace {

// Inputs of one side in the layout of the kernels; holds the copies that this took.
struct Side {
  std::vector<Rows> sources;
  at::Tensor weights;
};

Side side_inputs(at::TensorList sources, const at::Tensor& weights) {
  Side side;
  for (const at::Tensor& source : sources) side.sources.push_back(as_rows(source));
  side.weights = aligned_or_copy(weights.contiguous());
  return side;
}

// Fills what the forward and the backward parameters of a side share.
template <class Params>
void fill_inputs(const Side& side, Params& params) {
  params.num_sources = static_cast<int>(side.sources.size());
  for (size_t s = 0; s < side.sources.size(); ++s) {
    params.sources[s] = side.sources[s].tensor.const_data_ptr();
    params.row_strides[s] = side.sources[s].stride;
  }
  params.weights = side.weights.const_data_ptr<float>();
}

template <class Params>
void fill_sizes(const at::Tensor& x, Params& params) {
  params.dtype = kernel_dtype(x);
  params.num_kv_heads = static_cast<int>(x.size(-2));
  params.head_dim = static_cast<int>(x.size(-1));
  params.rows = 1;
  for (int64_t i = 0; i + 2 < x.dim(); ++i) params.rows *= x.size(i);
}

void check_side(const Checker& check, bool keys, at::TensorList sources, const at::Tensor& weights,
                const at::Tensor& like) {
  const char* name = keys ? "k_sources" : "v_sources";
  FUSEDKV_EXPECT(check.op, !sources.empty() && sources.size() <= kMaxSources, name, "1 to 8 tensors",
                 sources.size());
  const int64_t heads = like.size(-2), d = like.size(-1);
  for (size_t i = 0; i < sources.size(); ++i) {
    const Argument argument(name, static_cast<int64_t>(i));
    check.tensor(argument, sources[i], like.scalar_type(), like.sizes());
    const bool packed = sources[i].numel() == 0 || heads == 1 || sources[i].stride(-2) == d;
    FUSEDKV_EXPECT(check.op, packed, argument, "heads packed without gaps",
                   c10::str("strides ", sources[i].strides()));
  }
  const int64_t count = static_cast<int64_t>(sources.size());
  check.tensor(keys ? "key_weights" : "value_weights", weights, kFloat, {count, heads, d});
}

void check_inputs(const Checker& check, at::TensorList k_sources, at::TensorList v_sources,
                  const at::Tensor& key_weights, const at::Tensor& value_weights) {
  const at::Tensor& like = k_sources[0];
  const bool half = like.scalar_type() == at::kHalf || like.scalar_type() == at::kBFloat16;
  FUSEDKV_EXPECT(check.op, half, "k_sources[0]", "dtype " + dtype_names(kHalf),
                 dtype_name(like.scalar_type()));
  FUSEDKV_EXPECT(check.op, like.dim() >= 2, "k_sources[0]", "at least 2 dimensions", like.dim());
  const int64_t d = like.size(-1);
  FUSEDKV_EXPECT(check.op, d > 0 && d % 8 == 0, "k_sources[0]", "a head dim that is a multiple of 8 on CUDA",
                 d);
  check.channels(like.size(-2), d);
  check_side(check, true, k_sources, key_weights, like);
  check_side(check, false, v_sources, value_weights, like);
}

const at::Tensor& first_source(const char* op, at::TensorList k_sources) {
  FUSEDKV_EXPECT(op, !k_sources.empty(), "k_sources", "1 to 8 tensors", 0);
  return k_sources[0];
}

at::Tensor empty_like_source(const at::Tensor& x) { return at::empty(x.sizes(), x.options()); }

}  // namespace

std::tuple<at::Tensor, at::Tensor> fuse_kv(at::TensorList k_sources, at::TensorList v_sources,
                                           const at::Tensor& key_weights, const at::Tensor& value_weights) {
  const at::Tensor& like = first_source("fuse_kv", k_sources);
  const Checker check("fuse_kv", like);
  check_inputs(check, k_sources, v_sources, key_weights, value_weights);

  const c10::cuda::CUDAGuard guard(like.device());
  const Side keys = side_inputs(k_sources, key_weights), values = side_inputs(v_sources, value_weights);
  at::Tensor k = empty_like_source(like), v = empty_like_source(like);
  FuseKvParams params{};
  fill_sizes(like, params);
  fill_inputs(keys, params.k);
  fill_inputs(values, params.v);
  params.k.out = k.mutable_data_ptr();
  params.v.out = v.mutable_data_ptr();
  check_launch(check.op, run_fuse_kv(params, c10::cuda::getCurrentCUDAStream()));
  return {k, v};
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor, at::Tensor> fuse_kv_backward(
    const at::Tensor& grad_k, const at::Tensor& grad_v, at::TensorList k_sources, at::TensorList v_sources,
    const at::Tensor& key_weights, const at::Tensor& value_weights) {
  const at::Tensor& like = first_source("fuse_kv_backward", k_sources);
  const Checker check("fuse_kv_backward", like);
  check_inputs(check, k_sources, v_sources, key_weights, value_weights);
  check.tensor("grad_k", grad_k, like.scalar_type(), like.sizes());
  check.tensor("grad_v", grad_v, like.scalar_type(), like.sizes());

  const c10::cuda::CUDAGuard guard(like.device());
  const Side keys = side_inputs(k_sources, key_weights), values = side_inputs(v_sources, value_weights);
  const Rows grad_k_rows = as_rows(grad_k), grad_v_rows = as_rows(grad_v);
  FuseKvBackwardParams params{};
  fill_sizes(like, params);
  fill_inputs(keys, params.k);
  fill_inputs(values, params.v);
  const auto fill_grads = [&](const Rows& grad, FuseBackwardSide& side, std::vector<at::Tensor>& grad_sources,
                              at::Tensor& grad_weights) {
    side.grad_out = grad.tensor.const_data_ptr();
    side.grad_out_row_stride = grad.stride;
    for (int s = 0; s < side.num_sources; ++s) {
      grad_sources.push_back(empty_like_source(like));
      side.grad_sources[s] = grad_sources.back().mutable_data_ptr();
    }
    grad_weights = at::empty({side.num_sources, like.size(-2), like.size(-1)}, key_weights.options());
    side.grad_weights = grad_weights.mutable_data_ptr<float>();
  };
  std::vector<at::Tensor> grad_ks, grad_vs;
  at::Tensor grad_key_weights, grad_value_weights;
  fill_grads(grad_k_rows, params.k, grad_ks, grad_key_weights);
  fill_grads(grad_v_rows, params.v, grad_vs, grad_value_weights);
  const auto bytes = static_cast<int64_t>(fuse_kv_backward_workspace_bytes(params));
  const at::Tensor workspace = at::empty({bytes}, like.options().dtype(at::kByte));
  params.workspace = workspace.mutable_data_ptr();
  check_launch(check.op, run_fuse_kv_backward(params, c10::cuda::getCurrentCUDAStream()));
  return {grad_ks, grad_vs, grad_key_weights, grad_value_weights};
}

}  // namespace fusedkv::ops

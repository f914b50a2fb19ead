// The CUDA implementation of every op; fusedkv_ext/library.py has the schemas.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace fusedkv::ops {

using OptionalTensor = std::optional<at::Tensor>;

void write_kv(const at::Tensor& k, const at::Tensor& v, const at::Tensor& k_cache, const at::Tensor& v_cache,
              const at::Tensor& slot_mapping, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
              const OptionalTensor& k_copy, const OptionalTensor& v_copy);

void rope_write_kv(const at::Tensor& qkv, const OptionalTensor& q_out, const OptionalTensor& k_cache,
                   const OptionalTensor& v_cache, const at::Tensor& positions, const at::Tensor& cos_sin,
                   const OptionalTensor& q_norm, const OptionalTensor& k_norm, double eps, bool interleaved,
                   const OptionalTensor& slot_mapping, const OptionalTensor& k_scale,
                   const OptionalTensor& v_scale, const OptionalTensor& k_copy, const OptionalTensor& v_copy);

at::Tensor rope_key_projection(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& positions,
                               const at::Tensor& cos_sin, const OptionalTensor& norm, double eps,
                               const OptionalTensor& bias, bool interleaved);

void rope_key_projection_write(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& q_out,
                               const OptionalTensor& k_cache, const OptionalTensor& v_cache,
                               const at::Tensor& positions, const at::Tensor& cos_sin,
                               const OptionalTensor& slot_mapping, const OptionalTensor& q_norm,
                               const OptionalTensor& k_norm, double eps, const OptionalTensor& bias,
                               bool interleaved, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                               const OptionalTensor& k_copy, const OptionalTensor& v_copy,
                               const OptionalTensor& input_norm, bool early_weight);

std::tuple<at::Tensor, at::Tensor> rope_norm_backward(const at::Tensor& grad, const OptionalTensor& heads,
                                                      const at::Tensor& positions, const at::Tensor& cos_sin,
                                                      const OptionalTensor& norm, double eps,
                                                      bool interleaved);

std::tuple<at::Tensor, at::Tensor> fuse_kv(at::TensorList k_sources, at::TensorList v_sources,
                                           const at::Tensor& key_weights, const at::Tensor& value_weights);

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, at::Tensor, at::Tensor> fuse_kv_backward(
    const at::Tensor& grad_k, const at::Tensor& grad_v, at::TensorList k_sources, at::TensorList v_sources,
    const at::Tensor& key_weights, const at::Tensor& value_weights);

at::Tensor swiglu(const at::Tensor& gate_up);

void linear_add(const at::Tensor& out, const at::Tensor& x, const at::Tensor& weight, bool early_weight);

at::Tensor swiglu_linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& input_norm,
                         double eps, bool early_weight);

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> decode_places(
    const at::Tensor& seq_lens, const at::Tensor& block_table, const at::Tensor& rows,
    const OptionalTensor& active, int64_t page_size);

at::Tensor largest_token(const at::Tensor& logits);

void accept_tokens(const at::Tensor& chosen, const at::Tensor& stop_tokens, const at::Tensor& active,
                   const at::Tensor& tokens, const at::Tensor& emitted, const at::Tensor& count,
                   const OptionalTensor& seq_lens, const OptionalTensor& rows, const OptionalTensor& lengths);

at::Tensor attention_schedule(const at::Tensor& seq_lens, int64_t max_seq_len, int64_t num_query_tokens,
                              int64_t num_query_heads, int64_t num_kv_heads, int64_t window);

at::Tensor fused_attention(const at::Tensor& q, at::TensorList k_sources, at::TensorList v_sources,
                           const OptionalTensor& key_weights, const OptionalTensor& value_weights,
                           const at::Tensor& block_table, const at::Tensor& seq_lens,
                           const at::Tensor& schedule, double scale, int64_t window, bool early_cache,
                           bool keep_sources);

}  // namespace fusedkv::ops

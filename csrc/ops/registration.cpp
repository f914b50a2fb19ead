// Every op with a CUDA implementation. The schemas are in fusedkv_ext/library.py; torch compares them with
// these signatures when the extension is loaded.
#include <torch/library.h>

#include "ops/ops.h"

TORCH_LIBRARY_IMPL(fusedkv, CUDA, m) {
  m.impl("write_kv", &fusedkv::ops::write_kv);
  m.impl("rope_write_kv", &fusedkv::ops::rope_write_kv);
  m.impl("rope_key_projection", &fusedkv::ops::rope_key_projection);
  m.impl("rope_key_projection_write", &fusedkv::ops::rope_key_projection_write);
  m.impl("rope_norm_backward", &fusedkv::ops::rope_norm_backward);
  m.impl("fuse_kv", &fusedkv::ops::fuse_kv);
  m.impl("fuse_kv_backward", &fusedkv::ops::fuse_kv_backward);
  m.impl("swiglu", &fusedkv::ops::swiglu);
  m.impl("linear_add", &fusedkv::ops::linear_add);
  m.impl("swiglu_linear", &fusedkv::ops::swiglu_linear);
  m.impl("decode_places", &fusedkv::ops::decode_places);
  m.impl("largest_token", &fusedkv::ops::largest_token);
  m.impl("accept_tokens", &fusedkv::ops::accept_tokens);
  m.impl("attention_schedule", &fusedkv::ops::attention_schedule);
  m.impl("fused_attention", &fusedkv::ops::fused_attention);
}

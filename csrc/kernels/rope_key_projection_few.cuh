// rope_key_projection for few tokens on Hopper: what finishes a product of few_tokens.cuh into heads.
#pragma once

#include "few_tokens.cuh"

namespace fusedkv {

template <class T, int head_dim>
struct FewHeads {
  using Params = RopeKeyProjectionParams;
  static constexpr int D = head_dim;
  static constexpr bool kTakesNorm = true;

  const Params& p;
  const int first_column, index;  // index: of the head, maybe beyond the last
  const bool exists;
  const HeadId head;
  HeadNorm<T, D> norm;
  HeadPart<D> bias;
  HeadAngles<D> angles;
  HeadStore<T, D> store;

  __device__ __forceinline__ FewHeads(const Params& p, int64_t token, int row_tile, int item, int lane)
      : p(p),
        first_column(item * D + lane * 8),
        index(row_tile * (kFewRows / D) + item),
        exists(index < num_heads(p)),
        head(p.heads, min(index, num_heads(p) - 1)),
        norm(p.heads, head.kind, lane),
        bias{},
        store(load(token, lane)) {}

  __device__ __forceinline__ int column(int i) const { return first_column + i / 2 * (D / 2) + i % 2 * 4; }

  __device__ __forceinline__ void finish(HeadPart<D>& sum, bool present) {
#pragma unroll
    for (int i = 0; i < 16; ++i) sum[i] += bias[i];
    const float scale = norm_scale(p.heads, sum, norm);
    if (present && exists) finish_head(p.heads, sum, head.kind, scale, norm, angles, store);
  }

 private:
  __device__ __forceinline__ static int num_heads(const Params& p) {
    return p.heads.num_q_heads + 2 * p.heads.num_kv_heads;
  }

  __device__ __forceinline__ HeadStore<T, D> load(int64_t token, int lane) {
    const int64_t position = raw_position(p.heads, token);
    const int64_t slot = head.kind == HeadKind::kQuery ? -1 : p.heads.slot_mapping[token];
    if (p.bias != nullptr) {
      bias = HeadPart<D>::load(static_cast<const T*>(p.bias) + min(index, num_heads(p) - 1) * D, lane);
    }
    const bool known = index_is_inside(position, p.heads.max_positions);
    angles = HeadAngles<D>(p.heads, head.kind, known ? position : -1, lane);
    const HeadStore<T, D> store(p.heads, head, token, known ? slot : -1, lane);
    if (store.scale != nullptr) prefetch_l2(store.scale), prefetch_l2(store.scale + D / 2);
    return store;
  }
};

// Where has_hopper_kernel(), for any number of tokens.
template <class T, int D>
cudaError_t launch_few_tokens(const RopeKeyProjectionParams& p, cudaStream_t stream) {
  const int rows = (p.heads.num_q_heads + 2 * p.heads.num_kv_heads) * D;
  return launch_few_product<T, FewHeads<T, D>>(p, rows, rows_in_order(rows), stream);
}

}  // namespace fusedkv

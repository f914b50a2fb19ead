// rope_norm_backward: the gradient through RMSNorm and RoPE of projected heads, in one pass over memory.
//
// A lane group (see common/rope.cuh) keeps its channels over all heads that it visits, so the gradient of the
// norm's weights adds up in registers. Each CTA leaves its sums in the workspace and a second, small kernel
// adds those up in their order: no atomics, so that every run gives the same bits.
#pragma once

#include "common/reduce.cuh"
#include "common/rope.cuh"
#include "launch.h"

namespace fusedkv {

constexpr int kRopeBackwardThreads = 256;
constexpr int kMaxRopeBackwardBlocks = 1024;  // several on every SM of a large GPU

// The lane groups of a CTA stand side by side: `heads` heads of each of `tokens` tokens.
struct RopeBackwardSplit {
  int heads, tokens;
  int64_t blocks;
};

template <int D>
RopeBackwardSplit split_rope_backward(const RopeNormBackwardParams& p) {
  constexpr int kGroups = kRopeBackwardThreads / HeadPart<D>::kLanes;
  if (p.num_tokens == 0 || p.heads.num_q_heads == 0) return {1, 1, 0};
  const int heads = p.heads.num_q_heads < kGroups ? p.heads.num_q_heads : kGroups, tokens = kGroups / heads;
  const int64_t blocks = (p.num_tokens + tokens - 1) / tokens;
  return {heads, tokens, blocks < kMaxRopeBackwardBlocks ? blocks : kMaxRopeBackwardBlocks};
}

// The inverse of the rotation, times the square of the table's magnitude: its transpose.
template <int D>
__device__ __forceinline__ void rotate_back(HeadPart<D>& head, const HeadAngles<D>& angles,
                                            bool interleaved) {
  for_each_pair(interleaved, [&](int i, int a, int b) {
    const float x = head[a], y = head[b], cos = angles.cos.x[i], sin = angles.sin.x[i];
    head[a] = x * cos + y * sin;
    head[b] = y * cos - x * sin;
  });
}

// The workspace is float32 [blocks, D].
template <class T, int D>
__global__ void __launch_bounds__(kRopeBackwardThreads, 2)
    rope_norm_backward_kernel(const __grid_constant__ RopeNormBackwardParams p, RopeBackwardSplit split) {
  __shared__ alignas(16) float shared[kRopeBackwardThreads * 8];
  const int lane = threadIdx.x, num_heads = p.heads.num_q_heads;
  const int token_in_block = threadIdx.y / split.heads, first_head = threadIdx.y % split.heads;
  const HeadNorm<T, D> norm(p.heads, HeadKind::kQuery, lane);
  HeadPart<D> sums{};
  const int64_t step = int64_t{gridDim.x} * split.tokens;
  for (int64_t token0 = int64_t{blockIdx.x} * split.tokens; token0 < p.num_tokens; token0 += step) {
    const int64_t token = token0 + token_in_block;
    const bool has_token = token_in_block < split.tokens && token < p.num_tokens;
    const HeadAngles<D> angles(p.heads, HeadKind::kQuery, has_token ? load_position(p.heads, token) : -1,
                               lane);
    // All lanes of a warp take part in its sums, so every group makes as many rounds.
    for (int head0 = 0; head0 < num_heads; head0 += split.heads) {
      const int head = head0 + first_head;
      const bool present = has_token && head < num_heads;
      HeadPart<D> grad{}, unit{};
      if (present) {
        grad =
            HeadPart<D>::load(static_cast<const T*>(p.grad) + token * p.grad_token_stride + head * D, lane);
        if (norm.is_given) {
          const T* row = static_cast<const T*>(p.projected) + token * p.projected_token_stride;
          unit = HeadPart<D>::load(row + head * D, lane);
        }
        rotate_back(grad, angles, p.heads.interleaved);
      }
      if (norm.is_given) {
        const float inverse = rsqrtf(mean_of_squares(unit) + p.heads.eps);
        const HeadPart<D> weight = norm.weights.unpack();
        float products = 0.f;
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          unit[i] *= inverse;
          if (present) sums[i] += grad[i] * unit[i];
          grad[i] *= weight.half[i / 8].x[i % 8];
          products += grad[i] * unit[i];
        }
#pragma unroll
        for (int lanes = HeadPart<D>::kLanes / 2; lanes > 0; lanes /= 2) {
          products += __shfl_xor_sync(~0u, products, lanes);
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) grad[i] = inverse * (grad[i] - unit[i] * (products / D));
      }
      if (present) {
        grad.store(static_cast<T*>(p.heads.q_out) + (token * num_heads + head) * D + 8 * lane);
      }
    }
  }
  if (!norm.is_given) return;
  float* const partials = static_cast<float*>(p.workspace) + int64_t{blockIdx.x} * D;
  sum_over_block_rows(sums.half[0], shared, partials, D / 2);
  sum_over_block_rows(sums.half[1], shared, partials + D / 2, D / 2);
}

constexpr int kNormSumWidth = 32, kNormSumHeight = 16;

static __global__ void __launch_bounds__(kNormSumWidth* kNormSumHeight)
    rope_norm_sum_kernel(const float* partials, float* grad_norm, int64_t blocks) {
  const int channel = blockIdx.x * kNormSumWidth + threadIdx.x, channels = gridDim.x * kNormSumWidth;
  const float sum = sum_partials<kNormSumWidth, kNormSumHeight>(partials + channel, blocks, channels);
  if (threadIdx.y == 0) grad_norm[channel] = sum;
}

template <class T, int D>
cudaError_t launch_rope_norm_backward(const RopeNormBackwardParams& p, cudaStream_t stream) {
  constexpr int kLanes = HeadPart<D>::kLanes;
  const RopeBackwardSplit split = split_rope_backward<D>(p);
  if (split.blocks > 0) {
    const dim3 threads(kLanes, kRopeBackwardThreads / kLanes);
    rope_norm_backward_kernel<T, D><<<static_cast<unsigned>(split.blocks), threads, 0, stream>>>(p, split);
  }
  if (p.heads.q_norm != nullptr) {
    rope_norm_sum_kernel<<<D / kNormSumWidth, dim3(kNormSumWidth, kNormSumHeight), 0, stream>>>(
        static_cast<const float*>(p.workspace), p.grad_norm, split.blocks);
  }
  return cudaGetLastError();
}

}  // namespace fusedkv

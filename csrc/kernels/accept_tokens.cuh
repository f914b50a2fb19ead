// accept_tokens: what a decode step leaves to the next one: its tokens, which sequences go on, and lengths.
//
// One CTA, because all of it waits for the one count of steps.
#pragma once

#include "common/overlap.cuh"
#include "common/vec.cuh"
#include "launch.h"

namespace fusedkv {

constexpr int kAcceptThreads = 256;

__global__ void __launch_bounds__(kAcceptThreads)
    accept_tokens_kernel(const __grid_constant__ AcceptTokensParams p) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t step = *p.count;
  const bool emits = index_is_inside(step, p.steps);
  for (int64_t i = threadIdx.x; i < p.batch; i += kAcceptThreads) {
    const int64_t chosen = p.chosen[i];
    bool active = p.active[i];
    for (int64_t stop = 0; stop < p.num_stop_tokens; ++stop) active &= chosen != p.stop_tokens[stop];
    p.active[i] = active;
    if (active) p.tokens[i] = chosen;
    if (emits) p.emitted[step * p.batch + i] = active ? chosen : kDone;
    if (p.seq_lens != nullptr && index_is_inside(p.rows[i], p.num_rows)) p.seq_lens[p.rows[i]] = p.lengths[i];
  }
  __syncthreads();  // all have read the count
  if (threadIdx.x == 0) *p.count = step + 1;
}

inline cudaError_t launch_accept_tokens(const AcceptTokensParams& p, cudaStream_t stream) {
  return launch_overlapping(accept_tokens_kernel, dim3(1), dim3(kAcceptThreads), 0, stream, p);
}

}  // namespace fusedkv

// linear_add and swiglu_linear: the other products of a decode step, with what a layer does next.
#pragma once

#include "few_tokens.cuh"

namespace fusedkv {

// out += product, rounded once.
template <class T>
struct FewAdd {
  using Params = LinearAddParams;
  static constexpr int D = kFewRows;
  static constexpr bool kTakesNorm = false;

  const int first_column;
  bool inside[2];  // the halves of the lane's 16 columns
  T* out;
  uint4 before[2];

  __device__ __forceinline__ FewAdd(const Params& p, int64_t token, int row_tile, int, int lane)
      : first_column(lane * 8) {
    const int first = row_tile * D + first_column;
    out = static_cast<T*>(p.out) + token * p.out_stride + first;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      inside[i] = first + i * D / 2 < p.size;
      before[i] = inside[i] ? *reinterpret_cast<const uint4*>(out + i * D / 2) : uint4{};
    }
  }

  __device__ __forceinline__ int column(int i) const { return first_column + i / 2 * (D / 2) + i % 2 * 4; }

  __device__ __forceinline__ void finish(HeadPart<D>& sum, bool present) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Vec8 total = Vec8::unpack<T>(before[i]);
#pragma unroll
      for (int c = 0; c < 8; ++c) total.x[c] += sum.half[i].x[c];
      if (present && inside[i]) total.store(out + i * D / 2);
    }
  }
};

// out = silu(gate) * up. A tile has 64 columns of out, their gates in one half of the accumulators and their
// ups in the other, so that both are among a lane's sums.
template <class T>
struct FewSwiglu {
  using Params = SwigluLinearParams;
  static constexpr int D = kFewRows;
  static constexpr bool kTakesNorm = true;

  const int lane;
  const bool inside;
  T* const out;

  __device__ __forceinline__ FewSwiglu(const Params& p, int64_t token, int row_tile, int, int lane)
      : lane(lane),
        inside(row_tile * (D / 2) + lane * 8 < p.size),
        out(static_cast<T*>(p.out) + token * p.size + row_tile * (D / 2) + lane * 8) {}

  // Two gates and then their ups, four times.
  __device__ __forceinline__ int column(int i) const { return 16 * lane + 4 * i; }

  __device__ __forceinline__ void finish(HeadPart<D>& sum, bool present) {
    Vec8 gate, up;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      gate.x[i] = sum[i / 2 * 4 + i % 2], up.x[i] = sum[i / 2 * 4 + 2 + i % 2];
    }
    if (present && inside) gated(gate, up).store(out);
  }
};

}  // namespace fusedkv

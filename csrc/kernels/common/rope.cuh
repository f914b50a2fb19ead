// What q, k and v heads go through after their projection: RMSNorm, RoPE, and the store to q_out or to a
// cache slot. rope_write_kv and rope_key_projection share it.
#pragma once

#include <cmath>
#include <cstdint>

#include "../params.h"
#include "vec.cuh"

namespace fusedkv {

// D / 16 neighbouring lanes of a warp, a lane group, share a head. Lane l holds channels 8l .. 8l+7 of its
// first half and the same of its second: rotate-half pairs meet in one lane, interleaved pairs do too, and
// every access of the group is contiguous.
template <int D>
struct HeadPart {
  static constexpr int kLanes = D / 16;
  Vec8 half[2];

  __device__ __forceinline__ float& operator[](int i) { return half[i / 8].x[i % 8]; }

  template <class C>
  __device__ __forceinline__ static HeadPart load(const C* head, int lane) {
    return {{Vec8::load(head + 8 * lane), Vec8::load(head + D / 2 + 8 * lane)}};
  }

  // at: this lane's channels.
  template <class C>
  __device__ __forceinline__ void store(C* at) const {
    half[0].store(at);
    half[1].store(at + D / 2);
  }
};

// The same as it lies in memory: half the registers while it waits.
template <class T, int D>
struct RawPart {
  uint4 half[2];

  __device__ __forceinline__ static RawPart load(const T* head, int lane) {
    const auto* chunks = reinterpret_cast<const uint4*>(head);
    return {{chunks[lane], chunks[D / 16 + lane]}};
  }
  __device__ __forceinline__ void store(T* at) const {
    *reinterpret_cast<uint4*>(at) = half[0];
    *reinterpret_cast<uint4*>(at + D / 2) = half[1];
  }
  __device__ __forceinline__ HeadPart<D> unpack() const {
    return {{Vec8::unpack<T>(half[0]), Vec8::unpack<T>(half[1])}};
  }
};

enum class HeadKind { kQuery, kKey, kValue };

// A head among those of a projection, which come in the order q, k, v. The index counts inside the kind.
struct HeadId {
  HeadKind kind;
  int index;

  __device__ __forceinline__ HeadId(const HeadOutputs& p, int head) {
    const int kv = head - p.num_q_heads;
    kind = kv < 0 ? HeadKind::kQuery : kv < p.num_kv_heads ? HeadKind::kKey : HeadKind::kValue;
    index = kv < 0 ? head : kv < p.num_kv_heads ? kv : kv - p.num_kv_heads;
  }
};

// The position of a token as it is given: nothing has waited for it, nothing has checked it.
__device__ __forceinline__ int64_t raw_position(const HeadOutputs& p, int64_t token) {
  return p.positions_are_int64 ? static_cast<const int64_t*>(p.positions)[token]
                               : static_cast<const int*>(p.positions)[token];
}

// The position of a token, or -1 when it lies outside the cos/sin table.
__device__ __forceinline__ int64_t load_position(const HeadOutputs& p, int64_t token) {
  const int64_t position = raw_position(p, token);
  return index_is_inside(position, p.max_positions) ? position : -1;
}

// The norm's weights for the heads of one kind.
template <class T, int D>
struct HeadNorm {
  bool is_given;
  RawPart<T, D> weights;

  HeadNorm() = default;
  __device__ __forceinline__ HeadNorm(const HeadOutputs& p, HeadKind kind, int lane) {
    const void* norm = kind == HeadKind::kQuery ? p.q_norm : p.k_norm;
    is_given = norm != nullptr && kind != HeadKind::kValue;
    if (is_given) weights = RawPart<T, D>::load(static_cast<const T*>(norm), lane);
  }
};

// Over this lane's channels.
template <int D>
__device__ __forceinline__ float sum_of_squares(HeadPart<D>& head) {
  float even = 0.f, odd = 0.f;
#pragma unroll
  for (int i = 0; i < 16; i += 2) even += head[i] * head[i], odd += head[i + 1] * head[i + 1];
  return even + odd;
}

// Over `lanes` neighbouring lanes; each of them gets it.
template <int lanes>
__device__ __forceinline__ float sum_over_lanes(float sum) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  return sum;
}

// Over the channels of a head. Every lane of the warp must call this, except for those that have exited.
template <int D>
__device__ __forceinline__ float mean_of_squares(HeadPart<D>& head) {
  return sum_over_lanes<HeadPart<D>::kLanes>(sum_of_squares(head)) / D;
}

// Calls f(i, a, b) for the lane's pairs i of channels a and b.
template <class F>
__device__ __forceinline__ void for_each_pair(bool interleaved, F&& f) {
  if (interleaved) {
#pragma unroll
    for (int i = 0; i < 8; ++i) f(i, 2 * i, 2 * i + 1);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) f(i, i, i + 8);
  }
}

// The cosines and sines of the lane's pairs at one position; NaN without a position, and for values.
template <int D>
struct HeadAngles {
  Vec8 cos, sin;

  HeadAngles() = default;
  __device__ __forceinline__ HeadAngles(const HeadOutputs& p, HeadKind kind, int64_t position, int lane) {
    if (position < 0 || kind == HeadKind::kValue) {
#pragma unroll
      for (int i = 0; i < 8; ++i) cos.x[i] = sin.x[i] = NAN;
      return;
    }
    // Interleaved, four of the lane's eight angles belong to each half of the head.
    const int angle0 = p.interleaved ? 4 * lane : 8 * lane;
    const int angle4 = p.interleaved ? D / 4 + 4 * lane : 8 * lane + 4;
    const auto load = [=](const float* row) -> Vec8 {
      const float4 a = *reinterpret_cast<const float4*>(row + angle0);
      const float4 b = *reinterpret_cast<const float4*>(row + angle4);
      return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
    };
    const float* row = p.cos_sin + position * D;
    cos = load(row), sin = load(row + D / 2);
  }
};

template <int D>
__device__ __forceinline__ void rotate(HeadPart<D>& head, const HeadAngles<D>& angles, bool interleaved) {
  for_each_pair(interleaved, [&](int i, int a, int b) {
    const float x = head[a], y = head[b], cos = angles.cos.x[i], sin = angles.sin.x[i];
    head[a] = x * cos - y * sin;
    head[b] = x * sin + y * cos;
  });
}

// scale: of norm_scale.
template <class T, int D>
__device__ __forceinline__ void norm_and_rotate(HeadPart<D>& head, float scale, const HeadNorm<T, D>& norm,
                                                const HeadAngles<D>& angles, bool interleaved) {
  if (norm.is_given) {
    HeadPart<D> weight = norm.weights.unpack();
#pragma unroll
    for (int i = 0; i < 16; ++i) head[i] *= scale * weight[i];
  }
  rotate(head, angles, interleaved);
}

// Where a head goes; pointers are to this lane's channels.
template <class T, int D>
struct HeadStore {
  char* to;                     // null: a key or value that is not stored
  char* full;                   // the cache of which `to` is the e4m3 copy, or null
  const float* scale;           // or null for ones
  int64_t stride, full_stride;  // bytes from one head to the next, 0 beside a null pointer
  bool is_e4m3;                 // `to`

  HeadStore() = default;
  // slot: of the token, or -1; only keys and values use it.
  __device__ __forceinline__ HeadStore(const HeadOutputs& p, HeadId head, int64_t token, int64_t slot,
                                       int lane)
      : HeadStore(p, head, token, CacheRow(p.cache, head.kind == HeadKind::kQuery ? -1 : slot), lane) {}

  // The same for a slot that has been taken apart.
  __device__ __forceinline__ HeadStore(const HeadOutputs& p, HeadId head, int64_t token, const CacheRow& row,
                                       int lane)
      : to(nullptr), full(nullptr), scale(nullptr), stride(0), full_stride(0), is_e4m3(false) {
    if (head.kind == HeadKind::kQuery) {
      stride = D * sizeof(T);
      to = static_cast<char*>(p.q_out) + ((token * p.num_q_heads + head.index) * D + 8 * lane) * sizeof(T);
      return;
    }
    if (!row.is_inside()) return;
    const bool is_value = head.kind == HeadKind::kValue;
    const auto place = [&](const PagedCache& cache, int element, char*& at, int64_t& head_stride) {
      const int64_t offset = row.elements(cache) + head.index * cache.head_stride + 8 * lane;
      at = static_cast<char*>(cache.data) + offset * element;
      head_stride = cache.head_stride * element;
    };
    is_e4m3 = p.cache_dtype == DType::kE4M3;
    place(is_value ? p.v_cache : p.k_cache, is_e4m3 ? 1 : sizeof(T), to, stride);
    if (p.k_copy.data != nullptr) {
      full = to, full_stride = stride, is_e4m3 = true;
      place(is_value ? p.v_copy : p.k_copy, 1, to, stride);
    }
    scale = is_value ? p.v_scale : p.k_scale;
    if (scale != nullptr) scale += head.index * D + 8 * lane;
  }

  __device__ __forceinline__ void next_head() {
    to += stride, full += full_stride;
    if (scale != nullptr) scale += D;
  }

  // To the channels that many further on in a head that is stored.
  __device__ __forceinline__ void skip_channels(int count) {
    to += is_e4m3 ? count : count * sizeof(T);
    if (full != nullptr) full += count * sizeof(T);
    if (scale != nullptr) scale += count;
  }

  __device__ __forceinline__ void store(HeadPart<D>& part) const {
    if (full != nullptr) part.store(reinterpret_cast<T*>(full));
    if (scale != nullptr) {
      part.half[0].divide_by(Vec8::load(scale));
      part.half[1].divide_by(Vec8::load(scale + D / 2));
    }
    // A branch and not a template parameter: it is uniform, and halves the kernels to compile.
    if (is_e4m3) {
      part.store(reinterpret_cast<e4m3*>(to));
    } else {
      part.store(reinterpret_cast<T*>(to));
    }
  }
};

// What the norm multiplies a head by, apart from its weights.
template <class T, int D>
__device__ __forceinline__ float norm_scale(const HeadOutputs& p, float mean_of_squares,
                                            const HeadNorm<T, D>& norm) {
  return norm.is_given ? rsqrtf(mean_of_squares + p.eps) : 1.f;
}

// The same from the lanes' parts. Every lane of the warp must call this, except for those that have exited.
template <class T, int D>
__device__ __forceinline__ float norm_scale(const HeadOutputs& p, HeadPart<D> part,
                                            const HeadNorm<T, D>& norm) {
  return norm_scale(p, mean_of_squares(part), norm);
}

// Norm, rotation and store of one head.
template <class T, int D>
__device__ __forceinline__ void finish_head(const HeadOutputs& p, HeadPart<D>& part, HeadKind kind,
                                            float scale, const HeadNorm<T, D>& norm,
                                            const HeadAngles<D>& angles, const HeadStore<T, D>& store) {
  if (store.to == nullptr) return;
  if (kind != HeadKind::kValue) norm_and_rotate(part, scale, norm, angles, p.interleaved);
  store.store(part);
}

}  // namespace fusedkv

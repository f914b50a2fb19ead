// What q, k and v heads go through after their projection: RMSNorm, RoPE, and the store to q_out or to a
// cache slot. rope_write_kv and rope_key_projection share it.
#pragma once

#include <cmath>
#include <cstdint>

#include "../params.h"
#include "vec.cuh"

namespace fusedkv {

// D / 16 neighbouring lanes share a head. Lane l holds channels 8l .. 8l+7 of its first half and the same of
// its second: rotate-half pairs meet in one lane, interleaved pairs do too, and every access of the lane
// group is contiguous.
template <int D>
struct HeadPart {
  static constexpr int kLanes = D / 16;
  Vec8 first, second;
};

// The position of a token, or -1 when it lies outside the cos/sin table.
__device__ __forceinline__ int64_t load_position(const HeadOutputs& p, int64_t token) {
  const int64_t position = p.positions_are_int64 ? static_cast<const int64_t*>(p.positions)[token]
                                                 : static_cast<const int*>(p.positions)[token];
  return index_is_inside(position, p.max_positions) ? position : -1;
}

// The cache slot of a token, or -1 for no write: a key without a position must not reach the cache.
__device__ __forceinline__ int64_t load_slot(const HeadOutputs& p, int64_t token, int64_t position) {
  if (p.num_kv_heads == 0) return -1;
  const int64_t slot = p.slot_mapping[token];
  return index_is_inside(slot, p.cache.num_pages * p.cache.page_size) && position >= 0 ? slot : -1;
}

template <class T, int D>
__device__ __forceinline__ void rms_norm(HeadPart<D>& head, const T* weight, float eps, int lane) {
  constexpr int kLanes = HeadPart<D>::kLanes;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum += head.first.x[i] * head.first.x[i] + head.second.x[i] * head.second.x[i];
  // The mask names this lane group only, because other groups of the warp may be at a head without norm.
  const uint32_t group = ((1u << kLanes) - 1) << (threadIdx.x % 32 - lane);
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(group, sum, step);
  const float inverse = rsqrtf(sum / D + eps);
  const Vec8 first = Vec8::load(weight + 8 * lane), second = Vec8::load(weight + D / 2 + 8 * lane);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    head.first.x[i] *= inverse * first.x[i];
    head.second.x[i] *= inverse * second.x[i];
  }
}

__device__ __forceinline__ void rotate_pair(float& a, float& b, float cos, float sin) {
  const float rotated = a * cos - b * sin;
  b = b * cos + a * sin;
  a = rotated;
}

// row: the D floats of the position in the cos/sin table.
template <int D>
__device__ __forceinline__ void rotate(HeadPart<D>& head, const float* row, bool interleaved, int lane) {
  // Interleaved, four of the lane's eight angles belong to each half of the head.
  const int angle0 = interleaved ? 4 * lane : 8 * lane;
  const int angle4 = interleaved ? D / 4 + 4 * lane : 8 * lane + 4;
  const auto load_angles = [=](const float* p) -> Vec8 {
    const float4 a = *reinterpret_cast<const float4*>(p + angle0);
    const float4 b = *reinterpret_cast<const float4*>(p + angle4);
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
  };
  const Vec8 cos = load_angles(row), sin = load_angles(row + D / 2);
  float *first = head.first.x, *second = head.second.x;
  if (interleaved) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      rotate_pair(first[2 * i], first[2 * i + 1], cos.x[i], sin.x[i]);
      rotate_pair(second[2 * i], second[2 * i + 1], cos.x[4 + i], sin.x[4 + i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) rotate_pair(first[i], second[i], cos.x[i], sin.x[i]);
  }
}

template <class C, int D>
__device__ __forceinline__ void store_head(const HeadPart<D>& head, void* data, int64_t offset, int lane) {
  C* row = static_cast<C*>(data) + offset;
  head.first.store(row + 8 * lane);
  head.second.store(row + D / 2 + 8 * lane);
}

// scale: the D floats of the head, or null.
template <class T, int D>
__device__ __forceinline__ void store_in_cache(HeadPart<D>& head, const PagedCache& cache, int64_t offset,
                                               DType cache_dtype, const float* scale, int lane) {
  if (scale != nullptr) {
    const Vec8 first = Vec8::load(scale + 8 * lane), second = Vec8::load(scale + D / 2 + 8 * lane);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      head.first.x[i] /= first.x[i];
      head.second.x[i] /= second.x[i];
    }
  }
  // A branch and not a template parameter: it is uniform, and halves the kernels to compile.
  if (cache_dtype == DType::kE4M3) {
    store_head<e4m3>(head, cache.data, offset, lane);
  } else {
    store_head<T>(head, cache.data, offset, lane);
  }
}

// head: index in the order q, k, v. position and slot: from load_position and load_slot.
template <class T, int D>
__device__ __forceinline__ void finish_head(const HeadOutputs& p, HeadPart<D>& part, int64_t token, int head,
                                            int64_t position, int64_t slot, int lane) {
  const int kv_head = head - p.num_q_heads;
  const bool is_query = kv_head < 0, is_value = kv_head >= p.num_kv_heads;
  if (!is_query && slot < 0) return;
  if (!is_value) {
    const T* norm = static_cast<const T*>(is_query ? p.q_norm : p.k_norm);
    if (norm != nullptr) rms_norm(part, norm, p.eps, lane);
    if (position >= 0) {
      rotate(part, p.cos_sin + position * D, p.interleaved, lane);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) part.first.x[i] = part.second.x[i] = NAN;
    }
  }
  if (is_query) {
    store_head<T>(part, p.q_out, (token * p.num_q_heads + head) * D, lane);
  } else if (is_value) {
    const int h = kv_head - p.num_kv_heads;
    store_in_cache<T>(part, p.v_cache, slot_offset(p.v_cache, p.cache.page_size, slot, h), p.cache_dtype,
                      p.v_scale == nullptr ? nullptr : p.v_scale + h * D, lane);
  } else {
    store_in_cache<T>(part, p.k_cache, slot_offset(p.k_cache, p.cache.page_size, slot, kv_head),
                      p.cache_dtype, p.k_scale == nullptr ? nullptr : p.k_scale + kv_head * D, lane);
  }
}

}  // namespace fusedkv

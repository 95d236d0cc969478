// Numbers of 16 bits, and floats as sortable integers.
#pragma once

#include "device.h"
#include "matrix.h"

#ifndef NGAME_CUDA_EMULATE
#include <cuda_fp16.h>
#endif

namespace ngame::cuda {

// Elements read at once.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};
// How many elements can be read at once if rows begin at multiples of this many bytes.
constexpr int kPackBytes = 16;

// Whether every row, and every row of a matrix of as many floats, consists of whole packs.
template <class T>
bool packed(const Matrix& x) {
  constexpr int64_t kCount = kPackBytes / sizeof(T);
  return reinterpret_cast<uintptr_t>(x.data) % kPackBytes == 0 && x.stride % kCount == 0 &&
         x.cols % kCount == 0;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}
__device__ __forceinline__ float to_float(Half value) {
#ifdef NGAME_CUDA_EMULATE
  return emulation::half_to_float(value.bits);
#else
  return __half2float(__ushort_as_half(value.bits));
#endif
}

// Rounds a finite value to nearest, ties to even.
__device__ __forceinline__ BFloat to_bfloat(float value) {
  const uint32_t bits = __float_as_uint(value);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// An integer that ascends as the value descends; both zeros give the same one.
__device__ __forceinline__ uint32_t descending(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits >> 31 ? bits : ~bits & 0x7fffffff;
}
__device__ __forceinline__ float from_descending(uint32_t key) {
  return __uint_as_float(key >> 31 ? key : ~key & 0x7fffffff);
}

// Calls work(T{}) for the type of the elements.
template <class Work>
auto with_scalar(Scalar scalar, const Work& work) {
  if (scalar == Scalar::f16) return work(Half{});
  if (scalar == Scalar::bf16) return work(BFloat{});
  return work(float{});
}

}  // namespace ngame::cuda

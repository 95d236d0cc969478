// Rows of a matrix, scaled to unit length, and blocks that work on many of them.
#pragma once

#include "scalar.h"

namespace ngame::cuda {

#ifdef NGAME_CUDA_EMULATE
constexpr int kThreads = 64;
#else
constexpr int kThreads = 512;
#endif
constexpr int kWarps = kThreads / kWarp;
// Rows that a warp reads at once: enough to hide the wait for memory.
constexpr int kRowsAtOnce = 4;

struct BlockSums {
  float totals[kWarps];
};

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }

// Of a value of each thread; in the same order always. All threads get it.
__device__ __forceinline__ float block_sum(float value, BlockSums& shared) {
  value = warp_sum(value);
  __syncthreads();
  if (lane() == 0) shared.totals[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += shared.totals[warp];
  return sum;
}

// The products of a direction with the unit rows ids[0], ids[step], ... , kRows of them, of which
// only the first `count`, at least one, are there; all lanes get them. kPack elements at once.
template <class T, int kPack, int kRows>
__device__ __forceinline__ void project(const Matrix& x, const float* inverse, const int32_t* ids,
                                        int64_t step, int64_t count, const float* direction,
                                        float (&products)[kRows]) {
  const T* from[kRows];
  // Elements are scaled one by one: a product of a long row might overflow.
  float scales[kRows];
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const int32_t id = ids[row < count ? row * step : 0];
    from[row] = static_cast<const T*>(x.data) + id * x.stride + lane() * kPack;
    scales[row] = inverse[id];
    products[row] = 0;
  }
  direction += lane() * kPack;
  // Unrolled, it would need more registers than two blocks at once leave.
#pragma unroll 1
  for (int column = lane() * kPack; column < x.cols; column += kWarp * kPack) {
    const auto along = *reinterpret_cast<const Pack<float, kPack>*>(direction);
    direction += kWarp * kPack;
    Pack<T, kPack> packs[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      packs[row] = *reinterpret_cast<const Pack<T, kPack>*>(from[row]);
      from[row] += kWarp * kPack;
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int element = 0; element < kPack; ++element) {
        products[row] += to_float(packs[row].values[element]) * scales[row] * along.values[element];
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) products[row] = warp_sum(products[row]);
}

}  // namespace ngame::cuda

// A 16 x 16 tile of a matrix product on the tensor cores, by one warp.
#pragma once

#include "scalar.h"

#ifndef NGAME_CUDA_EMULATE
#include <cuda_bf16.h>
#include <mma.h>
#endif

namespace ngame::cuda {

constexpr int kTile = 16;

#ifdef NGAME_CUDA_EMULATE

// Each lane holds eight elements of the tile.
class Tile {
 public:
  // += a b^T; both [16, 16] with rows `stride` apart, in shared memory.
  void multiply(const BFloat* a, const BFloat* b, int stride) {
    for (int i = 0; i < 8; ++i) {
      const int element = lane() * 8 + i;
      for (int depth = 0; depth < kTile; ++depth) {
        sums_[i] += to_float(a[element / kTile * stride + depth]) *
                    to_float(b[element % kTile * stride + depth]);
      }
    }
  }
  // To [16, 16] in shared memory.
  void store(float* to) const {
    for (int i = 0; i < 8; ++i) to[lane() * 8 + i] = sums_[i];
  }

 private:
  float sums_[8] = {};
};

#else

class Tile {
 public:
  __device__ Tile() { nvcuda::wmma::fill_fragment(sums_, 0.0f); }
  // += a b^T; both [16, 16] with rows `stride` apart, in shared memory, at multiples of 32 bytes.
  __device__ void multiply(const BFloat* a, const BFloat* b, int stride) {
    using namespace nvcuda::wmma;
    fragment<matrix_a, kTile, kTile, kTile, __nv_bfloat16, row_major> left;
    fragment<matrix_b, kTile, kTile, kTile, __nv_bfloat16, col_major> right;
    load_matrix_sync(left, reinterpret_cast<const __nv_bfloat16*>(a), stride);
    load_matrix_sync(right, reinterpret_cast<const __nv_bfloat16*>(b), stride);
    mma_sync(sums_, left, right, sums_);
  }
  // To [16, 16] in shared memory.
  __device__ void store(float* to) const {
    nvcuda::wmma::store_matrix_sync(to, sums_, kTile, nvcuda::wmma::mem_row_major);
  }

 private:
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kTile, kTile, kTile, float> sums_;
};

#endif

}  // namespace ngame::cuda

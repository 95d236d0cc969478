// Embeddings on the device.
#pragma once

#include "call.h"

namespace ngame::cuda {

enum class Scalar { f32, f16, bf16 };
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// A dense matrix whose rows are contiguous; the rows may lie apart.
struct Matrix {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;  // elements from one row to the next
  Scalar scalar;
  const char* name;
};

}  // namespace ngame::cuda

#include "matrix.h"

#include <cfloat>
#include <cmath>

#include "kernels.h"

namespace ngame {
namespace {

constexpr int64_t kBlock = 1024;

// The sum of squares in float overflows or vanishes for rows of extreme scale; those are summed
// again in double. NaN and infinity come back as such.
double norm_of(const MatrixView& matrix, int64_t row) {
  const auto cols = static_cast<size_t>(matrix.cols);
  if (matrix.scalar == Scalar::f16) {
    return std::sqrt(static_cast<double>(kernels().squared_norm_f16(matrix.f16(row), cols)));
  }
  const float fast = kernels().squared_norm_f32(matrix.f32(row), cols);
  if (fast > 1e-30f && fast <= FLT_MAX) return std::sqrt(static_cast<double>(fast));
  double sum = 0;
  for (int64_t at = 0; at < matrix.cols; ++at) {
    const double value = matrix.f32(row)[at];
    sum += value * value;
  }
  return std::sqrt(sum);
}

}  // namespace

void inverse_norms(const MatrixView& matrix, int threads, Cancel& cancel,
                   std::span<float> inverse) {
  const int64_t blocks = (matrix.rows + kBlock - 1) / kBlock;
  parallel_for(blocks, threads, cancel, [&](int64_t block, int) {
    const int64_t end = std::min(matrix.rows, (block + 1) * kBlock);
    for (int64_t row = block * kBlock; row < end; ++row) {
      const double norm = norm_of(matrix, row);
      if (!std::isfinite(norm)) {
        throw std::invalid_argument(std::string(matrix.name) + " has NaN or infinity in row " +
                                    std::to_string(row));
      }
      inverse[static_cast<size_t>(row)] = norm < FLT_MIN ? 0.0f : static_cast<float>(1.0 / norm);
    }
  });
}

void copy_row(const MatrixView& matrix, int64_t row, float scale, float* out) {
  const auto cols = static_cast<size_t>(matrix.cols);
  if (matrix.scalar == Scalar::f16) {
    kernels().scale_f16(matrix.f16(row), cols, scale, out);
  } else {
    kernels().scale_f32(matrix.f32(row), cols, scale, out);
  }
  std::fill(out + matrix.cols, out + padded(matrix.cols), 0.0f);
}

}  // namespace ngame

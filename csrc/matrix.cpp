#include "matrix.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cfloat>
#include <cmath>

#include "kernels.h"

namespace ngame {
namespace {

constexpr int64_t kBlock = 1024;

// How many pages are checked to tell whether a matrix is in memory.
constexpr int64_t kCheckedPages = 256;

// For rows of extreme scale the sum of squares overflows float or becomes 0: it is then computed
// again in double. A row with NaN or infinity has a norm of NaN or infinity.
double norm_of(const MatrixView& matrix, int64_t row) {
  const auto cols = static_cast<size_t>(matrix.cols);
  if (matrix.scalar == Scalar::f16) {
    return std::sqrt(static_cast<double>(kernels().squared_norm_f16(matrix.f16(row), cols)));
  }
  const float fast = kernels().squared_norm_f32(matrix.f32(row), cols);
  if (fast > 1e-30f && fast <= FLT_MAX) return std::sqrt(static_cast<double>(fast));
  double sum = 0;
  for (int64_t column = 0; column < matrix.cols; ++column) {
    const double value = matrix.f32(row)[column];
    sum += value * value;
  }
  return std::sqrt(sum);
}

// The page on which a row begins.
char* page_of(const MatrixView& matrix, int64_t row) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<uintptr_t>(matrix.data) +
                       static_cast<uintptr_t>(row * matrix.stride * bytes_of(matrix.scalar));
  return reinterpret_cast<char*>(address / page * page);
}

// Checks a sample of the pages; true if the system does not say. Pages of a mapped file may have
// been evicted, others swapped out.
bool is_in_memory(const MatrixView& matrix) {
  const int64_t checked = std::min<int64_t>(matrix.rows, kCheckedPages);
  for (int64_t number = 0; number < checked; ++number) {
    unsigned char state = 0;
    if (mincore(page_of(matrix, number * matrix.rows / checked), 1, &state) != 0) return true;
    if ((state & 1) == 0) return false;
  }
  return true;
}

}  // namespace

void inverse_norms(const MatrixView& matrix, int threads, Cancel& cancel,
                   std::span<float> inverse) {
  const int64_t blocks = divided_up(matrix.rows, kBlock);
  parallel_for(blocks, threads, cancel, [&](int64_t block, int) {
    const int64_t end = std::min(matrix.rows, (block + 1) * kBlock);
    for (int64_t row = block * kBlock; row < end; ++row) {
      const double norm = norm_of(matrix, row);
      if (!std::isfinite(norm)) reject_value(matrix.name, row);
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

float normalise(std::span<float> vector) {
  const float length = std::sqrt(kernels().squared_norm_f32(vector.data(), vector.size()));
  const float scale = length > 0 ? 1.0f / length : 0.0f;
  for (float& value : vector) value *= scale;
  return length;
}

Fetch::Fetch(const MatrixView& matrix) : matrix_(matrix), from_disk_(!is_in_memory(matrix)) {}

void Fetch::row(int64_t row) const {
  if (from_disk_) {
    rows(row, row + 1);
    return;
  }
  const int64_t size = bytes_of(matrix_.scalar);
  const char* const begin = static_cast<const char*>(matrix_.data) + row * matrix_.stride * size;
  for (int64_t byte = 0; byte < matrix_.cols * size; byte += 64) __builtin_prefetch(begin + byte);
}

void Fetch::rows(int64_t first, int64_t last) const {
  if (!from_disk_ || first >= last) return;
  char* const begin = page_of(matrix_, first);
  const char* const end = static_cast<const char*>(matrix_.data) +
                          ((last - 1) * matrix_.stride + matrix_.cols) * bytes_of(matrix_.scalar);
  // If the system declines, the rows are read when they are needed.
  madvise(begin, static_cast<size_t>(end - begin), MADV_WILLNEED);
}

}  // namespace ngame

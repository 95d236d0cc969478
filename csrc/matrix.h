// What clustering and search both ask of a matrix of embeddings.
#pragma once

#include <span>

#include "common.h"
#include "parallel.h"

namespace ngame {

// Floats a row of `cols` takes in the core's own buffers: whole cache lines, zeros at the end.
constexpr int64_t padded(int64_t cols) { return (cols + 15) / 16 * 16; }

// inverse[r] = 1 / |row r|, and 0 for a zero row. Norms below the smallest normal float count as
// zero. Throws std::invalid_argument naming the first row with NaN or infinity.
void inverse_norms(const MatrixView& matrix, int threads, Cancel& cancel, std::span<float> inverse);

// out = scale * row, widened to float, zeros up to padded(cols).
void copy_row(const MatrixView& matrix, int64_t row, float scale, float* out);

// Asks for rows before they are needed: for the caches, or for memory where the matrix is a mapped
// file that memory does not hold.
class Fetch {
 public:
  // To be made after a pass over the matrix: what is not in memory by then does not fit.
  explicit Fetch(const MatrixView& matrix);

  bool from_disk() const { return from_disk_; }
  // How many rows ahead single ones are asked for best. A disk needs many requests at a time.
  int64_t ahead() const { return from_disk_ ? 64 : 4; }
  void row(int64_t row) const;
  // Rows [first, last), of the disk alone.
  void rows(int64_t first, int64_t last) const;

 private:
  const MatrixView& matrix_;
  bool from_disk_;
};

}  // namespace ngame

// Rows of a matrix of embeddings: their norms, scaled copies, and reading ahead.
#pragma once

#include <algorithm>
#include <span>

#include "common.h"
#include "parallel.h"

namespace ngame {

// Floats that a row of `cols` columns takes in the core's own buffers: whole cache lines, zeros at
// the end.
constexpr int64_t padded(int64_t cols) { return rounded_up(cols, 16); }

// inverse[r] = 1 / |row r|, and 0 for a zero row. Norms below the smallest normal float count as
// zero. Throws std::invalid_argument naming the first row with NaN or infinity.
void inverse_norms(const MatrixView& matrix, int threads, Cancel& cancel, std::span<float> inverse);

// out = scale * row, widened to float, zeros up to padded(cols).
void copy_row(const MatrixView& matrix, int64_t row, float scale, float* out);

// Scales a vector to unit length, and returns its length before; a zero vector stays one.
float normalise(std::span<float> vector);

// Reads rows ahead: into the caches, or from the disk if the matrix is a mapped file that does not
// fit into memory.
class Fetch {
 public:
  // Construct it after a pass over the matrix: what is not in memory by then does not fit.
  explicit Fetch(const MatrixView& matrix);

  bool from_disk() const { return from_disk_; }
  // The best number of rows to read ahead. A disk needs many requests at a time.
  int64_t ahead() const { return from_disk_ ? 64 : 4; }
  void row(int64_t row) const;
  // Rows [first, last), if they come from the disk; otherwise nothing.
  void rows(int64_t first, int64_t last) const;
  // visit(first, last) for all rows, one window after the other, each read from the disk while the
  // one before is worked on. In memory it is all rows.
  template <class Visit>
  void for_each_window(const Visit& visit) const {
    const int64_t row_bytes = std::max<int64_t>(matrix_.stride * bytes_of(matrix_.scalar), 1);
    const int64_t window =
        from_disk_ ? std::max(kWindowBytes / row_bytes, int64_t{1}) : matrix_.rows;
    for (int64_t first = 0; first < matrix_.rows; first += window) {
      const int64_t last = std::min(first + window, matrix_.rows);
      rows(last, std::min(last + window, matrix_.rows));
      visit(first, last);
    }
  }

 private:
  static constexpr int64_t kWindowBytes = 32 * 1024 * 1024;
  const MatrixView& matrix_;
  bool from_disk_;
};

}  // namespace ngame

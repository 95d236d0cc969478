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

}  // namespace ngame

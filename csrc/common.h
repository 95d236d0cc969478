// Views of the caller's arrays. The core owns no input and no output; it rejects bad values with
// std::invalid_argument (ValueError in Python) and std::out_of_range (IndexError).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace ngame {

enum class Scalar { f32, f16 };

// A dense matrix whose rows are contiguous; the rows may lie apart. `name` is what the caller calls
// it, for messages.
struct MatrixView {
  const void* data;
  int64_t rows;
  int64_t cols;
  int64_t stride;  // elements from one row to the next
  Scalar scalar;
  const char* name;

  const float* f32(int64_t row) const { return static_cast<const float*>(data) + row * stride; }
  const uint16_t* f16(int64_t row) const {
    return static_cast<const uint16_t*>(data) + row * stride;
  }
};

// The pattern of a sparse matrix in CSR form. Columns ascend within a row.
template <class Index>
struct CsrView {
  const Index* offsets;  // rows + 1
  const Index* columns;  // nonzeros
  int64_t rows;
  int64_t cols;
  int64_t nonzeros;
  const char* name;

  // The entries of one row, after a check that they lie within `columns`.
  struct Row {
    const Index* begin;
    const Index* end;
    int64_t size() const { return end - begin; }
  };
  Row row(int64_t index) const {
    const int64_t first = offsets[index];
    const int64_t last = offsets[index + 1];
    if (first < 0 || last < first || last > nonzeros) {
      throw std::invalid_argument(std::string(name) + ": indptr of row " + std::to_string(index) +
                                  " does not ascend within the stored entries");
    }
    return {columns + first, columns + last};
  }
  // The same, after a check that the columns are in range and ascend strictly.
  Row sorted_row(int64_t index) const {
    const Row entries = row(index);
    int64_t previous = -1;
    for (const Index* at = entries.begin; at != entries.end; ++at) {
      if (*at <= previous || *at >= cols) reject(index, *at);
      previous = *at;
    }
    return entries;
  }
  [[noreturn]] void reject(int64_t index, int64_t column) const {
    const std::string where = std::string(name) + ": column " + std::to_string(column) +
                              " in row " + std::to_string(index);
    if (column < 0 || column >= cols) {
      throw std::out_of_range(where + " is out of range for " + std::to_string(cols) + " columns");
    }
    throw std::invalid_argument(where + " repeats or is out of order");
  }
};

}  // namespace ngame

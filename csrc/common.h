// Views of the caller's arrays. The core owns no input and no output; it rejects bad values with
// std::invalid_argument (ValueError in Python) and std::out_of_range (IndexError). Another thread
// may write to an array during a call: what is read twice is checked twice, so that no index leaves
// its buffer.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

namespace ngame {

constexpr int64_t divided_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }
constexpr int64_t rounded_up(int64_t value, int64_t unit) { return divided_up(value, unit) * unit; }

[[noreturn]] inline void reject_value(const char* name, int64_t row) {
  throw std::invalid_argument(std::string(name) + " has NaN or infinity in row " +
                              std::to_string(row));
}

enum class Scalar { f32, f16 };

constexpr int64_t bytes_of(Scalar scalar) { return scalar == Scalar::f16 ? 2 : 4; }

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

  struct Row {
    const Index* begin;
    const Index* end;
    int64_t size() const { return end - begin; }
  };
  // The entries of a row; throws where they do not lie within `columns`.
  Row row(int64_t index) const {
    const int64_t first = offsets[index];
    const int64_t last = offsets[index + 1];
    if (first < 0 || last < first || last > nonzeros) {
      throw std::invalid_argument(std::string(name) + ": indptr of row " + std::to_string(index) +
                                  " does not ascend within the stored entries");
    }
    return {columns + first, columns + last};
  }
  // The same; also throws where the columns are out of range or do not ascend strictly.
  Row sorted_row(int64_t index) const {
    const Row entries = row(index);
    int64_t previous = -1;
    for (const Index* entry = entries.begin; entry != entries.end; ++entry) {
      const int64_t column = *entry;
      if (column <= previous || column >= cols) reject(index, column);
      previous = column;
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
  [[noreturn]] void reject_change() const {
    throw std::invalid_argument(std::string(name) + " was changed during the call");
  }
};

// Rejects offsets that do not lead from 0 to `rows` with at least `least` rows a cluster.
inline void check_offsets(std::span<const int64_t> offsets, int64_t rows, int64_t least) {
  bool good = !offsets.empty() && offsets.front() == 0 && offsets.back() == rows;
  for (size_t cluster = 1; good && cluster < offsets.size(); ++cluster) {
    good = offsets[cluster] >= offsets[cluster - 1] &&
           offsets[cluster] - offsets[cluster - 1] >= least;
  }
  if (!good) {
    throw std::invalid_argument("offsets does not ascend from 0 to " + std::to_string(rows));
  }
}

// Cluster c is order[offsets[c] .. offsets[c + 1]); clusters may be empty.
struct ClustersView {
  std::span<const int32_t> order;
  std::span<const int64_t> offsets;

  int64_t count() const { return static_cast<int64_t>(offsets.size()) - 1; }
  std::span<const int32_t> operator[](int64_t cluster) const {
    const int64_t first = offsets[cluster];
    const int64_t last = offsets[cluster + 1];
    if (first < 0 || last < first || last > static_cast<int64_t>(order.size())) {
      throw std::invalid_argument("offsets of the clusters was changed during the call");
    }
    return order.subspan(first, last - first);
  }
  // Throws unless these are clusters of `rows` rows with ids in range.
  void check(int64_t rows) const {
    check_offsets(offsets, rows, 0);
    if (static_cast<int64_t>(order.size()) != rows) {
      throw std::invalid_argument("order has " + std::to_string(order.size()) + " ids, expected " +
                                  std::to_string(rows));
    }
    for (const int32_t id : order) {
      if (id >= 0 && id < rows) continue;
      throw std::out_of_range("order has id " + std::to_string(id) + ", out of range for " +
                              std::to_string(rows));
    }
  }
};

}  // namespace ngame

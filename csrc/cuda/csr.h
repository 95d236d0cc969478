// Checks of sparse matrices on the device.
#pragma once

#include "device.h"

namespace ngame::cuda {

struct CsrFaults {
  Fault offsets, column;

  static CsrFaults make(const Call& call) { return {Fault::make(call), Fault::make(call)}; }
};

// Whether the offsets of a row lie within the stored entries.
template <class Index>
__device__ __forceinline__ bool check_offsets(const Csr<Index>& matrix, int64_t row,
                                              const CsrFaults& faults) {
  const int64_t first = matrix.offsets[row];
  const int64_t last = matrix.offsets[row + 1];
  const bool good = 0 <= first && first <= last && last <= matrix.nonzeros;
  if (!good) faults.offsets.report(row);
  return good;
}

// The column of a stored entry, after a check that it is in range and above the one before it.
template <class Index>
__device__ __forceinline__ int64_t checked_column(const Csr<Index>& matrix, int64_t first,
                                                  int64_t entry, const CsrFaults& faults) {
  const int64_t column = matrix.columns[entry];
  const int64_t before = entry > first ? static_cast<int64_t>(matrix.columns[entry - 1]) : -1;
  if (column < 0 || column >= matrix.cols || column <= before) faults.column.report(entry);
  return column;
}

template <class Index>
__global__ void check_all_offsets(Csr<Index> matrix, CsrFaults faults, int64_t count) {
  const int64_t row = global_thread();
  if (row < count) check_offsets(matrix, row, faults);
}

// One warp a row, after check_all_offsets.
template <class Index>
__global__ void check_all_columns(Csr<Index> matrix, CsrFaults faults) {
  const int64_t row = global_warp();
  if (row >= matrix.rows) return;
  const int64_t first = matrix.offsets[row];
  const int64_t last = matrix.offsets[row + 1];
  for (int64_t entry = first + lane(); entry < last; entry += kWarp) {
    checked_column(matrix, first, entry, faults);
  }
}

template <class Index>
void reject_offsets(const Call& call, const Csr<Index>& matrix, const CsrFaults& faults) {
  const int64_t row = faults.offsets.read(call);
  if (row < 0) return;
  throw std::invalid_argument(std::string(matrix.name) + ": indptr of row " + std::to_string(row) +
                              " does not ascend within the stored entries");
}

template <class Index>
void reject_columns(const Call& call, const Csr<Index>& matrix, const CsrFaults& faults) {
  const int64_t entry = faults.column.read(call);
  if (entry < 0) return;
  const auto column = static_cast<int64_t>(call.read(matrix.columns + entry));
  const std::string where = std::string(matrix.name) + ": column " + std::to_string(column) +
                            " at stored entry " + std::to_string(entry);
  if (column < 0 || column >= matrix.cols) {
    throw std::out_of_range(where + " is out of range for " + std::to_string(matrix.cols) +
                            " columns");
  }
  throw std::invalid_argument(where + " repeats or is out of order");
}

// Throws unless columns are in range and ascend strictly within each row.
template <class Index>
void check(const Call& call, const Csr<Index>& matrix) {
  const CsrFaults faults = CsrFaults::make(call);
  call.for_each(check_all_offsets<Index>, matrix.rows, matrix, faults);
  reject_offsets(call, matrix, faults);
  call.for_each_warp(check_all_columns<Index>, matrix.rows, matrix, faults);
  reject_columns(call, matrix, faults);
}

// Whether a row has a column.
template <class Index>
__device__ __forceinline__ bool contains(const Csr<Index>& matrix, int64_t row, int64_t column) {
  const int64_t first = matrix.offsets[row];
  const int64_t size = matrix.offsets[row + 1] - first;
  const int64_t entry = lower_bound(matrix.columns + first, size, static_cast<Index>(column));
  return entry < size && matrix.columns[first + entry] == column;
}

}  // namespace ngame::cuda

// Exact search among sparse rows: the k items with the largest product for every query.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common.h"
#include "parallel.h"
#include "shortlist.h"

namespace ngame {

// Sparse rows with their values.
template <class Index>
struct WeightedRows {
  CsrView<Index> pattern;
  const float* values;  // pattern.nonzeros
};

// The items that have a column, for each column: what a search reads instead of the rows. Made once
// for many searches. 8 bytes an entry, and 8 a column for every kMostRows rows.
struct SparseItems {
  // An entry is the item's place in its lowest bits, the rest a rounded value: in units of the
  // column's largest one, divided by kLargestCode.
  static constexpr int kPlaceBits = 21;
  static constexpr int64_t kMostRows = int64_t{1} << kPlaceBits;
  static constexpr int32_t kLargestCode = (1 << (31 - kPlaceBits)) - 1;
  // Scores of so many items are summed at a time: they fit in the fastest cache, or the next.
  static constexpr int64_t kBlock = 1 << 14;

  SparseItems() = default;
  SparseItems(SparseItems&&) = default;
  SparseItems(const SparseItems&) = delete;  // Large.

  struct Part {
    std::vector<int64_t> offsets;  // of the columns' entries, cols + 1
    Buffer<uint32_t> entries;      // places ascend within a column
    Buffer<float> values;          // of the same
    std::vector<int32_t> order;    // the item at each place
    std::vector<float> heaviest;   // of each block of places: the largest norm in common columns
  };

  int64_t rows = 0;
  int64_t cols = 0;
  double mean_entries = 0;      // of a row
  double longest = 0;           // the largest norm of a row
  bool negative = false;        // whether a value is
  std::vector<float> largest;   // of each column, without signs
  std::vector<uint8_t> common;  // whether a column is among the most frequent ones
  std::vector<Part> parts;
};

// Throws std::invalid_argument naming the first row with NaN or infinity.
template <class Index>
SparseItems prepare_sparse_items(const WeightedRows<Index>& items, Cancel& cancel);

// The k items with the largest scores for each query, ties by lower id. Only scores other than 0
// count. `drop` pairs (query, item) are left out. A score is a sum in double in the order of the
// columns, rounded once to float, whatever the threads and the way that led to the item. Takes
// under 1 MB a thread, and 8 bytes a result.
template <class Index>
Sparse<float> sparse_topk(const WeightedRows<Index>& queries, const WeightedRows<Index>& items,
                          const SparseItems& prepared, const CsrView<Index>* drop, int64_t k,
                          int threads, Cancel& cancel);

// scores[i] is the score of the i-th of some pairs (query, item).
template <class Index>
void sparse_pair_scores(const WeightedRows<Index>& queries, const WeightedRows<Index>& items,
                        const CsrView<Index>& pairs, int threads, Cancel& cancel, float* scores);

}  // namespace ngame

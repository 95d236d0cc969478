// Work on the rows of sparse scores. Every result has ascending columns within a row.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "common.h"
#include "parallel.h"

namespace ngame {

// A sparse matrix that the core made.
template <class Score>
struct Sparse {
  std::vector<int64_t> offsets;
  std::vector<int32_t> columns;
  std::vector<Score> values;
};

enum class Merge { sum, max };

// The k largest entries of each row, ties by lower column. NaN is rejected.
template <class Index, class Score>
Sparse<Score> keep_topk(const CsrView<Index>& matrix, const Score* values, int64_t k, int threads,
                        Cancel& cancel);

// The entries of either; where both have one, their sum or the larger.
template <class Index, class Score>
Sparse<Score> merge(const CsrView<Index>& first, const Score* first_values,
                    const CsrView<Index>& second, const Score* second_values, Merge how,
                    int threads, Cancel& cancel);

// The entries of `matrix` that `pairs` has not.
template <class Index, class Score>
Sparse<Score> drop_pairs(const CsrView<Index>& matrix, const Score* values,
                         const CsrView<Index>& pairs, int threads, Cancel& cancel);

// For each row the labels that other rows of its cluster have and it has not; the value is the
// number of those rows. At most `limit` a row, the most frequent first, ties by lower label.
template <class Index>
Sparse<float> cluster_shortlist(const CsrView<Index>& labels, const ClustersView& clusters,
                                std::optional<int64_t> limit, int threads, Cancel& cancel);

}  // namespace ngame

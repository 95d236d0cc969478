// Tighter clusters at the same sizes: rows move to the nearest cluster that has room.
#pragma once

#include <cstdint>
#include <span>

#include "common.h"
#include "matrix.h"
#include "parallel.h"

namespace ngame {

// Groups of 16 clusters that are compared with each other. Of more of them, each is compared with
// half as many at most, so that the time does not grow with the square of their number.
constexpr int64_t kMostCompared = 4096;

// Improves a division of the rows of `x` in `rounds` rounds at most. In each, every row scores the
// clusters near its own by its cosine to their means; the mean of its own is taken without the row.
// Then rows and clusters are matched stably (Gale and Shapley, 1962): a row asks the best of these
// clusters from the best down, and a cluster keeps the best of the rows that ask, as many as it has
// places. Ties go to the row of lower id, and to the cluster that the row is in, then the lower
// one. There is only one such matching where rows ask, so the threads may let them ask in any
// order. A row that all refuse gets a place that is left: rows in the order of their old clusters,
// places in the order of the clusters. A round that does not raise the coherence is undone; one
// that hardly raises it is the last.
//
// `order` and `offsets` are those of `balanced_clusters`: ids ascend within a cluster, and near
// clusters are near in the order, before and after. `inverse` has the inverse norms of the rows. A
// round reads `x` twice.
void refine(const MatrixView& x, std::span<const float> inverse, const Fetch& fetch,
            std::span<const int64_t> offsets, int rounds, int threads, Cancel& cancel,
            std::span<int32_t> order, int64_t most_compared = kMostCompared);

}  // namespace ngame

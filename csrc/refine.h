// Tighter clusters at the same sizes: rows move to the nearest cluster that has room.
#pragma once

#include <cstdint>
#include <span>

#include "common.h"
#include "matrix.h"
#include "parallel.h"

namespace ngame {

// Improves a division of the rows of `x` in rounds. In each, every row lists the clusters near its
// own by the cosine to their means, its own cluster's taken without the row itself. Then rows and
// clusters are matched stably (Gale and Shapley, 1962): a row asks the clusters of its list from
// the best down, a cluster keeps the best of those that asked, as many as it has room for; of equal
// rows the lower id, of equal clusters the one the row is in, then the lower one. There is only one
// such matching, so it does not matter in which order the threads ask. What all clusters of its
// list refuse goes to the room that is left, near to near in the order of the clusters.
//
// `order` and `offsets` are those of `balanced_clusters`, ids ascending within a cluster before and
// after; clusters that are near to each other are near in the order, before and after. `inverse`
// has the inverse norms of the rows. A round reads `x` twice.
void refine(const MatrixView& x, std::span<const float> inverse, const Fetch& fetch,
            std::span<const int64_t> offsets, int rounds, int threads, Cancel& cancel,
            std::span<int32_t> order);

}  // namespace ngame

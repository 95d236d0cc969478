// ../refine.h on the device: the parts of a round. Arrays of a call are on the device.
#pragma once

#include "matrix.h"

namespace ngame::cuda {

// Clusters that a row may go to at most: its own and those nearest to it; and those that it asks.
constexpr int64_t kListed = 64;
constexpr int64_t kAsked = 8;

// Rows, the inverse of the length of each, and clusters: cluster c is order[offsets[c] ..
// offsets[c + 1]).
struct Clustering {
  Matrix x;
  const float* inverse;
  const int64_t* offsets;
  const int32_t* order;
  int64_t clusters;
};

// Unit means [clusters, cols] of unit rows, and the lengths [clusters] of the sums of rows.
void cluster_means(const Call& call, const Clustering& clustering, float* means, float* lengths);

// What each row asks, kAsked keys a row, that of the cluster it likes best first: the high half
// descends with the row's cosine to the mean, that of its own cluster taken without the row; the
// low half is 0 for its own cluster, else 1 + the cluster. `listed` clusters, at most kListed, are
// scored for each: a row of `lists` [clusters, listed], which begins with the cluster itself and
// ends with -1 where it has fewer. All bits are set where there are fewer than kAsked.
void choose(const Call& call, const Clustering& clustering, const float* means,
            const float* lengths, const int32_t* lists, int64_t listed, uint64_t* keys);

// Matches rows and clusters stably. `held` [rows] gets what each cluster keeps, from its offset on,
// in no order: keys whose low half is the row; `counts` [clusters], how many; `refused`, the rows
// that all they asked refused, in no order. `home` [rows] is each row's own cluster. Returns how
// many are refused.
int64_t match(const Call& call, int64_t rows, const int64_t* offsets, int64_t clusters,
              const int32_t* home, const uint64_t* keys, uint64_t* held, int32_t* counts,
              int32_t* refused);

}  // namespace ngame::cuda

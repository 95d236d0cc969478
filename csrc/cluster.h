// Balanced clustering: recursive 2-means on the unit sphere, with sizes that are given.
#pragma once

#include <cstdint>
#include <span>

#include "common.h"
#include "parallel.h"

namespace ngame {

struct ClusterParams {
  uint64_t seed = 0;
  int max_iterations = 20;  // of each 2-means; fewer when the halves stop changing
  int refine = 0;           // rounds after the tree
  int threads = 1;
};

// Orders the rows of `x` so that cluster c is order[offsets[c] .. offsets[c + 1]), ids ascending
// within each. `offsets` ascends strictly from 0 to x.rows: any sizes. The geometry is the cosine;
// a zero row lies nowhere in particular. The result depends on x, offsets, seed, max_iterations and
// the SIMD level, and not on the number of threads.
void balanced_clusters(const MatrixView& x, std::span<const int64_t> offsets,
                       const ClusterParams& params, Cancel& cancel, std::span<int32_t> order);

// Refines given clusters, none of them empty, by `rounds` rounds at most: see refine.h.
void refine_clusters(const MatrixView& x, const ClustersView& clusters, int rounds,
                     int64_t most_compared, int threads, Cancel& cancel, std::span<int32_t> order);

// The sum of the unit vectors of every cluster, x.cols floats each.
void cluster_sums(const MatrixView& x, const ClustersView& clusters, int threads, Cancel& cancel,
                  std::span<float> sums);

// Mean over the clusters of the squared norm of the mean of the cluster's unit vectors: 1 where
// all rows of a cluster point one way. Zero rows count as the zero vector.
double coherence(const MatrixView& x, const ClustersView& clusters, int threads, Cancel& cancel);

}  // namespace ngame

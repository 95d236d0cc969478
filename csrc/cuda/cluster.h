// ../cluster.h on the device.
#pragma once

#include <vector>

#include "matrix.h"

namespace ngame::cuda {

struct ClusterParams {
  uint64_t seed;
  int max_iterations;  // of each 2-means
};

// Divides rows into clusters of given sizes by recursive balanced 2-means on the unit sphere:
// cluster c becomes order[offsets[c] .. offsets[c + 1]), its ids ascending. `offsets`, on the host,
// ascends from 0 to the number of rows; `order` is on the device, as is `inverse`, which gets one
// over the length of each row, or 0. All nodes of a level are split together. The result depends on
// the seed alone.
void balanced_clusters(const Call& call, const Matrix& x, const std::vector<int64_t>& offsets,
                       const ClusterParams& params, float* inverse, int32_t* order);

}  // namespace ngame::cuda

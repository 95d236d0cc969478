// ../metrics.h on the device.
#pragma once

#include <vector>

#include "call.h"

namespace ngame::cuda {

// Means over the rows, one for every k; or, by row, the values [k][row]. The last two are empty
// without weights.
struct Metrics {
  std::vector<double> precision, ndcg, recall, reciprocal, average, hit_rate, psp, psn;
};

// `ks` ascend and are on the host; all else is on the device. `drop` and `inverse_propensity` may
// be null. Columns ascend strictly within each row of all three matrices.
template <class Index, class Score>
Metrics evaluate(const Call& call, const Csr<Index>& predictions, const Score* scores,
                 const Csr<Index>& truth, const Csr<Index>* drop, const float* inverse_propensity,
                 const std::vector<int64_t>& ks, bool by_row);

}  // namespace ngame::cuda

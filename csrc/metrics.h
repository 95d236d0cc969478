// Ranking metrics of sparse predictions, all of them in one pass.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common.h"
#include "parallel.h"

namespace ngame {

// Means over the rows, one value for each k; or, by row, the values of every row: [k][row], whose
// means those are. A row without positives counts as zero.
struct Metrics {
  std::vector<double> precision;   // hits in the first k / k
  std::vector<double> ndcg;        // DCG of the first k / best DCG with min(k, positives) hits
  std::vector<double> recall;      // hits in the first k / positives
  std::vector<double> reciprocal;  // 1 / rank of the first hit, ranks from 1
  std::vector<double> average;     // precisions at the ranks of hits / min(k, positives)
  std::vector<double> hit_rate;    // whether there is a hit in the first k
  std::vector<double> psp, psn;    // mean weighted gain / mean of the best attainable
};

// `ks` ascend. The pairs of `drop` are left out of predictions and truth. A label stored twice in a
// row takes two ranks and counts at the better one. Without `inverse_propensity` (one weight a
// label) psp and psn stay empty. Throws at a NaN score.
template <class Index, class Score>
Metrics evaluate(const CsrView<Index>& predictions, const Score* scores,
                 const CsrView<Index>& truth, const CsrView<Index>* drop,
                 const float* inverse_propensity, std::span<const int64_t> ks, bool by_row,
                 int threads, Cancel& cancel);

}  // namespace ngame

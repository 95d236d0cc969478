// Linear classifiers of sparse rows, one for each label: what the words of a text say of it.
#pragma once

#include <cstdint>

#include "common.h"
#include "parallel.h"
#include "shortlist.h"
#include "sparse_topk.h"

namespace ngame {

struct LinearProblem {
  double cost;       // of a squared loss of 1, beside half the squared norm of the weights
  double tolerance;  // of the projected gradient
  double least;      // weights below this share of the label's largest are left out
  int64_t passes;    // bounds the visits: at most this many times the rows
  uint64_t seed;
};

// The weights of each label, rows of a matrix [labels, columns]: they minimise
//   1/2 |w|^2 + cost * (sum over its points of max(0, 1 - w.x)^2
//                       + sum over the others of max(0, w.x)^2)
// by dual coordinate descent (Hsieh et al., ICML 2008, Algorithm 3), every label by itself.
// `relevant` [labels, points] has the points of each label, `compared` of the same shape those that
// it is told from, where those in `relevant` do not count; nullptr means all. The same bits for any
// number of threads. For each thread 4 bytes a column, and 8 an entry and 60 a point of what the
// classifier of one label sees.
template <class Index>
Sparse<float> train_linear(const WeightedRows<Index>& points, const CsrView<Index>& relevant,
                           const CsrView<Index>* compared, const LinearProblem& problem,
                           int threads, Cancel& cancel);

}  // namespace ngame

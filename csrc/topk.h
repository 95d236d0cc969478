// Exact search: the k items with the largest product for every query.
#pragma once

#include <cstdint>

#include "common.h"
#include "parallel.h"

namespace ngame {

struct TopkParams {
  int64_t k = 1;
  bool cosine = true;  // rows are divided by their norms; zero rows score 0
  int threads = 1;
};

// scores[q * k ..] and ids[q * k ..] are the best k items of query q, best first, ties by lower id.
// `drop` pairs (query, item) are left out; where fewer than k items remain the tail is -infinity
// and -1. A score is a sum in double rounded once to float, whatever the threads, the blocking and
// the way that led to the item. Takes O(block) memory beyond the output, never queries x items.
template <class Index>
void topk(const MatrixView& queries, const MatrixView& items, const CsrView<Index>* drop,
          const TopkParams& params, Cancel& cancel, float* scores, int32_t* ids);

}  // namespace ngame

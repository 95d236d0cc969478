// Exact search: the k items with the largest product for every query.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "coding.h"
#include "common.h"
#include "parallel.h"
#include "scorer.h"

namespace ngame {

// What searches need of items, made once. Codes are in bytes, the same at every SIMD level.
struct PreparedItems {
  std::vector<double> norms;
  double longest = 0;  // the largest norm
  ItemCodes codes;     // empty where a row has too many columns for codes in bytes
};

// Throws std::invalid_argument naming the first row with NaN or infinity.
PreparedItems prepare_items(const MatrixView& items, bool cosine, int threads, Cancel& cancel);

// The same as a view. Without codes, a search codes the items itself, some at a time.
struct PreparedView {
  const double* norms;
  double longest;
  std::optional<CodesView> codes;
};

struct TopkParams {
  int64_t k = 1;
  bool cosine = true;  // rows are divided by their norms; zero rows score 0
  int threads = 1;
};

// scores[q * k ..] and ids[q * k ..] are the best k items of query q, best first, ties by lower id.
// `drop` pairs (query, item) are left out; where fewer than k items remain the tail is -infinity
// and -1. A score is a sum in double rounded once to float, whatever the threads, the blocking and
// the way that led to the item. Takes O(block) memory beyond the output and a norm for each row,
// never queries x items. What was `prepared` of the items may be null: it is then made, used once
// and not kept.
template <class Index>
void topk(const MatrixView& queries, const MatrixView& items, const PreparedView* prepared,
          const CsrView<Index>* drop, const TopkParams& params, Cancel& cancel, float* scores,
          int32_t* ids);

}  // namespace ngame

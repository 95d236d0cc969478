// Scores of pairs of rows, exact but for one rounding: what every search comes down to.
#pragma once

#include <cstdint>
#include <vector>

#include "common.h"
#include "kernels.h"
#include "parallel.h"

namespace ngame {

// Scores pairs from the rows themselves, in double. One score is the same whoever asks for it.
class Scorer {
 public:
  // Throws std::invalid_argument naming the first row with NaN or infinity, or where products of
  // the two matrices may overflow float.
  Scorer(const MatrixView& queries, const MatrixView& items, bool cosine, int threads,
         Cancel& cancel);

  // 0 for those whose cosines are to be 0.
  double query_norm(int64_t row) const { return query_norms_[static_cast<size_t>(row)]; }
  double item_norm(int64_t row) const { return item_norms_[static_cast<size_t>(row)]; }
  // The longest item's norm; 1 where rows are divided by theirs.
  double longest() const { return longest_; }

  // A query's row in double, by way of float.
  static void widen(const MatrixView& queries, int64_t row, std::vector<float>& narrow,
                    std::vector<double>& wide);

  // The score of an item and the query `row`, which is widened already.
  float operator()(int64_t row, const std::vector<double>& wide, int64_t item) const;

 private:
  double product(const MatrixView& matrix, int64_t row, const double* with) const;
  std::vector<double> norms(const MatrixView& matrix, int threads, Cancel& cancel) const;

  const Kernels& use_ = kernels();
  const MatrixView& items_;
  const bool cosine_;
  const std::vector<double> query_norms_, item_norms_;
  double longest_ = 1;
};

// scores[e] is the score of the query and the item of stored entry e of `pairs`, [queries, items],
// to the bit that of `topk`.
template <class Index>
void pair_scores(const MatrixView& queries, const MatrixView& items, const CsrView<Index>& pairs,
                 bool cosine, int threads, Cancel& cancel, float* scores);

}  // namespace ngame

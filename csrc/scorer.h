// Scores of pairs of rows, summed in double and rounded once to float.
#pragma once

#include <cstdint>
#include <vector>

#include "common.h"
#include "kernels.h"
#include "parallel.h"

namespace ngame {

// Who was scored. The better one comes first, of equals the lower id.
struct Scored {
  float score;
  int32_t id;
};
inline bool better(const Scored& one, const Scored& other) {
  return one.score > other.score || (one.score == other.score && one.id < other.id);
}

// The norm of every row, in double. Throws std::invalid_argument naming the first row with NaN or
// infinity.
std::vector<double> norms_of(const MatrixView& matrix, int threads, Cancel& cancel);

// A matrix and the norms of its rows.
struct Rows {
  MatrixView matrix;
  const double* norms;

  double longest() const;  // 0 without rows
};

// A pair has the same score, to the bit, in every function that asks for it.
class Scorer {
 public:
  // `longest` is the largest norm of the items. Throws std::invalid_argument where products of the
  // two matrices may overflow float.
  Scorer(const Rows& queries, const Rows& items, double longest, bool cosine);

  // A query in double, as `score` takes it.
  void widen(int64_t query, std::vector<float>& narrow, std::vector<double>& wide) const;

  float score(int64_t query, const std::vector<double>& wide, int64_t item) const;

 private:
  const Rows queries_, items_;
  const bool cosine_;
  const Kernels& use_ = kernels();
};

// scores[e] is the score of the query and the item of stored entry e of `pairs`, [queries, items],
// to the bit that of `topk`. `item_norms` may be null: they are then computed.
template <class Index>
void pair_scores(const MatrixView& queries, const MatrixView& items, const double* item_norms,
                 const CsrView<Index>& pairs, bool cosine, int threads, Cancel& cancel,
                 float* scores);

}  // namespace ngame

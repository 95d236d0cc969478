#include "scorer.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <stdexcept>
#include <string>

#include "matrix.h"

namespace ngame {
namespace {

// Rows that a thread takes at a time: to find their norms, and to score their pairs.
constexpr int64_t kRows = 256;
constexpr int64_t kScoredRows = 64;

}  // namespace

Scorer::Scorer(const MatrixView& queries, const MatrixView& items, bool cosine, int threads,
               Cancel& cancel)
    : items_(items),
      cosine_(cosine),
      query_norms_(norms(queries, threads, cancel)),
      item_norms_(norms(items, threads, cancel)) {
  if (cosine || queries.rows == 0 || items.rows == 0) return;
  longest_ = *std::max_element(item_norms_.begin(), item_norms_.end());
  if (longest_ * *std::max_element(query_norms_.begin(), query_norms_.end()) > FLT_MAX) {
    throw std::invalid_argument("products of queries and items may overflow float32");
  }
}

void Scorer::widen(const MatrixView& queries, int64_t row, std::vector<float>& narrow,
                   std::vector<double>& wide) {
  narrow.resize(static_cast<size_t>(padded(queries.cols)));
  copy_row(queries, row, 1.0f, narrow.data());
  wide.assign(narrow.begin(), narrow.end());
}

float Scorer::operator()(int64_t row, const std::vector<double>& wide, int64_t item) const {
  const double scale = cosine_ ? query_norm(row) * item_norm(item) : 1;
  return scale == 0 ? 0 : static_cast<float>(product(items_, item, wide.data()) / scale);
}

double Scorer::product(const MatrixView& matrix, int64_t row, const double* with) const {
  const auto cols = static_cast<size_t>(matrix.cols);
  return matrix.scalar == Scalar::f16 ? use_.dot_f16(matrix.f16(row), with, cols)
                                      : use_.dot_f32(matrix.f32(row), with, cols);
}

std::vector<double> Scorer::norms(const MatrixView& matrix, int threads, Cancel& cancel) const {
  std::vector<double> found(static_cast<size_t>(matrix.rows));
  const int64_t blocks = (matrix.rows + kRows - 1) / kRows;
  parallel_for(blocks, threads, cancel, [&](int64_t block, int) {
    std::vector<float> narrow;
    std::vector<double> wide;
    const int64_t end = std::min(matrix.rows, (block + 1) * kRows);
    for (int64_t row = block * kRows; row < end; ++row) {
      widen(matrix, row, narrow, wide);
      const double norm = std::sqrt(product(matrix, row, wide.data()));
      if (!std::isfinite(norm)) {
        throw std::invalid_argument(std::string(matrix.name) + " has NaN or infinity in row " +
                                    std::to_string(row));
      }
      found[static_cast<size_t>(row)] = cosine_ && norm < FLT_MIN ? 0 : norm;
    }
  });
  return found;
}

template <class Index>
void pair_scores(const MatrixView& queries, const MatrixView& items, const CsrView<Index>& pairs,
                 bool cosine, int threads, Cancel& cancel, float* scores) {
  const Scorer scorer(queries, items, cosine, threads, cancel);
  const int64_t blocks = (pairs.rows + kScoredRows - 1) / kScoredRows;
  parallel_for(blocks, threads, cancel, [&](int64_t block, int) {
    std::vector<float> narrow;
    std::vector<double> wide;
    const int64_t end = std::min(pairs.rows, (block + 1) * kScoredRows);
    for (int64_t row = block * kScoredRows; row < end; ++row) {
      cancel.check();
      const auto entries = pairs.sorted_row(row);
      if (entries.size() == 0) continue;
      Scorer::widen(queries, row, narrow, wide);
      float* to = scores + (entries.begin - pairs.columns);
      for (const Index* item = entries.begin; item != entries.end; ++item) {
        *to++ = scorer(row, wide, *item);
      }
    }
  });
}

template void pair_scores(const MatrixView&, const MatrixView&, const CsrView<int32_t>&, bool, int,
                          Cancel&, float*);
template void pair_scores(const MatrixView&, const MatrixView&, const CsrView<int64_t>&, bool, int,
                          Cancel&, float*);

}  // namespace ngame

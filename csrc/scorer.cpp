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

double product(const Kernels& use, const MatrixView& matrix, int64_t row, const double* with) {
  const auto cols = static_cast<size_t>(matrix.cols);
  return matrix.scalar == Scalar::f16 ? use.dot_f16(matrix.f16(row), with, cols)
                                      : use.dot_f32(matrix.f32(row), with, cols);
}

void widen_row(const MatrixView& matrix, int64_t row, std::vector<float>& narrow,
               std::vector<double>& wide) {
  narrow.resize(static_cast<size_t>(padded(matrix.cols)));
  copy_row(matrix, row, 1.0f, narrow.data());
  wide.assign(narrow.begin(), narrow.end());
}

}  // namespace

std::vector<double> norms_of(const MatrixView& matrix, int threads, Cancel& cancel) {
  const Kernels& use = kernels();
  std::vector<double> norms(static_cast<size_t>(matrix.rows));
  const int64_t blocks = divided_up(matrix.rows, kRows);
  parallel_for(blocks, threads, cancel, [&](int64_t block, int) {
    std::vector<float> narrow;
    std::vector<double> wide;
    const int64_t end = std::min(matrix.rows, (block + 1) * kRows);
    for (int64_t row = block * kRows; row < end; ++row) {
      widen_row(matrix, row, narrow, wide);
      const double norm = std::sqrt(product(use, matrix, row, wide.data()));
      if (!std::isfinite(norm)) reject_value(matrix.name, row);
      norms[static_cast<size_t>(row)] = norm;
    }
  });
  return norms;
}

double Rows::longest() const {
  // Several maxima side by side: one alone waits for each comparison.
  double largest[8] = {};
  int64_t row = 0;
  for (; row + 8 <= matrix.rows; row += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) {
      largest[lane] = norms[row + lane] > largest[lane] ? norms[row + lane] : largest[lane];
    }
  }
  for (; row < matrix.rows; ++row) largest[0] = std::max(largest[0], norms[row]);
  return *std::max_element(largest, largest + 8);
}

Scorer::Scorer(const Rows& queries, const Rows& items, double longest, bool cosine)
    : queries_(queries), items_(items), cosine_(cosine) {
  if (!cosine && longest * queries.longest() > FLT_MAX) {
    throw std::invalid_argument("products of queries and items may overflow float32");
  }
}

void Scorer::widen(int64_t query, std::vector<float>& narrow, std::vector<double>& wide) const {
  widen_row(queries_.matrix, query, narrow, wide);
}

float Scorer::score(int64_t query, const std::vector<double>& wide, int64_t item) const {
  const double scale = cosine_ ? queries_.norms[query] * items_.norms[item] : 1;
  return scale == 0 ? 0
                    : static_cast<float>(product(use_, items_.matrix, item, wide.data()) / scale);
}

template <class Index>
void pair_scores(const MatrixView& queries, const MatrixView& items, const double* item_norms,
                 const CsrView<Index>& pairs, bool cosine, int threads, Cancel& cancel,
                 float* scores) {
  const std::vector<double> query_norms = norms_of(queries, threads, cancel);
  std::vector<double> made;
  if (item_norms == nullptr) made = norms_of(items, threads, cancel);
  const Rows item_rows{items, item_norms == nullptr ? made.data() : item_norms};
  const Scorer scorer({queries, query_norms.data()}, item_rows, item_rows.longest(), cosine);
  const int64_t blocks = divided_up(pairs.rows, kScoredRows);
  parallel_for(blocks, threads, cancel, [&](int64_t block, int) {
    std::vector<float> narrow;
    std::vector<double> wide;
    const int64_t end = std::min(pairs.rows, (block + 1) * kScoredRows);
    for (int64_t query = block * kScoredRows; query < end; ++query) {
      cancel.check();
      const auto entries = pairs.sorted_row(query);
      if (entries.size() == 0) continue;
      scorer.widen(query, narrow, wide);
      float* to = scores + (entries.begin - pairs.columns);
      for (const Index* item = entries.begin; item != entries.end; ++item) {
        *to++ = scorer.score(query, wide, *item);
      }
    }
  });
}

template void pair_scores(const MatrixView&, const MatrixView&, const double*,
                          const CsrView<int32_t>&, bool, int, Cancel&, float*);
template void pair_scores(const MatrixView&, const MatrixView&, const double*,
                          const CsrView<int64_t>&, bool, int, Cancel&, float*);

}  // namespace ngame

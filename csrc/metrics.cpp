#include "metrics.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace ngame {
namespace {

// Rows that share one partial sum; partial sums are added in block order.
constexpr int64_t kBlock = 1024;

template <class Row, class Index>
bool contains(const Row& row, Index column) {
  return std::binary_search(row.begin, row.end, column);
}

// What is summed over the rows for every k.
struct Sums {
  double precision = 0, ndcg = 0, recall = 0;
  double psp = 0, best_psp = 0, psn = 0, best_psn = 0;

  void add(const Sums& other) {
    precision += other.precision;
    ndcg += other.ndcg;
    recall += other.recall;
    psp += other.psp;
    best_psp += other.best_psp;
    psn += other.psn;
    best_psn += other.best_psn;
  }
};

template <class Index, class Score>
class Evaluation {
 public:
  Evaluation(const CsrView<Index>& predictions, const Score* scores, const CsrView<Index>& truth,
             const CsrView<Index>* drop, const float* weights, std::span<const int64_t> ks)
      : predictions_(predictions),
        scores_(scores),
        truth_(truth),
        drop_(drop),
        weights_(weights),
        ks_(ks) {
    // No rank beyond the columns can be a hit.
    const int64_t ranks = std::min(ks.back(), predictions.cols);
    discounts_.reserve(static_cast<size_t>(ranks));
    ideal_.push_back(0);
    for (int64_t rank = 1; rank <= ranks; ++rank) {
      discounts_.push_back(1.0 / std::log2(static_cast<double>(rank) + 1.0));
      ideal_.push_back(ideal_.back() + discounts_.back());
    }
  }

  struct Scratch {
    struct Entry {
      Score score;
      Index label;
    };
    std::vector<Entry> top;
    std::vector<Index> positives;
    std::vector<char> found;
    std::vector<double> best;
  };

  void add_row(int64_t row, Scratch& scratch, std::span<Sums> sums) const {
    rank(row, scratch);
    find_positives(row, scratch);
    const auto positives = static_cast<int64_t>(scratch.positives.size());
    if (positives == 0) return;
    const auto ranks = static_cast<int64_t>(discounts_.size());
    double hits = 0, dcg = 0, psp = 0, psn = 0, best_psp = 0, best_psn = 0;
    int64_t rank = 0;
    for (size_t which = 0; which < ks_.size(); ++which) {
      const int64_t k = ks_[which];
      for (; rank < std::min(k, ranks); ++rank) {
        const double discount = discounts_[rank];
        if (rank < static_cast<int64_t>(scratch.top.size()) && hit(scratch, rank)) {
          hits += 1;
          dcg += discount;
          if (weights_ != nullptr) {
            const double weight = weights_[scratch.top[rank].label];
            psp += weight;
            psn += weight * discount;
          }
        }
        if (weights_ != nullptr && rank < positives) {
          best_psp += scratch.best[rank];
          best_psn += scratch.best[rank] * discount;
        }
      }
      const double size = static_cast<double>(k);
      const double ideal = ideal_[std::min({k, positives, ranks})];
      Sums& sum = sums[which];
      sum.precision += hits / size;
      sum.ndcg += dcg / ideal;
      sum.recall += hits / static_cast<double>(positives);
      sum.psp += psp / size;
      sum.best_psp += best_psp / size;
      sum.psn += psn / ideal;
      sum.best_psn += best_psn / ideal;
    }
  }

 private:
  // The best entries of the row, best first: each one that is better than the last of those so far
  // is put in its place.
  void rank(int64_t row, Scratch& scratch) const {
    const auto entries = predictions_.row(row);
    const Score* const scores = scores_ + predictions_.offsets[row];
    check(row, entries, scores);
    const auto better = [](const auto& a, const auto& b) {
      return a.score != b.score ? a.score > b.score : a.label < b.label;
    };
    auto& top = scratch.top;
    top.clear();
    for (int64_t at = 0; at < entries.size(); ++at) {
      const typename Scratch::Entry entry{scores[at], entries.begin[at]};
      const bool full = top.size() == discounts_.size();
      if (full && !better(entry, top.back())) continue;
      if (drop_ != nullptr && contains(drop_->row(row), entry.label)) continue;
      if (full) top.pop_back();
      top.insert(std::upper_bound(top.begin(), top.end(), entry, better), entry);
    }
  }
  void check(int64_t row, const typename CsrView<Index>::Row& entries, const Score* scores) const {
    bool outside = false;
    bool nan = false;
    for (int64_t at = 0; at < entries.size(); ++at) {
      outside |= entries.begin[at] < 0 || entries.begin[at] >= predictions_.cols;
      nan |= std::isnan(scores[at]);
    }
    if (nan) throw std::invalid_argument("predictions has NaN in row " + std::to_string(row));
    if (!outside) return;
    for (const Index* label = entries.begin; label != entries.end; ++label) {
      if (*label < 0 || *label >= predictions_.cols) predictions_.reject(row, *label);
    }
  }
  void find_positives(int64_t row, Scratch& scratch) const {
    const auto entries = truth_.sorted_row(row);
    scratch.positives.clear();
    for (const Index* label = entries.begin; label != entries.end; ++label) {
      if (drop_ == nullptr || !contains(drop_->sorted_row(row), *label)) {
        scratch.positives.push_back(*label);
      }
    }
    scratch.found.assign(scratch.positives.size(), 0);
    if (weights_ == nullptr) return;
    scratch.best.clear();
    for (const Index label : scratch.positives) scratch.best.push_back(weights_[label]);
    std::sort(scratch.best.begin(), scratch.best.end(), std::greater<>());
  }
  static bool hit(Scratch& scratch, int64_t rank) {
    const Index label = scratch.top[static_cast<size_t>(rank)].label;
    const auto at = std::lower_bound(scratch.positives.begin(), scratch.positives.end(), label);
    if (at == scratch.positives.end() || *at != label) return false;
    char& found = scratch.found[static_cast<size_t>(at - scratch.positives.begin())];
    return found ? false : (found = 1);
  }

  const CsrView<Index>& predictions_;
  const Score* scores_;
  const CsrView<Index>& truth_;
  const CsrView<Index>* drop_;
  const float* weights_;
  std::span<const int64_t> ks_;
  std::vector<double> discounts_, ideal_;
};

}  // namespace

template <class Index, class Score>
Metrics evaluate(const CsrView<Index>& predictions, const Score* scores,
                 const CsrView<Index>& truth, const CsrView<Index>* drop,
                 const float* inverse_propensity, std::span<const int64_t> ks, int threads,
                 Cancel& cancel) {
  const Evaluation<Index, Score> evaluation(predictions, scores, truth, drop, inverse_propensity,
                                            ks);
  const int64_t rows = predictions.rows;
  const int64_t blocks = (rows + kBlock - 1) / kBlock;
  std::vector<Sums> sums(static_cast<size_t>(blocks) * ks.size());
  parallel_for(blocks, threads, cancel, [&](int64_t block, int) {
    typename Evaluation<Index, Score>::Scratch scratch;
    const auto partial = std::span(sums).subspan(static_cast<size_t>(block) * ks.size(), ks.size());
    const int64_t end = std::min(rows, (block + 1) * kBlock);
    for (int64_t row = block * kBlock; row < end; ++row) {
      evaluation.add_row(row, scratch, partial);
    }
  });
  Metrics means;
  const auto ratio = [](double gain, double best) { return best > 0 ? gain / best : 0.0; };
  for (size_t which = 0; which < ks.size(); ++which) {
    Sums total;
    for (size_t block = 0; block < static_cast<size_t>(blocks); ++block) {
      total.add(sums[block * ks.size() + which]);
    }
    const auto count = static_cast<double>(rows);
    means.precision.push_back(total.precision / count);
    means.ndcg.push_back(total.ndcg / count);
    means.recall.push_back(total.recall / count);
    if (inverse_propensity == nullptr) continue;
    means.psp.push_back(ratio(total.psp, total.best_psp));
    means.psn.push_back(ratio(total.psn, total.best_psn));
  }
  return means;
}

#define NGAME_INSTANTIATE(Index, Score)                                                         \
  template Metrics evaluate(const CsrView<Index>&, const Score*, const CsrView<Index>&,         \
                            const CsrView<Index>*, const float*, std::span<const int64_t>, int, \
                            Cancel&);
NGAME_INSTANTIATE(int32_t, float)
NGAME_INSTANTIATE(int32_t, double)
NGAME_INSTANTIATE(int64_t, float)
NGAME_INSTANTIATE(int64_t, double)

}  // namespace ngame

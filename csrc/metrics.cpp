#include "metrics.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <type_traits>

namespace ngame {
namespace {

// Rows that share one partial sum; partial sums are added in block order.
constexpr int64_t kBlock = 1024;

// Entries read between two checks whether the call was stopped.
constexpr int64_t kMostUnchecked = 1 << 16;

// Rows with more positives than this are ranked by sorting, others by counting.
constexpr size_t kMostCounted = 64;

// What is summed over the rows for every k. The gains that P and PSP divide by k are divided once,
// at the end.
struct Sums {
  double hits = 0, ndcg = 0, recall = 0, reciprocal = 0, average = 0, hit_rate = 0;
  double psp = 0, best_psp = 0, psn = 0, best_psn = 0;

  void add(const Sums& other) {
    hits += other.hits;
    ndcg += other.ndcg;
    recall += other.recall;
    reciprocal += other.reciprocal;
    average += other.average;
    hit_rate += other.hit_rate;
    psp += other.psp;
    best_psp += other.best_psp;
    psn += other.psn;
    best_psn += other.best_psn;
  }
};

// The predictions of one row, in any order. The scans have no branches, so that the compiler can
// vectorize them; for rows of hundreds they beat a search, and a selection of the best, in which
// the CPU mispredicts every branch.
template <class Index, class Score>
struct Predictions {
  const Index* labels;
  const Score* scores;
  int64_t size;

  struct Entry {
    Score score;
    Index label;
    bool operator<(const Entry& other) const {  // the better one comes first
      return score != other.score ? score > other.score : label < other.label;
    }
  };
  Entry operator[](int64_t position) const { return {scores[position], labels[position]}; }

  // The number of entries that come before `entry`.
  int64_t count_before(const Entry& entry) const {
    // As wide as what is compared, or the loop is not vectorized.
    std::conditional_t<sizeof(Score) + sizeof(Index) == 8, int32_t, int64_t> count = 0;
    for (int64_t i = 0; i < size; ++i) {
      count += (scores[i] > entry.score) | ((scores[i] == entry.score) & (labels[i] < entry.label));
    }
    return count;
  }
  // visit(score) for each entry of a label; there is more than one only if it is stored twice.
  template <class Visit>
  void for_each(Index label, const Visit& visit) const {
    using Position = std::make_unsigned_t<Index>;
    Position matches = 0, sum_of_positions = 0;
    for (Position i = 0; i < static_cast<Position>(size); ++i) {
      const Position match = labels[i] == label;
      matches += match;
      sum_of_positions += i & (Position{0} - match);
    }
    if (matches == 1) visit(scores[sum_of_positions]);
    if (matches <= 1) return;
    for (int64_t i = 0; i < size; ++i) {
      if (labels[i] == label) visit(scores[i]);
    }
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
    // Ranks beyond the longest row, or beyond the columns, which bound the positives, gain nothing.
    int64_t ranks = predictions.cols;
    for (int64_t row = 0; ranks < ks.back() && row < predictions.rows; ++row) {
      ranks = std::max(ranks, predictions.row(row).size());
    }
    ranks = std::min(ranks, ks.back());
    discounts_.reserve(static_cast<size_t>(ranks));
    ideal_.push_back(0);
    for (int64_t rank = 1; rank <= ranks; ++rank) {
      discounts_.push_back(1.0 / std::log2(static_cast<double>(rank) + 1.0));
      ideal_.push_back(ideal_.back() + discounts_.back());
    }
  }

  using Row = Predictions<Index, Score>;
  using Entry = typename Row::Entry;
  struct Hit {
    int64_t rank;  // from 0
    Index label;
  };
  struct Scratch {
    std::vector<Index> positives;
    std::vector<Entry> entries;
    std::vector<char> found;
    std::vector<Hit> hits;
    std::vector<double> best;
  };

  // Returns how many entries were read.
  int64_t add_row(int64_t row, Scratch& scratch, std::span<Sums> sums) const {
    std::span<const Index> positives = labels(&truth_, row);
    if (weights_ != nullptr) {
      // Needed last; with many labels they are in no cache.
      for (const Index label : positives) __builtin_prefetch(weights_ + label);
    }
    const std::span<const Index> dropped = labels(drop_, row);
    const Row predicted = predictions(row);
    const int64_t entries = std::ssize(positives) + std::ssize(dropped) + predicted.size;
    if (!dropped.empty()) {
      scratch.positives.clear();
      std::set_difference(positives.begin(), positives.end(), dropped.begin(), dropped.end(),
                          std::back_inserter(scratch.positives));
      positives = scratch.positives;
    }
    if (positives.empty()) return entries;
    scratch.hits.clear();
    if (positives.size() + dropped.size() <= kMostCounted) {
      count_for_hits(predicted, positives, dropped, scratch);
    } else {
      sort_for_hits(predicted, positives, dropped, scratch);
    }
    const auto earlier = [](const Hit& one, const Hit& other) { return one.rank < other.rank; };
    std::sort(scratch.hits.begin(), scratch.hits.end(), earlier);
    add_hits(scratch.hits, static_cast<int64_t>(positives.size()), sums);
    if (weights_ != nullptr) add_best(positives, scratch.best, sums);
    return entries;
  }

 private:
  int64_t ranks() const { return static_cast<int64_t>(discounts_.size()); }

  // The weight of a label, which may have changed since it was checked; NaN would break a sort.
  float weight(Index label) const {
    if (label < 0 || label >= truth_.cols) truth_.reject_change();
    const float value = weights_[label];
    if (value != value) throw std::invalid_argument("inverse_propensity has NaN");
    return value;
  }

  static std::span<const Index> labels(const CsrView<Index>* matrix, int64_t row) {
    if (matrix == nullptr) return {};
    const auto entries = matrix->sorted_row(row);
    return {entries.begin, entries.end};
  }

  // The predictions of a row, after a check that labels are in range and no score is NaN.
  Row predictions(int64_t row) const {
    const auto entries = predictions_.row(row);
    const Score* const scores = scores_ + (entries.begin - predictions_.columns);
    // Negative where a label is below 0 or above the last one.
    const auto last = static_cast<Index>(predictions_.cols - 1);
    Index outside = 0;
    std::conditional_t<sizeof(Score) == 4, int32_t, int64_t> nan = 0;
    for (int64_t i = 0; i < entries.size(); ++i) {
      const Index label = entries.begin[i];
      outside |= label | (last - (label & std::numeric_limits<Index>::max()));
      nan |= scores[i] != scores[i];
    }
    if (nan != 0) {
      throw std::invalid_argument("predictions has NaN in row " + std::to_string(row));
    }
    if (outside < 0) {
      for (const Index* label = entries.begin; label != entries.end; ++label) {
        if (*label < 0 || *label >= predictions_.cols) predictions_.reject(row, *label);
      }
    }
    return {entries.begin, scores, entries.size()};
  }

  // The rank of each positive, from the number of entries that come before it.
  void count_for_hits(const Row& predicted, std::span<const Index> positives,
                      std::span<const Index> dropped, Scratch& scratch) const {
    auto& left_out = scratch.entries;
    left_out.clear();
    for (const Index label : dropped) {
      predicted.for_each(label, [&](Score score) { left_out.push_back({score, label}); });
    }
    for (const Index label : positives) {
      int64_t rank = ranks();
      predicted.for_each(label, [&](Score score) {
        const Entry entry{score, label};
        const auto before = [&](const Entry& other) { return other < entry; };
        rank = std::min(rank, predicted.count_before(entry) -
                                  std::count_if(left_out.begin(), left_out.end(), before));
      });
      if (rank < ranks()) scratch.hits.push_back({rank, label});
    }
  }

  // The same by sorting, for rows with many positives.
  void sort_for_hits(const Row& predicted, std::span<const Index> positives,
                     std::span<const Index> dropped, Scratch& scratch) const {
    auto& entries = scratch.entries;
    entries.clear();
    for (int64_t position = 0; position < predicted.size; ++position) {
      const Entry entry = predicted[position];
      if (!std::binary_search(dropped.begin(), dropped.end(), entry.label)) {
        entries.push_back(entry);
      }
    }
    const auto end = entries.begin() + std::min(std::ssize(entries), ranks());
    std::partial_sort(entries.begin(), end, entries.end());
    scratch.found.assign(positives.size(), 0);
    for (auto entry = entries.begin(); entry != end; ++entry) {
      const auto positive = std::lower_bound(positives.begin(), positives.end(), entry->label);
      if (positive == positives.end() || *positive != entry->label) continue;
      char& found = scratch.found[static_cast<size_t>(positive - positives.begin())];
      if (found == 0) scratch.hits.push_back({entry - entries.begin(), entry->label});
      found = 1;
    }
  }

  // `hits` are in the order of their ranks.
  void add_hits(std::span<const Hit> hits, int64_t positives, std::span<Sums> sums) const {
    for (size_t which = 0; which < ks_.size(); ++which) {
      double count = 0, dcg = 0, precisions = 0, psp = 0, psn = 0;
      for (const Hit& hit : hits) {
        if (hit.rank >= ks_[which]) break;
        const double discount = discounts_[hit.rank];
        count += 1;
        dcg += discount;
        precisions += count / static_cast<double>(hit.rank + 1);
        if (weights_ == nullptr) continue;
        psp += weight(hit.label);
        psn += weight(hit.label) * discount;
      }
      if (count == 0) continue;
      const double ideal = ideal_[std::min({ks_[which], positives, ranks()})];
      Sums& sum = sums[which];
      sum.hits += count;
      sum.ndcg += dcg / ideal;
      sum.recall += count / static_cast<double>(positives);
      sum.reciprocal += 1.0 / static_cast<double>(hits[0].rank + 1);
      sum.average += precisions / static_cast<double>(std::min(ks_[which], positives));
      sum.hit_rate += 1;
      sum.psp += psp;
      sum.psn += psn / ideal;
    }
  }

  // What the best possible ranking gains.
  void add_best(std::span<const Index> positives, std::vector<double>& best,
                std::span<Sums> sums) const {
    best.clear();
    for (const Index label : positives) best.push_back(weight(label));
    std::sort(best.begin(), best.end(), std::greater<>());
    const int64_t most = std::min(static_cast<int64_t>(best.size()), ranks());
    double psp = 0, psn = 0;
    int64_t rank = 0;
    for (size_t which = 0; which < ks_.size(); ++which) {
      for (; rank < std::min(ks_[which], most); ++rank) {
        psp += best[rank];
        psn += best[rank] * discounts_[rank];
      }
      sums[which].best_psp += psp;
      sums[which].best_psn += psn / ideal_[rank];
    }
  }

  const CsrView<Index>& predictions_;
  const Score* scores_;
  const CsrView<Index>& truth_;
  const CsrView<Index>* drop_;
  const float* weights_;
  std::span<const int64_t> ks_;
  std::vector<double> discounts_;  // of the ranks from 0 on
  std::vector<double> ideal_;      // sums of the first discounts
};

}  // namespace

template <class Index, class Score>
Metrics evaluate(const CsrView<Index>& predictions, const Score* scores,
                 const CsrView<Index>& truth, const CsrView<Index>* drop,
                 const float* inverse_propensity, std::span<const int64_t> ks, bool by_row,
                 int threads, Cancel& cancel) {
  const Evaluation<Index, Score> evaluation(predictions, scores, truth, drop, inverse_propensity,
                                            ks);
  const int64_t rows = predictions.rows;
  const int64_t blocks = divided_up(rows, kBlock);
  // Partial sums, of blocks or of single rows.
  const int64_t parts = by_row ? rows : blocks;
  std::vector<Sums> sums(static_cast<size_t>(parts) * ks.size());
  std::vector<typename Evaluation<Index, Score>::Scratch> scratches(
      static_cast<size_t>(std::min<int64_t>(threads, blocks)));
  parallel_for(blocks, threads, cancel, [&](int64_t block, int thread) {
    auto& scratch = scratches[static_cast<size_t>(thread)];
    const int64_t end = std::min(rows, (block + 1) * kBlock);
    int64_t work = 0;
    for (int64_t row = block * kBlock; row < end; ++row) {
      const auto part = static_cast<size_t>(by_row ? row : block);
      const auto sum = std::span(sums).subspan(part * ks.size(), ks.size());
      if ((work += evaluation.add_row(row, scratch, sum)) <= kMostUnchecked) continue;
      cancel.check();
      work = 0;
    }
  });
  Metrics means;
  const auto ratio = [](double gain, double best) { return best > 0 ? gain / best : 0.0; };
  for (size_t which = 0; which < ks.size(); ++which) {
    Sums total;
    for (size_t part = 0; part < static_cast<size_t>(parts); ++part) {
      total.add(sums[part * ks.size() + which]);
    }
    const auto put = [&](const Sums& sum, double count) {
      const double share = static_cast<double>(rows) / count;
      means.precision.push_back(sum.hits / (count * static_cast<double>(ks[which])));
      means.ndcg.push_back(sum.ndcg / count);
      means.recall.push_back(sum.recall / count);
      means.reciprocal.push_back(sum.reciprocal / count);
      means.average.push_back(sum.average / count);
      means.hit_rate.push_back(sum.hit_rate / count);
      if (inverse_propensity == nullptr) return;
      means.psp.push_back(ratio(sum.psp * share, total.best_psp));
      means.psn.push_back(ratio(sum.psn * share, total.best_psn));
    };
    if (!by_row) put(total, static_cast<double>(rows));
    for (size_t row = 0; by_row && row < static_cast<size_t>(rows); ++row) {
      put(sums[row * ks.size() + which], 1);
    }
  }
  return means;
}

#define NGAME_INSTANTIATE(Index, Score)                                                          \
  template Metrics evaluate(const CsrView<Index>&, const Score*, const CsrView<Index>&,          \
                            const CsrView<Index>*, const float*, std::span<const int64_t>, bool, \
                            int, Cancel&);
NGAME_INSTANTIATE(int32_t, float)
NGAME_INSTANTIATE(int32_t, double)
NGAME_INSTANTIATE(int64_t, float)
NGAME_INSTANTIATE(int64_t, double)

}  // namespace ngame

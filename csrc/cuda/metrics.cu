#include <algorithm>
#include <cmath>
#include <iterator>

#include "csr.h"
#include "metrics.h"

namespace ngame::cuda {
namespace {

// What every row adds to, for each k.
enum Family {
  kPrecision,
  kNdcg,
  kRecall,
  kReciprocal,
  kAverage,
  kHitRate,
  kPsp,
  kBestPsp,
  kPsn,
  kBestPsn,
  kFamilies
};

constexpr int kSumThreads = 256;

struct Cuts {
  const int64_t* ks;
  int64_t count;
  int64_t ranks;            // the last k, but no more than there are columns
  const double* discounts;  // of each rank
  const double* ideal;      // sums of the discounts before each rank
};

// An entry of a row in the order of the ranking: higher first, ties by lower column.
template <class Score>
struct Ranked {
  Score score;
  int64_t column;  // -1 for none

  __device__ bool before(const Ranked& other) const {
    if (column < 0 || other.column < 0) return column >= 0;
    return score != other.score ? score > other.score : column < other.column;
  }
};

// The entry that follows `last` in the ranking of the entries entry(first) .. entry(end - 1), for
// all lanes of the warp.
template <class Score, class Entry>
__device__ Ranked<Score> next_in_rank(int64_t first, int64_t end, const Ranked<Score>& last,
                                      const Entry& entry) {
  Ranked<Score> best{Score{0}, -1};
  for (int64_t position = first + lane(); position < end; position += kWarp) {
    const Ranked<Score> here = entry(position);
    if ((last.column < 0 || last.before(here)) && here.before(best)) best = here;
  }
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const Ranked<Score> other{__shfl_xor_sync(kAllLanes, best.score, distance),
                              __shfl_xor_sync(kAllLanes, best.column, distance)};
    if (other.before(best)) best = other;
  }
  return best;
}

// A warp for each row; gains[(family * cuts.count + k) * rows + row]. All lanes work out the same
// sums, and the first one writes them.
template <class Index, class Score>
__global__ void rank_rows(Csr<Index> predictions, const Score* scores, Csr<Index> truth,
                          Csr<Index> drop, const float* weights, Cuts cuts, double* gains,
                          Fault nan) {
  const int64_t row = global_warp();
  if (row >= predictions.rows) return;
  const auto dropped = [&](int64_t column) {
    return drop.offsets != nullptr && contains(drop, row, column);
  };
  const int64_t first = predictions.offsets[row];
  const int64_t end = predictions.offsets[row + 1];
  for (int64_t position = first + lane(); position < end; position += kWarp) {
    if (scores[position] != scores[position]) nan.report(row);
  }
  const int64_t truth_first = truth.offsets[row];
  const int64_t truth_end = truth.offsets[row + 1];
  int64_t positives = 0;
  for (int64_t position = truth_first + lane(); position < truth_end; position += kWarp) {
    positives += !dropped(truth.columns[position]);
  }
  positives = warp_sum(positives);
  if (positives == 0) return;

  double hits = 0, dcg = 0, reciprocal = 0, precisions = 0, psp = 0, psn = 0, best_psp = 0,
         best_psn = 0;
  Ranked<Score> last{Score{0}, -1};
  Ranked<float> last_best{0, -1};
  bool more = true;
  int64_t rank = 0;
  for (int64_t which = 0; which < cuts.count; ++which) {
    const int64_t k = cuts.ks[which];
    for (; rank < k && rank < cuts.ranks; ++rank) {
      const double discount = cuts.discounts[rank];
      if (more) {
        last = next_in_rank(first, end, last, [&](int64_t position) {
          const int64_t column = predictions.columns[position];
          return Ranked<Score>{scores[position], dropped(column) ? -1 : column};
        });
        more = last.column >= 0;
      }
      if (more && contains(truth, row, last.column)) {
        hits += 1;
        dcg += discount;
        precisions += hits / static_cast<double>(rank + 1);
        if (reciprocal == 0) reciprocal = 1.0 / static_cast<double>(rank + 1);
        if (weights != nullptr) {
          psp += weights[last.column];
          psn += weights[last.column] * discount;
        }
      }
      if (weights != nullptr && rank < positives) {
        last_best = next_in_rank(truth_first, truth_end, last_best, [&](int64_t position) {
          const int64_t column = truth.columns[position];
          return Ranked<float>{weights[column], dropped(column) ? -1 : column};
        });
        best_psp += last_best.score;
        best_psn += last_best.score * discount;
      }
    }
    if (lane() != 0) continue;
    int64_t ideal_ranks = k < positives ? k : positives;
    if (cuts.ranks < ideal_ranks) ideal_ranks = cuts.ranks;
    const double ideal = cuts.ideal[ideal_ranks];
    const auto size = static_cast<double>(k);
    const auto put = [&](Family family, double gain) {
      gains[(family * cuts.count + which) * predictions.rows + row] = gain;
    };
    put(kPrecision, hits / size);
    put(kNdcg, dcg / ideal);
    put(kRecall, hits / static_cast<double>(positives));
    put(kReciprocal, reciprocal);
    put(kAverage, precisions / static_cast<double>(k < positives ? k : positives));
    put(kHitRate, hits > 0 ? 1 : 0);
    put(kPsp, psp / size);
    put(kBestPsp, best_psp / size);
    put(kPsn, psn / ideal);
    put(kBestPsn, best_psn / ideal);
  }
}

// A block for each sum over the rows; always in the same order.
__global__ void sum_rows(const double* gains, int64_t rows, double* sums) {
  auto* const partial = shared_memory<double>();
  const auto self = static_cast<int>(threadIdx.x);
  const int64_t which = blockIdx.x;
  double sum = 0;
  for (int64_t row = self; row < rows; row += kSumThreads) sum += gains[which * rows + row];
  partial[self] = sum;
  for (int width = kSumThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (self < width) partial[self] += partial[self + width];
  }
  if (self == 0) sums[which] = partial[0];
}

template <class T>
T* upload(const Call& call, const std::vector<T>& values) {
  const auto count = static_cast<int64_t>(values.size());
  T* const there = call.buffer<T>(count);
  call.to_device(there, values.data(), count);
  return there;
}

}  // namespace

template <class Index, class Score>
Metrics evaluate(const Call& call, const Csr<Index>& predictions, const Score* scores,
                 const Csr<Index>& truth, const Csr<Index>* drop, const float* inverse_propensity,
                 const std::vector<int64_t>& ks, bool by_row) {
  check(call, predictions);
  check(call, truth);
  if (drop != nullptr) check(call, *drop);

  const int64_t ranks = std::min(ks.back(), predictions.cols);
  std::vector<double> discounts, ideal{0};
  for (int64_t rank = 1; rank <= ranks; ++rank) {
    discounts.push_back(1.0 / std::log2(static_cast<double>(rank) + 1.0));
    ideal.push_back(ideal.back() + discounts.back());
  }
  const auto cut_count = static_cast<int64_t>(ks.size());
  const Cuts cuts{upload(call, ks), cut_count, ranks, upload(call, discounts), upload(call, ideal)};
  const int64_t rows = predictions.rows;
  const int64_t sum_count = kFamilies * cut_count;
  double* const gains = call.buffer<double>(sum_count * rows);
  call.fill(gains, sum_count * rows, 0);
  const Fault nan = Fault::make(call);
  call.for_each_warp(rank_rows<Index, Score>, rows, predictions, scores, truth,
                     drop != nullptr ? *drop : Csr<Index>{}, inverse_propensity, cuts, gains, nan);
  if (const int64_t row = nan.read(call); row >= 0) {
    throw std::invalid_argument("predictions has NaN in row " + std::to_string(row));
  }
  double* const there = call.buffer<double>(sum_count);
  call.launch(sum_rows, sum_count, kSumThreads, kSumThreads * sizeof(double), gains, rows, there);
  std::vector<double> sums(static_cast<size_t>(sum_count));
  call.to_host(sums.data(), there, sum_count);

  std::vector<double> of_rows(static_cast<size_t>(by_row ? sum_count * rows : 0));
  if (by_row) call.to_host(of_rows.data(), gains, sum_count * rows);

  Metrics means;
  const auto ratio = [](double gain, double best) { return best > 0 ? gain / best : 0.0; };
  for (int64_t which = 0; which < cut_count; ++which) {
    const auto place = [&](Family family) { return family * cut_count + which; };
    const auto put = [&](std::vector<double>& values, Family family, Family best) {
      double scale = 1 / static_cast<double>(rows);
      if (best != kFamilies) scale = ratio(1, sums[static_cast<size_t>(place(best))]);
      if (!by_row) values.push_back(sums[static_cast<size_t>(place(family))] * scale);
      const auto first = of_rows.begin() + (by_row ? place(family) * rows : 0);
      const double share = scale * static_cast<double>(rows);
      std::transform(first, first + (by_row ? rows : 0), std::back_inserter(values),
                     [&](double gain) { return gain * share; });
    };
    put(means.precision, kPrecision, kFamilies);
    put(means.ndcg, kNdcg, kFamilies);
    put(means.recall, kRecall, kFamilies);
    put(means.reciprocal, kReciprocal, kFamilies);
    put(means.average, kAverage, kFamilies);
    put(means.hit_rate, kHitRate, kFamilies);
    if (inverse_propensity == nullptr) continue;
    put(means.psp, kPsp, kBestPsp);
    put(means.psn, kPsn, kBestPsn);
  }
  return means;
}

#define NGAME_INSTANTIATE(Index, Score)                                                      \
  template Metrics evaluate(const Call&, const Csr<Index>&, const Score*, const Csr<Index>&, \
                            const Csr<Index>*, const float*, const std::vector<int64_t>&, bool);
NGAME_INSTANTIATE(int32_t, float)
NGAME_INSTANTIATE(int32_t, double)
NGAME_INSTANTIATE(int64_t, float)
NGAME_INSTANTIATE(int64_t, double)
#undef NGAME_INSTANTIATE

}  // namespace ngame::cuda

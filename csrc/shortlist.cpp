#include "shortlist.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ngame {

void advise_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr size_t kLeast = size_t{4} << 20, kPage = 4096;
  if (bytes < kLeast) return;
  const size_t skipped = -reinterpret_cast<uintptr_t>(data) % kPage;
  // Advice only: where the system has none, the pages stay small.
  madvise(static_cast<char*>(data) + skipped, bytes - skipped, MADV_HUGEPAGE);
#endif
}

namespace {

constexpr int64_t kBlock = 256;

// Labels that may be looked at, within a cluster, before the next look for a signal.
constexpr int64_t kMostUnchecked = 1 << 16;

template <class Body>
void for_rows(int64_t rows, int threads, Cancel& cancel, const Body& body) {
  parallel_for((rows + kBlock - 1) / kBlock, threads, cancel, [&](int64_t block, int thread) {
    const int64_t end = std::min(rows, (block + 1) * kBlock);
    for (int64_t row = block * kBlock; row < end; ++row) body(row, thread);
  });
}

// offsets[r + 1] holds the size of row r and becomes its end.
template <class Score>
void allocate(Sparse<Score>& out) {
  for (size_t row = 1; row < out.offsets.size(); ++row) out.offsets[row] += out.offsets[row - 1];
  out.columns = Buffer<int32_t>(out.offsets.back());
  out.values = Buffer<Score>(out.offsets.back());
}

// The first place from `at` on whose column is not below `column`. Steps double, so that a long run
// costs little.
template <class Index>
const Index* gallop(const Index* at, const Index* end, Index column) {
  if (at == end || *at >= column) return at;
  ptrdiff_t step = 1;
  while (step < end - at && at[step] < column) {
    at += step;
    step *= 2;
  }
  return std::lower_bound(at + 1, at + std::min(step, end - at), column);
}

// Walks through two rows: only_first(begin, end) and only_second(begin, end) for runs of columns
// that one of them has, both(in first, in second) for a column of both.
template <class Index, class First, class Second, class Both>
void walk(const typename CsrView<Index>::Row& first, const typename CsrView<Index>::Row& second,
          const First& only_first, const Second& only_second, const Both& both) {
  const Index* one = first.begin;
  const Index* two = second.begin;
  while (one != first.end && two != second.end) {
    const Index* const until = gallop(one, first.end, *two);
    only_first(one, until);
    one = until;
    if (one == first.end) break;
    const Index* const up_to = gallop(two, second.end, *one);
    only_second(two, up_to);
    two = up_to;
    if (two != second.end && *one == *two) both(one++, two++);
  }
  only_first(one, first.end);
  only_second(two, second.end);
}

// The offsets of a result whose row `row` has size(row, columns that both matrices have) entries.
template <class Score, class Index, class Size>
Sparse<Score> allocate_for(const CsrView<Index>& first, const CsrView<Index>& second, int threads,
                           Cancel& cancel, const Size& size) {
  Sparse<Score> out;
  out.offsets.assign(static_cast<size_t>(first.rows) + 1, 0);
  for_rows(first.rows, threads, cancel, [&](int64_t row, int) {
    int64_t common = 0;
    const auto nothing = [](const Index*, const Index*) {};
    const auto count = [&](const Index*, const Index*) { ++common; };
    walk<Index>(first.sorted_row(row), second.sorted_row(row), nothing, nothing, count);
    out.offsets[row + 1] = size(row, common);
  });
  allocate(out);
  return out;
}

// The labels of a cluster's rows, ascending, each with the number of rows that have it.
class ClusterLabels {
 public:
  template <class Index>
  void collect(const CsrView<Index>& labels, std::span<const int32_t> rows) {
    all_.clear();
    for (const int32_t row : rows) {
      const auto entries = labels.sorted_row(row);
      all_.insert(all_.end(), entries.begin, entries.end);
    }
    std::sort(all_.begin(), all_.end());
    ids_.clear();
    counts_.clear();
    for (auto at = all_.begin(); at != all_.end();) {
      const auto next = std::find_if(at, all_.end(), [&](int32_t id) { return id != *at; });
      ids_.push_back(*at);
      counts_.push_back(static_cast<int32_t>(next - at));
      at = next;
    }
    with_count_.assign(rows.size() + 1, 0);
    for (const int32_t count : counts_) ++with_count_[count];
  }
  int64_t size() const { return std::ssize(ids_); }

  // Writes `kept` labels that a row has not: the most frequent ones, ties by lower id.
  template <class Row>
  void copy_others(const Row& own, int64_t kept, int32_t* ids, float* counts) {
    places_.clear();
    auto from = ids_.begin();
    for (auto label = own.begin; label != own.end; ++label) {
      from = std::lower_bound(from, ids_.end(), static_cast<int32_t>(*label));
      places_.push_back(from++ - ids_.begin());
    }
    if (kept < size() - own.size()) {
      copy_frequent(kept, ids, counts);
      return;
    }
    // What lies between the row's own labels.
    int64_t begin = 0;
    for (size_t next = 0; next <= places_.size(); ++next) {
      const int64_t end = next < places_.size() ? places_[next] : size();
      ids = std::copy(ids_.data() + begin, ids_.data() + end, ids);
      for (int64_t at = begin; at < end; ++at) *counts++ = static_cast<float>(counts_[at]);
      begin = end + 1;
    }
  }

 private:
  void copy_frequent(int64_t kept, int32_t* ids, float* counts) {
    // The row's own labels count for nothing, for as long as this takes.
    own_counts_.clear();
    for (const int64_t place : places_) {
      own_counts_.push_back(std::exchange(counts_[place], 0));
      --with_count_[own_counts_.back()];
    }
    // All more frequent than `least` stay, and `equals` of those that are just as frequent.
    auto least = static_cast<int32_t>(with_count_.size() - 1);
    int64_t equals = kept;
    while (equals > with_count_[least]) equals -= with_count_[least--];
    int64_t at = 0;
    for (int64_t place = 0; at < kept; ++place) {
      const int32_t count = counts_[place];
      if (count < least || (count == least && equals-- <= 0)) continue;
      ids[at] = ids_[place];
      counts[at++] = static_cast<float>(count);
    }
    for (size_t own = 0; own < places_.size(); ++own) {
      counts_[places_[own]] = own_counts_[own];
      ++with_count_[own_counts_[own]];
    }
  }

  std::vector<int32_t> all_, ids_, counts_;
  std::vector<int64_t> with_count_;  // the number of labels that so many rows have
  std::vector<int64_t> places_;      // of a row's own labels
  std::vector<int32_t> own_counts_;
};

}  // namespace

template <class Index, class Score>
Sparse<Score> keep_topk(const CsrView<Index>& matrix, const Score* values, int64_t k, int threads,
                        Cancel& cancel) {
  Sparse<Score> out;
  out.offsets.assign(static_cast<size_t>(matrix.rows) + 1, 0);
  for (int64_t row = 0; row < matrix.rows; ++row) {
    out.offsets[row + 1] = std::min(k, matrix.row(row).size());
  }
  allocate(out);
  std::vector<std::vector<Score>> scratches(
      static_cast<size_t>(std::min<int64_t>(threads, matrix.rows)));
  for_rows(matrix.rows, threads, cancel, [&](int64_t row, int thread) {
    const auto entries = matrix.sorted_row(row);
    const Score* const scores = values + matrix.offsets[row];
    if (std::any_of(scores, scores + entries.size(), [](Score s) { return std::isnan(s); })) {
      throw std::invalid_argument(std::string(matrix.name) + " has NaN in row " +
                                  std::to_string(row));
    }
    const int64_t kept = out.offsets[row + 1] - out.offsets[row];
    if (kept == 0) return;
    // All above the score that comes last stay, and of those that equal it the first ones.
    Score last = -std::numeric_limits<Score>::infinity();
    int64_t equals = kept;
    if (kept < entries.size()) {
      auto& best = scratches[static_cast<size_t>(thread)];
      best.assign(scores, scores + entries.size());
      std::nth_element(best.begin(), best.begin() + kept - 1, best.end(), std::greater<>());
      last = best[static_cast<size_t>(kept - 1)];
      equals = kept - std::count_if(best.begin(), best.begin() + kept,
                                    [&](Score score) { return score > last; });
    }
    int64_t at = out.offsets[row];
    for (int64_t entry = 0; entry < entries.size(); ++entry) {
      const Score score = scores[entry];
      if (!(score > last) && (score != last || equals-- <= 0)) continue;
      out.columns[at] = static_cast<int32_t>(entries.begin[entry]);
      out.values[at++] = score;
    }
  });
  return out;
}

template <class Index, class Score>
Sparse<Score> merge(const CsrView<Index>& first, const Score* first_values,
                    const CsrView<Index>& second, const Score* second_values, Merge how,
                    int threads, Cancel& cancel) {
  const auto size = [&](int64_t row, int64_t common) {
    return first.row(row).size() + second.row(row).size() - common;
  };
  Sparse<Score> out = allocate_for<Score>(first, second, threads, cancel, size);
  for_rows(first.rows, threads, cancel, [&](int64_t row, int) {
    int32_t* columns = out.columns.data() + out.offsets[row];
    Score* values = out.values.data() + out.offsets[row];
    const auto copy_from = [&](const CsrView<Index>& matrix, const Score* scores) {
      return [&, scores](const Index* begin, const Index* end) {
        const Score* const score = scores + (begin - matrix.columns);
        values = std::copy(score, score + (end - begin), values);
        while (begin != end) *columns++ = static_cast<int32_t>(*begin++);
      };
    };
    const auto both = [&](const Index* one, const Index* two) {
      const Score a = first_values[one - first.columns];
      const Score b = second_values[two - second.columns];
      *values++ = how == Merge::sum ? a + b : a > b || std::isnan(a) ? a : b;
      *columns++ = static_cast<int32_t>(*one);
    };
    walk<Index>(first.row(row), second.row(row), copy_from(first, first_values),
                copy_from(second, second_values), both);
  });
  return out;
}

template <class Index, class Score>
Sparse<Score> drop_pairs(const CsrView<Index>& matrix, const Score* values,
                         const CsrView<Index>& pairs, int threads, Cancel& cancel) {
  const auto size = [&](int64_t row, int64_t common) { return matrix.row(row).size() - common; };
  Sparse<Score> out = allocate_for<Score>(matrix, pairs, threads, cancel, size);
  for_rows(matrix.rows, threads, cancel, [&](int64_t row, int) {
    int64_t at = out.offsets[row];
    const auto copy = [&](const Index* begin, const Index* end) {
      const Score* score = values + (begin - matrix.columns);
      for (; begin != end; ++begin, ++score, ++at) {
        out.columns[at] = static_cast<int32_t>(*begin);
        out.values[at] = *score;
      }
    };
    const auto nothing = [](const Index*, const Index*) {};
    walk<Index>(matrix.row(row), pairs.row(row), copy, nothing, nothing);
  });
  return out;
}

template <class Index>
Sparse<float> cluster_shortlist(const CsrView<Index>& labels, const ClustersView& clusters,
                                std::optional<int64_t> limit, int threads, Cancel& cancel) {
  clusters.check(labels.rows);
  std::vector<ClusterLabels> scratches(
      static_cast<size_t>(std::min<int64_t>(threads, clusters.count())));
  Sparse<float> out;
  out.offsets.assign(static_cast<size_t>(labels.rows) + 1, 0);
  parallel_for(clusters.count(), threads, cancel, [&](int64_t cluster, int thread) {
    ClusterLabels& found = scratches[static_cast<size_t>(thread)];
    found.collect(labels, clusters[cluster]);
    for (const int32_t row : clusters[cluster]) {
      const int64_t others = found.size() - labels.row(row).size();
      out.offsets[row + 1] = limit ? std::min(*limit, others) : others;
    }
  });
  allocate(out);
  parallel_for(clusters.count(), threads, cancel, [&](int64_t cluster, int thread) {
    ClusterLabels& found = scratches[static_cast<size_t>(thread)];
    found.collect(labels, clusters[cluster]);
    int64_t work = 0;
    for (const int32_t row : clusters[cluster]) {
      if ((work += found.size()) > kMostUnchecked) {
        cancel.check();
        work = 0;
      }
      const int64_t begin = out.offsets[row];
      found.copy_others(labels.row(row), out.offsets[row + 1] - begin, out.columns.data() + begin,
                        out.values.data() + begin);
    }
  });
  return out;
}

#define NGAME_INSTANTIATE(Index, Score)                                                         \
  template Sparse<Score> keep_topk(const CsrView<Index>&, const Score*, int64_t, int, Cancel&); \
  template Sparse<Score> merge(const CsrView<Index>&, const Score*, const CsrView<Index>&,      \
                               const Score*, Merge, int, Cancel&);                              \
  template Sparse<Score> drop_pairs(const CsrView<Index>&, const Score*, const CsrView<Index>&, \
                                    int, Cancel&);
NGAME_INSTANTIATE(int32_t, float)
NGAME_INSTANTIATE(int32_t, double)
NGAME_INSTANTIATE(int64_t, float)
NGAME_INSTANTIATE(int64_t, double)
template Sparse<float> cluster_shortlist(const CsrView<int32_t>&, const ClustersView&,
                                         std::optional<int64_t>, int, Cancel&);
template Sparse<float> cluster_shortlist(const CsrView<int64_t>&, const ClustersView&,
                                         std::optional<int64_t>, int, Cancel&);

}  // namespace ngame

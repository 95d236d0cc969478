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

// Entries, or labels of a cluster, handled between two checks whether the call was stopped.
constexpr int64_t kMostUnchecked = 1 << 16;

// body(row, thread) for every row; it returns how many entries that took.
template <class Body>
void for_rows(int64_t rows, int threads, Cancel& cancel, const Body& body) {
  parallel_for(divided_up(rows, kBlock), threads, cancel, [&](int64_t block, int thread) {
    const int64_t end = std::min(rows, (block + 1) * kBlock);
    int64_t work = 0;
    for (int64_t row = block * kBlock; row < end; ++row) {
      if ((work += body(row, thread)) <= kMostUnchecked) continue;
      cancel.check();
      work = 0;
    }
  });
}

// Turns the sizes of the rows in offsets[1 ..] into their ends, and allocates the entries.
template <class Score>
void allocate(Sparse<Score>& out) {
  for (size_t row = 1; row < out.offsets.size(); ++row) out.offsets[row] += out.offsets[row - 1];
  out.columns = Buffer<int32_t>(out.offsets.back());
  out.values = Buffer<Score>(out.offsets.back());
}

// The first entry from `entry` on whose column is not below `column`. Steps double, so that a long
// run costs little.
template <class Index>
const Index* gallop(const Index* entry, const Index* end, Index column) {
  if (entry == end || *entry >= column) return entry;
  ptrdiff_t step = 1;
  while (step < end - entry && entry[step] < column) {
    entry += step;
    step *= 2;
  }
  return std::lower_bound(entry + 1, entry + std::min(step, end - entry), column);
}

// Walks through two rows: only_first(begin, end) and only_second(begin, end) for runs of columns
// that only one of them has, both(in first, in second) for a column of both.
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

// A result with room for size(entries of first, entries of second, columns that both have) in each
// row.
template <class Score, class Index, class Size>
Sparse<Score> allocate_for(const CsrView<Index>& first, const CsrView<Index>& second, int threads,
                           Cancel& cancel, const Size& size) {
  Sparse<Score> out;
  out.offsets.assign(static_cast<size_t>(first.rows) + 1, 0);
  for_rows(first.rows, threads, cancel, [&](int64_t row, int) {
    const auto one = first.sorted_row(row);
    const auto two = second.sorted_row(row);
    int64_t common = 0;
    const auto nothing = [](const Index*, const Index*) {};
    const auto count = [&](const Index*, const Index*) { ++common; };
    walk<Index>(one, two, nothing, nothing, count);
    out.offsets[row + 1] = size(one.size(), two.size(), common);
    return one.size() + two.size();
  });
  allocate(out);
  return out;
}

// The labels of a cluster's rows, ascending, each with the number of rows that have it.
class ClusterLabels {
 public:
  // Copies the labels of the rows, since the caller's may change meanwhile, and counts them.
  template <class Index>
  void collect(const CsrView<Index>& labels, std::span<const int32_t> rows) {
    all_.clear();
    ends_.assign(1, 0);
    for (const int32_t row : rows) {
      const auto entries = labels.sorted_row(row);
      for (const Index* entry = entries.begin; entry != entries.end; ++entry) {
        const auto id = static_cast<int32_t>(*entry);
        if (std::ssize(all_) > ends_.back() && id <= all_.back()) labels.reject_change();
        all_.push_back(id);
      }
      ends_.push_back(std::ssize(all_));
    }
    sorted_ = all_;
    std::sort(sorted_.begin(), sorted_.end());
    ids_.clear();
    counts_.clear();
    for (auto begin = sorted_.begin(); begin != sorted_.end();) {
      const int32_t id = *begin;
      const auto end =
          std::find_if(begin, sorted_.end(), [&](int32_t other) { return other != id; });
      ids_.push_back(id);
      counts_.push_back(static_cast<int32_t>(end - begin));
      begin = end;
    }
    with_count_.assign(rows.size() + 1, 0);
    for (const int32_t count : counts_) ++with_count_[count];
  }
  int64_t size() const { return std::ssize(ids_); }
  // How many labels the row in this position of the cluster lacks.
  int64_t others(size_t position) const { return size() - std::ssize(own(position)); }

  // Writes `kept` labels that this row lacks: the most frequent ones, ties by lower id.
  void copy_others(size_t position, int64_t kept, int32_t* ids, float* counts) {
    own_.clear();
    auto from = ids_.begin();
    for (const int32_t label : own(position)) {
      from = std::lower_bound(from, ids_.end(), label);
      own_.push_back(from++ - ids_.begin());
    }
    if (kept < others(position)) {
      copy_frequent(kept, ids, counts);
      return;
    }
    // The runs between the row's own labels.
    int64_t begin = 0;
    for (size_t next = 0; next <= own_.size(); ++next) {
      const int64_t end = next < own_.size() ? own_[next] : size();
      ids = std::copy(ids_.data() + begin, ids_.data() + end, ids);
      for (int64_t label = begin; label < end; ++label) {
        *counts++ = static_cast<float>(counts_[label]);
      }
      begin = end + 1;
    }
  }

 private:
  std::span<const int32_t> own(size_t position) const {
    return std::span(all_).subspan(ends_[position], ends_[position + 1] - ends_[position]);
  }

  void copy_frequent(int64_t kept, int32_t* ids, float* counts) {
    // Meanwhile the row's own labels count zero.
    own_counts_.clear();
    for (const int64_t label : own_) {
      own_counts_.push_back(std::exchange(counts_[label], 0));
      --with_count_[own_counts_.back()];
    }
    // All labels more frequent than `least` are kept, and the first `equals` of those as frequent.
    auto least = static_cast<int32_t>(with_count_.size() - 1);
    int64_t equals = kept;
    while (equals > with_count_[least]) equals -= with_count_[least--];
    int64_t written = 0;
    for (int64_t label = 0; written < kept; ++label) {
      const int32_t count = counts_[label];
      if (count < least || (count == least && equals-- <= 0)) continue;
      ids[written] = ids_[label];
      counts[written++] = static_cast<float>(count);
    }
    for (size_t i = 0; i < own_.size(); ++i) {
      counts_[own_[i]] = own_counts_[i];
      ++with_count_[own_counts_[i]];
    }
  }

  std::vector<int32_t> all_;   // the labels of the rows, one row after the other
  std::vector<int64_t> ends_;  // of the rows in all_, behind a zero
  std::vector<int32_t> sorted_;
  std::vector<int32_t> ids_, counts_;  // the different labels, and how many rows have each
  std::vector<int64_t> with_count_;    // [c] is the number of labels that c rows have
  std::vector<int64_t> own_;           // positions in ids_ of the labels of one row
  std::vector<int32_t> own_counts_;
};

// The entries of one row of a result, written in order; the room for them was found in a first
// pass, since when the inputs may have changed.
template <class Index, class Score>
class RowWriter {
 public:
  RowWriter(const Sparse<Score>& out, int64_t row, const CsrView<Index>& source)
      : columns_(out.columns.data() + out.offsets[row]),
        values_(out.values.data() + out.offsets[row]),
        room_(out.offsets[row + 1] - out.offsets[row]),
        source_(source) {}

  void put(Index column, Score value) {
    if (room_-- == 0) source_.reject_change();
    *columns_++ = static_cast<int32_t>(column);
    *values_++ = value;
  }
  void put(const Index* begin, const Index* end, const Score* values) {
    if ((room_ -= end - begin) < 0) source_.reject_change();
    values_ = std::copy(values, values + (end - begin), values_);
    while (begin != end) *columns_++ = static_cast<int32_t>(*begin++);
  }
  void finish() const {
    if (room_ != 0) source_.reject_change();
  }

 private:
  int32_t* columns_;
  Score* values_;
  int64_t room_;
  const CsrView<Index>& source_;
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
    const Score* scores = values + (entries.begin - matrix.columns);
    const int64_t kept = out.offsets[row + 1] - out.offsets[row];
    const bool select = 0 < kept && kept < entries.size();
    auto& best = scratches[static_cast<size_t>(thread)];
    if (select) {
      best.assign(scores, scores + entries.size());
      scores = best.data();
    }
    if (std::any_of(scores, scores + entries.size(), [](Score s) { return std::isnan(s); })) {
      throw std::invalid_argument(std::string(matrix.name) + " has NaN in row " +
                                  std::to_string(row));
    }
    // All scores above `last` are kept, and the first `equals` of those equal to it.
    Score last = -std::numeric_limits<Score>::infinity();
    int64_t equals = kept;
    if (select) {
      std::nth_element(best.begin(), best.begin() + kept - 1, best.end(), std::greater<>());
      last = best[static_cast<size_t>(kept - 1)];
      equals = kept - std::count_if(best.begin(), best.begin() + kept,
                                    [&](Score score) { return score > last; });
    }
    RowWriter<Index, Score> writer(out, row, matrix);
    if (kept > 0) {
      scores = values + (entries.begin - matrix.columns);
      for (int64_t entry = 0; entry < entries.size(); ++entry) {
        const Score score = scores[entry];
        if (!(score > last) && (score != last || equals-- <= 0)) continue;
        writer.put(entries.begin[entry], score);
      }
    }
    writer.finish();
    return entries.size();
  });
  return out;
}

template <class Index, class Score>
Sparse<Score> merge(const CsrView<Index>& first, const Score* first_values,
                    const CsrView<Index>& second, const Score* second_values, Merge how,
                    int threads, Cancel& cancel) {
  const auto size = [](int64_t one, int64_t two, int64_t common) { return one + two - common; };
  Sparse<Score> out = allocate_for<Score>(first, second, threads, cancel, size);
  for_rows(first.rows, threads, cancel, [&](int64_t row, int) {
    RowWriter<Index, Score> writer(out, row, first);
    const auto copy_from = [&](const CsrView<Index>& matrix, const Score* scores) {
      return [&, scores](const Index* begin, const Index* end) {
        writer.put(begin, end, scores + (begin - matrix.columns));
      };
    };
    const auto both = [&](const Index* one, const Index* two) {
      const Score a = first_values[one - first.columns];
      const Score b = second_values[two - second.columns];
      writer.put(*one, how == Merge::sum ? a + b : a > b || std::isnan(a) ? a : b);
    };
    const auto one = first.row(row);
    const auto two = second.row(row);
    walk<Index>(one, two, copy_from(first, first_values), copy_from(second, second_values), both);
    writer.finish();
    return one.size() + two.size();
  });
  return out;
}

template <class Index, class Score>
Sparse<Score> drop_pairs(const CsrView<Index>& matrix, const Score* values,
                         const CsrView<Index>& pairs, int threads, Cancel& cancel) {
  const auto size = [](int64_t entries, int64_t, int64_t common) { return entries - common; };
  Sparse<Score> out = allocate_for<Score>(matrix, pairs, threads, cancel, size);
  for_rows(matrix.rows, threads, cancel, [&](int64_t row, int) {
    RowWriter<Index, Score> writer(out, row, matrix);
    const auto copy = [&](const Index* begin, const Index* end) {
      writer.put(begin, end, values + (begin - matrix.columns));
    };
    const auto nothing = [](const Index*, const Index*) {};
    const auto one = matrix.row(row);
    const auto two = pairs.row(row);
    walk<Index>(one, two, copy, nothing, nothing);
    writer.finish();
    return one.size() + two.size();
  });
  return out;
}

template <class Index>
Sparse<float> cluster_shortlist(const CsrView<Index>& labels, const ClustersView& given,
                                std::optional<int64_t> limit, int threads, Cancel& cancel) {
  // Copies: two passes read the clusters, and write where they say.
  const std::vector<int32_t> order(given.order.begin(), given.order.end());
  const std::vector<int64_t> offsets(given.offsets.begin(), given.offsets.end());
  const ClustersView clusters{order, offsets};
  clusters.check(labels.rows);
  std::vector<char> seen(order.size());
  for (const int32_t row : order) {
    if (seen[row]++) throw std::invalid_argument("order has row " + std::to_string(row) + " twice");
  }
  std::vector<ClusterLabels> scratches(
      static_cast<size_t>(std::min<int64_t>(threads, clusters.count())));
  Sparse<float> out;
  out.offsets.assign(static_cast<size_t>(labels.rows) + 1, 0);
  const auto size = [&](const ClusterLabels& found, size_t position) {
    return limit ? std::min(*limit, found.others(position)) : found.others(position);
  };
  parallel_for(clusters.count(), threads, cancel, [&](int64_t cluster, int thread) {
    ClusterLabels& found = scratches[static_cast<size_t>(thread)];
    const auto rows = clusters[cluster];
    found.collect(labels, rows);
    for (size_t i = 0; i < rows.size(); ++i) out.offsets[rows[i] + 1] = size(found, i);
  });
  allocate(out);
  parallel_for(clusters.count(), threads, cancel, [&](int64_t cluster, int thread) {
    ClusterLabels& found = scratches[static_cast<size_t>(thread)];
    const auto rows = clusters[cluster];
    found.collect(labels, rows);
    int64_t work = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      if ((work += found.size()) > kMostUnchecked) {
        cancel.check();
        work = 0;
      }
      const int64_t begin = out.offsets[rows[i]];
      const int64_t kept = out.offsets[rows[i] + 1] - begin;
      if (kept != size(found, i)) labels.reject_change();
      found.copy_others(i, kept, out.columns.data() + begin, out.values.data() + begin);
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

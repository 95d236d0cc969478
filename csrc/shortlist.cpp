#include "shortlist.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace ngame {
namespace {

constexpr int64_t kBlock = 256;

template <class Body>
void for_rows(int64_t rows, int threads, Cancel& cancel, const Body& body) {
  parallel_for((rows + kBlock - 1) / kBlock, threads, cancel, [&](int64_t block, int) {
    const int64_t end = std::min(rows, (block + 1) * kBlock);
    for (int64_t row = block * kBlock; row < end; ++row) body(row);
  });
}

// offsets[r + 1] holds the size of row r and becomes its end.
template <class Score>
void allocate(Sparse<Score>& out) {
  for (size_t row = 1; row < out.offsets.size(); ++row) out.offsets[row] += out.offsets[row - 1];
  out.columns.resize(static_cast<size_t>(out.offsets.back()));
  out.values.resize(static_cast<size_t>(out.offsets.back()));
}

// visit(column, position in first or -1, position in second or -1) for the columns of two rows.
template <class Row, class Visit>
void visit_union(const Row& first, const Row& second, const Visit& visit) {
  auto one = first.begin;
  auto two = second.begin;
  while (one != first.end || two != second.end) {
    if (two == second.end || (one != first.end && *one < *two)) {
      visit(*one, one - first.begin, int64_t{-1});
      ++one;
    } else if (one == first.end || *two < *one) {
      visit(*two, int64_t{-1}, two - second.begin);
      ++two;
    } else {
      visit(*one, one - first.begin, two - second.begin);
      ++one;
      ++two;
    }
  }
}

// Two passes over the pairs of rows of two matrices: `entry` says whether a column of the union
// stays and with which value.
template <class Score, class Index, class Entry>
Sparse<Score> combine(const CsrView<Index>& first, const CsrView<Index>& second, int threads,
                      Cancel& cancel, const Entry& entry) {
  Sparse<Score> out;
  out.offsets.assign(static_cast<size_t>(first.rows) + 1, 0);
  for_rows(first.rows, threads, cancel, [&](int64_t row) {
    int64_t size = 0;
    visit_union(first.sorted_row(row), second.sorted_row(row),
                [&](Index, int64_t one, int64_t two) {
                  Score value;
                  size += entry(row, one, two, value);
                });
    out.offsets[row + 1] = size;
  });
  allocate(out);
  for_rows(first.rows, threads, cancel, [&](int64_t row) {
    int64_t at = out.offsets[row];
    visit_union(first.row(row), second.row(row), [&](Index column, int64_t one, int64_t two) {
      Score value;
      if (!entry(row, one, two, value)) return;
      out.columns[at] = static_cast<int32_t>(column);
      out.values[at++] = value;
    });
  });
  return out;
}

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
  for_rows(matrix.rows, threads, cancel, [&](int64_t row) {
    const auto entries = matrix.sorted_row(row);
    const Score* const scores = values + matrix.offsets[row];
    for (int64_t at = 0; at < entries.size(); ++at) {
      if (std::isnan(scores[at])) {
        throw std::invalid_argument(std::string(matrix.name) + " has NaN in row " +
                                    std::to_string(row));
      }
    }
    // Positions stand for columns: both ascend.
    std::vector<int64_t> best(static_cast<size_t>(entries.size()));
    for (size_t at = 0; at < best.size(); ++at) best[at] = static_cast<int64_t>(at);
    const int64_t kept = out.offsets[row + 1] - out.offsets[row];
    if (kept < entries.size()) {
      std::nth_element(best.begin(), best.begin() + kept, best.end(), [&](int64_t a, int64_t b) {
        return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
      });
      std::sort(best.begin(), best.begin() + kept);
    }
    for (int64_t at = 0; at < kept; ++at) {
      out.columns[out.offsets[row] + at] = static_cast<int32_t>(entries.begin[best[at]]);
      out.values[out.offsets[row] + at] = scores[best[at]];
    }
  });
  return out;
}

template <class Index, class Score>
Sparse<Score> merge(const CsrView<Index>& first, const Score* first_values,
                    const CsrView<Index>& second, const Score* second_values, Merge how,
                    int threads, Cancel& cancel) {
  return combine<Score>(
      first, second, threads, cancel, [&](int64_t row, int64_t one, int64_t two, Score& value) {
        const Score a = one < 0 ? Score{} : first_values[first.offsets[row] + one];
        const Score b = two < 0 ? Score{} : second_values[second.offsets[row] + two];
        if (one < 0 || two < 0) {
          value = one < 0 ? b : a;
        } else if (how == Merge::sum) {
          value = a + b;
        } else {
          value = a > b || std::isnan(a) ? a : b;
        }
        return true;
      });
}

template <class Index, class Score>
Sparse<Score> drop_pairs(const CsrView<Index>& matrix, const Score* values,
                         const CsrView<Index>& pairs, int threads, Cancel& cancel) {
  return combine<Score>(matrix, pairs, threads, cancel,
                        [&](int64_t row, int64_t one, int64_t two, Score& value) {
                          if (one < 0 || two >= 0) return false;
                          value = values[matrix.offsets[row] + one];
                          return true;
                        });
}

template <class Index>
Sparse<float> cluster_shortlist(const CsrView<Index>& labels, const ClustersView& clusters,
                                std::optional<int64_t> limit, int threads, Cancel& cancel) {
  struct Label {
    int32_t id;
    int32_t rows;
  };
  const int64_t most = limit.value_or(std::numeric_limits<int64_t>::max());
  clusters.check(labels.rows);
  // The labels of a cluster's rows, ascending, each with the number of rows that have it.
  const auto labels_of = [&](int64_t cluster) {
    std::vector<int32_t> ids;
    for (const int32_t row : clusters[cluster]) {
      const auto entries = labels.sorted_row(row);
      for (const Index* label = entries.begin; label != entries.end; ++label) {
        ids.push_back(static_cast<int32_t>(*label));
      }
    }
    std::sort(ids.begin(), ids.end());
    std::vector<Label> found;
    for (const int32_t id : ids) {
      if (found.empty() || found.back().id != id) found.push_back({id, 0});
      ++found.back().rows;
    }
    return found;
  };
  Sparse<float> out;
  out.offsets.assign(static_cast<size_t>(labels.rows) + 1, 0);
  parallel_for(clusters.count(), threads, cancel, [&](int64_t cluster, int) {
    const auto all = static_cast<int64_t>(labels_of(cluster).size());
    for (const int32_t row : clusters[cluster]) {
      out.offsets[row + 1] = std::min(most, all - labels.row(row).size());
    }
  });
  allocate(out);
  parallel_for(clusters.count(), threads, cancel, [&](int64_t cluster, int) {
    const std::vector<Label> found = labels_of(cluster);
    std::vector<Label> others;
    for (const int32_t row : clusters[cluster]) {
      const auto own = labels.row(row);
      others.clear();
      const Index* next = own.begin;
      for (const Label& label : found) {
        if (next != own.end && *next == label.id) {
          ++next;
        } else {
          others.push_back(label);
        }
      }
      const int64_t begin = out.offsets[row];
      const int64_t kept = out.offsets[row + 1] - begin;
      if (kept < static_cast<int64_t>(others.size())) {
        std::nth_element(others.begin(), others.begin() + kept, others.end(),
                         [](const Label& a, const Label& b) {
                           return a.rows != b.rows ? a.rows > b.rows : a.id < b.id;
                         });
        std::sort(others.begin(), others.begin() + kept,
                  [](const Label& a, const Label& b) { return a.id < b.id; });
      }
      for (int64_t entry = 0; entry < kept; ++entry) {
        out.columns[begin + entry] = others[entry].id;
        out.values[begin + entry] = static_cast<float>(others[entry].rows);
      }
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

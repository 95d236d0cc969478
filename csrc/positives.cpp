#include "positives.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <utility>

namespace ngame {
namespace {

void check_ids(std::span<const int64_t> ids, int64_t bound, const char* name) {
  for (size_t at = 0; at < ids.size(); ++at) {
    if (ids[at] >= 0 && ids[at] < bound) continue;
    throw std::out_of_range(std::string(name) + "[" + std::to_string(at) + "] is " +
                            std::to_string(ids[at]) + ", out of range for " +
                            std::to_string(bound));
  }
}

void check_entries(int64_t entries) {
  if (entries > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("the result has more than 2**31 - 1 entries");
  }
}

// The labels of some rows, one row after the other. A batch has thousands of rows with a few labels
// each, so that a loop over one row is mostly a wrong guess of where it ends; what follows then
// runs over all labels at once.
template <class Index>
class Gathered {
 public:
  Gathered(const CsrView<Index>& labels, std::span<const int64_t> rows) {
    check_ids(rows, labels.rows, "rows");
    ends_.reserve(rows.size());
    int64_t total = 0;
    for (size_t at = 0; at < rows.size(); ++at) {
      // Rows of a batch lie anywhere, so each is a wait for memory that the next need not share.
      if (at + kAhead < rows.size()) __builtin_prefetch(labels.offsets + rows[at + kAhead]);
      const auto entries = labels.row(rows[at]);
      __builtin_prefetch(entries.begin);
      total += entries.size();
      check_entries(total);
      ends_.push_back(static_cast<int32_t>(total));
    }
    labels_.resize(static_cast<size_t>(1 + total + kStep));
    labels_[0] = std::numeric_limits<int32_t>::max();
    int32_t* to = labels_.data() + 1;
    int32_t begin = 0;
    for (size_t at = 0; at < rows.size(); ++at) {
      const Index first = labels.offsets[rows[at]];
      const Index* const from = labels.columns + first;
      const int32_t size = ends_[at] - begin;
      if (size <= kStep && labels.nonzeros - first >= kStep) {
        // A whole step: what is too much is overwritten by the next row.
        for (int32_t entry = 0; entry < kStep; ++entry) to[entry] = narrow(from[entry]);
      } else {
        for (int32_t entry = 0; entry < size; ++entry) to[entry] = narrow(from[entry]);
      }
      to += size;
      begin = ends_[at];
    }
    if (!sound(static_cast<int32_t>(labels.cols - 1))) {
      for (const int64_t row : rows) labels.sorted_row(row);  // throws
    }
  }

  std::span<const int32_t> labels() const {
    return {labels_.data() + 1, static_cast<size_t>(ends_.empty() ? 0 : ends_.back())};
  }
  // Row i ends before labels()[ends()[i]].
  std::span<const int32_t> ends() const { return ends_; }

 private:
  static constexpr int32_t kStep = 8;
  static constexpr size_t kAhead = 16;

  // A label that no matrix can have stays one.
  static int32_t narrow(Index label) {
    if constexpr (sizeof(Index) == sizeof(int32_t)) return label;
    return (label >> 31) == 0 ? static_cast<int32_t>(label) : -1;
  }

  // Whether the labels are within 0 .. last and ascend, but from one row to the next.
  bool sound(int32_t last) const {
    const auto all = labels();
    const int32_t* const before = labels_.data();
    int32_t descents = 0;
    int32_t outside = 0;  // its sign tells of a label below 0, or above the last one
    for (size_t at = 0; at < all.size(); ++at) {
      descents += all[at] <= before[at];
      outside |= all[at] | (last - (all[at] & std::numeric_limits<int32_t>::max()));
    }
    int32_t begin = 0;
    for (const int32_t end : ends_) {
      descents -= (begin < end) & (all.data()[begin] <= before[begin]);
      begin = end;
    }
    return descents == 0 && outside >= 0;
  }

  std::vector<int32_t> labels_;  // after one that is greater than any, and before room for a step
  std::vector<int32_t> ends_;
};

// Where each label stands among the columns, by open addressing: as large as the batch, not as the
// label set. Three slots of four or more stay empty, so that nearly every search ends at once.
class Places {
 public:
  explicit Places(std::span<const int64_t> columns)
      : shift_(64 - static_cast<int>(std::bit_width(std::max<size_t>(4 * columns.size(), 16) - 1))),
        slots_(size_t{1} << (64 - shift_)) {
    // From the last on, so that a column that repeats is found at its first place.
    for (size_t at = columns.size(); at-- > 0;) {
      const auto label = static_cast<int32_t>(columns[at]);
      Slot& slot = slots_[search(label)];
      if (slot.label == label) {
        next_.resize(columns.size(), -1);
        next_[at] = slot.place;
      }
      slot = {label, static_cast<int32_t>(at)};
    }
  }

  // The first place of a label, or -1.
  int32_t operator[](int32_t label) const { return slots_[search(label)].place; }
  bool repeat() const { return !next_.empty(); }
  // The next place of the same label, or -1.
  int32_t next(int32_t place) const { return next_[static_cast<size_t>(place)]; }

 private:
  struct Slot {
    int32_t label = -1;
    int32_t place = -1;
  };
  size_t search(int32_t label) const {
    size_t at = static_cast<size_t>((static_cast<uint64_t>(label) * 0x9e3779b97f4a7c15u) >> shift_);
    while (slots_[at].label != label && slots_[at].label >= 0) at = (at + 1) & (slots_.size() - 1);
    return at;
  }
  int shift_;
  std::vector<Slot> slots_;
  std::vector<int32_t> next_;  // empty while no column repeats
};

// Sorts (label, position) pairs by label, digit by digit; `labels` bounds the labels.
void radix_sort(std::vector<uint64_t>& pairs, int64_t labels) {
  constexpr int kMostBits = 11;
  const auto last = static_cast<uint64_t>(std::max<int64_t>(labels - 1, 1));
  const int bits = static_cast<int>(std::bit_width(last));
  const int passes = (bits + kMostBits - 1) / kMostBits;
  const int digit = (bits + passes - 1) / passes;
  std::vector<uint64_t> sorted(pairs.size());
  std::vector<uint32_t> starts;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = 32 + pass * digit;
    const auto digit_of = [&](uint64_t pair) { return (pair >> shift) & ((1u << digit) - 1); };
    starts.assign(size_t{1} << digit, 0);
    for (const uint64_t pair : pairs) ++starts[digit_of(pair)];
    uint32_t total = 0;
    for (uint32_t& start : starts) total += std::exchange(start, total);
    for (const uint64_t pair : pairs) sorted[starts[digit_of(pair)]++] = pair;
    pairs.swap(sorted);
  }
}

}  // namespace

template <class Index>
Pattern in_batch_positives(const CsrView<Index>& labels, std::span<const int64_t> rows,
                           std::span<const int64_t> columns) {
  check_ids(columns, labels.cols, "columns");
  const Gathered<Index> gathered(labels, rows);
  const Places places(columns);
  const auto all = gathered.labels();
  Pattern found;
  // How many there are up to each label, the label itself included.
  std::vector<int32_t> counts(all.size() + 1);
  if (places.repeat()) {
    for (size_t at = 0; at < all.size(); ++at) {
      for (int32_t place = places[all[at]]; place >= 0; place = places.next(place)) {
        found.columns.push_back(place);
      }
      check_entries(std::ssize(found.columns));
      counts[at + 1] = static_cast<int32_t>(found.columns.size());
    }
  } else {
    found.columns.resize(all.size() + 1);
    int32_t count = 0;
    for (size_t at = 0; at < all.size(); ++at) {
      const int32_t place = places[all[at]];
      found.columns[count] = place;
      count += place >= 0;
      counts[at + 1] = count;
    }
    found.columns.resize(static_cast<size_t>(count));
  }
  found.offsets.reserve(rows.size() + 1);
  found.offsets.push_back(0);
  for (const int32_t end : gathered.ends()) {
    found.offsets.push_back(counts[end]);
  }
  if (std::is_sorted(columns.begin(), columns.end())) return found;
  for (size_t row = 0; row < rows.size(); ++row) {
    std::sort(found.columns.begin() + found.offsets[row],
              found.columns.begin() + found.offsets[row + 1]);
  }
  return found;
}

template <class Index>
Pattern label_pool(const CsrView<Index>& labels, std::span<const int64_t> rows,
                   std::vector<int32_t>& pool) {
  const Gathered<Index> gathered(labels, rows);
  const auto all = gathered.labels();
  std::vector<uint64_t> pairs(all.size());
  for (size_t at = 0; at < all.size(); ++at) pairs[at] = uint64_t(all[at]) << 32 | at;
  radix_sort(pairs, labels.cols);
  Pattern found;
  found.columns.resize(all.size());
  pool.resize(all.size());
  int64_t before = -1;
  int32_t number = -1;
  for (const uint64_t pair : pairs) {
    const auto label = static_cast<int32_t>(pair >> 32);
    number += label != before;
    before = label;
    pool[number] = label;
    found.columns[pair & 0xffffffff] = number;
  }
  pool.resize(static_cast<size_t>(number + 1));
  found.offsets.assign(1, 0);
  found.offsets.insert(found.offsets.end(), gathered.ends().begin(), gathered.ends().end());
  return found;
}

template Pattern in_batch_positives(const CsrView<int32_t>&, std::span<const int64_t>,
                                    std::span<const int64_t>);
template Pattern in_batch_positives(const CsrView<int64_t>&, std::span<const int64_t>,
                                    std::span<const int64_t>);
template Pattern label_pool(const CsrView<int32_t>&, std::span<const int64_t>,
                            std::vector<int32_t>&);
template Pattern label_pool(const CsrView<int64_t>&, std::span<const int64_t>,
                            std::vector<int32_t>&);

}  // namespace ngame

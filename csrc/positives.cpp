#include "positives.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <utility>

namespace ngame {
namespace {

// A copy of the ids of a batch, which the caller may change meanwhile, after a check of their
// range.
std::vector<int64_t> checked_ids(std::span<const int64_t> given, int64_t bound, const char* name) {
  std::vector<int64_t> ids(given.begin(), given.end());
  for (size_t position = 0; position < ids.size(); ++position) {
    if (ids[position] >= 0 && ids[position] < bound) continue;
    throw std::out_of_range(std::string(name) + "[" + std::to_string(position) + "] is " +
                            std::to_string(ids[position]) + ", out of range for " +
                            std::to_string(bound));
  }
  return ids;
}

void check_entries(int64_t entries) {
  if (entries > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("the result has more than 2**31 - 1 entries");
  }
}

// The labels of some rows, one row after the other. A batch has thousands of rows of a few labels
// each: a loop over each row would mispredict where the row ends, so later loops run over all
// labels at once.
template <class Index>
class Gathered {
 public:
  Gathered(const CsrView<Index>& labels, std::span<const int64_t> given_rows) {
    const std::vector<int64_t> rows = checked_ids(given_rows, labels.rows, "rows");
    ends_.reserve(rows.size());
    std::vector<const Index*> begins(rows.size());
    int64_t total = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      // Rows of a batch lie anywhere in memory: start loading the next ones meanwhile.
      if (i + kAhead < rows.size()) __builtin_prefetch(labels.offsets + rows[i + kAhead]);
      const auto entries = labels.row(rows[i]);
      __builtin_prefetch(entries.begin);
      begins[i] = entries.begin;
      total += entries.size();
      check_entries(total);
      ends_.push_back(static_cast<int32_t>(total));
    }
    labels_.resize(static_cast<size_t>(1 + total + kStep));
    labels_[0] = std::numeric_limits<int32_t>::max();
    const Index* const all_end = labels.columns + labels.nonzeros;
    int32_t* to = labels_.data() + 1;
    int32_t begin = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      const Index* const from = begins[i];
      const int32_t size = ends_[i] - begin;
      if (size <= kStep && all_end - from >= kStep) {
        // Always kStep labels; the next row overwrites the surplus.
        for (int32_t entry = 0; entry < kStep; ++entry) to[entry] = narrow(from[entry]);
      } else {
        for (int32_t entry = 0; entry < size; ++entry) to[entry] = narrow(from[entry]);
      }
      to += size;
      begin = ends_[i];
    }
    if (!sound(static_cast<int32_t>(labels.cols - 1))) {
      for (const int64_t row : rows) labels.sorted_row(row);  // throws, and names the fault
      labels.reject_change();
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

  // -1 for a label beyond 32 bits, which is out of range like the original.
  static int32_t narrow(Index label) {
    if constexpr (sizeof(Index) == sizeof(int32_t)) return label;
    return (label >> 31) == 0 ? static_cast<int32_t>(label) : -1;
  }

  // Whether all labels are in 0 .. last and ascend within each row.
  bool sound(int32_t last) const {
    const auto all = labels();
    const int32_t* const before = labels_.data();
    int32_t descents = 0;
    int32_t outside = 0;  // negative where a label is below 0 or above the last one
    for (size_t i = 0; i < all.size(); ++i) {
      descents += all[i] <= before[i];
      outside |= all[i] | (last - (all[i] & std::numeric_limits<int32_t>::max()));
    }
    int32_t begin = 0;
    for (const int32_t end : ends_) {
      descents -= (begin < end) & (all.data()[begin] <= before[begin]);
      begin = end;
    }
    return descents == 0 && outside >= 0;
  }

  std::vector<int32_t> labels_;  // a value above all labels, the labels, kStep spare places
  std::vector<int32_t> ends_;
};

// The positions of each label among the columns, by open addressing: memory grows with the batch,
// not with the label set. At least three quarters of the slots are empty, so most searches end at
// once.
class Positions {
 public:
  explicit Positions(std::span<const int64_t> columns)
      : shift_(64 - static_cast<int>(std::bit_width(std::max<size_t>(4 * columns.size(), 16) - 1))),
        slots_(size_t{1} << (64 - shift_)) {
    // From the last on, so that the first position of a repeated column is found first.
    for (size_t position = columns.size(); position-- > 0;) {
      const auto label = static_cast<int32_t>(columns[position]);
      Slot& slot = slots_[search(label)];
      if (slot.label == label) {
        next_.resize(columns.size(), -1);
        next_[position] = slot.position;
      }
      slot = {label, static_cast<int32_t>(position)};
    }
  }

  // The first position of a label, or -1.
  int32_t operator[](int32_t label) const { return slots_[search(label)].position; }
  bool repeat() const { return !next_.empty(); }
  // The next position of the same label, or -1.
  int32_t next(int32_t position) const { return next_[static_cast<size_t>(position)]; }

 private:
  struct Slot {
    int32_t label = -1;
    int32_t position = -1;
  };
  size_t search(int32_t label) const {
    auto slot = static_cast<size_t>((static_cast<uint64_t>(label) * 0x9e3779b97f4a7c15u) >> shift_);
    while (slots_[slot].label != label && slots_[slot].label >= 0) {
      slot = (slot + 1) & (slots_.size() - 1);
    }
    return slot;
  }
  int shift_;
  std::vector<Slot> slots_;
  std::vector<int32_t> next_;  // empty where no column repeats
};

// Radix sort of (label, position) pairs by label; labels are below `labels`.
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
                           std::span<const int64_t> given_columns) {
  const std::vector<int64_t> columns = checked_ids(given_columns, labels.cols, "columns");
  const Gathered<Index> gathered(labels, rows);
  const Positions positions(columns);
  const auto all = gathered.labels();
  Pattern found;
  // The number of entries found among the labels before each label.
  std::vector<int32_t> counts(all.size() + 1);
  if (positions.repeat()) {
    for (size_t i = 0; i < all.size(); ++i) {
      for (int32_t column = positions[all[i]]; column >= 0; column = positions.next(column)) {
        found.columns.push_back(column);
      }
      check_entries(std::ssize(found.columns));
      counts[i + 1] = static_cast<int32_t>(found.columns.size());
    }
  } else {
    found.columns.resize(all.size() + 1);
    int32_t count = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      const int32_t column = positions[all[i]];
      found.columns[count] = column;
      count += column >= 0;
      counts[i + 1] = count;
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
  for (size_t i = 0; i < all.size(); ++i) pairs[i] = uint64_t(all[i]) << 32 | i;
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

#include "positives.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace ngame {
namespace {

// Label id to a number, by open addressing: as large as the batch, not as the label set.
class LabelMap {
 public:
  explicit LabelMap(size_t expected)
      : shift_(64 - static_cast<int>(std::bit_width(std::max<size_t>(2 * expected, 16) - 1))),
        slots_(size_t{1} << (64 - shift_)) {}

  // The number kept for `label`, which is -1 at first.
  int32_t& operator[](int32_t label) {
    for (size_t at = home(label);; at = (at + 1) & (slots_.size() - 1)) {
      if (slots_[at].label == label) return slots_[at].number;
      if (slots_[at].label < 0) {
        slots_[at].label = label;
        return slots_[at].number;
      }
    }
  }
  int32_t find(int32_t label) const {
    for (size_t at = home(label);; at = (at + 1) & (slots_.size() - 1)) {
      if (slots_[at].label == label || slots_[at].label < 0) return slots_[at].number;
    }
  }

 private:
  size_t home(int32_t label) const {
    return static_cast<size_t>((static_cast<uint64_t>(label) * 0x9e3779b97f4a7c15u) >> shift_);
  }
  struct Slot {
    int32_t label = -1;
    int32_t number = -1;
  };
  int shift_;
  std::vector<Slot> slots_;
};

void check_ids(std::span<const int64_t> ids, int64_t bound, const char* name) {
  for (size_t at = 0; at < ids.size(); ++at) {
    if (ids[at] >= 0 && ids[at] < bound) continue;
    throw std::out_of_range(std::string(name) + "[" + std::to_string(at) + "] is " +
                            std::to_string(ids[at]) + ", out of range for " +
                            std::to_string(bound));
  }
}

void end_row(Pattern& pattern) {
  if (pattern.columns.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    throw std::invalid_argument("the result has more than 2**31 - 1 entries");
  }
  pattern.offsets.push_back(static_cast<int32_t>(pattern.columns.size()));
}

}  // namespace

template <class Index>
Pattern in_batch_positives(const CsrView<Index>& labels, std::span<const int64_t> rows,
                           std::span<const int64_t> columns) {
  check_ids(rows, labels.rows, "rows");
  check_ids(columns, labels.cols, "columns");
  // A column that repeats is a chain from its first place to its last.
  LabelMap first(columns.size());
  std::vector<int32_t> next(columns.size());
  bool repeated = false;
  for (size_t at = columns.size(); at-- > 0;) {
    int32_t& head = first[static_cast<int32_t>(columns[at])];
    repeated |= head >= 0;
    next[at] = head;
    head = static_cast<int32_t>(at);
  }
  Pattern found;
  found.offsets.reserve(rows.size() + 1);
  found.offsets.push_back(0);
  for (const int64_t row : rows) {
    const auto entries = labels.sorted_row(row);
    const auto begin = static_cast<int64_t>(found.columns.size());
    for (const Index* label = entries.begin; label != entries.end; ++label) {
      int32_t place = first.find(static_cast<int32_t>(*label));
      for (; place >= 0; place = next[place]) found.columns.push_back(place);
    }
    std::sort(found.columns.begin() + begin, found.columns.end());
    end_row(found);
  }
  return found;
}

template <class Index>
Pattern label_pool(const CsrView<Index>& labels, std::span<const int64_t> rows,
                   std::vector<int32_t>& pool) {
  check_ids(rows, labels.rows, "rows");
  size_t expected = 0;
  for (const int64_t row : rows) expected += static_cast<size_t>(labels.row(row).size());
  LabelMap numbers(expected);
  pool.clear();
  for (const int64_t row : rows) {
    const auto entries = labels.sorted_row(row);
    for (const Index* label = entries.begin; label != entries.end; ++label) {
      int32_t& number = numbers[static_cast<int32_t>(*label)];
      if (number >= 0) continue;
      number = 0;
      pool.push_back(static_cast<int32_t>(*label));
    }
  }
  std::sort(pool.begin(), pool.end());
  for (size_t at = 0; at < pool.size(); ++at) numbers[pool[at]] = static_cast<int32_t>(at);
  Pattern found;
  found.offsets.reserve(rows.size() + 1);
  found.offsets.push_back(0);
  found.columns.reserve(expected);
  for (const int64_t row : rows) {
    const auto entries = labels.row(row);
    for (const Index* label = entries.begin; label != entries.end; ++label) {
      found.columns.push_back(numbers.find(static_cast<int32_t>(*label)));
    }
    end_row(found);
  }
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

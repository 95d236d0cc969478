#include "sparse_topk.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "aligned.h"
#include "kernels.h"
#include "scorer.h"

namespace ngame {
namespace {

constexpr int64_t kBlock = SparseItems::kBlock;
constexpr uint32_t kPlaceMask = SparseItems::kMostRows - 1;

// A column is common where at least one item in so many has it.
constexpr int64_t kCommon = 32;

// All sums are exact where they take at most so many times the entries of as many items as wanted.
constexpr double kExactSums = 4;

// Columns are left out of the sums where they can add at most this share of the k-th best score.
constexpr double kLeftOut = 0.3;

// Sums are integers, of 16 bits if they can tell items apart: up to so many columns of a query.
constexpr int32_t kMostTerms = 700;

// What the largest sum may be, and how many bits below the unit products are rounded to.
template <class Sum>
struct Units;
template <>
struct Units<int16_t> {
  static constexpr int32_t kMost = 32000;
  static constexpr int kShift = 16;
  using Product = int32_t;
};
template <>
struct Units<int32_t> {
  static constexpr int32_t kMost = 1 << 29;
  static constexpr int kShift = 8;
  using Product = int64_t;
};

constexpr int64_t kQueriesOfJob = 32;

// An item with so many entries for each of the query's is searched for the query's columns.
constexpr int64_t kLongRow = 8;

// The square of the norm of a row; throws at NaN, infinity and bad columns.
template <class Index>
double squared_norm(const WeightedRows<Index>& rows, int64_t row) {
  const auto entries = rows.pattern.sorted_row(row);
  const float* value = rows.values + (entries.begin - rows.pattern.columns);
  double sum = 0;
  for (int64_t entry = 0; entry < entries.size(); ++entry) {
    sum += static_cast<double>(value[entry]) * static_cast<double>(value[entry]);
  }
  if (!std::isfinite(sum)) reject_value(rows.pattern.name, row);
  return sum;
}

template <class Index>
void add_part(const WeightedRows<Index>& items, int64_t first_row, Cancel& cancel,
              SparseItems& out) {
  const auto& pattern = items.pattern;
  const int64_t rows = std::min(SparseItems::kMostRows, pattern.rows - first_row);
  SparseItems::Part part;
  part.offsets.assign(static_cast<size_t>(out.cols) + 1, 0);
  // Rows with equal norms in the common columns stand together, so that their blocks have close
  // bounds. Buckets are fine enough.
  constexpr size_t kBuckets = 4096;
  std::vector<float> norms(static_cast<size_t>(rows));
  float heaviest = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (row % 4096 == 0) cancel.check();
    const auto entries = pattern.sorted_row(first_row + row);
    const float* value = items.values + (entries.begin - pattern.columns);
    double sum = 0;
    for (const Index* column = entries.begin; column != entries.end; ++column, ++value) {
      const auto c = static_cast<size_t>(*column);
      if (c >= out.common.size()) pattern.reject_change();
      ++part.offsets[c + 1];
      if (out.common[c]) sum += static_cast<double>(*value) * static_cast<double>(*value);
    }
    norms[row] = static_cast<float>(std::sqrt(sum) * (1 + 1e-6));
    heaviest = std::max(heaviest, norms[row]);
  }
  const auto bucket_of = [&](int64_t row) {
    return heaviest > 0 ? static_cast<size_t>(norms[row] / heaviest * (kBuckets - 1)) : 0;
  };
  std::vector<int64_t> starts(kBuckets + 1, 0);
  for (int64_t row = 0; row < rows; ++row) ++starts[bucket_of(row) + 1];
  for (size_t bucket = 1; bucket <= kBuckets; ++bucket) starts[bucket] += starts[bucket - 1];
  part.order.resize(static_cast<size_t>(rows));
  part.heaviest.assign(static_cast<size_t>(divided_up(rows, kBlock)), 0);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t place = starts[bucket_of(row)]++;
    part.order[place] = static_cast<int32_t>(first_row + row);
    float& most = part.heaviest[place / kBlock];
    most = std::max(most, norms[row]);
  }
  for (size_t c = 1; c < part.offsets.size(); ++c) part.offsets[c] += part.offsets[c - 1];
  part.entries = Buffer<uint32_t>(part.offsets.back());
  part.values = Buffer<float>(part.offsets.back());
  std::vector<int64_t> next(part.offsets.begin(), part.offsets.end() - 1);
  for (int64_t place = 0; place < rows; ++place) {
    if (place % 4096 == 0) cancel.check();
    const auto entries = pattern.row(part.order[place]);
    const float* value = items.values + (entries.begin - pattern.columns);
    for (const Index* column = entries.begin; column != entries.end; ++column, ++value) {
      const auto c = static_cast<size_t>(*column);
      if (c >= next.size() || next[c] == part.offsets[c + 1]) pattern.reject_change();
      const float largest = out.largest[c];
      const float share = largest > 0 ? *value / largest : 0;
      const auto code =
          static_cast<int32_t>(std::lrint(static_cast<double>(share) * SparseItems::kLargestCode));
      part.values[next[c]] = *value;
      part.entries[next[c]++] =
          static_cast<uint32_t>(code) << SparseItems::kPlaceBits | static_cast<uint32_t>(place);
    }
  }
  for (size_t c = 0; c < next.size(); ++c) {
    if (next[c] != part.offsets[c + 1]) pattern.reject_change();
  }
  out.parts.push_back(std::move(part));
}

// The values of one query, for products with rows of items.
class QueryValues {
 public:
  struct Entry {
    int32_t column;
    float value;
  };

  void clear(int64_t count) {
    bits_ = static_cast<int>(std::bit_width(static_cast<uint64_t>(count) * 16 + 1));
    slots_.assign(size_t{1} << bits_, {-1, 0});
    entries_.clear();
  }
  // Columns come in ascending order.
  void put(int64_t column, float value) {
    uint64_t slot = hash(column);
    while (slots_[slot].column >= 0) slot = (slot + 1) & mask();
    slots_[slot] = {static_cast<int32_t>(column), value};
    entries_.push_back(slots_[slot]);
  }
  const std::vector<Entry>& entries() const { return entries_; }
  // 0 where the query has no such column.
  float operator[](int64_t column) const {
    uint64_t slot = hash(column);
    while (true) {
      const Entry& found = slots_[slot];
      if (found.column == column) return found.value;
      if (found.column < 0) return 0;
      slot = (slot + 1) & mask();
    }
  }

 private:
  uint64_t mask() const { return slots_.size() - 1; }
  uint64_t hash(int64_t column) const {
    return static_cast<uint64_t>(static_cast<uint32_t>(column) * 0x9e3779b1u) >> (32 - bits_);
  }
  int bits_ = 0;
  std::vector<Entry> slots_;
  std::vector<Entry> entries_;
};

// The score of an item: the products in the order of the columns, whichever side is gone through.
template <class Index>
float score_of(const WeightedRows<Index>& items, int64_t item, const QueryValues& query) {
  const auto entries = items.pattern.row(item);
  const float* values = items.values + (entries.begin - items.pattern.columns);
  const auto& asked = query.entries();
  double total = 0;
  if (entries.size() > kLongRow * static_cast<int64_t>(asked.size())) {
    const Index* column = entries.begin;
    for (const auto& entry : asked) {
      column = std::lower_bound(column, entries.end, static_cast<Index>(entry.column));
      if (column == entries.end) break;
      if (*column != static_cast<Index>(entry.column)) continue;
      total +=
          static_cast<double>(entry.value) * static_cast<double>(values[column - entries.begin]);
    }
    return static_cast<float>(total);
  }
  for (const Index* column = entries.begin; column != entries.end; ++column, ++values) {
    total += static_cast<double>(query[*column]) * static_cast<double>(*values);
  }
  return static_cast<float>(total);
}

// A column of a query that items have.
struct Term {
  int64_t column;
  double value;    // of the query
  double weight;   // the same without sign
  double most;     // that it can add to a score
  int32_t factor;  // of a code, for 2**kShift parts of a unit
  const uint32_t* next;
  const uint32_t* end;
};

template <class Index>
class Search {
 public:
  Search(const WeightedRows<Index>& queries, const WeightedRows<Index>& items,
         const SparseItems& prepared, const CsrView<Index>* drop, int64_t k, Cancel& cancel)
      : queries_(queries),
        items_(items),
        prepared_(prepared),
        drop_(drop),
        k_(k),
        cancel_(cancel) {}

  // Appends the best of a query to `out`, ids ascending; returns their number.
  int64_t run(int64_t row, std::vector<Scored>& out) {
    row_ = row;
    dropped_ = drop_ == nullptr ? 0 : drop_->row(row).size();
    found_.clear();
    if (read_query()) {
      const bool coarse = terms_.size() <= kMostTerms;
      if (!worth_rounding() || !(coarse ? sum(coarse_) : sum(fine_))) sum_exactly();
    }
    keep_best();
    std::sort(found_.begin(), found_.end(),
              [](const Scored& a, const Scored& b) { return a.id < b.id; });
    out.insert(out.end(), found_.begin(), found_.end());
    return static_cast<int64_t>(found_.size());
  }

 private:
  // Rounded sums, of items and of candidates.
  template <class Sum>
  struct Sums {
    AlignedVector<Sum> of_block;
    AlignedVector<Sum> of_candidates;
  };

  // Takes the columns of a query that items have; false where there are none.
  bool read_query() {
    const double norm = std::sqrt(squared_norm(queries_, row_));
    if (norm * prepared_.longest > static_cast<double>(std::numeric_limits<float>::max())) {
      throw std::invalid_argument(std::string(queries_.pattern.name) + " has values in row " +
                                  std::to_string(row_) +
                                  " whose products with items overflow float32");
    }
    const auto entries = queries_.pattern.sorted_row(row_);
    const float* value = queries_.values + (entries.begin - queries_.pattern.columns);
    terms_.clear();
    values_.clear(entries.size());
    most_ = 0;
    negative_ = prepared_.negative;
    for (const Index* entry = entries.begin; entry != entries.end; ++entry, ++value) {
      const int64_t column = *entry;
      // It may have changed since it was checked.
      if (column < 0 || column >= prepared_.cols) queries_.pattern.reject_change();
      const float largest = prepared_.largest[static_cast<size_t>(column)];
      if (*value == 0 || largest == 0) continue;
      const double weight = std::fabs(static_cast<double>(*value));
      terms_.push_back({column, static_cast<double>(*value), weight,
                        weight * static_cast<double>(largest), *value < 0 ? -1 : 1, nullptr,
                        nullptr});
      negative_ |= *value < 0;
      values_.put(column, *value);
      most_ += terms_.back().most;
    }
    return !terms_.empty();
  }

  // Whether rounded sums are likely to save work: not where few items have any column of the query,
  // or where rows are so long that exact scores of candidates take longer than all the sums.
  bool worth_rounding() {
    int64_t entries = 0;
    for (const auto& part : prepared_.parts) {
      for (const Term& term : terms_) {
        entries += part.offsets[term.column + 1] - part.offsets[term.column];
      }
    }
    return static_cast<double>(entries) >
           kExactSums * static_cast<double>(wanted()) * std::max(1.0, prepared_.mean_entries);
  }

  // Dropped items may be among the best.
  int64_t wanted() const { return k_ + dropped_; }

  void open(const SparseItems::Part& part) {
    for (Term& term : terms_) {
      term.next = part.entries.data() + part.offsets[term.column];
      term.end = part.entries.data() + part.offsets[term.column + 1];
    }
  }

  // Finds the best items by rounded sums, which leave out what common columns add where it does not
  // matter, and exact scores of those that come close. False where this does not work: few scores
  // are above 0.
  template <class Sum>
  bool sum(Sums<Sum>& sums) {
    constexpr double kMost = Units<Sum>::kMost;
    constexpr double kParts = 1 << Units<Sum>::kShift;
    constexpr double kCodes = SparseItems::kLargestCode;
    const double per_unit = most_ / kMost;
    // Half a code of each term, half a unit and half a part of one a code for their roundings, and
    // one unit for that of the scores.
    const double roundings = (0.512 + 0.5 * kCodes / kParts) * static_cast<double>(terms_.size());
    error_ = static_cast<int32_t>(0.5 * kMost / kCodes + roundings) + 2;
    for (Term& term : terms_) {
      const double units = term.most / per_unit / kCodes * kParts;
      term.factor = (term.factor < 0 ? -1 : 1) * static_cast<int32_t>(std::lrint(units));
    }
    // The common ones first, the most frequent first.
    const auto rest = std::stable_partition(terms_.begin(), terms_.end(), [&](const Term& term) {
      return prepared_.common[static_cast<size_t>(term.column)] != 0;
    });
    const auto frequency = [&](const Term& term) {
      const auto& offsets = prepared_.parts.front().offsets;
      return offsets[term.column + 1] - offsets[term.column];
    };
    std::stable_sort(terms_.begin(), rest,
                     [&](const Term& a, const Term& b) { return frequency(a) > frequency(b); });
    norms_.assign(1, 0);
    double square = 0;
    for (auto term = terms_.begin(); term != rest; ++term) {
      square += term->weight * term->weight;
      norms_.push_back(std::sqrt(square));
    }

    if (sums.of_block.empty()) sums.of_block.assign(static_cast<size_t>(kBlock), Sum{0});
    sums.of_candidates.clear();
    places_.clear();
    slacks_.clear();
    kth_ = 0;
    int64_t block_number = 0;
    for (const auto& part : prepared_.parts) {
      open(part);
      const auto rows = static_cast<int64_t>(part.order.size());
      for (int64_t first = 0; first < rows; first += kBlock, ++block_number) {
        if (block_number % 64 == 0) cancel_.check();
        const double heaviest = static_cast<double>(part.heaviest[first / kBlock]) / per_unit;
        size_t left_out = 0;
        while (!negative_ && left_out + 1 < norms_.size() &&
               norms_[left_out + 1] * heaviest <= kLeftOut * kth_) {
          ++left_out;
        }
        slacks_.push_back(static_cast<int32_t>(std::ceil(norms_[left_out] * heaviest)));
        const int64_t here = std::min(kBlock, rows - first);
        for (size_t t = left_out; t < terms_.size(); ++t) {
          add(terms_[t], static_cast<uint32_t>(first), sums.of_block.data());
        }
        collect(here, block_number, sums);
      }
    }
    tighten(sums.of_candidates);
    if (cut() - *std::max_element(slacks_.begin(), slacks_.end()) < 1) return false;
    score_candidates(per_unit, sums.of_candidates);
    return static_cast<int64_t>(found_.size()) >= k_;
  }

  // Adds what a term adds to the items of a block.
  template <class Sum>
  void add(Term& term, uint32_t first, Sum* const sums) {
    const uint32_t* next = term.next;
    const uint32_t* const end = term.end;
    if (next != end && (*next & kPlaceMask) < first) {  // it was left out before
      next = std::partition_point(next, end,
                                  [&](uint32_t entry) { return (entry & kPlaceMask) < first; });
    }
    const int64_t last = static_cast<int64_t>(first) + kBlock;
    constexpr int kShift = Units<Sum>::kShift;
    using Product = typename Units<Sum>::Product;
    const Product factor = term.factor;
    for (; next != end; ++next) {
      const uint32_t place = *next & kPlaceMask;
      if (place >= last) break;
      const int32_t code = static_cast<int32_t>(*next) >> SparseItems::kPlaceBits;
      const Product product = (code * factor + (1 << (kShift - 1))) >> kShift;
      Sum& total = sums[place % kBlock];
      total = static_cast<Sum>(total + product);
    }
    term.next = next;
  }

  // The least sum that a candidate must have where common columns add nothing.
  int32_t cut() const { return kth_ - 2 * error_; }

  // Takes the candidates of a block, and clears its sums.
  template <class Sum>
  void collect(int64_t count, int64_t block_number, Sums<Sum>& sums) {
    constexpr int64_t kUnit = 64;
    const auto scanned = static_cast<size_t>((count + kUnit - 1) / kUnit * kUnit);
    const size_t before = places_.size();
    auto& candidates = sums.of_candidates;
    candidates.resize(before + scanned);
    places_.resize(before + scanned);
    const size_t found =
        take(sums.of_block.data(), scanned, static_cast<Sum>(std::max(1, cut() - slacks_.back())),
             static_cast<int32_t>(block_number * kBlock), candidates.data() + before,
             places_.data() + before);
    candidates.resize(before + found);
    places_.resize(before + found);
    std::fill_n(sums.of_block.begin(), scanned, Sum{0});
    if (static_cast<int64_t>(places_.size()) >= 2 * wanted()) tighten(candidates);
  }

  // Takes the sums that reach `least`; returns their number.
  size_t take(const int16_t* sums, size_t count, int16_t least, int32_t first_place,
              int16_t* values, int32_t* places) {
    return use_.take_sums(sums, count, least, first_place, values, places);
  }
  size_t take(const int32_t* sums, size_t count, int32_t least, int32_t first_place,
              int32_t* values, int32_t* places) {
    size_t found = 0;
    for (size_t place = 0; place < count; ++place) {
      values[found] = sums[place];
      places[found] = first_place + static_cast<int32_t>(place);
      found += sums[place] >= least ? 1 : 0;
    }
    return found;
  }

  // Raises the k-th best sum to that of the candidates, and drops those that are below the cut.
  template <class Sum>
  void tighten(AlignedVector<Sum>& sums) {
    const size_t count = places_.size();
    if (static_cast<int64_t>(count) < wanted()) return;
    int32_t low = kth_;  // at least as many as wanted are not below it, fewer are not below `high`
    int32_t high = Units<Sum>::kMost + error_;
    while (high - low > 1) {
      const auto middle = static_cast<Sum>((low + high) / 2);
      int32_t reached = 0;
      for (size_t i = 0; i < count; ++i) reached += sums[i] >= middle;
      (reached >= wanted() ? low : high) = middle;
    }
    kth_ = low;
    size_t kept = 0;
    for (size_t i = 0; i < count; ++i) {
      const Sum sum = sums[i];
      const int32_t place = places_[i];
      sums[kept] = sum;
      places_[kept] = place;
      kept += sum + slacks_[static_cast<size_t>(place / kBlock)] >= cut() ? 1 : 0;
    }
    sums.resize(kept);
    places_.resize(kept);
  }

  // Scores first what seems best, then what can still be better than the k-th of these.
  template <class Sum>
  void score_candidates(double per_unit, const AlignedVector<Sum>& sums) {
    double least = -1;
    for (const bool first : {true, false}) {
      rows_to_score_.clear();
      for (size_t i = 0; i < places_.size(); ++i) {
        if ((sums[i] >= kth_) != first) continue;
        if (!first && (sums[i] + error_ + slacks_[places_[i] / kBlock]) * per_unit < least) {
          continue;
        }
        rows_to_score_.push_back(item_at(places_[i]));
      }
      score_rows();
      keep_best();
      if (static_cast<int64_t>(found_.size()) < k_) continue;
      least = static_cast<double>(std::max_element(found_.begin(), found_.end(), better)->score);
    }
  }

  int32_t item_at(int64_t place) const {
    constexpr int64_t kBlocks = SparseItems::kMostRows / kBlock;
    const int64_t part = place / kBlock / kBlocks;
    return prepared_.parts[part].order[place % SparseItems::kMostRows];
  }

  void score_rows() {
    const auto count = static_cast<int64_t>(rows_to_score_.size());
    constexpr int64_t kAhead = 6;
    for (int64_t i = 0; i < count; ++i) {
      if (i % 4096 == 4095) cancel_.check();
      if (i + kAhead < count) {
        const auto ahead = items_.pattern.row(rows_to_score_[i + kAhead]);
        const float* values = items_.values + (ahead.begin - items_.pattern.columns);
        for (int64_t entry = 0; entry < std::min<int64_t>(ahead.size(), 32); entry += 16) {
          __builtin_prefetch(ahead.begin + entry);
          __builtin_prefetch(values + entry);
        }
      }
      const int32_t item = rows_to_score_[i];
      const float score = score_of(items_, item, values_);
      if (score != 0 && !is_dropped(item)) found_.push_back({score, item});
    }
  }

  bool is_dropped(int32_t item) const {
    if (drop_ == nullptr) return false;
    const auto entries = drop_->row(row_);
    return std::binary_search(entries.begin, entries.end, static_cast<Index>(item));
  }

  // Scores every item that has a column of the query.
  void sum_exactly() {
    found_.clear();
    totals_.resize(static_cast<size_t>(kBlock));
    // Rounded sums may have changed the order.
    std::sort(terms_.begin(), terms_.end(),
              [](const Term& a, const Term& b) { return a.column < b.column; });
    for (const auto& part : prepared_.parts) {
      open(part);
      const auto rows = static_cast<int64_t>(part.order.size());
      for (int64_t first = 0; first < rows; first += kBlock) {
        cancel_.check();
        const int64_t last = first + kBlock;
        touched_.clear();
        for (Term& term : terms_) {
          const float* value = part.values.data() + (term.next - part.entries.data());
          for (; term.next != term.end; ++term.next, ++value) {
            const int64_t place = *term.next & kPlaceMask;
            if (place >= last) break;
            double& total = totals_[static_cast<size_t>(place % kBlock)];
            if (total == 0) touched_.push_back(static_cast<int32_t>(place));
            total += term.value * static_cast<double>(*value);
          }
        }
        for (const int32_t place : touched_) {
          double& total = totals_[static_cast<size_t>(place % kBlock)];
          const auto score = static_cast<float>(total);
          total = 0;  // It may be there twice, if the sum was 0 in between.
          const int32_t item = part.order[place];
          if (score != 0 && !is_dropped(item)) found_.push_back({score, item});
        }
        keep_best();
      }
    }
  }

  void keep_best() {
    if (static_cast<int64_t>(found_.size()) <= k_) return;
    const auto last = found_.begin() + k_;
    std::nth_element(found_.begin(), last, found_.end(), better);
    found_.erase(last, found_.end());
  }

  const WeightedRows<Index>& queries_;
  const WeightedRows<Index>& items_;
  const SparseItems& prepared_;
  const CsrView<Index>* drop_;
  const int64_t k_;
  Cancel& cancel_;
  const Kernels& use_ = kernels();

  // Of the query at hand.
  int64_t row_ = 0, dropped_ = 0;
  std::vector<Term> terms_;
  QueryValues values_;
  double most_ = 0;            // that a score can be
  bool negative_ = false;      // whether a product may be; sums then leave out nothing
  int32_t error_ = 0;          // of a sum, in units
  std::vector<double> norms_;  // [c]: of the query in its c most common columns
  int32_t kth_ = 0;            // the k-th best sum so far
  Sums<int16_t> coarse_;
  Sums<int32_t> fine_;
  AlignedVector<int32_t> places_;  // of the candidates
  std::vector<double> totals_;     // exact sums, of the items of a block
  std::vector<int32_t> touched_;   // places of those that have one
  std::vector<int32_t> slacks_;    // what left-out columns may add in each block
  std::vector<int32_t> rows_to_score_;
  std::vector<Scored> found_;
};

}  // namespace

template <class Index>
SparseItems prepare_sparse_items(const WeightedRows<Index>& items, Cancel& cancel) {
  const auto& pattern = items.pattern;
  SparseItems out;
  out.rows = pattern.rows;
  out.cols = pattern.cols;
  out.largest.assign(static_cast<size_t>(pattern.cols), 0);
  std::vector<int64_t> counts(static_cast<size_t>(pattern.cols), 0);
  double longest = 0;
  for (int64_t row = 0; row < pattern.rows; ++row) {
    if (row % 4096 == 0) cancel.check();
    longest = std::max(longest, squared_norm(items, row));
    const auto entries = pattern.row(row);
    const float* value = items.values + (entries.begin - pattern.columns);
    for (const Index* column = entries.begin; column != entries.end; ++column, ++value) {
      const auto c = static_cast<size_t>(*column);
      if (c >= counts.size()) pattern.reject_change();
      ++counts[c];
      out.largest[c] = std::max(out.largest[c], std::fabs(*value));
      out.negative |= *value < 0;
    }
  }
  out.longest = std::sqrt(longest);
  out.mean_entries = static_cast<double>(pattern.nonzeros) /
                     static_cast<double>(std::max<int64_t>(pattern.rows, 1));
  out.common.resize(counts.size());
  for (size_t c = 0; c < counts.size(); ++c) {
    out.common[c] = counts[c] * kCommon >= pattern.rows && counts[c] > 0;
  }
  for (int64_t row = 0; row < pattern.rows; row += SparseItems::kMostRows) {
    add_part(items, row, cancel, out);
  }
  return out;
}

template <class Index>
Sparse<float> sparse_topk(const WeightedRows<Index>& queries, const WeightedRows<Index>& items,
                          const SparseItems& prepared, const CsrView<Index>* drop, int64_t k,
                          int threads, Cancel& cancel) {
  if (drop != nullptr) {
    for (int64_t row = 0; row < drop->rows; ++row) drop->sorted_row(row);
  }
  const int64_t rows = queries.pattern.rows;
  const int64_t jobs = divided_up(rows, kQueriesOfJob);
  Sparse<float> out;
  out.offsets.assign(static_cast<size_t>(rows) + 1, 0);
  std::vector<std::vector<Scored>> found(static_cast<size_t>(jobs));
  std::vector<std::unique_ptr<Search<Index>>> searches(
      static_cast<size_t>(std::min<int64_t>(std::max(threads, 1), std::max<int64_t>(jobs, 1))));
  parallel_for(jobs, threads, cancel, [&](int64_t job, int thread) {
    auto& search = searches[static_cast<size_t>(thread)];
    if (!search) {
      search = std::make_unique<Search<Index>>(queries, items, prepared, drop, k, cancel);
    }
    const int64_t end = std::min(rows, (job + 1) * kQueriesOfJob);
    for (int64_t row = job * kQueriesOfJob; row < end; ++row) {
      cancel.check();
      out.offsets[row + 1] = search->run(row, found[static_cast<size_t>(job)]);
    }
    found[static_cast<size_t>(job)].shrink_to_fit();
  });
  for (int64_t row = 0; row < rows; ++row) out.offsets[row + 1] += out.offsets[row];
  out.columns = Buffer<int32_t>(out.offsets.back());
  out.values = Buffer<float>(out.offsets.back());
  parallel_for(jobs, threads, cancel, [&](int64_t job, int) {
    int64_t entry = out.offsets[job * kQueriesOfJob];
    for (const Scored& one : found[static_cast<size_t>(job)]) {
      out.columns[entry] = one.id;
      out.values[entry++] = one.score;
    }
    std::vector<Scored>().swap(found[static_cast<size_t>(job)]);
  });
  return out;
}

template <class Index>
void sparse_pair_scores(const WeightedRows<Index>& queries, const WeightedRows<Index>& items,
                        const CsrView<Index>& pairs, int threads, Cancel& cancel, float* scores) {
  const int64_t rows = queries.pattern.rows;
  const int64_t jobs = divided_up(rows, kQueriesOfJob);
  parallel_for(jobs, threads, cancel, [&](int64_t job, int) {
    QueryValues values;
    const int64_t end = std::min(rows, (job + 1) * kQueriesOfJob);
    for (int64_t row = job * kQueriesOfJob; row < end; ++row) {
      cancel.check();
      squared_norm(queries, row);  // It checks the row.
      const auto entries = queries.pattern.row(row);
      const float* value = queries.values + (entries.begin - queries.pattern.columns);
      values.clear(entries.size());
      for (const Index* column = entries.begin; column != entries.end; ++column, ++value) {
        values.put(*column, *value);
      }
      const auto wanted = pairs.sorted_row(row);
      float* score = scores + (wanted.begin - pairs.columns);
      for (const Index* item = wanted.begin; item != wanted.end; ++item) {
        const int64_t id = *item;
        if (id < 0 || id >= items.pattern.rows) pairs.reject_change();
        *score++ = score_of(items, id, values);
      }
    }
  });
}

template SparseItems prepare_sparse_items(const WeightedRows<int32_t>&, Cancel&);
template SparseItems prepare_sparse_items(const WeightedRows<int64_t>&, Cancel&);
template void sparse_pair_scores(const WeightedRows<int32_t>&, const WeightedRows<int32_t>&,
                                 const CsrView<int32_t>&, int, Cancel&, float*);
template void sparse_pair_scores(const WeightedRows<int64_t>&, const WeightedRows<int64_t>&,
                                 const CsrView<int64_t>&, int, Cancel&, float*);
template Sparse<float> sparse_topk(const WeightedRows<int32_t>&, const WeightedRows<int32_t>&,
                                   const SparseItems&, const CsrView<int32_t>*, int64_t, int,
                                   Cancel&);
template Sparse<float> sparse_topk(const WeightedRows<int64_t>&, const WeightedRows<int64_t>&,
                                   const SparseItems&, const CsrView<int64_t>*, int64_t, int,
                                   Cancel&);

}  // namespace ngame

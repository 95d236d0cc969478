#include "linear.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "random.h"

namespace ngame {
namespace {

// 5 and 10 came as near to the goal; without a limit some ended far from it.
constexpr int64_t kWithout = 10;

struct Weight {
  int32_t column;
  float value;
};

// Trains one label after another, in the same memory. What a label's classifier sees is copied
// first, with columns numbered anew: it is visited many times, and is small enough for a cache.
template <class Index>
class Trainer {
 public:
  Trainer(const WeightedRows<Index>& points, const LinearProblem& problem, Cancel& cancel)
      : points_(points), problem_(problem), cancel_(cancel) {
    places_.assign(static_cast<size_t>(points.pattern.cols), -1);
  }

  // Gives the weights of a label, columns ascending.
  std::vector<Weight> run(int64_t label, const CsrView<Index>& relevant,
                          const CsrView<Index>* compared) {
    read(label, relevant, compared);
    weights_.assign(columns_.size(), 0);
    descend(label);
    std::vector<Weight> found = take();
    for (const int32_t column : columns_) places_[column] = -1;
    return found;
  }

 private:
  struct Entry {
    int32_t place;  // of its column in `columns_`
    float value;
  };
  struct Row {
    std::span<const Entry> entries;
    double square;
    double alpha;  // its share in the weights
    bool positive;
  };

  // Copies the points of a label, and those that it is told from.
  void read(int64_t label, const CsrView<Index>& relevant, const CsrView<Index>* compared) {
    columns_.clear();
    entries_.clear();
    ends_.clear();
    const auto own = relevant.sorted_row(label);
    if (own.size() > 0) {
      const Index* next = own.begin;
      const auto add_other = [&](int64_t point) {
        while (next != own.end && *next < point) ++next;
        if (next == own.end || *next != point) add(point, relevant);
      };
      if (compared == nullptr) {
        for (int64_t point = 0; point < points_.pattern.rows; ++point) add_other(point);
      } else {
        const auto others = compared->sorted_row(label);
        for (const Index* other = others.begin; other != others.end; ++other) add_other(*other);
      }
    }
    const size_t negatives = ends_.size();
    for (const Index* point = own.begin; point != own.end; ++point) add(*point, relevant);
    rows_.clear();
    size_t begin = 0;
    for (size_t row = 0; row < ends_.size(); ++row) {
      const std::span<const Entry> entries(entries_.data() + begin, ends_[row] - begin);
      double square = 0;
      for (const Entry& entry : entries) {
        square += static_cast<double>(entry.value) * static_cast<double>(entry.value);
      }
      rows_.push_back({entries, square, 0, row >= negatives});
      begin = ends_[row];
    }
  }
  void add(int64_t point, const CsrView<Index>& relevant) {
    // It may have changed since it was checked.
    if (point < 0 || point >= points_.pattern.rows) relevant.reject_change();
    const auto entries = points_.pattern.row(point);
    const float* value = points_.values + (entries.begin - points_.pattern.columns);
    for (const Index* column = entries.begin; column != entries.end; ++column, ++value) {
      const auto c = static_cast<size_t>(*column);
      if (c >= places_.size()) points_.pattern.reject_change();
      if (places_[c] < 0) {
        places_[c] = static_cast<int32_t>(columns_.size());
        columns_.push_back(static_cast<int32_t>(c));
      }
      entries_.push_back({places_[c], *value});
    }
    ends_.push_back(entries_.size());
  }

  // Visits the rows in random orders until none moves much. Rows that stay at 0, most of those that
  // the label is told from, are put behind the others and visited again when these have settled,
  // or after `kWithout` passes without them: what settles without them may be far from the goal.
  // All visits together are at most those of so many passes over all rows.
  void descend(int64_t label) {
    Random random(splitmix(problem_.seed) ^ static_cast<uint64_t>(label));
    const double ridge = 0.5 / problem_.cost;
    size_t active = rows_.size();
    int64_t without = 0;
    auto visits = problem_.passes * static_cast<int64_t>(rows_.size());
    for (bool whole = true; visits > 0;) {
      cancel_.check();
      if (!whole) random.shuffle(std::span(rows_).first(active));
      visits -= static_cast<int64_t>(active);
      double most = 0;
      for (size_t place = 0; place < active;) {
        Row& row = rows_[place];
        double score = 0;
        for (const Entry& entry : row.entries) {
          score += weights_[entry.place] * static_cast<double>(entry.value);
        }
        const double slope = (row.positive ? score - 1 : -score) + ridge * row.alpha;
        if (row.alpha == 0 && slope >= 0) {
          std::swap(row, rows_[--active]);
          continue;
        }
        most = std::max(most, std::fabs(slope));
        const double before = row.alpha;
        row.alpha = std::max(before - slope / (row.square + ridge), 0.0);
        const double factor = row.positive ? row.alpha - before : before - row.alpha;
        for (const Entry& entry : row.entries) {
          weights_[entry.place] += factor * static_cast<double>(entry.value);
        }
        ++place;
      }
      if (most <= problem_.tolerance && whole) return;
      without = whole ? 0 : without + 1;
      whole = most <= problem_.tolerance || without == kWithout;
      if (whole) active = rows_.size();
    }
  }

  // The weights that are not small.
  std::vector<Weight> take() const {
    double largest = 0;
    for (const double weight : weights_) largest = std::max(largest, std::fabs(weight));
    std::vector<Weight> found;
    for (size_t place = 0; place < weights_.size(); ++place) {
      const double weight = weights_[place];
      if (weight == 0 || std::fabs(weight) < problem_.least * largest) continue;
      found.push_back({columns_[place], static_cast<float>(weight)});
    }
    std::sort(found.begin(), found.end(),
              [](const Weight& a, const Weight& b) { return a.column < b.column; });
    return found;
  }

  const WeightedRows<Index>& points_;
  const LinearProblem& problem_;
  Cancel& cancel_;
  std::vector<int32_t> places_;   // of each column in `columns_`, or -1
  std::vector<int32_t> columns_;  // those that the label's rows have
  std::vector<double> weights_;   // of each
  std::vector<Entry> entries_;
  std::vector<size_t> ends_;  // of each row's entries
  std::vector<Row> rows_;
};

// Throws std::invalid_argument naming the first row with NaN or infinity.
template <class Index>
void check_rows(const WeightedRows<Index>& points, Cancel& cancel) {
  for (int64_t point = 0; point < points.pattern.rows; ++point) {
    if (point % 4096 == 0) cancel.check();
    const auto entries = points.pattern.sorted_row(point);
    const float* value = points.values + (entries.begin - points.pattern.columns);
    for (int64_t entry = 0; entry < entries.size(); ++entry) {
      if (!std::isfinite(value[entry])) reject_value(points.pattern.name, point);
    }
  }
}

}  // namespace

template <class Index>
Sparse<float> train_linear(const WeightedRows<Index>& points, const CsrView<Index>& relevant,
                           const CsrView<Index>* compared, const LinearProblem& problem,
                           int threads, Cancel& cancel) {
  check_rows(points, cancel);
  // One a thread, made when it begins.
  std::vector<std::optional<Trainer<Index>>> trainers(
      static_cast<size_t>(std::max<int64_t>(1, std::min<int64_t>(threads, kMostThreads))));
  std::vector<std::vector<Weight>> found(static_cast<size_t>(relevant.rows));
  parallel_for(relevant.rows, threads, cancel, [&](int64_t label, int thread) {
    auto& trainer = trainers[static_cast<size_t>(thread)];
    if (!trainer) trainer.emplace(points, problem, cancel);
    found[static_cast<size_t>(label)] = trainer->run(label, relevant, compared);
  });
  Sparse<float> out;
  out.offsets.assign(static_cast<size_t>(relevant.rows) + 1, 0);
  for (size_t label = 0; label < found.size(); ++label) {
    out.offsets[label + 1] = out.offsets[label] + static_cast<int64_t>(found[label].size());
  }
  out.columns = Buffer<int32_t>(out.offsets.back());
  out.values = Buffer<float>(out.offsets.back());
  for (size_t label = 0; label < found.size(); ++label) {
    int64_t entry = out.offsets[label];
    for (const Weight& weight : found[label]) {
      out.columns[entry] = weight.column;
      out.values[entry++] = weight.value;
    }
    std::vector<Weight>().swap(found[label]);
  }
  return out;
}

template Sparse<float> train_linear(const WeightedRows<int32_t>&, const CsrView<int32_t>&,
                                    const CsrView<int32_t>*, const LinearProblem&, int, Cancel&);
template Sparse<float> train_linear(const WeightedRows<int64_t>&, const CsrView<int64_t>&,
                                    const CsrView<int64_t>*, const LinearProblem&, int, Cancel&);

}  // namespace ngame

#include "linear.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "random.h"

namespace ngame {
namespace {

struct Weight {
  int32_t column;
  float value;
};

// Trains one label after another, in the same memory.
template <class Index>
class Trainer {
 public:
  Trainer(const WeightedRows<Index>& points, const std::vector<double>& squares,
          const LinearProblem& problem, Cancel& cancel)
      : points_(points), squares_(squares), problem_(problem), cancel_(cancel) {
    weights_.assign(static_cast<size_t>(points.pattern.cols), 0);
  }

  // Appends the weights of a label, columns ascending; returns their number.
  int64_t run(int64_t label, const CsrView<Index>& relevant, const CsrView<Index>* compared,
              std::vector<Weight>& out) {
    read(label, relevant, compared);
    if (positives_ > 0) descend(label);
    return take(out);
  }

 private:
  struct Row {
    int32_t point;
    bool positive;
    double alpha;  // its share in the weights
  };

  // Lists the points of a label, and those that it is told from.
  void read(int64_t label, const CsrView<Index>& relevant, const CsrView<Index>* compared) {
    rows_.clear();
    const auto own = relevant.sorted_row(label);
    positives_ = own.size();
    const Index* next = own.begin;
    const auto add = [&](int64_t point) {
      // It may have changed since it was checked.
      if (point < 0 || point >= points_.pattern.rows) relevant.reject_change();
      while (next != own.end && *next < point) ++next;
      if (next != own.end && *next == point) return;
      rows_.push_back({static_cast<int32_t>(point), false, 0});
    };
    if (compared == nullptr) {
      for (int64_t point = 0; point < points_.pattern.rows; ++point) add(point);
    } else {
      const auto others = compared->sorted_row(label);
      for (const Index* other = others.begin; other != others.end; ++other) add(*other);
    }
    for (const Index* point = own.begin; point != own.end; ++point) {
      if (*point < 0 || *point >= points_.pattern.rows) relevant.reject_change();
      rows_.push_back({static_cast<int32_t>(*point), true, 0});
    }
  }

  // Visits the rows in random orders until none moves much. Rows that stay at 0, most of those that
  // the label is told from, are put behind the others and visited again when these have settled.
  void descend(int64_t label) {
    Random random(splitmix(problem_.seed) ^ static_cast<uint64_t>(label));
    const double ridge = 0.5 / problem_.cost;
    size_t active = rows_.size();
    bool whole = true;
    for (int64_t pass = 0; pass < problem_.passes; ++pass) {
      cancel_.check();
      if (!whole) random.shuffle(std::span(rows_).first(active));
      double most = 0;
      for (size_t place = 0; place < active;) {
        Row& row = rows_[place];
        const double own = score(row.point);
        const double slope = (row.positive ? own - 1 : -own) + ridge * row.alpha;
        if (row.alpha == 0 && slope >= 0) {
          std::swap(row, rows_[--active]);
          continue;
        }
        most = std::max(most, std::fabs(slope));
        const double before = row.alpha;
        row.alpha = std::max(before - slope / (squares_[row.point] + ridge), 0.0);
        add(row.point, row.positive ? row.alpha - before : before - row.alpha);
        ++place;
      }
      if (most > problem_.tolerance) {
        whole = false;
      } else if (whole) {
        return;
      } else {
        whole = true;
        active = rows_.size();
      }
    }
  }

  template <class Visit>
  void visit(int64_t point, const Visit& visit) {
    const auto entries = points_.pattern.row(point);
    const float* value = points_.values + (entries.begin - points_.pattern.columns);
    for (const Index* column = entries.begin; column != entries.end; ++column, ++value) {
      const auto c = static_cast<size_t>(*column);
      if (c >= weights_.size()) points_.pattern.reject_change();
      visit(c, static_cast<double>(*value));
    }
  }
  double score(int64_t point) {
    double total = 0;
    visit(point, [&](size_t column, double value) { total += weights_[column] * value; });
    return total;
  }
  void add(int64_t point, double factor) {
    visit(point, [&](size_t column, double value) { weights_[column] += factor * value; });
  }

  // Moves the weights that are not small to `out` and leaves zeros.
  int64_t take(std::vector<Weight>& out) {
    double largest = 0;
    for (const Row& row : rows_) {
      visit(row.point, [&](size_t column, double) {
        largest = std::max(largest, std::fabs(weights_[column]));
      });
    }
    const size_t first = out.size();
    for (const Row& row : rows_) {
      visit(row.point, [&](size_t column, double) {
        const double weight = weights_[column];
        weights_[column] = 0;
        if (weight == 0 || std::fabs(weight) < problem_.least * largest) return;
        out.push_back({static_cast<int32_t>(column), static_cast<float>(weight)});
      });
    }
    std::sort(out.begin() + static_cast<int64_t>(first), out.end(),
              [](const Weight& a, const Weight& b) { return a.column < b.column; });
    return static_cast<int64_t>(out.size() - first);
  }

  const WeightedRows<Index>& points_;
  const std::vector<double>& squares_;
  const LinearProblem& problem_;
  Cancel& cancel_;
  std::vector<double> weights_;
  std::vector<Row> rows_;
  int64_t positives_ = 0;
};

}  // namespace

template <class Index>
Sparse<float> train_linear(const WeightedRows<Index>& points, const CsrView<Index>& relevant,
                           const CsrView<Index>* compared, const LinearProblem& problem,
                           int threads, Cancel& cancel) {
  std::vector<double> squares(static_cast<size_t>(points.pattern.rows), 0);
  for (int64_t point = 0; point < points.pattern.rows; ++point) {
    if (point % 4096 == 0) cancel.check();
    const auto entries = points.pattern.sorted_row(point);
    const float* value = points.values + (entries.begin - points.pattern.columns);
    for (int64_t entry = 0; entry < entries.size(); ++entry) {
      squares[point] += static_cast<double>(value[entry]) * static_cast<double>(value[entry]);
    }
    if (!std::isfinite(squares[point])) {
      throw std::invalid_argument(std::string(points.pattern.name) +
                                  " has NaN or infinity in row " + std::to_string(point));
    }
  }
  // Labels of one thread, one after the other.
  const auto workers =
      static_cast<size_t>(std::max<int64_t>(1, std::min<int64_t>(threads, relevant.rows)));
  std::vector<std::optional<Trainer<Index>>> trainers(workers);
  std::vector<std::vector<Weight>> found(static_cast<size_t>(relevant.rows));
  parallel_for(relevant.rows, static_cast<int>(workers), cancel, [&](int64_t label, int thread) {
    auto& trainer = trainers[static_cast<size_t>(thread)];
    if (!trainer) trainer.emplace(points, squares, problem, cancel);
    trainer->run(label, relevant, compared, found[static_cast<size_t>(label)]);
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

#include "cluster.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "aligned.h"
#include "bisector.h"
#include "cut.h"
#include "kernels.h"
#include "matrix.h"
#include "random.h"

namespace ngame {
namespace {

// Rows that a thread takes at a time where several share a node.
constexpr int64_t kBlock = 256;

// A node whose packed rows take no more than this is finished on a copy of them, all levels of it:
// they stay in the caches, from the second level on in the nearer ones. But a copy of so many rows
// is always made.
constexpr int64_t kCopiedBytes = 2 * 1024 * 1024;
constexpr int64_t kLeastCopied = 256;

// A larger node is divided so many levels at a time at most, in one pass over its rows, along
// directions that are learnt on a sample of them: enough rows that the noise of each dimension
// averages out, and fewer levels where they would not suffice. (Half of them made clusters of
// unrelated topics in 1,000 dimensions 4 % less tight.) What has few rows in the sample is left
// to a later pass.
constexpr int kLevelsAtOnce = 4;
constexpr int64_t kSampledRows = 6144;
constexpr int64_t kSampledRowsPerDimension = 12;
constexpr int64_t kSampledBytes = 32 * 1024 * 1024;
constexpr int64_t kLeastSampled = 64;

// What is read from the disk in one piece where memory does not hold the input.
constexpr int64_t kWindowBytes = 32 * 1024 * 1024;

// Clusters [first, last) of the result, and with them rows offsets[first] .. offsets[last].
struct Node {
  int64_t first;
  int64_t last;
  uint64_t seed;

  int64_t clusters() const { return last - first; }
  int64_t middle() const { return first + (last - first) / 2; }
  Node left() const { return {first, middle(), splitmix(seed)}; }
  Node right() const { return {middle(), last, splitmix(~seed)}; }
};

// What one thread needs for itself.
struct Scratch {
  explicit Scratch(int64_t dim) : bisector(dim) {}
  Bisector bisector;
  AlignedVector<uint32_t> rows;  // packed unit vectors
  std::vector<int32_t> ids, local, spare;
  std::vector<float> sums;  // of the rows of one node a level
  AlignedVector<float> chosen;
};

// How a large node is divided: splits, parents first, and to each its direction; what they leave;
// and where the products of the node's rows with the directions go, split after split.
struct Division {
  Node node;
  std::vector<Node> splits;
  AlignedVector<float> directions;
  std::vector<Node> parts;
  float* scores;
};

// Rows ids[first .. first + count) of a node that is divided.
struct Stretch {
  const Division* division;
  int64_t first;
  int64_t count;
};

// Elements of a packed row.
constexpr int64_t rounded_up(int64_t cols) {
  constexpr auto kUnit = static_cast<int64_t>(kPackedUnit);
  return (cols + kUnit - 1) / kUnit * kUnit;
}

class Tree {
 public:
  Tree(const MatrixView& x, std::span<const int64_t> offsets, const ClusterParams& params,
       Cancel& cancel, std::span<int32_t> order)
      : x_(x),
        offsets_(offsets),
        params_(params),
        cancel_(cancel),
        order_(order),
        dim_(rounded_up(x.cols)),
        copied_rows_(std::max(kCopiedBytes / std::max<int64_t>(2 * dim_, 1), kLeastCopied)),
        sampled_rows_(std::max(std::min(std::max(kSampledRowsPerDimension * dim_, kSampledRows),
                                        kSampledBytes / std::max<int64_t>(2 * dim_, 1)),
                               kLeastCopied)),
        inverse_(static_cast<size_t>(x.rows)),
        scratch_(static_cast<size_t>(params.threads), Scratch(dim_)) {}

  void build() {
    inverse_norms(x_, params_.threads, cancel_, inverse_);
    fetch_.emplace(x_);
    std::iota(order_.begin(), order_.end(), 0);
    // Each round reads `x` once for all large nodes; then small ones are finished on copies.
    std::vector<Node> small;
    std::vector<Division> divisions;
    std::vector<float> scores;
    const auto sort_out = [&](const Node& node) {
      if (is_large(node)) {
        divisions.push_back({node, {}, {}, {}, nullptr});
      } else {
        small.push_back(node);
      }
    };
    sort_out({0, static_cast<int64_t>(offsets_.size()) - 1, params_.seed});
    while (!divisions.empty()) {
      divide(divisions, scores);
      for (const Division& each : std::exchange(divisions, {})) {
        for (const Node& part : each.parts) sort_out(part);
      }
    }
    scores = {};
    for_each(small, [&](const Node& node, Scratch& scratch) { finish(node, scratch); });
  }

 private:
  int64_t rows_of(const Node& node) const { return offsets_[node.last] - offsets_[node.first]; }
  int64_t left_rows(const Node& node) const {
    return offsets_[node.middle()] - offsets_[node.first];
  }
  bool is_large(const Node& node) const {
    return node.clusters() > 1 && rows_of(node) > copied_rows_;
  }
  std::span<int32_t> ids_of(const Node& node) const {
    return order_.subspan(offsets_[node.first], rows_of(node));
  }

  template <class Item, class Body>
  void for_each(std::vector<Item>& items, const Body& body) {
    parallel_for(static_cast<int64_t>(items.size()), params_.threads, cancel_,
                 [&](int64_t at, int thread) { body(items[at], scratch_[thread]); });
  }

  void finish(const Node& node, Scratch& scratch) {
    if (node.clusters() == 1) return;
    const std::span<int32_t> ids = ids_of(node);
    scratch.ids.assign(ids.begin(), ids.end());
    copy_rows(scratch);
    divide(node, scratch.local, 0, scratch);
    for (size_t at = 0; at < ids.size(); ++at) ids[at] = scratch.ids[scratch.local[at]];
  }

  // Packs the unit vectors of scratch.ids, numbers them (scratch.local is 0, 1, ...) and sums them.
  void copy_rows(Scratch& scratch) const {
    const auto count = static_cast<int64_t>(scratch.ids.size());
    const int64_t words = dim_ / 2;
    scratch.rows.resize(count * words);
    scratch.local.resize(count);
    std::iota(scratch.local.begin(), scratch.local.end(), 0);
    const int64_t ahead = fetch_->ahead();
    for (int64_t at = 0; at < std::min(ahead, count); ++at) fetch_->row(scratch.ids[at]);
    for (int64_t at = 0; at < count; ++at) {
      if (at % kBlock == 0) cancel_.check();
      if (at + ahead < count) fetch_->row(scratch.ids[at + ahead]);
      const int32_t id = scratch.ids[at];
      const auto cols = static_cast<size_t>(x_.cols);
      uint32_t* const out = scratch.rows.data() + at * words;
      if (x_.scalar == Scalar::f16) {
        kernels().pack_f16(x_.f16(id), cols, inverse_[id], out);
      } else {
        kernels().pack_f32(x_.f32(id), cols, inverse_[id], out);
      }
    }
    scratch.bisector.add(scratch.rows.data(), scratch.local, sum_of(0, scratch));
  }
  std::span<float> sum_of(int64_t level, Scratch& scratch) const {
    const auto needed = static_cast<size_t>((level + 1) * dim_);
    if (scratch.sums.size() < needed) scratch.sums.resize(needed);
    return std::span(scratch.sums).subspan(level * dim_, dim_);
  }

  // Divides copied rows, whose sum is sum_of(level), down to the clusters.
  void divide(const Node& node, std::span<int32_t> local, int64_t level, Scratch& scratch) {
    if (node.clusters() == 1) return;
    const int64_t left = left_rows(node);
    bisect(node, local, left, level, scratch);
    divide(node.left(), local.first(left), level + 1, scratch);
    divide(node.right(), local.subspan(left), level, scratch);
  }
  // Leaves the sum of the right rows at `level`, and that of the left ones a level below.
  void bisect(const Node& node, std::span<int32_t> local, int64_t left, int64_t level,
              Scratch& scratch) {
    const std::span<float> below = sum_of(level + 1, scratch);
    const std::span<float> sum = sum_of(level, scratch);
    scratch.bisector.split(scratch.rows.data(), local, left, sum, node.seed, params_.max_iterations,
                           cancel_);
    const std::span<const float> left_sum = scratch.bisector.left_sum();
    std::copy(left_sum.begin(), left_sum.end(), below.begin());
    for (size_t at = 0; at < sum.size(); ++at) sum[at] -= left_sum[at];
  }

  // Divides large nodes by some levels, in one pass over the rows.
  void divide(std::vector<Division>& divisions, std::vector<float>& scores) {
    for_each(divisions, [&](Division& each, Scratch& scratch) {
      sample(ids_of(each.node), each.node.seed, scratch);
      learn(each.node, scratch.local, levels_at_once(rows_of(each.node)), 0, each, scratch);
    });
    int64_t needed = 0;
    for (const Division& each : divisions) needed += scores_of(each);
    if (static_cast<int64_t>(scores.size()) < needed) scores.resize(needed);
    float* next = scores.data();
    for (Division& each : divisions) next = (each.scores = next) + scores_of(each);
    // A window is read from the disk while the one before is worked on. In memory it is all rows.
    const int64_t row_bytes = std::max<int64_t>(x_.stride * bytes_of(x_.scalar), 1);
    const int64_t window =
        fetch_->from_disk() ? std::max(kWindowBytes / row_bytes, kBlock) : x_.rows;
    for (int64_t first = 0; first < x_.rows; first += window) {
      const int64_t last = std::min(first + window, x_.rows);
      fetch_->rows(last, std::min(last + window, x_.rows));
      project(divisions, static_cast<int32_t>(first), last);
    }
    for_each(divisions, [&](Division& each, Scratch& scratch) { apply(each, scratch); });
  }
  int64_t scores_of(const Division& division) const {
    return static_cast<int64_t>(division.splits.size()) * rows_of(division.node);
  }
  // Orders the rows of a node as the scores say.
  void apply(const Division& division, Scratch& scratch) {
    const Node& node = division.node;
    const std::span<int32_t> ids = ids_of(node);
    std::vector<int32_t>& positions = scratch.ids;
    positions.resize(ids.size());
    std::iota(positions.begin(), positions.end(), 0);
    const float* scores = division.scores;
    for (const Node& each : division.splits) {
      cancel_.check();
      const int64_t first = offsets_[each.first] - offsets_[node.first];
      const auto part = std::span(positions).subspan(first, rows_of(each));
      scratch.chosen.resize(part.size());
      for (size_t at = 0; at < part.size(); ++at) scratch.chosen[at] = scores[part[at]];
      Cut cut = Cut::find(scratch.chosen, left_rows(each));
      partition(part, scratch.spare, [&](size_t at) { return cut.takes(scratch.chosen[at]); });
      scores += ids.size();
    }
    for (int32_t& position : positions) position = ids[position];
    std::copy(positions.begin(), positions.end(), ids.begin());
  }
  // As few passes as can be, and as few levels in each of them. The last level's directions are
  // learnt on an eighth of the sample if there are four.
  int levels_at_once(int64_t rows) const {
    const int64_t enough = std::max<int64_t>(dim_ * kSampledRowsPerDimension / 8, 1);
    const int most = std::clamp(levels_above(sampled_rows_ / enough), 1, kLevelsAtOnce);
    const int levels = levels_above((rows - 1) / copied_rows_);
    const int passes = (levels + most - 1) / most;
    return (levels + passes - 1) / passes;
  }
  // Halvings until nothing is left.
  static int levels_above(int64_t parts) {
    return static_cast<int>(std::bit_width(static_cast<uint64_t>(parts)));
  }
  // Divides the sampled rows `local` of a node as the node is to be divided.
  void learn(const Node& node, std::span<int32_t> local, int levels, int64_t level,
             Division& division, Scratch& scratch) {
    const auto sampled = static_cast<int64_t>(local.size());
    if (levels == 0 || !is_large(node) || sampled < kLeastSampled) {
      division.parts.push_back(node);
      return;
    }
    const double share = static_cast<double>(left_rows(node)) / static_cast<double>(rows_of(node));
    const auto left = std::clamp(static_cast<int64_t>(share * static_cast<double>(sampled)),
                                 int64_t{1}, sampled - 1);
    bisect(node, local, left, level, scratch);
    division.splits.push_back(node);
    const std::span<const float> direction = scratch.bisector.direction();
    division.directions.insert(division.directions.end(), direction.begin(), direction.end());
    learn(node.left(), local.first(left), levels - 1, level + 1, division, scratch);
    learn(node.right(), local.subspan(left), levels - 1, level, division, scratch);
  }
  // One row at random from each of some equal stretches.
  void sample(std::span<const int32_t> ids, uint64_t seed, Scratch& scratch) const {
    const auto count = static_cast<int64_t>(ids.size());
    const int64_t sampled = std::min(count, sampled_rows_);
    scratch.ids.resize(sampled);
    for (int64_t at = 0; at < sampled; ++at) {
      const int64_t first = at * count / sampled;
      const int64_t size = (at + 1) * count / sampled - first;
      const uint64_t draw = splitmix(seed ^ splitmix(static_cast<uint64_t>(at)));
      scratch.ids[at] = ids[first + static_cast<int64_t>(draw % static_cast<uint64_t>(size))];
    }
    copy_rows(scratch);
  }
  // Products of rows [first, last) with the directions of the node that each belongs to.
  void project(const std::vector<Division>& divisions, int32_t first, int64_t last) {
    std::vector<Stretch> stretches;
    for (const Division& each : divisions) {
      const std::span<const int32_t> ids = ids_of(each.node);
      const auto begin = std::lower_bound(ids.begin(), ids.end(), first);
      const int64_t end = std::lower_bound(begin, ids.end(), last) - ids.begin();
      for (int64_t at = begin - ids.begin(); at < end; at += kBlock) {
        stretches.push_back({&each, at, std::min(kBlock, end - at)});
      }
    }
    for_each(stretches, [&](const Stretch& stretch, Scratch&) { project(stretch); });
  }
  void project(const Stretch& stretch) const {
    const Division& division = *stretch.division;
    const std::span<const int32_t> all = ids_of(division.node);
    const auto ids = all.subspan(stretch.first, stretch.count);
    const auto cols = static_cast<size_t>(x_.cols);
    const auto stride = static_cast<size_t>(x_.stride);
    const float* const directions = division.directions.data();
    const size_t splits = division.splits.size();
    float* const out = division.scores + stretch.first;
    if (x_.scalar == Scalar::f16) {
      kernels().project_f16({x_.f16(0), stride, ids.data(), ids.size()}, cols, directions, splits,
                            out, all.size());
    } else {
      kernels().project_f32({x_.f32(0), stride, ids.data(), ids.size()}, cols, directions, splits,
                            out, all.size());
    }
    for (size_t split = 0; split < splits; ++split) {
      float* const scores = out + split * all.size();
      for (size_t at = 0; at < ids.size(); ++at) scores[at] *= inverse_[ids[at]];
    }
  }

  const MatrixView& x_;
  std::span<const int64_t> offsets_;
  const ClusterParams& params_;
  Cancel& cancel_;
  std::span<int32_t> order_;
  int64_t dim_;
  int64_t copied_rows_;
  int64_t sampled_rows_;
  std::vector<float> inverse_;
  std::optional<Fetch> fetch_;
  std::vector<Scratch> scratch_;
};

}  // namespace

void balanced_clusters(const MatrixView& x, std::span<const int64_t> offsets,
                       const ClusterParams& params, Cancel& cancel, std::span<int32_t> order) {
  check_offsets(offsets, x.rows, 1);
  if (x.rows > 0) Tree(x, offsets, params, cancel, order).build();
}

double coherence(const MatrixView& x, const ClustersView& clusters, int threads, Cancel& cancel) {
  clusters.check(x.rows);
  std::vector<float> inverse(static_cast<size_t>(x.rows));
  inverse_norms(x, threads, cancel, inverse);
  const Fetch fetch(x);
  struct Sums {
    std::vector<float> row;
    std::vector<double> sum;
  };
  std::vector<Sums> of_thread(static_cast<size_t>(threads));
  std::vector<double> squares(static_cast<size_t>(clusters.count()));
  parallel_for(clusters.count(), threads, cancel, [&](int64_t cluster, int thread) {
    auto& [row, sum] = of_thread[thread];
    row.resize(padded(x.cols));
    sum.assign(row.size(), 0.0);
    const int64_t begin = clusters.offsets[cluster];
    const int64_t end = clusters.offsets[cluster + 1];
    for (int64_t at = begin; at < end; ++at) {
      if (at % kBlock == 0) cancel.check();
      // Clusters are small: the row asked for may be the next one's.
      if (at + fetch.ahead() < x.rows) fetch.row(clusters.order[at + fetch.ahead()]);
      const int32_t id = clusters.order[at];
      copy_row(x, id, inverse[id], row.data());
      for (size_t col = 0; col < row.size(); ++col) sum[col] += row[col];
    }
    const double rows = std::max(1.0, static_cast<double>(end - begin));
    for (const double value : sum) squares[cluster] += value / rows * (value / rows);
  });
  const double total = std::accumulate(squares.begin(), squares.end(), 0.0);
  return total / std::max(1.0, static_cast<double>(squares.size()));
}

}  // namespace ngame

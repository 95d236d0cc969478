#include "cluster.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "aligned.h"
#include "bisector.h"
#include "cut.h"
#include "kernels.h"
#include "matrix.h"
#include "random.h"
#include "refine.h"

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

// How a large node is divided: splits, level after level, and to each its direction; what they
// leave; and where the products of the node's rows with the directions go, split after split.
struct Division {
  Node node;
  std::vector<Node> splits;
  std::vector<int> levels;  // of the splits
  AlignedVector<float> directions;
  std::vector<Node> parts;
  float* scores;
};

// A sample of the rows of a node that is divided: ids, packed unit vectors, and their order.
struct Sample {
  std::vector<int32_t> ids, local;
  AlignedVector<uint32_t> rows;
};

// A node within a division, with its rows of the sample and their sum; and, once it is split, how
// many of them are on the left, their sum and the direction.
struct Lesson {
  Division* division;
  Sample* sample;
  Node node;
  std::span<int32_t> local;
  std::vector<float> sum;
  int64_t left = 0;
  std::vector<float> left_sum{}, direction{};
};

// Rows ids[first .. first + count) of a node that is divided.
struct Stretch {
  const Division* division;
  int64_t first;
  int64_t count;
};

class Tree {
 public:
  Tree(const MatrixView& x, std::span<const float> inverse, const Fetch& fetch,
       std::span<const int64_t> offsets, const ClusterParams& params, Cancel& cancel,
       std::span<int32_t> order)
      : x_(x),
        inverse_(inverse),
        fetch_(fetch),
        offsets_(offsets),
        params_(params),
        cancel_(cancel),
        order_(order),
        dim_(rounded_up(x.cols, kPackedUnit)),
        copied_rows_(std::max(kCopiedBytes / std::max<int64_t>(2 * dim_, 1), kLeastCopied)),
        sampled_rows_(std::max(std::min(std::max(kSampledRowsPerDimension * dim_, kSampledRows),
                                        kSampledBytes / std::max<int64_t>(2 * dim_, 1)),
                               kLeastCopied)),
        scratch_(static_cast<size_t>(params.threads), Scratch(dim_)) {}

  void build() {
    std::iota(order_.begin(), order_.end(), 0);
    // Each round reads `x` once for all large nodes; then small ones are finished on copies.
    std::vector<Node> small;
    std::vector<Division> divisions;
    std::vector<float> scores;
    const auto sort_out = [&](const Node& node) {
      if (is_large(node)) {
        divisions.push_back({node, {}, {}, {}, {}, nullptr});
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
                 [&](int64_t item, int thread) { body(items[item], scratch_[thread]); });
  }

  void finish(const Node& node, Scratch& scratch) {
    if (node.clusters() == 1) return;
    const std::span<int32_t> ids = ids_of(node);
    scratch.ids.assign(ids.begin(), ids.end());
    copy_rows(scratch);
    divide(node, scratch.local, 0, scratch);
    for (size_t row = 0; row < ids.size(); ++row) ids[row] = scratch.ids[scratch.local[row]];
  }

  // Packs the unit vectors of scratch.ids, numbers them (scratch.local is 0, 1, ...) and sums them.
  void copy_rows(Scratch& scratch) const {
    const auto count = static_cast<int64_t>(scratch.ids.size());
    scratch.rows.resize(count * dim_ / 2);
    scratch.local.resize(count);
    std::iota(scratch.local.begin(), scratch.local.end(), 0);
    pack(scratch.ids, scratch.rows.data());
    scratch.bisector.add(scratch.rows.data(), scratch.local, sum_of(0, scratch));
  }
  // Packs the unit vectors of some rows.
  void pack(std::span<const int32_t> ids, uint32_t* out) const {
    const auto cols = static_cast<size_t>(x_.cols);
    const auto ahead = static_cast<size_t>(fetch_.ahead());
    for (size_t row = 0; row < std::min(ahead, ids.size()); ++row) fetch_.row(ids[row]);
    for (size_t row = 0; row < ids.size(); ++row, out += dim_ / 2) {
      if (row % kBlock == 0) cancel_.check();
      if (row + ahead < ids.size()) fetch_.row(ids[row + ahead]);
      const int32_t id = ids[row];
      if (x_.scalar == Scalar::f16) {
        kernels().pack_f16(x_.f16(id), cols, inverse_[id], out);
      } else {
        kernels().pack_f32(x_.f32(id), cols, inverse_[id], out);
      }
    }
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
    for (size_t col = 0; col < sum.size(); ++col) sum[col] -= left_sum[col];
  }

  // Divides large nodes by some levels, in one pass over the rows.
  void divide(std::vector<Division>& divisions, std::vector<float>& scores) {
    // As many samples at a time as there are threads.
    const auto threads = static_cast<size_t>(params_.threads);
    for (size_t first = 0; first < divisions.size(); first += threads) {
      learn(std::span(divisions).subspan(first, std::min(threads, divisions.size() - first)));
    }
    int64_t needed = 0;
    for (const Division& each : divisions) needed += scores_of(each);
    if (static_cast<int64_t>(scores.size()) < needed) scores.resize(needed);
    float* next = scores.data();
    for (Division& each : divisions) next = (each.scores = next) + scores_of(each);
    fetch_.for_each_window([&](int64_t first, int64_t last) {
      project(divisions, static_cast<int32_t>(first), last);
    });
    apply(divisions);
  }
  int64_t scores_of(const Division& division) const {
    return static_cast<int64_t>(division.splits.size()) * rows_of(division.node);
  }
  // Orders the rows of nodes as the scores say, level after level: the splits of one are shared.
  void apply(const std::vector<Division>& divisions) {
    struct Split {
      const Division* division;
      size_t index;
    };
    std::vector<std::vector<Split>> levels;
    std::vector<Stretch> stretches;
    positions_.resize(order_.size());
    for (const Division& each : divisions) {
      for (size_t index = 0; index < each.splits.size(); ++index) {
        const auto level = static_cast<size_t>(each.levels[index]);
        if (level == levels.size()) levels.emplace_back();
        levels[level].push_back({&each, index});
      }
      const int64_t first = offsets_[each.node.first];
      const int64_t rows = rows_of(each.node);
      std::iota(positions_.begin() + first, positions_.begin() + first + rows, 0);
      for (int64_t row = 0; row < rows; row += kBlock) {
        stretches.push_back({&each, row, std::min(kBlock, rows - row)});
      }
    }
    for (std::vector<Split>& level : levels) {
      for_each(level, [&](const Split& split, Scratch& scratch) {
        const Division& division = *split.division;
        const Node& node = division.splits[split.index];
        const float* const scores = division.scores + split.index * rows_of(division.node);
        const auto part = std::span(positions_).subspan(offsets_[node.first], rows_of(node));
        scratch.chosen.resize(part.size());
        for (size_t row = 0; row < part.size(); ++row) scratch.chosen[row] = scores[part[row]];
        Cut cut = Cut::find(scratch.chosen, left_rows(node));
        partition(part, scratch.spare, [&](size_t row) { return cut.takes(scratch.chosen[row]); });
      });
    }
    // Positions become ids.
    const auto positions_of = [&](const Stretch& stretch) {
      return std::span(positions_)
          .subspan(offsets_[stretch.division->node.first] + stretch.first, stretch.count);
    };
    for_each(stretches, [&](const Stretch& stretch, Scratch&) {
      const std::span<const int32_t> ids = ids_of(stretch.division->node);
      for (int32_t& position : positions_of(stretch)) position = ids[position];
    });
    for_each(stretches, [&](const Stretch& stretch, Scratch&) {
      const auto ids = positions_of(stretch);
      std::copy(ids.begin(), ids.end(), ids_of(stretch.division->node).begin() + stretch.first);
    });
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
  // Learns how to divide nodes, on a sample of each, level after level: the nodes of one are
  // shared.
  void learn(std::span<Division> divisions) {
    std::vector<Sample> samples(divisions.size());
    std::vector<Stretch> stretches;
    for (size_t index = 0; index < divisions.size(); ++index) {
      Sample& sample = samples[index];
      draw(divisions[index].node, sample);
      const auto rows = static_cast<int64_t>(sample.ids.size());
      sample.rows.resize(rows * dim_ / 2);
      for (int64_t row = 0; row < rows; row += kBlock) {
        stretches.push_back({&divisions[index], row, std::min(kBlock, rows - row)});
      }
    }
    for_each(stretches, [&](const Stretch& stretch, Scratch&) {
      Sample& sample = samples[stretch.division - divisions.data()];
      pack(std::span(sample.ids).subspan(stretch.first, stretch.count),
           sample.rows.data() + stretch.first * dim_ / 2);
    });
    std::vector<Lesson> lessons;
    for (size_t index = 0; index < divisions.size(); ++index) {
      lessons.push_back({&divisions[index], &samples[index], divisions[index].node,
                         samples[index].local, std::vector<float>(dim_)});
    }
    for_each(lessons, [&](Lesson& lesson, Scratch& scratch) {
      scratch.bisector.add(lesson.sample->rows.data(), lesson.local, lesson.sum);
    });
    for (int level = 0; !lessons.empty(); ++level) {
      std::erase_if(lessons, [&](const Lesson& lesson) {
        const bool goes_on = level < levels_at_once(rows_of(lesson.division->node)) &&
                             is_large(lesson.node) &&
                             static_cast<int64_t>(lesson.local.size()) >= kLeastSampled;
        if (!goes_on) lesson.division->parts.push_back(lesson.node);
        return !goes_on;
      });
      for_each(lessons, [&](Lesson& lesson, Scratch& scratch) { split(lesson, scratch); });
      std::vector<Lesson> halves;
      for (Lesson& lesson : lessons) {
        auto& [node, splits, levels, directions, parts, scores] = *lesson.division;
        splits.push_back(lesson.node);
        levels.push_back(level);
        directions.insert(directions.end(), lesson.direction.begin(), lesson.direction.end());
        for (int64_t col = 0; col < dim_; ++col) lesson.sum[col] -= lesson.left_sum[col];
        halves.push_back({lesson.division, lesson.sample, lesson.node.left(),
                          lesson.local.first(lesson.left), std::move(lesson.left_sum)});
        halves.push_back({lesson.division, lesson.sample, lesson.node.right(),
                          lesson.local.subspan(lesson.left), std::move(lesson.sum)});
      }
      lessons = std::move(halves);
    }
  }
  // Divides the sampled rows of a node as the node is to be divided.
  void split(Lesson& lesson, Scratch& scratch) {
    const Node& node = lesson.node;
    const auto sampled = static_cast<int64_t>(lesson.local.size());
    const double share = static_cast<double>(left_rows(node)) / static_cast<double>(rows_of(node));
    lesson.left = std::clamp(static_cast<int64_t>(share * static_cast<double>(sampled)), int64_t{1},
                             sampled - 1);
    Bisector& bisector = scratch.bisector;
    bisector.split(lesson.sample->rows.data(), lesson.local, lesson.left, lesson.sum, node.seed,
                   params_.max_iterations, cancel_);
    lesson.left_sum.assign(bisector.left_sum().begin(), bisector.left_sum().end());
    lesson.direction.assign(bisector.direction().begin(), bisector.direction().end());
  }
  // One row at random from each of some equal stretches of a node's rows.
  void draw(const Node& node, Sample& sample) const {
    const std::span<const int32_t> ids = ids_of(node);
    const auto count = static_cast<int64_t>(ids.size());
    const int64_t sampled = std::min(count, sampled_rows_);
    sample.ids.resize(sampled);
    sample.local.resize(sampled);
    std::iota(sample.local.begin(), sample.local.end(), 0);
    for (int64_t row = 0; row < sampled; ++row) {
      const int64_t first = row * count / sampled;
      const int64_t size = (row + 1) * count / sampled - first;
      const uint64_t number = splitmix(node.seed ^ splitmix(static_cast<uint64_t>(row)));
      sample.ids[row] = ids[first + static_cast<int64_t>(number % static_cast<uint64_t>(size))];
    }
  }
  // Products of rows [first, last) with the directions of the node that each belongs to.
  void project(const std::vector<Division>& divisions, int32_t first, int64_t last) {
    std::vector<Stretch> stretches;
    for (const Division& each : divisions) {
      const std::span<const int32_t> ids = ids_of(each.node);
      const auto begin = std::lower_bound(ids.begin(), ids.end(), first);
      const int64_t end = std::lower_bound(begin, ids.end(), last) - ids.begin();
      for (int64_t row = begin - ids.begin(); row < end; row += kBlock) {
        stretches.push_back({&each, row, std::min(kBlock, end - row)});
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
      for (size_t row = 0; row < ids.size(); ++row) scores[row] *= inverse_[ids[row]];
    }
  }

  const MatrixView& x_;
  std::span<const float> inverse_;
  const Fetch& fetch_;
  std::span<const int64_t> offsets_;
  const ClusterParams& params_;
  Cancel& cancel_;
  std::span<int32_t> order_;
  int64_t dim_;
  int64_t copied_rows_;
  int64_t sampled_rows_;
  std::vector<int32_t> positions_;  // of rows within the node that is divided
  std::vector<Scratch> scratch_;
};

}  // namespace

void balanced_clusters(const MatrixView& x, std::span<const int64_t> offsets,
                       const ClusterParams& params, Cancel& cancel, std::span<int32_t> order) {
  check_offsets(offsets, x.rows, 1);
  if (x.rows == 0) return;
  std::vector<float> inverse(static_cast<size_t>(x.rows));
  inverse_norms(x, params.threads, cancel, inverse);
  const Fetch fetch(x);
  Tree(x, inverse, fetch, offsets, params, cancel, order).build();
  if (params.refine > 0) {
    refine(x, inverse, fetch, offsets, params.refine, params.threads, cancel, order);
  }
}

void refine_clusters(const MatrixView& x, const ClustersView& given, int rounds,
                     int64_t most_compared, int threads, Cancel& cancel, std::span<int32_t> order) {
  // Another thread may change the caller's arrays: what is checked is what is used.
  std::copy(given.order.begin(), given.order.end(), order.begin());
  const std::vector<int64_t> offsets(given.offsets.begin(), given.offsets.end());
  check_offsets(offsets, x.rows, 1);
  ClustersView{order, offsets}.check(x.rows);
  std::vector<char> seen(order.size());
  for (const int32_t id : order) {
    if (seen[id]++) throw std::invalid_argument("order has id " + std::to_string(id) + " twice");
  }
  for (size_t cluster = 1; cluster < offsets.size(); ++cluster) {
    std::sort(order.begin() + offsets[cluster - 1], order.begin() + offsets[cluster]);
  }
  if (x.rows == 0) return;
  std::vector<float> inverse(static_cast<size_t>(x.rows));
  inverse_norms(x, threads, cancel, inverse);
  refine(x, inverse, Fetch(x), offsets, rounds, threads, cancel, order, most_compared);
}

namespace {

// body(cluster, rows, sum) for every cluster: how many rows it has, the sum of their unit vectors.
template <class Body>
void for_each_sum(const MatrixView& x, const ClustersView& given, int threads, Cancel& cancel,
                  const Body& body) {
  // Another thread may change the caller's arrays: what is checked is what is used.
  const std::vector<int32_t> order(given.order.begin(), given.order.end());
  const std::vector<int64_t> offsets(given.offsets.begin(), given.offsets.end());
  const ClustersView clusters{order, offsets};
  clusters.check(x.rows);
  std::vector<float> inverse(static_cast<size_t>(x.rows));
  inverse_norms(x, threads, cancel, inverse);
  const Fetch fetch(x);
  struct Sums {
    std::vector<float> weights, part;
    std::vector<double> sum;
  };
  std::vector<Sums> of_thread(static_cast<size_t>(threads));
  const auto cols = static_cast<size_t>(x.cols);
  const auto stride = static_cast<size_t>(x.stride);
  parallel_for(clusters.count(), threads, cancel, [&](int64_t cluster, int thread) {
    auto& [weights, part, sum] = of_thread[thread];
    sum.assign(cols, 0.0);
    const int64_t end = offsets[cluster + 1];
    // Floats sum few rows well, doubles the many of a large cluster.
    for (int64_t first = offsets[cluster]; first < end; first += kBlock) {
      cancel.check();
      const auto ids = std::span(order).subspan(first, std::min(kBlock, end - first));
      weights.clear();
      for (const int32_t id : ids) {
        if (fetch.from_disk()) fetch.row(id);
        weights.push_back(inverse[id]);
      }
      part.assign(cols, 0.0f);
      if (x.scalar == Scalar::f16) {
        kernels().accumulate_f16({x.f16(0), stride, ids.data(), ids.size()}, cols, weights.data(),
                                 part.data());
      } else {
        kernels().accumulate_f32({x.f32(0), stride, ids.data(), ids.size()}, cols, weights.data(),
                                 part.data());
      }
      for (size_t col = 0; col < cols; ++col) sum[col] += part[col];
    }
    body(cluster, end - offsets[cluster], std::span<const double>(sum));
  });
}

}  // namespace

void cluster_sums(const MatrixView& x, const ClustersView& clusters, int threads, Cancel& cancel,
                  std::span<float> sums) {
  for_each_sum(x, clusters, threads, cancel,
               [&](int64_t cluster, int64_t, std::span<const double> sum) {
                 std::copy(sum.begin(), sum.end(), sums.begin() + cluster * x.cols);
               });
}

double coherence(const MatrixView& x, const ClustersView& clusters, int threads, Cancel& cancel) {
  std::vector<double> squares(clusters.offsets.size());  // one more than there are clusters
  for_each_sum(x, clusters, threads, cancel,
               [&](int64_t cluster, int64_t rows, std::span<const double> sum) {
                 const double size = std::max(1.0, static_cast<double>(rows));
                 for (const double value : sum) squares[cluster] += value / size * (value / size);
               });
  const double total = std::accumulate(squares.begin(), squares.end(), 0.0);
  return total / std::max(1.0, static_cast<double>(clusters.count()));
}

}  // namespace ngame

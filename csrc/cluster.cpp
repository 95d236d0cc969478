#include "cluster.h"

#include <bit>
#include <cmath>
#include <limits>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

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

// 2-means of at least so many rows starts from the result on every fourth of them.
constexpr int64_t kCoarse = 256;

// Rounds of the power method before 2-means, each on so many rows at most. Starting near the
// leading component, and not just at two random rows, gives tighter clusters (by nearly 1 %).
constexpr int kPowerRounds = 2;
constexpr int64_t kPowerRows = 128;

// Rows whose products and sum are taken together, so that the second finds them in the nearest
// cache; and how many rows ahead of a copy its next ones are asked for.
constexpr int64_t kFewRows = 16;
constexpr int64_t kAhead = 4;

// On cache line borders: a load of a whole vector then never straddles two lines.
template <class Element>
struct Aligned {
  using value_type = Element;
  static constexpr std::align_val_t kLine{64};

  Aligned() = default;
  template <class Other>
  explicit Aligned(const Aligned<Other>&) {}
  Element* allocate(size_t count) {
    return static_cast<Element*>(::operator new(count * sizeof(Element), kLine));
  }
  void deallocate(Element* memory, size_t) { ::operator delete(memory, kLine); }
  bool operator==(const Aligned&) const = default;
};
template <class Element>
using AlignedVector = std::vector<Element, Aligned<Element>>;

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

// Floats as integers in the same order.
int32_t rank_of(float value) {
  const auto bits = std::bit_cast<int32_t>(value);
  return bits < 0 ? std::numeric_limits<int32_t>::min() - bits : bits;
}
float at_rank(int32_t rank) {
  return std::bit_cast<float>(rank < 0 ? std::numeric_limits<int32_t>::min() - rank : rank);
}

// The `count` smallest of some scores, ties by lower position: those below `value` and the first
// `ties` that equal it.
struct Cut {
  float value;
  int64_t ties;

  // Narrows an interval of values. Counting what is below a value is a fast pass without branches,
  // about ten of which are needed: cheaper than moving the scores about.
  static Cut find(std::span<const float> scores, int64_t count) {
    float least = 0;
    float most = 0;
    kernels().extremes(scores.data(), scores.size(), &least, &most);
    // Fewer than `count` are below `low`, more are below `high`.
    int32_t low = rank_of(least);
    int32_t high = rank_of(most) + 1;
    int64_t below_low = 0;
    auto below_high = static_cast<int64_t>(scores.size());
    for (int step = 1; static_cast<int64_t>(high) - low > 1; ++step) {
      int64_t middle = (static_cast<int64_t>(low) + high) / 2;
      if (step % 3 != 0) {
        // Where the count would be reached if the values between lay evenly.
        const double share =
            static_cast<double>(count - below_low) / static_cast<double>(below_high - below_low);
        const double from = at_rank(low);
        const double guess = from + share * (static_cast<double>(at_rank(high)) - from);
        middle = std::clamp<int64_t>(rank_of(static_cast<float>(guess)),
                                     static_cast<int64_t>(low) + 1, static_cast<int64_t>(high) - 1);
      }
      const float value = at_rank(static_cast<int32_t>(middle));
      const auto below =
          static_cast<int64_t>(kernels().count_below(scores.data(), scores.size(), value));
      if (below == count) return {value, 0};
      if (below < count) {
        low = static_cast<int32_t>(middle);
        below_low = below;
      } else {
        high = static_cast<int32_t>(middle);
        below_high = below;
      }
    }
    return {at_rank(low), count - below_low};
  }
  // To be asked for every position in ascending order.
  bool takes(float score) {
    const bool tie = (score == value) & (ties > 0);
    ties -= tie;
    return (score < value) | tie;
  }
};

// Moves the positions that `taken` holds for to the front, order kept on both sides.
template <class Taken>
void partition(std::span<int32_t> values, std::vector<int32_t>& spare, const Taken& taken) {
  spare.resize(values.size());
  size_t front = 0;
  size_t rest = 0;
  for (size_t at = 0; at < values.size(); ++at) {
    const int32_t value = values[at];
    const bool front_side = taken(at);
    values[front] = value;
    spare[rest] = value;
    front += front_side;
    rest += !front_side;
  }
  std::copy_n(spare.begin(), rest, values.begin() + front);
}

void normalise(std::span<float> vector) {
  const float squares = kernels().squared_norm_f32(vector.data(), vector.size());
  const float scale = squares > 0 ? 1.0f / std::sqrt(squares) : 0.0f;
  for (float& value : vector) value *= scale;
}

// 2-means with halves of given size, on packed unit vectors.
class Bisector {
 public:
  explicit Bisector(int64_t dim) : direction_(dim), left_sum_(dim), other_(dim), part_sum_(dim) {}

  // Splits the rows `ids`, whose sum is `sum`: `left` of them are moved to the front, order kept on
  // both sides.
  void split(const uint32_t* rows, std::span<int32_t> ids, int64_t left, std::span<const float> sum,
             uint64_t seed, int max_iterations, Cancel& cancel) {
    const auto count = static_cast<int64_t>(ids.size());
    scores_.resize(ids.size());
    weights_.resize(ids.size());
    side_.resize(ids.size());
    moved_.resize(ids.size());
    start(rows, ids, sum, seed);
    int64_t step = 1;
    while (count / step >= kCoarse) step *= 4;
    for (; step > 1; step /= 4) {
      part_.clear();
      for (int64_t at = 0; at < count; at += step) part_.push_back(ids[at]);
      const auto size = static_cast<int64_t>(part_.size());
      add(rows, part_, part_sum_);
      iterate(rows, part_, std::clamp<int64_t>(left * size / count, 1, size - 1), part_sum_,
              max_iterations, cancel);
    }
    iterate(rows, ids, left, sum, max_iterations, cancel);
    partition(ids, moved_, [&](size_t at) { return side_[at] != 0; });
  }

  // Of the last split: left rows have the smaller products with the direction.
  std::span<const float> direction() const { return direction_; }
  std::span<const float> left_sum() const { return left_sum_; }

  // Sum of some rows.
  void add(const uint32_t* rows, std::span<const int32_t> ids, std::span<float> sum) {
    weights_.assign(std::max(ids.size(), weights_.size()), 1.0f);
    std::fill(sum.begin(), sum.end(), 0.0f);
    kernels().accumulate_packed(gather(rows, ids), weights_.data(), sum.data());
  }

 private:
  GatheredRows<uint32_t> gather(const uint32_t* rows, std::span<const int32_t> ids) const {
    return {rows, direction_.size() / 2, ids.data(), ids.size()};
  }
  // Turns from the line between two random rows towards the direction of the largest variance.
  void start(const uint32_t* rows, std::span<const int32_t> ids, std::span<const float> sum,
             uint64_t seed) {
    const uint64_t count = ids.size();
    const uint64_t first = splitmix(seed) % count;
    const uint64_t second = (first + 1 + splitmix(seed + 1) % (count - 1)) % count;
    const int32_t ends[] = {ids[second], ids[first]};
    const float signs[] = {1.0f, -1.0f};
    std::fill(direction_.begin(), direction_.end(), 0.0f);
    kernels().accumulate_packed(gather(rows, ends), signs, direction_.data());
    const int64_t used = std::min<int64_t>(static_cast<int64_t>(count), kPowerRows);
    part_.resize(used);
    for (int64_t at = 0; at < used; ++at) part_[at] = ids[at * count / used];
    for (int round = 0; round < kPowerRounds; ++round) {
      const int32_t only = 0;
      float mean = 0;
      kernels().project_f32({sum.data(), 0, &only, 1}, sum.size(), direction_.data(), 1, &mean, 1);
      mean /= static_cast<float>(count);
      double weight = 0;
      std::fill(other_.begin(), other_.end(), 0.0f);
      for (int64_t begin = 0; begin < used; begin += kFewRows) {
        const auto few =
            gather(rows, std::span(part_).subspan(begin, std::min(kFewRows, used - begin)));
        kernels().project_packed(few, direction_.data(), scores_.data());
        for (size_t at = 0; at < few.count; ++at) weight += scores_[at] -= mean;
        kernels().accumulate_packed(few, scores_.data(), other_.data());
      }
      const auto share = static_cast<float>(weight / static_cast<double>(count));
      for (size_t at = 0; at < sum.size(); ++at) direction_[at] = other_[at] - share * sum[at];
      normalise(direction_);
    }
  }
  void iterate(const uint32_t* rows, std::span<const int32_t> ids, int64_t left,
               std::span<const float> sum, int max_iterations, Cancel& cancel) {
    const std::span<float> scores = std::span(scores_).first(ids.size());
    std::fill_n(side_.begin(), ids.size(), 0);
    std::fill(left_sum_.begin(), left_sum_.end(), 0.0f);
    for (int iteration = 0; iteration < max_iterations; ++iteration) {
      cancel.check();
      kernels().project_packed(gather(rows, ids), direction_.data(), scores.data());
      // The left sum follows the rows that change sides: few, after the first rounds.
      Cut cut = Cut::find(scores, left);
      size_t moved = 0;
      for (size_t at = 0; at < ids.size(); ++at) {
        const bool now = cut.takes(scores[at]);
        moved_[moved] = ids[at];
        weights_[moved] = now ? 1.0f : -1.0f;
        moved += now != side_[at];
        side_[at] = now;
      }
      if (moved == 0) break;
      kernels().accumulate_packed(gather(rows, std::span(moved_).first(moved)), weights_.data(),
                                  left_sum_.data());
      aim(sum);
    }
  }
  // From the left centre to the right one, both on the sphere.
  void aim(std::span<const float> sum) {
    std::copy(left_sum_.begin(), left_sum_.end(), other_.begin());
    for (size_t at = 0; at < sum.size(); ++at) direction_[at] = sum[at] - left_sum_[at];
    normalise(other_);
    normalise(direction_);
    for (size_t at = 0; at < sum.size(); ++at) direction_[at] -= other_[at];
  }

  AlignedVector<float> direction_, left_sum_, other_, part_sum_, scores_;
  std::vector<float> weights_;
  std::vector<char> side_;
  std::vector<int32_t> moved_, part_;
};

// What one thread needs for itself.
struct Scratch {
  explicit Scratch(int64_t dim) : bisector(dim) {}
  Bisector bisector;
  AlignedVector<uint32_t> rows;  // packed unit vectors
  std::vector<int32_t> ids, local, spare;
  std::vector<float> sums;   // of the rows of one node a level
  std::vector<Node> splits;  // of a large node, parents first; to each its direction
  AlignedVector<float> directions;
  std::vector<float> scores;
  AlignedVector<float> chosen;
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
    std::iota(order_.begin(), order_.end(), 0);
    // Threads share a node while there are few nodes, then each takes nodes of its own; once there
    // are enough for an even load it takes all below them too.
    const auto threads = static_cast<size_t>(params_.threads);
    std::vector<Node> nodes = {{0, static_cast<int64_t>(offsets_.size()) - 1, params_.seed}};
    std::vector<Node> tasks;
    while (!nodes.empty() && nodes.size() < 16 * threads) {
      const bool shared = nodes.size() < threads;
      std::vector<std::vector<Node>> parts(nodes.size());
      parallel_for(static_cast<int64_t>(nodes.size()), shared ? 1 : params_.threads, cancel_,
                   [&](int64_t at, int thread) {
                     if (!is_large(nodes[at])) return;
                     parts[at] = split(nodes[at], shared ? params_.threads : 1, scratch_[thread]);
                   });
      const std::vector<Node> parents = std::exchange(nodes, {});
      for (size_t at = 0; at < parents.size(); ++at) {
        if (parts[at].empty()) tasks.push_back(parents[at]);
        nodes.insert(nodes.end(), parts[at].begin(), parts[at].end());
      }
    }
    tasks.insert(tasks.end(), nodes.begin(), nodes.end());
    parallel_for(static_cast<int64_t>(tasks.size()), params_.threads, cancel_,
                 [&](int64_t task, int thread) { finish(tasks[task], scratch_[thread]); });
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

  void finish(const Node& node, Scratch& scratch) {
    if (node.clusters() == 1) return;
    if (is_large(node)) {
      for (const Node& child : split(node, 1, scratch)) finish(child, scratch);
      return;
    }
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
    for (int64_t at = 0; at < count; ++at) {
      if (at % kBlock == 0) cancel_.check();
      if (at + kAhead < count) prefetch(scratch.ids[at + kAhead]);
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
  void prefetch(int64_t row) const {
    const int64_t size = x_.scalar == Scalar::f16 ? 2 : 4;
    const char* const begin = static_cast<const char*>(x_.data) + row * x_.stride * size;
    for (int64_t at = 0; at < x_.cols * size; at += 64) __builtin_prefetch(begin + at);
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

  // Divides a large node by some levels and returns the parts.
  std::vector<Node> split(const Node& node, int threads, Scratch& scratch) {
    const std::span<int32_t> ids = ids_of(node);
    const auto count = static_cast<int64_t>(ids.size());
    sample(ids, node.seed, scratch);
    scratch.splits.clear();
    scratch.directions.clear();
    std::vector<Node> parts;
    learn(node, scratch.local, levels_at_once(count), 0, parts, scratch);
    scratch.scores.resize(scratch.splits.size() * ids.size());
    project(ids, threads, scratch);
    std::vector<int32_t>& positions = scratch.ids;
    positions.resize(ids.size());
    std::iota(positions.begin(), positions.end(), 0);
    const float* scores = scratch.scores.data();
    for (const Node& each : scratch.splits) {
      cancel_.check();
      const int64_t first = offsets_[each.first] - offsets_[node.first];
      const auto part = std::span(positions).subspan(first, rows_of(each));
      scratch.chosen.resize(part.size());
      for (size_t at = 0; at < part.size(); ++at) scratch.chosen[at] = scores[part[at]];
      Cut cut = Cut::find(scratch.chosen, left_rows(each));
      partition(part, scratch.spare, [&](size_t at) { return cut.takes(scratch.chosen[at]); });
      scores += count;
    }
    for (int32_t& position : positions) position = ids[position];
    std::copy(positions.begin(), positions.end(), ids.begin());
    return parts;
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
             std::vector<Node>& parts, Scratch& scratch) {
    const auto sampled = static_cast<int64_t>(local.size());
    if (levels == 0 || !is_large(node) || sampled < kLeastSampled) {
      parts.push_back(node);
      return;
    }
    const double share = static_cast<double>(left_rows(node)) / static_cast<double>(rows_of(node));
    const auto left = std::clamp(static_cast<int64_t>(share * static_cast<double>(sampled)),
                                 int64_t{1}, sampled - 1);
    bisect(node, local, left, level, scratch);
    scratch.splits.push_back(node);
    const std::span<const float> direction = scratch.bisector.direction();
    scratch.directions.insert(scratch.directions.end(), direction.begin(), direction.end());
    learn(node.left(), local.first(left), levels - 1, level + 1, parts, scratch);
    learn(node.right(), local.subspan(left), levels - 1, level, parts, scratch);
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
  // Products of all rows with the directions of all splits.
  void project(std::span<const int32_t> ids, int threads, Scratch& scratch) {
    const auto count = static_cast<int64_t>(ids.size());
    parallel_for((count + kBlock - 1) / kBlock, threads, cancel_, [&](int64_t block, int) {
      const int64_t first = block * kBlock;
      const auto part = ids.subspan(first, std::min(kBlock, count - first));
      const auto cols = static_cast<size_t>(x_.cols);
      const auto stride = static_cast<size_t>(x_.stride);
      const float* const directions = scratch.directions.data();
      float* const out = scratch.scores.data() + first;
      if (x_.scalar == Scalar::f16) {
        kernels().project_f16({x_.f16(0), stride, part.data(), part.size()}, cols, directions,
                              scratch.splits.size(), out, ids.size());
      } else {
        kernels().project_f32({x_.f32(0), stride, part.data(), part.size()}, cols, directions,
                              scratch.splits.size(), out, ids.size());
      }
      for (size_t split = 0; split < scratch.splits.size(); ++split) {
        float* const scores = out + split * ids.size();
        for (size_t at = 0; at < part.size(); ++at) scores[at] *= inverse_[part[at]];
      }
    });
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
  std::vector<double> squares(static_cast<size_t>(clusters.count()));
  parallel_for(clusters.count(), threads, cancel, [&](int64_t cluster, int) {
    const auto ids = clusters[cluster];
    std::vector<float> row(padded(x.cols));
    std::vector<double> sum(row.size());
    for (const int32_t id : ids) {
      copy_row(x, id, inverse[id], row.data());
      for (size_t at = 0; at < row.size(); ++at) sum[at] += row[at];
    }
    const double rows = std::max(1.0, static_cast<double>(ids.size()));
    for (const double value : sum) squares[cluster] += value / rows * (value / rows);
  });
  const double total = std::accumulate(squares.begin(), squares.end(), 0.0);
  return total / std::max(1.0, static_cast<double>(squares.size()));
}

}  // namespace ngame

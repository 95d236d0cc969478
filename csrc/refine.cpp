#include "refine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <thread>
#include <vector>

#include "aligned.h"
#include "cluster.h"
#include "coding.h"
#include "cut.h"
#include "kernels.h"
#include "scorer.h"

namespace ngame {
namespace {

// Clusters that a row may go to: its own and those nearest to it. More of them are better in one
// round, and fewer with more rounds for the same number of products.
constexpr int64_t kListed = kScored;

// The clusters near a cluster are sought among so many for each of its rows, within bounds; all are
// searched where there are no more. Else clusters are themselves clustered into groups, and the
// nearest groups are searched.
constexpr int64_t kSearchedForRow = 32;
constexpr int64_t kLeastSearched = 256;
constexpr int64_t kMostSearched = 1024;
constexpr int64_t kGroup = 16;
constexpr int kGroupRounds = 2;
constexpr int kGroupIterations = 5;

// Where there are more groups than are compared with each other, groups of so many of them are
// made, and half as many as would be compared are searched.
constexpr int64_t kGroupOfGroups = 4;

// A row moves only for a cosine that is better by so much: far below any gain, above the noise of
// equal rows.
constexpr float kLeastGain = 3e-5f;

// Rounds end with one that does not make the clusters tighter by this.
constexpr double kLeastProgress = 1.005;

// Clusters, groups of them, and rows of a cluster, that a thread takes at a time.
constexpr int64_t kClusters = 8;
constexpr int64_t kGroups = 8;
constexpr int64_t kRows = 64;
constexpr int64_t kMatchedRows = 2048;

constexpr float kNone = -2.0f;  // of what is not to be chosen: below every cosine

struct Scratch {
  AlignedVector<float> rows;  // unit vectors
  std::vector<float> scores, keys;
  std::vector<int32_t> ids;
};

class Refinement {
 public:
  Refinement(const MatrixView& x, std::span<const float> inverse, const Fetch& fetch,
             std::span<const int64_t> offsets, int threads, Cancel& cancel,
             std::span<int32_t> order, int64_t most_compared)
      : x_(x),
        inverse_(inverse),
        fetch_(fetch),
        offsets_(offsets),
        threads_(threads),
        cancel_(cancel),
        order_(order),
        most_compared_(std::max(most_compared, int64_t{1})),
        clusters_(static_cast<int64_t>(offsets.size()) - 1),
        dim_(rounded_up(x.cols, kPackedUnit)),
        listed_(std::min(kListed, clusters_)),
        searched_(std::clamp(kSearchedForRow * x.rows / clusters_, kLeastSearched, kMostSearched)),
        means_(static_cast<size_t>(clusters_ * dim_)),
        lengths_(static_cast<size_t>(clusters_)),
        lists_(static_cast<size_t>(clusters_ * listed_)),
        home_(order.size()),
        choices_(order.size() * kRanked),
        asked_(order.size()),
        held_(order.size()),
        held_scores_(order.size()),
        held_count_(static_cast<size_t>(clusters_)),
        locks_(static_cast<size_t>(clusters_)),
        scratch_(static_cast<size_t>(threads)) {}

  // A round that makes the clusters less tight, as may happen where they are of two or three rows,
  // is undone.
  void run(int rounds) {
    double tightest = find_means();
    std::vector<int32_t> before;
    for (int round = 0; round < rounds; ++round) {
      before.assign(order_.begin(), order_.end());
      find_lists();
      choose();
      if (!match()) return;
      const double found = find_means();
      if (found <= tightest) std::copy(before.begin(), before.end(), order_.begin());
      if (found < kLeastProgress * tightest) return;
      tightest = found;
    }
  }

 private:
  std::span<int32_t> ids_of(int64_t cluster) const {
    return order_.subspan(offsets_[cluster], offsets_[cluster + 1] - offsets_[cluster]);
  }
  int64_t room(int64_t cluster) const { return offsets_[cluster + 1] - offsets_[cluster]; }

  // body(cluster, ids, scratch) for the rows of every cluster, in one pass over the rows: where
  // they come from the disk, those of one window after the other.
  template <class Body>
  void for_each_cluster(const Body& body) {
    fetch_.for_each_window([&](int64_t first, int64_t last) {
      for_each_block(clusters_, kClusters, [&](int64_t cluster, Scratch& scratch) {
        const std::span<int32_t> ids = ids_of(cluster);
        const auto begin = std::lower_bound(ids.begin(), ids.end(), first);
        const auto end = std::lower_bound(begin, ids.end(), last);
        if (begin != end) body(cluster, std::span<const int32_t>(begin, end), scratch);
      });
    });
  }
  template <class Body>
  void for_each_block(int64_t items, int64_t block, const Body& body) {
    parallel_for(divided_up(items, block), threads_, cancel_, [&](int64_t index, int thread) {
      const int64_t end = std::min(items, (index + 1) * block);
      for (int64_t item = index * block; item < end; ++item) body(item, scratch_[thread]);
    });
  }

  // Unit vectors of some rows.
  void copy(std::span<const int32_t> ids, Scratch& scratch) const {
    const auto needed = static_cast<size_t>(kRows * dim_);
    if (scratch.rows.size() < needed) scratch.rows.resize(needed, 0.0f);
    const auto cols = static_cast<size_t>(x_.cols);
    for (size_t row = 0; row < ids.size(); ++row) {
      const size_t ahead = row + static_cast<size_t>(fetch_.ahead());
      if (ahead < ids.size()) fetch_.row(ids[ahead]);
      float* const out = scratch.rows.data() + row * dim_;
      if (x_.scalar == Scalar::f16) {
        kernels().scale_f16(x_.f16(ids[row]), cols, inverse_[ids[row]], out);
      } else {
        kernels().scale_f32(x_.f32(ids[row]), cols, inverse_[ids[row]], out);
      }
    }
  }

  // Returns the coherence.
  double find_means() {
    std::fill(means_.begin(), means_.end(), 0.0f);
    for_each_cluster([&](int64_t cluster, std::span<const int32_t> ids, Scratch& scratch) {
      auto& weights = scratch.scores;
      weights.resize(ids.size());
      for (size_t row = 0; row < ids.size(); ++row) weights[row] = inverse_[ids[row]];
      for (size_t first = 0; first < ids.size(); first += kRows) {
        cancel_.check();
        const size_t count = std::min<size_t>(kRows, ids.size() - first);
        const auto cols = static_cast<size_t>(x_.cols);
        const auto stride = static_cast<size_t>(x_.stride);
        if (x_.scalar == Scalar::f16) {
          kernels().accumulate_f16({x_.f16(0), stride, &ids[first], count}, cols, &weights[first],
                                   mean_of(cluster));
        } else {
          kernels().accumulate_f32({x_.f32(0), stride, &ids[first], count}, cols, &weights[first],
                                   mean_of(cluster));
        }
      }
    });
    for_each_block(clusters_, kClusters, [&](int64_t cluster, Scratch&) {
      lengths_[cluster] = normalise(vector(mean_of(cluster)));
    });
    double squares = 0;
    for (int64_t cluster = 0; cluster < clusters_; ++cluster) {
      const double length = lengths_[cluster] / static_cast<double>(room(cluster));
      squares += length * length;
    }
    return squares / static_cast<double>(clusters_);
  }

  // The best of scores of vectors, in the order of `ids`, which ascend; not that of `without`.
  static void best(std::span<float> scores, std::span<const int32_t> ids, int32_t without,
                   std::span<int32_t> out) {
    for (size_t item = 0; item < ids.size(); ++item) {
      scores[item] = ids[item] == without ? -kNone : -scores[item];
    }
    if (out.empty()) return;
    Cut cut = Cut::find(scores, static_cast<int64_t>(out.size()));
    size_t found = 0;
    for (size_t item = 0; found < out.size(); ++item) {
      out[found] = ids[item];
      found += cut.takes(scores[item]);
    }
  }

  // Vectors in an order in which `size` that follow each other are a group.
  struct Groups {
    std::span<const int32_t> order;
    int64_t size;

    int64_t count() const { return divided_up(std::ssize(order), size); }
    std::span<const int32_t> members(int64_t group) const {
      return order.subspan(group * size, std::min(size, std::ssize(order) - group * size));
    }
    std::vector<int64_t> offsets() const {
      std::vector<int64_t> found;
      for (int64_t first = 0; first < std::ssize(order); first += size) found.push_back(first);
      found.push_back(std::ssize(order));
      return found;
    }
  };

  // Unit vectors as 8-bit codes, `dim` of them, times a scale each.
  struct Codes {
    size_t dim;
    AlignedVector<int8_t> values;
    std::vector<float> scales;
  };
  Codes code_means() {
    const auto dim = static_cast<size_t>(rounded_up(dim_, kCodeUnit));
    Codes codes{dim, AlignedVector<int8_t>(static_cast<size_t>(clusters_) * dim, 0),
                std::vector<float>(static_cast<size_t>(clusters_))};
    for_each_block(clusters_, kRows, [&](int64_t cluster, Scratch&) {
      int32_t sum = 0;
      kernels().encode(mean_of(cluster), static_cast<size_t>(dim_), kernels().query_codes,
                       codes.values.data() + cluster * dim, &codes.scales[cluster], &sum);
    });
    return codes;
  }

  // Orders clusters so that kGroup that follow each other are a group: anew, or what was a group
  // before is refined.
  void group() {
    const bool anew = grouped_.empty();
    if (anew) {
      grouped_.resize(static_cast<size_t>(clusters_));
      std::iota(grouped_.begin(), grouped_.end(), 0);
    }
    if (clusters_ <= searched_) return;
    if (anew) {
      divide(means_, grouped_, kGroup);
    } else {
      const MatrixView means{means_.data(), clusters_, dim_, dim_, Scalar::f32, "means"};
      std::vector<float> inverse(lengths_.size());
      for (size_t cluster = 0; cluster < inverse.size(); ++cluster) {
        inverse[cluster] = lengths_[cluster] > 0 ? 1.0f : 0.0f;
      }
      refine(means, inverse, Fetch(means), Groups{grouped_, kGroup}.offsets(), 1, threads_, cancel_,
             grouped_);
    }
  }

  void divide(const AlignedVector<float>& vectors, std::span<int32_t> order, int64_t size) {
    const MatrixView view{vectors.data(), std::ssize(order), dim_, dim_, Scalar::f32, "vectors"};
    balanced_clusters(view, Groups{order, size}.offsets(),
                      {0, kGroupIterations, kGroupRounds, threads_}, cancel_, order);
  }

  // Every cluster's list: itself, then those whose means are nearest, in the order of clusters.
  void find_lists() {
    group();
    const Groups groups{grouped_, kGroup};
    const bool is_every_searched = clusters_ <= searched_;
    const int64_t searched = is_every_searched ? groups.count() : searched_ / kGroup;
    const auto near = near_to_each(middles_of(means_, groups), groups.count(), searched);
    // Near groups are an estimate, so near means may be one too.
    const bool coded =
        !is_every_searched && kernels().code_products != nullptr && Coding::fits_in_bytes(x_.cols);
    search(means_, coded ? code_means() : Codes{}, groups, near, lists_);
  }

  // Unit vectors, a group each.
  AlignedVector<float> middles_of(const AlignedVector<float>& vectors, const Groups& groups) {
    AlignedVector<float> middles(static_cast<size_t>(groups.count() * dim_), 0.0f);
    for_each_block(groups.count(), 1, [&](int64_t group, Scratch&) {
      float* const sum = middles.data() + group * dim_;
      for (const int32_t one : groups.members(group)) add(vectors.data() + one * dim_, sum);
      normalise(vector(sum));
    });
    return middles;
  }

  // A list for each of `count` unit vectors: itself, then the listed - 1 that are nearest to it, in
  // their order. Many are an estimate: among the members of near groups, found in the same way.
  std::vector<int32_t> near_to_each(const AlignedVector<float>& vectors, int64_t count,
                                    int64_t listed) {
    std::vector<int32_t> lists(static_cast<size_t>(count * listed));
    std::vector<int32_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    if (count > most_compared_) {
      divide(vectors, order, kGroupOfGroups);
      const Groups groups{order, kGroupOfGroups};
      const int64_t compared = std::max(most_compared_ / 2, listed + 2 * kGroupOfGroups);
      const int64_t searched = std::min(compared / kGroupOfGroups, groups.count());
      const auto near = near_to_each(middles_of(vectors, groups), groups.count(), searched);
      search(vectors, {}, groups, near, lists);
      return lists;
    }
    const Groups blocks{order, kGroups};
    for_each_block(blocks.count(), 1, [&](int64_t block, Scratch& scratch) {
      list(vectors, {}, blocks.members(block), order, scratch, listed, lists.data());
    });
    return lists;
  }

  // The lists of vectors, each among the members of the groups that are near to its own: `near` has
  // those of every group.
  void search(const AlignedVector<float>& vectors, const Codes& codes, const Groups& groups,
              std::span<const int32_t> near, std::span<int32_t> lists) {
    const int64_t searched = std::ssize(near) / groups.count();
    const int64_t listed = std::ssize(lists) / std::ssize(groups.order);
    for_each_block(groups.count(), kGroups, [&](int64_t group, Scratch& scratch) {
      std::vector<int32_t>& others = scratch.ids;
      others.clear();
      for (const int32_t each : near.subspan(group * searched, searched)) {
        others.insert(others.end(), groups.members(each).begin(), groups.members(each).end());
      }
      std::sort(others.begin(), others.end());
      list(vectors, codes, groups.members(group), others, scratch, listed, lists.data());
    });
  }
  // The lists of some vectors, sought among others, which ascend.
  void list(const AlignedVector<float>& vectors, const Codes& codes, std::span<const int32_t> some,
            std::span<const int32_t> others, Scratch& scratch, int64_t listed,
            int32_t* lists) const {
    cancel_.check();
    multiply(vectors, codes, some, others, scratch.scores);
    for (size_t index = 0; index < some.size(); ++index) {
      const std::span<int32_t> found(lists + some[index] * listed, static_cast<size_t>(listed));
      found[0] = some[index];
      best(std::span(scratch.scores).subspan(index * padded_scores(others.size()), others.size()),
           others, some[index], found.subspan(1));
    }
  }

  // Products of some vectors with others, padded_scores of these a vector; estimates where there
  // are codes.
  void multiply(const AlignedVector<float>& vectors, const Codes& codes,
                std::span<const int32_t> some, std::span<const int32_t> others,
                std::vector<float>& scores) const {
    const auto dim = static_cast<size_t>(dim_);
    const size_t stride = padded_scores(others.size());
    scores.resize(some.size() * stride);
    if (codes.dim == 0) {
      kernels().products({vectors.data(), dim, some.data(), some.size()},
                         {vectors.data(), dim, others.data(), others.size()}, dim, scores.data(),
                         stride);
      return;
    }
    const int8_t* const values = codes.values.data();
    kernels().code_products({values, codes.dim, some.data(), some.size()},
                            {values, codes.dim, others.data(), others.size()}, codes.dim,
                            scores.data(), stride);
    // The scale of the vector itself does not change which are the best.
    for (size_t index = 0; index < some.size(); ++index) {
      for (size_t other = 0; other < others.size(); ++other) {
        scores[index * stride + other] *= codes.scales[others[other]];
      }
    }
  }
  static size_t padded_scores(size_t count) {
    return static_cast<size_t>(rounded_up(static_cast<int64_t>(count), kProductUnit));
  }
  float* mean_of(int64_t cluster) { return means_.data() + cluster * dim_; }
  std::span<float> vector(float* begin) const { return {begin, static_cast<size_t>(dim_)}; }
  void add(const float* vector, float* sum) const {
    for (int64_t col = 0; col < dim_; ++col) sum[col] += vector[col];
  }
  std::span<int32_t> list_of(int64_t cluster) {
    return std::span(lists_).subspan(cluster * listed_, listed_);
  }

  // Scores of rows of a cluster with its list, kScored a row.
  void score(int64_t cluster, std::span<const int32_t> ids, Scratch& scratch) {
    const std::span<const int32_t> list = list_of(cluster);
    const auto dim = static_cast<size_t>(dim_);
    copy(ids, scratch);
    scratch.ids.resize(ids.size());
    std::iota(scratch.ids.begin(), scratch.ids.end(), 0);
    scratch.scores.resize(ids.size() * kScored);
    kernels().products({scratch.rows.data(), dim, scratch.ids.data(), ids.size()},
                       {means_.data(), dim, list.data(), list.size()}, dim, scratch.scores.data(),
                       kScored);
    // The own cluster's mean without the row.
    const float length = lengths_[cluster];
    for (size_t row = 0; row < ids.size(); ++row) {
      float* const scores = scratch.scores.data() + row * kScored;
      const float square = inverse_[ids[row]] > 0 ? 1.0f : 0.0f;
      const float rest = length * length - 2 * length * scores[0] + square;
      const bool alone = room(cluster) == 1 || !(rest > 0);
      scores[0] = (alone ? 0.0f : (length * scores[0] - square) / std::sqrt(rest)) + kLeastGain;
      std::fill(scores + list.size(), scores + kScored, kNone);
    }
  }

  void choose() {
    for_each_cluster([&](int64_t cluster, std::span<const int32_t> ids, Scratch& scratch) {
      for (size_t first = 0; first < ids.size(); first += kRows) {
        cancel_.check();
        const auto part = ids.subspan(first, std::min<size_t>(kRows, ids.size() - first));
        score(cluster, part, scratch);
        scratch.keys.resize(part.size() * kRanked);
        kernels().rank_scores(scratch.scores.data(), part.size(), scratch.keys.data());
        for (size_t row = 0; row < part.size(); ++row) {
          home_[part[row]] = static_cast<int32_t>(cluster);
          std::copy_n(scratch.keys.data() + row * kRanked, kRanked, choices_of(part[row]));
        }
      }
    });
  }

  float* choices_of(int32_t id) { return choices_.data() + int64_t{id} * kRanked; }

  // Matches rows and clusters, and places the rest; returns whether any row moved.
  bool match() {
    std::fill(asked_.begin(), asked_.end(), 0);
    std::fill(held_count_.begin(), held_count_.end(), 0);
    std::vector<std::vector<int32_t>> refused(static_cast<size_t>(threads_));
    for_each_block(x_.rows, kMatchedRows, [&](int64_t place, Scratch& scratch) {
      const int32_t id = ask(order_[place]);
      if (id >= 0) refused[static_cast<size_t>(&scratch - scratch_.data())].push_back(id);
    });
    std::vector<int32_t> rest;
    for (const auto& some : refused) rest.insert(rest.end(), some.begin(), some.end());
    std::sort(rest.begin(), rest.end(), [&](int32_t one, int32_t two) {
      return std::pair(home_[one], one) < std::pair(home_[two], two);
    });
    auto next = rest.begin();
    for (int64_t cluster = 0; cluster < clusters_; ++cluster) {
      const auto held = held_by(cluster);
      for (int64_t place = held_count_[cluster]; place < room(cluster); ++place) {
        held[place] = *next++;
      }
    }
    for_each_block(clusters_, kRows, [&](int64_t cluster, Scratch&) {
      std::sort(held_by(cluster).begin(), held_by(cluster).end());
    });
    const bool moved = !std::equal(order_.begin(), order_.end(), held_.begin());
    std::copy(held_.begin(), held_.end(), order_.begin());
    return moved;
  }
  std::span<int32_t> held_by(int64_t cluster) {
    return std::span(held_).subspan(offsets_[cluster], room(cluster));
  }

  // Lets a row ask, then the one that it displaces, and so on. Returns the one that all clusters of
  // its choice refused, or -1.
  int32_t ask(int32_t id) {
    while (id >= 0 && asked_[id] < kRanked) {
      const float key = choices_of(id)[asked_[id]++];
      if (key <= kNone) break;
      id = offer(list_of(home_[id])[position_of(key)], {key, id});
    }
    return id;
  }

  // Returns the row that the cluster does not keep, or -1. What it keeps is a heap with the worst
  // at its root. Only who has the lock may touch it, or a row that it has just let go.
  int32_t offer(int64_t cluster, Scored asking) {
    while (locks_[cluster].test_and_set(std::memory_order_acquire)) std::this_thread::yield();
    const std::span<int32_t> ids = held_by(cluster);
    const auto scores = std::span(held_scores_).subspan(offsets_[cluster], ids.size());
    int32_t& count = held_count_[cluster];
    const auto held = [&](int64_t place) { return Scored{scores[place], ids[place]}; };
    const auto put = [&](int64_t place, Scored one) {
      scores[place] = one.score;
      ids[place] = one.id;
    };
    int32_t refused = -1;
    if (count < room(cluster)) {
      int64_t place = count++;
      for (; place > 0 && better(held((place - 1) / 2), asking); place = (place - 1) / 2) {
        put(place, held((place - 1) / 2));
      }
      put(place, asking);
    } else if (!better(asking, held(0))) {
      refused = asking.id;
    } else {
      refused = ids[0];
      int64_t place = 0;
      while (2 * place + 1 < count) {
        int64_t below = 2 * place + 1;
        if (below + 1 < count && better(held(below), held(below + 1))) ++below;
        if (!better(asking, held(below))) break;
        put(place, held(below));
        place = below;
      }
      put(place, asking);
    }
    locks_[cluster].clear(std::memory_order_release);
    return refused;
  }

  const MatrixView& x_;
  std::span<const float> inverse_;
  const Fetch& fetch_;
  std::span<const int64_t> offsets_;
  int threads_;
  Cancel& cancel_;
  std::span<int32_t> order_;
  int64_t most_compared_;
  int64_t clusters_;
  int64_t dim_;
  int64_t listed_;
  int64_t searched_;
  AlignedVector<float> means_;
  std::vector<float> lengths_;
  std::vector<int32_t> grouped_;
  std::vector<int32_t> lists_;
  std::vector<int32_t> home_;
  std::vector<float> choices_;
  std::vector<uint8_t> asked_;
  std::vector<int32_t> held_;
  std::vector<float> held_scores_;
  std::vector<int32_t> held_count_;
  std::vector<std::atomic_flag> locks_;
  std::vector<Scratch> scratch_;
};

}  // namespace

void refine(const MatrixView& x, std::span<const float> inverse, const Fetch& fetch,
            std::span<const int64_t> offsets, int rounds, int threads, Cancel& cancel,
            std::span<int32_t> order, int64_t most_compared) {
  Refinement(x, inverse, fetch, offsets, threads, cancel, order, most_compared).run(rounds);
}

}  // namespace ngame

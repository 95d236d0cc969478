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

// What is read from the disk in one piece where memory does not hold the input.
constexpr int64_t kWindowBytes = 32 * 1024 * 1024;

constexpr float kNone = -2.0f;  // of what is not to be chosen: below every cosine

struct Scratch {
  AlignedVector<float> rows;  // unit vectors
  std::vector<float> scores, keys;
  std::vector<int32_t> ids, listed;
};

class Refinement {
 public:
  Refinement(const MatrixView& x, std::span<const float> inverse, const Fetch& fetch,
             std::span<const int64_t> offsets, int threads, Cancel& cancel,
             std::span<int32_t> order)
      : x_(x),
        inverse_(inverse),
        fetch_(fetch),
        offsets_(offsets),
        threads_(threads),
        cancel_(cancel),
        order_(order),
        clusters_(static_cast<int64_t>(offsets.size()) - 1),
        dim_(static_cast<int64_t>(rounded_up(static_cast<size_t>(x.cols), kPackedUnit))),
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
    const int64_t row_bytes = std::max<int64_t>(x_.stride * bytes_of(x_.scalar), 1);
    const int64_t window =
        fetch_.from_disk() ? std::max(kWindowBytes / row_bytes, int64_t{1}) : x_.rows;
    for (int64_t first = 0; first < x_.rows; first += window) {
      const int64_t last = std::min(first + window, x_.rows);
      fetch_.rows(last, std::min(last + window, x_.rows));
      for_each_block(clusters_, kClusters, [&](int64_t cluster, Scratch& scratch) {
        const std::span<int32_t> ids = ids_of(cluster);
        const auto begin = std::lower_bound(ids.begin(), ids.end(), first);
        const auto end = std::lower_bound(begin, ids.end(), last);
        if (begin != end) body(cluster, std::span<const int32_t>(begin, end), scratch);
      });
    }
  }
  template <class Body>
  void for_each_block(int64_t items, int64_t block, const Body& body) {
    parallel_for((items + block - 1) / block, threads_, cancel_, [&](int64_t index, int thread) {
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
      lengths_[cluster] = normalise(mean_of(cluster));
    });
    double squares = 0;
    for (int64_t cluster = 0; cluster < clusters_; ++cluster) {
      const double length = lengths_[cluster] / static_cast<double>(room(cluster));
      squares += length * length;
    }
    return squares / static_cast<double>(clusters_);
  }

  // The `count` best of scores of clusters, in the order of `ids`, which ascend; not that of
  // cluster `without`.
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

  // Orders clusters so that kGroup that follow each other are a group: anew, or what was a group
  // before is refined.
  void group() {
    const bool anew = grouped_.empty();
    if (anew) {
      grouped_.resize(static_cast<size_t>(clusters_));
      std::iota(grouped_.begin(), grouped_.end(), 0);
    }
    if (clusters_ <= searched_) return;
    std::vector<int64_t> offsets;
    for (int64_t first = 0; first < clusters_; first += kGroup) offsets.push_back(first);
    offsets.push_back(clusters_);
    const MatrixView means{means_.data(), clusters_, dim_, dim_, Scalar::f32, "means"};
    if (anew) {
      balanced_clusters(means, offsets, {0, kGroupIterations, kGroupRounds, threads_}, cancel_,
                        grouped_);
    } else {
      std::vector<float> inverse(lengths_.size());
      for (size_t cluster = 0; cluster < inverse.size(); ++cluster) {
        inverse[cluster] = lengths_[cluster] > 0 ? 1.0f : 0.0f;
      }
      refine(means, inverse, Fetch(means), offsets, 1, threads_, cancel_, grouped_);
    }
  }

  // Every cluster's list: itself, then those whose means are nearest, in the order of clusters.
  void find_lists() {
    group();
    const int64_t groups = (clusters_ + kGroup - 1) / kGroup;
    const auto members = [&](int64_t group) {
      const int64_t first = group * kGroup;
      return std::span<const int32_t>(grouped_).subspan(first, std::min(kGroup, clusters_ - first));
    };
    const auto dim = static_cast<size_t>(dim_);
    AlignedVector<float> middles(static_cast<size_t>(groups * dim_), 0.0f);
    for_each_block(groups, 1, [&](int64_t group, Scratch&) {
      float* const sum = middles.data() + group * dim_;
      for (const int32_t cluster : members(group)) add(mean_of(cluster), sum);
      normalise(sum);
    });
    std::vector<int32_t> all(static_cast<size_t>(groups));
    std::iota(all.begin(), all.end(), 0);
    const bool is_every_searched = clusters_ <= searched_;
    const int64_t searched = is_every_searched ? groups : searched_ / kGroup;
    // Near groups are an estimate, so near means may be one too.
    const bool coded =
        !is_every_searched && kernels().code_products != nullptr && Coding::fits_in_bytes(x_.cols);
    const Codes codes = coded ? code_means() : Codes{};
    parallel_for(
        (groups + kGroups - 1) / kGroups, threads_, cancel_, [&](int64_t block, int thread) {
          const int64_t first = block * kGroups;
          const auto near_to = std::span(all).subspan(first, std::min(kGroups, groups - first));
          const size_t stride = padded_scores(groups);
          std::vector<float> nearness(near_to.size() * stride);
          kernels().products({middles.data(), dim, near_to.data(), near_to.size()},
                             {middles.data(), dim, all.data(), all.size()}, dim, nearness.data(),
                             stride);
          auto& [rows, scores, keys, ids, listed] = scratch_[thread];
          for (const int32_t group : near_to) {
            cancel_.check();
            listed.assign(static_cast<size_t>(searched), group);
            best(std::span(nearness).subspan((group - first) * stride, all.size()), all, group,
                 std::span(listed).subspan(1));
            ids.clear();
            for (const int32_t near : listed) {
              ids.insert(ids.end(), members(near).begin(), members(near).end());
            }
            std::sort(ids.begin(), ids.end());
            score_means(members(group), ids, codes, scores);
            for (size_t index = 0; index < members(group).size(); ++index) {
              const int32_t cluster = members(group)[index];
              const std::span<int32_t> list = list_of(cluster);
              list[0] = cluster;
              best(std::span(scores).subspan(index * padded_scores(ids.size()), ids.size()), ids,
                   cluster, list.subspan(1));
            }
          }
        });
  }

  // Unit vectors as 8-bit codes, `dim` of them, times a scale each.
  struct Codes {
    size_t dim;
    AlignedVector<int8_t> values;
    std::vector<float> scales;
  };
  Codes code_means() {
    const size_t dim = rounded_up(static_cast<size_t>(dim_), kCodeUnit);
    Codes codes{dim, AlignedVector<int8_t>(static_cast<size_t>(clusters_) * dim, 0),
                std::vector<float>(static_cast<size_t>(clusters_))};
    for_each_block(clusters_, kRows, [&](int64_t cluster, Scratch&) {
      int32_t sum = 0;
      kernels().encode(mean_of(cluster), static_cast<size_t>(dim_), kernels().query_codes,
                       codes.values.data() + cluster * dim, &codes.scales[cluster], &sum);
    });
    return codes;
  }

  // Products of the means of some clusters with those of others, padded_scores of these a cluster;
  // estimates where there are codes.
  void score_means(std::span<const int32_t> clusters, std::span<const int32_t> others,
                   const Codes& codes, std::vector<float>& scores) const {
    const auto dim = static_cast<size_t>(dim_);
    const size_t stride = padded_scores(others.size());
    scores.resize(clusters.size() * stride);
    if (codes.dim == 0) {
      kernels().products({means_.data(), dim, clusters.data(), clusters.size()},
                         {means_.data(), dim, others.data(), others.size()}, dim, scores.data(),
                         stride);
      return;
    }
    const int8_t* const values = codes.values.data();
    kernels().code_products({values, codes.dim, clusters.data(), clusters.size()},
                            {values, codes.dim, others.data(), others.size()}, codes.dim,
                            scores.data(), stride);
    // The scale of the cluster itself does not change which are the best.
    for (size_t index = 0; index < clusters.size(); ++index) {
      for (size_t other = 0; other < others.size(); ++other) {
        scores[index * stride + other] *= codes.scales[others[other]];
      }
    }
  }
  static size_t rounded_up(size_t count, size_t unit) { return (count + unit - 1) / unit * unit; }
  static size_t padded_scores(size_t count) { return rounded_up(count, kProductUnit); }
  float* mean_of(int64_t cluster) { return means_.data() + cluster * dim_; }
  void add(const float* vector, float* sum) const {
    for (int64_t col = 0; col < dim_; ++col) sum[col] += vector[col];
  }
  // Returns the length before; a zero vector stays one.
  float normalise(float* vector) const {
    const float length = std::sqrt(kernels().squared_norm_f32(vector, static_cast<size_t>(dim_)));
    const float scale = length > 0 ? 1.0f / length : 0.0f;
    for (int64_t col = 0; col < dim_; ++col) vector[col] *= scale;
    return length;
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

  // Who asks, and how near.
  struct Asking {
    float score;
    int32_t id;
    bool before(const Asking& other) const {
      return score > other.score || (score == other.score && id < other.id);
    }
  };

  // Returns the row that the cluster does not keep, or -1. What it keeps is a heap with the worst
  // at its root. Only who has the lock may touch it, or a row that it has just let go.
  int32_t offer(int64_t cluster, Asking asking) {
    while (locks_[cluster].test_and_set(std::memory_order_acquire)) std::this_thread::yield();
    const std::span<int32_t> ids = held_by(cluster);
    const auto scores = std::span(held_scores_).subspan(offsets_[cluster], ids.size());
    int32_t& count = held_count_[cluster];
    const auto held = [&](int64_t place) { return Asking{scores[place], ids[place]}; };
    const auto put = [&](int64_t place, Asking one) {
      scores[place] = one.score;
      ids[place] = one.id;
    };
    int32_t refused = -1;
    if (count < room(cluster)) {
      int64_t place = count++;
      for (; place > 0 && held((place - 1) / 2).before(asking); place = (place - 1) / 2) {
        put(place, held((place - 1) / 2));
      }
      put(place, asking);
    } else if (!asking.before(held(0))) {
      refused = asking.id;
    } else {
      refused = ids[0];
      int64_t place = 0;
      while (2 * place + 1 < count) {
        int64_t below = 2 * place + 1;
        if (below + 1 < count && held(below).before(held(below + 1))) ++below;
        if (!asking.before(held(below))) break;
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
            std::span<int32_t> order) {
  Refinement(x, inverse, fetch, offsets, threads, cancel, order).run(rounds);
}

}  // namespace ngame

#include "topk.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "cut.h"
#include "kernels.h"
#include "matrix.h"
#include "scorer.h"

// How a fast search is exact. Rows are scaled to norm 1 and coded, as floats or as 8-bit integers,
// whose products are four times as fast. The product of two codes misses that of the rows by
//     |code of q| * |x - code of x|  +  |q - code of q| * |x|
// at most (Cauchy and Schwarz), and the norms in it are known. So codes serve as a filter: a pair
// cannot enter the best k if its product of codes plus that bound is not above the k-th best score
// so far. What passes is scored from the rows themselves, in double, and only such scores are
// compared and returned. Which codes were used, in which blocks, shows in nothing but the time.
namespace ngame {
namespace {

// Items are coded in stretches of about this many bytes, which every block of queries reads.
constexpr int64_t kStretchBytes = int64_t{64} * 1024 * 1024;
// Queries that a thread filters together; their codes stay in the second-level cache.
constexpr int64_t kQueryBytes = 192 * 1024;
// Candidates of a query that are gathered before they are looked at, and the bytes that those of a
// block of queries may take.
constexpr int64_t kGathered = 512;
constexpr int64_t kGatheredBytes = 16 * 1024 * 1024;
// If more than one pair in so many passes the filter of 8-bit codes, that of floats is faster.
constexpr int64_t kPairsPerScore = 16;
// Sums of up to 127 * 127 a column in 32 bits.
constexpr int64_t kMaxColumnsInBytes = 131072;
// Norms that float can scale to 1 without overflow and without loss of bits.
constexpr double kMinNorm = 1e-30;
constexpr double kMaxNorm = 1e30;
// More than all errors of scaling a row, and of weighing and comparing a value, in float.
constexpr double kRounding = 0x1p-18;

struct Scored {
  float score;
  int32_t id;
};

bool better(const Scored& a, const Scored& b) {
  return a.score != b.score ? a.score > b.score : a.id < b.id;
}

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Uninitialized memory on a cache line's border: a panel's vectors then never straddle two.
struct AlignedFree {
  void operator()(void* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};
template <class T>
using Aligned = std::unique_ptr<T[], AlignedFree>;
template <class T>
Aligned<T> aligned(int64_t count) {
  return Aligned<T>(new (std::align_val_t{64}) T[static_cast<size_t>(count)]);
}

// One way to code rows, and what multiplies the codes.
struct Coding {
  Tile tile;
  bool bytes;     // 8-bit integers, four to a word; otherwise floats
  int64_t words;  // a row
};

// The candidates of one query.
struct List {
  float* values;
  int32_t* ids;
  int32_t& count;

  template <class Wanted>
  void keep(const Wanted& wanted) const {
    int32_t left = 0;
    for (int32_t at = 0; at < count; ++at) {
      const bool stays = wanted(values[at], ids[at]);
      values[left] = values[at];
      ids[left] = ids[at];
      left += stays ? 1 : 0;
    }
    count = left;
  }
};

// A row of norm 1 is weight * code but for an error of norm `error`.
struct Fit {
  double weight;
  double error;
  int32_t sum;  // of the integers
};

// Coded items in panels, as the tiles of kernels.h read them. Item i is weight[i] * code but for an
// error of norm error[i], and norm[i] long; all in units of the longest item.
struct Items {
  Aligned<uint32_t> panels;
  std::vector<float> weight, error, norm;
  double largest_error, largest_norm;
};

struct Query {
  double unit;    // a score in the units of the filter, times this, is a score
  double weight;  // a value of the tile, times this, is a score in the units of the filter
  double reach;   // the filter's error for an item: reach * item's error
  double error;   //   + error * item's norm
  double bound;   // scores not above it are of no use, in the units of the filter
  std::vector<Scored> best;  // the best k so far, in no order
};

template <class Index>
class Search {
 public:
  Search(const MatrixView& queries, const MatrixView& items, const CsrView<Index>* drop,
         const TopkParams& params, Cancel& cancel, float* scores, int32_t* ids)
      : queries_(queries),
        items_(items),
        drop_(drop),
        params_(params),
        cancel_(cancel),
        scorer_(queries, items, params.cosine, params.threads, cancel),
        scores_(scores),
        ids_(ids),
        tile_queries_(static_cast<int64_t>(use_.tile_queries)),
        tile_items_(static_cast<int64_t>(use_.tile_items)) {}

  void run() {
    if (queries_.rows == 0) return;
    std::fill_n(ids_, queries_.rows * params_.k, -1);
    scratch_.resize(static_cast<size_t>(params_.threads));
    const int64_t gathered = std::min(std::max(kGathered, 8 * params_.k), items_.rows);
    capacity_ = rounded_up(gathered + tile_items_, 16);
    // Blocks small enough that every thread gets some.
    block_ =
        std::min(kQueryBytes / std::max<int64_t>(items_.cols, 1), kGatheredBytes / (capacity_ * 8));
    block_ = std::min(block_, (queries_.rows + params_.threads - 1) / params_.threads);
    block_ = rounded_up(std::max<int64_t>(block_, 1), tile_queries_);
    done_.assign(static_cast<size_t>((queries_.rows + block_ - 1) / block_), 0);
    if (use_.code_tile != nullptr && items_.cols <= kMaxColumnsInBytes &&
        params_.k <= items_.rows / kPairsPerScore) {
      filter({use_.code_tile, true, (items_.cols + 3) / 4});
    }
    filter({use_.score_tile, false, items_.cols});
  }

 private:
  // What a thread works with.
  struct Scratch {
    std::vector<float> row;      // one row, scaled
    std::vector<uint32_t> code;  // one row, coded
    Aligned<uint32_t> panels;    // a block of queries, coded
    std::vector<Query> queries;  //   what is known of each
    // A query's limit on values: bar - reach * error - error * norm, of a panel's items.
    std::vector<float> bar, reach, error, limits;
    Aligned<float> values;        //   and its candidates: `capacity_` values
    Aligned<int32_t> ids;         //   and ids
    std::vector<int32_t> counts;  //   of which so many are there
    int64_t scored = 0;           // pairs of the block that were scored
    std::vector<double> wide;     // a query in double
    std::vector<float> ranking;   // numbers among which to find the k-th
  };

  // Codes one row into `scratch.code`.
  Fit code(const Coding& coding, const MatrixView& matrix, int64_t row, double norm,
           Scratch& scratch) const {
    const auto cols = static_cast<size_t>(matrix.cols);
    scratch.row.resize(static_cast<size_t>(padded(matrix.cols)));
    // The kernel writes whole vectors.
    scratch.code.assign(static_cast<size_t>(rounded_up(coding.words, 4)), 0);
    if (norm == 0) return {1, 0, 0};
    // Where float cannot scale the row, zeros stand for it: that is its length off.
    if (norm < kMinNorm || norm > kMaxNorm) return {1, 1, 0};
    copy_row(matrix, row, static_cast<float>(1 / norm), scratch.row.data());
    if (!coding.bytes) {
      std::memcpy(scratch.code.data(), scratch.row.data(), cols * sizeof(float));
      // What a sum of rounded products in float can be off, relative to the norms.
      return {1, std::expm1(static_cast<double>(cols + 1) * 0x1p-24) + kRounding, 0};
    }
    Fit fit{};
    float weight = 0;
    const double square =
        use_.encode(scratch.row.data(), cols, reinterpret_cast<int8_t*>(scratch.code.data()),
                    &weight, &fit.sum);
    fit.weight = weight;
    // The square is a sum in float.
    fit.error = std::sqrt(square) * (1 + static_cast<double>(cols + 1) * 0x1p-23) + kRounding;
    return fit;
  }

  // Puts a row's words where its panel of `width` rows has them.
  static void interleave(const std::vector<uint32_t>& code, int64_t words, int64_t width,
                         uint32_t* panel) {
    for (int64_t word = 0; word < words; ++word) {
      panel[word * width] = code[static_cast<size_t>(word)];
    }
  }

  void code_items(const Coding& coding, int64_t first, int64_t count, Items& items) {
    const int64_t rows = rounded_up(count, tile_items_);
    items.weight.resize(static_cast<size_t>(rows));
    items.error.resize(static_cast<size_t>(rows));
    items.norm.resize(static_cast<size_t>(rows));
    parallel_for(rows / tile_items_, params_.threads, cancel_, [&](int64_t panel, int thread) {
      Scratch& scratch = scratch_[static_cast<size_t>(thread)];
      for (int64_t lane = 0; lane < tile_items_; ++lane) {
        const auto at = static_cast<size_t>(panel * tile_items_ + lane);
        const bool there = static_cast<int64_t>(at) < count;
        const double norm = there ? scorer_.item_norm(first + static_cast<int64_t>(at)) : 0;
        const Fit fit = code(coding, items_, first + static_cast<int64_t>(at), norm, scratch);
        if (coding.bytes) {
          for (uint32_t& word : scratch.code) word ^= 0x80808080u;  // adds 128 to each
        }
        interleave(scratch.code, coding.words, tile_items_,
                   items.panels.get() + panel * tile_items_ * coding.words + lane);
        // Long enough that float holds its bounds.
        const double length =
            norm == 0 ? 0 : std::max(params_.cosine ? 1 : norm / scorer_.longest(), kMinNorm);
        // NaN is above no limit: items that are not there are never found.
        items.weight[at] = there ? static_cast<float>(length * fit.weight) : NAN;
        items.error[at] = static_cast<float>(length * fit.error);
        items.norm[at] = static_cast<float>(length);
      }
    });
    items.largest_error = *std::max_element(items.error.begin(), items.error.end());
    items.largest_norm = *std::max_element(items.norm.begin(), items.norm.end());
  }

  // Codes a block of queries, and takes up what was found for it.
  void begin(const Coding& coding, int64_t first, int64_t count, Scratch& scratch) const {
    const int64_t rows = rounded_up(count, tile_queries_);
    const int64_t words = coding.words + 1;
    if (scratch.values == nullptr) {
      scratch.values = aligned<float>(block_ * capacity_);
      scratch.ids = aligned<int32_t>(block_ * capacity_);
      scratch.queries.resize(static_cast<size_t>(block_));
      for (auto* numbers : {&scratch.bar, &scratch.reach, &scratch.error, &scratch.limits}) {
        numbers->resize(static_cast<size_t>(block_));
      }
    }
    scratch.counts.assign(static_cast<size_t>(block_), 0);
    scratch.panels = aligned<uint32_t>(rows * words);
    scratch.scored = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const bool there = row < count;
      const double norm = there ? scorer_.query_norm(first + row) : 0;
      const Fit fit = code(coding, queries_, first + row, norm, scratch);
      uint32_t* const panel =
          scratch.panels.get() + row / tile_queries_ * tile_queries_ * words + row % tile_queries_;
      *panel = static_cast<uint32_t>(-128 * fit.sum);  // takes back what items are offset by
      interleave(scratch.code, coding.words, tile_queries_, panel + tile_queries_);
      Query& query = scratch.queries[static_cast<size_t>(row)];
      query.unit = params_.cosine || norm * scorer_.longest() == 0 ? 1 : norm * scorer_.longest();
      query.weight = fit.weight;
      query.reach = norm == 0 ? 0 : 1 + fit.error;
      query.error = fit.error;
      query.bound = -std::numeric_limits<double>::infinity();
      query.best.clear();
      scratch.bar[static_cast<size_t>(row)] = std::numeric_limits<float>::infinity();
      scratch.reach[static_cast<size_t>(row)] = static_cast<float>(query.reach / query.weight);
      scratch.error[static_cast<size_t>(row)] = static_cast<float>(query.error / query.weight);
      if (!there) continue;
      query.best.reserve(static_cast<size_t>(params_.k));
      const int64_t at = (first + row) * params_.k;
      for (int64_t rank = 0; rank < params_.k && ids_[at + rank] >= 0; ++rank) {
        query.best.push_back({scores_[at + rank], ids_[at + rank]});
      }
      tighten(query);
      scratch.bar[static_cast<size_t>(row)] = static_cast<float>(query.bound / query.weight);
    }
  }

  // Leaves the best k, and a bound that follows from them.
  void tighten(Query& query) const {
    const auto k = static_cast<size_t>(params_.k);
    if (query.best.size() < k) return;
    const auto last = query.best.begin() + static_cast<std::ptrdiff_t>(k) - 1;
    std::nth_element(query.best.begin(), last, query.best.end(), better);
    query.bound = std::max(query.bound, static_cast<double>(last->score) / query.unit);
    query.best.resize(k);
  }

  // Scores those candidates of a query that `chosen` takes, and takes them off the list.
  template <class Chosen>
  void score(int64_t row, Query& query, const List& list, Scratch& scratch,
             const Chosen& chosen) const {
    list.keep([&](float value, int32_t id) {
      if (!chosen(value)) return true;
      query.best.push_back({scorer_(row, scratch.wide, id), id});
      ++scratch.scored;
      return false;
    });
    tighten(query);
  }

  // Looks through the candidates of one query and drops the hopeless. With `all`, or if many are
  // left, scores what can be among the best k.
  void sift(const Items& items, int64_t first_item, int64_t row, int64_t lane, bool all,
            Scratch& scratch) const {
    Query& query = scratch.queries[static_cast<size_t>(lane)];
    const List list{scratch.values.get() + lane * capacity_, scratch.ids.get() + lane * capacity_,
                    scratch.counts[static_cast<size_t>(lane)]};
    if (drop_ != nullptr) {
      const auto entries = drop_->row(row);
      list.keep([&](float, int32_t id) {
        return !std::binary_search(entries.begin, entries.end, static_cast<Index>(id));
      });
    }
    const auto weight = static_cast<float>(query.weight);
    const auto estimate = [&](float value) { return weight * value; };
    const auto error = [&](int32_t id) {
      const auto item = static_cast<size_t>(id - first_item);
      return query.reach * static_cast<double>(items.error[item]) +
             query.error * static_cast<double>(items.norm[item]);
    };
    // The largest errors decide for most: those of single items lie all over memory. Equal scores
    // go to the lower id, so a score that equals the bound will do.
    const double doubt = query.reach * items.largest_error + query.error * items.largest_norm;
    const auto drop_hopeless = [&] {
      const auto least = static_cast<float>((query.bound - doubt) / query.weight);
      list.keep([&](float value, int32_t) { return value >= least; });
      list.keep([&](float value, int32_t id) {
        return static_cast<double>(estimate(value)) + error(id) >= query.bound;
      });
    };

    if (!all) {
      // Even if all are as low as they can be, k of them are no lower than this.
      const auto sure =
          kth(query, list, scratch, [&](int32_t at) { return estimate(list.values[at]); });
      query.bound = std::max(query.bound, sure - doubt);
      drop_hopeless();
      if (list.count > capacity_ / 2) {  // where errors differ
        query.bound =
            std::max(query.bound, kth(query, list, scratch, [&](int32_t at) {
                       return static_cast<float>(estimate(list.values[at]) - error(list.ids[at]));
                     }));
        drop_hopeless();
      }
    }
    if (all || list.count > capacity_ / 2) {
      Scorer::widen(queries_, row, scratch.row, scratch.wide);
      // First those that seem to be among the best k, for the bound that they give.
      const double seems =
          kth(query, list, scratch, [&](int32_t at) { return estimate(list.values[at]); });
      score(row, query, list, scratch, [&](float value) { return estimate(value) >= seems; });
      drop_hopeless();
      score(row, query, list, scratch, [](float) { return true; });
    }
    scratch.bar[static_cast<size_t>(lane)] = static_cast<float>(query.bound / query.weight);
  }

  // What k of the best scores so far and of value(at) of the candidates reach.
  template <class Value>
  double kth(const Query& query, const List& list, Scratch& scratch, const Value& value) const {
    const auto scored = static_cast<int64_t>(query.best.size());
    if (list.count + scored < params_.k) return -std::numeric_limits<double>::infinity();
    scratch.ranking.resize(static_cast<size_t>(list.count + scored));
    float* ranking = scratch.ranking.data();
    for (int32_t at = 0; at < list.count; ++at) *ranking++ = value(at);
    for (const Scored& one : query.best) {
      *ranking++ = static_cast<float>(static_cast<double>(one.score) / query.unit);
    }
    return static_cast<double>(Cut::find(scratch.ranking, list.count + scored - params_.k).value);
  }

  // Filters one block of queries through the coded items from number `from` on. Returns how many
  // it got through: fewer than `count` where the filter does not pay.
  int64_t filter_block(const Coding& coding, int64_t block, const Items& items, int64_t first_item,
                       int64_t from, int64_t count, Scratch& scratch) const {
    const int64_t first = block * block_;
    const int64_t queries = std::min(block_, queries_.rows - first);
    begin(coding, first, queries, scratch);
    const int64_t rows = rounded_up(queries, tile_queries_);
    int64_t item = from;
    while (item < count) {
      cancel_.check();
      const auto panel_error = items.error.begin() + item;
      const auto panel_norm = items.norm.begin() + item;
      const float error = *std::max_element(panel_error, panel_error + tile_items_);
      const float norm = *std::max_element(panel_norm, panel_norm + tile_items_);
      for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
        scratch.limits[row] =
            scratch.bar[row] - scratch.reach[row] * error - scratch.error[row] * norm;
      }
      for (int64_t row = 0; row < rows; row += tile_queries_) {
        const Candidates out{scratch.values.get() + row * capacity_,
                             scratch.ids.get() + row * capacity_, static_cast<size_t>(capacity_),
                             scratch.counts.data() + row};
        const int64_t most =
            coding.tile(scratch.panels.get() + row * (coding.words + 1),
                        items.panels.get() + item * coding.words, static_cast<size_t>(coding.words),
                        items.weight.data() + item, scratch.limits.data() + row,
                        static_cast<int32_t>(first_item + item), out);
        if (most <= capacity_ - tile_items_) continue;
        for (int64_t lane = row; lane < row + tile_queries_; ++lane) {
          if (scratch.counts[static_cast<size_t>(lane)] <= capacity_ - tile_items_) continue;
          sift(items, first_item, first + lane, lane, false, scratch);
        }
      }
      item += tile_items_;
      if (coding.bytes && scratch.scored > queries * (items_.rows / kPairsPerScore)) break;
    }
    for (int64_t row = 0; row < queries; ++row) {
      sift(items, first_item, first + row, row, true, scratch);
      write(first + row, scratch.queries[static_cast<size_t>(row)].best);
    }
    return std::min(item, count);
  }

  // Best first; -infinity and -1 where there are fewer than k.
  void write(int64_t row, std::vector<Scored>& best) const {
    std::sort(best.begin(), best.end(), better);
    for (int64_t rank = 0; rank < params_.k; ++rank) {
      const bool there = rank < static_cast<int64_t>(best.size());
      const Scored none{-std::numeric_limits<float>::infinity(), -1};
      const Scored one = there ? best[static_cast<size_t>(rank)] : none;
      scores_[row * params_.k + rank] = one.score;
      ids_[row * params_.k + rank] = one.id;
    }
  }

  // Takes every block of queries on, from the item it has come to.
  void filter(const Coding& coding) {
    int64_t first = *std::min_element(done_.begin(), done_.end());
    if (first >= items_.rows) return;
    // A stretch holds more items than k, lest the work between stretches should cost more than
    // the products.
    const int64_t row_bytes = std::max<int64_t>(coding.words, 1) * 4;
    int64_t stretch = std::max(kStretchBytes / row_bytes, 4 * params_.k);
    stretch = rounded_up(std::min(stretch, items_.rows - first), tile_items_);
    Items items;
    items.panels = aligned<uint32_t>(stretch * coding.words);
    for (; first < items_.rows; first += stretch) {
      const int64_t count = std::min(stretch, items_.rows - first);
      code_items(coding, first, count, items);
      const auto blocks = static_cast<int64_t>(done_.size());
      parallel_for(blocks, params_.threads, cancel_, [&](int64_t block, int thread) {
        int64_t& done = done_[static_cast<size_t>(block)];
        // Some are ahead; some have stopped, and are the next coding's.
        if (done < first || done >= first + count) return;
        done = first + filter_block(coding, block, items, first, done - first, count,
                                    scratch_[static_cast<size_t>(thread)]);
      });
    }
  }

  const MatrixView& queries_;
  const MatrixView& items_;
  const CsrView<Index>* drop_;
  const TopkParams& params_;
  Cancel& cancel_;
  const Scorer scorer_;
  float* scores_;
  int32_t* ids_;
  const Kernels& use_ = kernels();
  int64_t tile_queries_;
  int64_t tile_items_;
  int64_t capacity_ = 0;
  int64_t block_ = 0;
  std::vector<int64_t> done_;  // the number of items that each block of queries has met
  std::vector<Scratch> scratch_;
};

}  // namespace

template <class Index>
void topk(const MatrixView& queries, const MatrixView& items, const CsrView<Index>* drop,
          const TopkParams& params, Cancel& cancel, float* scores, int32_t* ids) {
  if (drop != nullptr) {
    for (int64_t row = 0; row < drop->rows; ++row) drop->sorted_row(row);
  }
  Search<Index>(queries, items, drop, params, cancel, scores, ids).run();
}

template void topk(const MatrixView&, const MatrixView&, const CsrView<int32_t>*, const TopkParams&,
                   Cancel&, float*, int32_t*);
template void topk(const MatrixView&, const MatrixView&, const CsrView<int64_t>*, const TopkParams&,
                   Cancel&, float*, int32_t*);

}  // namespace ngame

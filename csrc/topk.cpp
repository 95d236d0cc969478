#include "topk.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "aligned.h"
#include "cut.h"
#include "kernels.h"

// How a fast search is exact. Products of codes estimate the scores (coding.h), and serve as a
// filter: an item is left out if its estimate plus its margin is below what the k-th best score is
// known to reach. What passes is scored from the rows themselves, in double, and only such scores
// are compared and returned. So the result does not depend on the codes, the blocks or the threads.
//
// Work is split into jobs: a block of queries by a range of the items. A job reads the items' codes
// once for all of its queries, and multiplies them with each. With many queries the products take
// the time, and the jobs split the queries. With few, reading takes the time, and the jobs split
// the items: each finds the best k of its range, and the best of those are the answer.
namespace ngame {
namespace {

// Items that have no codes yet are coded in stretches of about this many bytes.
constexpr int64_t kStretchBytes = int64_t{64} * 1024 * 1024;
// Bytes of the codes of a block of queries: they stay in the second-level cache.
constexpr int64_t kQueryBytes = 192 * 1024;
// Candidates collected for a query before hopeless ones are dropped, and the most bytes that the
// candidates of a block of queries may take.
constexpr int64_t kGathered = 512;
constexpr int64_t kGatheredBytes = 16 * 1024 * 1024;
// Where more than one pair in so many has to be scored, a filter of floats is faster than one of
// 8-bit codes.
constexpr int64_t kPairsPerScore = 16;
// Products that take about as long as the start of a thread.
constexpr int64_t kProductsPerThread = int64_t{1} << 20;
// A range has at least so many items for each of the k: its first ones are scored in vain.
constexpr int64_t kItemsPerWanted = 32;
// Products between two checks for Ctrl-C.
constexpr int64_t kProductsPerCheck = int64_t{1} << 20;
constexpr auto kPanel = static_cast<int64_t>(kPanelItems);
// Scores are -1 or more in the units of the filter: a bound that lets all items pass.
constexpr double kNoBound = -2;
// Taken from every bar, so that rounding a tiny bar to 0 excludes nothing. Smaller than any
// estimate other than 0.
constexpr float kSmallest = 1e-36f;

// The candidates of one query.
struct List {
  float* values;
  int32_t* ids;
  int32_t& count;

  template <class Wanted>
  void keep(const Wanted& wanted) const {
    int32_t kept = 0;
    for (int32_t candidate = 0; candidate < count; ++candidate) {
      const bool stays = wanted(values[candidate], ids[candidate]);
      values[kept] = values[candidate];
      ids[kept] = ids[candidate];
      kept += stays ? 1 : 0;
    }
    count = kept;
  }
};

struct Query {
  double unit;    // a score in the units of the filter, times this, is a score
  double grain;   // the distance between two subnormal scores, in the units of the filter
  double weight;  // a value of the tile, times this, is an estimate
  double error;   // e of coding.h
  double bound;   // scores below it are of no use, in the units of the filter
  std::vector<Scored> best;  // the best k so far, in no order

  // Of an item, given its l f and l; or of all items of a panel, given the largest ones.
  double margin(double error_of_item, double length) const {
    return error * length + (1 + error) * error_of_item;
  }
};

// A block of queries by a range of items, and where the best of these go.
struct Job {
  int64_t first_query, queries;
  int64_t next, end;  // items that it has not yet filtered
  float* scores;      // of its first query
  int32_t* ids;
};

template <class Index>
class Search {
 public:
  Search(const Rows& queries, const Rows& items, const PreparedView& prepared,
         const CsrView<Index>* drop, const TopkParams& params, Cancel& cancel, float* scores,
         int32_t* ids)
      : queries_(queries),
        items_(items),
        codes_(prepared.codes),
        drop_(drop),
        params_(params),
        cancel_(cancel),
        longest_(params.cosine ? 1 : prepared.longest),
        scorer_(queries, items, prepared.longest, params.cosine),
        scores_(scores),
        ids_(ids),
        rows_(queries.matrix.rows),
        item_count_(items.matrix.rows),
        cols_(items.matrix.cols),
        tile_queries_(static_cast<int64_t>(use_.tile_queries)),
        tile_items_(static_cast<int64_t>(use_.tile_items)) {}

  void run() {
    if (rows_ == 0) return;
    std::fill_n(ids_, rows_ * params_.k, -1);
    scratch_.resize(static_cast<size_t>(params_.threads));
    plan();
    if (use_.code_tile != nullptr && Coding::fits_in_bytes(cols_) &&
        params_.k <= item_count_ / ranges_ / kPairsPerScore) {
      filter(Coding::in_bytes(cols_), codes_);
    }
    filter(Coding::in_floats(cols_), std::nullopt);
    if (ranges_ > 1) unite();
  }

 private:
  // What a thread works with.
  struct Scratch {
    AlignedVector<uint32_t> panels;  // the queries of a job, coded
    std::vector<Query> queries;      //   what is known of each
    // A query's limit on values is bar - error of a panel * reach - length of the panel * error.
    std::vector<float> bar, reach, error, limits;
    AlignedVector<float> values;  //   and its candidates: `capacity_` values
    AlignedVector<int32_t> ids;   //   and ids
    std::vector<int32_t> counts;  //   of which so many are there
    int64_t scored = 0;           // pairs of the job that were scored
    std::vector<float> narrow;    // a query in float,
    std::vector<double> wide;     //   and in double
    std::vector<float> ranking;   // numbers among which to find the k-th
    std::vector<Scored> united;   // the best of all ranges
  };

  // Divides the work into jobs.
  void plan() {
    const int64_t gathered = std::min(std::max(kGathered, 8 * params_.k), item_count_);
    capacity_ = rounded_up(gathered + tile_items_, 16);
    const double products = static_cast<double>(rows_) * static_cast<double>(item_count_ * cols_);
    const auto threads =
        static_cast<int64_t>(std::clamp(products / kProductsPerThread, 1.0, 1.0 * params_.threads));
    block_ = std::min(kQueryBytes / std::max<int64_t>(cols_, 1), kGatheredBytes / (capacity_ * 8));
    block_ = std::max(block_ / tile_queries_ * tile_queries_, tile_queries_);
    // Smaller ones, of equal size, if that gives every thread some and leaves whole tiles.
    int64_t blocks =
        divided_up(rows_, std::min(block_, std::max(divided_up(rows_, threads), tile_queries_)));
    block_ = divided_up(rows_, blocks);
    blocks = divided_up(rows_, block_);
    ranges_ = std::min({divided_up(threads, blocks), item_count_ * cols_ / kProductsPerThread,
                        item_count_ / (kItemsPerWanted * params_.k)});
    const int64_t range =
        rounded_up(divided_up(item_count_, std::max<int64_t>(ranges_, 1)), kPanel);
    ranges_ = divided_up(item_count_, range);
    range_scores_.resize(static_cast<size_t>((ranges_ - 1) * rows_ * params_.k));
    range_ids_.assign(range_scores_.size(), -1);
    for (int64_t number = 0; number < ranges_; ++number) {
      for (int64_t first = 0; first < rows_; first += block_) {
        jobs_.push_back({first, std::min(block_, rows_ - first), number * range,
                         std::min((number + 1) * range, item_count_),
                         scores_of(number) + first * params_.k,
                         ids_of(number) + first * params_.k});
      }
    }
  }

  // Where the results of a range go: those of the first directly into the output.
  float* scores_of(int64_t range) {
    return range == 0 ? scores_ : range_scores_.data() + (range - 1) * rows_ * params_.k;
  }
  int32_t* ids_of(int64_t range) {
    return range == 0 ? ids_ : range_ids_.data() + (range - 1) * rows_ * params_.k;
  }

  // Continues every job from its next item on, with the codes of the index, or else with new ones.
  void filter(const Coding& coding, const std::optional<CodesView>& kept) {
    if (kept) {
      filter_stretch(coding, *kept);
      return;
    }
    int64_t first = item_count_;
    for (const Job& job : jobs_) first = std::min(first, job.next < job.end ? job.next : first);
    if (first >= item_count_) return;
    // Each stretch ends with some work for every query: it has to be longer than k.
    const int64_t row_bytes = std::max<int64_t>(coding.words, 1) * 4;
    int64_t stretch = std::max(kStretchBytes / row_bytes, 4 * params_.k);
    stretch = rounded_up(std::min(stretch, item_count_ - first), kPanel);
    ItemCodes codes;
    for (; first < item_count_; first += stretch) {
      codes.code(items_, longest_, params_.cosine, coding, first,
                 std::min(stretch, item_count_ - first), params_.threads, cancel_);
      filter_stretch(coding, codes.view());
    }
  }

  void filter_stretch(const Coding& coding, const CodesView& codes) {
    const int64_t panels = divided_up(codes.count, kPanel);
    const double error = *std::max_element(codes.errors, codes.errors + panels);
    const double length = *std::max_element(codes.lengths, codes.lengths + panels);
    parallel_for(static_cast<int64_t>(jobs_.size()), params_.threads, cancel_,
                 [&](int64_t number, int thread) {
                   Job& job = jobs_[static_cast<size_t>(number)];
                   const int64_t end = std::min(job.end, codes.first + codes.count);
                   // Jobs that have stopped early wait for the next coding.
                   if (job.next < codes.first || job.next >= end) return;
                   run_job(job, coding, codes, {error, length}, end,
                           scratch_[static_cast<size_t>(thread)]);
                 });
  }

  struct Largest {
    double error, length;
  };

  // Filters the coded items up to number `end`. Stops early where the filter does not pay.
  void run_job(Job& job, const Coding& coding, const CodesView& codes, const Largest& largest,
               int64_t end, Scratch& scratch) const {
    const Tile tile = coding.bytes ? use_.code_tile : use_.score_tile;
    const int64_t most_scored = job.queries * (item_count_ / ranges_ / kPairsPerScore);
    const int64_t row_words = (coding.words + 1) * tile_queries_;
    const int64_t panel_products = kPanel * job.queries * std::max<int64_t>(cols_, 1);
    const int64_t panels_per_check = divided_up(kProductsPerCheck, panel_products);
    begin(job, coding, scratch);
    const int64_t last_panel = divided_up(end - codes.first, kPanel);
    int64_t panel = (job.next - codes.first) / kPanel;
    for (; panel < last_panel; ++panel) {
      if (panel % panels_per_check == 0) cancel_.check();
      const float error = codes.errors[panel];
      const float length = codes.lengths[panel];
      for (size_t query = 0; query < static_cast<size_t>(job.queries); ++query) {
        scratch.limits[query] =
            scratch.bar[query] - scratch.reach[query] * error - scratch.error[query] * length;
      }
      for (int64_t lane = 0; lane < kPanel; lane += tile_items_) {
        const int64_t item = panel * kPanel + lane;
        const uint32_t* const words = codes.panels + panel * kPanel * coding.words + lane;
        for (int64_t query = 0; query < job.queries; query += tile_queries_) {
          const Candidates out{scratch.values.data() + query * capacity_,
                               scratch.ids.data() + query * capacity_,
                               static_cast<size_t>(capacity_), scratch.counts.data() + query};
          const int64_t here = std::min(tile_queries_, job.queries - query);
          const int64_t most = tile(
              scratch.panels.data() + query / tile_queries_ * row_words, static_cast<size_t>(here),
              words, static_cast<size_t>(coding.words), codes.weights + item,
              scratch.limits.data() + query, static_cast<int32_t>(codes.first + item), out);
          if (most <= capacity_ - tile_items_) continue;
          for (int64_t full = query; full < query + here; ++full) {
            if (scratch.counts[static_cast<size_t>(full)] <= capacity_ - tile_items_) continue;
            sift(job, full, codes, largest, false, scratch);
          }
        }
      }
      if (coding.bytes && scratch.scored > most_scored) {
        ++panel;
        break;
      }
    }
    for (int64_t query = 0; query < job.queries; ++query) {
      sift(job, query, codes, largest, true, scratch);
      Query& found = scratch.queries[static_cast<size_t>(query)];
      write(found.best, job.scores + query * params_.k, job.ids + query * params_.k);
    }
    job.next = std::min(codes.first + panel * kPanel, end);
  }

  // Codes the queries of a job, and loads what was found for them so far.
  void begin(const Job& job, const Coding& coding, Scratch& scratch) const {
    // The last tile may look at more queries than there are.
    const auto rows = static_cast<size_t>(rounded_up(block_, tile_queries_));
    scratch.values.resize(static_cast<size_t>(block_ * capacity_));
    scratch.ids.resize(scratch.values.size());
    scratch.queries.resize(rows);
    scratch.bar.resize(rows);
    scratch.reach.resize(rows);
    scratch.error.resize(rows);
    scratch.limits.assign(rows, std::numeric_limits<float>::infinity());
    scratch.counts.assign(rows, 0);
    scratch.scored = 0;
    QueryCoder coder(queries_, coding);
    scratch.panels.assign(
        rows / static_cast<size_t>(tile_queries_) * static_cast<size_t>(coder.panel_words()), 0);
    for (int64_t number = 0; number < job.queries; ++number) {
      const auto slot = static_cast<size_t>(number);
      const int64_t row = job.first_query + number;
      const QueryCode code =
          coder.code(row, number % tile_queries_,
                     scratch.panels.data() + number / tile_queries_ * coder.panel_words());
      Query& query = scratch.queries[slot];
      const double norm = queries_.norms[row];
      query.unit = params_.cosine || norm * longest_ == 0 ? 1 : norm * longest_;
      query.grain = std::numeric_limits<float>::denorm_min() / query.unit;
      query.weight = code.weight;
      query.error = code.error;
      query.bound = kNoBound;
      query.best.clear();
      query.best.reserve(static_cast<size_t>(params_.k));
      scratch.reach[slot] = static_cast<float>((1 + query.error) / query.weight);
      scratch.error[slot] = static_cast<float>(query.error / query.weight);
      const float* const scores = job.scores + number * params_.k;
      const int32_t* const ids = job.ids + number * params_.k;
      for (int64_t rank = 0; rank < params_.k && ids[rank] >= 0; ++rank) {
        query.best.push_back({scores[rank], ids[rank]});
      }
      if (norm == 0) {
        // All scores are 0: the first items that it may have are the best.
        const bool met_before = !query.best.empty();
        for (int64_t item = job.next; !met_before && item < job.end; ++item) {
          if (!fewer_than_wanted(query)) break;
          if (!is_dropped(row, item)) query.best.push_back({0, static_cast<int32_t>(item)});
        }
        scratch.bar[slot] = std::numeric_limits<float>::infinity();
        continue;
      }
      tighten(query);
      set_bar(slot, scratch);
    }
  }

  bool fewer_than_wanted(const Query& query) const {
    return static_cast<int64_t>(query.best.size()) < params_.k;
  }

  bool is_dropped(int64_t row, int64_t item) const {
    if (drop_ == nullptr) return false;
    const auto entries = drop_->row(row);
    return std::binary_search(entries.begin, entries.end, static_cast<Index>(item));
  }

  void set_bar(size_t slot, Scratch& scratch) const {
    const Query& query = scratch.queries[slot];
    scratch.bar[slot] = static_cast<float>(query.bound / query.weight) - kSmallest;
  }

  // Raises the bound to what k items reach, in the units of the filter. Items that score a little
  // less may tie with them as floats.
  static void raise(Query& query, double reached) {
    query.bound = std::max(query.bound, reached - query.grain);
  }

  // Keeps the best k, and raises the bound to the k-th.
  void tighten(Query& query) const {
    if (fewer_than_wanted(query)) return;
    const auto last = query.best.begin() + static_cast<std::ptrdiff_t>(params_.k) - 1;
    std::nth_element(query.best.begin(), last, query.best.end(), better);
    raise(query, static_cast<double>(last->score) / query.unit);
    query.best.resize(static_cast<size_t>(params_.k));
  }

  // Drops those candidates of a query that cannot be among the best k. With `all`, or if many are
  // left, scores the others.
  void sift(const Job& job, int64_t number, const CodesView& codes, const Largest& largest,
            bool all, Scratch& scratch) const {
    const auto slot = static_cast<size_t>(number);
    const int64_t row = job.first_query + number;
    Query& query = scratch.queries[slot];
    const List list{scratch.values.data() + number * capacity_,
                    scratch.ids.data() + number * capacity_, scratch.counts[slot]};
    if (list.count == 0) return;
    if (drop_ != nullptr) {
      list.keep([&](float, int32_t id) { return !is_dropped(row, id); });
    }
    const auto weight = static_cast<float>(query.weight);
    const auto estimate = [&](float value) { return weight * value; };
    const auto margin = [&](int32_t id) {
      const int64_t panel = (id - codes.first) / kPanel;
      return query.margin(codes.errors[panel], codes.lengths[panel]);
    };
    // The largest margin is enough to drop most candidates; those of single panels are far apart in
    // memory.
    const double doubt = query.margin(largest.error, largest.length);
    const auto drop_hopeless = [&] {
      const auto least = static_cast<float>((query.bound - doubt) / query.weight);
      list.keep([&](float value, int32_t) { return value >= least; });
      list.keep([&](float value, int32_t id) {
        return static_cast<double>(estimate(value)) + margin(id) >= query.bound;
      });
    };

    if (!all) {
      // At least k candidates reach this, even if every estimate is too high by its margin.
      raise(query, kth(query, list, scratch, [&](int32_t candidate) {
                     return estimate(list.values[candidate]);
                   }) - doubt);
      drop_hopeless();
      if (list.count > capacity_ / 2) {  // where margins differ
        raise(query, kth(query, list, scratch, [&](int32_t candidate) {
                return static_cast<float>(static_cast<double>(estimate(list.values[candidate])) -
                                          margin(list.ids[candidate]));
              }));
        drop_hopeless();
      }
    }
    if (all || list.count > capacity_ / 2) {
      scorer_.widen(row, scratch.narrow, scratch.wide);
      // First those with the best estimates: their scores raise the bound and save the others.
      const double seems = kth(query, list, scratch,
                               [&](int32_t candidate) { return estimate(list.values[candidate]); });
      score(row, query, list, scratch, [&](float value) { return estimate(value) >= seems; });
      drop_hopeless();
      score(row, query, list, scratch, [](float) { return true; });
    }
    set_bar(slot, scratch);
  }

  // Scores the candidates for which `chosen` holds, and removes them from the list.
  template <class Chosen>
  void score(int64_t row, Query& query, const List& list, Scratch& scratch,
             const Chosen& chosen) const {
    list.keep([&](float value, int32_t id) {
      if (!chosen(value)) return true;
      query.best.push_back({scorer_.score(row, scratch.wide, id), id});
      ++scratch.scored;
      return false;
    });
    tighten(query);
  }

  // The k-th largest of the best scores so far and of value(i) of the candidates.
  template <class Value>
  double kth(const Query& query, const List& list, Scratch& scratch, const Value& value) const {
    const int64_t count = list.count + static_cast<int64_t>(query.best.size());
    if (count < params_.k) return -std::numeric_limits<double>::infinity();
    scratch.ranking.resize(static_cast<size_t>(count));
    float* ranking = scratch.ranking.data();
    for (int32_t candidate = 0; candidate < list.count; ++candidate) *ranking++ = value(candidate);
    for (const Scored& one : query.best) {
      *ranking++ = static_cast<float>(static_cast<double>(one.score) / query.unit);
    }
    return static_cast<double>(Cut::find(scratch.ranking, count - params_.k).value);
  }

  // Best first; -infinity and -1 where there are fewer than k.
  void write(std::vector<Scored>& best, float* scores, int32_t* ids) const {
    std::sort(best.begin(), best.end(), better);
    for (int64_t rank = 0; rank < params_.k; ++rank) {
      const bool there = rank < static_cast<int64_t>(best.size());
      scores[rank] =
          there ? best[static_cast<size_t>(rank)].score : -std::numeric_limits<float>::infinity();
      ids[rank] = there ? best[static_cast<size_t>(rank)].id : -1;
    }
  }

  // Merges the best of all ranges.
  void unite() {
    parallel_for(rows_, params_.threads, cancel_, [&](int64_t row, int thread) {
      std::vector<Scored>& best = scratch_[static_cast<size_t>(thread)].united;
      best.clear();
      for (int64_t range = 0; range < ranges_; ++range) {
        const float* const scores = scores_of(range) + row * params_.k;
        const int32_t* const ids = ids_of(range) + row * params_.k;
        for (int64_t rank = 0; rank < params_.k && ids[rank] >= 0; ++rank) {
          best.push_back({scores[rank], ids[rank]});
        }
      }
      write(best, scores_ + row * params_.k, ids_ + row * params_.k);
    });
  }

  const Rows& queries_;
  const Rows& items_;
  const std::optional<CodesView>& codes_;
  const CsrView<Index>* drop_;
  const TopkParams& params_;
  Cancel& cancel_;
  const double longest_;  // 1 where rows are divided by their norms
  const Scorer scorer_;
  float* scores_;
  int32_t* ids_;
  const Kernels& use_ = kernels();
  const int64_t rows_, item_count_, cols_;
  const int64_t tile_queries_, tile_items_;
  int64_t capacity_ = 0;             // of a query's list of candidates
  int64_t block_ = 0;                // queries of a job at most
  int64_t ranges_ = 1;               // that the items are divided into
  std::vector<float> range_scores_;  // of all ranges but the first
  std::vector<int32_t> range_ids_;
  std::vector<Job> jobs_;
  std::vector<Scratch> scratch_;
};

}  // namespace

PreparedItems prepare_items(const MatrixView& items, bool cosine, int threads, Cancel& cancel) {
  PreparedItems prepared;
  prepared.norms = norms_of(items, threads, cancel);
  const Rows rows{items, prepared.norms.data()};
  prepared.longest = rows.longest();
  if (Coding::fits_in_bytes(items.cols)) {
    prepared.codes.code(rows, cosine ? 1 : prepared.longest, cosine, Coding::in_bytes(items.cols),
                        0, items.rows, threads, cancel);
  }
  return prepared;
}

template <class Index>
void topk(const MatrixView& queries, const MatrixView& items, const PreparedView* prepared,
          const CsrView<Index>* drop, const TopkParams& params, Cancel& cancel, float* scores,
          int32_t* ids) {
  if (drop != nullptr) {
    for (int64_t row = 0; row < drop->rows; ++row) drop->sorted_row(row);
  }
  const std::vector<double> query_norms = norms_of(queries, params.threads, cancel);
  std::vector<double> item_norms;
  if (prepared == nullptr) item_norms = norms_of(items, params.threads, cancel);
  const Rows rows{items, prepared == nullptr ? item_norms.data() : prepared->norms};
  const PreparedView view =
      prepared == nullptr ? PreparedView{rows.norms, rows.longest(), std::nullopt} : *prepared;
  const Rows query_rows{queries, query_norms.data()};
  Search<Index>(query_rows, rows, view, drop, params, cancel, scores, ids).run();
}

template void topk(const MatrixView&, const MatrixView&, const PreparedView*,
                   const CsrView<int32_t>*, const TopkParams&, Cancel&, float*, int32_t*);
template void topk(const MatrixView&, const MatrixView&, const PreparedView*,
                   const CsrView<int64_t>*, const TopkParams&, Cancel&, float*, int32_t*);

}  // namespace ngame

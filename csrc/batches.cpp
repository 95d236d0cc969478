#include "batches.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <utility>

#include "random.h"

namespace ngame {
namespace {

constexpr int32_t kNone = -1;

// Rows between two checks whether the call was stopped.
constexpr int64_t kCheck = 1 << 14;

constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();

// The keys of one batch.
class KeySet {
 public:
  explicit KeySet(const KeysView& keys) : keys_(keys), stamps_(static_cast<size_t>(keys.count)) {}

  void clear() { ++stamp_; }
  bool has(int32_t key) const { return stamps_[key] == stamp_; }
  void add(int32_t row) {
    for (const int32_t key : keys_[row]) stamps_[key] = stamp_;
  }
  void remove(int32_t row) {
    for (const int32_t key : keys_[row]) stamps_[key] = 0;
  }
  // The first key of the row that is in this set, or kNone.
  int32_t conflict(int32_t row) const {
    for (const int32_t key : keys_[row]) {
      if (has(key)) return key;
    }
    return kNone;
  }

 private:
  const KeysView& keys_;
  std::vector<int32_t> stamps_;
  int32_t stamp_ = 0;
};

// Rows that wait for a batch, each listed under a key that kept it out of one: a batch with that
// key can skip the whole list. Keys are kept in the order in which they began to wait.
class Waiting {
 public:
  Waiting(int64_t rows, int64_t keys)
      : next_row_(static_cast<size_t>(rows), kNone),
        lists_(static_cast<size_t>(keys)),
        next_key_(static_cast<size_t>(keys), kNone) {}

  bool empty() const { return first_key_ == kNone; }
  void add(int32_t row, int32_t key) {
    List& list = lists_[key];
    next_row_[row] = kNone;
    if (list.first != kNone) {
      next_row_[list.last] = row;
      list.last = row;
      return;
    }
    list = {row, row};
    next_key_[key] = kNone;
    (first_key_ == kNone ? first_key_ : next_key_[last_key_]) = key;
    last_key_ = key;
  }
  // Calls offer(row, key) for the first row of each key; the answer says what becomes of the row.
  enum class Answer { stays, goes, stop };
  template <class Offer>
  void offer_each(const Offer& offer) {
    int32_t before = kNone;
    for (int32_t key = first_key_; key != kNone;) {
      const int32_t row = lists_[key].first;
      const int32_t after = next_row_[row];  // `offer` may add the row to another list
      const Answer answer = offer(row, key);
      if (answer == Answer::stop) return;
      if (answer == Answer::goes) lists_[key].first = after;
      const int32_t next = next_key_[key];
      if (lists_[key].first != kNone) {
        before = key;
      } else {
        (before == kNone ? first_key_ : next_key_[before]) = next;
        if (last_key_ == key) last_key_ = before;
      }
      key = next;
    }
  }
  // Appends all rows to `rows` and forgets them.
  void drain(std::vector<int32_t>& rows) {
    for (int32_t key = first_key_; key != kNone; key = next_key_[key]) {
      for (int32_t row = lists_[key].first; row != kNone; row = next_row_[row]) rows.push_back(row);
      lists_[key].first = kNone;
    }
    first_key_ = last_key_ = kNone;
  }

 private:
  struct List {
    int32_t first = kNone;
    int32_t last = kNone;
  };
  std::vector<int32_t> next_row_;
  std::vector<List> lists_;
  std::vector<int32_t> next_key_;
  int32_t first_key_ = kNone;
  int32_t last_key_ = kNone;
};

// Separates any number of plans over the same keys; see `separate`.
class Separator {
 public:
  Separator(const KeysView& keys, Cancel& cancel)
      : cancel_(cancel), open_(keys), other_(keys), waiting_(keys.rows(), keys.count) {}

  Order run(std::span<const int32_t> rows, int64_t batch_size) {
    const auto total = static_cast<int64_t>(rows.size());
    if (total == 0) return {{}, 0};
    // A larger batch holds no more rows; memory goes by the rows, whatever size is asked for.
    batch_size = std::min(batch_size, total);
    batch_size_ = batch_size;
    const int64_t batches = (total - 1) / batch_size + 1;
    slots_.resize(static_cast<size_t>(batches * batch_size));
    sizes_.assign(static_cast<size_t>(batches), 0);
    for (int64_t batch = 0; batch < batches; ++batch) {
      open(batch);
      const int64_t first = batch * batch_size;
      for (const int32_t row : rows.subspan(first, std::min(batch_size, total - first))) {
        const int32_t key = open_.conflict(row);
        key == kNone ? put(batch, row) : waiting_.add(row, key);
      }
      fill(batch);
    }
    for (int64_t batch = 0; batch < batches && !waiting_.empty(); ++batch) {
      if (full(batch)) continue;
      open(batch);
      fill(batch);
    }
    last_ = batches - 1;
    close_gaps();
    extend();
    return result();
  }

 private:
  bool full(int64_t batch) const { return sizes_[batch] == batch_size_; }
  std::span<int32_t> rows_of(int64_t batch) {
    return std::span(slots_).subspan(batch * batch_size_, sizes_[batch]);
  }
  // Makes `batch` the one whose keys `open_` holds.
  void open(int64_t batch) {
    cancel_.check();
    open_.clear();
    for (const int32_t row : rows_of(batch)) open_.add(row);
  }
  void put(int64_t batch, int32_t row) {
    open_.add(row);
    slots_[batch * batch_size_ + sizes_[batch]++] = row;
  }
  // Puts waiting rows into the open batch.
  void fill(int64_t batch) {
    waiting_.offer_each([&](int32_t row, int32_t key) {
      if (full(batch)) return Waiting::Answer::stop;
      if (open_.has(key)) return Waiting::Answer::stays;
      const int32_t conflict = open_.conflict(row);
      conflict == kNone ? put(batch, row) : waiting_.add(row, conflict);
      return Waiting::Answer::goes;
    });
  }
  // Fills all batches but the last from the last, which moves forward as it empties.
  void close_gaps() {
    for (int64_t batch = 0; batch < last_; ++batch) {
      if (full(batch)) continue;
      open(batch);
      fill(batch);
      while (!full(batch) && batch < last_) take_from_last(batch);
    }
  }
  // Moves rows of the last batch to the open one. If that does not fill it, the last batch is
  // dissolved: its rows that conflict have to wait.
  void take_from_last(int64_t batch) {
    const std::span<int32_t> rows = rows_of(last_);
    conflicts_.clear();
    size_t kept = 0;
    for (const int32_t row : rows) {
      const int32_t key = full(batch) ? kNone : open_.conflict(row);
      if (!full(batch) && key == kNone) {
        put(batch, row);
      } else {
        conflicts_.push_back(key);
        rows[kept++] = row;
      }
    }
    sizes_[last_] = static_cast<int64_t>(kept);
    if (full(batch)) return;
    for (size_t slot = 0; slot < kept; ++slot) waiting_.add(rows[slot], conflicts_[slot]);
    sizes_[last_--] = 0;
  }
  // With all batches but the last full: fills the last, and adds batches, while waiting rows can be
  // placed.
  void extend() {
    while (!waiting_.empty()) {
      if (full(last_)) ++last_;
      open(last_);
      fill(last_);
      for (int64_t tries = 0; tries < last_ && !full(last_) && !waiting_.empty(); ++tries) {
        if (next_ >= last_) next_ = 0;
        exchange(next_++);
      }
      if (!full(last_)) break;
    }
  }
  // Moves rows of a full batch to the open batch, the last, and puts waiting rows into their
  // places. With one key a row this places every row that can be placed: a full batch b has a key
  // that the last batch, which is not full, lacks; so after all exchanges a row still waits only if
  // every batch has its key.
  void exchange(int64_t batch) {
    movable_.clear();
    const std::span<int32_t> rows = rows_of(batch);
    for (size_t slot = 0; slot < rows.size(); ++slot) {
      if (open_.conflict(rows[slot]) == kNone) movable_.push_back(slot);
    }
    if (movable_.empty()) return;
    cancel_.check();
    other_.clear();
    for (const int32_t row : rows) other_.add(row);
    waiting_.offer_each([&](int32_t row, int32_t key) {
      if (full(last_)) return Waiting::Answer::stop;
      if (other_.has(key) || other_.conflict(row) != kNone) return Waiting::Answer::stays;
      while (!movable_.empty() && open_.conflict(rows[movable_.back()]) != kNone) {
        movable_.pop_back();
      }
      if (movable_.empty()) return Waiting::Answer::stop;
      int32_t& place = rows[movable_.back()];
      movable_.pop_back();
      other_.remove(place);
      put(last_, std::exchange(place, row));
      other_.add(row);
      return Waiting::Answer::goes;
    });
  }
  Order result() {
    Order order;
    order.reached = last_ * batch_size_ + sizes_[last_];
    order.rows.reserve(slots_.size());
    order.rows.assign(slots_.begin(), slots_.begin() + order.reached);
    waiting_.drain(order.rows);
    return order;
  }

  Cancel& cancel_;
  KeySet open_;   // keys of the batch that is being filled
  KeySet other_;  // keys of the batch that rows are exchanged with
  Waiting waiting_;
  int64_t batch_size_ = 0;
  std::vector<int32_t> slots_;  // of all batches
  std::vector<int64_t> sizes_;
  std::vector<int32_t> conflicts_;
  std::vector<size_t> movable_;
  int64_t last_ = 0;
  int64_t next_ = 0;  // batch to exchange rows with next
};

void check_row(int32_t row, int64_t rows, const char* name) {
  if (row >= 0 && row < rows) return;
  throw std::out_of_range(std::string(name) + " has row " + std::to_string(row) +
                          ", out of range for " + std::to_string(rows));
}

void check_count(int64_t count, int64_t least, const char* name) {
  if (count >= least) return;
  throw std::invalid_argument(std::string(name) + " is " + std::to_string(count) + ", expected " +
                              std::to_string(least) + " or more");
}

void check_keyed(const KeysView& keys, int64_t rows) {
  keys.check();
  if (keys.rows() == rows) return;
  throw std::invalid_argument("keys has " + std::to_string(keys.rows()) + " rows, expected " +
                              std::to_string(rows));
}

}  // namespace

void KeysView::check() const {
  check_offsets(offsets, static_cast<int64_t>(keys.size()), 0);
  if (count < 0 || count > static_cast<int64_t>(keys.size())) {
    throw std::invalid_argument("keys has " + std::to_string(keys.size()) + " entries and " +
                                std::to_string(count) + " different keys");
  }
  for (const int32_t key : keys) {
    if (key >= 0 && key < count) continue;
    throw std::out_of_range("keys has key " + std::to_string(key) + ", out of range for " +
                            std::to_string(count));
  }
}

void cluster_order(const ClustersView& clusters, std::span<const int32_t> sequence, uint64_t seed,
                   std::span<int32_t> order) {
  clusters.check(static_cast<int64_t>(order.size()));
  std::vector<char> seen(static_cast<size_t>(clusters.count()));
  Random random(seed);
  size_t filled = 0;
  for (const int32_t cluster : sequence) {
    check_row(cluster, clusters.count(), "sequence");
    if (seen[cluster]++) throw std::invalid_argument("sequence repeats a cluster");
    const auto rows = clusters[cluster];
    if (rows.size() > order.size() - filled) {
      throw std::invalid_argument("offsets of the clusters was changed during the call");
    }
    const auto place = order.subspan(filled, rows.size());
    std::copy(rows.begin(), rows.end(), place.begin());
    random.shuffle(place);
    filled += rows.size();
  }
  if (filled != order.size()) throw std::invalid_argument("sequence lacks a cluster");
}

void neighbour_order(const NeighboursView& neighbours, const KeysView* keys,
                     const NeighbourParams& params, Cancel& cancel, std::span<int32_t> order) {
  const int64_t rows = neighbours.rows;
  check_count(params.batch_size, 1, "batch_size");
  check_count(params.nearest, 0, "nearest");
  check_count(params.drawn, 0, "drawn");
  check_count(params.random_rows, 0, "random_rows");
  if (keys != nullptr) check_keyed(*keys, rows);
  Random random(params.seed);
  std::vector<int32_t> seeds(static_cast<size_t>(rows));
  std::iota(seeds.begin(), seeds.end(), 0);
  random.shuffle(std::span(seeds));
  std::vector<char> used(static_cast<size_t>(rows));
  const KeysView no_keys{};
  KeySet batch_keys(keys == nullptr ? no_keys : *keys);
  batch_keys.clear();
  size_t filled = 0;
  int64_t room = params.batch_size;
  const auto place = [&](int32_t row) {
    check_row(row, rows, "neighbours");
    if (used[row]) return;
    if (keys != nullptr && batch_keys.conflict(row) != kNone) return;
    used[row] = 1;
    order[filled++] = row;
    if (keys != nullptr) batch_keys.add(row);
    --room;
  };
  std::vector<int32_t> others;
  const auto grow = [&](int32_t seed) {
    place(seed);
    if (!used[seed]) return;
    const int32_t* const ids = neighbours.ids + seed * neighbours.width;
    const int32_t* const end = ids + neighbours.width;
    const int32_t* const others_begin = ids + std::min(params.nearest, neighbours.width);
    for (const int32_t* id = ids; id != others_begin && room > params.random_rows; ++id) {
      if (*id >= 0) place(*id);
    }
    if (room > params.random_rows) {
      others.clear();
      std::copy_if(others_begin, end, std::back_inserter(others),
                   [](int32_t id) { return id >= 0; });
      const auto drawn = std::min(others.size(), static_cast<size_t>(params.drawn));
      random.draw(std::span(others), drawn);
      for (size_t other = 0; other < drawn && room > params.random_rows; ++other) {
        place(others[other]);
      }
    }
    if (room == 0) {
      room = params.batch_size;
      batch_keys.clear();
    }
  };
  // Seeds that conflicted with the batch of their turn get a second one.
  for (int turn = 0; turn < 2; ++turn) {
    for (size_t tried = 0; tried < seeds.size(); ++tried) {
      if (tried % kCheck == 0) cancel.check();
      if (!used[seeds[tried]]) grow(seeds[tried]);
    }
  }
  for (const int32_t seed : seeds) {
    if (!used[seed]) order[filled++] = seed;
  }
}

Keys number_keys(std::span<const int64_t> given_offsets, std::span<const int64_t> values,
                 Cancel& cancel) {
  // A copy: the offsets are read twice, and may be those of the caller's matrix.
  const std::vector<int64_t> offsets(given_offsets.begin(), given_offsets.end());
  check_offsets(offsets, static_cast<int64_t>(values.size()), 0);
  if (values.size() > static_cast<size_t>(kMostRows)) {
    throw std::invalid_argument("keys has " + std::to_string(values.size()) +
                                " entries, at most 2**31 - 1 are possible");
  }
  // Numbers of the values, by open addressing in a table that is at most half full.
  struct Slot {
    int64_t value;
    int32_t number = kNone;
  };
  struct Uses {
    int32_t last_row;
    bool shared;
  };
  std::vector<Slot> slots(std::bit_ceil(std::max<size_t>(2 * values.size(), 2)));
  std::vector<Uses> uses;
  std::vector<int32_t> numbers(values.size());  // kNone where a value repeats within a row
  const auto number_of = [&](int64_t value) -> int32_t& {
    size_t slot = splitmix(static_cast<uint64_t>(value)) & (slots.size() - 1);
    while (slots[slot].number != kNone && slots[slot].value != value) {
      slot = (slot + 1) & (slots.size() - 1);
    }
    slots[slot].value = value;
    return slots[slot].number;
  };
  const auto rows = static_cast<int64_t>(offsets.size()) - 1;
  for (int64_t row = 0; row < rows; ++row) {
    if (row % kCheck == 0) cancel.check();
    for (int64_t entry = offsets[row]; entry < offsets[row + 1]; ++entry) {
      int32_t& number = number_of(values[entry]);
      numbers[entry] = number;
      if (number == kNone) {
        numbers[entry] = number = static_cast<int32_t>(uses.size());
        uses.push_back({static_cast<int32_t>(row), false});
      } else if (uses[number].last_row == row) {
        numbers[entry] = kNone;
      } else {
        uses[number] = {static_cast<int32_t>(row), true};
      }
    }
  }
  Keys result;
  std::vector<int32_t> renumbered(uses.size(), kNone);
  for (size_t number = 0; number < uses.size(); ++number) {
    if (uses[number].shared) renumbered[number] = static_cast<int32_t>(result.count++);
  }
  result.offsets.reserve(offsets.size());
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t entry = offsets[row]; entry < offsets[row + 1]; ++entry) {
      if (numbers[entry] == kNone || renumbered[numbers[entry]] == kNone) continue;
      result.keys.push_back(renumbered[numbers[entry]]);
    }
    result.offsets.push_back(static_cast<int64_t>(result.keys.size()));
  }
  return result;
}

Order separate(std::span<const int32_t> rows, const KeysView& keys, int64_t batch_size,
               Cancel& cancel) {
  keys.check();
  check_count(batch_size, 1, "batch_size");
  std::vector<char> seen(static_cast<size_t>(keys.rows()));
  for (const int32_t row : rows) {
    check_row(row, keys.rows(), "rows");
    if (seen[row]++) throw std::invalid_argument("rows has row " + std::to_string(row) + " twice");
  }
  return Separator(keys, cancel).run(rows, batch_size);
}

Order group_order(const ClustersView& groups, std::span<const int64_t> chunks, const KeysView* keys,
                  const GroupParams& params, Cancel& cancel) {
  groups.check(static_cast<int64_t>(groups.order.size()));
  if (keys != nullptr) check_keyed(*keys, static_cast<int64_t>(groups.order.size()));
  const int64_t size = params.per_group;
  check_count(size, 1, "per_group");
  check_count(params.batch_size, size, "batch_size");
  if (!chunks.empty() && static_cast<int64_t>(chunks.size()) != groups.count()) {
    throw std::invalid_argument("chunks has " + std::to_string(chunks.size()) +
                                " groups, expected " + std::to_string(groups.count()));
  }
  int64_t most_chunks = kMostRows / size;
  for (const int64_t count : chunks) {
    check_count(count, 0, "chunks");
    if (count > most_chunks) {
      throw std::invalid_argument("chunks make more than 2**31 - 1 rows");
    }
    most_chunks -= count;
  }
  Random random(params.seed);

  std::vector<int32_t> rows;          // chunk after chunk
  std::vector<int32_t> chunk_groups;  // the group of each
  std::optional<Separator> separator;
  if (keys != nullptr) separator.emplace(*keys, cancel);
  std::vector<int32_t> shuffled;
  for (int64_t group = 0; group < groups.count(); ++group) {
    cancel.check();
    // Without `chunks` one pass over the rows; with them as many passes as it takes.
    int64_t wanted = chunks.empty() ? groups[group].size() / size : chunks[group];
    do {
      shuffled.assign(groups[group].begin(), groups[group].end());
      random.shuffle(std::span(shuffled));
      auto made = static_cast<int64_t>(shuffled.size());
      if (separator) {
        Order separated = separator->run(shuffled, size);
        shuffled = std::move(separated.rows);
        made = separated.reached;
      }
      made = std::min(made / size, wanted);
      rows.insert(rows.end(), shuffled.begin(), shuffled.begin() + made * size);
      chunk_groups.insert(chunk_groups.end(), made, static_cast<int32_t>(group));
      wanted = chunks.empty() || made == 0 ? 0 : wanted - made;
    } while (wanted > 0);
  }

  std::vector<int32_t> sequence(chunk_groups.size());
  std::iota(sequence.begin(), sequence.end(), 0);
  random.shuffle(std::span(sequence));
  const int64_t chunks_a_batch = params.batch_size / size;
  if (chunks_a_batch > 1) {
    // Two chunks conflict if they are of one group, which serves as a key, or if their rows do.
    std::vector<int64_t> offsets{0};
    std::vector<int32_t> chunk_keys;
    const int64_t row_keys = keys == nullptr ? 0 : keys->count;
    if (groups.count() > kMostRows - row_keys) {
      throw std::invalid_argument("groups and keys are more than 2**31 - 1 together");
    }
    for (size_t chunk = 0; chunk < chunk_groups.size(); ++chunk) {
      chunk_keys.push_back(static_cast<int32_t>(row_keys + chunk_groups[chunk]));
      for (int64_t member = 0; keys != nullptr && member < size; ++member) {
        const auto more = (*keys)[rows[chunk * size + member]];
        chunk_keys.insert(chunk_keys.end(), more.begin(), more.end());
      }
      offsets.push_back(static_cast<int64_t>(chunk_keys.size()));
    }
    const KeysView all{offsets, chunk_keys, row_keys + groups.count()};
    Order separated = Separator(all, cancel).run(sequence, chunks_a_batch);
    sequence = std::move(separated.rows);
    sequence.resize(separated.reached / chunks_a_batch * chunks_a_batch);
  }

  Order order;
  order.rows.reserve(sequence.size() * size);
  for (const int32_t chunk : sequence) {
    const auto first = rows.begin() + chunk * size;
    order.rows.insert(order.rows.end(), first, first + size);
  }
  order.reached = static_cast<int64_t>(order.rows.size());
  return order;
}

}  // namespace ngame

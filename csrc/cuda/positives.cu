#include "csr.h"
#include "positives.h"
#include "primitives.h"

namespace ngame::cuda {
namespace {

__device__ __forceinline__ uint64_t pack(int64_t high, int64_t low) {
  return static_cast<uint64_t>(high) << 32 | static_cast<uint64_t>(low);
}

template <class Index>
__global__ void count_entries(Csr<Index> labels, const int64_t* rows, int64_t* sizes, Fault id,
                              CsrFaults faults, int64_t count) {
  const int64_t position = global_thread();
  if (position >= count) return;
  sizes[position] = 0;
  const int64_t row = rows[position];
  if (row < 0 || row >= labels.rows) {
    id.report(position);
  } else if (check_offsets(labels, row, faults)) {
    sizes[position] = labels.offsets[row + 1] - labels.offsets[row];
  }
}

// The labels of every row of the batch, one after the other, and who has them. A warp for each row.
template <class Index>
__global__ void gather(Csr<Index> labels, const int64_t* rows, const int64_t* offsets,
                       uint64_t* found, int32_t* owners, CsrFaults faults, int64_t count) {
  const int64_t position = global_warp();
  if (position >= count) return;
  const int64_t first = labels.offsets[rows[position]];
  const int64_t size = offsets[position + 1] - offsets[position];
  for (int64_t step = lane(); step < size; step += kWarp) {
    const int64_t column = checked_column(labels, first, first + step, faults);
    found[offsets[position] + step] = static_cast<uint64_t>(column);
    owners[offsets[position] + step] = static_cast<int32_t>(position);
  }
}

__global__ void copy(const uint64_t* from, uint64_t* to, int64_t count) {
  const int64_t position = global_thread();
  if (position < count) to[position] = from[position];
}

__global__ void to_int32(const int64_t* from, int32_t* to, int64_t count) {
  const int64_t position = global_thread();
  if (position < count) to[position] = static_cast<int32_t>(from[position]);
}

__global__ void mark_first(const uint64_t* sorted, int64_t* first, int64_t count) {
  const int64_t position = global_thread();
  if (position < count) first[position] = position == 0 || sorted[position] != sorted[position - 1];
}

__global__ void keep_first(const uint64_t* sorted, const int64_t* places, int32_t* kept,
                           int64_t count) {
  const int64_t position = global_thread();
  if (position < count && places[position + 1] > places[position]) {
    kept[places[position]] = static_cast<int32_t>(sorted[position]);
  }
}

__global__ void find_all(const uint64_t* labels, const int32_t* pool, int64_t pool_size,
                         int32_t* places, int64_t count) {
  const int64_t position = global_thread();
  if (position >= count) return;
  places[position] =
      static_cast<int32_t>(lower_bound(pool, pool_size, static_cast<int32_t>(labels[position])));
}

__global__ void number_columns(const int64_t* columns, int64_t bound, uint64_t* keys, Fault id,
                               int64_t count) {
  const int64_t position = global_thread();
  if (position >= count) return;
  const bool good = columns[position] >= 0 && columns[position] < bound;
  if (!good) id.report(position);
  keys[position] = pack(good ? columns[position] : 0, position);
}

__global__ void count_matches(const uint64_t* labels, const uint64_t* columns, int64_t column_count,
                              int64_t* sizes, int64_t count) {
  const int64_t position = global_thread();
  if (position >= count) return;
  const auto label = static_cast<int64_t>(labels[position]);
  sizes[position] = lower_bound(columns, column_count, pack(label + 1, 0)) -
                    lower_bound(columns, column_count, pack(label, 0));
}

__global__ void list_matches(const uint64_t* labels, const int32_t* owners, const uint64_t* columns,
                             int64_t column_count, const int64_t* offsets, uint64_t* matches,
                             int64_t count) {
  const int64_t position = global_thread();
  if (position >= count) return;
  const int64_t first =
      lower_bound(columns, column_count, pack(static_cast<int64_t>(labels[position]), 0));
  for (int64_t step = 0; step < offsets[position + 1] - offsets[position]; ++step) {
    matches[offsets[position] + step] = pack(owners[position], columns[first + step] & 0xffffffff);
  }
}

__global__ void low_halves(const uint64_t* keys, int32_t* low, int64_t count) {
  const int64_t position = global_thread();
  if (position < count) low[position] = static_cast<int32_t>(keys[position] & 0xffffffff);
}

__global__ void row_starts(const uint64_t* keys, int64_t keys_count, int32_t* offsets,
                           int64_t count) {
  const int64_t position = global_thread();
  if (position < count)
    offsets[position] = static_cast<int32_t>(lower_bound(keys, keys_count, pack(position, 0)));
}

[[noreturn]] void reject_id(const Call& call, const char* name, const int64_t* ids,
                            int64_t position, int64_t bound) {
  throw std::out_of_range(std::string(name) + "[" + std::to_string(position) + "] is " +
                          std::to_string(call.read(ids + position)) + ", out of range for " +
                          std::to_string(bound));
}

int64_t checked_total(const Call& call, const int64_t* offsets, int64_t count) {
  const int64_t total = call.read(offsets + count);
  if (total > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("the result has more than 2**31 - 1 entries");
  }
  return total;
}

// The labels of the rows of a batch: those of row i from offsets[i] on.
struct Batch {
  int64_t* offsets;
  uint64_t* labels;
  int32_t* owners;
  int64_t size;
};

template <class Index>
Batch gather_batch(const Call& call, const Csr<Index>& labels, const int64_t* rows,
                   int64_t row_count) {
  const Fault id = Fault::make(call);
  const CsrFaults faults = CsrFaults::make(call);
  Batch batch{};
  batch.offsets = call.buffer<int64_t>(row_count + 1);
  call.fill(batch.offsets, row_count + 1, 0);
  call.for_each(count_entries<Index>, row_count, labels, rows, batch.offsets, id, faults);
  exclusive_sum(call, batch.offsets, row_count + 1);
  if (const int64_t position = id.read(call); position >= 0)
    reject_id(call, "rows", rows, position, labels.rows);
  reject_offsets(call, labels, faults);
  batch.size = checked_total(call, batch.offsets, row_count);
  batch.labels = call.buffer<uint64_t>(batch.size);
  batch.owners = call.buffer<int32_t>(batch.size);
  call.for_each_warp(gather<Index>, row_count, labels, rows, batch.offsets, batch.labels,
                     batch.owners, faults, row_count);
  reject_columns(call, labels, faults);
  return batch;
}

int bits_of(int64_t values) {
  int bits = 1;
  while (bits < 63 && (int64_t{1} << bits) < values) ++bits;
  return bits;
}

}  // namespace

template <class Index>
Pool label_pool(const Call& call, const Csr<Index>& labels, const int64_t* rows,
                int64_t row_count) {
  const Batch batch = gather_batch(call, labels, rows, row_count);
  uint64_t* const sorted = call.buffer<uint64_t>(batch.size);
  call.for_each(copy, batch.size, batch.labels, sorted);
  sort(call, sorted, batch.size, bits_of(labels.cols));
  int64_t* const places = call.buffer<int64_t>(batch.size + 1);
  call.fill(places, batch.size + 1, 0);
  call.for_each(mark_first, batch.size, sorted, places);
  exclusive_sum(call, places, batch.size + 1);
  Pool pool{};
  pool.size = call.read(places + batch.size);
  pool.labels = call.buffer<int32_t>(pool.size);
  call.for_each(keep_first, batch.size, sorted, places, pool.labels);
  pool.positives = {call.buffer<int32_t>(row_count + 1), call.buffer<int32_t>(batch.size),
                    batch.size};
  call.for_each(to_int32, row_count + 1, batch.offsets, pool.positives.offsets);
  call.for_each(find_all, batch.size, batch.labels, pool.labels, pool.size, pool.positives.columns);
  return pool;
}

template <class Index>
Pattern in_batch_positives(const Call& call, const Csr<Index>& labels, const int64_t* rows,
                           int64_t row_count, const int64_t* columns, int64_t column_count) {
  const Batch batch = gather_batch(call, labels, rows, row_count);
  const Fault id = Fault::make(call);
  uint64_t* const keys = call.buffer<uint64_t>(column_count);
  call.for_each(number_columns, column_count, columns, labels.cols, keys, id);
  if (const int64_t position = id.read(call); position >= 0) {
    reject_id(call, "columns", columns, position, labels.cols);
  }
  sort(call, keys, column_count, 32 + bits_of(labels.cols));
  int64_t* const offsets = call.buffer<int64_t>(batch.size + 1);
  call.fill(offsets, batch.size + 1, 0);
  call.for_each(count_matches, batch.size, batch.labels, keys, column_count, offsets);
  exclusive_sum(call, offsets, batch.size + 1);
  const int64_t total = checked_total(call, offsets, batch.size);
  uint64_t* const matches = call.buffer<uint64_t>(total);
  call.for_each(list_matches, batch.size, batch.labels, batch.owners, keys, column_count, offsets,
                matches);
  sort(call, matches, total, 32 + bits_of(row_count));
  const Pattern found{call.buffer<int32_t>(row_count + 1), call.buffer<int32_t>(total), total};
  call.for_each(low_halves, total, matches, found.columns);
  call.for_each(row_starts, row_count + 1, matches, total, found.offsets);
  return found;
}

template Pool label_pool(const Call&, const Csr<int32_t>&, const int64_t*, int64_t);
template Pool label_pool(const Call&, const Csr<int64_t>&, const int64_t*, int64_t);
template Pattern in_batch_positives(const Call&, const Csr<int32_t>&, const int64_t*, int64_t,
                                    const int64_t*, int64_t);
template Pattern in_batch_positives(const Call&, const Csr<int64_t>&, const int64_t*, int64_t,
                                    const int64_t*, int64_t);

}  // namespace ngame::cuda

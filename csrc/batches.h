// The order in which an epoch visits the rows: each stretch of batch_size of it is a batch.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common.h"
#include "parallel.h"

namespace ngame {

// Row r has the keys keys[offsets[r] .. offsets[r + 1]), each once, of `count` in all. Two rows
// that share one must not meet in a batch.
struct KeysView {
  std::span<const int64_t> offsets;
  std::span<const int32_t> keys;
  int64_t count;

  int64_t rows() const { return static_cast<int64_t>(offsets.size()) - 1; }
  std::span<const int32_t> operator[](int64_t row) const {
    return keys.subspan(offsets[row], offsets[row + 1] - offsets[row]);
  }
  void check() const;
};

struct Keys {
  std::vector<int64_t> offsets{0};
  std::vector<int32_t> keys;
  int64_t count = 0;
};

// Numbers the keys that more than one row has: the others cannot conflict. Row r comes with the
// values[offsets[r] .. offsets[r + 1]), any integers, which may repeat.
Keys number_keys(std::span<const int64_t> offsets, std::span<const int64_t> values, Cancel& cancel);

// Row r has the neighbours ids[r * width .. (r + 1) * width), the nearest first; negative ids stand
// for none.
struct NeighboursView {
  const int32_t* ids;
  int64_t rows;
  int64_t width;
};

struct NeighbourParams {
  int64_t nearest;  // so many of the nearest follow a seed row
  int64_t drawn;    // and so many drawn at random from those behind them
  int64_t batch_size;
  int64_t alone;  // so many rows of a batch, its last, are seed rows that nothing follows
  uint64_t seed = 0;
};

struct GroupParams {
  int64_t per_group;  // rows of a group that stand together: a chunk
  int64_t batch_size;
  uint64_t seed = 0;
};

// A flat plan: the first `reached` of `rows` are the batches, of which only the last may be short.
// Behind them stand the rows that found no place.
struct Order {
  std::vector<int32_t> rows;
  int64_t reached;
};

// The clusters in the order of `sequence`, the rows of each shuffled.
void cluster_order(const ClustersView& clusters, std::span<const int32_t> sequence, uint64_t seed,
                   std::span<int32_t> order);

// Rows as Sample4Geo visits them: a random row that is not used yet, its nearest neighbours, and
// some drawn from the others, so far as they are not used yet, until the batch is full but for the
// rows that stand alone. Rows that share a key with the batch are passed over; those that nothing
// takes up again stand at the end.
void neighbour_order(const NeighboursView& neighbours, const KeysView* keys,
                     const NeighbourParams& params, Cancel& cancel, std::span<int32_t> order);

// Batches of chunks of different groups, each chunk being per_group rows of one. Group g is a
// cluster of `groups`; it gives chunks[g] chunks, beginning again with its rows where they do not
// suffice, or without `chunks` as many as its rows make.
Order group_order(const ClustersView& groups, std::span<const int64_t> chunks, const KeysView* keys,
                  const GroupParams& params, Cancel& cancel);

// Rearranges a flat plan until no two rows of a batch share a key. A row that conflicts with one
// before it in its batch moves to the first later batch with room, or else to an earlier one; room
// that is left is filled with the rows of the last batches. What then finds no place is exchanged
// for rows of full batches. With one key a row as many rows are reached as can be; rows whose
// batch has no conflict stay in it but for these two uses.
Order separate(std::span<const int32_t> rows, const KeysView& keys, int64_t batch_size,
               Cancel& cancel);

}  // namespace ngame

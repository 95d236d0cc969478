// The order in which an epoch visits the rows; cutting it every batch_size rows gives the batches.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "common.h"
#include "parallel.h"

namespace ngame {

// Row r has the keys keys[offsets[r] .. offsets[r + 1]), each once; keys are 0 .. count - 1. No two
// rows of a batch may share a key.
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

// Numbers the keys that several rows share and leaves out the others, which cannot conflict. Row r
// has the keys values[offsets[r] .. offsets[r + 1]), any integers, which may repeat.
Keys number_keys(std::span<const int64_t> offsets, std::span<const int64_t> values, Cancel& cancel);

// Row r has the neighbours ids[r * width .. (r + 1) * width), nearest first; a negative id means
// none.
struct NeighboursView {
  const int32_t* ids;
  int64_t rows;
  int64_t width;
};

struct NeighbourParams {
  int64_t nearest;  // how many of its nearest neighbours follow a seed row
  int64_t drawn;    // how many of its other neighbours follow, drawn at random
  int64_t batch_size;
  int64_t random_rows;  // how many rows at the end of a batch are seed rows without neighbours
  uint64_t seed = 0;
};

struct GroupParams {
  int64_t per_group;  // rows of a chunk, which are of one group
  int64_t batch_size;
  uint64_t seed = 0;
};

// A flat plan: the first `reached` of `rows` are the batches, of which only the last may be short.
// The rows that found no place follow.
struct Order {
  std::vector<int32_t> rows;
  int64_t reached;
};

// Concatenates the clusters in the order of `sequence`, the rows of each shuffled.
void cluster_order(const ClustersView& clusters, std::span<const int32_t> sequence, uint64_t seed,
                   std::span<int32_t> order);

// The order of Sample4Geo: a random row that is not used yet, then its nearest neighbours and some
// of its others, those that are not used yet; and so on until the batch is full. A row that shares
// a key with the batch is passed over; rows that no later batch takes come last.
void neighbour_order(const NeighboursView& neighbours, const KeysView* keys,
                     const NeighbourParams& params, Cancel& cancel, std::span<int32_t> order);

// Batches of chunks of different groups. Group g is a cluster of `groups`. It gives chunks[g]
// chunks, and starts over with its rows where they run out; without `chunks`, as many as its rows
// fill.
Order group_order(const ClustersView& groups, std::span<const int64_t> chunks, const KeysView* keys,
                  const GroupParams& params, Cancel& cancel);

// Rearranges a flat plan until no two rows of a batch share a key. A row that conflicts with an
// earlier row of its batch moves to the first later batch with room, else to an earlier one. Rows
// of the last batches fill the room that is left. A row that still has no place is exchanged for
// one of a full batch. Other rows stay where they are. With one key a row, no plan reaches more
// rows.
Order separate(std::span<const int32_t> rows, const KeysView& keys, int64_t batch_size,
               Cancel& cancel);

}  // namespace ngame

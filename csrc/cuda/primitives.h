// What CUB does best, behind functions that a CPU can stand in for.
#pragma once

#include "call.h"

namespace ngame::cuda {

// Ascending, in place. Only the lowest `bits` bits are looked at.
void sort(const Call& call, uint64_t* keys, int64_t count, int bits);

// values[i] becomes the sum of those before it.
void exclusive_sum(const Call& call, int64_t* values, int64_t count);

}  // namespace ngame::cuda

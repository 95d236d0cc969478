// Functions of CUB, with a CPU version for the emulation.
#pragma once

#include "call.h"

namespace ngame::cuda {

// Sorts ascending, in place, by the lowest `bits` bits.
void sort(const Call& call, uint64_t* keys, int64_t count, int bits);

// Replaces values[i] by the sum of the values before it.
void exclusive_sum(const Call& call, int64_t* values, int64_t count);

}  // namespace ngame::cuda

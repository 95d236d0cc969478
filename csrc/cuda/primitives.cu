#include "primitives.h"

#ifdef NGAME_CUDA_EMULATE
#include <algorithm>
#include <numeric>
#else
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#endif

namespace ngame::cuda {

#ifdef NGAME_CUDA_EMULATE

void sort(const Call&, uint64_t* keys, int64_t count, int) { std::sort(keys, keys + count); }

void exclusive_sum(const Call&, int64_t* values, int64_t count) {
  std::exclusive_scan(values, values + count, values, int64_t{0});
}

#else

void sort(const Call& call, uint64_t* keys, int64_t count, int bits) {
  if (count < 2) return;
  cub::DoubleBuffer<uint64_t> buffers(keys, call.buffer<uint64_t>(count));
  size_t bytes = 0;
  check(cub::DeviceRadixSort::SortKeys(nullptr, bytes, buffers, count, 0, bits, call.stream),
        call.name);
  void* const scratch = call.allocate(bytes);
  check(cub::DeviceRadixSort::SortKeys(scratch, bytes, buffers, count, 0, bits, call.stream),
        call.name);
  if (buffers.Current() == keys) return;
  check(cudaMemcpyAsync(keys, buffers.Current(), static_cast<size_t>(count) * sizeof(uint64_t),
                        cudaMemcpyDeviceToDevice, call.stream),
        call.name);
}

void exclusive_sum(const Call& call, int64_t* values, int64_t count) {
  size_t bytes = 0;
  check(cub::DeviceScan::ExclusiveSum(nullptr, bytes, values, values, count, call.stream),
        call.name);
  void* const scratch = call.allocate(bytes);
  check(cub::DeviceScan::ExclusiveSum(scratch, bytes, values, values, count, call.stream),
        call.name);
}

#endif

}  // namespace ngame::cuda

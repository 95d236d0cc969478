// What the GPU core asks of a device, in order, without one: the compiled host code, linked with
// this in place of the CUDA runtime, which writes down every call. `counts.py` builds and reads it.
//
//     launches tree ROWS COLUMNS SCALAR SIZE    clusters of SIZE
//     launches topk QUERIES ITEMS COLUMNS K     of float32 rows
//     launches rest                             a round of refinement and metrics, of few rows
//
// A line each: "launch KERNEL BLOCKS THREADS SHARED", "product QUERIES ITEMS", "fill BYTES",
// "copy BYTES", "wait".
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../../csrc/cuda/cluster.h"
#include "../../csrc/cuda/metrics.h"
#include "../../csrc/cuda/refine.h"
#include "../../csrc/cuda/topk.h"

namespace {

std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> kernels;
  return kernels;
}

void line(const char* what, unsigned long long count) { std::printf("%s %llu\n", what, count); }

using namespace ngame::cuda;

// Rows and results are never read here: their address is all that is passed on.
template <class T>
T* somewhere() {
  return reinterpret_cast<T*>(1 << 20);
}

Matrix matrix(int64_t rows, int64_t cols, const std::string& scalar) {
  const Scalar kind = scalar == "f16" ? Scalar::f16 : scalar == "bf16" ? Scalar::bf16 : Scalar::f32;
  return {somewhere<void>(), rows, cols, cols, kind, "x"};
}

}  // namespace

// The runtime's functions that the core and its launches call.
extern "C" {
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names()[host] = name;
}
// A kernel is launched by its address alone, not by <<< >>>.
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  std::abort();
}
unsigned __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }
}

const char* cudaGetErrorName(cudaError_t) { return ""; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
cudaError_t cudaLaunchKernel(const void* kernel, dim3 blocks, dim3 threads, void**, size_t shared,
                             cudaStream_t) {
  std::printf("launch %s %u %u %zu\n", names().at(kernel).c_str(), blocks.x, threads.x, shared);
  return cudaSuccess;
}
// What is filled is read back: whether input is bad.
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  line("fill", bytes);
  std::memset(to, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  line("copy", bytes);
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  std::puts("wait");
  return cudaSuccess;
}

int main(int count, char** given) {
  const std::vector<std::string> words(given, given + count);
  const auto number = [&](size_t place) { return std::stoll(words.at(place)); };
  std::vector<std::unique_ptr<char[]>> kept;
  const Call call{"launches", nullptr, [&](size_t bytes) {
                    kept.emplace_back(new char[bytes]);  // never touched, so it takes no memory
                    return static_cast<void*>(kept.back().get());
                  }};
  if (words.at(1) == "tree") {
    const int64_t rows = number(2), size = number(5);
    std::vector<int64_t> offsets;
    for (int64_t row = 0; row < rows; row += size) offsets.push_back(row);
    offsets.push_back(rows);
    constexpr int kMaxIterations = 20;  // the default of `balanced_clusters`
    balanced_clusters(call, matrix(rows, number(3), words.at(4)), offsets, {0, kMaxIterations},
                      somewhere<float>(), somewhere<int32_t>());
  } else if (words.at(1) == "topk") {
    const int64_t queries = number(2), items = number(3), cols = number(4);
    constexpr int64_t kQueryBlock = 8192, kItemBlock = 16'384;  // of `ngame.cuda`
    const Product product{
        somewhere<BFloat>(),
        somewhere<BFloat>(),
        cols,
        somewhere<BFloat>(),
        kQueryBlock,
        kItemBlock,
        [](int64_t first_query, int64_t last_query, int64_t first_item, int64_t last_item) {
          std::printf("product %lld %lld\n", static_cast<long long>(last_query - first_query),
                      static_cast<long long>(last_item - first_item));
        }};
    topk(call, matrix(queries, cols, "f32"), matrix(items, cols, "f32"), nullptr, number(5), true,
         product, somewhere<float>(), somewhere<int32_t>());
  } else {
    constexpr int64_t kRows = 1000, kClusters = 10;
    const Clustering clustering{matrix(kRows, 64, "f32"), somewhere<float>(), somewhere<int64_t>(),
                                somewhere<int32_t>(), kClusters};
    cluster_means(call, clustering, somewhere<float>(), somewhere<float>());
    choose(call, clustering, somewhere<float>(), somewhere<float>(), somewhere<int32_t>(), kListed,
           somewhere<uint64_t>());
    match(call, kRows, somewhere<int64_t>(), kClusters, somewhere<int32_t>(), somewhere<uint64_t>(),
          call.buffer<uint64_t>(kRows), call.buffer<int32_t>(kClusters), somewhere<int32_t>());
    const Csr<int64_t> csr{somewhere<int64_t>(), somewhere<int64_t>(), kRows, kRows, kRows, "x"};
    evaluate<int64_t, float>(call, csr, somewhere<float>(), csr, nullptr, nullptr, {1, 10}, false);
  }
}

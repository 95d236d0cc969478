// The GPU core as a Python module. Its only caller, ngame/cuda.py, checks dtypes, shapes and that
// all data is on one device, and passes addresses.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <tuple>

#include "cluster.h"
#include "metrics.h"
#include "positives.h"
#include "refine.h"
#include "topk.h"

#ifdef NGAME_CUDA_EMULATE
#define NGAME_CUDA_MODULE _cuda_emulated
#else
#define NGAME_CUDA_MODULE _cuda
#endif

namespace py = pybind11;

namespace {

using namespace ngame::cuda;

using Address = uintptr_t;
// (device, stream, allocate(bytes) -> address)
using Where = std::tuple<int, Address, py::function>;
// (indptr, indices, rows, columns, stored entries, whether the ids are int64)
using CsrArrays = std::tuple<Address, Address, int64_t, int64_t, int64_t, bool>;

template <class T>
const T* in(Address address) {
  return reinterpret_cast<const T*>(address);
}
template <class T>
T* out(Address address) {
  return reinterpret_cast<T*>(address);
}
Address out(const void* pointer) { return reinterpret_cast<Address>(pointer); }

// Calls work(call) without the interpreter's lock, which only `allocate` takes.
template <class Work>
auto compute(const char* name, const Where& where, const Work& work) {
  const auto& [device, stream, allocate] = where;
#ifndef NGAME_CUDA_EMULATE
  check(cudaSetDevice(device), name);
#endif
  const Call call{name, reinterpret_cast<cudaStream_t>(stream),
                  [&allocate = allocate](size_t bytes) {
                    const py::gil_scoped_acquire lock;
                    return reinterpret_cast<void*>(py::cast<Address>(allocate(bytes)));
                  }};
  const py::gil_scoped_release release;
  return work(call);
}

// (address, rows, columns, elements from one row to the next, "f32", "f16" or "bf16")
using Dense = std::tuple<Address, int64_t, int64_t, int64_t, std::string>;

Matrix matrix_view(const Dense& matrix, const char* name) {
  const auto& [address, rows, cols, stride, scalar] = matrix;
  return {in<void>(address),
          rows,
          cols,
          stride,
          scalar == "f16"    ? Scalar::f16
          : scalar == "bf16" ? Scalar::bf16
                             : Scalar::f32,
          name};
}

template <class Index>
Csr<Index> csr_view(const CsrArrays& csr, const char* name) {
  const auto& [offsets, columns, rows, cols, nonzeros, wide] = csr;
  return {in<Index>(offsets), in<Index>(columns), rows, cols, nonzeros, name};
}

// Calls work(Index{}) for the type of the index arrays.
template <class Work>
auto with_index(const CsrArrays& csr, const Work& work) {
  return std::get<5>(csr) ? work(int64_t{}) : work(int32_t{});
}

using Columns = std::tuple<Address, Address, int64_t>;  // indptr, indices, stored entries

Columns to_tuple(const Pattern& found) {
  return {out(found.offsets), out(found.columns), found.nonzeros};
}

Columns in_batch_positives_(const Where& where, const CsrArrays& labels, Address rows,
                            int64_t row_count, Address columns, int64_t column_count) {
  return with_index(labels, [&](auto index) {
    return compute("in_batch_positives", where, [&](const Call& call) {
      return to_tuple(in_batch_positives(call, csr_view<decltype(index)>(labels, "labels"),
                                         in<int64_t>(rows), row_count, in<int64_t>(columns),
                                         column_count));
    });
  });
}

std::tuple<Address, int64_t, Columns> label_pool_(const Where& where, const CsrArrays& labels,
                                                  Address rows, int64_t row_count) {
  return with_index(labels, [&](auto index) {
    return compute("label_pool", where, [&](const Call& call) {
      const Pool pool = label_pool(call, csr_view<decltype(index)>(labels, "labels"),
                                   in<int64_t>(rows), row_count);
      return std::tuple(out(pool.labels), pool.size, to_tuple(pool.positives));
    });
  });
}

// Each family of metrics: its mean, or its value of every row, for each k.
std::map<std::string, py::array_t<double>> evaluate_(const Where& where,
                                                     const CsrArrays& predictions, Address scores,
                                                     bool scores_are_double, const CsrArrays& truth,
                                                     const std::optional<CsrArrays>& drop,
                                                     Address inverse_propensity,
                                                     const std::vector<int64_t>& ks, bool by_row) {
  return with_index(predictions, [&](auto index) {
    using Index = decltype(index);
    const auto view = csr_view<Index>(predictions, "predictions");
    const auto truth_view = csr_view<Index>(truth, "truth");
    std::optional<Csr<Index>> pairs;
    if (drop) pairs = csr_view<Index>(*drop, "drop");
    const auto with_score = [&](auto score) {
      return compute("evaluate", where, [&](const Call& call) {
        return evaluate(call, view, in<decltype(score)>(scores), truth_view,
                        pairs ? &*pairs : nullptr, in<float>(inverse_propensity), ks, by_row);
      });
    };
    const Metrics means = scores_are_double ? with_score(double{}) : with_score(float{});
    const auto array = [](const std::vector<double>& values) {
      return py::array_t<double>(static_cast<py::ssize_t>(values.size()), values.data());
    };
    return std::map<std::string, py::array_t<double>>{
        {"P", array(means.precision)}, {"N", array(means.ndcg)},
        {"R", array(means.recall)},    {"MRR", array(means.reciprocal)},
        {"MAP", array(means.average)}, {"HR", array(means.hit_rate)},
        {"PSP", array(means.psp)},     {"PSN", array(means.psn)}};
  });
}

// Addresses of the rows to multiply, their columns; address and shape of the scores; multiply(first
// query, last query, first item, last item).
using ProductArrays =
    std::tuple<Address, Address, int64_t, Address, int64_t, int64_t, py::function>;

void topk_(const Where& where, const Dense& queries, const Dense& items,
           const std::optional<CsrArrays>& drop, int64_t k, bool cosine,
           const ProductArrays& product, Address scores, Address ids) {
  const auto& [left, right, cols, products, query_block, item_block, multiply] = product;
  const Product by_library{out<BFloat>(left),
                           out<BFloat>(right),
                           cols,
                           out<BFloat>(products),
                           query_block,
                           item_block,
                           [&multiply = multiply](int64_t first_query, int64_t last_query,
                                                  int64_t first_item, int64_t last_item) {
                             const py::gil_scoped_acquire lock;
                             multiply(first_query, last_query, first_item, last_item);
                           }};
  compute("topk_arrays", where, [&](const Call& call) {
    std::optional<Csr<int64_t>> pairs;
    if (drop) pairs = csr_view<int64_t>(*drop, "drop");
    topk(call, matrix_view(queries, "queries"), matrix_view(items, "items"),
         pairs ? &*pairs : nullptr, k, cosine, by_library, out<float>(scores), out<int32_t>(ids));
  });
}

void balanced_clusters_(const Where& where, const Dense& x, const std::vector<int64_t>& offsets,
                        uint64_t seed, int max_iterations, Address inverse, Address order) {
  compute("balanced_clusters", where, [&](const Call& call) {
    balanced_clusters(call, matrix_view(x, "x"), offsets, {seed, max_iterations},
                      out<float>(inverse), out<int32_t>(order));
  });
}

// (x, inverse norms, offsets, order, clusters)
using ClusteringArrays = std::tuple<Dense, Address, Address, Address, int64_t>;

Clustering clustering_view(const ClusteringArrays& clustering) {
  const auto& [x, inverse, offsets, order, clusters] = clustering;
  return {matrix_view(x, "x"), in<float>(inverse), in<int64_t>(offsets), in<int32_t>(order),
          clusters};
}

void cluster_means_(const Where& where, const ClusteringArrays& clustering, Address means,
                    Address lengths) {
  compute("balanced_clusters", where, [&](const Call& call) {
    cluster_means(call, clustering_view(clustering), out<float>(means), out<float>(lengths));
  });
}

void choose_(const Where& where, const ClusteringArrays& clustering, Address means, Address lengths,
             Address lists, int64_t listed, Address keys) {
  compute("balanced_clusters", where, [&](const Call& call) {
    choose(call, clustering_view(clustering), in<float>(means), in<float>(lengths),
           in<int32_t>(lists), listed, out<uint64_t>(keys));
  });
}

int64_t match_(const Where& where, int64_t rows, Address offsets, int64_t clusters, Address home,
               Address keys, Address held, Address counts, Address refused) {
  return compute("balanced_clusters", where, [&](const Call& call) {
    return match(call, rows, in<int64_t>(offsets), clusters, in<int32_t>(home), in<uint64_t>(keys),
                 out<uint64_t>(held), out<int32_t>(counts), out<int32_t>(refused));
  });
}

#ifndef NGAME_CUDA_EMULATE
// Devices that the driver finds, or why it finds none.
std::tuple<int, std::string> devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return {count, ""};
  return {0, cudaGetErrorString(error)};
}
#endif

}  // namespace

PYBIND11_MODULE(NGAME_CUDA_MODULE, m) {
#ifdef NGAME_CUDA_EMULATE
  m.def("set_backward", &ngame::emulation::set_backward, py::arg("backward"));
#else
  m.attr("architectures") = NGAME_CUDA_ARCHITECTURES;
  m.def("devices", &devices);
#endif
  m.def("balanced_clusters", &balanced_clusters_, py::arg("where"), py::arg("x"),
        py::arg("offsets"), py::arg("seed"), py::arg("max_iterations"), py::arg("inverse"),
        py::arg("order"));
  m.attr("listed") = kListed;
  m.attr("asked") = kAsked;
  m.def("cluster_means", &cluster_means_, py::arg("where"), py::arg("clustering"), py::arg("means"),
        py::arg("lengths"));
  m.def("choose", &choose_, py::arg("where"), py::arg("clustering"), py::arg("means"),
        py::arg("lengths"), py::arg("lists"), py::arg("listed"), py::arg("keys"));
  m.def("match", &match_, py::arg("where"), py::arg("rows"), py::arg("offsets"),
        py::arg("clusters"), py::arg("home"), py::arg("keys"), py::arg("held"), py::arg("counts"),
        py::arg("refused"));
  m.def("evaluate", &evaluate_, py::arg("where"), py::arg("predictions"), py::arg("scores"),
        py::arg("scores_are_double"), py::arg("truth"), py::arg("drop"),
        py::arg("inverse_propensity"), py::arg("ks"), py::arg("by_row"));
  m.def("in_batch_positives", &in_batch_positives_, py::arg("where"), py::arg("labels"),
        py::arg("rows"), py::arg("row_count"), py::arg("columns"), py::arg("column_count"));
  m.def("label_pool", &label_pool_, py::arg("where"), py::arg("labels"), py::arg("rows"),
        py::arg("row_count"));
  m.def("topk", &topk_, py::arg("where"), py::arg("queries"), py::arg("items"), py::arg("drop"),
        py::arg("k"), py::arg("cosine"), py::arg("product"), py::arg("scores"), py::arg("ids"));
}

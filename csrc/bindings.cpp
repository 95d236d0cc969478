// The only file that knows Python. Each function checks dtypes and shapes, allocates the output or
// takes over the core's, and calls the core without the interpreter's lock.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

#include "adam.h"
#include "batches.h"
#include "cluster.h"
#include "kernels.h"
#include "linear.h"
#include "metrics.h"
#include "parallel.h"
#include "positives.h"
#include "refine.h"
#include "scorer.h"
#include "shortlist.h"
#include "sparse_text.h"
#include "sparse_topk.h"
#include "topk.h"

namespace py = pybind11;

namespace {

using namespace ngame;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// Whether a signal handler (Ctrl-C) has raised.
bool signal_raised() {
  const py::gil_scoped_acquire lock;
  return PyErr_CheckSignals() != 0;
}

// Runs work(cancel) without the interpreter's lock; a signal can interrupt it.
template <class Work>
auto compute(const Work& work) {
  try {
    const py::gil_scoped_release release;
    Cancel cancel(signal_raised);
    return work(cancel);
  } catch (const Cancelled&) {
    throw py::error_already_set();  // the signal handler's exception
  }
}

int thread_count(int threads) {
  if (threads < 0) {
    throw std::invalid_argument("threads is " + std::to_string(threads) +
                                ", expected 0 (all usable CPUs) or more");
  }
  return std::min(threads == 0 ? usable_cpus() : threads, kMostThreads);
}

void check_least(int64_t value, int64_t least, const char* name) {
  if (value < least) {
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(value) + ", expected " +
                                std::to_string(least) + " or more");
  }
}

// The start of an array of T. NumPy has arrays at any address; what reads one at an odd address is
// undefined, and loops that the compiler has vectorised may crash.
template <class T>
const T* aligned(const py::array& array, const char* name) {
  if (array.size() > 0 && reinterpret_cast<uintptr_t>(array.data()) % alignof(T) != 0) {
    throw std::invalid_argument(std::string(name) + " is not aligned");
  }
  return static_cast<const T*>(array.data());
}

MatrixView matrix_view(const py::array& array, const char* name) {
  const bool is_f32 = py::isinstance<py::array_t<float>>(array);
  if (!is_f32 && !(array.dtype().kind() == 'f' && array.itemsize() == 2)) {
    throw py::type_error(std::string(name) + " has dtype " +
                         py::cast<std::string>(py::str(array.dtype())) +
                         ", expected float32 or float16");
  }
  if (array.ndim() != 2) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.ndim()) +
                                " dimensions, expected 2");
  }
  const py::ssize_t bytes = array.itemsize();
  // The stride of an axis with at most one element means nothing; without rows, neither does.
  const bool rows_whole = array.shape(0) == 0 || array.shape(1) <= 1 || array.strides(1) == bytes;
  const py::ssize_t stride = array.shape(0) <= 1 ? array.shape(1) * bytes : array.strides(0);
  if (!rows_whole || stride < array.shape(1) * bytes || stride % bytes != 0) {
    throw std::invalid_argument(std::string(name) + " has rows that are not contiguous");
  }
  const void* const data = is_f32 ? static_cast<const void*>(aligned<float>(array, name))
                                  : aligned<uint16_t>(array, name);
  return {data, array.shape(0), array.shape(1), stride / bytes, is_f32 ? Scalar::f32 : Scalar::f16,
          name};
}

template <class T>
std::span<const T> span_of(const Array<T>& array) {
  return {aligned<T>(array, "an array"), static_cast<size_t>(array.size())};
}

// A CSR matrix as its arrays: (indptr, indices, number of columns).
using Csr = std::tuple<py::array, py::array, int64_t>;

template <class Index>
CsrView<Index> csr_view(const Csr& csr, const char* name) {
  const auto& [offsets, columns, cols] = csr;
  if (!py::isinstance<Array<Index>>(offsets) || !py::isinstance<Array<Index>>(columns)) {
    throw py::type_error(std::string(name) + ": indptr and indices must both be int32 or int64");
  }
  if (offsets.size() < 1) throw std::invalid_argument(std::string(name) + ": indptr is empty");
  return {aligned<Index>(offsets, name),
          aligned<Index>(columns, name),
          offsets.size() - 1,
          cols,
          columns.size(),
          name};
}

// Calls work(Index{}) for the type of the index arrays.
template <class Work>
auto with_index(const Csr& csr, const Work& work) {
  return py::isinstance<Array<int64_t>>(std::get<0>(csr)) ? work(int64_t{}) : work(int32_t{});
}

void check_values(const Csr& csr, const py::array& values, const char* name) {
  if (values.size() != std::get<1>(csr).size()) {
    throw std::invalid_argument(std::string(name) + ": data and indices differ in length");
  }
}

void check_shapes(const Csr& first, const Csr& second, const char* name) {
  if (std::get<0>(first).size() == std::get<0>(second).size() &&
      std::get<2>(first) == std::get<2>(second)) {
    return;
  }
  throw std::invalid_argument(std::string(name) + " has another shape");
}

// Calls work(Score{}) for the type of the values, of which there must be as many as columns.
template <class Work>
auto with_score(const Csr& csr, const py::array& values, const char* name, const Work& work) {
  check_values(csr, values, name);
  if (py::isinstance<Array<double>>(values)) return work(double{});
  if (py::isinstance<Array<float>>(values)) return work(float{});
  throw py::type_error(std::string(name) + " has dtype " +
                       py::cast<std::string>(py::str(values.dtype())) +
                       ", expected float32 or float64");
}

template <class T>
const T* data_of(const py::array& array) {
  return aligned<T>(array, "values");
}

// A NumPy array that takes over the memory of a vector or a buffer.
template <class Values>
py::array to_numpy(Values&& values) {
  auto owned = std::make_unique<Values>(std::move(values));
  const auto size = static_cast<py::ssize_t>(owned->size());
  const auto* const data = owned->data();
  const py::capsule owner(owned.release(), [](void* taken) { delete static_cast<Values*>(taken); });
  return py::array(py::dtype::of<std::remove_cvref_t<decltype(*data)>>(), size, data, owner);
}

template <class Score>
py::tuple to_numpy(Sparse<Score>&& matrix) {
  return py::make_tuple(to_numpy(std::move(matrix.values)), to_numpy(std::move(matrix.columns)),
                        to_numpy(std::move(matrix.offsets)));
}

py::array_t<int32_t> balanced_clusters_(const py::array& x, const Array<int64_t>& offsets,
                                        uint64_t seed, int max_iter, int refine, int threads) {
  const MatrixView view = matrix_view(x, "x");
  const ClusterParams params{seed, max_iter, refine, thread_count(threads)};
  py::array_t<int32_t> order(view.rows);
  const std::span<int32_t> out(order.mutable_data(), static_cast<size_t>(order.size()));
  compute([&](Cancel& cancel) { balanced_clusters(view, span_of(offsets), params, cancel, out); });
  return order;
}

py::array_t<int32_t> refine_clusters_(const py::array& x, const Array<int32_t>& order,
                                      const Array<int64_t>& offsets, int rounds, int threads,
                                      int64_t compared) {
  const MatrixView view = matrix_view(x, "x");
  if (order.size() != view.rows) {
    throw std::invalid_argument("order has " + std::to_string(order.size()) + " ids, expected " +
                                std::to_string(view.rows));
  }
  py::array_t<int32_t> refined(view.rows);
  const std::span<int32_t> out(refined.mutable_data(), static_cast<size_t>(refined.size()));
  compute([&](Cancel& cancel) {
    refine_clusters(view, {span_of(order), span_of(offsets)}, rounds, compared,
                    thread_count(threads), cancel, out);
  });
  return refined;
}

py::array_t<float> cluster_sums_(const py::array& x, const Array<int32_t>& order,
                                 const Array<int64_t>& offsets, int threads) {
  const MatrixView view = matrix_view(x, "x");
  const ClustersView clusters{span_of(order), span_of(offsets)};
  py::array_t<float> sums({std::max<int64_t>(clusters.count(), 0), view.cols});
  const std::span<float> out(sums.mutable_data(), static_cast<size_t>(sums.size()));
  compute(
      [&](Cancel& cancel) { cluster_sums(view, clusters, thread_count(threads), cancel, out); });
  return sums;
}

double coherence_(const py::array& x, const Array<int32_t>& order, const Array<int64_t>& offsets,
                  int threads) {
  const MatrixView view = matrix_view(x, "x");
  return compute([&](Cancel& cancel) {
    return coherence(view, {span_of(order), span_of(offsets)}, thread_count(threads), cancel);
  });
}

// The keys of rows as their arrays: (offsets, keys, number of different keys).
using KeyArrays = std::tuple<Array<int64_t>, Array<int32_t>, int64_t>;

std::optional<KeysView> keys_view(const std::optional<KeyArrays>& keys) {
  if (!keys) return std::nullopt;
  const auto& [offsets, ids, count] = *keys;
  return KeysView{span_of(offsets), span_of(ids), count};
}

py::tuple to_numpy(Order&& order) {
  return py::make_tuple(to_numpy(std::move(order.rows)), order.reached);
}

py::tuple number_keys_(const Array<int64_t>& offsets, const Array<int64_t>& values) {
  Keys keys = compute(
      [&](Cancel& cancel) { return number_keys(span_of(offsets), span_of(values), cancel); });
  return py::make_tuple(to_numpy(std::move(keys.offsets)), to_numpy(std::move(keys.keys)),
                        keys.count);
}

py::array_t<int32_t> cluster_order_(const Array<int32_t>& order, const Array<int64_t>& offsets,
                                    const Array<int32_t>& sequence, uint64_t seed) {
  py::array_t<int32_t> rows(order.size());
  const std::span<int32_t> out(rows.mutable_data(), static_cast<size_t>(rows.size()));
  compute([&](Cancel&) {
    cluster_order({span_of(order), span_of(offsets)}, span_of(sequence), seed, out);
  });
  return rows;
}

py::array_t<int32_t> neighbour_order_(const Array<int32_t>& neighbours, int64_t nearest,
                                      int64_t drawn, int64_t batch_size, int64_t random_rows,
                                      const std::optional<KeyArrays>& keys, uint64_t seed) {
  if (neighbours.ndim() != 2) {
    throw std::invalid_argument("neighbours has " + std::to_string(neighbours.ndim()) +
                                " dimensions, expected 2");
  }
  const NeighboursView view{aligned<int32_t>(neighbours, "neighbours"), neighbours.shape(0),
                            neighbours.shape(1)};
  const std::optional<KeysView> view_of_keys = keys_view(keys);
  const NeighbourParams params{nearest, drawn, batch_size, random_rows, seed};
  py::array_t<int32_t> rows(view.rows);
  const std::span<int32_t> out(rows.mutable_data(), static_cast<size_t>(rows.size()));
  compute([&](Cancel& cancel) {
    neighbour_order(view, view_of_keys ? &*view_of_keys : nullptr, params, cancel, out);
  });
  return rows;
}

py::tuple group_order_(const Array<int32_t>& order, const Array<int64_t>& offsets,
                       const std::optional<Array<int64_t>>& chunks, int64_t per_group,
                       int64_t batch_size, const std::optional<KeyArrays>& keys, uint64_t seed) {
  const std::optional<KeysView> view_of_keys = keys_view(keys);
  const std::span<const int64_t> wanted = chunks ? span_of(*chunks) : std::span<const int64_t>{};
  const GroupParams params{per_group, batch_size, seed};
  return to_numpy(compute([&](Cancel& cancel) {
    return group_order({span_of(order), span_of(offsets)}, wanted,
                       view_of_keys ? &*view_of_keys : nullptr, params, cancel);
  }));
}

py::tuple separate_(const Array<int32_t>& rows, const KeyArrays& keys, int64_t batch_size) {
  const std::optional<KeysView> view = keys_view(keys);
  return to_numpy(
      compute([&](Cancel& cancel) { return separate(span_of(rows), *view, batch_size, cancel); }));
}

// Prepared items as their arrays: (norms, longest, panels, weights, errors, lengths).
using Prepared =
    std::tuple<Array<double>, double, Array<uint32_t>, Array<float>, Array<float>, Array<float>>;

py::tuple prepare_items_(const py::array& items, bool cosine, int threads) {
  const MatrixView view = matrix_view(items, "items");
  PreparedItems prepared = compute(
      [&](Cancel& cancel) { return prepare_items(view, cosine, thread_count(threads), cancel); });
  return py::make_tuple(
      to_numpy(std::move(prepared.norms)), prepared.longest,
      to_numpy(std::move(prepared.codes.panels)), to_numpy(std::move(prepared.codes.weights)),
      to_numpy(std::move(prepared.codes.errors)), to_numpy(std::move(prepared.codes.lengths)));
}

PreparedView prepared_view(const Prepared& prepared, const MatrixView& items) {
  const auto& [norms, longest, panels, weights, errors, lengths] = prepared;
  constexpr auto kPanel = static_cast<int64_t>(kPanelItems);
  const int64_t count = divided_up(items.rows, kPanel);
  const int64_t words = Coding::in_bytes(items.cols).words;
  const char* const name = "prepared";
  PreparedView view{aligned<double>(norms, name), longest, std::nullopt};
  if (panels.size() > 0) {
    view.codes = {aligned<uint32_t>(panels, name),
                  aligned<float>(weights, name),
                  aligned<float>(errors, name),
                  aligned<float>(lengths, name),
                  0,
                  items.rows};
  }
  if (norms.size() != items.rows ||
      (view.codes && (panels.size() != count * kPanel * words || weights.size() != count * kPanel ||
                      errors.size() != count || lengths.size() != count))) {
    throw std::invalid_argument("prepared does not belong to items");
  }
  return view;
}

void check_columns(const MatrixView& queries, const MatrixView& items) {
  if (queries.cols != items.cols) {
    throw std::invalid_argument("queries and items differ in columns");
  }
}

py::tuple topk_(const py::array& queries, const py::array& items,
                const std::optional<Prepared>& prepared, int64_t k, bool cosine,
                const std::optional<Csr>& drop, int threads) {
  const MatrixView query_view = matrix_view(queries, "queries");
  const MatrixView item_view = matrix_view(items, "items");
  check_least(k, 1, "k");
  check_columns(query_view, item_view);
  const TopkParams params{k, cosine, thread_count(threads)};
  std::optional<PreparedView> kept;
  if (prepared) kept = prepared_view(*prepared, item_view);
  py::array_t<float> scores({query_view.rows, k});
  py::array_t<int32_t> ids({query_view.rows, k});
  float* const scores_out = scores.mutable_data();
  int32_t* const ids_out = ids.mutable_data();
  const auto search = [&](auto index) {
    std::optional<CsrView<decltype(index)>> pairs;
    if (drop) {
      pairs = csr_view<decltype(index)>(*drop, "drop");
      if (pairs->rows != query_view.rows || pairs->cols != item_view.rows) {
        throw std::invalid_argument("drop has another shape");
      }
    }
    compute([&](Cancel& cancel) {
      topk(query_view, item_view, kept ? &*kept : nullptr, pairs ? &*pairs : nullptr, params,
           cancel, scores_out, ids_out);
    });
  };
  drop ? with_index(*drop, search) : search(int32_t{});
  return py::make_tuple(std::move(scores), std::move(ids));
}

py::array pair_scores_(const py::array& queries, const py::array& items,
                       const std::optional<Prepared>& prepared, const Csr& pairs, bool cosine,
                       int threads) {
  const MatrixView query_view = matrix_view(queries, "queries");
  const MatrixView item_view = matrix_view(items, "items");
  check_columns(query_view, item_view);
  const double* const norms = prepared ? prepared_view(*prepared, item_view).norms : nullptr;
  return with_index(pairs, [&](auto index) {
    const auto view = csr_view<decltype(index)>(pairs, "pairs");
    if (view.rows != query_view.rows || view.cols != item_view.rows) {
      throw std::invalid_argument("pairs has another shape");
    }
    py::array_t<float> scores(view.nonzeros);
    float* const out = scores.mutable_data();
    compute([&](Cancel& cancel) {
      pair_scores(query_view, item_view, norms, view, cosine, thread_count(threads), cancel, out);
    });
    return scores;
  });
}

void adam_rows_(Array<float> weight, Array<float> mean, Array<float> square,
                const Array<int64_t>& rows, const Array<float>& gradient, float first, float second,
                float rate, float epsilon, int threads) {
  const auto shaped = [](const Array<float>& array, py::ssize_t n, py::ssize_t d) {
    return array.ndim() == 2 && array.shape(0) == n && array.shape(1) == d;
  };
  if (weight.ndim() != 2 || rows.ndim() != 1) {
    throw std::invalid_argument("weight must have two dimensions, rows one");
  }
  const py::ssize_t n = weight.shape(0), d = weight.shape(1);
  if (!shaped(mean, n, d) || !shaped(square, n, d) || !shaped(gradient, rows.size(), d)) {
    throw std::invalid_argument(
        "mean and square must have the shape of weight, gradient [rows, d]");
  }
  aligned<float>(weight, "weight");
  aligned<float>(mean, "mean");
  aligned<float>(square, "square");
  const float* const step = aligned<float>(gradient, "gradient");
  const AdamTable table{weight.mutable_data(), mean.mutable_data(), square.mutable_data(), n, d};
  compute([&](Cancel& cancel) {
    adam_rows(table, span_of(rows), step, {first, second, rate, epsilon}, thread_count(threads),
              cancel);
  });
}

py::tuple in_batch_positives_(const Csr& labels, const Array<int64_t>& rows,
                              const Array<int64_t>& columns) {
  return with_index(labels, [&](auto index) {
    const auto view = csr_view<decltype(index)>(labels, "labels");
    Pattern found =
        compute([&](Cancel&) { return in_batch_positives(view, span_of(rows), span_of(columns)); });
    return py::make_tuple(to_numpy(std::move(found.columns)), to_numpy(std::move(found.offsets)));
  });
}

py::tuple label_pool_(const Csr& labels, const Array<int64_t>& rows) {
  return with_index(labels, [&](auto index) {
    const auto view = csr_view<decltype(index)>(labels, "labels");
    std::vector<int32_t> pool;
    Pattern found = compute([&](Cancel&) { return label_pool(view, span_of(rows), pool); });
    return py::make_tuple(to_numpy(std::move(pool)), to_numpy(std::move(found.columns)),
                          to_numpy(std::move(found.offsets)));
  });
}

py::tuple cluster_shortlist_(const Csr& labels, const Array<int32_t>& order,
                             const Array<int64_t>& offsets, std::optional<int64_t> limit,
                             int threads) {
  if (limit) check_least(*limit, 0, "limit");
  return with_index(labels, [&](auto index) {
    const auto view = csr_view<decltype(index)>(labels, "labels");
    return to_numpy(compute([&](Cancel& cancel) {
      return cluster_shortlist(view, {span_of(order), span_of(offsets)}, limit,
                               thread_count(threads), cancel);
    }));
  });
}

py::tuple keep_topk_(const Csr& matrix, const py::array& values, int64_t k, int threads) {
  check_least(k, 0, "k");
  return with_index(matrix, [&](auto index) {
    return with_score(matrix, values, "matrix", [&](auto score) {
      const auto view = csr_view<decltype(index)>(matrix, "matrix");
      return to_numpy(compute([&](Cancel& cancel) {
        return keep_topk(view, data_of<decltype(score)>(values), k, thread_count(threads), cancel);
      }));
    });
  });
}

py::tuple merge_(const Csr& first, const py::array& first_values, const Csr& second,
                 const py::array& second_values, bool sum, int threads) {
  return with_index(first, [&](auto index) {
    return with_score(first, first_values, "first", [&](auto score) {
      check_shapes(first, second, "second");
      check_values(second, second_values, "second");
      if (!py::isinstance<Array<decltype(score)>>(second_values)) {
        throw py::type_error("first and second differ in dtype");
      }
      const auto one = csr_view<decltype(index)>(first, "first");
      const auto two = csr_view<decltype(index)>(second, "second");
      return to_numpy(compute([&](Cancel& cancel) {
        return merge(one, data_of<decltype(score)>(first_values), two,
                     data_of<decltype(score)>(second_values), sum ? Merge::sum : Merge::max,
                     thread_count(threads), cancel);
      }));
    });
  });
}

py::tuple drop_pairs_(const Csr& matrix, const py::array& values, const Csr& pairs, int threads) {
  return with_index(matrix, [&](auto index) {
    return with_score(matrix, values, "matrix", [&](auto score) {
      check_shapes(matrix, pairs, "pairs");
      const auto view = csr_view<decltype(index)>(matrix, "matrix");
      const auto dropped = csr_view<decltype(index)>(pairs, "pairs");
      return to_numpy(compute([&](Cancel& cancel) {
        return drop_pairs(view, data_of<decltype(score)>(values), dropped, thread_count(threads),
                          cancel);
      }));
    });
  });
}

template <class Index>
WeightedRows<Index> weighted_rows(const Csr& csr, const Array<float>& values, const char* name) {
  check_values(csr, values, name);
  return {csr_view<Index>(csr, name), aligned<float>(values, name)};
}

SparseItems prepare_sparse_items_(const Csr& items, const Array<float>& values) {
  return with_index(items, [&](auto index) {
    const auto rows = weighted_rows<decltype(index)>(items, values, "items");
    return compute([&](Cancel& cancel) { return prepare_sparse_items(rows, cancel); });
  });
}

py::tuple sparse_topk_(const Csr& queries, const Array<float>& query_values, const Csr& items,
                       const Array<float>& item_values, const SparseItems& prepared, int64_t k,
                       const std::optional<Csr>& drop, int threads) {
  check_least(k, 1, "k");
  return with_index(items, [&](auto index) {
    const auto query_rows = weighted_rows<decltype(index)>(queries, query_values, "queries");
    const auto item_rows = weighted_rows<decltype(index)>(items, item_values, "items");
    if (item_rows.pattern.rows != prepared.rows || item_rows.pattern.cols != prepared.cols) {
      throw std::invalid_argument("prepared does not belong to items");
    }
    if (query_rows.pattern.cols != prepared.cols) {
      throw std::invalid_argument("queries and items differ in columns");
    }
    std::optional<CsrView<decltype(index)>> pairs;
    if (drop) {
      pairs = csr_view<decltype(index)>(*drop, "drop");
      if (pairs->rows != query_rows.pattern.rows || pairs->cols != prepared.rows) {
        throw std::invalid_argument("drop has another shape");
      }
    }
    return to_numpy(compute([&](Cancel& cancel) {
      return sparse_topk(query_rows, item_rows, prepared, pairs ? &*pairs : nullptr, k,
                         thread_count(threads), cancel);
    }));
  });
}

py::array sparse_pair_scores_(const Csr& queries, const Array<float>& query_values,
                              const Csr& items, const Array<float>& item_values, const Csr& pairs,
                              int threads) {
  return with_index(items, [&](auto index) {
    const auto query_rows = weighted_rows<decltype(index)>(queries, query_values, "queries");
    const auto item_rows = weighted_rows<decltype(index)>(items, item_values, "items");
    const auto view = csr_view<decltype(index)>(pairs, "pairs");
    if (view.rows != query_rows.pattern.rows || view.cols != item_rows.pattern.rows) {
      throw std::invalid_argument("pairs has another shape");
    }
    py::array_t<float> scores(view.nonzeros);
    float* const out = scores.mutable_data();
    compute([&](Cancel& cancel) {
      sparse_pair_scores(query_rows, item_rows, view, thread_count(threads), cancel, out);
    });
    return scores;
  });
}

py::tuple train_linear_(const Csr& points, const Array<float>& values, const Csr& relevant,
                        const std::optional<Csr>& compared, double cost, double tolerance,
                        double least, int64_t passes, uint64_t seed, int threads) {
  return with_index(points, [&](auto index) {
    const auto rows = weighted_rows<decltype(index)>(points, values, "points");
    const auto own = csr_view<decltype(index)>(relevant, "relevant");
    if (own.cols != rows.pattern.rows) throw std::invalid_argument("relevant has another shape");
    if (compared) check_shapes(relevant, *compared, "compared");
    std::optional<CsrView<decltype(index)>> others;
    if (compared) others = csr_view<decltype(index)>(*compared, "compared");
    const LinearProblem problem{cost, tolerance, least, passes, seed};
    return to_numpy(compute([&](Cancel& cancel) {
      return train_linear(rows, own, others ? &*others : nullptr, problem, thread_count(threads),
                          cancel);
    }));
  });
}

py::dict evaluate_(const Csr& predictions, const py::array& scores, const Csr& truth,
                   const std::optional<Csr>& drop,
                   const std::optional<Array<float>>& inverse_propensity, const Array<int64_t>& ks,
                   bool by_row, int threads) {
  return with_index(predictions, [&](auto index) {
    return with_score(predictions, scores, "predictions", [&](auto score) {
      check_shapes(predictions, truth, "truth");
      if (drop) check_shapes(predictions, *drop, "drop");
      if (inverse_propensity && inverse_propensity->size() != std::get<2>(predictions)) {
        throw std::invalid_argument("inverse_propensity has another number of labels");
      }
      if (ks.size() == 0) throw std::invalid_argument("ks is empty");
      for (const int64_t k : span_of(ks)) check_least(k, 1, "ks");
      const auto view = csr_view<decltype(index)>(predictions, "predictions");
      const auto truth_view = csr_view<decltype(index)>(truth, "truth");
      std::optional<CsrView<decltype(index)>> pairs;
      if (drop) pairs = csr_view<decltype(index)>(*drop, "drop");
      const float* weights = inverse_propensity ? data_of<float>(*inverse_propensity) : nullptr;
      Metrics means = compute([&](Cancel& cancel) {
        return evaluate(view, data_of<decltype(score)>(scores), truth_view,
                        pairs ? &*pairs : nullptr, weights, span_of(ks), by_row,
                        thread_count(threads), cancel);
      });
      py::dict families;
      families["P"] = to_numpy(std::move(means.precision));
      families["N"] = to_numpy(std::move(means.ndcg));
      families["R"] = to_numpy(std::move(means.recall));
      families["MRR"] = to_numpy(std::move(means.reciprocal));
      families["MAP"] = to_numpy(std::move(means.average));
      families["HR"] = to_numpy(std::move(means.hit_rate));
      if (weights == nullptr) return families;
      families["PSP"] = to_numpy(std::move(means.psp));
      families["PSN"] = to_numpy(std::move(means.psn));
      return families;
    });
  });
}

py::tuple parse_sparse_text_(const py::bytes& text) {
  const std::string_view view(text);
  SparseRows rows = compute([&](Cancel&) { return parse_sparse_text(view); });
  return py::make_tuple(to_numpy(std::move(rows.counts)), to_numpy(std::move(rows.columns)),
                        to_numpy(std::move(rows.values)), rows.fault);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  kernels();  // a bad NGAME_SIMD fails the import, with its message
  m.attr("__version__") = NGAME_VERSION;
  m.def("simd_level", [] { return kernels().level; });
  m.def("simd_levels", [] {
    std::vector<std::string> names;
    for (const char* const* name = simd_levels(); *name != nullptr; ++name) names.push_back(*name);
    return names;
  });
  m.def("set_simd_level", &set_simd_level, py::arg("level"));
  m.def("usable_cpus", &usable_cpus);
  m.def("quota_cpus", &quota_cpus, py::arg("root"));
  m.def("balanced_clusters", &balanced_clusters_, py::arg("x"), py::arg("offsets").noconvert(),
        py::arg("seed"), py::arg("max_iter"), py::arg("refine"), py::arg("threads"));
  m.def("refine_clusters", &refine_clusters_, py::arg("x"), py::arg("order").noconvert(),
        py::arg("offsets").noconvert(), py::arg("rounds"), py::arg("threads"),
        py::arg("compared") = kMostCompared);
  m.def("cluster_sums", &cluster_sums_, py::arg("x"), py::arg("order").noconvert(),
        py::arg("offsets").noconvert(), py::arg("threads"));
  m.def("coherence", &coherence_, py::arg("x"), py::arg("order").noconvert(),
        py::arg("offsets").noconvert(), py::arg("threads"));
  m.def("number_keys", &number_keys_, py::arg("offsets").noconvert(),
        py::arg("values").noconvert());
  m.def("cluster_order", &cluster_order_, py::arg("order").noconvert(),
        py::arg("offsets").noconvert(), py::arg("sequence").noconvert(), py::arg("seed"));
  m.def("neighbour_order", &neighbour_order_, py::arg("neighbours").noconvert(), py::arg("nearest"),
        py::arg("drawn"), py::arg("batch_size"), py::arg("random_rows"),
        py::arg("keys").noconvert(), py::arg("seed"));
  m.def("group_order", &group_order_, py::arg("order").noconvert(), py::arg("offsets").noconvert(),
        py::arg("chunks").noconvert(), py::arg("per_group"), py::arg("batch_size"),
        py::arg("keys").noconvert(), py::arg("seed"));
  m.def("separate", &separate_, py::arg("rows").noconvert(), py::arg("keys").noconvert(),
        py::arg("batch_size"));
  m.def("prepare_items", &prepare_items_, py::arg("items"), py::arg("cosine"), py::arg("threads"));
  m.def("topk", &topk_, py::arg("queries"), py::arg("items"), py::arg("prepared").noconvert(),
        py::arg("k"), py::arg("cosine"), py::arg("drop"), py::arg("threads"));
  m.def("pair_scores", &pair_scores_, py::arg("queries"), py::arg("items"),
        py::arg("prepared").noconvert(), py::arg("pairs"), py::arg("cosine"), py::arg("threads"));
  m.def("adam_rows", &adam_rows_, py::arg("weight").noconvert(), py::arg("mean").noconvert(),
        py::arg("square").noconvert(), py::arg("rows").noconvert(), py::arg("gradient").noconvert(),
        py::arg("first"), py::arg("second"), py::arg("rate"), py::arg("epsilon"),
        py::arg("threads"));
  m.def("in_batch_positives", &in_batch_positives_, py::arg("labels"), py::arg("rows").noconvert(),
        py::arg("columns").noconvert());
  m.def("label_pool", &label_pool_, py::arg("labels"), py::arg("rows").noconvert());
  m.def("cluster_shortlist", &cluster_shortlist_, py::arg("labels"), py::arg("order").noconvert(),
        py::arg("offsets").noconvert(), py::arg("limit"), py::arg("threads"));
  m.def("keep_topk", &keep_topk_, py::arg("matrix"), py::arg("values"), py::arg("k"),
        py::arg("threads"));
  m.def("merge", &merge_, py::arg("first"), py::arg("first_values"), py::arg("second"),
        py::arg("second_values"), py::arg("sum"), py::arg("threads"));
  m.def("drop_pairs", &drop_pairs_, py::arg("matrix"), py::arg("values"), py::arg("pairs"),
        py::arg("threads"));
  py::class_<SparseItems>(m, "SparseItems",
                          py::metaclass(reinterpret_cast<PyObject*>(&PyType_Type)));
  m.def("prepare_sparse_items", &prepare_sparse_items_, py::arg("items"),
        py::arg("values").noconvert());
  m.def("sparse_topk", &sparse_topk_, py::arg("queries"), py::arg("query_values").noconvert(),
        py::arg("items"), py::arg("item_values").noconvert(), py::arg("prepared"), py::arg("k"),
        py::arg("drop"), py::arg("threads"));
  m.def("sparse_pair_scores", &sparse_pair_scores_, py::arg("queries"),
        py::arg("query_values").noconvert(), py::arg("items"), py::arg("item_values").noconvert(),
        py::arg("pairs"), py::arg("threads"));
  m.def("train_linear", &train_linear_, py::arg("points"), py::arg("values").noconvert(),
        py::arg("relevant"), py::arg("compared"), py::arg("cost"), py::arg("tolerance"),
        py::arg("least"), py::arg("passes"), py::arg("seed"), py::arg("threads"));
  m.def("evaluate", &evaluate_, py::arg("predictions"), py::arg("scores"), py::arg("truth"),
        py::arg("drop"), py::arg("inverse_propensity"), py::arg("ks"), py::arg("by_row"),
        py::arg("threads"));
  m.def("parse_sparse_text", &parse_sparse_text_, py::arg("text"));
}

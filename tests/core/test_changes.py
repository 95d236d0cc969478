"""Arrays that another thread changes during a call: a result or an error, and no memory touched.

A broken index seldom shows in a plain run; under the address sanitizer it always does.
"""

import contextlib
import threading
import time

import numpy as np
import pytest
import scipy.sparse as sp

import ngame
from ngame import _core, metrics
from ngame.arrays import pattern

ROWS, COLUMNS = 4000, 300
SECONDS = 0.1


def matrix(seed):
    rng = np.random.default_rng(seed)
    return sp.random(ROWS, COLUMNS, 0.03, "csr", np.float32, rng=rng)


def clusters():
    return ngame.Clusters(np.arange(ROWS), np.arange(0, ROWS + 1, 8))


BATCH = np.arange(0, ROWS, 5)
OTHER = matrix(1)
X = np.random.default_rng(2).standard_normal((ROWS, 4), dtype=np.float32)
CLUSTERS = clusters()
WEIGHTS = np.ones(COLUMNS, np.float32)


def train_linear(points, relevant, compared):
    matrices = points, relevant, compared
    index = np.result_type(*(m.indices.dtype for m in matrices))
    patterns = [pattern(m, index) for m in matrices]  # no copy of the one that changes
    return _core.train_linear(
        patterns[0], points.data, *patterns[1:], 0.5, 0.1, 0.1, passes=3, seed=0, threads=2
    )


# What is called with a matrix that changes meanwhile. The doors look at the arrays first, and the
# core must hold where they change later.
CALLS = {
    "keep_topk": lambda m: ngame.keep_topk(m, 3, threads=2),
    "sparse_topk queries": lambda m: ngame.sparse_topk(m, OTHER, 3, threads=2),
    "sparse_topk items": lambda m: ngame.sparse_topk(OTHER, m, 3, threads=2),
    "train_linear points": lambda m: train_linear(m, OTHER.T.tocsr(), OTHER.T.tocsr()),
    "train_linear relevant": lambda m: train_linear(OTHER.T.tocsr(), m, OTHER),
    "train_linear compared": lambda m: train_linear(OTHER.T.tocsr(), OTHER, m),
    "merge first": lambda m: ngame.merge([m, OTHER], "sum", threads=2),
    "merge second": lambda m: ngame.merge([OTHER, m], threads=2),
    "drop_pairs matrix": lambda m: ngame.drop_pairs(m, OTHER, threads=2),
    "drop_pairs pairs": lambda m: ngame.drop_pairs(OTHER, m, threads=2),
    "cluster_shortlist": lambda m: ngame.cluster_shortlist(m, CLUSTERS, threads=2),
    "cluster_shortlist limit": lambda m: ngame.cluster_shortlist(m, CLUSTERS, limit=9, threads=2),
    "in_batch_positives": lambda m: ngame.in_batch_positives(m, BATCH, np.arange(0, COLUMNS, 3)),
    "label_pool": lambda m: ngame.label_pool(m, BATCH),
    "evaluate predictions": lambda m: metrics.evaluate(m, OTHER, ks=[1, 999], threads=2),
    "evaluate truth": lambda m: metrics.evaluate(
        OTHER, m, inverse_propensity=WEIGHTS, drop=OTHER[:, ::-1].tocsr(), threads=2
    ),
    "keys": lambda m: _core.number_keys(m.indptr, m.indices.astype(np.int64)),
}


def changing(array, values, call):
    """Call again and again while another thread puts `values` into the array and takes them out."""
    stop = threading.Event()
    before = array.copy()
    difference = before ^ values

    def change():
        # In place and by a loop of NumPy's own, which no sanitizer watches.
        while not stop.is_set():
            np.bitwise_xor(array, difference, out=array)
            time.sleep(0)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            with contextlib.suppress(ValueError, IndexError):
                call()
    finally:
        stop.set()
        thread.join()
        array[:] = before


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("change", ["longer rows", "wild indptr", "wild columns", "shuffled"])
@pytest.mark.parametrize("call", CALLS)
def test_a_matrix_that_changes(call, change, index):
    m = matrix(0)
    indptr, indices = m.indptr.astype(index), m.indices.astype(index)
    if call == "keys":
        indptr = indptr.astype(np.int64)
    m.indptr, m.indices = indptr, indices
    m.has_sorted_indices = m.has_canonical_format = True
    rng = np.random.default_rng(2)
    if change == "longer rows":
        array, values = indptr, np.minimum(indptr + 40, m.nnz)
    elif change == "wild indptr":
        array, values = indptr, rng.integers(-(2**31), 2**31 - 1, len(indptr))
    elif change == "wild columns":
        array, values = indices, rng.integers(-(2**31), 2**31 - 1, len(indices))
    else:
        array, values = indices, np.sort(rng.integers(0, COLUMNS, len(indices)))
    changing(array, values.astype(array.dtype), lambda: CALLS[call](m))


@pytest.mark.parametrize("call", ["keep_topk", "merge first", "evaluate predictions"])
def test_scores_that_change(call):
    m = matrix(0)
    scores = m.data.view(np.int32)
    values = m.data.copy()
    values[::3] = np.nan
    values[1::3] = 2
    changing(scores, values.view(np.int32), lambda: CALLS[call](m))


@pytest.mark.parametrize("part", ["order", "offsets"])
def test_clusters_that_change(part):
    changed = clusters()
    array = getattr(changed, part)
    values = np.random.default_rng(3).integers(-(2**31), 2**31 - 1, len(array)).astype(array.dtype)
    sequence = np.arange(len(changed), dtype=np.int32)[::-1].copy()

    def call():
        with contextlib.suppress(ValueError, IndexError):
            ngame.cluster_shortlist(OTHER, changed, limit=9, threads=2)
        with contextlib.suppress(ValueError, IndexError):
            changed.coherence(X)
        with contextlib.suppress(ValueError, IndexError):
            _core.cluster_sums(X, changed.order, changed.offsets, 2)
        _core.cluster_order(changed.order, changed.offsets, sequence, 0)

    changing(array, values, call)


@pytest.mark.parametrize("which", ["rows", "columns"])
def test_ids_of_a_batch_that_change(which):
    rows, columns = BATCH.copy(), np.arange(0, COLUMNS, 3)
    array = {"rows": rows, "columns": columns}[which]
    values = np.random.default_rng(4).integers(-(2**62), 2**62, len(array))
    changing(array, values, lambda: ngame.in_batch_positives(OTHER, rows, columns))


def test_neighbours_that_change():
    near = np.random.default_rng(5).integers(0, ROWS, (ROWS, 6)).astype(np.int32)
    values = np.full_like(near, 2**31 - 1)
    changing(near, values, lambda: _core.neighbour_order(near, 3, 2, 32, 0, None, 0))

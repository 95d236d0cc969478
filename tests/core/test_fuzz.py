"""Matrices and files broken at random: the reference's answer or a clear error, no crash."""

import contextlib
import gzip
import itertools
import json
import re

import numpy as np
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

import ngame
from ngame import metrics

ROWS, COLUMNS = 4, 6
GOOD = sp.csr_matrix(np.tile(np.array([0, 1, 0, 3, 0, 2], np.float32), (ROWS, 1)))
CLUSTERS = ngame.Clusters(np.arange(ROWS), np.array([0, 2, ROWS]))
X = np.random.default_rng(0).standard_normal((COLUMNS, 3)).astype(np.float32)

# Each takes a matrix in a role that core functions give one.
CALLS = {
    "in_batch_positives": lambda m: ngame.in_batch_positives(m, [3, 0, 3], [5, 0, 5, 1]),
    "label_pool": lambda m: ngame.label_pool(m, [3, 0, 3]),
    "cluster_shortlist": lambda m: ngame.cluster_shortlist(m, CLUSTERS, limit=2),
    "keep_topk": lambda m: ngame.keep_topk(m, 2),
    "merge first": lambda m: ngame.merge([m, GOOD], "sum"),
    "merge second": lambda m: ngame.merge([GOOD, m]),
    "drop_pairs matrix": lambda m: ngame.drop_pairs(m, GOOD),
    "drop_pairs pairs": lambda m: ngame.drop_pairs(GOOD, m),
    "topk drop": lambda m: ngame.topk_arrays(X[:ROWS], X, 2, drop=m),
    "evaluate predictions": lambda m: metrics.evaluate(m, GOOD, ks=[1, 3]),
    "evaluate truth": lambda m: metrics.evaluate(GOOD, m, ks=[1, 3]),
    "evaluate drop": lambda m: metrics.evaluate(GOOD, GOOD, ks=[1, 3], drop=m),
    "inverse_propensity": metrics.inverse_propensity,
}
INTEGERS = [np.int32, np.int64]
ODD = [0, 1, -1, 2, 5, 6, 7, 100, 2**31 - 1, -(2**31)]


def fits(value, dtype):
    """Whether an array of that type can hold a value."""
    if dtype.kind not in "iu":
        return True
    limits = np.iinfo(dtype)
    return not np.isnan(value) and limits.min <= value <= limits.max


@st.composite
def broken_csr(draw):
    """A small CSR matrix with arrays exchanged behind SciPy's back, flags at random."""
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    matrix = sp.random(ROWS, COLUMNS, density=0.4, format="csr", random_state=rng)
    matrix = matrix.astype(draw(st.sampled_from([np.float32, np.float64])))
    index = draw(st.sampled_from(INTEGERS))
    arrays = {
        "indptr": matrix.indptr.astype(index),
        "indices": matrix.indices.astype(index),
        "data": matrix.data.copy(),
    }
    for name in draw(st.lists(st.sampled_from(["indptr", "indices", "data"]), max_size=3)):
        array = arrays[name]
        change = draw(st.sampled_from(["value", "shuffle", "cut", "grow", "type", "empty"]))
        if change == "value" and len(array):
            position = draw(st.integers(0, len(array) - 1))
            values = [*ODD, np.nan] if name == "data" else ODD
            # A change of type may have come before.
            array[position] = draw(st.sampled_from([v for v in values if fits(v, array.dtype)]))
        elif change == "shuffle":
            rng.shuffle(array)
        elif change == "cut":
            arrays[name] = array[:-1].copy()
        elif change == "grow":
            arrays[name] = np.append(array, array[-1:])
        elif change == "type":
            types = [np.int16, np.float64, np.bool_, ">i4", *INTEGERS]
            with np.errstate(invalid="ignore"):  # a float that an integer type cannot hold
                arrays[name] = np.nan_to_num(array).astype(draw(st.sampled_from(types)))
        elif change == "empty":
            arrays[name] = array[:0].copy()
    for name, array in arrays.items():
        setattr(matrix, name, array)
    if draw(st.booleans()):
        matrix.has_sorted_indices = True
        matrix.has_canonical_format = True
    return matrix


def is_sound(matrix):
    """Whether the arrays are a CSR matrix with ascending columns, in types that are documented."""
    indptr, indices, data = matrix.indptr, matrix.indices, matrix.data
    return (
        indptr.dtype == indices.dtype
        and indices.dtype in INTEGERS
        and data.dtype in (np.float32, np.float64)
        and len(indptr) == ROWS + 1
        and indptr[0] == 0
        and indptr[-1] == len(indices) == len(data)
        and (np.diff(indptr) >= 0).all()
        and ((indices >= 0) & (indices < COLUMNS)).all()
        and all((np.diff(indices[a:b]) > 0).all() for a, b in itertools.pairwise(indptr))
        and not np.isnan(data).any()
    )


@pytest.mark.parametrize("call", CALLS)
@settings(max_examples=150)
@given(matrix=broken_csr())
def test_broken_matrices(call, matrix):
    if is_sound(matrix):
        CALLS[call](matrix)
        return
    # Some calls never look at what is wrong; those that do say what it is.
    with contextlib.suppress(TypeError, ValueError, IndexError):
        CALLS[call](matrix)


@settings(max_examples=200)
@given(matrix=broken_csr())
def test_what_is_sound_gets_the_answer_of_the_reference(matrix):
    if not is_sound(matrix):
        return
    rows, columns = [3, 0, 3], [5, 0, 5, 1]
    found = ngame.in_batch_positives(matrix, rows, columns).toarray()
    assert (found == reference.in_batch_positives(matrix, rows, columns)).all()
    pool, positives = ngame.label_pool(matrix, rows)
    expected_pool, expected = reference.label_pool(matrix, rows)
    assert pool.tolist() == expected_pool.tolist()
    assert (positives.toarray() == expected).all()
    shortlist = reference.entries(ngame.cluster_shortlist(matrix, CLUSTERS, limit=2))
    assert shortlist == reference.cluster_shortlist(matrix, CLUSTERS, 2)
    assert reference.entries(ngame.keep_topk(matrix, 2)) == reference.keep_topk(matrix, 2)
    assert metrics.evaluate(matrix, GOOD, ks=[1, 3]) == pytest.approx(
        reference.evaluate(matrix, GOOD, [1, 3])
    )


POINTS = [
    {"title": f"point {row}", "content": "text é", "target_ind": [row % 3, 3]} for row in range(4)
]
LABELS = [{"title": f"label {label}"} for label in range(4)]
TAGGED = [{"text": f"text {row}", "labels": ["b", "a"][: 1 + row % 2]} for row in range(30)]
SPARSE = "4 4\n0:1 3:1\n1:0.5 3:1\n2:1 3:2\n0:1 3:1\n"
PAIRS = "0 0\n3 3\n2 1\n"


def lines(objects):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in objects).encode()


FILES = {
    "trn.json": lines(POINTS),
    "lbl.json": lines(LABELS),
    "tst.json.gz": gzip.compress(lines(POINTS), mtime=0),
    "trn_X_Y.txt": SPARSE.encode(),
    "filter_labels_train.txt": PAIRS.encode(),
    "tagged.jsonl": lines(TAGGED),
}


TROUBLE = [b"\x00", b"\xff", b"\n", b" ", b"-1", b"9" * 25, b'"', b"{", b"]", b":", b"nan"]
TROUBLE += [b"\xed\xa0\x80", b"\\ud800", b"1e400", b"null"]


@st.composite
def mutated(draw, content):
    """Bytes replaced, put in, taken out, repeated, or the end cut off."""
    content = bytearray(content)
    interesting = st.sampled_from(TROUBLE)
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, len(content)))
        last = min(len(content), first + draw(st.integers(0, 8)))
        kind = draw(st.sampled_from(["replace", "double", "cut", "random"]))
        if kind == "replace":
            content[first:last] = draw(interesting)
        elif kind == "random":
            content[first:last] = draw(st.binary(max_size=8))
        elif kind == "double":
            content[first:last] = 2 * content[first:last]
        elif draw(st.booleans()):
            del content[first:]
    return bytes(content)


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=120)
@given(data=st.data())
def test_mutated_files(name, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data", numbered=True)
    for file, content in FILES.items():
        if file != "tagged.jsonl":
            (folder / file).write_bytes(content)
    path = folder / name
    path.write_bytes(data.draw(mutated(FILES[name])))
    source = path if name == "tagged.jsonl" else folder
    message, dataset = None, None
    try:
        dataset = ngame.load_dataset(source)
    except ValueError as error:
        message = str(error)
    if message is not None:
        assert re.match(
            rf"{re.escape(str(folder))}/[\w.]+:(\d+: |.* (label|split rule)\b)", message
        ), message
    else:
        assert dataset.train_labels.shape == (len(dataset.train_texts), len(dataset.label_texts))
        assert dataset.train_labels.has_canonical_format

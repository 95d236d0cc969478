"""Exact search: `topk`, `topk_arrays`, `ExactIndex` and `pair_scores`."""

import functools
import importlib
import json
import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import ngame
from ngame import _core
from ngame.topk import pair_scores

# What a filter of 8-bit codes finds easy or hard: name -> items [3000, 24] by a generator.
ITEMS = {
    "spread": lambda rng: rng.standard_normal((3000, 24)),
    # Closer together than the codes can tell, nearly all of them candidates.
    "near duplicates": lambda rng: 1 + 1e-3 * rng.standard_normal((3000, 24)),
    "exact duplicates": lambda rng: rng.standard_normal((40, 24))[rng.integers(40, size=3000)],
    # One column leaves few codes to the others.
    "one large column": lambda rng: rng.standard_normal((3000, 24)) * ([30] + 23 * [1]),
    "lengths far apart": lambda rng: (
        rng.standard_normal((3000, 24)) * 10.0 ** rng.uniform(-30, 15, (3000, 1))
    ),
    "beyond what float can scale": lambda rng: (
        rng.standard_normal((3000, 24)) * 10.0 ** rng.choice([-38, -35, 0], (3000, 1))
    ),
    "zero rows": lambda rng: rng.standard_normal((3000, 24)) * (rng.random((3000, 1)) < 0.01),
    # The best come last: whatever was found before falls out.
    "ascending": lambda rng: np.linspace(-1, 1, 3000)[:, None] + 0 * rng.random((3000, 24)),
}


@functools.cache
def filtered_case(kind, metric, dropping):
    """Queries, items, pairs to drop and what the reference finds, for every SIMD level."""
    rng = np.random.default_rng(5)
    x = ITEMS[kind](rng).astype(np.float32)
    q = np.concatenate([rng.standard_normal((12, 24)), np.zeros((1, 24)), np.ones((1, 24))])
    q[:4] *= 10.0 ** np.array([[-36], [-33], [-8], [8]])
    q = q.astype(np.float32)
    drop = rng.random((len(q), len(x))) < 0.05
    drop[5] = True
    return q, x, drop, *reference.topk(q, x, 11, metric, drop if dropping else None)


def rows_of_any_scale(rng, count, dim):
    """Rows whose norms lie as far apart as float32 allows, or all at one end of it."""
    x = rng.standard_normal((count, dim))
    if rng.random() < 0.5:
        x = rng.integers(-2, 3, (count, dim)).astype(np.float64)
    scale = (
        lambda: 10.0 ** rng.uniform(-44, 19, (count, 1)),
        lambda: 10.0 ** rng.choice([-44, -38, -30, -22, -12, 0, 19], (count, 1)),
        lambda: 10.0 ** rng.uniform(-44, 19),
        lambda: 10.0 ** rng.uniform(-24, -20),  # products of two such rows are subnormal
        lambda: 10.0 ** rng.uniform(-44, 18, (count, dim)),
    )[rng.integers(5)]()
    x = x * scale
    if rng.random() < 0.2:
        return np.clip(x, -6e4, 6e4).astype(np.float16)
    return x.astype(np.float32)


@functools.cache
def extreme_cases():
    """Searches and what the reference finds. Sums of two products do not depend on the order."""
    rng = np.random.default_rng(11)
    cases = []
    while len(cases) < 1000:
        items = int(rng.choice([3, 40, 130, 700], p=[0.3, 0.4, 0.25, 0.05]))
        dim = int(rng.integers(1, 3))
        q, x = rows_of_any_scale(rng, 2, dim), rows_of_any_scale(rng, items, dim)
        if rng.random() < 0.3:
            x = x[rng.integers(items, size=items)]
        k = min(items, int(rng.choice([1, 2, 5, 60])))
        metric = "cosine" if rng.random() < 0.3 else "dot"
        norms = [np.linalg.norm(rows.astype(np.float64), axis=1).max() for rows in (q, x)]
        if metric == "cosine" or norms[0] * norms[1] < 3e38:
            cases.append((q, x, k, metric, *reference.topk(q, x, k, metric)))
    return cases


SHAPES = [(1, 1, 1, 1), (3, 40, 5, 40), (17, 33, 8, 3), (100, 31, 64, 7), (29, 300, 65, 1)]


class TestTopk:
    @pytest.mark.parametrize(("queries", "items", "dim", "k"), SHAPES)
    @pytest.mark.parametrize("metric", ["cosine", "dot"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_matches_reference(self, rng, simd, queries, items, dim, k, metric, dtype):
        q = rng.standard_normal((queries, dim)).astype(dtype)
        x = rng.standard_normal((items, dim)).astype(dtype)
        scores, ids = ngame.topk_arrays(q, x, k, metric=metric)
        expected, expected_ids = reference.topk(q, x, k, metric)
        assert scores.dtype == np.float32
        assert ids.dtype == np.int32
        assert (scores == expected).all()
        assert (ids == expected_ids).all()

    @pytest.mark.parametrize("kind", ITEMS)
    @pytest.mark.parametrize("metric", ["cosine", "dot"])
    @pytest.mark.parametrize("dropping", [False, True])
    def test_filters_lose_nothing(self, simd, kind, metric, dropping):
        q, x, drop, expected, expected_ids = filtered_case(kind, metric, dropping)
        pairs = sp.csr_matrix(drop) if dropping else None
        scores, ids = ngame.topk_arrays(q, x, 11, metric=metric, drop=pairs)
        assert (scores == expected).all()
        assert (ids == expected_ids).all()

    def test_more_candidates_than_are_gathered(self, rng, simd):
        q = rng.standard_normal((3, 8), dtype=np.float32)
        x = rng.standard_normal((20_000, 8), dtype=np.float32)
        scores, ids = ngame.topk_arrays(q, x, 1200)
        expected, expected_ids = reference.topk(q, x, 1200)
        assert (scores == expected).all()
        assert (ids == expected_ids).all()

    @pytest.mark.parametrize("dim", [131_072, 131_073])
    def test_many_columns(self, simd, dim):
        # The sums of 8-bit codes come near to 2**31, and one column later would be left to float.
        x = np.ones((40, dim), np.float32)
        x[:20] = -1
        x[30, 0] = 2
        scores, ids = ngame.topk_arrays(x[-1:], x, 2, metric="dot")
        assert scores.tolist() == [[dim + 1, dim]]
        assert ids.tolist() == [[30, 20]]

    @given(seed=st.integers(0, 2**32), data=st.data())
    def test_ties_and_dropped_pairs(self, seed, data):
        # Small integers: products are exact, so ties are ties, and many.
        rng = np.random.default_rng(seed)
        n, m, d = (data.draw(st.integers(1, limit)) for limit in (20, 90, 4))
        k = data.draw(st.integers(1, m))
        q = rng.integers(-2, 3, (n, d)).astype(np.float32)
        x = rng.integers(-2, 3, (m, d)).astype(np.float32)
        drop = rng.random((n, m)) < data.draw(st.sampled_from([0, 0.2, 0.9, 1]))
        expected, expected_ids = reference.topk(q, x, k, "dot", drop)
        for pairs in (sp.csr_matrix(drop), np.argwhere(drop)):
            scores, ids = ngame.topk_arrays(q, x, k, metric="dot", drop=pairs)
            assert (scores == expected).all()
            assert (ids == expected_ids).all()

    def test_many_items_and_equal_scores(self):
        # More items than one stretch holds, all equal: the lowest ids are the answer.
        x = np.ones((70_000, 32), np.float32)
        scores, ids = ngame.topk_arrays(x[:3], x, 500)
        assert (ids == np.arange(500)).all()
        assert np.allclose(scores, 1)

    def test_best_come_late(self):
        x = np.linspace(-1, 1, 70_000, dtype=np.float32)[:, None] * np.ones(32, np.float32)
        ids = ngame.topk_arrays(np.ones((2, 32), np.float32), x, 40, metric="dot")[1]
        assert (ids == np.arange(69_999, 69_959, -1)).all()

    def test_scores_do_not_depend_on_the_company(self, rng, simd):
        q = rng.standard_normal((61, 37), dtype=np.float32)
        x = rng.standard_normal((203, 37), dtype=np.float32)
        scores, ids = ngame.topk_arrays(q, x, 203)
        for start, stop in ((0, 1), (5, 20), (60, 61)):
            part, part_ids = ngame.topk_arrays(q[start:stop], x, 203)
            assert (part == scores[start:stop]).all()
            assert (part_ids == ids[start:stop]).all()
        some, some_ids = ngame.topk_arrays(q, x[50:], 153)
        keep = ids >= 50
        assert (some.ravel() == scores[keep]).all()
        assert (some_ids.ravel() == ids[keep] - 50).all()

    def test_zero_rows_score_zero(self):
        q = np.array([[0, 0], [1, 0]], np.float32)
        scores, ids = ngame.topk_arrays(q, np.array([[-1, 0], [0, 0]], np.float32), 2)
        assert scores.tolist() == [[0, 0], [0, -1]]
        assert ids.tolist() == [[0, 1], [1, 0]]

    def test_no_queries_and_no_columns(self):
        x = np.ones((4, 3), np.float32)
        scores, ids = ngame.topk_arrays(x[:0], x, 2)
        assert scores.shape == ids.shape == (0, 2)
        no_strides = np.zeros((0, 3), np.float16).astype(np.float32)
        assert ngame.topk_arrays(no_strides, x, 2)[1].shape == (0, 2)
        scores, ids = ngame.topk_arrays(x[:, :0], x[:, :0], 2)
        assert scores.tolist() == [[0, 0]] * 4
        assert ids.tolist() == [[0, 1]] * 4
        reference.check_csr(ngame.topk(x[:0], x, 2), np.float32, (0, 4))

    def test_sparse_result(self, rng):
        q = rng.standard_normal((12, 6), dtype=np.float32)
        x = rng.standard_normal((30, 6), dtype=np.float32)
        x[3] = 0
        drop = np.zeros((12, 30), bool)
        drop[0, 4:] = True
        drop[1, :] = True
        found = ngame.topk(q, x, 8, drop=sp.csr_matrix(drop))
        reference.check_csr(found, np.float32, (12, 30))
        scores, ids = ngame.topk_arrays(q, x, 8, drop=sp.csr_matrix(drop))
        assert [set(row) for row in reference.entries(found)] == [set(row) - {-1} for row in ids]
        assert np.diff(found.indptr).tolist() == [4, 0] + [8] * 10
        for row, column, score in zip(*np.indices(ids.shape)[:1], ids, scores, strict=True):
            kept = column >= 0
            assert (found.toarray()[row[kept], column[kept]] == score[kept]).all()

    @pytest.mark.filterwarnings("ignore:.*encountered in cast:RuntimeWarning")
    def test_extreme_scales(self, simd):
        for q, x, k, metric, expected, expected_ids in extreme_cases():
            scores, ids = ngame.topk_arrays(q, x, k, metric=metric, threads=1)
            assert (scores == expected).all()
            assert (ids == expected_ids).all()

    def test_norms_far_apart(self, simd):
        q = np.array([[1, 0]], np.float32)
        x = np.array([[-1e20, 0], [-1e-12, 2e-10], [-1e-15, 0]], np.float32)
        assert ngame.topk_arrays(q, x, 1, metric="dot")[1].tolist() == [[2]]

    def test_subnormal_scores_tie(self, rng, simd):
        q = (1e-22 * rng.standard_normal((5, 16))).astype(np.float32)
        x = (1e-22 * rng.standard_normal((2000, 16))).astype(np.float32)
        scores, ids = ngame.topk_arrays(q, x, 20, metric="dot")
        expected, expected_ids = reference.topk(q, x, 20, "dot")
        assert (np.diff(scores, axis=1) == 0).any()
        assert (scores == expected).all()
        assert (ids == expected_ids).all()

    @pytest.mark.parametrize("seed", range(40))
    def test_codes_are_as_near_as_they_claim(self, simd, seed):
        rng = np.random.default_rng(seed)
        x = rows_of_any_scale(rng, 70, int(rng.integers(1, 40))).astype(np.float32)
        for metric in ("dot", "cosine"):
            prepared = _core.prepare_items(x, metric == "cosine", 1)
            norms, longest, panels, weights, errors, lengths = prepared
            exact = x.astype(np.float64)
            assert np.allclose(norms, np.linalg.norm(exact, axis=1), rtol=1e-12, atol=0)
            unit = norms[:, None] if metric == "cosine" else longest
            exact = np.divide(exact, unit, out=np.zeros_like(exact), where=exact != 0)
            # [panel, word, item, byte] -> [item, column]
            codes = panels.view(np.uint8).reshape(len(errors), -1, 32, 4).transpose(0, 2, 1, 3)
            codes = codes.reshape(len(weights), -1)[:, : x.shape[1]] - 128.0
            far = np.linalg.norm(exact - (weights[:, None] * codes)[:70], axis=1)
            panel = np.arange(70) // 32
            assert (far <= errors[panel] * (1 - 2.0**-20)).all()
            assert (np.linalg.norm(exact, axis=1) <= lengths[panel] * (1 + 2.0**-20)).all()
            assert np.isnan(weights[70:]).all()

    @pytest.mark.parametrize("kind", ["spread", "near duplicates", "ties"])
    def test_few_queries_share_out_the_items(self, rng, kind):
        x = rng.standard_normal((40_000, 128), dtype=np.float32)
        if kind == "near duplicates":
            x = 1 + np.float32(1e-3) * x
        if kind == "ties":
            x = x[rng.integers(100, size=len(x))]
        q = rng.standard_normal((3, 128), dtype=np.float32)
        q[2] = 0
        drop = [[0, 5], [2, 0], [2, 2]]
        expected = ngame.topk_arrays(q, x, 9, drop=drop, threads=1)
        assert expected[1][2].tolist() == [1, 3, 4, 5, 6, 7, 8, 9, 10]
        index = ngame.ExactIndex(x)
        for threads in (2, 3, 16):
            for found in (
                ngame.topk_arrays(q, x, 9, drop=drop, threads=threads),
                index.search(q, 9, drop=drop, threads=threads),
            ):
                assert (found[0] == expected[0]).all()
                assert (found[1] == expected[1]).all()

    def test_rejects_bad_input(self, rng):
        q = rng.standard_normal((4, 3), dtype=np.float32)
        x = rng.standard_normal((5, 3), dtype=np.float32)
        bad = x.copy()
        bad[2:, 1] = np.nan
        with pytest.raises(ValueError, match=r"items has NaN or infinity in row 2$"):
            ngame.topk(q, bad, 1)
        with pytest.raises(ValueError, match=r"queries has NaN or infinity in row 2$"):
            ngame.topk(bad, x, 1, metric="dot")
        with pytest.raises(ValueError, match="may overflow float32"):
            ngame.topk(np.float32(1e30) * q, np.float32(1e30) * x, 1, metric="dot")
        assert np.isfinite(ngame.topk(np.float32(1e30) * q, np.float32(1e30) * x, 1).data).all()
        with pytest.raises(ValueError, match="k is 6, items has only 5 rows"):
            ngame.topk(q, x, 6)
        with pytest.raises(ValueError, match="k is 0, expected 1 or more"):
            ngame.topk(q, x, 0)
        with pytest.raises(ValueError, match="queries has 2 columns, items has 3"):
            ngame.topk(q[:, :2], x, 1)
        with pytest.raises(ValueError, match="metric is 'l2'"):
            ngame.topk(q, x, 1, metric="l2")
        with pytest.raises(TypeError, match="items has dtype float64"):
            ngame.topk(q, x.astype(np.float64), 1)
        with pytest.raises(ValueError, match=r"drop has shape \(4, 4\), expected \(4, 5\)"):
            ngame.topk(q, x, 1, drop=sp.csr_matrix((4, 4)))
        with pytest.raises(IndexError, match=r"drop\[1\] has column 5, out of range for 5"):
            ngame.topk(q, x, 1, drop=[[0, 0], [1, 5]])
        for lists in ([[0], [1], [2], [3]], [[0, 1], [1], [2], [3]], np.zeros((4, 3), int)):
            with pytest.raises(ValueError, match="drop is a list with an entry for each row, expe"):
                ngame.topk(q, x, 1, drop=lists)
        with pytest.raises(ValueError, match=r"drop has shape \(3, 1\), expected \[n, 2\]"):
            ngame.topk(q, x, 1, drop=[[0], [1], [2]])
        with pytest.raises(ValueError, match="drop is a ragged list"):
            ngame.topk(q, x, 1, drop=[[0, 1], [1], [2]])


class TestExactIndex:
    @pytest.mark.parametrize("metric", ["cosine", "dot"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    @pytest.mark.parametrize("shape", [(1, 1), (40, 5), (1000, 33), (3000, 64), (5, 0)])
    def test_same_bits_as_a_search_without_it(self, rng, simd, tmp_path, metric, dtype, shape):
        x = rng.standard_normal(shape).astype(dtype)
        q = rng.standard_normal((20, shape[1])).astype(np.float32)
        k = min(7, len(x))
        drop = sp.csr_matrix(rng.random((20, len(x))) < 0.1)
        made = ngame.ExactIndex(x, metric)
        made.save(tmp_path / "index")
        assert np.shares_memory(made.items, x) or x.size == 0
        for index in (made, ngame.ExactIndex.load(tmp_path / "index")):
            assert (len(index), index.dim, index.metric) == (*shape, metric)
            assert (index.items == x).all()
            for part in (q, q[:1], q[:0]):
                scores, ids = index.search(part, k, drop=drop[: len(part)])
                expected = ngame.topk_arrays(part, x, k, metric=metric, drop=drop[: len(part)])
                assert (scores == expected[0]).all()
                assert (ids == expected[1]).all()

    def test_a_file_serves_every_level(self, rng, tmp_path):
        x, q = rng.standard_normal((2, 500, 24), dtype=np.float32)
        before = _core.simd_level()
        for writer in _core.simd_levels():
            _core.set_simd_level(writer)
            ngame.ExactIndex(x, "dot").save(tmp_path / writer)
        for reader in _core.simd_levels():
            _core.set_simd_level(reader)
            expected = ngame.topk_arrays(q, x, 3, metric="dot")
            for writer in _core.simd_levels():
                found = ngame.ExactIndex.load(tmp_path / writer).search(q, 3)
                assert (found[0] == expected[0]).all()
                assert (found[1] == expected[1]).all()
        _core.set_simd_level(before)

    def test_rows_apart_and_more_columns_than_codes_hold(self, rng, tmp_path):
        wide = rng.standard_normal((30, 131_080), dtype=np.float32)
        for x in (wide[:, :131_073], wide[::3, 2:9]):
            index = ngame.ExactIndex(x)
            assert np.shares_memory(index.items, x)
            index.save(tmp_path / "index")
            found = ngame.ExactIndex.load(tmp_path / "index").search(x, 3)
            expected = ngame.topk_arrays(x, x, 3)
            assert (found[0] == expected[0]).all()
            assert (found[1] == expected[1]).all()

    @pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
    def test_many_threads_and_forked_processes_search_it(self, rng):
        x = rng.standard_normal((5000, 32), dtype=np.float32)
        index = ngame.ExactIndex(x)
        expected = index.search(x[:50], 5)[1]
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: index.search(x[:50], 5, threads=2), range(20)):
                assert (found[1] == expected).all()
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=lambda: sender.send(index.search(x[:50], 5, threads=2)[1]))
        process.start()
        assert receiver.poll(30)
        assert (receiver.recv() == expected).all()
        process.join(30)
        assert process.exitcode == 0

    def test_no_items(self, tmp_path):
        index = ngame.ExactIndex(np.zeros((0, 3), np.float32))
        index.save(tmp_path / "index")
        assert len(ngame.ExactIndex.load(tmp_path / "index")) == 0
        with pytest.raises(ValueError, match="k is 1, items has only 0 rows"):
            index.search(np.zeros((1, 3), np.float32), 1)

    def test_rejects_bad_input(self):
        x = np.ones((4, 3), np.float32)
        with pytest.raises(ValueError, match="items has NaN or infinity in row 2"):
            ngame.ExactIndex(np.where(np.arange(4)[:, None] == 2, np.inf, x).astype(np.float32))
        with pytest.raises(ValueError, match="metric is 'l2'"):
            ngame.ExactIndex(x, "l2")
        with pytest.raises(TypeError, match="items has dtype float64"):
            ngame.ExactIndex(x.astype(np.float64))
        index = ngame.ExactIndex(x * np.float32(1e20), "dot")
        with pytest.raises(ValueError, match="queries has 2 columns, items has 3"):
            index.search(x[:, :2], 1)
        with pytest.raises(ValueError, match="k is 5, items has only 4 rows"):
            index.search(x, 5)
        with pytest.raises(ValueError, match="may overflow float32"):
            index.search(x * np.float32(1e20), 1)
        with pytest.raises(ValueError, match="queries has NaN or infinity in row 0"):
            index.search(x * np.float32(np.nan), 1)
        on_gpu = type("Tensor", (), {"__cuda_array_interface__": {}})()
        with pytest.raises(TypeError, match="items is on a CUDA device"):
            ngame.ExactIndex(on_gpu)
        with pytest.raises(TypeError, match="queries is on a CUDA device"):
            index.search(on_gpu, 1)

    def test_load_rejects_other_and_damaged_files(self, rng, tmp_path):
        path = tmp_path / "index"
        ngame.ExactIndex(rng.standard_normal((70, 5), dtype=np.float32)).save(path)
        whole = path.read_bytes()
        header_end = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:header_end])

        def rejected(content, message):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=message) as raised:
                ngame.ExactIndex.load(path)
            assert str(path) in str(raised.value)

        def changed(change):
            other = json.loads(json.dumps(header))
            change(other)
            text = json.dumps(other).encode()
            return len(text).to_bytes(8, "little") + text + whole[header_end:]

        for length in (0, 7, 8, header_end - 3, header_end, len(whole) - 1):
            rejected(whole[:length], "not a whole file")
        rejected(whole + b"x", "there is more behind its arrays")
        rejected(b"PK\x03\x04" + bytes(500), "not a whole file")
        rejected(changed(lambda h: h["items"].update(dtype="BF16")), "not a whole file")
        rejected(changed(lambda h: h["items"].update(shape=[70, 6])), "not a whole file")
        rejected(changed(lambda h: h["items"].update(shape=[35, 10])), "damaged")
        rejected(changed(lambda h: h["items"].update(shape=[350])), "damaged")
        rejected(changed(lambda h: h["panels"].update(data_offsets=[-64, 0])), "not a whole file")
        rejected(changed(lambda h: h.pop("norms")), "damaged")
        rejected(changed(lambda h: h["__metadata__"].update(format="x")), "does not hold")
        rejected(changed(lambda h: h["__metadata__"].update(metric="l2")), "does not hold")
        rejected(changed(lambda h: h.pop("__metadata__")), "does not hold")
        for name in ("norms", "items", "panels"):
            first, last = (header_end + end for end in header[name]["data_offsets"])
            for place in (first, (first + last) // 2, last - 1):
                other = bytes([whole[place] ^ 1])
                content = whole[:place] + other + whole[place + 1 :]
                rejected(content, "damaged: its checksum does not fit")
        with pytest.raises(FileNotFoundError):
            ngame.ExactIndex.load(tmp_path / "absent")

    def test_a_large_file_is_checked_in_blocks(self, rng, tmp_path, monkeypatch):
        module = importlib.import_module("ngame.topk")
        monkeypatch.setattr(module, "_WHOLE_BYTES", 1 << 14)
        monkeypatch.setattr(module, "_BLOCKS", 4)
        monkeypatch.setattr(module, "_BLOCK_BYTES", 1 << 9)
        wide = rng.standard_normal((3000, 16), dtype=np.float32)
        for items in (wide, wide[:, :7], wide[::2]):
            ngame.ExactIndex(items).save(tmp_path / "index")
            assert (ngame.ExactIndex.load(tmp_path / "index").items == items).all()
        # A part that was never written, as in a cut copy that was padded.
        content = (tmp_path / "index").read_bytes()
        for hole in (slice(-5000, None), slice(-60_000, -30_000)):
            holed = bytearray(content)
            holed[hole] = bytes(len(content[hole]))
            (tmp_path / "index").write_bytes(holed)
            with pytest.raises(ValueError, match=r"index is damaged: its checksum does not fit"):
                ngame.ExactIndex.load(tmp_path / "index")


class TestPairScores:
    @pytest.mark.parametrize("metric", ["cosine", "dot"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_every_pair_scores_as_in_the_search(self, rng, simd, metric, dtype):
        q = rng.standard_normal((70, 37)).astype(dtype)
        x = rng.standard_normal((91, 37)).astype(dtype)
        q[3] = x[8] = 0
        scores, ids = ngame.topk_arrays(q, x, 91, metric=metric)
        searched = np.empty_like(scores)
        np.put_along_axis(searched, ids.astype(np.int64), scores, 1)
        asked = rng.random(searched.shape) < 0.3
        asked[5:9] = False
        index = ngame.ExactIndex(x, metric)
        for threads in (1, 7):
            found = pair_scores(q, x, sp.csr_matrix(asked), metric=metric, threads=threads)
            assert found.dtype == np.float32
            assert (found == searched[asked]).all()
            kept = index.pair_scores(q, sp.csr_array(asked), threads=threads)
            assert (kept == found).all()

    def test_no_pairs(self):
        x = np.ones((4, 3), np.float32)
        assert pair_scores(x, x, sp.csr_matrix((4, 4))).shape == (0,)
        assert pair_scores(x, x[:0], sp.csr_matrix((4, 0))).shape == (0,)

    def test_rejects_bad_input(self):
        x = np.ones((4, 3), np.float32)
        pairs = sp.identity(4, format="csr")
        with pytest.raises(ValueError, match="queries has 3 columns, items has 2"):
            pair_scores(x, x[:, :2], pairs)
        with pytest.raises(ValueError, match=r"pairs has shape \(4, 4\), expected \(4, 3\)"):
            pair_scores(x, x[:3], pairs)
        with pytest.raises(ValueError, match="metric is 'l2'"):
            pair_scores(x, x, pairs, metric="l2")
        with pytest.raises(ValueError, match="items has NaN or infinity in row 2"):
            pair_scores(x, np.where(np.arange(4)[:, None] == 2, np.nan, x), pairs)
        with pytest.raises(ValueError, match="may overflow float32"):
            pair_scores(x * 1e20, x * 1e20, pairs, metric="dot")
        index = ngame.ExactIndex(x * 1e20, "dot")
        with pytest.raises(ValueError, match="may overflow float32"):
            index.pair_scores(x * 1e20, pairs)
        with pytest.raises(TypeError, match="pairs is a list, expected a CSR matrix"):
            index.pair_scores(x, [(1, 1), (0, 0)])
        with pytest.raises(ValueError, match="queries has NaN or infinity in row 0"):
            index.pair_scores(x * np.nan, pairs)


def test_sparse_rows_are_for_another_function():
    x = sp.csr_matrix(np.eye(3, dtype=np.float32))
    with pytest.raises(TypeError, match=r"items is a sparse matrix.*sparse_topk"):
        ngame.topk(x, x, 1)

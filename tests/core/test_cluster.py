import errno
import importlib
import mmap
import os
import sys
import tempfile
import threading
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import ngame
from ngame import _core

MADV_PAGEOUT = 21  # of Linux: takes pages away at once; no name in the standard library


def is_division(clusters, sizes):
    assert np.diff(clusters.offsets).tolist() == list(sizes)
    assert np.sort(clusters.order).tolist() == list(range(sum(sizes)))
    assert all((np.diff(clusters[i]) > 0).all() for i in range(len(clusters)))


@given(
    rows=st.integers(1, 150),
    dim=st.integers(1, 20),
    seed=st.integers(-(2**63), 2**63 - 1),
    data=st.data(),
)
def test_sizes_are_exact(rows, dim, seed, data):
    x = np.random.default_rng(abs(seed)).standard_normal((rows, dim), dtype=np.float32)
    size = data.draw(st.integers(1, rows))
    whole, rest = divmod(rows, size)
    is_division(
        ngame.balanced_clusters(x, size=size, seed=seed), [size] * whole + [rest] * (rest > 0)
    )
    count = data.draw(st.integers(1, rows))
    found = ngame.balanced_clusters(x, n_clusters=count, seed=seed)
    sizes = np.diff(found.offsets)
    assert len(found) == count
    assert sizes.max() - sizes.min() <= 1
    is_division(found, sizes)


@pytest.mark.parametrize(("rows", "size"), [(40_000, 7000), (40_000, 39_999), (70_000, 33_001)])
def test_sizes_are_exact_in_large_nodes(mixture, rows, size):
    whole, rest = divmod(rows, size)
    is_division(ngame.balanced_clusters(mixture(rows, 4), size=size), [size] * whole + [rest])


@pytest.mark.parametrize("sizes", [[8000, 1, 2, 1, 3000], [1, 1, 9000, 1], [1] * 50 + [5000] * 2])
def test_sizes_may_be_any(mixture, sizes):
    x = mixture(sum(sizes), 300)
    offsets = np.cumsum([0, *sizes])
    order = _core.balanced_clusters(x, offsets, 0, 20, 2, 2)
    is_division(ngame.Clusters(order, offsets), sizes)


@pytest.mark.parametrize(("rows", "dim", "size"), [(1000, 24, 10), (3000, 40, 16), (600, 130, 6)])
def test_is_as_tight_as_plain_two_means(mixture, simd, rows, dim, size):
    x = mixture(rows, dim)
    found = [ngame.balanced_clusters(x, size=size, seed=seed, refine=0) for seed in range(3)]
    sizes = np.diff(found[0].offsets)
    ours = [reference.coherence(x, clusters) for clusters in found]
    plain = [
        reference.coherence(x, reference.balanced_clusters(x, sizes, seed)) for seed in range(3)
    ]
    assert np.mean(ours) > 0.99 * np.mean(plain)


def test_is_as_tight_where_directions_are_learnt_on_samples(mixture):
    x = mixture(36_000, 8)
    found = ngame.balanced_clusters(x, n_clusters=4, refine=0)
    plain = reference.balanced_clusters(x, np.diff(found.offsets))
    assert reference.coherence(x, found) > 0.99 * reference.coherence(x, plain)


def test_several_passes_of_several_levels(rng, simd):
    # Wide rows: few are copied at a time, so that large nodes have large parts.
    topic = rng.permutation(np.repeat(np.arange(850), 20))
    x = rng.standard_normal((850, 1000), dtype=np.float32)[topic]
    x += 0.8 * rng.standard_normal(x.shape, dtype=np.float32)
    x = x.astype(np.float16)
    found = ngame.balanced_clusters(x, size=20, refine=0, threads=1)
    is_division(found, [20] * 850)
    assert ngame.balanced_clusters(x, size=20, refine=0, threads=7) == found
    # Halves of exact size must part some topics.
    true = ngame.Clusters(np.argsort(topic, kind="stable"), found.offsets)
    assert found.coherence(x) > 0.7 * true.coherence(x)


@pytest.mark.parametrize("dim", [8, 31, 64, 100])
def test_is_as_tight_on_other_data(rng, dim):
    anywhere = rng.standard_normal((3000, dim), dtype=np.float32)
    narrow = anywhere + 20  # all rows point nearly one way
    repeated = anywhere[rng.integers(40, size=3000)]
    sparse = anywhere * (rng.random(anywhere.shape) < 0.1)
    for x in (anywhere, narrow, repeated, sparse):
        found = ngame.balanced_clusters(x, size=20, refine=0)
        plain = reference.balanced_clusters(x, [20] * 150)
        assert reference.coherence(x, found) > 0.995 * reference.coherence(x, plain)


def tree_and(x, rounds, threads=2, **given):
    """The clusters of the tree, and those after some rounds of refinement."""
    return [ngame.balanced_clusters(x, refine=n, threads=threads, **given) for n in (0, rounds)]


@pytest.mark.parametrize(
    ("rows", "dim", "size"), [(300, 8, 10), (300, 33, 7), (400, 20, 4), (61, 5, 30), (500, 16, 50)]
)
def test_a_round_is_the_reference_s(mixture, simd, rows, dim, size):
    same = []
    for seed in range(4):
        x = mixture(rows, dim, seed)
        tree, found = tree_and(x, 1, size=size, seed=seed)
        expected = reference.refined(x, tree)
        is_division(found, np.diff(tree.offsets))
        same.append((found.assignment == expected).mean())
    # Scores within 1e-5 of each other may be taken for equal; one such case may change many rows.
    assert np.median(same) == 1
    assert np.mean(same) > 0.97


# Clusters in groups; groups of groups; groups of groups of groups; and the least of these searched.
@pytest.mark.parametrize(("size", "compared"), [(6, 4096), (6, 32), (8, 12), (7, 1)])
def test_a_round_of_many_clusters_is_the_reference_s(mixture, simd, size, compared):
    x = mixture(6000, 24)
    tree = ngame.balanced_clusters(x, size=size, refine=0)
    given = x, tree.order, tree.offsets, 1
    orders = [_core.refine_clusters(*given, threads, compared) for threads in (1, 2, 7)]
    assert all((order == orders[0]).all() for order in orders)
    found = ngame.Clusters(orders[0], tree.offsets)
    is_division(found, np.diff(tree.offsets))
    expected = reference.refined(x, tree, compared)
    assert (expected != tree.assignment).mean() > 0.3
    # Scores within rounding, or within that of 8-bit codes, may be taken for equal.
    assert (found.assignment == expected).mean() > 0.97


def test_many_clusters_are_refined_as_well_as_few(mixture):
    x = mixture(20_000, 24)
    tree = ngame.balanced_clusters(x, size=8, refine=0)
    all_compared, few = (
        ngame.Clusters(
            _core.refine_clusters(x, tree.order, tree.offsets, 5, 2, compared), tree.offsets
        )
        for compared in (4096, 64)
    )
    assert few.order.tolist() != all_compared.order.tolist()
    assert few.coherence(x) > 0.98 * all_compared.coherence(x)
    assert few.neighbour_share(x) > 0.95 * all_compared.neighbour_share(x)


@pytest.mark.parametrize("rows", [2500, 12_000])
def test_rounds_tighten(mixture, simd, rows):
    x = mixture(rows, 24)
    found = [ngame.balanced_clusters(x, size=8, refine=n) for n in (0, 1, 3, 5)]
    coherence = [clusters.coherence(x) for clusters in found]
    shares = [clusters.neighbour_share(x) for clusters in found]
    assert coherence == sorted(coherence)
    assert shares == sorted(shares)
    assert coherence[-1] > 1.05 * coherence[0]
    assert shares[-1] > 1.2 * shares[0]
    assert found[-1] == ngame.balanced_clusters(x, size=8)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_refinement_is_the_same_on_any_number_of_threads(mixture, simd, dtype):
    x = mixture(9000, 40).astype(dtype)
    one, two, seven = (ngame.balanced_clusters(x, size=6, threads=n) for n in (1, 2, 7))
    assert one == two == seven


def test_refinement_reads_float16_as_such(mixture):
    x = mixture(3000, 33).astype(np.float16)
    assert ngame.balanced_clusters(x, size=9) == ngame.balanced_clusters(
        x.astype(np.float32), size=9
    )


@pytest.mark.parametrize(("rows", "n_clusters"), [(1, 1), (7, 1), (7, 7), (50, 33), (130, 65)])
def test_refinement_of_small_and_single_clusters(mixture, rows, n_clusters):
    x = mixture(rows, 6)
    tree, found = tree_and(x, 5, n_clusters=n_clusters)
    is_division(found, np.diff(tree.offsets))
    assert found.coherence(x) > tree.coherence(x) - 0.02


def test_refinement_of_given_clusters(mixture, rng):
    x = mixture(2000, 24)
    tree, found = tree_and(x, 3, size=7)
    refine = partial(_core.refine_clusters, x, threads=2)
    shuffled = np.concatenate([rng.permutation(tree[c]) for c in range(len(tree))])
    assert (refine(shuffled, tree.offsets, rounds=3) == found.order).all()
    assert (refine(shuffled, tree.offsets, rounds=0) == tree.order).all()
    order, offsets = tree.order, tree.offsets
    twice = np.append(order[:-1], order[:1])
    for kind, clusters, words in (
        (ValueError, (order[1:], offsets), "order has 1999 ids, expected 2000"),
        (ValueError, (twice, offsets), f"order has id {order[0]} twice"),
        (IndexError, (order + 1, offsets), "order has id 2000, out of range"),
        (ValueError, (order, np.append(offsets, 2000)), "offsets does not ascend"),
    ):
        with pytest.raises(kind, match=words):
            refine(*clusters, rounds=1)


def test_refinement_of_zero_rows(mixture, rng):
    x = mixture(900, 9)
    x[rng.permutation(900)[:300]] = 0
    is_division(ngame.balanced_clusters(x, size=7), [7] * 128 + [4])


def test_near_clusters_stay_near_in_the_order(rng):
    parent = rng.permutation(np.repeat(np.arange(4), 1000))
    x = np.eye(4, 40, dtype=np.float32)[parent]
    x += 0.08 * rng.standard_normal(x.shape, dtype=np.float32)
    found = ngame.balanced_clusters(x, size=10)
    assert (np.diff(parent[found.order]) != 0).sum() == 3


@pytest.mark.parametrize("rows", [64, 640])
@pytest.mark.parametrize("dim", [2, 16, 100])
@pytest.mark.parametrize("refine", [0, 5])
def test_equal_rows_share_a_cluster(rng, rows, dim, refine):
    distinct = rng.standard_normal((rows, dim), dtype=np.float32)
    tiled = np.tile(distinct, (16, 1))
    shuffled = tiled[rng.permutation(len(tiled))]
    noisy = shuffled + 1e-4 * rng.standard_normal(shuffled.shape, dtype=np.float32)
    for x, least in (tiled, 1), (np.repeat(distinct, 16, axis=0), 1), (shuffled, 1), (noisy, 0.999):
        for seed in range(4 if rows == 64 else 2):
            found = ngame.balanced_clusters(x, size=16, seed=seed, refine=refine)
            assert found.coherence(x) > least - 1e-6


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("refine", [0, 5])
def test_two_pairs_of_equal_rows(seed, refine):
    x = np.tile(np.array([[1, 0], [-1, 0]], np.float32), (2, 1))
    found = ngame.balanced_clusters(x, n_clusters=2, seed=seed, refine=refine)
    assert found.coherence(x) == 1


def test_finds_clusters_that_are_plain_to_see(rng, simd):
    centres = np.eye(8, 11, dtype=np.float32)
    truth = np.repeat(np.arange(8), 32)
    x = centres[truth] + 0.01 * rng.standard_normal((256, 11), dtype=np.float32)
    shuffled = rng.permutation(256)
    found = ngame.balanced_clusters(x[shuffled], size=32)
    assert {frozenset(truth[shuffled[ids]]) for ids in found} == {
        frozenset([topic]) for topic in range(8)
    }


def test_length_of_rows_does_not_count(mixture, rng):
    x = mixture(500, 12)
    scaled = x * (2.0 ** rng.integers(-20, 20, size=(500, 1))).astype(np.float32)
    assert ngame.balanced_clusters(scaled, size=8) == ngame.balanced_clusters(x, size=8)


@pytest.mark.parametrize("scale", [1e-44, 1e-25, 1e25, 3e38])
def test_extreme_lengths(mixture, scale):
    x = mixture(64, 5)
    x /= np.abs(x).max()
    extreme = x * np.float32(scale)
    assert np.isfinite(extreme).all()
    found = ngame.balanced_clusters(extreme, size=8)
    is_division(found, [8] * 8)
    if scale > 1e-30:  # below that the rows have no precision left
        assert found.coherence(x) == pytest.approx(
            ngame.balanced_clusters(x, size=8).coherence(x), rel=0.02
        )


def test_seed_governs(mixture):
    x = mixture(400, 8)
    first, again, other = (ngame.balanced_clusters(x, size=5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert ngame.balanced_clusters(x, size=5, seed=-1) != first


def test_zero_and_equal_rows(simd):
    is_division(ngame.balanced_clusters(np.zeros((50, 7), np.float32), size=8), [8] * 6 + [2])
    is_division(ngame.balanced_clusters(np.ones((50, 7), np.float32), n_clusters=3), [16, 17, 17])
    is_division(ngame.balanced_clusters(np.zeros((9, 0), np.float32), size=4), [4, 4, 1])
    x = np.zeros((40_000, 3), np.float32)
    is_division(ngame.balanced_clusters(x, size=10_000), [10_000] * 4)


def test_float16_is_read_as_such(mixture):
    x = mixture(700, 33).astype(np.float16)
    half = ngame.balanced_clusters(x, size=9)
    assert half == ngame.balanced_clusters(x.astype(np.float32), size=9)
    assert half.coherence(x) == pytest.approx(half.coherence(x.astype(np.float32)))
    large = mixture(40_000, 6).astype(np.float16)
    assert ngame.balanced_clusters(large, size=100) == ngame.balanced_clusters(
        large.astype(np.float32), size=100
    )


def test_layouts_and_foreign_arrays(mixture, tmp_path):
    x = mixture(300, 10)
    expected = ngame.balanced_clusters(x, size=7)
    wide = np.zeros((600, 25), np.float32)
    wide[::2, 3:13] = x
    np.save(tmp_path / "x.npy", x)
    for other in (
        wide[::2, 3:13],
        np.asfortranarray(x),
        x[::-1][::-1],
        x.astype(">f4"),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
    ):
        assert ngame.balanced_clusters(other, size=7) == expected
    backwards = np.ascontiguousarray(x[::-1])
    assert ngame.balanced_clusters(backwards[::-1], size=7) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_mapped_files(mixture, tmp_path, dtype):
    x = mixture(20_000, 32).astype(dtype)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = ngame.balanced_clusters(x, size=50)
    assert ngame.balanced_clusters(mapped, size=50) == expected
    assert ngame.balanced_clusters(mapped[::2], size=50) == ngame.balanced_clusters(x[::2], size=50)
    assert expected.coherence(mapped) == expected.coherence(x)


@pytest.mark.skipif(sys.platform != "linux", reason="the advice is Linux's")
@pytest.mark.parametrize("shape", [(6_000, 64), (1_200, 16_384)])  # the second has two windows
def test_mapped_files_that_memory_does_not_hold(mixture, tmp_path, shape):
    x = mixture(*shape).astype(np.float16)
    with open(tmp_path / "x.npy", "wb+") as file:
        np.save(file, x)
        file.flush()
        os.fsync(file.fileno())  # pages that are yet to be written are not taken away
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapped = np.frombuffer(mapping, np.float16, offset=128).reshape(x.shape)
    assert (mapped[-1] == x[-1]).all()
    try:
        mapping.madvise(MADV_PAGEOUT)
    except OSError:
        pytest.skip("the system cannot take pages away")
    done = threading.Event()

    def take_pages_away():
        while not done.wait(0.001):
            mapping.madvise(MADV_PAGEOUT)

    thread = threading.Thread(target=take_pages_away)
    thread.start()
    try:
        found = ngame.balanced_clusters(mapped, size=30)
        coherence = found.coherence(mapped)
    finally:
        done.set()
        thread.join()
    assert found == ngame.balanced_clusters(x, size=30)
    assert coherence == found.coherence(x)


def test_rows_of_any_scale_become_unit_vectors():
    x = np.random.default_rng(0).standard_normal((60, 7)).astype(np.float32)
    expected = reference.unit(x)
    expected[3] = 0
    scales = np.geomspace(1e-37, 1e37, 60, dtype=np.float32)[:, None]
    x *= scales
    x[3] = 0
    unit = importlib.import_module("ngame.cluster.order").unit
    np.testing.assert_allclose(unit(x), expected, atol=1e-6)
    assert unit(np.empty((0, 7), np.float32)).shape == (0, 7)


class TestParts:
    """Clusters of rows that the memory asked for does not hold."""

    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_are_exact_and_as_tight(self, mixture, monkeypatch, dtype):
        monkeypatch.setattr(importlib.import_module("ngame.cluster.order"), "_READ_BYTES", 1 << 14)
        x = mixture(6003, 24).astype(dtype)
        found = ngame.balanced_clusters(x, size=16, memory=300_000)
        is_division(found, [16] * 375 + [3])
        one = ngame.balanced_clusters(x, size=16)
        assert found != one
        # Six parts of 1,000 rows have much border.
        assert found.coherence(x) > 0.92 * one.coherence(x)
        assert found.neighbour_share(x) > 0.85 * one.neighbour_share(x)
        again = ngame.balanced_clusters(x, size=16, memory=300_000, threads=2)
        assert again == found
        assert ngame.balanced_clusters(x, size=16, memory=300_000, seed=1) != found

    @pytest.mark.parametrize("refine", [0, 1, 5])
    @pytest.mark.parametrize(
        ("asked", "rows"), [({"size": 7}, 1000), ({"n_clusters": 13}, 997), ({"size": 1}, 500)]
    )
    def test_any_sizes(self, mixture, asked, rows, refine):
        x = mixture(rows, 10)
        found = ngame.balanced_clusters(x, memory=30_000, refine=refine, **asked)
        is_division(found, np.diff(ngame.balanced_clusters(x, **asked).offsets))

    def test_rows_are_dealt_again_while_it_pays(self, monkeypatch):
        module = importlib.import_module("ngame.cluster.parts")
        cuts, times = module._Cuts, []

        def counted(*arguments):
            times.append(len(arguments[2]))
            return cuts(*arguments)

        monkeypatch.setattr(module, "_Cuts", counted)
        even = np.random.default_rng(0).standard_normal((6003, 24)).astype(np.float32)
        one = ngame.balanced_clusters(even, size=16).neighbour_share(even)
        found = [ngame.balanced_clusters(even, size=16, memory=300_000).neighbour_share(even)]
        assert times == [0, 1, 2, 3]
        for most in (3, 2, 1):
            monkeypatch.setattr(module, "MOST_DEALS", most)
            found.append(
                ngame.balanced_clusters(even, size=16, memory=300_000).neighbour_share(even)
            )
        assert found == sorted(found, reverse=True)
        assert found[0] > 0.8 * one > 0.76 * one > found[3]
        monkeypatch.setattr(module, "MOST_DEALS", 6)
        times.clear()
        apart = even[np.arange(6003) % 200] + 0.2 * even
        ngame.balanced_clusters(apart, size=16, memory=300_000)
        assert times == [0, 1]

    def test_one_piece_where_it_fits(self, mixture):
        x = mixture(1000, 10)
        assert ngame.balanced_clusters(x, size=9, memory=10**11) == ngame.balanced_clusters(
            x, size=9
        )
        assert len(ngame.balanced_clusters(x, size=1000, memory=20_000)) == 1

    def test_what_is_in_memory_at_a_time(self, mixture, monkeypatch):
        files = importlib.import_module("ngame.cluster.parts")._Files
        taken = []
        take = files.take

        def counted(parts, part):
            ids, rows = take(parts, part)
            taken.append(len(rows))
            return ids, rows

        monkeypatch.setattr(files, "take", counted)
        x, memory = mixture(20_000, 32), 1_000_000
        ngame.balanced_clusters(x, size=20, memory=memory)
        assert max(taken) * (128 + 80) < memory - 8 * len(x)

    def test_files_are_removed(self, mixture, monkeypatch, tmp_path):
        monkeypatch.setattr(tempfile, "tempdir", os.fspath(tmp_path))
        x = mixture(1000, 10)
        ngame.balanced_clusters(x, size=9, memory=40_000)
        x[700, 3] = np.nan
        with pytest.raises(ValueError, match="x has NaN or infinity in row 700"):
            ngame.balanced_clusters(x, size=9, memory=40_000)
        # Most rows are not in the sample that the cuts are learnt on, and the first is named.
        x = mixture(20_000, 16)
        x[[9000, 12_345]] = np.inf
        with pytest.raises(ValueError, match="x has NaN or infinity in row 9000"):
            ngame.balanced_clusters(x, size=9, memory=700_000)
        assert not any(tmp_path.iterdir())

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="of Linux")
    def test_a_full_disk_is_said(self, mixture, monkeypatch):
        parts = importlib.import_module("ngame.cluster.parts")
        full = Path("/dev/full")
        monkeypatch.setattr(parts._Files, "_paths", lambda self, part: (full, full))
        with pytest.raises(OSError, match="No space left on device: '/dev/full'") as caught:
            ngame.balanced_clusters(mixture(1000, 10), size=9, memory=40_000)
        assert caught.value.errno == errno.ENOSPC

    def test_equal_and_zero_rows_are_parted_too(self, monkeypatch):
        parts = importlib.import_module("ngame.cluster.parts")
        for x in (np.ones((4000, 6), np.float32), np.zeros((4000, 6), np.float32)):
            homes = parts._Cuts(x, 4, None, 0, 20, 1).homes(x, np.arange(4000, dtype=np.int32), 1)
            assert np.bincount(homes, minlength=4).min() > 900
            is_division(ngame.balanced_clusters(x, size=10, memory=140_000), [10] * 400)

    def test_rejects(self, mixture):
        x = mixture(1000, 10)
        with pytest.raises(
            ValueError, match=r"memory is 8000 bytes, x of shape \(1000, 10\) takes"
        ):
            ngame.balanced_clusters(x, size=9, memory=8000)
        with pytest.raises(TypeError, match="memory is a float, expected an integer"):
            ngame.balanced_clusters(x, size=9, memory=1e9)


def test_torch_tensors(mixture):
    torch = pytest.importorskip("torch")
    x = mixture(300, 10)
    found = ngame.balanced_clusters(torch.from_numpy(x), size=7)
    assert found == ngame.balanced_clusters(x, size=7)
    half = torch.from_numpy(x).bfloat16()
    found = ngame.balanced_clusters(half, size=7)
    assert found == ngame.balanced_clusters(half.float().numpy(), size=7)


def test_input_is_not_changed(mixture):
    x = 3 * mixture(300, 10)
    before = x.copy()
    x.flags.writeable = False
    ngame.balanced_clusters(x, size=7)
    assert (x == before).all()


@pytest.mark.parametrize("row", [0, 1, 1023, 1024, 2999])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_names_the_first_bad_row(row, bad, dtype):
    x = np.ones((3000, 9), dtype)
    x[row:, 8] = bad
    with pytest.raises(ValueError, match=f"x has NaN or infinity in row {row}$"):
        ngame.balanced_clusters(x, size=10, threads=2)


def test_rejects_bad_arguments(mixture):
    x = mixture(20, 3)
    with pytest.raises(TypeError, match="x has dtype float64, expected float32 or float16"):
        ngame.balanced_clusters(x.astype(np.float64), size=2)
    with pytest.raises(ValueError, match=r"x has shape \(20,\), expected two dimensions"):
        ngame.balanced_clusters(x[:, 0], size=2)
    with pytest.raises(ValueError, match="x has no rows"):
        ngame.balanced_clusters(x[:0], size=1)
    with pytest.raises(ValueError, match="size is 21, x has only 20 rows"):
        ngame.balanced_clusters(x, size=21)
    with pytest.raises(ValueError, match="n_clusters is 21, x has only 20 rows"):
        ngame.balanced_clusters(x, n_clusters=21)
    with pytest.raises(ValueError, match="size is 0, expected 1 or more"):
        ngame.balanced_clusters(x, size=0)
    with pytest.raises(TypeError, match="size is a float, expected an integer"):
        ngame.balanced_clusters(x, size=2.0)
    with pytest.raises(ValueError, match="exactly one of size and n_clusters"):
        ngame.balanced_clusters(x)
    with pytest.raises(ValueError, match="exactly one of size and n_clusters"):
        ngame.balanced_clusters(x, size=2, n_clusters=2)
    with pytest.raises(ValueError, match="max_iter is 0, expected 1 or more"):
        ngame.balanced_clusters(x, size=2, max_iter=0)
    with pytest.raises(ValueError, match="refine is -1, expected 0 or more"):
        ngame.balanced_clusters(x, size=2, refine=-1)
    with pytest.raises(TypeError, match="refine is a float, expected an integer"):
        ngame.balanced_clusters(x, size=2, refine=1.5)
    with pytest.raises(ValueError, match="threads is -1, expected 0 or more"):
        ngame.balanced_clusters(x, size=2, threads=-1)


class TestClusters:
    def make(self):
        return ngame.Clusters(np.array([3, 0, 2, 1], np.int32), np.array([0, 1, 1, 4], np.int64))

    def test_saved_in_parts(self, tmp_path, rng):
        clusters = ngame.Clusters(
            rng.permutation(23).astype(np.int32), np.array([0, 3, 9, 9, 20, 23], np.int64)
        )
        for part in range(3):
            clusters.save(tmp_path / "found[1].npz", part, 3)
        assert len(list(tmp_path.iterdir())) == 3
        assert ngame.Clusters.load(tmp_path / "found[1].npz") == clusters
        (tmp_path / "found[1]-00001-of-00003.npz").unlink()
        with pytest.raises(FileNotFoundError, match="00001-of-00003"):
            ngame.Clusters.load(tmp_path / "found[1].npz")
        clusters.save(tmp_path / "found[1].npz", 0, 2)
        with pytest.raises(ValueError, match=r"parts of .* of .'00002', '00003'. files"):
            ngame.Clusters.load(tmp_path / "found[1].npz")
        with pytest.raises(FileNotFoundError):
            ngame.Clusters.load(tmp_path / "other.npz")

    def test_access(self):
        clusters = self.make()
        assert len(clusters) == 3
        assert [ids.tolist() for ids in clusters] == [[3], [], [0, 2, 1]]
        assert clusters[-1].tolist() == [0, 2, 1]
        assert clusters.assignment.tolist() == [2, 2, 2, 0]
        assert clusters.assignment.dtype == np.int32
        for index in (3, -4):
            with pytest.raises(IndexError, match=f"cluster {index} is out of range for 3"):
                clusters[index]

    def test_is_shown_in_short(self):
        assert repr(self.make()) == "Clusters(4 rows, 3 clusters of 0 to 3)"
        equal = ngame.Clusters(np.arange(20_000), np.arange(0, 20_001, 32))
        assert repr(equal) == "Clusters(20000 rows, 625 clusters of 32)"
        assert repr(ngame.Clusters([], [0])) == "Clusters(0 rows, 0 clusters)"

    def test_equality_is_by_content(self):
        assert self.make() == self.make()
        assert self.make() != ngame.Clusters(np.arange(4), np.array([0, 1, 1, 4]))
        assert self.make() != "clusters"

    def test_round_trip(self, tmp_path):
        path = tmp_path / "clusters.npz"
        self.make().save(path)
        assert ngame.Clusters.load(path) == self.make()
        assert [file.name for file in tmp_path.iterdir()] == ["clusters.npz"]

    @pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off"])
    def test_load_rejects_other_files(self, tmp_path, content):
        path = tmp_path / "clusters.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"clusters\.npz does not hold clusters"):
            ngame.Clusters.load(path)

    def test_load_rejects_damaged_files(self, tmp_path):
        path = tmp_path / "clusters.npz"
        self.make().save(path)
        content = path.read_bytes()
        for place in range(0, len(content), 2):
            for damage in (b"\0", b"\xff", b"\xff\xff"):
                path.write_bytes(content[:place] + damage + content[place + len(damage) :])
                try:
                    found = ngame.Clusters.load(path)
                except ValueError as error:
                    assert str(error).startswith(f"{path} does not hold clusters: ")  # noqa: PT017
                except MemoryError:
                    pass
                else:
                    assert sorted(found.order) == [*range(4)]

    def test_parts_of_another_file_do_not_count(self, tmp_path):
        for name, parts in (("clusters", 2), ("clusters-fine", 3)):
            for part in range(parts):
                self.make().save(tmp_path / f"{name}.npz", part, parts)
        (tmp_path / "clusters-a-of-b.npz").write_bytes(b"")
        assert ngame.Clusters.load(tmp_path / "clusters.npz") == self.make()
        assert ngame.Clusters.load(tmp_path / "clusters-fine.npz") == self.make()

    @pytest.mark.parametrize("order", [[0.0, 1.7], ["0", "1"], [True, False], [None, 1]])
    def test_ids_are_integers(self, order):
        with pytest.raises(TypeError, match=r"^order has dtype .*, expected integers$"):
            ngame.Clusters(order, [0, 2])
        with pytest.raises(TypeError, match=r"^offsets has dtype .*, expected integers$"):
            ngame.Clusters([0, 1], [0, 1.0, 2])

    @pytest.mark.parametrize("wrapping", [2**32, 2**32 + 1, -(2**32)])
    def test_ids_do_not_wrap_around(self, wrapping):
        with pytest.raises(ValueError, match="order has not every row once: row 0 is missing"):
            ngame.Clusters(np.array([wrapping, 1]), [0, 2])

    def test_load_rejects_other_archives(self, tmp_path):
        path = tmp_path / "clusters.npz"
        np.savez(path, order=np.arange(3))
        with pytest.raises(ValueError, match="does not hold clusters"):
            ngame.Clusters.load(path)
        np.savez(path, order=np.array([{}], object), offsets=np.array([0, 1]))
        with pytest.raises(ValueError, match="does not hold clusters"):
            ngame.Clusters.load(path)
        with open(path, "wb") as file:
            np.save(file, np.arange(3))
        with pytest.raises(ValueError, match="does not hold clusters"):
            ngame.Clusters.load(path)
        with pytest.raises(FileNotFoundError):
            ngame.Clusters.load(tmp_path / "absent.npz")

    @pytest.mark.parametrize(
        ("order", "offsets", "message"),
        [
            ([0, 0], [0, 2], "row 1 is missing"),
            ([0, 2], [0, 2], "row 1 is missing"),
            ([-1, 0], [0, 2], "row 1 is missing"),
            ([0, 1], [0, 1], "does not ascend from 0 to the 2 rows"),
            ([0, 1], [0, 3, 2], "does not ascend"),
            ([0, 1], [], "does not ascend"),
            ([[0, 1]], [0, 2], "expected one dimension"),
        ],
    )
    def test_rejects_what_is_no_division(self, order, offsets, message):
        with pytest.raises(ValueError, match=message):
            ngame.Clusters(np.array(order, np.int32), np.array(offsets, np.int64))

    def test_coherence(self, mixture, simd):
        x = mixture(90, 17)
        x[5] = 0
        clusters = ngame.balanced_clusters(x, n_clusters=13)
        expected = reference.coherence(x, clusters)
        assert clusters.coherence(x) == pytest.approx(expected, rel=1e-5)
        with pytest.raises(ValueError, match="x has 89 rows, the clusters have 90"):
            clusters.coherence(x[1:])

    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_sums_of_unit_vectors(self, mixture, simd, dtype):
        x = mixture(700, 17).astype(dtype)
        x[5] = 0
        x[6:9] *= dtype(1000)
        # Large, empty and small clusters, in blocks of 256 rows and a rest.
        offsets = np.array([0, 600, 600, 603, 700])
        order = np.random.default_rng(0).permutation(700).astype(np.int32)
        expected = np.array([reference.unit(x)[order[i:j]].sum(0) for i, j in pairwise(offsets)])
        for threads in (1, 3):
            sums = _core.cluster_sums(x, order, offsets, threads)
            np.testing.assert_allclose(sums, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("k", [1, 3, 10, 200])
    def test_neighbour_share(self, mixture, simd, k):
        x = mixture(90, 17)
        x[5] = 0
        x[7] = x[6]
        clusters = ngame.balanced_clusters(x, n_clusters=13)
        expected = reference.neighbour_share(x, clusters, k)
        assert clusters.neighbour_share(x, k) == pytest.approx(expected, abs=1e-3)

    def test_neighbour_share_of_many_rows_is_drawn_with_a_seed(self, mixture):
        x = mixture(5000, 12)
        clusters = ngame.balanced_clusters(x, size=20)
        shares = [
            clusters.neighbour_share(x, seed=seed, threads=n) for seed in (0, 1) for n in (1, 2)
        ]
        assert shares[0] == shares[1] != shares[2] == shares[3]
        assert shares[0] == pytest.approx(shares[2], abs=0.03)

    def test_neighbour_share_rejects_bad_arguments(self, mixture):
        x = mixture(20, 3)
        clusters = ngame.balanced_clusters(x, size=4)
        with pytest.raises(ValueError, match="x has 19 rows, the clusters have 20"):
            clusters.neighbour_share(x[1:])
        with pytest.raises(ValueError, match="k is 0, expected 1 or more"):
            clusters.neighbour_share(x, 0)
        with pytest.raises(ValueError, match="x has 1 rows, expected 2 or more"):
            ngame.balanced_clusters(x[:1], size=1).neighbour_share(x[:1])

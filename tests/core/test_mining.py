"""Hard negatives, compared with the reference and, if installed, sentence-transformers."""

import numpy as np
import pytest
import reference
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

import ngame
from ngame import mine_hard_negatives, mining

WHOLE = np.arange(-3, 4)


def whole_numbers(rng, rows, dim):
    """Vectors whose products are exact in float32, so that many are equal."""
    return rng.choice(WHOLE, (rows, dim)).astype(np.float32)


def some_positives(rng, rows, columns, share=0.1):
    return sp.random_array((rows, columns), density=share, format="csr", rng=rng)


def lists(scores, ids):
    """The negatives of each row as (score, id) without its tail, which is checked."""
    there = ids >= 0
    assert np.array_equal(there, np.sort(there, axis=1)[:, ::-1])
    assert (scores[~there] == -np.inf).all()
    assert (ids[~there] == -1).all()
    return [
        list(zip(row[:count].tolist(), ids_row[:count].tolist(), strict=True))
        for row, ids_row, count in zip(scores, ids, there.sum(1), strict=True)
    ]


bounds = st.none() | st.integers(0, 8)


@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(0, 9), st.integers(1, 30), st.integers(1, 17)),
    n=st.integers(1, 6),
    first=st.integers(0, 5),
    more=st.none() | st.integers(0, 30),
    low=st.none() | st.integers(-6, 3),
    high=st.none() | st.integers(-3, 9),
    margin=bounds,
    relative=st.none() | st.sampled_from([0, 0.25, 0.5, 1.5]),
    share=st.sampled_from([0, 0.1, 0.6]),
)
def test_equals_the_reference(seed, shape, n, first, more, low, high, margin, relative, share):
    rng = np.random.default_rng(seed)
    queries, items = whole_numbers(rng, shape[0], shape[2]), whole_numbers(rng, shape[1], shape[2])
    known = some_positives(rng, shape[0], shape[1], share)
    stop = None if more is None else first + n + more
    scores, ids = mine_hard_negatives(
        queries,
        items,
        known,
        n,
        ranks=(first, stop),
        min_score=low,
        max_score=high,
        margin=margin,
        relative_margin=relative,
        metric="dot",
    )
    assert scores.dtype == np.float32
    assert ids.dtype == np.int32
    assert scores.shape == ids.shape == (shape[0], n)
    allowed = reference.hard_negatives(
        queries,
        items,
        reference.stored(known),
        first,
        first + 10 * n if stop is None else stop,
        low,
        high,
        margin,
        relative,
    )
    assert lists(scores, ids) == [row[:n] for row in allowed]


@pytest.mark.parametrize("dim", [1, 7, 8, 16, 33, 65])
def test_cosine_at_every_level(simd, rng, mixture, dim):
    x = mixture(120, dim)
    queries, items = 3 * x[:50], x[50:]
    known = some_positives(rng, 50, 70)
    scores, ids = mine_hard_negatives(queries, items, known, 4, relative_margin=0.1, ranks=(2, 30))
    expected = reference.hard_negatives(
        queries, items, reference.stored(known), 2, 30, relative=0.1, metric="cosine"
    )
    for ours, theirs in zip(lists(scores, ids), expected, strict=True):
        np.testing.assert_allclose([s for s, _ in ours], [s for s, _ in theirs[:4]], atol=1e-5)


@pytest.mark.parametrize("dim", [3, 16, 100, 384])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_a_copy_of_a_positive_passes_no_margin(simd, rng, dim, metric):
    """Its score equals the positive's to the last bit, at any place among the items."""
    x = rng.standard_normal((40, dim), dtype=np.float32)
    items = np.concatenate([x, x[rng.permutation(40)]])
    queries = x + 0.3 * rng.standard_normal((40, dim), dtype=np.float32)
    known = sp.eye_array(40, 80, format="csr")
    for options in ({"margin": 0}, {"relative_margin": 0}):
        _, ids = mine_hard_negatives(
            queries, items, known, 70, ranks=(0, 79), metric=metric, **options
        )
        for row in range(40):
            assert not (items[ids[row][ids[row] >= 0]] == x[row]).all(1).any()
    _, ids = mine_hard_negatives(queries, items, known, 1, metric=metric)
    assert (items[ids[:, 0]] == x).all(1).any()  # but without a margin it is the hardest


def test_every_positive_counts_whatever_its_value():
    x = np.eye(4, dtype=np.float32)
    known = sp.csr_matrix(([0.0, -1.0], [0, 2], [0, 2]), shape=(1, 4))
    assert mine_hard_negatives(x[:1], x, known, 4)[1].tolist() == [[1, 3, -1, -1]]
    pairs = [(0, 2), (0, 0), (0, 2)]
    assert mine_hard_negatives(x[:1], x, pairs, 4)[1].tolist() == [[1, 3, -1, -1]]


def test_unsorted_and_repeated_positives(rng):
    x = rng.standard_normal((9, 4), dtype=np.float32)
    messy = sp.csr_matrix((np.ones(4), [5, 2, 5, 0], [0, 3, 4]), shape=(2, 9))
    tidy = sp.csr_matrix((np.ones(3), [2, 5, 0], [0, 2, 3]), shape=(2, 9))
    for ours, theirs in zip(
        mine_hard_negatives(x[:2], x, messy, 3, margin=0.1),
        mine_hard_negatives(x[:2], x, tidy, 3, margin=0.1),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert messy.indices.tolist() == [5, 2, 5, 0]


def test_a_query_without_positives_has_no_margin(rng):
    x = rng.standard_normal((20, 4), dtype=np.float32)
    known = sp.csr_matrix((20, 20))
    for ours, theirs in zip(
        mine_hard_negatives(x, x, known, 3, margin=0.5, relative_margin=0.5),
        mine_hard_negatives(x, x, known, 3),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_wider_windows_than_there_are_items(rng):
    x = rng.standard_normal((5, 4), dtype=np.float32)
    known = sp.eye_array(5, format="csr")
    _, ids = mine_hard_negatives(x, x, known, 7, ranks=(0, 2**40))
    assert ((ids >= 0).sum(1) == 4).all()
    _, ids = mine_hard_negatives(x, x, known, 7, ranks=(5, None), sampling="random")
    assert (ids == -1).all()
    scores, ids = mine_hard_negatives(x[:0], x, known[:0], 3, margin=0.1)
    assert scores.shape == ids.shape == (0, 3)


# Drawing


def test_draws_are_distinct_and_within_bounds(rng):
    queries, items = whole_numbers(rng, 60, 6), whole_numbers(rng, 80, 6)
    known = some_positives(rng, 60, 80)
    options = {"ranks": (3, 12), "max_score": 22, "min_score": 14, "metric": "dot"}
    allowed = reference.hard_negatives(
        queries, items, reference.stored(known), 3, 12, low=14, high=22
    )
    drawn = lists(*mine_hard_negatives(queries, items, known, 5, sampling="random", **options))
    assert {min(5, len(row)) for row in allowed} >= {0, 3, 5}  # or it says less
    for ours, row in zip(drawn, allowed, strict=True):
        assert len(ours) == min(5, len(row))
        assert set(ours) <= set(row)
        assert ours == sorted(set(ours), key=lambda pair: (-pair[0], pair[1]))


def test_draws_are_uniform():
    """4 of 12 ranks per draw: each rank about 1,000 times, each pair about 273 times."""
    queries = np.ones((3000, 1), np.float32)
    items = np.arange(20, 0, -1, dtype=np.float32)[:, np.newaxis]
    _, ids = mine_hard_negatives(
        queries, items, np.empty((0, 2), int), 4, ranks=(5, 17), sampling="random", metric="dot"
    )
    counts = np.bincount(ids.ravel(), minlength=20)
    assert not counts[:5].any()
    assert not counts[17:].any()
    assert abs(counts[5:17] - 1000).max() < 5 * np.sqrt(1000 * 2 / 3)
    pairs = np.zeros((20, 20), int)
    for a in range(4):
        for b in range(a + 1, 4):
            np.add.at(pairs, (ids[:, a], ids[:, b]), 1)
    met = pairs[5:17, 5:17][np.triu_indices(12, 1)]
    share = 4 * 3 / (12 * 11)
    assert abs(met - 3000 * share).max() < 5 * np.sqrt(3000 * share)


def test_seeds(rng):
    x = rng.standard_normal((50, 8), dtype=np.float32)
    known = sp.eye_array(50, format="csr")

    def drawn(seed):
        return mine_hard_negatives(x, x, known, 3, sampling="random", seed=seed)[1]

    np.testing.assert_array_equal(drawn(1), drawn(1))
    assert (drawn(1) != drawn(2)).any()
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1]  # noqa: NPY002
    drawn(-5)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("sampling", ["top", "random"])
def test_same_bits_for_any_threads_and_chunks(rng, monkeypatch, sampling):
    x = rng.standard_normal((150, 20), dtype=np.float32)
    known = some_positives(rng, 70, 150)

    def mined(threads):
        return mine_hard_negatives(
            x[:70], x, known, 3, margin=0.05, sampling=sampling, threads=threads
        )

    expected = mined(1)
    for at_once in [1, 100, 10**6]:
        monkeypatch.setattr(mining, "_PAIRS_AT_ONCE", at_once)
        for threads in (1, 2, 7):
            for ours, theirs in zip(mined(threads), expected, strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_float16_and_memory_maps(rng, tmp_path):
    x = rng.standard_normal((30, 8)).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    known = sp.eye_array(30, format="csr")
    for ours, theirs in zip(
        mine_hard_negatives(mapped, mapped, known, 3, margin=0.1),
        mine_hard_negatives(x.astype(np.float32), x.astype(np.float32), known, 3, margin=0.1),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


# Bad input


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"n": 0}, ValueError, "n is 0, expected 1 or more"),
        ({"n": 1.5}, TypeError, "n is a float"),
        ({"ranks": (2, 4)}, ValueError, r"ranks is \(2, 4\), a window of 2 ranks, n is 3"),
        ({"ranks": (4, 2)}, ValueError, "a window of 0 ranks"),
        ({"ranks": (-1, 9)}, ValueError, "first of ranks is -1"),
        ({"ranks": 5}, TypeError, r"ranks is 5, expected a pair \(first, stop\)"),
        ({"ranks": (0, 1, 2)}, TypeError, "expected a pair"),
        ({"ranks": (0, 9.0)}, TypeError, "stop of ranks is a float"),
        ({"margin": -0.1}, ValueError, "margin is -0.1, expected 0 or more"),
        ({"relative_margin": -1}, ValueError, "relative_margin is -1, expected 0 or more"),
        ({"margin": "wide"}, TypeError, "margin is a str, expected a float"),
        ({"max_score": np.nan}, ValueError, "max_score is nan, expected a finite number"),
        ({"min_score": -np.inf}, ValueError, "min_score is -inf, expected a finite number"),
        ({"sampling": "hard"}, ValueError, "sampling is 'hard', expected"),
        ({"metric": "l2"}, ValueError, "metric is 'l2'"),
        ({"seed": 0.5}, TypeError, "seed is a float"),
        ({"threads": -1}, ValueError, "threads is -1"),
        ({"items": np.ones((4, 3))}, TypeError, "items has dtype float64"),
        ({"items": np.ones((4, 5), np.float32)}, ValueError, "queries has 3 columns, items has 5"),
        ({"queries": np.ones(3, np.float32)}, ValueError, "expected two dimensions"),
        (
            {"queries": np.full((2, 3), np.nan, np.float32)},
            ValueError,
            "queries has NaN or infinity in row 0",
        ),
        ({"positives": sp.csr_matrix((2, 5))}, ValueError, r"shape \(2, 5\), expected \(2, 4\)"),
        ({"positives": sp.csc_matrix((2, 4))}, TypeError, "positives is a csc matrix"),
        ({"positives": [(0, 4)]}, IndexError, r"positives\[0\] has column 4, out of range for 4"),
        ({"positives": [[1], [2]]}, ValueError, "positives is a list with an entry for each qu"),
        ({"positives": [[1, 3], []]}, ValueError, "positives is a list with an entry for each q"),
        ({"positives": [[1, 3], [0, 2]]}, ValueError, r"expected \(query, item\) pairs in the ord"),
        ({"positives": [(2, 0)]}, IndexError, r"positives\[0\] has row 2, out of range for 2"),
    ],
)
def test_bad_input(changed, error, message):
    arguments = {
        "queries": np.ones((2, 3), np.float32),
        "items": np.ones((4, 3), np.float32),
        "positives": [(0, 0), (1, 1)],
        "n": 3,
        "margin": 0.1,
    }
    with pytest.raises(error, match=message):
        mine_hard_negatives(**(arguments | changed))


# Beside sentence-transformers


def theirs(queries, items, known, n, **options):
    """Ids that sentence-transformers mines with the same vectors, one list per query."""
    datasets = pytest.importorskip("datasets")
    torch = pytest.importorskip("torch")
    util = pytest.importorskip("sentence_transformers.util")

    class Vectors:
        device = torch.device("cpu")
        similarity = staticmethod(util.cos_sim)
        similarity_pairwise = staticmethod(util.pairwise_cos_sim)

        def encode_query(self, texts, **_):
            return queries[[int(text[1:]) for text in texts]]

        def encode_document(self, texts, **_):
            return items[[int(text[1:]) for text in texts]]

    rows, columns = known.nonzero()
    pairs = datasets.Dataset.from_dict(
        {"query": [f"q{row}" for row in rows], "item": [f"i{column}" for column in columns]}
    )
    mined = util.mine_hard_negatives(
        pairs,
        Vectors(),
        corpus=[f"i{column}" for column in range(len(items))],
        num_negatives=n,
        output_format="labeled-pair",
        verbose=False,
        **options,
    )
    found = [[] for _ in queries]
    for query, item, label in zip(mined["query"], mined["item"], mined["label"], strict=True):
        if not label:
            found[int(query[1:])].append(int(item[1:]))
    return found


@pytest.mark.filterwarnings("ignore")  # of the libraries around it
@pytest.mark.parametrize(
    ("options", "their_options"),
    [
        ({"ranks": (0, None)}, {}),
        ({"ranks": (4, 20)}, {"range_min": 4, "range_max": 20}),
        ({"ranks": (0, 40), "relative_margin": 0.1}, {"range_max": 40, "relative_margin": 0.1}),
        ({"ranks": (0, 40), "margin": 0.15}, {"range_max": 40, "absolute_margin": 0.15}),
        (
            {"ranks": (0, 40), "min_score": 0.3, "max_score": 0.4},
            {"range_max": 40, "min_score": 0.3, "max_score": 0.4},
        ),
    ],
    ids=lambda options: ",".join(options),
)
def test_same_ids_as_sentence_transformers(rng, mixture, options, their_options):
    """Where its rules are ours: one positive a query, and ranks skipped only without a bound."""
    x = mixture(400, 32)
    queries, items = x[:100], x[100:]
    near = ngame.topk_arrays(queries, items, 60)[1]
    known = sp.csr_array(
        (np.ones(100), (np.arange(100), near[np.arange(100), rng.integers(60, size=100)])),
        shape=(100, 300),
    )
    _, ids = mine_hard_negatives(queries, items, known, 3, **options)
    ours = [row[row >= 0].tolist() for row in ids]
    if len(options) > 1:
        assert {2, 3} <= {len(row) for row in ours}  # the bound is met, or it says less
    # It searches one item more per positive, so its window may end a little later.
    for row, other in zip(ours, theirs(queries, items, known, 3, **their_options), strict=True):
        assert row == other[: len(row)]
        assert len(other) - len(row) <= 1


@pytest.mark.filterwarnings("ignore")
def test_ranks_are_counted_before_the_bound(rng, mixture):
    """Sentence-transformers applies the bound first, and skips ranks after it."""
    items = np.array([[np.cos(a), np.sin(a)] for a in np.arange(0, 1.5, 0.1)], np.float32)
    known = sp.csr_array(([1.0], ([0], [3])), shape=(1, 15))
    query = items[:1]
    _, ids = mine_hard_negatives(query, items, known, 2, ranks=(2, 10), margin=0.0)
    assert ids.tolist() == [[4, 5]]  # 0, 1, 2 are above the positive, and two of them are skipped
    found = theirs(query, items, known, 2, range_min=2, range_max=10, absolute_margin=0.0)
    assert found == [[6, 7]]

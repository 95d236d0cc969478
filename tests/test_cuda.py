"""The GPU core against the specification, on a GPU if there is one and on its emulation.

The emulation runs the same source with every thread a fiber. It shows wrong indices and missing
barriers; it shows neither races that depend on a GPU's timing nor speed. On a machine with a GPU:

    pytest -m gpu tests/test_cuda.py
"""

import inspect
import subprocess
import sys
import types
from importlib import import_module

import numpy as np
import pytest
import reference
import scipy.sparse as sp
import torch

import ngame
from ngame import cluster, cuda, dispatch, metrics, positives
from ngame.batches import neighbours as sampled

# PyTorch says once that its CSR tensors may change.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")

topk = import_module("ngame.topk")  # `ngame.topk` is the function

try:
    from ngame import _cuda_emulated as emulated
except ImportError:
    emulated = None


def why_no_gpu():
    """Why the GPU core cannot run here, or nothing."""
    if cuda._cuda is None:
        return "no GPU core: built where nvcc is found"
    if not torch.cuda.is_available():
        return f"no GPU that PyTorch sees; the driver says: {cuda._cuda.devices()[1] or 'all well'}"
    return None


@pytest.fixture(params=["forward", "backward", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """The device of tensors; the emulation runs its threads in either order."""
    if request.param == "gpu":
        if why_no_gpu():
            pytest.skip(why_no_gpu())
        return torch.device("cuda")
    if emulated is None:
        pytest.skip("no emulated GPU core: built with -Ccmake.define.NGAME_CUDA_EMULATE=ON")
    monkeypatch.setattr(cuda, "_cuda", emulated)
    # Small, so that a search has several blocks.
    monkeypatch.setattr(cuda, "_BLOCK_QUERIES", 32)
    monkeypatch.setattr(cuda, "_BLOCK_ITEMS", 160)
    monkeypatch.setattr(cuda, "_BLOCK_SCORES", 32 * 160)
    monkeypatch.setattr(torch, "empty", full_of_nan)
    emulated.set_backward(request.param == "backward")
    return torch.device("cpu")


_empty = torch.empty


def full_of_nan(*arguments, **options):
    """torch.empty with the worst that memory can hold: signaling NaN as bfloat16 and as float32."""
    tensor = _empty(*arguments, **options)
    memory = tensor.flatten().view(torch.uint8)
    memory[::2], memory[1::2] = 0x81, 0x7F
    return tensor


@pytest.fixture(params=range(25))
def draw(request):
    """A generator for each of 25 random shapes."""
    return np.random.default_rng(request.param)


def to_device(matrix, device, index=torch.int64):
    """A SciPy matrix as a sparse CSR tensor."""
    return torch.sparse_csr_tensor(
        torch.tensor(matrix.indptr, dtype=index),
        torch.tensor(matrix.indices, dtype=index),
        torch.tensor(matrix.data),
        matrix.shape,
        device=device,
        check_invariants=False,
    )


def random_labels(rng, rows, labels):
    """Labels; some rows have none."""
    dense = (rng.random((rows, labels)) < 0.2) & (rng.random((rows, 1)) < 0.8)
    return sp.csr_matrix(dense.astype(np.float32))


def check_mask(found, expected):
    assert found.dtype == torch.bool
    assert found.crow_indices().dtype == found.col_indices().dtype == torch.int32
    fresh = sp.csr_matrix(
        (found.values().cpu(), found.col_indices().cpu(), found.crow_indices().cpu()),
        shape=tuple(found.shape),
    )
    assert fresh.has_canonical_format
    assert fresh.shape == expected.shape
    assert (fresh.toarray() == expected).all()


def test_positives_match_reference(draw, device):
    rows, labels = draw.integers(1, 40), draw.integers(1, 300)
    y = random_labels(draw, rows, labels)
    index = [torch.int32, torch.int64][draw.integers(2)]
    on_device = to_device(y, device, index)
    batch = draw.integers(rows, size=draw.integers(0, 60))
    columns = draw.integers(labels, size=draw.integers(0, 400))
    found = cuda.in_batch_positives(on_device, batch, torch.tensor(columns))
    check_mask(found, reference.in_batch_positives(y, batch, columns))
    pool, positives = cuda.label_pool(on_device, batch)
    expected_pool, expected = reference.label_pool(y, batch)
    assert pool.dtype == torch.int32
    assert pool.tolist() == expected_pool.tolist()
    check_mask(positives, expected)


def test_positives_of_large_label_ids(device):
    labels = np.array([3, 2**31 - 2, 5, 2**31 - 3], np.int64)
    y = to_device(
        sp.csr_matrix((np.ones(4), labels, [0, 2, 4]), shape=(2, 2**31 - 1)).sorted_indices(),
        device,
    )
    pool, positives = cuda.label_pool(y, [1, 0])
    assert pool.tolist() == sorted(labels)
    check_mask(positives, np.array([[0, 1, 1, 0], [1, 0, 0, 1]], bool))
    found = cuda.in_batch_positives(y, [0, 1], [2**31 - 2, 0, 2**31 - 3])
    check_mask(found, np.array([[1, 0, 0], [0, 0, 1]], bool))


@pytest.mark.parametrize("function", ["in_batch_positives", "label_pool"])
def test_positives_reject(function, device):
    def call(y, rows):
        columns = [[0]] if function == "in_batch_positives" else []
        return getattr(cuda, function)(y, rows, *columns)

    def matrix(indptr, indices):
        parts = torch.tensor(indptr), torch.tensor(indices), torch.ones(len(indices))
        return torch.sparse_csr_tensor(
            *parts, (len(indptr) - 1, 5), device=device, check_invariants=False
        )

    good = matrix([0, 2, 3], [0, 4, 1])
    with pytest.raises(IndexError, match=r"rows\[1\] is 2, out of range for 2"):
        call(good, [0, 2, -1])
    with pytest.raises(IndexError, match=r"rows\[0\] is -1, out of range for 2"):
        call(good, [-1])
    with pytest.raises(TypeError, match=r"rows has dtype torch\.float"):
        call(good, [0.5])
    with pytest.raises(ValueError, match=r"rows has shape \(1, 1\), expected one dimension"):
        call(good, [[0]])
    with pytest.raises(TypeError, match=r"labels is a torch\.strided, expected a sparse CSR"):
        call(torch.ones(2, 2, device=device), [0])
    with pytest.raises(IndexError, match="column 5 at stored entry 1 is out of range for 5"):
        call(matrix([0, 2], [0, 5]), [0])
    with pytest.raises(ValueError, match="column 2 at stored entry 1 repeats or is out of order"):
        call(matrix([0, 2], [2, 2]), [0])
    with pytest.raises(ValueError, match="indptr of row 0 does not ascend"):
        call(matrix([0, 9], [0, 1]), [0])


def test_columns_out_of_range(device):
    y = to_device(sp.csr_matrix(np.eye(3, dtype=np.float32)), device)
    with pytest.raises(IndexError, match=r"columns\[1\] is 3, out of range for 3"):
        cuda.in_batch_positives(y, [0], [0, 3])


def random_predictions(rng, rows, labels, dtype):
    """Scores with ties and stored zeros; some rows are empty."""
    mask = (rng.random((rows, labels)) < 0.4) & (rng.random((rows, 1)) < 0.8)
    row, column = np.nonzero(mask)
    predictions = sp.csr_matrix((rows, labels), dtype=dtype)
    predictions.data = rng.integers(-2, 3, (rows, labels)).astype(dtype)[mask]
    predictions.indices = column.astype(np.int32)
    predictions.indptr = np.searchsorted(row, np.arange(rows + 1)).astype(np.int32)
    return predictions


def test_metrics_match_reference(draw, device):
    rows, labels = draw.integers(1, 40), draw.integers(1, 90)
    predictions = random_predictions(draw, rows, labels, [np.float32, np.float64][draw.integers(2)])
    truth = random_labels(draw, rows, labels)
    ks = sorted(set(draw.integers(1, 100, size=draw.integers(1, 5)).tolist()))
    weights = draw.random(labels).astype(np.float32) + 0.1 if draw.random() < 0.7 else None
    dropped = draw.random((rows, labels)) < draw.choice([0, 0.3, 1])
    expected = reference.evaluate(predictions, truth, ks, weights, np.argwhere(dropped))
    index = [torch.int32, torch.int64][draw.integers(2)]
    scored = to_device(predictions, device, index)
    for there, drop in (
        (truth, np.argwhere(dropped)),
        (to_device(truth, device), to_device(sp.csr_matrix(dropped), device)),
    ):
        found = cuda.evaluate(scored, there, ks=ks, inverse_propensity=weights, drop=drop)
        assert list(found) == list(expected)
        assert list(found.values()) == pytest.approx(list(expected.values()))
        of_rows = cuda.evaluate_rows(scored, there, ks=ks, inverse_propensity=weights, drop=drop)
        on_host = metrics.evaluate_rows(
            predictions, truth, ks=ks, inverse_propensity=weights, drop=np.argwhere(dropped)
        )
        assert list(of_rows) == list(on_host)
        for name, values in of_rows.items():
            assert values.device.type == scored.device.type
            np.testing.assert_allclose(values.cpu(), on_host[name], rtol=1e-9, atol=1e-12)


def test_metrics_of_stored_zeros_and_many_rows(device):
    rng = np.random.default_rng(1)
    predictions = random_predictions(rng, 700, 9, np.float32)
    truth = random_labels(rng, 700, 9)
    truth.data[::3] = 0
    found = cuda.evaluate(to_device(predictions, device), to_device(truth, device), ks=[2])
    assert found == pytest.approx(reference.evaluate(predictions, truth, [2]))


def test_metrics_reject(device):
    eye = sp.csr_matrix(np.eye(3, dtype=np.float32))
    scored = to_device(eye, device)
    with pytest.raises(TypeError, match=r"predictions has dtype torch\.int64"):
        cuda.evaluate(to_device(eye.astype(np.int64), device), eye)
    with pytest.raises(ValueError, match=r"truth has shape \(2, 3\), predictions has \(3, 3\)"):
        cuda.evaluate(scored, eye[:2])
    with pytest.raises(ValueError, match="ks is empty"):
        cuda.evaluate(scored, eye, ks=[])
    with pytest.raises(ValueError, match="inverse_propensity has values that are not positive"):
        cuda.evaluate(scored, eye, inverse_propensity=[1, 0, 1])
    with pytest.raises(IndexError, match=r"drop\[0\] has column 3, out of range for 3"):
        cuda.evaluate(scored, eye, drop=[[0, 3]])
    bad = eye.copy()
    bad.data[1] = np.nan
    with pytest.raises(ValueError, match="predictions has NaN in row 1"):
        cuda.evaluate(to_device(bad, device), eye)
    unsorted = sp.csr_matrix((np.ones(2), [1, 0], [0, 2]), shape=(1, 3))
    with pytest.raises(ValueError, match="predictions: column 0 at stored entry 1 repeats"):
        cuda.evaluate(to_device(unsorted, device), eye[:1])


def random_rows(rng, rows, dim, kind):
    """Some rows are zero; "ties" have few distinct values."""
    x = rng.standard_normal((rows, dim), dtype=np.float32)
    if kind == "ties":
        x = np.round(x)
    x[rng.random(rows) < 0.1] = 0
    return x


SCALARS = [torch.float32, torch.float16, torch.bfloat16]


def test_topk_matches_reference(draw, device):
    queries, items, dim = draw.integers(1, 40), draw.integers(1, 350), draw.integers(1, 70)
    k = draw.integers(1, items + 1) if draw.random() < 0.5 else min(7, items)
    metric = ["cosine", "dot"][draw.integers(2)]
    # Integers tie exactly as long as they are not scaled.
    kind = "ties" if metric == "dot" and draw.random() < 0.6 else "plain"
    scalar = SCALARS[draw.integers(3)]
    q = torch.tensor(random_rows(draw, queries, dim, kind), device=device).to(scalar)
    x = torch.tensor(random_rows(draw, items, dim, kind), device=device).to(scalar)
    drop = draw.random((queries, items)) < draw.choice([0, 0.2, 1])
    expected, expected_ids = reference.topk(
        q.double().cpu().numpy(), x.double().cpu().numpy(), k, metric, drop
    )
    scores, ids = cuda.topk_arrays(q, x, k, metric=metric, drop=sp.csr_matrix(drop))
    assert scores.dtype == torch.float32
    assert ids.dtype == torch.int32
    assert (scores.cpu().numpy() == expected).all()
    assert (ids.cpu().numpy() == expected_ids).all()


@pytest.mark.parametrize("kind", ["equal", "nearly equal", "best last", "far apart"])
def test_topk_filter_loses_nothing(kind, device):
    """Where rounding to bfloat16 hides the differences, or all items pass."""
    rng = np.random.default_rng(3)
    q = rng.standard_normal((5, 24), dtype=np.float32)
    x = np.repeat(rng.standard_normal((1, 24), dtype=np.float32), 500, axis=0)
    if kind == "nearly equal":
        x += 1e-5 * rng.standard_normal(x.shape, dtype=np.float32)
    elif kind == "best last":
        x *= np.linspace(1e-3, 1, 500, dtype=np.float32)[:, None]
    elif kind == "far apart":
        x *= np.float32(10) ** rng.integers(-15, 15, (500, 1)).astype(np.float32)
    for metric in ("dot", "cosine"):
        scores, ids = cuda.topk_arrays(
            torch.tensor(q, device=device), torch.tensor(x, device=device), 9, metric=metric
        )
        expected, expected_ids = reference.topk(q, x, 9, metric)
        assert (scores.cpu().numpy() == expected).all()
        if kind != "best last" or metric == "dot":
            assert (ids.cpu().numpy() == expected_ids).all()


def test_topk_where_lists_share_a_block(device):
    """More queries than `merge` has blocks, and small enough for a sanitizer."""
    queries = 1000 if device.type == "cuda" else 40
    rng = np.random.default_rng(4)
    q, x = (rng.standard_normal((n, 8), dtype=np.float32) for n in (queries, 60))
    scores, ids = cuda.topk_arrays(*(torch.tensor(v, device=device) for v in (q, x)), 5)
    expected, expected_ids = reference.topk(q, x, 5, "cosine")
    assert (scores.cpu().numpy() == expected).all()
    assert (ids.cpu().numpy() == expected_ids).all()


def test_topk_of_strided_rows_and_no_queries(device):
    x = torch.arange(60, dtype=torch.float32, device=device).reshape(6, 10)
    scores, ids = cuda.topk_arrays(x[::2, 2:5], x[:, 2:5], 1, metric="dot")
    assert ids.flatten().tolist() == [5, 5, 5]
    assert scores[0].item() == x[0, 2:5] @ x[5, 2:5]
    scores, ids = cuda.topk_arrays(x[:0], x.T.contiguous().T, 2)
    assert scores.shape == ids.shape == (0, 2)


def test_topk_as_a_matrix(device):
    rng = np.random.default_rng(4)
    q, x = (torch.tensor(random_rows(rng, n, 6, "plain"), device=device) for n in (9, 30))
    drop = sp.csr_matrix(rng.random((9, 30)) < 0.9)
    found = cuda.ranked_csr(*cuda.topk_arrays(q, x, 5, drop=drop), 30)
    expected = ngame.topk(q.cpu(), x.cpu(), 5, drop=drop)
    assert found.crow_indices().tolist() == expected.indptr.tolist()
    assert found.col_indices().tolist() == expected.indices.tolist()
    assert found.values().tolist() == expected.data.tolist()


def test_topk_rejects(device):
    x = torch.ones((3, 4), device=device)
    with pytest.raises(TypeError, match=r"queries has dtype torch\.float64, expected float32"):
        cuda.topk_arrays(x.double(), x, 1)
    with pytest.raises(ValueError, match="queries has 3 columns, items has 4"):
        cuda.topk_arrays(x[:, :3], x, 1)
    with pytest.raises(ValueError, match="k is 4, items has only 3 rows"):
        cuda.topk_arrays(x, x, 4)
    with pytest.raises(ValueError, match="metric is 'l2'"):
        cuda.topk_arrays(x, x, 1, metric="l2")
    for value in (torch.nan, torch.inf):
        bad = x.clone()
        bad[1, 2] = bad[2, 0] = value
        with pytest.raises(ValueError, match=r"items has NaN, infinity.* in row 1"):
            cuda.topk_arrays(x, bad, 1)
    with pytest.raises(ValueError, match=r"items has .*values whose products overflow .* row 0"):
        cuda.topk_arrays(x, x * 1e25, 1, metric="dot")


def clusters_of(x, offsets, seed=0, refine=0):
    order = cuda.balanced_order(cuda.as_matrix(x, "x"), offsets, seed, 20, refine=refine)
    return ngame.Clusters(order, offsets)


def test_clusters_match_reference(draw, device, mixture):
    rows, dim = draw.integers(1, 280), draw.integers(2, 50)
    x = mixture(rows, dim, seed=int(draw.integers(1000)))
    x[draw.random(rows) < 0.03] = 0
    x = torch.tensor(x, device=device).to(SCALARS[draw.integers(3)])
    count = draw.integers(1, rows + 1) if draw.random() < 0.5 else max(1, rows // 8)
    offsets = np.arange(count + 1, dtype=np.int64) * rows // count
    found = clusters_of(x, offsets)
    assert (np.diff(found.offsets) == np.diff(offsets)).all()
    for ids in found:
        assert (np.diff(ids) > 0).all()
    host = x.double().cpu().numpy()
    expected = reference.balanced_clusters(host, np.diff(offsets))
    # The reference starts from two random rows; on so few rows either may be better by chance.
    assert reference.coherence(host, found) >= 0.9 * reference.coherence(host, expected)


def test_clusters_are_as_tight_as_on_the_cpu(device, mixture):
    tight = []
    for seed in range(5):
        x = mixture(500, 16, seed=seed)
        offsets = np.append(np.arange(0, 500, 32, dtype=np.int64), 500)
        found = clusters_of(torch.tensor(x, device=device), offsets, seed)
        if seed == 0:
            assert found == clusters_of(torch.tensor(x, device=device), offsets, seed)
        expected = ngame.balanced_clusters(x, size=32, seed=seed, refine=0)
        tight.append((found.coherence(x), expected.coherence(x)))
    ours, theirs = np.mean(tight, axis=0)
    assert ours >= 0.998 * theirs


@pytest.mark.parametrize("scalar", SCALARS)
def test_clusters_of_strided_rows(device, mixture, scalar):
    """Rows that are not aligned to 16 bytes are read element by element."""
    whole = torch.tensor(mixture(200, 24), device=device).to(scalar)
    wider = torch.zeros(200, 27, dtype=scalar, device=device)
    wider[:, 1:25] = whole
    offsets = np.arange(0, 201, 8)
    host = whole.double().cpu().numpy()
    tight = [reference.coherence(host, clusters_of(x, offsets)) for x in (whole, wider[:, 1:25])]
    # Sums are taken in another order.
    assert tight[0] == pytest.approx(tight[1], rel=0.01)


def test_clusters_from_samples(device, mixture):
    # The emulation splits nodes of more than 512 rows by a sample of their rows.
    x = mixture(1700, 8)
    offsets = np.arange(0, 1701, 100)
    found = clusters_of(torch.tensor(x, device=device), offsets)
    assert found != clusters_of(torch.tensor(x, device=device), offsets, seed=1)
    expected = reference.balanced_clusters(x, np.diff(offsets))
    assert reference.coherence(x, found) >= 0.95 * reference.coherence(x, expected)


def test_clusters_of_equal_and_extreme_rows(device):
    for x in (torch.zeros(50, 3), torch.ones(50, 3), torch.full((50, 3), 3e38)):
        found = clusters_of(x.to(device), np.arange(0, 51, 5))
        assert found.assignment.tolist() == np.repeat(np.arange(10), 5).tolist()


@pytest.mark.parametrize(
    ("rows", "dim", "size"), [(300, 8, 10), (300, 33, 7), (400, 20, 4), (61, 5, 30), (500, 16, 50)]
)
def test_a_round_of_refinement_is_the_reference_s(device, mixture, rows, dim, size):
    same = []
    offsets = np.append(np.arange(0, rows, size), rows)
    for seed, scalar in enumerate(SCALARS):
        x = torch.tensor(mixture(rows, dim, seed), device=device).to(scalar)
        tree, found = (clusters_of(x, offsets, seed, n) for n in (0, 1))
        assert all((np.diff(ids) > 0).all() for ids in found)
        expected = reference.refined(x.double().cpu().numpy(), tree)
        same.append((found.assignment == expected).mean())
    # Scores within 1e-5 of each other may be taken for equal; one such case may change many rows.
    assert np.median(same) == 1
    assert np.mean(same) > 0.97


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (7, 1), (7, 7), (50, 33), (130, 65)])
def test_refinement_of_small_and_single_clusters(device, mixture, rows, count):
    x = mixture(rows, 6)
    x[rows // 2 :: 3] = 0
    offsets = np.arange(count + 1) * rows // count
    tree, found = (clusters_of(torch.tensor(x, device=device), offsets, 0, n) for n in (0, 5))
    assert (np.sort(found.order) == np.arange(rows)).all()
    assert found.coherence(x) > tree.coherence(x) - 0.02


def test_refinement_of_equal_rows(device, mixture):
    """Where all ask for the same clusters."""
    x = np.repeat(mixture(16, 12), 16, axis=0)
    offsets = np.arange(0, 257, 16)
    for seed in range(3):
        found = clusters_of(torch.tensor(x, device=device), offsets, seed, 5)
        assert found.coherence(x) > 0.999


def test_rounds_of_refinement_are_those_of_the_cpu(device, mixture):
    x = mixture(700, 24)
    offsets = np.append(np.arange(0, 700, 8), 700)
    on_device = torch.tensor(x, device=device)
    tree, found = (clusters_of(on_device, offsets, 0, n) for n in (0, 5))
    assert found == clusters_of(on_device, offsets, 0, 5)
    expected = ngame.balanced_clusters(x, size=8, refine=5)
    assert found.coherence(x) > 1.05 * tree.coherence(x)
    assert found.coherence(x) > 0.99 * expected.coherence(x)
    assert found.neighbour_share(x) > 0.97 * expected.neighbour_share(x)


def test_clusters_reject(device):
    x = torch.ones((4, 2), device=device)
    x[2, 1] = torch.nan
    with pytest.raises(ValueError, match="x has NaN or infinity in row 2"):
        clusters_of(x, np.array([0, 2, 4]))
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        clusters_of(x.double(), np.array([0, 2, 4]))


# Shapes at which the kernels' own constants act: several blocks of queries and of items, second
# rounds of merging, nodes above the sample. On the emulation, whose constants are small enough for
# the shapes above, they only show that the tests run.


once = pytest.mark.parametrize(
    "device", ["forward", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture
def scale(device):
    return 220 if device.type == "cpu" else 1


@once
@pytest.mark.parametrize(
    ("dim", "scalar", "k"),
    [(72, torch.float32, 120), (384, torch.bfloat16, 40), (768, torch.float16, 1000)],
)
def test_topk_of_many_blocks(device, scale, dim, scalar, k):
    generator = torch.Generator().manual_seed(0)
    queries, items, k = 9000 // scale, 40_000 // scale, max(2, k // scale)
    q, x = (torch.randn(n, dim, generator=generator).to(device, scalar) for n in (queries, items))
    rng = np.random.default_rng(1)
    drop = np.unique(
        np.stack([rng.integers(n, size=50_000 // scale) for n in (queries, items)], 1), axis=0
    )
    scores, ids = cuda.topk_arrays(q, x, k, drop=drop)
    assert torch.equal(ids, cuda.topk_arrays(q, x, k, drop=drop)[1])
    some = torch.arange(0, queries, 13, device=device)  # of every block of queries
    unit = [torch.nn.functional.normalize(v.double(), dim=1) for v in (q[some], x)]
    cosines = unit[0] @ unit[1].T
    dropped = torch.zeros(queries, items, dtype=torch.bool, device=device)
    dropped[tuple(torch.tensor(drop.T, device=device))] = True
    cosines[dropped[some]] = -torch.inf
    found = cosines.gather(1, ids[some].long())
    torch.testing.assert_close(found, cosines.topk(k).values, rtol=0, atol=1e-7)
    torch.testing.assert_close(scores[some].double(), found, rtol=0, atol=1e-7)
    assert all(len(row.unique()) == k for row in ids[some])


@once
def test_topk_of_equal_rows(device, scale):
    """Every candidate passes in every round."""
    x = torch.randn(1, 96, generator=torch.Generator().manual_seed(0)).to(device)
    x = x.repeat(30_000 // scale, 1)
    ids = cuda.topk_arrays(x[: 4500 // scale], x, 50)[1]
    assert (ids == torch.arange(50, device=device)).all()


@once
@pytest.mark.parametrize(
    ("rows", "dim", "scalar", "size"),
    [
        (100_000, 96, torch.float32, 32),
        (70_001, 64, torch.bfloat16, 8),
        (50_000, 51, torch.float16, 100),
    ],
)
def test_clusters_of_many_rows(device, scale, mixture, rows, dim, scalar, size):
    rows //= scale
    x = torch.tensor(mixture(rows, dim), device=device).to(scalar)
    host = x.float().cpu().numpy()
    offsets = np.append(np.arange(0, rows, size, dtype=np.int64), rows)
    assert clusters_of(x, offsets, refine=5) == clusters_of(x, offsets, refine=5)
    tight = []
    for seed in range(4 if scale == 1 else 1):
        found = clusters_of(x, offsets, seed)
        assert (np.sort(found.order) == np.arange(rows)).all()
        assert all((np.diff(ids) > 0).all() for ids in found)
        expected = ngame.balanced_clusters(host, size=size, seed=seed, refine=0)
        tight.append((found.coherence(host), expected.coherence(host)))
    ours, theirs = np.mean(tight, axis=0)
    assert scale > 1 or ours >= 0.995 * theirs


@once
def test_positives_of_many_rows(device, scale):
    rng = np.random.default_rng(0)
    rows, labels = 50_000 // scale, 30_000 // scale
    y = sp.random(rows, labels, 3e-4 * scale, "csr", np.float32, rng=rng)
    y.sort_indices()
    batch, columns = (
        rng.integers(rows, size=20_000 // scale),
        rng.integers(labels, size=9000 // scale),
    )
    there = to_device(y, device)
    pool, mask = cuda.label_pool(there, batch)
    expected_pool, expected = positives.label_pool(y, batch)
    assert (pool.cpu().numpy() == expected_pool).all()
    for found, wanted in (
        (mask, expected),
        (
            cuda.in_batch_positives(there, batch, columns),
            positives.in_batch_positives(y, batch, columns),
        ),
    ):
        assert (found.crow_indices().cpu().numpy() == wanted.indptr).all()
        assert (found.col_indices().cpu().numpy() == wanted.indices).all()


def test_a_search_leaves_the_settings_of_products_as_they_were():
    settings = torch.backends.cuda.matmul
    name = "allow_bf16_reduced_precision_reduction"
    parts = [part for part in (name, f"{name}_split_k") if hasattr(settings, part)]
    before = [getattr(settings, part) for part in parts]
    try:
        for value in (True, False, *[(False, False)] * (len(parts) > 1)):
            setattr(settings, name, value)
            own = [getattr(settings, part) for part in parts]
            with cuda._exact_sums, cuda._exact_sums:
                assert not getattr(settings, name)
            assert [getattr(settings, part) for part in parts] == own
    finally:
        setattr(settings, name, tuple(before) if len(parts) > 1 else before[0])


@pytest.mark.gpu
def test_on_a_stream_of_ones_own():
    if why_no_gpu():
        pytest.skip(why_no_gpu())
    with torch.cuda.stream(torch.cuda.Stream()):
        x = torch.randn(200_000, 128, device="cuda")
        found = ngame.balanced_clusters(x, size=32)
    assert found == ngame.balanced_clusters(x, size=32)


class _OnGpu:
    """As much of a CUDA array as shows its device."""

    shape = 3, 1

    @property
    def __cuda_array_interface__(self):
        return {"version": 3}

    def __len__(self):
        return 3


def test_public_functions_dispatch(monkeypatch):
    seen = []

    def note(name, result=None):
        def called(*_, **__):
            seen.append(name)
            return result

        monkeypatch.setattr(cuda, name, called)

    for name in ("evaluate", "evaluate_rows", "in_batch_positives", "label_pool", "ranked_csr"):
        note(name)
    note("topk_arrays", (_OnGpu(), _OnGpu()))
    note("as_matrix", np.ones((3, 1), np.float32))
    note("balanced_order", np.arange(3, dtype=np.int32))
    host = np.eye(3, dtype=np.float32)
    ngame.metrics.evaluate(_OnGpu(), _OnGpu(), threads=1)
    ngame.metrics.evaluate(predictions=_OnGpu(), truth=sp.csr_matrix(host))
    ngame.metrics.evaluate_rows(_OnGpu(), sp.csr_matrix(host))
    ngame.in_batch_positives(_OnGpu(), [0], [0])
    ngame.in_batch_positives(sp.csr_matrix(host), _OnGpu(), [0])
    ngame.label_pool(labels=_OnGpu(), rows=[0])
    ngame.topk_arrays(host, _OnGpu(), 1)
    ngame.topk(_OnGpu(), _OnGpu(), 1)
    assert seen == [
        *(
            "evaluate",
            "evaluate",
            "evaluate_rows",
            "in_batch_positives",
            "in_batch_positives",
            "label_pool",
        ),
        *("topk_arrays", "topk_arrays", "ranked_csr"),
    ]
    # Sizes are planned on the host.
    assert ngame.balanced_clusters(_OnGpu(), size=2).offsets.tolist() == [0, 2, 3]


def test_neighbours_for_batches_are_found_on_the_device(device, mixture, monkeypatch):
    x = mixture(60, 8)
    expected = ngame.NeighbourBatchSampler(60, 10, nearest=3, drawn=2, neighbour_range=9)
    expected.refresh(x)
    if device.type == "cpu":  # the emulation stands for a GPU
        for module in (dispatch, sampled):
            monkeypatch.setattr(module, "on_gpu", lambda value: isinstance(value, torch.Tensor))
        monkeypatch.setattr(sampled, "in_reach", lambda value: value)
    sampler = ngame.NeighbourBatchSampler(60, 10, nearest=3, drawn=2, neighbour_range=9)
    there = torch.tensor(x, device=device)
    sampler.refresh(there)
    assert isinstance(sampler.neighbours, np.ndarray)
    assert (sampler.neighbours == expected.neighbours).all()
    sampler.refresh(torch.tensor(expected.neighbours, device=device))
    assert (sampler.neighbours == expected.neighbours).all()
    with pytest.raises(ValueError, match=r"source has shape \(60,\), expected two"):
        sampler.refresh(there[:, 0])
    there[4, 2] = torch.nan
    with pytest.raises(ValueError, match=r"NaN, infinity.* in row 4"):
        sampler.refresh(there)


@pytest.mark.parametrize(
    "function",
    [
        metrics.evaluate,
        metrics.evaluate_rows,
        positives.in_batch_positives,
        positives.label_pool,
        topk.topk_arrays,
        topk.ranked_csr,
        cluster.balanced_order,
    ],
)
def test_namesakes_take_the_same_arguments(function):
    own = {"threads", "group"}  # of the CPU's

    def parameters(function):
        found = inspect.signature(function).parameters.values()
        return [(one.name, one.kind, one.default) for one in found if one.name not in own]

    assert parameters(function) == parameters(getattr(cuda, function.__name__))


def test_tensors_on_the_cpu_never_reach_the_gpu_core(monkeypatch):
    """Their addresses would mean nothing there."""
    monkeypatch.setattr(cuda, "_cuda", types.ModuleType("ngame._cuda"))
    with pytest.raises(TypeError, match="label_pool got a tensor on cpu, expected a CUDA device"):
        cuda.label_pool(to_device(sp.csr_matrix(np.eye(2, dtype=np.float32)), "cpu"), [0])


def test_without_a_build_the_call_is_named(monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", None)
    y = to_device(sp.csr_matrix(np.eye(2, dtype=np.float32)), "cpu")
    with pytest.raises(ImportError, match="label_pool on CUDA tensors needs ngame's GPU core"):
        cuda.label_pool(y, [0])
    assert cuda.describe().startswith("not built")


def test_import_is_silent():
    """Nothing of the GPU core is loaded or printed before a CUDA array comes."""
    code = "import sys, ngame; assert not {'torch', 'ngame.cuda', 'ngame._cuda'} & set(sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert found.stdout == found.stderr == b""

"""Tensors of torch as arguments: those that NumPy does not take by itself, and sparse ones."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import ngame

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
LABELS = sp.csr_matrix(np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 1]], np.float32))


def sparse(matrix, dtype=torch.float32):
    """The same as a sparse CSR tensor."""
    parts = (torch.from_numpy(part.astype(np.int64)) for part in (matrix.indptr, matrix.indices))
    values = torch.from_numpy(matrix.data).to(dtype)
    return torch.sparse_csr_tensor(*parts, values, matrix.shape, check_invariants=True)


@pytest.fixture
def x():
    return torch.from_numpy(np.random.default_rng(0).standard_normal((24, 8), dtype=np.float32))


@pytest.mark.parametrize("kind", ["grad", "bfloat16", "half", "bfloat16 with grad", "parameter"])
def test_embeddings_of_any_kind(x, kind):
    given = x.bfloat16() if "bfloat16" in kind else x.half() if kind == "half" else x
    plain = given.float().numpy() if "bfloat16" in kind else given.numpy()
    if "grad" in kind or kind == "parameter":
        given = given.clone().requires_grad_()
    if kind == "parameter":
        given = torch.nn.Parameter(given)
    clusters = ngame.balanced_clusters(given, size=4)
    assert (clusters.order == ngame.balanced_clusters(plain, size=4).order).all()
    assert clusters.coherence(given) == clusters.coherence(plain)
    found = ngame.topk_arrays(given, given, 3)
    for part, expected in zip(found, ngame.topk_arrays(plain, plain, 3), strict=True):
        assert (part == expected).all()
    assert (ngame.mine_hard_negatives(given, given, [(0, 0)], 2)[1] >= 0).all()
    assert len(ngame.ExactIndex(given)) == 24
    sampler = ngame.ClusterBatchSampler(24, 8, cluster_size=4, start_epoch=0)
    sampler.refresh(given)
    assert sampler.clusters is not None


def test_embeddings_must_be_floats(x):
    with pytest.raises(TypeError, match="x has dtype float64, expected float32 or float16"):
        ngame.balanced_clusters(x.double(), size=4)
    with pytest.raises(TypeError, match="queries has dtype int64, expected float32 or float16"):
        ngame.topk_arrays(x.long(), x, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.bfloat16, torch.int64])
def test_labels_as_sparse_tensors(dtype):
    labels = sparse(LABELS, dtype)
    pool, positives = ngame.label_pool(labels, torch.tensor([0, 2]))
    expected = ngame.label_pool(LABELS, [0, 2])
    assert pool.tolist() == expected[0].tolist()
    assert (positives != expected[1]).nnz == 0
    mask = ngame.in_batch_positives(labels, [0, 1], torch.tensor([2, 1]))
    assert mask.toarray().tolist() == [[True, False], [False, True]]
    weights = ngame.metrics.inverse_propensity(labels)
    assert weights.tolist() == ngame.metrics.inverse_propensity(LABELS).tolist()
    with pytest.raises(TypeError, match=r"labels is a torch\.sparse_coo tensor.*to_sparse_csr"):
        ngame.label_pool(labels.float().to_sparse_coo(), [0])


def test_metrics_of_tensors():
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    best = torch.topk(scores, 2)
    plain = scores.detach().numpy()
    ids = np.argsort(-plain, axis=1)[:, :2]
    expected = ngame.metrics.evaluate(ids, LABELS, ks=[1, 2])
    dense = torch.from_numpy(LABELS.toarray())
    for predictions in (best, tuple(best), best.indices, best.indices.tolist()):
        for truth in (LABELS, sparse(LABELS), sparse(LABELS, torch.bool), dense, dense.bfloat16()):
            assert ngame.metrics.evaluate(predictions, truth, ks=[1, 2]) == expected
    expected = ngame.metrics.evaluate(plain, LABELS)
    assert ngame.metrics.evaluate(scores, dense.long()) == expected
    rounded = ngame.metrics.evaluate(scores.bfloat16(), LABELS)
    assert rounded == ngame.metrics.evaluate(scores.detach().bfloat16().float().numpy(), LABELS)
    counts = sparse(LABELS, torch.int64)
    assert ngame.metrics.evaluate(counts, LABELS, ks=[1])["P@1"] == 1
    weights = torch.ones(4, requires_grad=True)
    found = ngame.metrics.evaluate(scores, LABELS, inverse_propensity=weights, drop=counts)
    assert found["PSP@1"] == 0
    rows = ngame.metrics.evaluate_rows(best, LABELS, ks=[2])
    assert rows["P@2"].mean() == pytest.approx(ngame.metrics.evaluate(best, LABELS, ks=[2])["P@2"])


def test_own_search_into_metrics(x):
    scores, ids = ngame.topk_arrays(x, x[:4], 2)
    truth = torch.eye(24, 4)
    found = ngame.metrics.evaluate((scores, ids), truth, ks=[1, 2])
    assert found == ngame.metrics.evaluate(ngame.topk(x, x[:4], 2), truth, ks=[1, 2])

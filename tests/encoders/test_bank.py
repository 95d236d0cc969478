"""The embedding bank: what it stores, what it refuses, and its checkpoints."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ngame
from ngame.encoders.bank import EmbeddingBank


def test_bank_stores_unit_vectors(rng):
    x = rng.standard_normal((8, 5), dtype=np.float32) * 1000
    x[3] = 0
    bank = EmbeddingBank(10, 5)
    assert len(bank) == 10
    assert bank.unseen.tolist() == list(range(10))
    bank.update(np.arange(8), x)
    np.testing.assert_allclose(bank.vectors[:8], F.normalize(torch.from_numpy(x), dim=1), atol=5e-4)
    assert not bank.vectors[[3, 8, 9]].any()
    assert bank.vectors.dtype == np.float16
    # A stored zero vector counts as seen.
    assert bank.unseen.tolist() == [8, 9]
    bank.update([8, 0, 8], x[[0, 1, 2]])
    np.testing.assert_array_equal(bank.vectors[[8, 0]], bank.vectors[[2, 1]])
    bank.update([], np.empty((0, 5), np.float32))
    assert bank.unseen.tolist() == [9]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_bank_of_tiny_and_huge_vectors(scale):
    bank = EmbeddingBank(1, 2)
    bank.update([0], torch.tensor([[3.0, 4.0]]) * scale)
    np.testing.assert_allclose(bank.vectors, [[0.6, 0.8]], atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bank_takes_tensors_with_gradients(dtype):
    bank = EmbeddingBank(3, 2)
    x = torch.tensor([[0.0, 2.0]], dtype=dtype, requires_grad=True)
    bank.update(torch.tensor([1]), x * 2)
    assert bank.vectors.tolist() == [[0, 0], [0, 1], [0, 0]]


def test_bank_filled_by_training(mixture):
    """One epoch of batches fills the bank; its clusters are as coherent as those of the vectors."""
    x = mixture(64, 8)
    sampler = ngame.ClusterBatchSampler(64, 16, cluster_size=4)
    bank = EmbeddingBank(64, 8)
    for rows in sampler:
        bank.update(rows, torch.from_numpy(x[rows]))
    assert not len(bank.unseen)
    sampler.set_epoch(1)
    sampler.refresh(bank.vectors)
    ours = ngame.balanced_clusters(x, size=4).coherence(x)
    assert sampler.clusters.coherence(x) == pytest.approx(ours, abs=0.05)


def test_invalid_updates_store_nothing():
    bank = EmbeddingBank(4, 2)
    ones = np.ones((2, 2), np.float32)
    for rows, vectors, error, message in [
        ([0, 4], ones, IndexError, "rows has 4, out of range for 4"),
        ([0, -1], ones, IndexError, "rows has -1, out of range for 4"),
        ([0.0, 1.0], ones, TypeError, "rows has dtype float64"),
        ([[0, 1]], ones, ValueError, "expected one dimension"),
        ([0], ones, ValueError, r"shape \(2, 2\), expected \(1, 2\)"),
        ([0, 1], ones[:, :1], ValueError, r"shape \(2, 1\), expected \(2, 2\)"),
        ([0, 1], ones.astype(int), TypeError, "vectors is of dtype int64, expected floats"),
        ([0, 1], ones.tolist(), TypeError, "vectors is a list, expected a float tensor or array"),
        ([0, 2], np.array([[1, 1], [1, np.nan]]), ValueError, r"vectors\[1\], of row 2, has NaN"),
        ([0, 2], torch.tensor([[torch.inf, 1], [1, 1]]), ValueError, r"vectors\[0\], of row 0"),
    ]:
        with pytest.raises(error, match=message):
            bank.update(rows, vectors)
        assert bank.unseen.tolist() == [0, 1, 2, 3]
        assert not bank.vectors.any()
    with pytest.raises(ValueError, match="n_rows is 0"):
        EmbeddingBank(0, 2)
    with pytest.raises(TypeError, match="dim is a float"):
        EmbeddingBank(2, 2.0)


def test_state_is_restored(rng):
    bank = EmbeddingBank(6, 3)
    bank.update([1, 4], rng.standard_normal((2, 3)))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    state = torch.load(file)  # with weights_only, as by default
    again = EmbeddingBank(6, 3)
    again.load_state_dict(state)
    np.testing.assert_array_equal(again.vectors, bank.vectors)
    assert again.unseen.tolist() == bank.unseen.tolist() == [0, 2, 3, 5]
    state["vectors"][:] = 0  # the caller's array: the bank must have copied it
    assert again.vectors.any()
    with pytest.raises(ValueError, match=r"vectors of shape \(6, 3\), this bank \(6, 4\)"):
        EmbeddingBank(6, 4).load_state_dict(state)
    with pytest.raises(ValueError, match="state lacks seen"):
        EmbeddingBank(6, 3).load_state_dict({"vectors": state["vectors"]})
    older = {name: value.numpy() for name, value in bank.state_dict().items()}
    EmbeddingBank(6, 3).load_state_dict(older)

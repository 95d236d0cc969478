"""Embeddings had beside a training: what must not change by it, and what the refresh needs."""

import doctest
import random
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ngame
from ngame.batches.timer import RefreshTimer
from ngame.encoders import encode as embeddings
from ngame.encoders.bank import EmbeddingBank
from ngame.encoders.encode import encode_rows, evaluating


class Model(torch.nn.Module):
    """Has a layer that is frozen in evaluation mode, and a `train` that does more than its mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(50, 6)
        self.body = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(6))
        self.merged = False
        self.body[1].eval()

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)

    def forward(self, rows):
        return self.body(self.table(torch.as_tensor(rows)))


@pytest.fixture
def model():
    model = Model().train()
    model.body[1].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def seed_all():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)


def draw_of_all():
    return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_restores_every_mode(model, training):
    if not training:
        model.eval()
    before = modes(model)
    assert before == ([True, True, True, True, False] if training else [False] * 5)
    with evaluating(model):
        assert modes(model) == [False] * 5
        assert model.merged
        assert not torch.is_grad_enabled()
    assert modes(model) == before
    assert model.merged is not training
    assert torch.is_grad_enabled()


def test_evaluating_restores_after_an_error(model):
    before = modes(model)
    seed_all()
    expected = draw_of_all()

    def interrupted():
        draw_of_all()
        raise KeyboardInterrupt

    seed_all()
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        interrupted()
    assert modes(model) == before
    assert torch.is_grad_enabled()
    assert draw_of_all() == expected


def test_what_training_draws_next_is_the_same(model):
    seed_all()
    expected = draw_of_all()
    seed_all()
    with evaluating(model), evaluating(model):
        draw_of_all()
    assert draw_of_all() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_random_state_of_cuda(model):
    device = torch.device("cuda")
    torch.manual_seed(1)
    expected = torch.rand(1, device=device)
    torch.manual_seed(1)
    with evaluating(model):
        torch.rand(1, device=device)
    assert torch.equal(torch.rand(1, device=device), expected)


def test_what_a_model_keeps_from_the_block_can_be_trained_with(model):
    """Inference mode would forbid it."""
    with evaluating(model):
        kept = torch.ones(2, 6) * 3
    (model(np.arange(2)) * kept).sum().backward()
    assert model.table.weight.grad.any()


def test_a_training_step_does_not_notice_a_refresh(model):
    """Dropout draws the same masks, and the running means of BatchNorm stay."""

    def step():
        torch.manual_seed(5)
        return model(np.arange(8))

    model.body[1].train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = step()
    model.load_state_dict(state)
    torch.manual_seed(5)
    encode_rows(model, 50, model=model, chunk_size=7)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert torch.equal(model(np.arange(8)), expected)


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1000])
def test_rows_come_back_in_order(model, chunk_size):
    sizes = []

    def encode(rows):
        assert rows.dtype == np.int64
        sizes.append(len(rows))
        return model(rows)

    vectors = encode_rows(encode, 50, model=model, chunk_size=chunk_size)
    assert vectors.dtype == np.float32
    assert vectors.flags.c_contiguous
    with evaluating(model):
        np.testing.assert_allclose(vectors, model(np.arange(50)).numpy(), atol=1e-6)
    assert sizes == [chunk_size] * (50 // chunk_size) + [50 % chunk_size] * (50 % chunk_size > 0)


def test_rows_of_like_length_go_together(model, rng):
    lengths = rng.integers(0, 40, 50)
    chunks = []

    def encode(rows):
        chunks.append(rows)
        return model(rows)

    vectors = encode_rows(encode, 50, model=model, chunk_size=64, lengths=lengths)
    np.testing.assert_array_equal(vectors, encode_rows(model, 50, model=model, chunk_size=1))
    assert (np.diff(lengths[np.concatenate(chunks)]) <= 0).all()
    for rows, after in zip(chunks, [*chunks[1:], []], strict=True):
        longest = max(1, lengths[rows[0]])
        assert len(rows) * longest <= 64
        assert not len(after) or (len(rows) + 1) * longest > 64  # no smaller than it must be
    encode_rows(encode, 3, model=model, chunk_size=2, lengths=[9, 9, 1])  # alone, not never


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_will_do(model, dtype):
    expected = encode_rows(model, 50, model=model)
    np.testing.assert_allclose(
        encode_rows(lambda rows: model(rows).to(dtype), 50, model=model), expected, rtol=0.01
    )
    array = encode_rows(lambda rows: model(rows).double().numpy(), 50, model=model)
    np.testing.assert_array_equal(array, expected)


def test_wrong_encoders(model):
    def fails(encode, error, message, **others):
        with pytest.raises(error, match=message):
            encode_rows(encode, 5, model=model, **others)
        assert modes(model) == [True, True, True, True, False]

    fails(lambda rows: model(rows)[0], ValueError, r"returned shape \(6,\), expected \(5, width\)")
    fails(lambda rows: model(rows[1:]), ValueError, r"shape \(4, 6\), expected \(5, 6\)")
    fails(
        lambda rows: model(rows)[:, : 3 + rows[0] % 2],
        ValueError,
        r"shape \(1, 4\), expected \(1, 3\)",
        chunk_size=1,
    )
    fails(lambda rows: model(rows).tolist(), TypeError, "returned a list, expected a float tensor")
    fails(lambda rows: model(rows).int(), TypeError, "returned of dtype int32, expected floats")
    fails(
        lambda rows: model(rows).masked_fill(torch.as_tensor(rows[:, None] == 3), torch.inf),
        ValueError,
        "returned NaN or infinity for row 3$",
        chunk_size=2,
    )
    fails(model, ValueError, "lengths has 4 rows, n_rows is 5", lengths=[1] * 4)
    fails(model, TypeError, "lengths has dtype float64", lengths=[1.0] * 5)
    fails(model, ValueError, "chunk_size is 0", chunk_size=0)
    with pytest.raises(ValueError, match="n_rows is 0"):
        encode_rows(model, 0, model=model)


# The bank


def test_bank_keeps_directions(rng):
    x = rng.standard_normal((8, 5), dtype=np.float32) * 1000
    x[3] = 0
    bank = EmbeddingBank(10, 5)
    assert len(bank) == 10
    assert bank.unseen.tolist() == list(range(10))
    bank.update(np.arange(8), x)
    np.testing.assert_allclose(bank.vectors[:8], F.normalize(torch.from_numpy(x), dim=1), atol=5e-4)
    assert not bank.vectors[[3, 8, 9]].any()
    assert bank.vectors.dtype == np.float16
    # A zero vector was seen, if it has no direction; a row that was not stored was not.
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


def test_bank_of_a_running_trainer(mixture):
    """Each epoch of batches fills it; the clusters are those of the vectors themselves."""
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


def test_bank_refuses_what_it_cannot_keep():
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


def test_bank_survives_a_restart(rng):
    bank = EmbeddingBank(6, 3)
    bank.update([1, 4], rng.standard_normal((2, 3)))
    state = {name: value.copy() for name, value in bank.state_dict().items()}
    again = EmbeddingBank(6, 3)
    again.load_state_dict(state)
    np.testing.assert_array_equal(again.vectors, bank.vectors)
    assert again.unseen.tolist() == bank.unseen.tolist() == [0, 2, 3, 5]
    state["vectors"][:] = 0  # which is the caller's
    assert again.vectors.any()
    with pytest.raises(ValueError, match=r"vectors of shape \(6, 3\), this bank \(6, 4\)"):
        EmbeddingBank(6, 4).load_state_dict(state)
    with pytest.raises(ValueError, match="state lacks seen"):
        EmbeddingBank(6, 3).load_state_dict({"vectors": state["vectors"]})


# The time


def test_timer(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    timer = RefreshTimer()
    assert timer.share == 0
    now += 7
    timer.start_epoch()
    for seconds in (1, 2):
        with timer:
            now += seconds
        now += 3
    assert (timer.refresh_seconds, timer.seconds, timer.share) == (3, 9, 3 / 9)
    timer.start_epoch()
    assert (timer.refresh_seconds, timer.seconds, timer.share) == (0, 0, 0)


def test_examples_in_docstrings():
    found = doctest.testmod(embeddings)
    assert found.attempted > 0
    assert found.failed == 0

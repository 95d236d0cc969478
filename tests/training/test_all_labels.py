"""Label vectors trained against all labels."""

import numpy as np
import processes
import pytest
import scipy.sparse as sp
import tiny
import torch
import torch.nn.functional as F

import ngame
from ngame.config import Config
from ngame.data.dataset import Dataset
from ngame.loss import CooIndex, decoupled_softmax
from ngame.training import all_labels
from ngame.training.all_labels import AllLabels


@pytest.fixture(params=[1 << 24, 60])
def problem(request, monkeypatch):
    """Points, labels and positives; all labels at once, or in chunks of a few."""
    monkeypatch.setattr(all_labels, "_SCORES_ON_CPU", request.param)
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(9, 12, generator=generator), dim=1)
    vectors = F.normalize(torch.randn(31, 12, generator=generator), dim=1).bfloat16()
    positive = torch.rand(9, 31, generator=generator) < 0.15
    positive[3] = False  # a point without labels
    positive[4] = True  # a point without negatives
    known = CooIndex(*positive.nonzero().T)
    targets = CooIndex(known.rows[::2], known.columns[::2])
    return x, vectors, known, targets


def expected(x, vectors, known, targets, temperature=0.05):
    """The loss, and the gradients of points and labels along the sphere, by autograd."""
    x = x.clone().requires_grad_()
    w = F.normalize(vectors.float(), dim=1).requires_grad_()
    loss = decoupled_softmax(x @ w.T, known, targets, temperature=temperature)
    loss.backward()
    return loss.detach(), x.grad, w.grad - (w.grad * w).sum(1, keepdim=True) * w


def test_loss_and_gradients_are_those_of_the_softmax(problem):
    x, vectors, known, targets = problem
    loss, x_slope, w_slope = expected(*problem)
    labels = AllLabels(vectors)
    x = x.clone().requires_grad_()
    found = labels.step(x, known, targets, 0.1, seed=1)
    found.backward()
    torch.testing.assert_close(found.detach(), loss)
    torch.testing.assert_close(x.grad, x_slope, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(labels.squares, w_slope.square().sum(1), rtol=1e-4, atol=1e-8)
    # The first step has the length of the rate, whatever the gradient's.
    unit = F.normalize(vectors.float(), dim=1).detach()
    moved = F.normalize(unit - 0.1 * F.normalize(w_slope.detach(), dim=1), dim=1)
    assert (labels.vectors.float() - moved).abs().max() < 2**-7
    assert labels.vectors.dtype == torch.bfloat16


def test_a_step_again_is_the_same(problem):
    x, vectors, known, targets = problem
    first, second = AllLabels(vectors), AllLabels(vectors)
    for seed in range(3):
        for labels in (first, second):
            labels.step(x, known, targets, 0.05, seed)
    assert torch.equal(first.vectors, second.vectors)
    other = AllLabels(vectors)
    other.load_state_dict(second.state_dict())
    assert torch.equal(
        other.step(x, known, targets, 0.05, 3), first.step(x, known, targets, 0.05, 3)
    )
    assert torch.equal(other.vectors, first.vectors)


def test_scores_computed_again_give_the_same_bits_as_those_kept(problem, monkeypatch):
    x, vectors, known, targets = problem
    computed = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: computed.append(b.shape) or matmul(a, b)
    )
    found, products = [], []
    for most in (all_labels._KEPT, 31 * (9 + 12), 31 * (9 + 12) - 1):
        monkeypatch.setattr(all_labels, "_KEPT", most)
        labels, again = AllLabels(vectors), x.clone().requires_grad_()
        computed.clear()
        for seed in range(3):
            loss = labels.step(again, known, targets, 0.1, seed)
            loss.backward()
        products.append(len(computed))
        found.append((loss.detach(), again.grad, labels.vectors, labels.squares))
    assert 4 * products[0] == 4 * products[1] == 3 * products[2]
    for kept, at_border, recomputed in zip(*found, strict=True):
        assert torch.equal(kept, at_border)
        assert torch.equal(kept, recomputed)


def test_nothing_is_read_back_from_a_device(problem, monkeypatch):
    """A meta tensor stands for a GPU's: it refuses both other devices and to be read."""
    x, vectors, known, targets = problem
    monkeypatch.setattr(all_labels, "_SCORES", all_labels._SCORES_ON_CPU)
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    labels, x = AllLabels(vectors.to("meta")), x.to("meta").requires_grad_()
    found = labels.step(x, known, targets, 0.1, seed=1)
    found.backward()
    assert found.device.type == x.grad.device.type == "meta"


def test_steps_lower_the_loss(problem):
    x, vectors, known, targets = problem
    labels = AllLabels(vectors)
    losses = [float(labels.step(x, known, targets, 0.1, seed)) for seed in range(30)]
    assert losses[-1] < 0.5 * losses[0]


DEALT = """
    from ngame.loss import CooIndex
    from ngame.ranks import Ranks
    from ngame.training.all_labels import AllLabels
    problem, squares, gradient, loss = torch.load(sys.argv[2])
    x, vectors, known, targets = problem
    ranks = Ranks.all()
    own = ranks.share(len(vectors))
    def part(index):
        rows, columns = index
        within = (columns >= own.start) & (columns < own.stop)
        return CooIndex(rows[within], columns[within] - own.start)
    labels = AllLabels(vectors[own], ranks=ranks)
    x.requires_grad_()
    found = labels.step(x, part(known), part(targets), 0.1, seed=1)
    found.backward()
    torch.testing.assert_close(labels.squares, squares[own])
    torch.testing.assert_close(ranks.sum(x.grad), gradient)
    torch.testing.assert_close(ranks.sum(found.detach()), loss)
"""


@pytest.mark.parametrize("count", [31, 2])
def test_ranks_that_have_some_of_the_labels_each(tmp_path, count):
    """Also one that has none, where there are fewer labels than ranks."""
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(9, 12, generator=generator), dim=1).requires_grad_()
    vectors = F.normalize(torch.randn(count, 12, generator=generator), dim=1).bfloat16()
    positive = torch.rand(9, count, generator=generator) < 0.2
    known = CooIndex(*positive.nonzero().T)
    targets = CooIndex(known.rows[::2], known.columns[::2])
    labels = AllLabels(vectors)
    loss = labels.step(x, known, targets, 0.1, seed=1)
    loss.backward()
    problem = x.detach(), vectors, tuple(known[:2]), tuple(targets[:2])
    torch.save((problem, labels.squares, x.grad, loss.detach()), tmp_path / "problem")
    processes.run(DEALT, tmp_path / "problem", size=3)


def test_nothing_to_learn_changes_nothing():
    vectors = torch.eye(4).bfloat16()
    labels = AllLabels(vectors)
    none = CooIndex(*torch.zeros(2, 0, dtype=torch.int64))
    assert float(labels.step(torch.eye(4), none, none, 0.1, 0)) == 0
    assert torch.equal(labels.vectors, vectors)


def test_rounding_is_right_in_the_mean():
    x = torch.full((200_000,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
    found = all_labels._rounded(x, torch.Generator().manual_seed(0)).float()
    assert set(found.tolist()) == {1, 1 + 2**-7}
    assert float(found.double().mean()) == pytest.approx(1 + 2**-9, abs=3e-5)
    exact = torch.tensor([0.0, -1.5, 3.0])
    assert torch.equal(all_labels._rounded(exact, torch.Generator()).float(), exact)


def test_bytes_of_three_million_labels():
    """2 d + 4 bytes a label: 4.6 GB at a width of 768."""
    labels = AllLabels(torch.randn(10, 768))
    size = sum(value.numel() * value.element_size() for value in labels.state_dict().values())
    assert size * 300_000 < 5e9


def with_a_label_without_points():
    def wider(matrix):
        return sp.hstack([matrix, sp.csr_matrix((matrix.shape[0], 1), dtype=np.float32)]).tocsr()

    plain = tiny.dataset()
    return Dataset(
        train_texts=plain.train_texts,
        test_texts=plain.test_texts,
        label_texts=[*plain.label_texts, "kekeke"],
        train_labels=wider(plain.train_labels),
        test_labels=wider(plain.test_labels),
    )


@pytest.mark.parametrize("finetune", ["false", "true"])
def test_a_run_against_all_labels(tmp_path, finetune):
    data = with_a_label_without_points()
    sets = ("classifier_stage.labels='all'", f"classifier_stage.finetune={finetune}")
    model = ngame.train(data, tiny.config(*sets), folder=tmp_path)
    assert model.metrics["classifier"]["P@1"] > 0.5
    again = ngame.train(data, tiny.config(*sets))
    np.testing.assert_array_equal(model.classifier, again.classifier)
    if finetune == "false":  # it is not pushed away from where the encoder has it
        np.testing.assert_allclose(model.classifier[-1], model.label_vectors[-1], atol=1e-6)
        assert np.abs(model.classifier[0] - model.label_vectors[0]).max() > 1e-3


def test_updates_are_not_gathered():
    with pytest.raises(ValueError, match="accumulate is 2, expected 1 where labels is"):
        Config.load(sets=["classifier_stage.labels=all", "classifier_stage.accumulate=2"])

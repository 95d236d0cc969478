"""Mixed negatives by closed forms, and against mixtures that are really made."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from ngame.negatives import Candidates, ContrastiveLoss, HardMixer, NegativeQueue, mixing


def unit(rng, *shape):
    return normalize(torch.from_numpy(rng.standard_normal(shape)), dim=-1)


def with_query(share, cosine):
    """Score of one negative mixed with the query by a given share."""
    draws = mixing.MixingDraws(torch.zeros(3, 1, 0), torch.tensor([[[0.0]], [[share]]]))
    query = torch.tensor([[1.0, 0.0]])
    negative = torch.tensor([[cosine, math.sqrt(1 - cosine**2)]])
    scores, missing = HardMixer(1, 0, 1).mix(query, negative, torch.zeros(1, 1).bool(), draws)
    assert not missing.any()
    return scores.item()


@pytest.mark.parametrize(
    ("share", "cosine", "score"),
    [(0.4, 0.3, 0.711777006), (0.5, 0.0, 0.707106781), (0.25, 0.0, 0.316227766)],
)
def test_closed_forms(share, cosine, score):
    assert with_query(share, cosine) == pytest.approx(score, rel=1e-6)


def test_mixing_with_the_query_always_makes_harder():
    for cosine in (-0.9, -0.2, 0.0, 0.5, 0.99):
        scores = [with_query(share, cosine) for share in (0.0, 0.1, 0.3, 0.5)]
        assert scores[0] == pytest.approx(cosine)
        assert (np.diff(scores) > 0).all()


@pytest.mark.parametrize("floats", [1, 40, 1 << 22])
def test_against_mixtures_that_are_made(rng, monkeypatch, floats):
    """Scores and gradients of vectors that are mixed, normalised and held constant."""
    monkeypatch.setattr(mixing, "_FLOATS_AT_ONCE", floats)
    queries, negatives = unit(rng, 4, 5).requires_grad_(), unit(rng, 9, 5)
    left_out = torch.from_numpy(rng.random((4, 9)) < 0.3)
    left_out[2] = True
    left_out[2, [3, 7]] = False
    mixer = HardMixer(3, 6, 4, seed=1)
    draws = mixer.draw(4, 0)
    found, missing = mixer.mix(queries, negatives, left_out, draws)
    assert found.shape == (4, 10)
    assert not missing.any()

    made = []
    for row in range(4):
        order = torch.argsort(
            (negatives @ queries[row]).masked_fill(left_out[row], -torch.inf), descending=True
        )
        hard = negatives[order[: min(3, int((~left_out[row]).sum()))]]
        mixtures = []
        for u, v, a in draws.pairs[:, row].T.tolist():
            i = int(np.float32(u) * np.float32(len(hard)))
            j = int(np.float32(v) * np.float32(len(hard) - 1))
            j += j >= i
            mixtures.append(normalize(a * hard[i] + (1 - a) * hard[j], dim=0))
        for u, b in draws.queries[:, row].T.tolist():
            j = int(np.float32(u) * np.float32(len(hard)))
            mixtures.append(normalize(b * queries[row].detach() + (1 - b) * hard[j], dim=0))
        made.append(torch.stack(mixtures) @ queries[row])
    made = torch.stack(made)
    torch.testing.assert_close(found, made, rtol=1e-5, atol=1e-6)
    weights = torch.from_numpy(rng.standard_normal((4, 10)))
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), queries),
        torch.autograd.grad((made * weights).sum(), queries),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_mixture_by_twos_has_two_different_parents(rng):
    """With two negatives there is but one pair, and scores between their cosines."""
    negatives = torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    queries = torch.tensor([[1.0, 0.0]])
    mixer = HardMixer(2, 200, 0)
    scores, _ = mixer.mix(queries, negatives, torch.zeros(1, 2).bool(), mixer.draw(1, 0))
    assert scores.min() >= 0
    assert scores.max() <= 0.6 + 1e-6
    inner = (scores > 1e-4) & (scores < 0.6 - 1e-4)
    assert inner.float().mean() > 0.95


def test_too_few_negatives(rng):
    queries, negatives = unit(rng, 3, 4), unit(rng, 5, 4)
    left_out = torch.ones(3, 5).bool()
    left_out[1, 2] = left_out[2, 0] = left_out[2, 1] = False
    mixer = HardMixer(4, 2, 1)
    scores, missing = mixer.mix(queries, negatives, left_out, mixer.draw(3, 0))
    assert missing.tolist() == [[True] * 3, [True, True, False], [False] * 3]
    assert torch.isfinite(scores).all()
    _, missing = mixer.mix(queries, negatives[:0], left_out[:, :0], mixer.draw(3, 0))
    assert missing.tolist() == [[True] * 3] * 3


def queue_of(rng, rows):
    queue = NegativeQueue(rows, 4)
    queue.push(np.arange(rows) + 10, unit(rng, rows, 4).float())
    return queue.offer()


def test_in_the_loss(rng):
    """More negatives make it higher, from their first steps on; chunks change nothing."""
    x, z = unit(rng, 3, 4).float(), unit(rng, 3, 4).float().requires_grad_()
    batch = Candidates([0, 1, 2], x), Candidates([0, 1, 2], z)
    queue = queue_of(rng, 6)

    def loss(mixer=None, step=0, **options):
        made = ContrastiveLoss(temperature=0.2, mixer=mixer, **options)
        return made(*batch, sources=[queue], step=step)

    plain = loss()
    mixer = HardMixer(4, 5, 3, start=(2, 4))
    assert loss(mixer, 1).item() == plain.item()
    first, both = loss(mixer, 2), loss(mixer, 4)
    assert plain < first
    assert loss(HardMixer(4, 5, 0), 4) < both
    assert loss(mixer, 4).item() == both.item()
    assert loss(mixer, 5).item() != both.item()
    assert loss(HardMixer(4, 0, 0)).item() == plain.item()
    for rows in (1, 2):
        assert loss(mixer, 4, rows_at_once=rows).item() == pytest.approx(both.item(), rel=1e-6)


@pytest.mark.parametrize(("options", "most"), [({}, 0.5), ({"max_share": 0.2}, 0.2)])
def test_the_negative_outweighs_the_query(options, most):
    (shares,) = HardMixer(1, 0, 500, **options).draw(1, 0).queries[1]
    assert 0.9 * most < shares.max() <= most
    assert shares.min() < 0.1 * most


def test_what_a_source_offers_is_mixed_too():
    """Here a queue's vector, the only negative there is."""
    queue = NegativeQueue(2, 2)
    queue.push([9], torch.tensor([[0.8, 0.6]]))
    batch = Candidates([0], torch.tensor([[1.0, 0]])), Candidates([0], torch.tensor([[0.6, 0.8]]))
    mixer = HardMixer(1, 0, 1, seed=3)
    found = ContrastiveLoss(temperature=1.0, mixer=mixer)(*batch, sources=[queue.offer()])
    share = float(mixer.draw(1, 0).queries[1])
    mixed = share * np.array([1, 0]) + (1 - share) * np.array([0.8, 0.6])
    hard = mixed[0] / np.linalg.norm(mixed)
    expected = np.log1p(np.exp(0.8 - 0.6) + np.exp(hard - 0.6))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_mixtures_move_neither_the_negatives_nor_the_query_inside(rng):
    """The gradient of the batch's items is that of a loss with constant extra logits."""
    x, z = unit(rng, 3, 4).requires_grad_(), unit(rng, 3, 4).requires_grad_()
    mixer = HardMixer(2, 3, 2)
    loss = ContrastiveLoss(temperature=0.5, mixer=mixer)
    value = loss(Candidates([0, 1, 2], x), Candidates([0, 1, 2], z))
    in_x, in_z = torch.autograd.grad(value, [x, z])
    logits = x @ z.T / 0.5
    extra, _ = mixer.mix(x, z, torch.eye(3).bool(), mixer.draw(3, 0))
    whole = torch.cat([logits, extra.detach() / 0.5], dim=1)
    by_hand = torch.nn.functional.cross_entropy(whole, torch.arange(3))
    torch.testing.assert_close(torch.autograd.grad(by_hand, z)[0], in_z, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(torch.autograd.grad(
        torch.nn.functional.cross_entropy(
            torch.cat([x @ z.T / 0.5, extra.detach() / 0.5], dim=1), torch.arange(3)
        ), x)[0], in_x)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardest": 0}, "hardest"),
        ({"pairs": -1}, "pairs"),
        ({"max_share": 0.6}, "max_share is 0.6"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        HardMixer(**({"hardest": 1, "pairs": 1, "queries": 1} | options))

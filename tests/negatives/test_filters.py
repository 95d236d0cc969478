"""What each filter leaves out, entry by entry."""

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from ngame.negatives import (
    Candidates,
    Comparison,
    ContrastiveLoss,
    Guide,
    KnownPositives,
    NearCopies,
    Schedule,
    SelfGuide,
    filters,
)


def comparison(ids, *, scores=None, positives=(0, 1), owners=None, queries=(0, 1), **changed):
    """Two queries, with a positive each, against candidates."""
    ids = np.asarray(ids, np.int64)
    owners = np.arange(len(positives)) if owners is None else np.asarray(owners)
    shape = (len(queries), ids.shape[-1])
    options = {
        "anchor": "query",
        "candidate": "item",
        "queries": np.asarray(queries, np.int64),
        "positives": np.asarray(positives, np.int64),
        "owners": owners,
        "ids": ids,
        "scores": torch.zeros(shape) if scores is None else torch.tensor(scores),
        "positive_scores": torch.zeros(len(positives)),
    }
    return Comparison(**(options | changed))


def test_a_mask_is_made_where_the_scores_are(monkeypatch):
    """Positions are sent there, not the whole of it."""
    sizes = []

    def spy(host, device):
        sizes.append(host.numel())
        return host.to(device)

    monkeypatch.setattr(filters, "sent", spy)
    found = comparison([4, 5, 6]).mask(np.array([0, 1, 1]), np.array([2, 0, 0]))
    assert found.tolist() == [[False, False, True], [True, False, False]]
    assert sizes == [3, 3]
    nowhere = comparison([4, 5, 6]).mask(np.empty(0, int), np.empty(0, int))
    assert not nowhere.any()


# Known positives


@st.composite
def triples(draw):
    """A knowledge graph's (head, relation) rows with tails, a batch of them, some candidates."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    facts = rng.random((6, 7)) < 0.3
    facts[np.arange(6), rng.integers(7, size=6)] = True
    rows = rng.integers(6, size=draw(st.integers(1, 6)))
    tails = np.array([rng.choice(np.flatnonzero(facts[row])) for row in rows])
    return facts, rows, tails, rng.integers(-2, 7, size=draw(st.integers(0, 8)))


@given(triples(), st.booleans())
def test_known_positives_by_the_rule_of_simkgc(case, listed):
    """A column is masked where it is any training tail of the row's head and relation."""
    facts, rows, tails, ids = case
    found = KnownPositives(sp.csr_matrix(facts.astype(np.float32)))(
        comparison(
            np.tile(ids, (len(rows), 1)) if listed else ids,
            queries=rows,
            positives=tails,
        )
    )
    expected = [[id_ >= 0 and facts[row, id_] for id_ in ids] for row in rows]
    np.testing.assert_array_equal(found, np.array(expected, bool).reshape(len(rows), len(ids)))


@given(triples(), st.sampled_from(["query", "item"]), st.booleans())
def test_queries_that_know_the_positive(case, anchor, listed):
    facts, rows, tails, ids = case
    ids = np.minimum(ids, 5)
    found = KnownPositives(sp.csr_matrix(facts.astype(np.float32)))(
        comparison(
            np.tile(ids, (len(rows), 1)) if listed else ids,
            queries=rows,
            positives=tails,
            anchor=anchor,
            candidate="query",
        )
    )
    expected = [[id_ >= 0 and facts[id_, tail] for id_ in ids] for tail in tails]
    np.testing.assert_array_equal(found, np.array(expected, bool).reshape(len(rows), len(ids)))


def test_stored_zeros_are_positives_and_the_callers_matrix_stays():
    labels = sp.csr_matrix((np.zeros(3), np.array([2, 0, 2]), np.array([0, 3])), (1, 3))
    before = labels.indices.copy()
    for ids in ([0, 1, 2], [[0, 1, 2]]):
        found = KnownPositives(labels)(comparison(ids, queries=[0], positives=[0]))
        assert found.tolist() == [[True, False, True]]
    np.testing.assert_array_equal(labels.indices, before)


def test_known_positives_out_of_range():
    known = KnownPositives(sp.csr_matrix(np.eye(3, dtype=np.float32)))
    for ids in ([3], [[3], [3]]):
        with pytest.raises(IndexError, match=r"^item id 3 is out of range for 3 of the known posi"):
            known(comparison(ids))
    with pytest.raises(TypeError, match="labels"):
        KnownPositives(np.eye(3))


# Guides


ITEMS = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1]], np.float32)


@pytest.mark.parametrize(
    ("margin", "mode", "left_out"),
    [
        # Scores of the query (0.8, 0.6) with the items: 0.8, 1, 0.96, 0.6; its positive has 0.96.
        (0.0, "absolute", [0, 1, 0, 0]),
        (0.2, "absolute", [1, 1, 1, 0]),
        (-0.05, "absolute", [0, 0, 0, 0]),
        (0.05, "relative", [0, 1, 1, 0]),
        (0.5, "relative", [1, 1, 1, 1]),
        (-math.inf, "relative", [0, 0, 0, 0]),
        (Schedule({0: -math.inf, 5: 0.2}), "absolute", [1, 1, 1, 0]),
    ],
)
@pytest.mark.parametrize("kind", [np.array, np.float16, torch.tensor])
@pytest.mark.parametrize("listed", [False, True])
def test_guide(margin, mode, left_out, kind, listed):
    """The positive's own column is masked by a margin: its score is not in the comparison."""
    queries = np.array([[0.8, 0.6]], np.float32)
    guide = Guide(kind(queries), kind(ITEMS), margin=margin, mode=mode)
    ids = [0, 1, 2, 3, -2, -1]
    seen = comparison([ids] if listed else ids, queries=[0], positives=[2], step=5)
    if kind is np.float16 and margin == 0.0:
        return  # equal scores are a matter of rounding there
    assert guide(seen)[0].tolist() == [*map(bool, left_out), False, False]


def test_a_relative_margin_below_a_negative_score():
    """The bound lies below the positive's score whatever its sign."""
    guide = Guide(
        np.array([[-1.0, 0]]), np.array([[0.5, 0], [0.52, 0]]), margin=0.1, mode="relative"
    )
    assert guide(comparison([0, 1], queries=[0], positives=[0])).tolist() == [[True, True]]
    guide.margin = 0.0
    assert guide(comparison([0, 1], queries=[0], positives=[0])).tolist() == [[False, False]]


def test_of_several_positives_the_lowest_counts():
    guide = Guide(np.array([[1.0, 0]]), ITEMS)
    found = guide(comparison([0, 1, 2, 3], queries=[0], positives=[0, 2], owners=[0, 0]))
    assert found.tolist() == [[True, True, False, False]]
    none = guide(comparison([0, 1], queries=[0], positives=[]))
    assert none.tolist() == [[False, False]]


def test_a_guide_that_knows_the_labels_masks_as_the_labels_do(rng):
    """Its scores are 1 for positives and 0 else; a margin makes its ties count."""
    labels = (rng.random((5, 6)) < 0.4).astype(np.float32)
    labels[:, 0] = 1
    guide = Guide(np.eye(5, dtype=np.float32), labels.T.copy(), margin=0.5)
    seen = comparison(np.arange(6), queries=np.arange(5), positives=[0] * 5)
    np.testing.assert_array_equal(guide(seen), KnownPositives(sp.csr_matrix(labels))(seen))


def test_bad_guides():
    with pytest.raises(ValueError, match="mode is 'share'"):
        Guide(ITEMS, ITEMS, mode="share")
    with pytest.raises(ValueError, match="widths differ"):
        Guide(ITEMS, ITEMS[:, :1])
    with pytest.raises(IndexError, match="id 4 is out of range for 4"):
        Guide(ITEMS, ITEMS)(comparison([4]))

    with pytest.raises(TypeError, match="items is a list, expected an array or tensor"):
        Guide(ITEMS, ITEMS.tolist())
    damaged = ITEMS.copy()
    damaged[2, 1] = np.nan
    with pytest.raises(ValueError, match="the vector of id 2 has NaN or infinity"):
        Guide(ITEMS, damaged)(comparison([0, 2]))


def test_self_guide():
    guide = SelfGuide()  # 0.1
    seen = comparison(
        [5, 6, 7],
        scores=[[0.5, 0.65, 0.61], [0.2, 0.29, 0.31]],
        positive_scores=torch.tensor([0.52, 0.2]),
    )
    assert guide(seen).tolist() == [[False, True, False], [False, False, True]]


def test_near_copies():
    copies = NearCopies(ITEMS, 0.9)
    # Item 1 and item 2 are near each other (0.96), no others.
    seen = comparison([0, 1, 2, 3, -2], positives=[2, 3])
    assert copies(seen).tolist() == [[False, True, True, False, False], [False] * 3 + [True, False]]
    # What has no id is no item, the first one least of all.
    no_ids = comparison([0, -2, -1], queries=[0], positives=[0])
    assert copies(no_ids).tolist() == [[True, False, False]]
    by_default = NearCopies(np.array([[1, 0], [0.94, 0.342], [0.96, 0.28]], np.float32))
    near = by_default(comparison([0, 1, 2], queries=[0], positives=[0]))
    assert near.tolist() == [[True, False, True]]
    several = comparison([[0, 1], [1, 3]], positives=[0, 3, 2], owners=[0, 1, 1])
    assert copies(several).tolist() == [[True, False], [True, True]]
    turned = comparison([0, 1, 2, 3], queries=[0, 0], positives=[0, 3], owners=[1, 0])
    assert copies(turned).tolist() == [[False] * 3 + [True], [True] + [False] * 3]
    queries = comparison([0, 1], candidate="query")
    assert not copies(queries).any()


@pytest.mark.parametrize("threshold", [0, -0.5, math.nan, 80, 1.5])
def test_bad_thresholds(threshold):
    with pytest.raises(ValueError, match=f"threshold is {threshold}, expected a cosine above 0"):
        NearCopies(ITEMS, threshold)
    NearCopies(ITEMS, Schedule({0: math.inf, 100: 0.8}))  # off at first


def test_near_copies_want_unit_vectors():
    half = NearCopies(ITEMS.astype(np.float16), 0.9)
    assert half(comparison([0, 1, 2, 3], positives=[2, 3])).sum() == 3
    longer = ITEMS * np.array([[1], [1], [3], [0]], np.float32)  # the last of an empty text
    copies = NearCopies(longer, 0.9)
    assert not copies(comparison([3], positives=[0, 1])).any()
    with pytest.raises(ValueError, match=r"items\[2\] has length 3, expected vectors of unit len"):
        copies(comparison([0, 2], positives=[0, 1]))
    longer[2] = np.nan
    with pytest.raises(ValueError, match="the vector of id 2 has NaN or infinity"):
        copies(comparison([0], positives=[2, 1]))
    with pytest.raises(ValueError, match=r"items has shape \(4,\), expected two dimensions"):
        NearCopies(ITEMS[:, 0])


# Together


def test_filters_compose_by_or_and_each_reports_its_share():
    scores = torch.tensor([[0.5, 0.6, 0.4], [0.3, 0.5, 0.45]])
    queries, items = Candidates([0, 1], torch.eye(2)), Candidates([0, 1, 2], scores.T)
    known = sp.csr_matrix(np.array([[1, 1, 0], [0, 1, 0]], np.float32))
    loss = ContrastiveLoss(temperature=1.0, filters=[KnownPositives(known), SelfGuide(-0.1)])
    found = loss(queries, items)
    # Of four entries the first filter takes (0, 1); the second one takes it as well, and (1, 2).
    assert loss.masked_shares == [1 / 4, 2 / 4]
    expected = (math.log1p(math.exp(-0.1)) + math.log1p(math.exp(-0.2))) / 2
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_injected_false_negatives_are_caught(rng):
    """A fifth of the rows have a near copy of another row's positive as theirs."""
    rows = 200
    vectors = rng.standard_normal((rows, 32))
    copied = np.arange(0, rows, 5)
    vectors[copied] = vectors[copied + 1] + 0.05 * rng.standard_normal((len(copied), 32))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    noisy = vectors + 0.02 * rng.standard_normal(vectors.shape)
    guide = Guide(noisy, vectors, margin=0.05, mode="relative")
    ids = np.arange(rows)
    found = guide(comparison(ids, queries=ids, positives=ids)).numpy()
    truth = np.zeros((rows, rows), bool)
    truth[copied, copied + 1] = truth[copied + 1, copied] = True
    found[ids, ids] = False
    assert (found & truth).sum() >= 0.95 * truth.sum()
    assert (found & truth).sum() >= 0.95 * found.sum()

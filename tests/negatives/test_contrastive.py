"""The contrastive loss by closed forms, and against a slow twin that loops over pairs."""

import math
from itertools import chain

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from ngame.loss import CooIndex, decoupled_softmax
from ngame.negatives import (
    Candidates,
    ContrastiveLoss,
    Guide,
    HardMixer,
    KnownPositives,
    NearCopies,
    NegativeQueue,
    Progressive,
    Schedule,
    SelfGuide,
    batch_labels,
)

BOTH_WAYS = ("query_to_item", "item_to_query")
GISTEMBED = ("query_to_item", "query_to_query", "item_to_item")
ALL = (*GISTEMBED, "item_to_query")


def from_cosines(cosines):
    """Queries and items, doubles, whose dot products are these; the queries a basis."""
    cosines = torch.tensor(cosines, dtype=torch.float64)
    rows, columns = cosines.shape
    return (
        Candidates(np.arange(rows), torch.eye(rows, dtype=torch.float64)),
        Candidates(np.arange(columns), cosines.T.clone()),
    )


def from_gram(gram):
    """Two queries and two items with these dot products among all four."""
    values, vectors = np.linalg.eigh(np.array(gram))
    assert values.min() > 0
    return (vectors * np.sqrt(values)).reshape(2, 2, 4)


def toy_of_gistembed():
    queries, items = from_gram([[1, 0.3, 0.8, 0.6], [0.3, 1, 0.2, 0.7], [0.8, 0.2, 1, 0.4],
                                [0.6, 0.7, 0.4, 1]])  # fmt: skip
    # The guide's vectors are no unit vectors: those of length one with these products do not exist.
    guide = from_gram([[1.1, 0.2, 0.9, 0.95], [0.2, 1.1, 0.1, 0.6], [0.9, 0.1, 1.1, 0.65],
                       [0.95, 0.6, 0.65, 1.1]])  # fmt: skip
    batch = [Candidates([0, 1], torch.from_numpy(x)) for x in (queries, items)]
    return batch, Guide(*guide)


# Closed forms


@pytest.mark.parametrize(
    ("cosines", "options", "value"),
    [
        ([[0.5, 0.2], [0.1, 0.6]], {"temperature": 1 / 20}, 0.001260542),
        ([[0.5, 0.2], [0.1, 0.6]], {"temperature": 1 / 20, "hardness": 9}, 0.007497957),
        ([[0.8, 0.6], [0.2, 0.7]], {"temperature": 1 / 2, "directions": BOTH_WAYS}, 0.421924569),
        (
            [[0.8, 0.6], [0.2, 0.7]],
            {"temperature": 1 / 2, "directions": BOTH_WAYS, "label_smoothing": 0.1},
            0.456924569,
        ),
        ([[0.5, 0.2], [0.1, 0.6]], {"temperature": 0.05, "margin": 0.02}, 0.001879385),
    ],
)
@pytest.mark.parametrize("learned", [False, True])
def test_closed_forms(cosines, options, value, learned):
    loss = ContrastiveLoss(**options, learned=learned)
    assert loss(*from_cosines(cosines)).item() == pytest.approx(value, rel=1e-5)


def test_simkgc_with_an_earlier_batch_and_the_point_itself():
    queries, items = from_cosines([[0.5, 0.2], [0.1, 0.6]])
    queue = NegativeQueue(1, 2)
    queue.push([5], torch.tensor([[0.3, 0.4]]))
    earlier = queue.offer(weight=0.5)
    earlier = Candidates(earlier.ids, earlier.vectors.double(), earlier.weight)
    itself = Candidates([[6], [7]], torch.tensor([[[0.25, 0.0]], [[0.0, 0.15]]]).double())
    loss = ContrastiveLoss(temperature=0.05, margin=0.02)
    found = loss(queries, items, sources=[earlier, itself])
    assert found.item() == pytest.approx(0.007874525, rel=1e-5)
    # Where the point itself, or the earlier batch, holds a known positive, it is left out.
    known = np.zeros((2, 8), np.float32)
    known[0, [5, 6]] = known[1, [5, 7]] = 1
    masked = ContrastiveLoss(
        temperature=0.05, margin=0.02, filters=[KnownPositives(sp.csr_matrix(known))]
    )
    found = masked(queries, items, sources=[earlier, itself])
    assert found.item() == pytest.approx(0.001879385, rel=1e-5)
    assert masked.masked_shares == [4 / 6]


def test_gistembed_with_and_without_its_guide():
    batch, guide = toy_of_gistembed()
    unguided = ContrastiveLoss(temperature=0.5, directions=GISTEMBED, joint=True)
    assert unguided(*batch).item() == pytest.approx(0.886249432, rel=1e-5)
    guided = ContrastiveLoss(temperature=0.5, directions=GISTEMBED, joint=True, filters=[guide])
    assert guided(*batch).item() == pytest.approx(0.597301480, rel=1e-5)
    assert guided.masked_shares == [2 / 6]
    guide.margin = -math.inf  # no score is above that
    assert guided(*batch).item() == unguided(*batch).item()
    assert guided.masked_shares == [0]


def test_gistembed_where_query_and_positive_are_one_text():
    """The guide says exactly 1 for both the pair and a diagonal: the diagonal stays out."""
    x = torch.eye(2)
    batch = Candidates([0, 1], x), Candidates([0, 1], x)
    loss = ContrastiveLoss(
        temperature=0.01, directions=GISTEMBED, joint=True, filters=[Guide(x, x)]
    )
    # Of each row three cosines of 0 are compared with one of 1.
    assert loss(*batch).item() == pytest.approx(math.log1p(3 * math.exp(-100)), abs=1e-30)


@pytest.mark.parametrize("columns", [2, 7, 100])
def test_orthogonal_vectors_pay_the_logarithm_of_their_number(columns):
    x = torch.eye(columns + 2)
    queries, items = Candidates([0, 1], x[:2]), Candidates(np.arange(columns), x[2:])
    assert ContrastiveLoss()(queries, items).item() == pytest.approx(math.log(columns), rel=1e-6)


# Against a loop over pairs


def slow(queries, items, targets, sources, known, *, directions, joint, scale, margin, smoothing):
    """The definition, pair by pair, with Python's floats."""
    own = {}
    for row, column in targets:
        own.setdefault(queries.ids[row], set()).add(items.ids[column])

    def logits(direction, row, column):
        anchor, _, candidate = direction.partition("_to_")
        vector = queries.vectors[row] if anchor == "query" else items.vectors[column]
        query, positive = queries.ids[row], items.ids[column]
        offered = [(items if candidate == "item" else queries, None)]
        if direction == "query_to_item":
            offered += [(source, row) for source in sources]
        for source, place in offered:
            for number in range(len(source)):
                own_list = place is not None and not source.shared
                where = (row, number) if own_list else (number,)
                id_ = source.ids[where]
                if id_ == -1:
                    continue
                if candidate == "item":
                    if id_ in own[query] or (id_ >= 0 and known[query, id_]):
                        continue
                else:
                    theirs = own.get(id_, set())
                    positives = {positive}
                    if anchor == "query":
                        positives = {items.ids[c] for r, c in targets if r == row}
                    if id_ == query or theirs & positives or known[id_, list(positives)].any():
                        continue
                shift = 0.0 if source.shift is None else source.shift[where].item()
                yield scale * source.weight * (vector @ source.vectors[where]).item() + shift

    by_row = {}
    for row, column in targets:
        p = scale * ((queries.vectors[row] @ items.vectors[column]).item() - margin)
        groups = [list(logits(direction, row, column)) for direction in directions]
        if joint:
            groups = [list(chain(*groups))]
            # As in GTE: the positive counts in both directions between queries and items.
            groups[0] += [p] if set(BOTH_WAYS) <= set(directions) else []
        for number, found in enumerate(groups):
            everything = [p, *found]
            total = math.log(sum(math.exp(value) for value in everything))
            nll, spread = total - p, total - sum(everything) / len(everything)
            by_row.setdefault((number, row), []).append((1 - smoothing) * nll + smoothing * spread)
    groups = {number for number, _ in by_row}
    each = [
        np.mean([np.mean(pays) for (which, _), pays in by_row.items() if which == number])
        for number in groups
    ]
    return np.mean(each) if each else 0.0


@st.composite
def whole_batches(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, columns, width = draw(st.integers(1, 5)), draw(st.integers(1, 5)), 3

    def vectors(*shape):
        return torch.from_numpy(rng.standard_normal((*shape, width))).requires_grad_()

    queries = Candidates(rng.integers(6, size=rows), vectors(rows))
    items = Candidates(rng.integers(8, size=columns), vectors(columns))
    matrix = sp.csr_matrix(rng.random((rows, columns)) < 0.4)
    count = draw(st.integers(0, 4))
    own_ids = rng.integers(-2, 8, size=(rows, 2))
    sources = [
        Candidates(rng.integers(-2, 8, size=count), vectors(count), weight=0.5),
        Candidates(own_ids, vectors(rows, 2), shift=torch.from_numpy(rng.random((rows, 2)))),
    ]
    known = rng.random((6, 8)) < 0.2
    return queries, items, CooIndex.of(matrix), sources, known


@given(
    whole_batches(),
    st.sampled_from([ALL, GISTEMBED, BOTH_WAYS, ("query_to_item",)]),
    st.booleans(),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from([None, 1, 2]),
)
def test_equal_to_the_slow_one(batch, directions, joint, smoothing, at_once):
    queries, items, targets, sources, known = batch
    loss = ContrastiveLoss(
        temperature=0.5,
        margin=0.1,
        label_smoothing=smoothing,
        directions=directions,
        joint=joint,
        filters=[KnownPositives(sp.csr_matrix(known.astype(np.float32)))],
        rows_at_once=at_once,
    )
    found = loss(queries, items, targets, sources)
    pairs = list(zip(targets.rows.tolist(), targets.columns.tolist(), strict=True))
    expected = slow(
        *(queries, items, pairs, sources, known),
        **dict(directions=directions, joint=joint, scale=2.0, margin=0.1, smoothing=smoothing),
    )
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@given(whole_batches(), st.sampled_from([ALL, ("query_to_item",)]), st.integers(1, 3))
def test_chunks_give_the_gradients_of_the_whole(batch, directions, at_once):
    queries, items, targets, sources, known = batch
    leaves = [each.vectors for each in (queries, items, *sources)]
    gradients, shares = [], []
    for rows in (None, at_once):
        loss = ContrastiveLoss(
            temperature=0.3,
            learned=True,
            label_smoothing=0.1,
            directions=directions,
            filters=[KnownPositives(sp.csr_matrix(known.astype(np.float32))), SelfGuide(0.5)],
            rows_at_once=rows,
        )
        value = loss(queries, items, targets, sources)
        gradients.append(torch.autograd.grad(value, [*leaves, loss.log_scale], allow_unused=True))
        shares.append(loss.masked_shares)
    assert shares[0] == shares[1]
    for whole, chunked in zip(*gradients, strict=True):
        zero = torch.zeros(())  # of what is met nowhere, which one of the two may leave out
        torch.testing.assert_close(
            *(zero if each is None or not each.any() else each for each in (chunked, whole)),
            rtol=1e-6,
            atol=1e-6,
        )


def test_the_decoupled_softmax_over_batch_and_shared_labels(rng):
    labels = sp.csr_matrix((rng.random((30, 40)) < 0.1).astype(np.float32))
    rows = rng.choice(30, 12, replace=False)
    pool, known, targets = batch_labels(labels, rows, shared=np.arange(0, 40, 3))
    x, z = (
        torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((n, 8))), dim=1)
        for n in (12, len(pool))
    )
    expected = decoupled_softmax(x @ z.T, known, targets, temperature=0.05)
    loss = ContrastiveLoss(temperature=0.05, filters=[KnownPositives(labels)])
    found = loss(Candidates(rows, x), Candidates(pool, z), targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_torchs_cross_entropy_where_nothing_is_left_out(rng, smoothing):
    queries = Candidates(np.arange(4), torch.from_numpy(rng.standard_normal((4, 3))))
    items = Candidates(np.arange(6), torch.from_numpy(rng.standard_normal((6, 3))))
    logits = queries.vectors @ items.vectors.T / 0.7
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(4), label_smoothing=smoothing)
    found = ContrastiveLoss(temperature=0.7, label_smoothing=smoothing)(queries, items)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def distance(x, y):
    return -torch.cdist(x, y)


@given(whole_batches(), st.sampled_from([None, 1, 2]))
def test_a_similarity_of_the_callers(batch, at_once):
    """Dot products are what the default has; distances are those of the pairs."""
    queries, items, targets, sources, _ = batch
    given = dict(directions=ALL, temperature=0.5, rows_at_once=at_once)
    plain = ContrastiveLoss(**given)(queries, items, targets, sources)
    dots = ContrastiveLoss(**given, similarity=lambda x, y: x @ y.T)
    torch.testing.assert_close(dots(queries, items, targets, sources), plain)


def test_distances():
    queries = Candidates([0, 1], torch.tensor([[0.0], [1.0]]))
    items = Candidates([0, 1], torch.tensor([[0.5], [3.0]]))
    lists = Candidates([[7], [8]], torch.tensor([[[1.0]], [[1.0]]]))
    loss = ContrastiveLoss(temperature=1.0, similarity=distance)
    first = math.exp(-3 + 0.5) + math.exp(-1 + 0.5)
    second = math.exp(-0.5 + 2) + math.exp(0 + 2)
    expected = (math.log1p(first) + math.log1p(second)) / 2
    assert loss(queries, items, sources=[lists]).item() == pytest.approx(expected, rel=1e-6)


def test_a_similarity_need_not_be_symmetric():
    """Queries come first, whatever the direction."""
    queries, items = from_cosines([[0.5, 0.2], [0.1, 0.6]])
    scores = torch.tensor([[0.5, 0.2], [0.1, 0.6]]).double()
    table = torch.zeros(4, 4).double()
    table[:2, 2:] = scores
    one = (
        Candidates([0, 1], torch.eye(4)[:2].double()),
        Candidates([0, 1], torch.eye(4)[2:].double()),
    )
    given = dict(directions=BOTH_WAYS, temperature=1.0)
    found = ContrastiveLoss(**given, similarity=lambda x, y: x @ table @ y.T)(*one)
    assert found.item() == pytest.approx(ContrastiveLoss(**given)(queries, items).item(), rel=1e-6)


def test_hardness_of_mined_negatives_and_of_others():
    queries, items = from_cosines([[0.5, 0.2, 0.3, 0.4], [0.1, 0.6, 0.35, 0.45]])
    items = Candidates(items.ids, items.vectors, rows=np.array([0, 1, 0, 1]))
    own, other = [[0.3], [0.45]], [[0.2, 0.4], [0.1, 0.35]]

    def expected(mined, others):
        pays = [
            math.log1p(
                sum(math.exp(score * (1 + mined) - p) for score in own[row])
                + sum(math.exp(score * (1 + others) - p) for score in other[row])
            )
            for row, p in enumerate([0.5, 0.6])
        ]
        return pytest.approx(sum(pays) / 2, rel=1e-6)

    for options, mined, others in [
        ({"hardness": 3}, 3, 3),
        ({"hardness": 3, "mined_hardness": 0}, 0, 3),
        ({"mined_hardness": 5}, 5, 0),
        ({}, 0, 0),
    ]:
        for at_once in (None, 1):
            loss = ContrastiveLoss(temperature=1.0, rows_at_once=at_once, **options)
            assert loss(queries, items).item() == expected(mined, others)
    # A list of the row's own is mined for it, too.
    listed = Candidates([[2], [3]], items.vectors[[2, 3], None])
    apart = Candidates([0, 1], items.vectors[:2])
    loss = ContrastiveLoss(temperature=1.0, mined_hardness=5)
    pays = [
        math.log1p(math.exp(score * 6 - p) + math.exp(other - p))
        for score, p, other in ((0.3, 0.5, 0.2), (0.45, 0.6, 0.1))
    ]
    assert loss(queries, apart, sources=[listed]).item() == pytest.approx(sum(pays) / 2, rel=1e-6)


def test_hardness_is_of_queries_and_items_and_has_no_gradient():
    queries, items = from_cosines([[0.5, 0.2], [0.1, 0.6]])
    for direction in set(ALL) - {"query_to_item"}:
        plain, hard = (
            ContrastiveLoss(directions=[direction], hardness=strength)(queries, items)
            for strength in (0, 9)
        )
        assert plain.item() == hard.item()
    x = queries.vectors.clone().requires_grad_()
    value = ContrastiveLoss(temperature=0.5, hardness=3)(Candidates([0, 1], x), items)
    logits = x @ items.vectors.T / 0.5
    constant = 1.5 * logits.detach() * (1 - torch.eye(2))
    by_hand = torch.nn.functional.cross_entropy(logits + constant, torch.arange(2))
    assert value.item() == pytest.approx(by_hand.item(), rel=1e-6)
    found, expected = (torch.autograd.grad(one, x)[0] for one in (value, by_hand))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_positive_is_not_compared_with_what_was_mined_for_its_row():
    x = torch.eye(4)
    queries = Candidates([0, 1], x[:2])
    for rows, compared in ((None, 3), ([0, 1, 0, 1], 2)):
        items = Candidates([0, 1, 2, 3], x, rows=None if rows is None else np.array(rows))
        loss = ContrastiveLoss(directions=("item_to_item",), temperature=1.0)
        expected = math.log1p(compared * math.exp(-1))
        assert loss(queries, items).item() == pytest.approx(expected, rel=1e-6)


def test_queries_without_a_label_are_candidates_only(rng):
    """As those of other processes are: the loss is the mean over the labelled ones."""
    x, z = (torch.from_numpy(rng.standard_normal((6, 4))) for _ in range(2))
    queries, items = Candidates(np.arange(6), x), Candidates(np.arange(6), z)
    rows = torch.tensor([2, 3])
    parts = [
        ContrastiveLoss(directions=ALL, temperature=1.0, rows_at_once=at_once)(
            queries, items, CooIndex(rows, rows)
        ).item()
        for at_once in (None, 1)
    ]
    each = [
        ContrastiveLoss(directions=ALL, temperature=1.0)(
            queries, items, CooIndex(*torch.tensor([[row], [row]]))
        ).item()
        for row in (2, 3)
    ]
    assert parts == pytest.approx([sum(each) / 2] * 2, rel=1e-6)


# What is left out


def test_nothing_is_compared_with_its_own_older_copy():
    queries, items = from_cosines([[0.5, 0.2], [0.1, 0.6]])
    queue = NegativeQueue(4, 2)
    queue.push([0, 1], torch.full((2, 2), 0.99))
    own = queue.offer()
    alone = ContrastiveLoss()(queries, items).item()
    copies = Candidates(own.ids, own.vectors.double())
    found = ContrastiveLoss()(queries, items, sources=[copies]).item()
    # Each row meets the other's copy, not its own.
    expected = np.mean(
        [math.log1p(math.exp(-6) + math.exp(9.8)), math.log1p(math.exp(-10) + math.exp(7.8))]
    )
    assert found == pytest.approx(expected, rel=1e-5)
    assert alone < found


def test_a_positive_twice_in_the_batch_is_nobodys_negative():
    x = torch.eye(3)
    loss = ContrastiveLoss(directions=BOTH_WAYS)
    same = loss(Candidates([0, 1], x[:2]), Candidates([7, 7], x[1:]))
    assert same.item() == 0
    other = loss(Candidates([0, 1], x[:2]), Candidates([7, 8], x[1:]))
    assert other.item() > 0


def test_shift_is_added_to_the_logits():
    queries, items = from_cosines([[0.5]])
    extra = Candidates([3], torch.zeros(1, 1).double(), shift=torch.tensor([math.log(4.0)]))
    found = ContrastiveLoss(temperature=1.0)(queries, items, sources=[extra])
    assert found.item() == pytest.approx(math.log1p(4 * math.exp(-0.5)), rel=1e-6)


def test_sources_without_a_gradient_get_none_and_those_with_one_do():
    x = torch.eye(2).requires_grad_()
    fresh = torch.ones(1, 2, requires_grad=True)
    queue = NegativeQueue(2, 2)
    queue.push([5, 6], torch.ones(2, 2))
    loss = ContrastiveLoss()(
        Candidates([0, 1], x),
        Candidates([0, 1], torch.eye(2)),
        sources=[queue.offer(), Candidates([9], fresh)],
    )
    loss.backward()
    assert fresh.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("directions", [("query_to_item",), ALL])
def test_nothing_to_compare(directions):
    loss = ContrastiveLoss(directions=directions, filters=[SelfGuide()])
    for rows, columns in [(0, 0), (1, 1), (0, 3)]:
        x = torch.ones(rows, 2, requires_grad=True)
        queries = Candidates(np.arange(rows), x)
        items = Candidates(np.arange(columns), torch.ones(columns, 2))
        value = loss(queries, items)
        assert value.item() == 0
        assert loss.masked_shares == [0]
        value.backward()
        assert x.grad is None or not x.grad.any()


def test_half_precision_is_worked_on_in_full():
    x = torch.eye(2, dtype=torch.bfloat16)
    value = ContrastiveLoss()(Candidates([0, 1], x), Candidates([0, 1], x))
    assert value.dtype == torch.float32


@pytest.mark.parametrize("given", [True, False])
def test_nothing_is_read_back_from_a_device(given):
    """A meta tensor stands for a GPU's: it refuses both other devices and to be read."""
    x, z = (torch.empty(n, 4, device="meta", requires_grad=True) for n in (3, 5))
    own = torch.arange(3)
    loss = ContrastiveLoss(
        directions=ALL,
        label_smoothing=0.1,
        filters=[
            KnownPositives(sp.csr_matrix(np.eye(3, 5))),
            SelfGuide(),
            Guide(np.eye(3, 5), np.eye(5)),
            NearCopies(np.eye(5)),
        ],
        mixer=HardMixer(2, 2, 2),
    )
    queue = NegativeQueue(2, 4, device="meta")
    queue.push([3, 4], z[3:])
    value = loss(
        Candidates(np.arange(3), x),
        Candidates(np.arange(5), z),
        CooIndex(own, own, (3, 5)) if given else None,
        [Candidates([[4], [0], [-1]], torch.empty(3, 1, 4, device="meta")), queue.offer()],
    )
    value.backward()
    assert value.device.type == x.grad.device.type == z.grad.device.type == "meta"


# Temperature, schedules, weights


def test_a_learned_temperature_gets_a_gradient():
    queries, items = from_cosines([[0.5, 0.4], [0.1, 0.6]])
    loss = ContrastiveLoss(temperature=0.1, learned=True)
    assert loss.log_scale.exp().item() == pytest.approx(10)
    value = loss(queries, items)
    value.backward()
    step = 1e-3
    with torch.no_grad():
        loss.log_scale += step
    slope = (loss(queries, items).item() - value.item()) / step
    assert loss.log_scale.grad.item() == pytest.approx(slope, rel=1e-2)
    assert [name for name, _ in loss.named_parameters()] == ["log_scale"]
    assert not list(ContrastiveLoss().parameters())


def test_numbers_follow_their_schedules():
    queries, items = from_cosines([[0.5, 0.2], [0.1, 0.6]])
    loss = ContrastiveLoss(
        temperature=Schedule({0: 1.0, 10: 0.05}),
        margin=Schedule({0: 0.0, 10: 0.02}),
        filters=[SelfGuide(Schedule({0: math.inf, 20: -2.0}))],
    )
    first = ContrastiveLoss(temperature=1.0)(queries, items).item()
    assert loss(queries, items, step=9).item() == first
    assert loss(queries, items, step=10).item() == pytest.approx(0.001879385, rel=1e-5)
    assert loss(queries, items, step=20).item() == 0
    smoothing, hardness = Schedule({0: 0.0, 10: 0.1}), Schedule({0: 0.0, 20: 9.0})
    loss = ContrastiveLoss(temperature=0.5, label_smoothing=smoothing, hardness=hardness)
    for step, options in ((9, {}), (10, {"label_smoothing": 0.1}), (19, {"label_smoothing": 0.1}),
                          (20, {"label_smoothing": 0.1, "hardness": 9})):  # fmt: skip
        same = ContrastiveLoss(temperature=0.5, **options)(queries, items)
        assert loss(queries, items, step=step).item() == same.item()


def test_progressive_weights():
    losses = torch.tensor([0.1, 1.0, 3.0, 0.5])
    probabilities = torch.exp(-losses)
    assert Progressive(0.0)(losses, probabilities) is losses
    for gamma in (0.5, 1, 2, -1):
        for ramp in (0.3, 1.0):
            weights = Progressive(ramp, gamma)(torch.ones(4), probabilities)
            assert weights.mean().item() == pytest.approx(1, rel=1e-6)
            order = torch.argsort(losses, descending=gamma < 0)
            assert (weights[order].diff() > 0).all()
    d = 1 - probabilities
    expected = (0.5 + 0.5 * d / d.mean()) * losses
    ramp = Progressive(Schedule({0: 0.0, 10: 1.0}, "linear"))
    torch.testing.assert_close(ramp(losses, probabilities, step=5), expected)


def test_progressive_weights_are_those_of_the_positives_alone():
    """However labels are smoothed."""
    seen = []

    def watch(losses, probabilities, *, step):
        seen.append(probabilities.tolist())
        return losses

    queries, items = from_cosines([[0.5, 0.4], [0.1, 0.2]])
    for smoothing in (0, 0.3):
        ContrastiveLoss(temperature=0.1, label_smoothing=smoothing, progressive=watch)(
            queries, items
        )
    assert seen[0] == seen[1] == pytest.approx([1 / (1 + math.exp(-1))] * 2, rel=1e-6)


def test_progressive_weights_have_no_gradient():
    queries, items = from_cosines([[0.5, 0.4], [0.1, 0.2]])
    x = queries.vectors.requires_grad_()
    batch = Candidates([0, 1], x), items
    plain = ContrastiveLoss(temperature=0.1)(*batch)
    off = ContrastiveLoss(temperature=0.1, progressive=Progressive(0.0))(*batch)
    assert off.item() == plain.item()
    weighted = ContrastiveLoss(temperature=0.1, progressive=Progressive(1.0))(*batch)
    (gradient,) = torch.autograd.grad(weighted, x)
    each = [
        ContrastiveLoss(temperature=0.1)(
            Candidates([row], x[row : row + 1]), items, CooIndex(*torch.tensor([[0], [row]]))
        )
        for row in range(2)
    ]
    d = torch.stack([1 - torch.exp(-value.detach()) for value in each])
    expected = sum(w * v for w, v in zip(d / d.mean(), each, strict=True)) / 2
    torch.testing.assert_close(torch.autograd.grad(expected, x)[0], gradient)


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1"),
        ({"directions": ("query_to_itme",)}, "directions has 'query_to_itme'"),
        ({"directions": ()}, "expected some"),
        ({"directions": BOTH_WAYS + BOTH_WAYS}, "each once"),
        ({"rows_at_once": 0}, "rows_at_once is 0"),
        ({"mixer": HardMixer(2, 1, 1), "similarity": distance}, "mixer is given with a similarity"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ContrastiveLoss(**options)


def test_one_thing_where_a_list_is_expected():
    x = Candidates([0, 1], torch.eye(2))
    with pytest.raises(TypeError, match=r"filters is a SelfGuide, expected a list: \[...\]"):
        ContrastiveLoss(filters=SelfGuide())
    with pytest.raises(TypeError, match="directions is a str, expected a list"):
        ContrastiveLoss(directions="query_to_item")
    with pytest.raises(TypeError, match="sources is a Candidates, expected a list"):
        ContrastiveLoss()(x, x, sources=x)


def test_a_schedule_that_falls_to_zero():
    x = Candidates([0, 1], torch.eye(2))
    loss = ContrastiveLoss(temperature=Schedule({0: 0.1, 10: 0.0}, "linear"))
    assert loss(x, x, step=9).isfinite()
    with pytest.raises(ValueError, match=r"temperature is 0.0 at step 10, expected more than 0"):
        loss(x, x, step=10)


def test_tensors_and_classes_where_others_are_wanted():
    x = torch.eye(3)
    one = Candidates([0, 1, 2], x)
    loss = ContrastiveLoss()
    wanted = r"expected Candidates\(ids, vectors\)"
    for arguments, name in (((x, one), "queries"), ((one, x), "items")):
        with pytest.raises(TypeError, match=f"^{name} is a Tensor, {wanted}"):
            loss(*arguments)
    with pytest.raises(TypeError, match=rf"^sources\[1\] is a Tensor, {wanted}"):
        loss(one, one, sources=[one, x])
    with pytest.raises(TypeError, match="queries is the class Candidates, expected one made of it"):
        loss(Candidates, one)
    for options, name in (
        ({"filters": [SelfGuide(), KnownPositives]}, r"filters\[1\] is the class KnownPositives"),
        ({"mixer": HardMixer}, r"mixer is the class HardMixer, expected .*: HardMixer\(\.\.\.\)"),
        ({"progressive": Progressive}, "progressive is the class Progressive"),
    ):
        with pytest.raises(TypeError, match=name):
            ContrastiveLoss(**options)
    with pytest.raises(ValueError, match=r"targets has positions in a matrix of shape \[3, 5\]"):
        loss(one, one, CooIndex.of(sp.csr_matrix(np.eye(3, 5))))
    with pytest.raises(TypeError, match=r"^targets is a csr_matrix, expected a CooIndex: "):
        loss(one, one, sp.csr_matrix(np.eye(3)))


def test_vectors_of_different_widths():
    x = Candidates([0, 1], torch.eye(2))
    wide = Candidates([0, 1], torch.eye(2, 3))
    own = Candidates([[5], [6]], torch.zeros(2, 1, 4))
    loss = ContrastiveLoss()
    for arguments, found in (
        ((x, wide), "queries 2, items 3"),
        ((x, x, None, [wide]), r"queries 2, items 2, sources\[0\] 3"),
        ((x, x, None, [x, own]), r"queries 2, items 2, sources\[0\] 2, sources\[1\] 4"),
    ):
        with pytest.raises(ValueError, match=f"^vectors differ in width: {found}$"):
            loss(*arguments)
    # A similarity of one's own may take two widths.
    of_both = ContrastiveLoss(similarity=lambda queries, items: queries @ items[:, :2].T)
    assert of_both(x, wide).isfinite()


def test_bad_batches():
    x = torch.eye(2)
    loss, two = ContrastiveLoss(), Candidates([0, 1], x)
    with pytest.raises(ValueError, match="give targets"):
        loss(two, Candidates([0], x[:1]))
    with pytest.raises(ValueError, match="need ids from 0"):
        loss(Candidates([0, -1], x), two)
    with pytest.raises(ValueError, match="need ids from 0"):
        loss(two, Candidates([-2, 1], x))
    with pytest.raises(ValueError, match="must be vectors"):
        loss(two, Candidates([[0], [1]], x[:, None]))
    with pytest.raises(ValueError, match="a source has 1 rows, queries 2"):
        loss(two, two, sources=[Candidates([[0]], x[:1, None])])

"""The losses: cases computed by hand, and slow NumPy implementations."""

import math
import re

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from ngame.loss import CooIndex, decoupled_softmax, triplet
from ngame.negatives import batch_labels

LOSSES = [triplet, decoupled_softmax]


def mean_over_rows(pay, targets):
    rows = [
        [pay(row, column) for column in np.flatnonzero(mask)] for row, mask in enumerate(targets)
    ]
    return np.mean([np.mean(row) for row in rows if row]) if any(map(len, rows)) else 0.0


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
@pytest.mark.parametrize("loss", [triplet, decoupled_softmax])
def test_bad_temperatures(loss, temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}, expected more than 0"):
        run(loss, [[0.5, 0.6]], [[1, 0]], temperature=temperature)


@pytest.mark.parametrize("loss", LOSSES)
def test_matrices_where_positions_are_wanted(loss):
    """What `label_pool` gives, a mask and a pair of tensors are no positions."""
    scores, right = torch.zeros(2, 2), entries(np.eye(2))
    given = {
        "csr_matrix": sp.csr_matrix(np.eye(2)),
        "Tensor": torch.eye(2, dtype=torch.bool),
        "ndarray": np.eye(2, dtype=bool),
        "tuple": tuple(right[:2]),
    }
    for kind, wrong in given.items():
        for name, arguments in (("known", (wrong, right)), ("targets", (right, wrong))):
            says = rf"^{name} is a {kind}, expected a CooIndex: CooIndex\.of\({name}\) "
            with pytest.raises(TypeError, match=says):
                loss(scores, *arguments)
    assert loss(scores, CooIndex.of(given["csr_matrix"]), CooIndex.of(given["Tensor"])) > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_positions_on_the_host_are_sent_to_the_scores(loss):
    """A meta tensor stands for a GPU's: it refuses both other devices and to be read."""
    scores = torch.zeros(2, 2, device="meta", requires_grad=True)
    right = entries(np.eye(2))
    for known, targets in ((right, right), (right, right.to("meta")), (right.to("meta"), right)):
        value = loss(scores, known, targets)
        value.backward()
        assert value.device.type == "meta"


def test_positions_of_a_matrix_with_room_to_spare():
    """SciPy takes arrays that are longer than what the rows hold."""
    matrix = sp.csr_matrix(np.array([[1, 0, 2], [0, 3, 0]]))
    for name in ("data", "indices"):
        setattr(matrix, name, np.append(getattr(matrix, name), 0))
    index = CooIndex.of(matrix)
    assert index.rows.tolist() == [0, 0, 1]
    assert index.columns.tolist() == [0, 2, 1]


def test_positions_of_a_mask():
    mask = torch.tensor([[False, True, True], [True, False, False]])
    index = CooIndex.of(mask)
    assert index.rows.tolist() == [0, 0, 1]
    assert index.columns.tolist() == [1, 2, 0]
    assert index.shape == (2, 3)
    for other in (mask.long(), mask.to_sparse()):
        with pytest.raises(TypeError, match=r"matrix is a torch.* tensor of torch.*, expected a C"):
            CooIndex.of(other)
    with pytest.raises(ValueError, match=r"matrix has shape \[3\], expected two dimensions"):
        CooIndex.of(mask[0])
    with pytest.raises(TypeError, match=r"matrix is a ndarray, expected a scipy.sparse CSR matrix"):
        CooIndex.of(mask.numpy())


def test_no_negatives_to_look_at():
    with pytest.raises(ValueError, match="negatives is 0, expected 1 or more"):
        run(triplet, [[0.5, 0.6]], [[1, 0]], negatives=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_scores_of_another_shape(loss):
    """Scores of all labels, where positions are those in the batch's pool, and fewer rows."""
    labels = sp.csr_matrix(np.eye(3, 7, 2, dtype=np.float32))
    rows = np.arange(3)
    pool, known, targets = batch_labels(labels, rows, rng=np.random.default_rng(0))
    scores = torch.rand(3, 7)
    assert loss(scores[:, pool], known, targets) >= 0
    for wrong, name in ((scores, "known"), (scores[:2, pool], "known"), (scores.T, "known")):
        shape = re.escape(str(list(wrong.shape)))
        message = rf"{name} has positions in a matrix of shape \[3, 3\], the scores have.*{shape}: "
        with pytest.raises(ValueError, match=message + "expected a score for each point and each"):
            loss(wrong, known, targets)
    all_labels = CooIndex.of(labels)
    with pytest.raises(ValueError, match="targets has positions"):
        loss(scores, all_labels, targets)
    # Of a part of the rows, and drawn labels beside the rows' own.
    part = batch_labels(labels, rows, shared=np.array([6]), rng=np.random.default_rng(0))
    assert loss(scores[1:3][:, part.pool], *part.part(slice(1, 3))[1:]) >= 0
    with pytest.raises(ValueError, match=r"of shape \[2, 4\], the scores have shape \[3, 4\]"):
        loss(scores[:, part.pool], *part.part(slice(1, 3))[1:])
    with pytest.raises(ValueError, match=r"scores has shape \[3\], expected two dimensions"):
        loss(scores[:, 0], known, targets)


def slow_triplet(scores, known, targets, margin=0.3, negatives=10, temperature=0.1):
    def pay(row, column):
        there = sorted(scores[row, ~known[row]], reverse=True)[:negatives]
        hard = [n for n in there if n - scores[row, column] + margin > 0]
        weights = [math.exp(n / temperature) for n in hard]
        hinges = [n - scores[row, column] + margin for n in hard]
        return np.dot(weights, hinges) / sum(weights) if hard else 0.0

    return mean_over_rows(pay, targets)


def slow_decoupled_softmax(scores, known, targets, temperature=0.05):
    def pay(row, column):
        others = scores[row, ~known[row]]
        return math.log1p(sum(math.exp((n - scores[row, column]) / temperature) for n in others))

    return mean_over_rows(pay, targets)


def entries(mask):
    return CooIndex.of(sp.csr_matrix(np.atleast_2d(mask).astype(np.float32)))


def run(loss, scores, known, targets=None, **options):
    """Loss and its gradient with regard to the scores."""
    scores = torch.tensor(scores, dtype=torch.float32, requires_grad=True)
    value = loss(scores, entries(known), entries(known if targets is None else targets), **options)
    (gradient,) = torch.autograd.grad(value, scores)
    return value.item(), gradient.numpy()


def test_entries_are_row_by_row():
    found = entries([[0, 1, 1], [0, 0, 0], [1, 0, 0]])
    assert found.rows.tolist() == [0, 0, 2]
    assert found.columns.tolist() == [1, 2, 0]
    assert found.rows.dtype == found.columns.dtype == torch.int64


def test_triplet_by_hand():
    # One positive at 0.5; with margin 0.3 the negatives at 0.6 and 0.4 violate it, 0.1 does not.
    value, gradient = run(triplet, [[0.5, 0.6, 0.4, 0.1]], [[1, 0, 0, 0]], temperature=0.2)
    first = math.exp(0.6 / 0.2) / (math.exp(0.6 / 0.2) + math.exp(0.4 / 0.2))
    assert value == pytest.approx(first * 0.4 + (1 - first) * 0.2, rel=1e-5)
    assert gradient[0, 3] == 0
    assert gradient[0, 0] == pytest.approx(-1, rel=1e-5)
    assert gradient.sum() == pytest.approx(0, abs=1e-6)
    # The weights take part in the gradient: the hardest negative gains weight as it rises.
    rise = first * (1 - first) * (0.4 - 0.2) / 0.2
    assert gradient[0, 1:3] == pytest.approx([first + rise, 1 - first - rise], rel=1e-4)


def test_triplet_looks_at_ten_negatives():
    value, gradient = run(triplet, [[0.0, *np.linspace(0.1, 0.9, 12)]], [[1] + [0] * 12])
    assert (gradient[0, 1:] != 0).tolist() == [False] * 2 + [True] * 10
    assert value == run(triplet, [[0.0, *np.linspace(0.1, 0.9, 12)[2:]]], [[1] + [0] * 10])[0]


def test_decoupled_softmax_by_hand():
    # Two positives, which do not compete, against one negative.
    value, _ = run(decoupled_softmax, [[0.2, 0.1, 0.3]], [[1, 1, 0]], temperature=0.1)
    assert value == pytest.approx((math.log1p(math.e) + math.log1p(math.e**2)) / 2, rel=1e-5)


def test_rows_have_equal_weight_whatever_their_number_of_targets():
    scores = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    value, _ = run(decoupled_softmax, scores, [[1, 1, 0], [0, 0, 1]], temperature=1.0)
    assert value == pytest.approx((math.log(2) + math.log(3)) / 2, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_known_positives_are_not_negatives(loss):
    """A known positive with the highest score gets no gradient."""
    scores, known = [[0.1, 0.9, 0.2]], [[1, 1, 0]]
    value, gradient = run(loss, scores, known, targets=[[1, 0, 0]])
    assert gradient[0, 1] == 0
    assert gradient[0, 0] < 0 < gradient[0, 2]
    without, _ = run(loss, [[0.1, 0.2]], [[1, 0]])
    assert value == pytest.approx(without, rel=1e-6)


def test_fewer_negatives_than_asked_for():
    """With one negative for `negatives=3`, no positive fills the free places."""
    value, gradient = run(triplet, [[0.5, 0.45, 0.4, 0.6]], [[1, 1, 1, 0]], negatives=3)
    slow = np.mean([0.6 - p + 0.3 for p in (0.5, 0.45, 0.4)])
    assert value == pytest.approx(slow, rel=1e-5)
    np.testing.assert_allclose(gradient, [[-1 / 3, -1 / 3, -1 / 3, 1]], rtol=1e-5)


def test_negatives_within_the_margin_have_no_gradient():
    value, gradient = run(triplet, [[0.9, 0.5, -0.2]], [[1, 0, 0]], margin=0.3)
    assert value == 0
    assert (gradient == 0).all()
    # Exactly at the margin, in numbers that floats represent exactly.
    value, gradient = run(triplet, [[0.5, 0.25, 0.25]], [[1, 0, 0]], margin=0.25)
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("known", [[[1, 1]], [[0, 0]]], ids=["no negative", "no target"])
def test_rows_with_nothing_to_compare(loss, known):
    value, gradient = run(loss, [[0.3, -0.4]], known)
    assert value == 0
    assert (gradient == 0).all()
    # In the mean over rows, one without negatives counts as 0, one without targets not at all.
    value, gradient = run(loss, [[0.3, -0.4], [0.1, 0.2]], [*known, [1, 0]])
    alone, _ = run(loss, [[0.1, 0.2]], [[1, 0]])
    assert value == pytest.approx(alone / (2 if any(known[0]) else 1), rel=1e-6)
    assert (gradient[0] == 0).all()
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_scores_stay_finite(loss):
    value, gradient = run(loss, [[-1.0, 1.0, 1.0]], [[1, 0, 0]], temperature=1e-3)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(0, 2**32 - 1),
    st.integers(1, 10),
    st.sampled_from([0.05, 0.3, 1.0]),
)
def test_equal_to_the_slow_implementations(rows, columns, seed, negatives, density):
    rng = np.random.default_rng(seed)
    scores = rng.uniform(-1, 1, (rows, columns)).astype(np.float32)
    known = rng.random((rows, columns)) < density
    targets = known & (rng.random((rows, columns)) < 0.7)
    given_ = torch.from_numpy(scores), entries(known), entries(targets)
    fast = triplet(*given_, negatives=negatives).item()
    slow = slow_triplet(scores.astype(float), known, targets, negatives=negatives)
    assert fast == pytest.approx(slow, rel=1e-4, abs=1e-5)
    fast = decoupled_softmax(*given_).item()
    slow = slow_decoupled_softmax(scores.astype(float), known, targets)
    assert fast == pytest.approx(slow, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_scores_are_computed_in_float32(loss):
    scores = torch.tensor([[0.5, 0.6, 0.4]], dtype=torch.bfloat16)
    value = loss(scores, entries([[1, 0, 0]]), entries([[1, 0, 0]]))
    assert value.dtype == torch.float32
    assert value == loss(scores.float(), entries([[1, 0, 0]]), entries([[1, 0, 0]]))

"""pyxclib's label graphs: frequencies of walks against their probabilities, and cases by hand."""

import numpy as np
import pytest
import scipy.sparse as sp

from ngame.compat.xclib.utils.graph import RandomWalk, _random_walk, normalize_graph

# Points 0 and 1 share label 1; label 3 has no point, point 3 no label, label 4 a point of its own.
LABELS = sp.csr_matrix(
    np.array([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 0], [0] * 5, [0, 0, 0, 0, 1]])
)


def probabilities(labels, p_reset, steps):
    """Mean probability of each label over the steps of a walk, from the transition matrix."""
    y = labels.toarray().astype(float)
    y = y[:, y.any(axis=0)]
    y = y[y.any(axis=1)]
    step = (y / y.sum(0)).T @ (y / y.sum(1, keepdims=True))
    here, total = np.eye(len(step)), 0
    for number in range(steps):
        start = np.eye(len(step))
        here = (here if number else start) * (1 - p_reset) + start * p_reset
        here = here @ step
        total = total + here
    return total / steps


@pytest.mark.parametrize("p_reset", [0, 0.3, 1])
def test_walks_have_the_right_frequencies(p_reset):
    np.random.seed(3)  # noqa: NPY002
    steps = 4
    # The same graph again and again, cut anywhere into batches: a walk stays in its own.
    copies = RandomWalk(sp.block_diag([LABELS] * 3000, format="csr"))
    counts = copies.simulate(steps, p_reset, b_size=103).tocoo()
    assert (counts.row // 5 == counts.col // 5).all()
    walks = np.zeros((5, 5))
    np.add.at(walks, (counts.row % 5, counts.col % 5), counts.data)
    assert walks[3].sum() == walks[:, 3].sum() == 0
    valid = [0, 1, 2, 4]
    expected = probabilities(LABELS, p_reset, steps) * steps * 3000
    found = walks[np.ix_(valid, valid)]
    off = ~np.eye(4, dtype=bool)  # on the diagonal is at least 1 a walk
    assert (np.abs(found - expected)[off] <= 5 * np.sqrt(expected[off] * steps) + 1e-9).all()
    assert (found[np.arange(4), np.arange(4)] >= 3000).all()


def test_the_seed_governs_the_walks():
    def walked(b_size=1000):
        np.random.seed(5)  # noqa: NPY002
        return RandomWalk(LABELS).simulate(walk_to=20, p_reset=0.1, k=None, b_size=b_size)

    assert (walked() != walked()).nnz == 0
    assert walked().dtype == np.float32
    assert walked().shape == (5, 5)
    assert walked().has_sorted_indices


def test_the_best_and_the_label_itself_are_kept():
    np.random.seed(7)  # noqa: NPY002
    walks = RandomWalk(LABELS).simulate(walk_to=50, k=1)
    counts = walks.getnnz(axis=1)
    assert (counts[[0, 1, 2, 4]] >= 1).all()
    assert (counts <= 2).all()
    assert (walks.diagonal()[[0, 1, 2, 4]] >= 1).all()


def test_labels_chosen_by_the_caller():
    np.random.seed(1)  # noqa: NPY002
    walk = RandomWalk(LABELS, valid_labels=np.array([2, 4]))
    assert walk.Y.shape == (3, 2)
    assert set(zip(*(part.tolist() for part in walk.simulate(10).nonzero()), strict=True)) == (
        {(2, 2), (4, 4)}
    )
    with pytest.raises(ValueError, match="label 1 has no point to walk to"):
        RandomWalk(LABELS, valid_labels=[0, 3]).simulate()
    with pytest.raises(ValueError, match="p_reset is 2, expected from 0 to 1"):
        RandomWalk(LABELS).simulate(p_reset=2)
    with pytest.raises(TypeError, match="Y is a list"):
        RandomWalk([[1]])
    assert RandomWalk(sp.csr_matrix((2, 3))).simulate().shape == (3, 3)


def test_a_walk_as_arrays():
    y = LABELS[:, [0, 1, 2]]
    y = y[y.getnnz(axis=1) > 0]
    t = y.T.tocsr()
    cols, ones = _random_walk(y.indptr, y.indices, t.indptr, t.indices, 5, 0.2, start=1, end=3)
    assert (cols.shape, cols.dtype, ones.dtype) == ((10,), np.int32, np.float32)
    assert (ones == 1).all()
    assert set(cols.tolist()) <= {0, 1, 2}


def test_normalize_graph():
    matrix = np.array([[4, 0, 0], [12, 9, 0], [0, 0, 0]], np.float32)
    found = normalize_graph(sp.csr_matrix(matrix))
    assert (found.format, found.dtype, found.nnz) == ("csr", np.float32, 3)
    np.testing.assert_allclose(
        found.toarray(),
        [[4 / np.sqrt(4 * 16), 0, 0], [12 / np.sqrt(21 * 16), 9 / np.sqrt(21 * 9), 0], [0] * 3],
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match="X has a negative sum in row 0"):
        normalize_graph(sp.csr_matrix([[-1.0]]))
    with pytest.raises(TypeError, match="X is a ndarray"):
        normalize_graph(matrix)

"""Lists of neighbours from coordinates, embeddings and graphs."""

import numpy as np
import pytest
import reference
import scipy.sparse as sp

from ngame import haversine_neighbours
from ngame.neighbours import embedding_neighbours, graph_neighbours


@pytest.mark.parametrize("spread", [180.0, 1e-4])
@pytest.mark.parametrize("k", [1, 5])
def test_haversine_is_exact(rng, spread, k):
    # 1e-4 degrees are 11 metres: float32 cosines cannot tell such places apart.
    latitude = 48 + rng.uniform(-1, 1, 200) * min(spread, 40)
    longitude = rng.uniform(-spread, spread, 200)
    distances = reference.haversine(latitude, longitude)
    np.fill_diagonal(distances, np.inf)
    expected = np.argsort(distances, axis=1, kind="stable")[:, :k]
    for threads in (1, 2):
        found = haversine_neighbours(latitude, longitude, k, threads=threads)
        assert found.dtype == np.int32
        assert (found == expected).all()


def test_haversine_across_the_date_line_and_the_poles():
    found = haversine_neighbours([0, 0, 0, 89, 89], [179, -179, 170, 0, 180], 1)
    assert found.ravel().tolist() == [1, 0, 0, 4, 3]


def test_haversine_of_places_at_one_point():
    found = haversine_neighbours([10] * 6 + [11], [20] * 7, 3)
    for row, ids in enumerate(found.tolist()):
        assert row not in ids
        assert len(set(ids)) == 3
        assert 6 not in ids


def test_haversine_of_few_places():
    assert haversine_neighbours([1], [2], 2).tolist() == [[-1, -1]]
    assert haversine_neighbours([1, 5, 2], [0, 0, 0], 4).tolist() == [
        [2, 1, -1, -1],
        [2, 0, -1, -1],
        [0, 1, -1, -1],
    ]


@pytest.mark.parametrize(
    ("latitude", "longitude", "k", "error", "message"),
    [
        ([91], [0], 1, ValueError, r"latitude\[0\] is 91, expected degrees"),
        ([0, 1], [0, np.nan], 1, ValueError, r"longitude\[1\] is nan"),
        ([0], [np.inf], 1, ValueError, r"longitude\[0\] is inf"),
        ([0, 1], [0], 1, ValueError, "latitude has 2 places, longitude has 1"),
        ([], [], 1, ValueError, r"latitude has shape \(0,\)"),
        ([[0]], [0], 1, ValueError, r"latitude has shape \(1, 1\)"),
        (["N"], [0], 1, TypeError, "latitude has dtype"),
        ([0], [0], 0, ValueError, "k is 0"),
    ],
)
def test_haversine_of_bad_input(latitude, longitude, k, error, message):
    with pytest.raises(error, match=message):
        haversine_neighbours(latitude, longitude, k)


def test_embeddings(mixture):
    x = mixture(50, 6)
    x[7] = x[3]
    cosines = reference.unit(x) @ reference.unit(x).T
    np.fill_diagonal(cosines, -np.inf)
    found = embedding_neighbours(x, 4)
    assert found[3, 0] == 7
    assert found[7, 0] == 3
    assert (found == np.argsort(-cosines, axis=1, kind="stable")[:, :4]).all()
    assert embedding_neighbours(x, 100).shape == (50, 49)
    assert embedding_neighbours(x[:1], 3).shape == (1, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.bool_])
def test_graph(rng, dtype):
    dense = rng.integers(0, 4, (30, 30)).astype(dtype)
    dense[5] = 0
    found = graph_neighbours(sp.csr_matrix(dense), 6)
    for row, ids in enumerate(found.tolist()):
        edges = [other for other in np.flatnonzero(dense[row]).tolist() if other != row]
        expected = sorted(edges, key=lambda other: (-float(dense[row, other]), other))[:6]
        assert ids == expected + [-1] * (6 - len(expected))


def test_graph_of_bad_input():
    with pytest.raises(ValueError, match=r"graph has shape \(2, 3\)"):
        graph_neighbours(sp.csr_matrix((2, 3)), 1)
    with pytest.raises(TypeError, match="graph is a coo"):
        graph_neighbours(sp.coo_matrix((2, 2)), 1)
    with pytest.raises(ValueError, match="NaN"):
        graph_neighbours(sp.csr_matrix(np.array([[0, np.nan], [1, 0]])), 1)

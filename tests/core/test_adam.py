"""Adam on the rows that a batch touched."""

import numpy as np
import pytest
import reference

from ngame import _core

NUMBERS = 0.9, 0.999, 0.01, 1e-8


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("rows", "cols", "touched"), [(7, 3, 4), (900, 257, 700), (5, 1, 5), (4, 0, 2)]
)
def test_equals_the_reference(rows, cols, touched, threads):
    rng = np.random.default_rng(rows)
    found = [rng.standard_normal((rows, cols)).astype(np.float32) for _ in range(3)]
    found[2] **= 2
    expected = [table.copy() for table in found]
    for _ in range(3):
        ids = np.sort(rng.permutation(rows)[:touched])
        gradient = rng.standard_normal((touched, cols)).astype(np.float32)
        gradient[:1] = 0
        _core.adam_rows(*found, ids, gradient, *NUMBERS, threads)
        reference.adam_rows(*expected, ids, gradient, *NUMBERS)
        for table, same in zip(found, expected, strict=True):
            np.testing.assert_array_equal(table, same)


def test_no_row_is_touched_and_an_empty_table():
    for rows in (0, 3):
        tables = [np.ones((rows, 2), np.float32) for _ in range(3)]
        _core.adam_rows(*tables, np.zeros(0, int), np.zeros((0, 2), np.float32), *NUMBERS, 1)
        assert all((table == 1).all() for table in tables)


@pytest.mark.parametrize("ids", [[-1, 2], [0, 3], [2, 1], [1, 1]])
def test_bad_ids(ids):
    tables = [np.ones((3, 2), np.float32) for _ in range(3)]
    with pytest.raises(ValueError, match=r"rows\[[01]\] is -?\d, expected ascending ids below 3"):
        _core.adam_rows(*tables, np.array(ids), np.ones((2, 2), np.float32), *NUMBERS, 1)
    assert all((table == 1).all() for table in tables)


def test_bad_shapes():
    weight = np.ones((3, 2), np.float32)
    for mean, gradient in (((2, 2), (1, 2)), ((3, 2), (1, 3)), ((3, 2), (2, 2))):
        mean, gradient = np.ones(mean, np.float32), np.ones(gradient, np.float32)
        with pytest.raises(ValueError, match="must have the shape of weight"):
            _core.adam_rows(weight, mean, weight, np.array([1]), gradient, *NUMBERS, 1)


def test_a_table_that_may_not_be_written():
    tables = [np.ones((3, 2), np.float32) for _ in range(3)]
    tables[1].flags.writeable = False
    with pytest.raises(ValueError, match="not writeable"):
        _core.adam_rows(*tables, np.array([1]), np.ones((1, 2), np.float32), *NUMBERS, 1)

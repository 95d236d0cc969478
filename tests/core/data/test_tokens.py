"""Flat token arrays against plain lists of lists."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngame.data.tokens import Tokens

rows_of_ids = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=5), max_size=8)


def lists(tokens):
    return [tokens.ids[a:b].tolist() for a, b in pairwise(tokens.offsets)]


@given(rows_of_ids)
def test_from_lists(rows):
    tokens = Tokens.from_lists(rows)
    assert lists(tokens) == rows
    assert len(tokens) == len(rows)
    assert tokens.lengths.tolist() == [len(row) for row in rows]
    assert (tokens.ids.dtype, tokens.offsets.dtype) == (np.int32, np.int64)


@given(rows_of_ids.filter(len), st.data())
def test_take(rows, data):
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
    taken = Tokens.from_lists(rows).take(np.array(chosen, np.int64))
    assert lists(taken) == [rows[row] for row in chosen]


@given(st.lists(rows_of_ids, max_size=4))
def test_concatenate(parts):
    joined = Tokens.concatenate(map(Tokens.from_lists, parts))
    assert lists(joined) == [row for part in parts for row in part]


@pytest.mark.parametrize("rows", [[[1, 2], [], [3]], [[]], []])
def test_save_and_load(tmp_path, rows):
    Tokens.from_lists(rows).save(tmp_path / "sub" / "texts")
    loaded = Tokens.load(tmp_path / "sub" / "texts")
    assert lists(loaded) == rows
    assert isinstance(loaded.ids, np.memmap) or not any(rows)


def test_ids_that_do_not_fit():
    with pytest.raises(OverflowError):
        Tokens.from_lists([[2**31]])

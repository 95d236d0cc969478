"""Encoding many texts with any module: order, batches, and what a wrong module is told."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from ngame.data.tokens import Tokens
from ngame.encoders.encode import checked, encode


class Sums(torch.nn.Module):
    """A text's vector is (sum of its ids, number of its ids, 1)."""

    dim = 3

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, tokens):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batches.append(tokens.lengths)
        ids = [tokens.ids[a:b] for a, b in pairwise(tokens.offsets)]
        return torch.tensor([[float(sum(row)), len(row), 1.0] for row in ids])


def some_tokens(rng, rows=50):
    return Tokens.from_lists([rng.integers(100, size=rng.integers(8)) for _ in range(rows)])


@pytest.mark.parametrize("tokens_per_batch", [1, 7, 64, 10_000])
def test_rows_come_back_in_order(rng, tokens_per_batch):
    tokens = some_tokens(rng)
    encoder = Sums()
    vectors = encode(encoder, tokens, tokens_per_batch=tokens_per_batch)
    expected = [(tokens.ids[a:b].sum(), b - a, 1) for a, b in pairwise(tokens.offsets)]
    np.testing.assert_array_equal(vectors, expected)
    assert vectors.dtype == np.float32
    for lengths in encoder.batches:
        assert len(lengths) == 1 or len(lengths) * max(1, lengths.max()) <= tokens_per_batch


def test_no_texts():
    assert encode(Sums(), Tokens.from_lists([])).shape == (0, 3)


def test_nan_names_the_text(rng):
    tokens = Tokens.from_lists([[1], [2, 2], [3]])
    encoder = Sums()
    good = encoder.forward
    encoder.forward = lambda t: good(t).masked_fill_(good(t) == 4, torch.nan)
    with pytest.raises(ValueError, match=r"NaN or infinity for row 1$"):
        encode(encoder, tokens)


def test_wrong_shape_and_type(rng):
    with pytest.raises(ValueError, match=r"returned shape \(2, 4\), expected \(2, 3\)"):
        checked(torch.zeros(2, 4), 2, 3)
    with pytest.raises(ValueError, match=r"returned shape \(3,\), expected \(2, 3\)"):
        checked(torch.zeros(3), 2, 3)
    with pytest.raises(TypeError, match="returned a ndarray, expected a tensor"):
        checked(np.zeros((2, 3)), 2, 3)
    encoder = Sums()
    encoder.dim = 5
    with pytest.raises(ValueError, match=r"expected \(\d+, 5\)"):
        encode(encoder, some_tokens(rng))

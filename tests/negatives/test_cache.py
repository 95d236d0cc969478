"""Gradients of chunks against those of the whole batch."""

import numpy as np
import pytest
import torch

from ngame.negatives import Candidates, ContrastiveLoss, grad_cache


class Texts(torch.nn.Module):
    """Rows of a sparse table, a layer and dropout, like the bag encoder."""

    def __init__(self, dropout):
        super().__init__()
        self.table = torch.nn.EmbeddingBag(50, 8, mode="mean", sparse=True)
        self.layer = torch.nn.Linear(8, 4)
        self.dropout = dropout

    def forward(self, words):
        x = torch.nn.functional.dropout(self.table(words), self.dropout, self.training)
        return torch.nn.functional.normalize(self.layer(x).double(), dim=1)


def gradients(modules):
    found = {}
    for which, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            found[which, name] = parameter.grad.to_dense().clone()
            parameter.grad = None
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("chunk", [1, 3, 12])
@pytest.mark.parametrize("rows_at_once", [None, 5])
def test_gradients_of_the_whole(dropout, chunk, rows_at_once):
    torch.manual_seed(0)
    encoder, texts = Texts(dropout), torch.randint(50, (2, 12, 6))
    loss = ContrastiveLoss(
        temperature=0.1,
        learned=True,
        directions=("query_to_item", "item_to_query"),
        rows_at_once=rows_at_once,
    )

    def compare(x, z):
        ids = np.arange(12)
        return loss(Candidates(ids, x), Candidates(ids, z))

    def columns():
        return [
            [lambda words=words: encoder(words) for words in side.split(chunk)] for side in texts
        ]

    torch.manual_seed(1)
    whole = compare(*(torch.cat([encode() for encode in chunks]) for chunks in columns()))
    whole.backward()
    after = torch.get_rng_state()
    expected = gradients([encoder, loss])

    torch.manual_seed(1)
    value = grad_cache(compare, *columns())
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(value, whole.detach(), rtol=1e-6, atol=1e-6)
    for name, gradient in gradients([encoder, loss]).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6)
    torch.manual_seed(1)
    assert grad_cache(compare, *columns(), scale=0.5) == value
    for name, gradient in gradients([encoder, loss]).items():
        torch.testing.assert_close(gradient, expected[name] / 2, rtol=1e-6, atol=1e-6)


def test_columns_without_a_gradient():
    """A frozen encoder beside one that learns, and a column that the loss does not use."""
    encoder, frozen = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2).requires_grad_(False)
    x = torch.ones(4, 3)
    value = grad_cache(
        lambda one, two, three: (one * two).sum(),
        [lambda: encoder(x)],
        [lambda: frozen(x)],
        [lambda: encoder(x)],
    )
    torch.testing.assert_close(value, (encoder(x) * frozen(x)).sum().detach())
    torch.testing.assert_close(encoder.bias.grad, 4 * frozen(x[0]))

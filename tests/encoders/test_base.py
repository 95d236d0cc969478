"""What counts as an encoder."""

import numpy as np
import pytest
import torch

import ngame
from ngame.data.tokens import Tokens
from ngame.encoders.base import Encoder, as_encoder


class Own(torch.nn.Module):
    """A user's module with the members of an encoder, not derived from `Encoder`."""

    dim = 3

    def tokenize(self, texts):
        return Tokens.from_lists([len(text)] for text in texts)

    def forward(self, tokens):
        return torch.ones(len(tokens), 3)

    def save(self, folder):
        pass


def test_any_module_with_the_members_is_accepted():
    own = Own()
    assert as_encoder(own) is own
    own.dim = np.int64(3)
    assert as_encoder(own) is own


def test_the_error_names_what_is_missing():
    class Empty(torch.nn.Module):
        pass

    class WithoutSave(Own):
        save = None

    with pytest.raises(TypeError, match=r"encoder is a list, expected a torch\.nn\.Module"):
        as_encoder([])
    with pytest.raises(
        TypeError, match="is a Empty without dim, tokenize, forward, save: see ngam"
    ):
        as_encoder(Empty())
    with pytest.raises(TypeError, match="encoder is a WithoutSave without save"):
        as_encoder(WithoutSave())
    with pytest.raises(TypeError, match=r"encoder is the class Own, .* made of it: Own\(\.\.\.\)"):
        as_encoder(Own)
    own = Own()
    own.dim = 3.0
    with pytest.raises(TypeError, match=r"encoder\.dim is a float, expected an integer"):
        as_encoder(own)
    own.dim = 0
    with pytest.raises(ValueError, match=r"encoder\.dim is 0"):
        as_encoder(own)


def test_training_checks_the_encoder_first(tmp_path):
    dataset = ngame.Dataset(["a", "b"], np.eye(2), ["x", "y"])
    with pytest.raises(TypeError, match="encoder is a Linear without dim, tokenize, save"):
        ngame.train(dataset, encoder=torch.nn.Linear(2, 2), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_subclass_must_implement_everything():
    class Partial(Encoder):
        def tokenize(self, texts):
            return Tokens.from_lists([])

    with pytest.raises(TypeError, match="abstract"):
        Partial()
    assert issubclass(ngame.BagEncoder, ngame.Encoder)

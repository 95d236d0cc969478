"""What training and prediction ask of an encoder."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from ngame.arrays import as_count, refuse_class
from ngame.data.tokens import Tokens


class Encoder(torch.nn.Module, ABC):
    """A module that turns texts into vectors.

    Points and labels share one encoder (NGAME is a Siamese method). Texts are compared by cosine,
    so the length of a vector has no meaning.

    Subclassing is optional: `ngame.train` and `ngame.Model.load` accept any `torch.nn.Module`
    that has these four members.
    """

    dim: int
    """Width of the vectors."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Texts to token ids. Training calls it once for every text of a run."""

    @abstractmethod
    def forward(self, tokens: Tokens) -> torch.Tensor:
        """Tokens of n texts to vectors, float [n, dim], on the device of the parameters."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write weights (safetensors) and tokenizer into an empty folder."""


def as_encoder(module: torch.nn.Module) -> Encoder:
    """Return `module` as an encoder, after a check that it has what an encoder needs.

    Raises
    ------
    TypeError
        It is not a `torch.nn.Module`, lacks a member of `Encoder`, or its `dim` is not an int.
    ValueError
        Its `dim` is less than 1.
    """
    kind = type(module).__name__
    refuse_class(module, "encoder")
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"encoder is a {kind}, expected a torch.nn.Module")
    missing = [name for name in ("tokenize", "forward", "save") if not _has_method(module, name)]
    if not hasattr(module, "dim"):
        missing.insert(0, "dim")
    if missing:
        raise TypeError(f"encoder is a {kind} without {', '.join(missing)}: see ngame.Encoder")
    as_count(module.dim, "encoder.dim")
    return cast(Encoder, module)


def _has_method(module: torch.nn.Module, name: str) -> bool:
    method = getattr(module, name, None)
    # A module without a forward of its own inherits one that only raises.
    inherited = getattr(method, "__func__", None) is torch.nn.Module.forward
    return callable(method) and not inherited

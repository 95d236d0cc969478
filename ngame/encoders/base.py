"""What an encoder is to the rest of the library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from ngame.data.tokens import Tokens


@runtime_checkable
class Encoder(Protocol):
    """A `torch.nn.Module` that turns texts into vectors: the whole of what training needs.

    Points and labels share one encoder (NGAME is a Siamese method). Similarity is the cosine, so
    the length of the vectors has no meaning.
    """

    dim: int
    """Width of the vectors."""

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Texts to token ids; called once a run for every text."""
        ...

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        """Tokens of n texts to vectors, float [n, dim], on the device of the parameters."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights (safetensors) and tokenizer into an empty folder."""
        ...

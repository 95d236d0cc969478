"""What an encoder is to the rest of the library, and how many texts are encoded with one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from ngame.embeddings import encode_rows
from ngame.tokens import Tokens
from ngame.vectors import Vectors, placed


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


def encode(
    encoder: torch.nn.Module,
    tokens: Tokens,
    *,
    device: torch.device | None = None,
    tokens_per_batch: int = 16_384,
) -> Vectors:
    """Encode n texts within `ngame.evaluating`.

    Texts of like length go together, so that an encoder that pads wastes little.

    Parameters
    ----------
    encoder : an `Encoder`
    tokens : n texts
    device : where the vectors are put, as a tensor; the host if not given, as an array
    tokens_per_batch : padded tokens (texts times the longest of them) that are encoded at once

    Returns
    -------
    float32 array or tensor of shape [n, dim]

    Raises
    ------
    TypeError
        The encoder returned no tensor.
    ValueError
        The encoder returned another shape than [texts, dim], or values that are not finite.
    """
    dim = int(encoder.dim)  # type: ignore[arg-type]
    if not len(tokens):
        return placed(torch.empty(0, dim, device=device), device)
    return encode_rows(
        lambda rows: checked(encoder(tokens.take(rows)), len(rows), dim),
        len(tokens),
        model=encoder,
        chunk_size=tokens_per_batch,
        lengths=tokens.lengths,
        device=device,
    )


def checked(vectors: torch.Tensor, rows: int, dim: int) -> torch.Tensor:
    """Return `vectors` if they are a [rows, dim] tensor; the error says what came instead."""
    if not isinstance(vectors, torch.Tensor):
        raise TypeError(f"encoder returned a {type(vectors).__name__}, expected a tensor")
    if tuple(vectors.shape) != (rows, dim):
        raise ValueError(f"encoder returned shape {tuple(vectors.shape)}, expected ({rows}, {dim})")
    return vectors

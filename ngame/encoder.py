"""What an encoder is to the rest of the library, and how many texts are encoded with one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ngame.tokens import Tokens


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


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, the module's own mode restored at the end."""
    training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(training)


def encode(
    encoder: torch.nn.Module,
    tokens: Tokens,
    *,
    tokens_per_batch: int = 16_384,
) -> npt.NDArray[np.float32]:
    """Encode n texts in evaluation mode.

    Texts of like length go together, so that an encoder that pads wastes little. The state of the
    random generators is not touched by encoders whose evaluation mode draws nothing.

    Parameters
    ----------
    encoder : an `Encoder`
    tokens : n texts
    tokens_per_batch : padded tokens (texts times the longest of them) that are encoded at once

    Returns
    -------
    float32 array of shape [n, dim]

    Raises
    ------
    TypeError
        The encoder returned no tensor.
    ValueError
        The encoder returned another shape than [texts, dim], or values that are not finite.
    """
    dim = int(encoder.dim)  # type: ignore[arg-type]
    vectors = np.empty((len(tokens), dim), np.float32)
    lengths = np.maximum(tokens.lengths, 1)
    order = np.argsort(-lengths, kind="stable")
    # On a terminal, and only where it takes a while.
    bar = tqdm(total=len(tokens), desc="encoding", unit="text", disable=None, delay=2, leave=False)
    with evaluating(encoder), bar:
        start = 0
        while start < len(order):
            stop = min(len(order), start + max(1, tokens_per_batch // int(lengths[order[start]])))
            rows = order[start:stop]
            batch = checked(encoder(tokens.take(rows)), len(rows), dim)
            vectors[rows] = batch.float().cpu().numpy()
            bar.update(stop - start)
            start = stop
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise ValueError(f"encoder returned NaN or infinity for text {int(np.argmin(finite))}")
    return vectors


def checked(vectors: torch.Tensor, rows: int, dim: int) -> torch.Tensor:
    """Return `vectors` if they are a [rows, dim] tensor; the error says what came instead."""
    if not isinstance(vectors, torch.Tensor):
        raise TypeError(f"encoder returned a {type(vectors).__name__}, expected a tensor")
    if tuple(vectors.shape) != (rows, dim):
        raise ValueError(f"encoder returned shape {tuple(vectors.shape)}, expected ({rows}, {dim})")
    return vectors

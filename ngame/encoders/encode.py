"""Encoding many rows in the middle of training, without a side effect on it."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ngame.arrays import as_count, as_ids
from ngame.data.tokens import Tokens
from ngame.encoders.base import Encoder
from ngame.encoders.vectors import (
    Vectors,
    as_floats,
    first_not_finite,
    normalize,
    to_device,
    to_float16,
)
from ngame.progress import Progress
from ngame.transfer import sent

# Large enough to keep a CPU busy, small enough for its memory.
_TOKENS_PER_BATCH = 16_384


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluate within the block, without a side effect on the training around it.

    Within the block the model is in evaluation mode and computes no gradients. On exit, also after
    an error, every submodule returns to its previous mode (layers frozen in evaluation mode stay
    frozen). The random states of Python, NumPy and torch, on the CPU and every CUDA device, are
    restored too. So training draws the same random numbers as without the block.

    Gradients are disabled by `torch.no_grad`, not by inference mode: a model may cache tensors
    made within the block, such as position tables, that training then needs.

    Parameters
    ----------
    model : torch.nn.Module

    Examples
    --------
    >>> model = torch.nn.Dropout()
    >>> with evaluating(model):
    ...     model.training
    False
    >>> model.training
    True
    """
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    # Before CUDA is in use it has no state, and asking for one would start the device.
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if in_use else ()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        # The model first: its own `train` may do more than set the mode.
        model.train(modes[0][1])
        for module, mode in modes:
            module.training = mode


def encode_rows(
    encode: Callable[[npt.NDArray[np.int64]], Any],
    n_rows: int,
    *,
    model: torch.nn.Module,
    chunk_size: int = 256,
    lengths: npt.ArrayLike | None = None,
    device: torch.device | str | None = None,
) -> Vectors:
    """Encode rows 0 .. n_rows - 1 in chunks, within `evaluating`.

    Parameters
    ----------
    encode : callable
        Takes row ids, int64 [m]; returns their vectors, a float tensor (on any device) or array
        of shape [m, d].
    n_rows : int
        Number of rows, at least 1.
    model : torch.nn.Module
        The model that `encode` calls.
    chunk_size : int
        Rows per chunk; with `lengths`, rows times the longest of them. A row longer than that
        forms a chunk of its own.
    lengths : integer array of shape [n_rows], optional
        Length of each row, in any unit. Rows are sorted by length, longest first. Chunks of
        similar lengths need little padding, and a chunk that does not fit in memory fails at once.
    device : torch.device or str, optional
        Where to put the vectors; the host if not given.

    Returns
    -------
    float32 array of shape [n_rows, d]; a tensor if `device` is given

    Raises
    ------
    TypeError
        `encode` returned neither a tensor nor an array, or one that is not of floats.
    ValueError
        `encode` returned a shape other than [m, d], or NaN or infinity (the error names the first
        such row); `lengths` has another number of rows.

    Examples
    --------
    >>> table = torch.nn.Embedding(10, 4)
    >>> encode_rows(lambda rows: table(torch.from_numpy(rows)), 10, model=table).shape
    (10, 4)
    """
    return _encoded(encode, n_rows, model, chunk_size, lengths, device)


def _encoded(
    encode: Callable[[npt.NDArray[np.int64]], Any],
    n_rows: int,
    model: torch.nn.Module,
    chunk_size: int,
    lengths: npt.ArrayLike | None,
    device: torch.device | str | None,
    unit: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Vectors:
    """`encode_rows`, with what `encode` has more: a chunk at a time, so that it takes no memory."""
    n_rows, chunk_size = as_count(n_rows, "n_rows"), as_count(chunk_size, "chunk_size")
    if lengths is None:
        lengths = np.ones(n_rows, np.int64)
    else:
        lengths = np.maximum(as_ids(lengths, "lengths"), 1)
    if len(lengths) != n_rows:
        raise ValueError(f"lengths has {len(lengths)} rows, n_rows is {n_rows}")
    order = np.argsort(-lengths, kind="stable")
    device = None if device is None else torch.device(device)
    vectors: Any = None
    with evaluating(model), Progress("encoding", n_rows, "row") as progress:
        start = 0
        while start < n_rows:
            stop = min(n_rows, start + max(1, chunk_size // int(lengths[order[start]])))
            rows = order[start:stop]
            chunk = as_floats(encode(rows), "encode returned", device)
            if vectors is None and chunk.ndim == 2:
                shape = n_rows, chunk.shape[1]
                vectors = to_device(torch.empty(shape, dtype=dtype, device=device), device)
            if vectors is None or chunk.shape != (len(rows), vectors.shape[1]):
                width = "width" if vectors is None else vectors.shape[1]
                raise ValueError(
                    f"encode returned shape {tuple(chunk.shape)}, expected ({len(rows)}, {width})"
                )
            if unit:
                chunk = normalize(chunk)
            if dtype == torch.float16:
                chunk = to_float16(chunk)
            if isinstance(chunk, torch.Tensor):
                vectors.index_copy_(0, sent(torch.from_numpy(rows), vectors.device), chunk)
            else:
                vectors[rows] = chunk
            start = stop
            progress.reach(start)
    bad_row = first_not_finite(vectors)
    if bad_row is not None:
        raise ValueError(f"encode returned NaN or infinity for row {bad_row}")
    encoded: Vectors = vectors
    return encoded


def encode(
    encoder: Encoder,
    tokens: Tokens,
    *,
    device: torch.device | None = None,
    tokens_per_batch: int | None = None,
    unit: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Vectors:
    """Encode n texts within `evaluating`, sorted by length so that padding is short.

    Parameters
    ----------
    encoder : an `Encoder`
    tokens : n texts
    device : where to put the vectors, as a tensor; if not given, an array on the host
    tokens_per_batch : padded tokens per forward pass (number of texts times the longest of them);
        16,384 if not given, and eight times as many where the encoder is on a GPU
    unit : scale the vectors to length 1; zero ones stay zero
    dtype : of the result, float32 or float16

    Returns
    -------
    array or tensor of shape [n, dim]

    Raises
    ------
    TypeError
        The encoder returned something other than a tensor.
    ValueError
        The encoder returned a shape other than [texts, dim], or NaN or infinity.
    """
    if not len(tokens):
        return to_device(torch.empty(0, encoder.dim, dtype=dtype, device=device), device)
    if tokens_per_batch is None:
        weight = next(encoder.parameters(), None)
        on_gpu = weight is not None and weight.device.type == "cuda"
        tokens_per_batch = _TOKENS_PER_BATCH * (8 if on_gpu else 1)
    return _encoded(
        lambda rows: check_vectors(encoder(tokens.take(rows)), len(rows), encoder.dim),
        len(tokens),
        encoder,
        tokens_per_batch,
        tokens.lengths,
        device,
        unit,
        dtype,
    )


def check_vectors(vectors: torch.Tensor, rows: int, dim: int) -> torch.Tensor:
    """Return `vectors`, after a check that an encoder returned a [rows, dim] tensor."""
    if not isinstance(vectors, torch.Tensor):
        raise TypeError(f"encoder returned a {type(vectors).__name__}, expected a tensor")
    if tuple(vectors.shape) != (rows, dim):
        raise ValueError(f"encoder returned shape {tuple(vectors.shape)}, expected ({rows}, {dim})")
    return vectors

"""Encoding many rows with a model in training, without disturbing it."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ngame.arrays import as_count, as_ids
from ngame.data.tokens import Tokens
from ngame.encoders.vectors import Vectors, as_floats, first_not_finite, to_device


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluate within the block, and leave no trace of it in the training around it.

    Within the block the model is in evaluation mode and no gradients are taken. At its end, an
    error's too, the mode of every submodule is what it was (layers that are frozen in evaluation
    mode stay so), and so are the random states of Python, NumPy and torch, on the CPU and on every
    CUDA device: what training draws next does not depend on whether it was interrupted.

    Gradients are off by `torch.no_grad` rather than by inference mode, since a model may keep
    tensors made within the block (tables of positions, say) that training then needs.

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
    # Where CUDA is not yet in use there is no state, and asking for it would start the device.
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if in_use else ()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            model.eval()
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        # First as a whole, since a model's own `train` may do more than to set its mode.
        model.train(modes[0][1])
        for module, mode in modes:
            module.training = mode


def encode_rows(
    encode: Callable[[npt.NDArray[np.int64]], Any],
    n_rows: int,
    *,
    model: torch.nn.Module,
    chunk_size: int = 256,
    lengths: Any = None,
    device: torch.device | str | None = None,
) -> Vectors:
    """Encode rows 0 .. n_rows - 1 in chunks, within `evaluating`.

    Parameters
    ----------
    encode : callable
        Takes row ids, int64 [m], and returns their vectors, a float tensor (on any device) or
        array of shape [m, d].
    n_rows : int
        1 or more.
    model : torch.nn.Module
        What `encode` evaluates.
    chunk_size : int
        Rows encoded at once; with `lengths`, rows times the longest of them. A longer row goes
        alone.
    lengths : integer array of shape [n_rows], optional
        How long each row is, in whatever unit (1 if not given). Rows of like length go together,
        the longest first: so a model that pads wastes little, and memory that is short is found
        so at once.
    device : torch.device or str, optional
        Where the vectors are put; the host if not given. From one GPU, all of them stay there.

    Returns
    -------
    float32 array of shape [n_rows, d]; where `device` is given, a tensor on it

    Raises
    ------
    TypeError
        `encode` returned neither a tensor nor an array, or one that is not of floats.
    ValueError
        `encode` returned another shape than [m, d], or values that are not finite, the first such
        row being named; `lengths` has another number of rows.

    Examples
    --------
    >>> table = torch.nn.Embedding(10, 4)
    >>> encode_rows(lambda rows: table(torch.from_numpy(rows)), 10, model=table).shape
    (10, 4)
    """
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
    # On a terminal, and only where it takes a while.
    bar = tqdm(total=n_rows, desc="encoding", unit="row", disable=None, delay=2, leave=False)
    with evaluating(model), bar:
        start = 0
        while start < n_rows:
            stop = min(n_rows, start + max(1, chunk_size // int(lengths[order[start]])))
            rows = order[start:stop]
            chunk = as_floats(encode(rows), "encode returned", device)
            if vectors is None and chunk.ndim == 2:
                vectors = to_device(torch.empty(n_rows, chunk.shape[1], device=device), device)
            if vectors is None or chunk.shape != (len(rows), vectors.shape[1]):
                width = "width" if vectors is None else vectors.shape[1]
                raise ValueError(
                    f"encode returned shape {tuple(chunk.shape)}, expected ({len(rows)}, {width})"
                )
            vectors[rows] = chunk
            bar.update(stop - start)
            start = stop
    bad = first_not_finite(vectors)
    if bad is not None:
        raise ValueError(f"encode returned NaN or infinity for row {bad}")
    found: Vectors = vectors
    return found


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
        return to_device(torch.empty(0, dim, device=device), device)
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

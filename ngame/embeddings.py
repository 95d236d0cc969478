"""Embeddings of a model in training: had without disturbing it, and what they cost."""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ngame.arrays import as_count, as_ids
from ngame.vectors import Vectors, first_not_finite, placed

# Divides the rows of a bank on a device: far below any float32, so that of them only zero stays.
_LEAST_NORM = 1e-300


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
            chunk = _as_floats(encode(rows), "encode returned", device)
            if vectors is None and chunk.ndim == 2:
                vectors = placed(torch.empty(n_rows, chunk.shape[1], device=device), device)
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


class EmbeddingBank:
    """The vectors that the forward passes of a running trainer leave: a refresh costs nothing.

    Every row holds the direction it had when it was last stored, so that the vectors of an epoch
    come from a model that was changing; the method clusters such vectors by default (NGAME, Dahiya
    et al., WSDM 2023). Where several processes train, each stores its own rows only.

    Parameters
    ----------
    n_rows : int
        Number of training rows.
    dim : int
        Width of the vectors.
    device : torch.device or str, optional
        Where the bank lies; the host if not given. From a model on one GPU to a bank on it no
        vector leaves the GPU, and `update` does not wait for it.

    Attributes
    ----------
    vectors : float16 array of shape [n_rows, dim]; where `device` is given, a tensor on it
        Of unit length; zero where nothing, or a zero vector, was stored.

    Examples
    --------
    >>> bank = EmbeddingBank(3, 2)
    >>> bank.update([2, 0], torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    >>> bank.vectors.astype(float).round(1).tolist()
    [[0.0, -1.0], [0.0, 0.0], [0.6, 0.8]]
    >>> bank.unseen.tolist()
    [1]
    """

    def __init__(self, n_rows: int, dim: int, *, device: torch.device | str | None = None) -> None:
        shape = as_count(n_rows, "n_rows"), as_count(dim, "dim")
        self._device = None if device is None else torch.device(device)
        self.vectors: Any = placed(
            torch.zeros(shape, dtype=torch.float16, device=device), self._device
        )
        self._seen = np.zeros(n_rows, np.bool_)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.vectors)

    @property
    def unseen(self) -> npt.NDArray[np.int64]:
        """Ids of the rows that nothing was stored for, ascending."""
        return np.flatnonzero(~self._seen)

    def update(self, rows: Any, vectors: Any) -> None:
        """Store vectors of rows.

        Parameters
        ----------
        rows : integer array or tensor of shape [m]
            Of a row that repeats, the last vector stays.
        vectors : float tensor (on any device) or array of shape [m, dim]
            Taken without their gradients, and brought to unit length.

        Raises
        ------
        TypeError
            `rows` are no integers, or `vectors` no floats.
        ValueError
            The shapes do not agree, or `vectors` has NaN or infinity. Nothing is stored. On a
            device, which would have to be waited for, NaN and infinity are stored as NaN: whoever
            clusters the rows then refuses them, and names the first.
        IndexError
            A row is out of range.
        """
        ids = as_ids(rows.cpu().numpy() if isinstance(rows, torch.Tensor) else rows, "rows")
        values = _as_floats(vectors, "vectors is", self._device)
        expected = (len(ids), self.vectors.shape[1])
        if values.shape != expected:
            raise ValueError(f"vectors has shape {tuple(values.shape)}, expected {expected}")
        bad = (ids < 0) | (ids >= len(self))
        if bad.any():
            raise IndexError(f"rows has {ids[np.argmax(bad)]}, out of range for {len(self)}")
        if isinstance(values, torch.Tensor):
            # Which of the vectors of a row that repeats would stay is a matter of chance there.
            _, last = np.unique(ids[::-1], return_index=True)
            last = len(ids) - 1 - last
            directions = F.normalize(values[last].double(), dim=1, eps=_LEAST_NORM)
            self.vectors[ids[last]] = directions.half()
        else:
            norms = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
            if not np.isfinite(norms).all():
                at = int(np.argmin(np.isfinite(norms)))
                raise ValueError(f"vectors[{at}], of row {ids[at]}, has NaN or infinity")
            self.vectors[ids] = values / np.where(norms > 0, norms, 1)
        self._seen[ids] = True

    def state_dict(self) -> dict[str, Vectors]:
        """What a restart needs: `vectors`, and `seen`, a bool array [n_rows]."""
        return {"vectors": self.vectors, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises
        ------
        ValueError
            A key is missing, or the state is that of another number of rows or another width.
        """
        for name, here in self.state_dict().items():
            if name not in state:
                raise ValueError(f"state lacks {name}")
            if np.shape(state[name]) != here.shape:
                raise ValueError(
                    f"state has {name} of shape {np.shape(state[name])}, this bank {here.shape}"
                )
        self.vectors[:] = placed(torch.as_tensor(state["vectors"]), self._device)
        self._seen[:] = state["seen"]


class RefreshTimer:
    """How much of an epoch goes into the refresh of its batches.

    Examples
    --------
    >>> timer = RefreshTimer()
    >>> timer.start_epoch()
    >>> with timer:
    ...     time.sleep(0.001)
    >>> 0 < timer.share <= 1
    True
    """

    def __init__(self) -> None:
        self._entered = 0.0
        self.start_epoch()

    def start_epoch(self) -> None:
        """Begin to count, before the refresh of an epoch."""
        self._started = time.monotonic()
        self.refresh_seconds = 0.0

    def __enter__(self) -> Self:
        self._entered = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh_seconds += time.monotonic() - self._entered

    @property
    def seconds(self) -> float:
        """Since the start of the epoch."""
        return time.monotonic() - self._started

    @property
    def share(self) -> float:
        """Part of these seconds, from 0 to 1, that the refresh took."""
        seconds = self.seconds
        return self.refresh_seconds / seconds if seconds > 0 else 0.0


def _as_floats(value: Any, what: str, device: torch.device | None) -> Vectors:
    """A float tensor or array `placed` where it is wanted; `what` begins the error for others."""
    if isinstance(value, torch.Tensor):
        floats = value.is_floating_point()
    elif isinstance(value, np.ndarray):
        floats = value.dtype.kind == "f"
    else:
        raise TypeError(f"{what} a {type(value).__name__}, expected a float tensor or array")
    if not floats:
        dtype = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{what} of dtype {dtype}, expected floats")
    if isinstance(value, torch.Tensor):
        return placed(value.float(), device)  # NumPy knows no bfloat16
    return value if device is None else torch.tensor(value, dtype=torch.float32, device=device)

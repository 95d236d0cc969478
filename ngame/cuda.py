"""The core on a GPU: CUDA arrays in, CUDA tensors out.

The public functions call their namesakes here where an argument is on a CUDA device (see
`ngame.dispatch`). Memory comes from PyTorch's allocator, and all work is queued on the current
stream of the device.
"""

import math
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from ngame.arrays import as_count, as_csr, as_cutoffs, as_pairs, canonical, on_gpu

Addresses = tuple[int, int, int, int, int, bool]
"""A CSR pattern for `ngame._cuda`: addresses of indptr and indices, number of rows, columns and
stored entries, whether ids are int64."""


def _load() -> ModuleType | None:
    try:
        return import_module("ngame._cuda")
    except ModuleNotFoundError as error:
        if error.name != "ngame._cuda":
            raise
        return None


_cuda = _load()

# PyTorch 2.11 warns with the first sparse tensor of a process that such checks are off, also where
# `check_invariants` says so.
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)
    torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)


def describe() -> str:
    """The state of the GPU core in one line: its devices, or why it cannot be used."""
    if _cuda is None:
        return "not built (no CUDA compiler was found, or NGAME_CUDA=OFF)"
    count, reason = _cuda.devices()
    return f"{reason or f'{count} devices'}; built for {_cuda.architectures}"


def why_not(device: torch.device) -> str:
    """Why the GPU core cannot be used on a CUDA device; an empty string if it can."""
    if _cuda is None or not _cuda.devices()[0]:
        return describe()
    major, minor = torch.cuda.get_device_capability(device)
    built_for = [int(number) for number in re.findall(r"\d+", _cuda.architectures)]
    if built_for and 10 * major + minor < min(built_for):
        return f"{describe()}, the device is {major}{minor}"
    return ""


class _Call:
    """One call of `ngame._cuda` on the current stream of a device, and the memory it allocates.

    Buffers that are not taken return to PyTorch's allocator after the call.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if _cuda is None:
            raise ImportError(
                f"{name} on CUDA tensors needs ngame's GPU core, which this installation is "
                "without: install it where nvcc is found, or copy the tensors to the CPU"
            )
        if device.type != "cuda" and _cuda.__name__ == "ngame._cuda":
            raise TypeError(f"{name} got a tensor on {device}, expected a CUDA device")
        self.device = device
        self._buffers: dict[int, torch.Tensor] = {}

    def run(self, function: str, *arguments: Any) -> Any:
        """Call a function of `ngame._cuda` by name."""
        if self.device.type != "cuda":  # the emulation, in tests
            return getattr(_cuda, function)((0, 0, self._allocate), *arguments)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            index = torch.cuda.current_device()
            return getattr(_cuda, function)((index, stream, self._allocate), *arguments)

    def _allocate(self, size: int) -> int:
        # At least a byte, so that every buffer has its own address.
        buffer = torch.empty(max(1, size), dtype=torch.uint8, device=self.device)
        self._buffers[buffer.data_ptr()] = buffer
        return buffer.data_ptr()

    def take(self, address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """The buffer at an address that `run` returned."""
        return self._buffers[address][: count * dtype.itemsize].view(dtype)

    def take_pattern(self, found: tuple[int, int, int], shape: tuple[int, int]) -> torch.Tensor:
        """A bool CSR matrix of the buffers that `run` returned."""
        indptr, indices, nonzeros = found
        return torch.sparse_csr_tensor(
            self.take(indptr, shape[0] + 1, torch.int32),
            self.take(indices, nonzeros, torch.int32),
            torch.ones(nonzeros, dtype=torch.bool, device=self.device),
            shape,
            check_invariants=False,
        )

    def ids(self, value: Any, name: str) -> torch.Tensor:
        """Return `value`, an array or a tensor on any device, as int64 [n] on this device."""
        value = _as_tensor(value)
        if value.numel() == 0 and value.ndim == 1:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {value.dtype}, expected integers")
        if value.ndim != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected one dimension")
        ids: torch.Tensor = value.to(self.device, torch.int64).contiguous()
        return ids


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if hasattr(value, "__dlpack__") and hasattr(value, "__cuda_array_interface__"):
        from torch.utils.dlpack import from_dlpack

        return from_dlpack(value)
    return torch.as_tensor(value)


def _csr(value: Any, name: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.layout != torch.sparse_csr:
        kind = value.layout if isinstance(value, torch.Tensor) else type(value).__name__
        raise TypeError(f"{name} is a {kind}, expected a sparse CSR tensor")
    if value.ndim != 2:
        raise ValueError(f"{name} has {value.ndim} dimensions, expected 2")
    if value.shape[1] > 2**31 - 1:
        raise ValueError(f"{name} has {value.shape[1]} columns, at most 2**31 - 1 are possible")
    return value


def _upload(matrix: Any, device: torch.device) -> torch.Tensor:
    """Copy a SciPy CSR matrix to a device."""
    return torch.sparse_csr_tensor(
        torch.as_tensor(matrix.indptr, dtype=torch.int64),
        torch.as_tensor(matrix.indices, dtype=torch.int64),
        torch.as_tensor(matrix.data),
        matrix.shape,
        device=device,
        check_invariants=False,
    )


def _pairs(value: Any, name: str, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return the pairs that `ngame.arrays.as_pairs` takes, or a sparse CSR tensor, on a device."""
    if isinstance(value, torch.Tensor) and value.layout == torch.sparse_csr:
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
        return value.to(device)
    if isinstance(value, torch.Tensor):
        value = value.cpu()
    return _upload(as_pairs(value, name, shape), device)


_SCALARS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def as_matrix(value: Any, name: str, device: torch.device | None = None) -> torch.Tensor:
    """Return `value` as a float tensor [n, d] with contiguous rows, on `device` or its own."""
    matrix = _as_tensor(value).detach()
    if matrix.dtype not in _SCALARS:
        raise TypeError(f"{name} has dtype {matrix.dtype}, expected float32, float16 or bfloat16")
    if matrix.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}, expected two dimensions")
    if matrix.shape[0] > 2**31 - 1:
        raise ValueError(f"{name} has {matrix.shape[0]} rows, at most 2**31 - 1 are possible")
    matrix = matrix.to(device or matrix.device)
    rows_contiguous = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return matrix if rows_contiguous else matrix.contiguous()


def _dense(matrix: torch.Tensor) -> tuple[int, int, int, int, str]:
    rows, columns = matrix.shape
    return matrix.data_ptr(), rows, columns, matrix.stride(0), _SCALARS[matrix.dtype]


class _Pattern:
    """The pattern of a CSR tensor, which keeps its memory alive during a call."""

    def __init__(self, matrix: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        self.indptr = matrix.crow_indices().to(dtype or matrix.crow_indices().dtype).contiguous()
        self.indices = matrix.col_indices().to(self.indptr.dtype).contiguous()
        self.shape = tuple(matrix.shape)

    @property
    def addresses(self) -> Addresses:
        """Addresses and sizes."""
        wide = self.indptr.dtype == torch.int64
        addresses = self.indptr.data_ptr(), self.indices.data_ptr()
        return (*addresses, *self.shape, self.indices.numel(), wide)  # type: ignore[return-value]


def balanced_order(
    x: torch.Tensor, offsets: npt.NDArray[np.int64], seed: int, max_iter: int, *, refine: int
) -> npt.NDArray[np.int32]:
    """The order of `ngame.balanced_clusters`, computed on a device.

    Parameters
    ----------
    x : float32, float16 or bfloat16 tensor of shape [n, d], from `as_matrix`
    offsets : int64 array of shape [k + 1]
        Where each cluster begins in the order, ascending from 0 to n.
    seed : int
        0 .. 2**64 - 1. The same seed gives the same clusters, but not those of the CPU.
    max_iter : int
        Most iterations of each 2-means.
    refine : int
        Most rounds of refinement.

    Returns
    -------
    int32 array of shape [n]
        On the host, because batches are planned there.

    Raises
    ------
    ValueError
        `x` has NaN or infinity (the message names the first such row).
    """
    call = _Call("balanced_clusters", x.device)
    inverse = torch.empty(len(x), dtype=torch.float32, device=x.device)
    order = torch.empty(len(x), dtype=torch.int32, device=x.device)
    outputs = inverse.data_ptr(), order.data_ptr()
    call.run("balanced_clusters", _dense(x), offsets.tolist(), seed, max_iter, *outputs)
    if refine and len(offsets) > 2:
        order = _Refinement(x, inverse, offsets, order).run(refine)
    ids: npt.NDArray[np.int32] = order.cpu().numpy()
    return ids


# A round of refinement that makes the clusters tighter by less is the last, as on the CPU.
_LEAST_PROGRESS = 1.005


class _Refinement:
    """Rounds in which rows move to the nearest cluster that has room: see csrc/refine.h."""

    def __init__(
        self,
        x: torch.Tensor,
        inverse: torch.Tensor,
        offsets: npt.NDArray[np.int64],
        order: torch.Tensor,
    ) -> None:
        self.x, self.inverse, self.order = x, inverse, order
        self.offsets = torch.from_numpy(offsets).to(x.device)
        self.room = self.offsets.diff()
        clusters = torch.arange(len(self.room), dtype=torch.int32, device=x.device)
        # The cluster of each place of the order.
        self.places = clusters.repeat_interleave(self.room, output_size=len(x))
        self.means = self._empty((len(self.room), x.shape[1]), torch.float32)
        self.lengths = self._empty(len(self.room), torch.float32)

    def run(self, rounds: int) -> torch.Tensor:
        """Return the order after so many rounds at most."""
        tightest = self._find_means()
        for _ in range(rounds):
            before = self.order
            self.order = self._match(self._choose())
            if torch.equal(before, self.order):
                break
            found = self._find_means()
            if found <= tightest:
                self.order = before
            if found < _LEAST_PROGRESS * tightest:
                break
            tightest = found
        return self.order

    def _empty(self, shape: int | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def _run(self, function: str, *arguments: Any) -> Any:
        return _Call("balanced_clusters", self.x.device).run(function, *arguments)

    @property
    def _clustering(self) -> tuple[Any, ...]:
        arrays = self.inverse, self.offsets, self.order
        return (_dense(self.x), *(array.data_ptr() for array in arrays), len(self.room))

    def _find_means(self) -> float:
        """The unit means of all clusters; returns the coherence."""
        addresses = self.means.data_ptr(), self.lengths.data_ptr()
        self._run("cluster_means", self._clustering, *addresses)
        return float((self.lengths.double() / self.room).square().mean())

    def _choose(self) -> torch.Tensor:
        """The clusters that each row asks, as the keys of csrc/cuda/refine.h."""
        most = cast(ModuleType, _cuda).listed
        own = torch.arange(len(self.room), dtype=torch.int32, device=self.x.device)[:, None]
        _, near = topk_arrays(self.means, self.means, min(most, len(own)))
        # Itself first; where others have the same mean, it may not be among the nearest.
        near = torch.where(near == own, -1, near)
        lists = torch.cat([own, near], 1)
        last = (lists < 0).sort(dim=1, stable=True).indices[:, :most]
        lists = lists.gather(1, last).contiguous()
        keys = self._empty((len(self.x), cast(ModuleType, _cuda).asked), torch.int64)
        addresses = (array.data_ptr() for array in (self.means, self.lengths, lists))
        self._run("choose", self._clustering, *addresses, lists.shape[1], keys.data_ptr())
        return keys

    def _match(self, keys: torch.Tensor) -> torch.Tensor:
        """The order in which every cluster has the best of those that asked it."""
        home = torch.empty_like(self.order)
        home[self.order.long()] = self.places
        held = self._empty(len(self.x), torch.int64)
        counts = self._empty(len(self.room), torch.int32)
        refused = torch.empty_like(self.order)
        count = self._run(
            "match",
            len(self.x),
            self.offsets.data_ptr(),
            len(self.room),
            *(array.data_ptr() for array in (home, keys, held, counts, refused)),
        )
        # A place is taken if it is one of the first of its cluster.
        within = torch.arange(len(self.x), device=self.x.device) - self.offsets[self.places.long()]
        taken = within < counts[self.places.long()]
        rest = refused[:count].long()
        rest = rest[(home[rest].long() * len(self.x) + rest).argsort()]
        left = (~taken).cumsum(0) - 1
        ids = torch.where(
            taken, held & 0xFFFFFFFF, torch.cat([rest, rest.new_zeros(1)])[left.clamp(0, count)]
        )
        ids = (self.places.long() << 32 | ids).sort().values & 0xFFFFFFFF
        return ids.int()


def in_batch_positives(labels: Any, rows: Any, columns: Any) -> torch.Tensor:
    """`ngame.in_batch_positives` on a device.

    For training loops that keep their labels on the GPU. `ngame.train` keeps them on the host,
    where it plans its batches, and does not call this.

    Parameters
    ----------
    labels : sparse CSR tensor of shape [n, l]
        Column ids must ascend within a row.
    rows, columns : integer array or tensor
        On any device; copied to that of `labels`.

    Returns
    -------
    bool sparse CSR tensor of shape [b, c] with int32 ids

    Raises
    ------
    ValueError
        Column ids of a requested row do not ascend strictly.
    IndexError
        An id is out of range.
    """
    matrix = _csr(labels, "labels")
    call = _Call("in_batch_positives", matrix.device)
    row_ids, column_ids = call.ids(rows, "rows"), call.ids(columns, "columns")
    pattern = _Pattern(matrix)
    found = call.run(
        "in_batch_positives",
        pattern.addresses,
        row_ids.data_ptr(),
        len(row_ids),
        column_ids.data_ptr(),
        len(column_ids),
    )
    return call.take_pattern(found, (len(row_ids), len(column_ids)))


def label_pool(labels: Any, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`ngame.label_pool` on a device; arguments and errors are those of `in_batch_positives`.

    Returns
    -------
    pool : int32 tensor of shape [u]
    positives : bool sparse CSR tensor of shape [b, u] with int32 ids
    """
    matrix = _csr(labels, "labels")
    call = _Call("label_pool", matrix.device)
    row_ids = call.ids(rows, "rows")
    pattern = _Pattern(matrix)
    pool, size, found = call.run("label_pool", pattern.addresses, row_ids.data_ptr(), len(row_ids))
    return call.take(pool, size, torch.int32), call.take_pattern(found, (len(row_ids), size))


def _without_zeros(matrix: torch.Tensor) -> torch.Tensor:
    keep = matrix.values() != 0
    if bool(keep.all()):
        return matrix
    before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(
        before[matrix.crow_indices().long()],
        matrix.col_indices()[keep].long(),
        matrix.values()[keep],
        matrix.shape,
        check_invariants=False,
    )


def evaluate(
    predictions: Any,
    truth: Any,
    *,
    ks: Sequence[int] = (1, 3, 5),
    inverse_propensity: Any = None,
    drop: Any = None,
) -> dict[str, float]:
    """`ngame.metrics.evaluate` on a device.

    Parameters
    ----------
    predictions : float32 or float64 sparse CSR tensor of shape [n, l]
        Column ids must ascend strictly within each row.
    truth : sparse CSR tensor or SciPy CSR matrix of shape [n, l]
        Copied to the device of `predictions`, like the arguments below.
    ks, inverse_propensity
        As for `ngame.metrics.evaluate`.
    drop : sparse CSR tensor, CSR matrix or integer array
        Pairs that are left out.

    Returns
    -------
    dict of float

    Raises
    ------
    TypeError, ValueError, IndexError
        As `ngame.metrics.evaluate`; ValueError also if column ids repeat or are not sorted.
    """
    found = _evaluate(predictions, truth, ks, inverse_propensity, drop, False)
    return {name: float(values[0]) for name, values in found.items()}


def evaluate_rows(
    predictions: Any,
    truth: Any,
    *,
    ks: Sequence[int] = (1, 3, 5),
    inverse_propensity: Any = None,
    drop: Any = None,
) -> dict[str, torch.Tensor]:
    """`ngame.metrics.evaluate_rows` on a device; parameters and errors are those of `evaluate`.

    Returns
    -------
    dict of float64 tensors of shape [n], on the device
    """
    found = _evaluate(predictions, truth, ks, inverse_propensity, drop, True)
    device = predictions.device
    return {name: torch.from_numpy(values).to(device) for name, values in found.items()}


def _evaluate(
    predictions: Any,
    truth: Any,
    ks: Sequence[int],
    inverse_propensity: Any,
    drop: Any,
    by_row: bool,
) -> dict[str, npt.NDArray[np.float64]]:
    """The values of each metric: one for each row, or their mean alone."""
    scored = _csr(predictions, "predictions")
    call = _Call("evaluate", scored.device)
    if scored.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"predictions has dtype {scored.dtype}, expected float32 or float64")
    if sp.issparse(truth):
        truth = _upload(canonical(as_csr(truth, "truth")), scored.device)
    positives = _without_zeros(_csr(truth, "truth").to(scored.device))
    if not bool((positives.values() >= 0).all()):  # NaN too
        raise ValueError("truth holds negative values or NaN, expected nonzero for positives")
    rows, labels = scored.shape
    if positives.shape != scored.shape:
        raise ValueError(
            f"truth has shape {tuple(positives.shape)}, predictions has {(rows, labels)}"
        )
    if rows == 0:
        raise ValueError("predictions has no rows")
    cuts = as_cutoffs(ks)
    weights = None
    if inverse_propensity is not None:
        weights = _as_tensor(inverse_propensity).to(scored.device, torch.float32).contiguous()
        if weights.shape != (labels,):
            raise ValueError(
                f"inverse_propensity has shape {tuple(weights.shape)}, expected ({labels},)"
            )
        if not bool((weights.isfinite() & (weights > 0)).all()):
            raise ValueError("inverse_propensity has values that are not positive and finite")
    pattern = _Pattern(scored)
    index = pattern.indptr.dtype
    positive = _Pattern(positives, index)
    dropped = None
    if drop is not None:
        dropped = _Pattern(_pairs(drop, "drop", (rows, labels), scored.device), index)
    scores = scored.values().contiguous()
    families = call.run(
        "evaluate",
        pattern.addresses,
        scores.data_ptr(),
        scores.dtype == torch.float64,
        positive.addresses,
        dropped.addresses if dropped else None,
        0 if weights is None else weights.data_ptr(),
        cuts,
        by_row,
    )
    names = ["P", "N", "R", "MRR", "MAP", "HR"] + ([] if weights is None else ["PSP", "PSN"])
    return {
        f"{name}@{k}": values
        for name in names
        for k, values in zip(cuts, families[name].reshape(len(cuts), -1), strict=True)
    }


def topk_arrays(
    queries: Any, items: Any, k: int, *, metric: str = "cosine", drop: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ngame.topk_arrays` on a device.

    Parameters
    ----------
    queries, items : float32, float16 or bfloat16 tensors of shape [n, d] and [m, d]
        If one is on the CPU, it is copied to the device of the other.
    k, metric
        As for `ngame.topk_arrays`.
    drop : sparse CSR tensor, CSR matrix or integer array
        (query, item) pairs that are left out.

    Returns
    -------
    scores : float32 tensor of shape [n, k]
    ids : int32 tensor of shape [n, k]

    Raises
    ------
    TypeError, ValueError, IndexError
        As `ngame.topk_arrays`; for "dot" also if a row's norm exceeds 2**63.
    """
    device = _as_tensor(items if on_gpu(items) else queries).device
    call = _Call("topk_arrays", device)
    queries, items = as_matrix(queries, "queries", device), as_matrix(items, "items", device)
    if queries.shape[1] != items.shape[1]:
        raise ValueError(f"queries has {queries.shape[1]} columns, items has {items.shape[1]}")
    if metric not in ("cosine", "dot"):
        raise ValueError(f'metric is {metric!r}, expected "cosine" or "dot"')
    k = as_count(k, "k")
    if k > len(items):
        raise ValueError(f"k is {k}, items has only {len(items)} rows")
    dropped = None
    if drop is not None:
        shape = len(queries), len(items)
        dropped = _Pattern(_pairs(drop, "drop", shape, device), torch.int64)
    scores = torch.empty((len(queries), k), dtype=torch.float32, device=device)
    ids = torch.empty((len(queries), k), dtype=torch.int32, device=device)
    product = _Product(queries, items, k)
    with _exact_sums:
        call.run(
            "topk",
            _dense(queries),
            _dense(items),
            dropped.addresses if dropped else None,
            k,
            metric == "cosine",
            product.arguments,
            scores.data_ptr(),
            ids.data_ptr(),
        )
    return scores, ids


class _ExactSums:
    """PyTorch's products of bfloat16 are summed in float32 throughout while this is entered.

    By default parts of a long sum may be added in bfloat16, which the search cannot allow for. The
    setting is the process's: the last of several threads to leave restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: Any = False

    def __enter__(self) -> None:
        settings = torch.backends.cuda.matmul
        with self._lock:
            if self._inside == 0:
                self._before = settings.allow_bf16_reduced_precision_reduction
                # A second part, in newer versions, which setting the first alone would turn on.
                split = getattr(settings, "allow_bf16_reduced_precision_reduction_split_k", None)
                if split is not None:
                    self._before = self._before, split
                settings.allow_bf16_reduced_precision_reduction = False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                settings = torch.backends.cuda.matmul
                settings.allow_bf16_reduced_precision_reduction = self._before


_exact_sums = _ExactSums()

# Most queries of a block, and least items: on an H100 smaller blocks, though they would stay in its
# cache, take up to a quarter longer. Where queries are few, a block has so many scores.
_BLOCK_QUERIES = 8192
_BLOCK_ITEMS = 16_384
_BLOCK_SCORES = 1 << 25


class _Product:
    """The products of rounded rows, by PyTorch, and their memory."""

    def __init__(self, queries: torch.Tensor, items: torch.Tensor, k: int) -> None:
        device = queries.device
        # Candidates take memory too: of a query some 64 bytes for each of the k.
        block = max(1, min(_BLOCK_QUERIES, len(queries), max(128, _BLOCK_SCORES // (4 * k))))
        # Rows of 16 bytes: else the product is several times slower.
        columns, width = (
            math.ceil(count / 8) * 8
            for count in (
                queries.shape[1],
                min(len(items), max(_BLOCK_ITEMS, _BLOCK_SCORES // block)),
            )
        )
        rows = (len(queries), len(items))
        self._left, self._right = (
            torch.empty((n, columns), dtype=torch.bfloat16, device=device) for n in rows
        )
        self._scores = torch.empty((block, width), dtype=torch.bfloat16, device=device)

    def multiply(self, first_query: int, last_query: int, first_item: int, last_item: int) -> None:
        """Queue one product."""
        torch.mm(
            self._left[first_query:last_query],
            self._right[first_item:last_item].T,
            out=self._scores[: last_query - first_query, : last_item - first_item],
        )

    @property
    def arguments(
        self,
    ) -> tuple[int, int, int, int, int, int, Callable[[int, int, int, int], None]]:
        """What `ngame._cuda.topk` takes."""
        addresses = [part.data_ptr() for part in (self._left, self._right, self._scores)]
        return (
            *addresses[:2],
            self._left.shape[1],
            addresses[2],
            *self._scores.shape,
            self.multiply,
        )


def ranked_csr(scores: torch.Tensor, ids: torch.Tensor, columns: int) -> torch.Tensor:
    """Scores and ids from `topk_arrays` as a sparse CSR tensor of shape [n, columns], int32 ids."""
    ids, order = torch.where(ids < 0, 2**31 - 1, ids).sort(dim=1)
    found = ids < 2**31 - 1
    return torch.sparse_csr_tensor(
        torch.nn.functional.pad(found.sum(1).cumsum(0), (1, 0)).int(),
        ids[found],
        scores.gather(1, order)[found],
        (len(ids), columns),
        check_invariants=False,
    )

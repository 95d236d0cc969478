"""Arguments of the public functions: checked once, copied only where necessary."""

import math
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame import _core

Csr: TypeAlias = sp.csr_matrix | sp.csr_array
"""What functions of sparse matrices take."""

Pairs: TypeAlias = Csr | npt.ArrayLike
"""Pairs of row and column: the entries of a CSR matrix, or an integer array [p, 2]."""

Pattern = tuple[npt.NDArray[Any], npt.NDArray[Any], int]
"""A CSR pattern as the core takes it: indptr, indices (both int32 or both int64), columns."""


class ProcessGroup(Protocol):
    """A process group of torch.distributed, without the import of torch."""

    def rank(self) -> int:
        """Number of this process in the group."""
        ...

    def size(self) -> int:
        """Number of processes."""
        ...


def on_gpu(value: Any) -> bool:
    """Whether an array or tensor is on a CUDA device; needs no import of its library."""
    kind = getattr(getattr(value, "device", None), "type", None)
    if isinstance(kind, str):  # a tensor of torch; to ask a sparse one for the interface fails
        return kind == "cuda"
    return hasattr(value, "__cuda_array_interface__")


def as_array(value: Any, name: str) -> npt.NDArray[Any]:
    """Return `value` as an array, without a copy where possible.

    Tensors that need a gradient are detached; bfloat16, which NumPy does not have, becomes float32.
    """
    if on_gpu(value):
        raise TypeError(f"{name} is on a CUDA device, expected an array on the host")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array, and nothing here reads its mask: leave out what is masked, "
            f"or give it a value by {name}.filled(value)"
        )
    if hasattr(value, "detach"):
        value = value.detach()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
    try:
        return np.asarray(value)
    except TypeError as error:  # torch's: a sparse tensor, or one of a type that NumPy lacks
        raise TypeError(f"{name} cannot be read as an array: {error}") from None
    except ValueError:
        if not isinstance(value, (list, tuple)):
            raise
        raise ValueError(f"{name} is a ragged list: its rows differ in length") from None


def is_sparse(value: Any) -> bool:
    """Whether it is a matrix of SciPy or a tensor in one of the sparse layouts."""
    return sp.issparse(value) or str(getattr(value, "layout", "")).startswith("torch.sparse")


def as_matrix(value: Any, name: str) -> npt.NDArray[Any]:
    """Return `value` as a float32 or float16 array of shape [n, d] whose rows are contiguous.

    Only arrays with non-contiguous rows or foreign byte order are copied. There may be gaps
    between rows: slices of a wider or longer array are not copied. A bfloat16 tensor becomes
    float32.
    """
    if sp.issparse(value):
        raise TypeError(
            f"{name} is a sparse matrix, expected a dense array; sparse_topk takes those"
        )
    array = as_array(value, name)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4):
        raise TypeError(f"{name} has dtype {array.dtype}, expected float32 or float16")
    if array.ndim != 2:
        raise ValueError(f"{name} has shape {array.shape}, expected two dimensions")
    itemsize = array.itemsize
    row_bytes = array.shape[1] * itemsize
    rows_contiguous = array.shape[1] <= 1 or array.strides[1] == itemsize
    rows_separate = array.shape[0] <= 1 or (
        array.strides[0] >= row_bytes and array.strides[0] % itemsize == 0
    )
    if rows_contiguous and rows_separate and array.flags.aligned and array.dtype.isnative:
        return array
    return contiguous(array, array.dtype.newbyteorder("="))


def contiguous(array: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
    """An array as the core reads it: in one piece, at addresses that suit its type.

    It is copied only if it is not; `numpy.ascontiguousarray` leaves odd addresses as they are.
    """
    return np.require(array, dtype, ["C", "ALIGNED", "ENSUREARRAY"])


def as_csr(value: Any, name: str, *, any_order: bool = False) -> Any:
    """Check `value`, a CSR matrix or array, and sort its indices unless `any_order`.

    Unsorted indices are sorted in a copy: the caller's matrix is never changed. A sparse CSR tensor
    on the host is taken too.
    """
    layout = str(getattr(value, "layout", ""))
    if layout == "torch.sparse_csr":
        parts = value.values(), value.col_indices(), value.crow_indices()
        values, columns, offsets = (as_array(part, name) for part in parts)
        value = sp.csr_matrix((values, columns, offsets), shape=tuple(value.shape))
    elif layout.startswith("torch.sparse"):
        raise TypeError(f"{name} is a {layout} tensor, expected CSR: call to_sparse_csr()")
    if not sp.issparse(value) or value.format != "csr":
        kind = f"{value.format} matrix" if sp.issparse(value) else type(value).__name__
        raise TypeError(f"{name} is a {kind}, expected a scipy.sparse CSR matrix or array")
    if value.shape[1] > np.iinfo(np.int32).max:
        raise ValueError(f"{name} has {value.shape[1]} columns, at most 2**31 - 1 are possible")
    _check_arrays(value, name)
    value = _in_one_piece(value)
    # SciPy's flag is cheap to read, and the core checks the order of each row that it uses. SciPy's
    # compiled code trusts indptr, so it must be checked before SciPy looks at the indices.
    if not any_order and getattr(value, "_has_canonical_format", None) is not True:
        check_rows(value, name)
        if not value.has_sorted_indices:
            value = value.sorted_indices()
    return value


def as_weighted_rows(value: Any, name: str) -> Any:
    """Return a CSR matrix of float32 without duplicates."""
    matrix = as_csr(value, name)
    if matrix.dtype != np.float32:
        raise TypeError(f"{name} has dtype {matrix.dtype}, expected float32")
    return canonical(matrix)


def canonical(matrix: Any) -> Any:
    """A matrix from `as_csr` without duplicates, which are summed in a copy."""
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    return matrix


def with_dtype(matrix: Any, dtype: npt.DTypeLike) -> Any:
    """The matrix with values of another type; `astype` would sum duplicates in the caller's."""
    found = copy(matrix)  # the object, not its arrays
    found.data = matrix.data.astype(dtype)
    return found


def check_rows(matrix: Any, name: str) -> None:
    """Reject a CSR matrix whose indptr descends or points outside the stored entries."""
    starts, ends = matrix.indptr[:-1], matrix.indptr[1:]
    bad = (starts < 0) | (ends < starts) | (ends > len(matrix.indices))
    if bad.any():
        raise ValueError(
            f"{name}: indptr of row {int(np.argmax(bad))} does not ascend within the stored entries"
        )


def check_columns(matrix: Any, name: str) -> None:
    """Reject a CSR matrix with a column out of range; much of SciPy's compiled code trusts them."""
    outside = (matrix.indices < 0) | (matrix.indices >= matrix.shape[1])
    if outside.any():
        place = int(np.argmax(outside))
        row = int(np.searchsorted(matrix.indptr, place, side="right")) - 1
        raise IndexError(
            f"{name}: column {matrix.indices[place]} in row {row} is out of range for "
            f"{matrix.shape[1]} columns"
        )


def _check_arrays(matrix: Any, name: str) -> None:
    """Reject arrays of the wrong type or length, which SciPy lets a caller assign."""
    indptr, indices, data = matrix.indptr, matrix.indices, matrix.data
    if indptr.dtype != indices.dtype or indptr.dtype not in (np.int32, np.int64):
        raise TypeError(
            f"{name}: indptr and indices must both be int32 or int64, "
            f"they are {indptr.dtype} and {indices.dtype}"
        )
    if not indptr.ndim == indices.ndim == data.ndim == 1:
        raise ValueError(f"{name}: indptr, indices and data must have one dimension each")
    if len(indptr) != matrix.shape[0] + 1:
        raise ValueError(
            f"{name}: indptr has {len(indptr)} elements, expected {matrix.shape[0] + 1}"
        )
    if len(data) != len(indices):
        raise ValueError(
            f"{name}: data and indices differ in length, {len(data)} and {len(indices)}"
        )


def _in_one_piece(matrix: Any) -> Any:
    """The matrix over arrays that the core can read, without what lies behind the last row.

    SciPy takes a column of a larger array, and arrays with room to spare, as they are.
    """
    last = int(matrix.indptr[-1])
    end = last if 0 <= last < len(matrix.indices) else None  # what is wrong is told later
    arrays = {"indptr": matrix.indptr, "indices": matrix.indices, "data": matrix.data}
    if end is None and all(one.flags.c_contiguous and one.flags.aligned for one in arrays.values()):
        return matrix
    matrix = copy(matrix)  # the object, not its arrays
    for name, array in arrays.items():
        setattr(matrix, name, contiguous(array if name == "indptr" else array[:end]))
    return matrix


def pattern(matrix: Any, dtype: npt.DTypeLike | None = None) -> Pattern:
    """The pattern of a CSR matrix, with ids of integer type `dtype` if given."""
    indptr, indices = matrix.indptr, matrix.indices
    if dtype is not None:
        indptr, indices = indptr.astype(dtype, copy=False), indices.astype(dtype, copy=False)
    return contiguous(indptr), contiguous(indices), int(matrix.shape[1])


def as_ids(value: Any, name: str) -> npt.NDArray[np.int64]:
    """Return `value` as int64 of shape [n]; an empty list means no ids."""
    array = as_array(value, name)
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}, expected integers")
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}, expected one dimension")
    return contiguous(array, np.int64)


def refuse_class(value: Any, name: str) -> None:
    """TypeError for a class where one made of it is wanted."""
    if isinstance(value, type):
        kind = value.__name__
        raise TypeError(f"{name} is the class {kind}, expected one made of it: {kind}(...)")


def refuse_names(value: npt.NDArray[Any], name: str) -> None:
    """TypeError for strings where integers are wanted, with what makes integers of them."""
    named = value.dtype.kind in "SU" or (
        value.dtype.kind == "O" and any(isinstance(one, str) for one in value.flat)
    )
    if named:
        raise TypeError(
            f"{name} holds strings, expected integers: "
            f"np.unique({name}, return_inverse=True)[1] numbers them"
        )


def as_pairs(value: Any, name: str, shape: tuple[int, int]) -> Any:
    """Return (row, column) pairs as a CSR matrix of `shape`, every stored entry True.

    `value` is an integer array [n, 2], repeats allowed, or a CSR matrix whose stored entries are
    the pairs, whatever their values.
    """
    if is_sparse(value):
        matrix = as_csr(value, name)
        if matrix.shape != shape:
            raise ValueError(f"{name} has shape {matrix.shape}, expected {shape}")
        check_rows(matrix, name)  # before SciPy takes some of the rows, or all by column
        check_columns(matrix, name)
        pairs = copy(canonical(matrix))
        pairs.data = np.ones(len(pairs.data), np.bool_)  # a stored 0 is a pair like any other
        return pairs
    per_row = (
        f"{name} is a list with an entry for each row, expected (row, column) pairs [n, 2], or a "
        f"CSR matrix of shape {shape}"
    )
    try:
        array = as_array(value, name)
    except ValueError:
        if isinstance(value, list | tuple) and len(value) == shape[0]:
            raise ValueError(per_row) from None
        raise
    if array.size == 0:
        array = array.reshape(0, 2).astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"{name} has dtype {array.dtype}, expected integer pairs [n, 2], or a CSR matrix"
        )
    if array.ndim != 2 or array.shape[1] != 2:
        listed = array.ndim == 2 and len(array) == shape[0]
        raise ValueError(per_row if listed else f"{name} has shape {array.shape}, expected [n, 2]")
    for axis, what in enumerate(("row", "column")):
        bad = (array[:, axis] < 0) | (array[:, axis] >= shape[axis])
        if bad.any():
            pair = int(np.argmax(bad))
            raise IndexError(
                f"{name}[{pair}] has {what} {array[pair, axis]}, out of range for {shape[axis]}"
            )
    ones = np.ones(len(array), np.bool_)
    return sp.csr_array((ones, (array[:, 0], array[:, 1])), shape=shape)


@contextmanager
def renamed(**names: str) -> Iterator[None]:
    """Let errors within the block name the caller's arguments: ``renamed(x="source")``."""
    try:
        yield
    except (TypeError, ValueError, IndexError) as error:
        message = str(error)
        for name, callers in names.items():
            if re.match(rf"{name}\b", message):
                raise type(error)(callers + message[len(name) :]) from None
        raise


def as_list(values: Any, name: str) -> list[Any]:
    """Return a sequence as a list; TypeError for a single thing where several are expected."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} is a {type(values).__name__}, expected a list: [...]")
    return list(values)


def as_texts(texts: Any, name: str) -> list[str]:
    """Return `texts`, any iterable of strings, as a list."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} is a {type(texts).__name__}, expected a sequence of str")
    checked: list[str] = []
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{row}] is a {type(text).__name__}, expected a str")
        if fault := text_fault(text):
            raise ValueError(f"{name}[{row}] {fault}")
        checked.append(text)
    return checked


def text_fault(text: str) -> str | None:
    """What is wrong with a text, or None."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            return "holds a lone surrogate, which is no character"
    return None


def as_count(value: Any, name: str, least: float = 1, most: float = 2**31 - 1) -> int:
    """Return `value` as an int from `least` to `most`; the core counts in 32 bits."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is a {type(value).__name__}, expected an integer") from None
    if count < least:
        raise ValueError(f"{name} is {count}, expected {least} or more")
    if count > most:
        raise ValueError(f"{name} is {count}, expected at most {most}")
    return count


def as_number(value: Any, name: str) -> float:
    """Return `value`, a finite number, as a float."""
    if not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a float")
    try:
        number = float(value)
    except OverflowError:  # of an int
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}, expected a finite number")
    return number


def as_cutoffs(ks: Iterable[Any]) -> list[int]:
    """The distinct cut-offs of a ranking, ascending."""
    if not isinstance(ks, Iterable):
        raise TypeError(f"ks is {ks!r}, expected integers, such as [{ks!r}]")
    cuts = sorted({as_count(k, "ks") for k in ks})
    if not cuts:
        raise ValueError("ks is empty")
    return cuts


MAX_THREADS = 1024
"""Most threads of a call, as in the core. More than the machine has CPUs gain nothing."""


def as_threads(threads: Any) -> int:
    """Number of threads to use; 0 means the CPUs this process may use."""
    return as_count(threads, "threads", 0, MAX_THREADS) or min(_core.usable_cpus(), MAX_THREADS)


def new_csr(
    values: npt.NDArray[Any],
    columns: npt.NDArray[np.int32],
    offsets: npt.NDArray[Any],
    shape: tuple[int, int],
) -> sp.csr_matrix:
    """A CSR matrix of arrays that the core made, flagged as sorted and without duplicates."""
    matrix = sp.csr_matrix((values, columns, offsets), shape=shape)
    matrix.has_sorted_indices = True
    matrix.has_canonical_format = True
    return matrix


def widened(matrix: Any, columns: int) -> Any:
    """A CSR matrix with empty columns behind its own; it shares the arrays."""
    return sp.csr_matrix((matrix.data, matrix.indices, matrix.indptr), (matrix.shape[0], columns))


def pairs_of(matrix: sp.csr_matrix) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.integer]]:
    """Rows and columns of the stored entries."""
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr)), matrix.indices


def values_at(matrix: sp.csr_matrix, pairs: sp.csr_matrix) -> npt.NDArray[np.float32]:
    """Values of a matrix with sorted indices at the entries of another, 0 where it has none."""
    width = np.int64(max(matrix.shape[1], pairs.shape[1]))
    stored, wanted = (rows * width + ids for rows, ids in map(pairs_of, (matrix, pairs)))
    place = np.searchsorted(stored, wanted)
    place[place == len(stored)] = 0
    values = np.zeros(len(wanted), np.float32)
    if len(stored):
        there = stored[place] == wanted
        values[there] = matrix.data[place[there]]
    return values

"""Sparse matrices as text: a header ``rows columns``, then a row a line of ``column:value`` pairs.

The format of the extreme-classification repository: LIBSVM's without the targets. Also its older
one, with the labels in front.
"""

import io
import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame import _core
from ngame.arrays import canonical
from ngame.files import atomic_write

# How much text is parsed, and how many rows are written, at once.
_BLOCK_BYTES = 1 << 24
_BLOCK_ROWS = 1 << 16

# No file has more rows or columns; a number beyond this is a mistake, which NumPy and SciPy tell in
# words that name no file.
_MOST = 1 << 48


class SparseText(NamedTuple):
    """The content of such a file, row after row.

    Attributes
    ----------
    name : str
        The file's name, for messages.
    header : (rows, columns), or None where the file has none
    offsets : int64 array of shape [rows + 1]
        Row r is ``ids[offsets[r]:offsets[r + 1]]``.
    ids : int64 array, as written: neither sorted nor checked against the header
    values : array of the ids' length
    """

    name: str
    header: tuple[int, int] | None
    offsets: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    values: npt.NDArray[Any]

    def without_blank_end(self) -> "SparseText":
        """The same without blank lines at the end that are more than the header's rows."""
        rows = len(self.offsets) - 1 if self.header is None else self.header[0]
        if rows >= len(self.offsets) - 1 or self.offsets[rows] < self.offsets[-1]:
            return self
        return self._replace(offsets=self.offsets[: rows + 1])

    def refuse(self, wrong: npt.NDArray[np.bool_], what: str) -> None:
        """Raise ValueError for the first pair that is `wrong`, if there is one.

        Parameters
        ----------
        wrong : bool array of the ids' length
        what : str
            The message after ``file:line: ``; ``{id}`` and ``{value}`` are those of the pair.
        """
        if wrong.any():
            pair = int(np.argmax(wrong))
            row = int(np.searchsorted(self.offsets, pair, side="right")) - 1
            line = row + (1 if self.header is None else 2)
            what = what.format(id=self.ids[pair], value=self.values[pair])
            raise ValueError(f"{self.name}:{line}: {what}")

    def matrix(self, shape: tuple[int, int], *, sum_duplicates: bool = False) -> sp.csr_matrix:
        """The CSR matrix of these pairs, indices sorted; rows missing at the end are empty.

        Raises
        ------
        ValueError
            There are more rows, an id is out of range, or, unless `sum_duplicates`, a row has an id
            twice; the message names the line.
        """
        rows, columns = len(self.offsets) - 1, shape[1]
        if rows > shape[0]:
            raise ValueError(f"{self.name}: has {rows} rows, expected {shape[0]}")
        self.refuse(self.ids >= _MOST, f"id {{id}} is too large, expected at most {_MOST - 1}")
        wrong = (self.ids < 0) | (self.ids >= columns)
        self.refuse(wrong, f"id {{id}} is out of range; there are {columns} columns")
        ends = np.append(self.offsets, np.full(shape[0] - rows, self.offsets[-1]))
        # A sorted copy: the matrix shares its arrays with this object.
        matrix = sp.csr_matrix((self.values, self.ids, ends), shape=shape).sorted_indices()
        if not matrix.has_canonical_format:
            if not sum_duplicates:
                twice = np.append(False, np.diff(matrix.indices) == 0)
                twice[matrix.indptr[:-1][np.diff(matrix.indptr) > 0]] = False
                self.refuse(twice, f"id {matrix.indices[np.argmax(twice)]} is given twice")
            matrix.sum_duplicates()
        return matrix


def read_sparse_text(
    file: str | os.PathLike[str] | BinaryIO,
    *,
    header: bool = True,
    dtype: npt.DTypeLike = np.float32,
) -> SparseText:
    """Read a sparse matrix from text.

    An empty line is an empty row, unless it comes after the last row that the header counts. ``#``
    starts a comment, and a byte-order mark is skipped. A value is a decimal number, rounded to
    `dtype`: one too close to zero becomes zero. NaN, infinity, and what `dtype` cannot hold are
    errors.

    Parameters
    ----------
    file : path, or a file open for reading bytes
    header : bool
        Whether the first line is ``rows columns``.
    dtype : of the values

    Raises
    ------
    ValueError
        The header or a pair is malformed, or a value does not fit `dtype`; the message says
        ``file:line: what``.
    """
    if isinstance(file, str | os.PathLike):
        with open(file, "rb") as stream:
            return read_sparse_text(stream, header=header, dtype=dtype)
    name = str(getattr(file, "name", "file"))
    blocks = _blocks(file)
    shape = _header(next(blocks, b""), f"{name}:1") if header else None
    lines = 1 if header else 0
    counts, ids, values = [np.zeros(1, np.int64)], [np.empty(0, np.int64)], [np.empty(0, dtype)]
    for block in blocks:
        found = _core.parse_sparse_text(block)
        _check_range(found, np.dtype(dtype), name, lines)
        lines += len(found[0])
        if found[3] >= 0:
            word = block[found[3] :].split(maxsplit=1)[0].decode("utf8", "replace")
            raise ValueError(f"{name}:{lines + 1}: {word[:40]!r} is not label:value{_hint(word)}")
        counts.append(found[0])
        ids.append(found[1])
        values.append(found[2].astype(dtype))
    offsets = np.cumsum(np.concatenate(counts))
    text = SparseText(name, shape, offsets, np.concatenate(ids), np.concatenate(values))
    return text.without_blank_end()


def split_labelled_text(
    path: str | os.PathLike[str], *, header: bool = True
) -> tuple[BinaryIO, SparseText, tuple[int, int, int] | None]:
    """Split a file of ``label,label column:value column:value`` into its labels and the rest.

    Blanks or tabs part a line; a label may be written as ``3.0``.

    Parameters
    ----------
    path : str or path
    header : bool
        Whether the first line is ``rows features labels``.

    Returns
    -------
    features : file of bytes, of that name, for `read_sparse_text`, with its header if there is one
    labels : SparseText of ones
    shape : (rows, features, labels), or None without a header

    Raises
    ------
    ValueError
        The header or a label is malformed; the message says ``file:line: what``.
    """
    name = os.fspath(path)
    labels: list[int] = []
    ends = [0]
    features = io.BytesIO()
    features.name = name
    shape: tuple[int, int, int] | None = None
    with open(path, "rb") as file:
        if header:
            line = file.readline().removeprefix(BOM_UTF8)
            try:
                rows, columns, classes = (_number(part) for part in line.split())
            except ValueError:
                shown = line[:40].decode("utf8", "replace").rstrip("\r\n")
                raise ValueError(
                    f"{name}:1: header {shown!r}; expected rows, features and labels"
                ) from None
            shape = rows, columns, classes
            features.write(b"%d %d\n" % (rows, columns))
        for number, line in enumerate(file, 2 if header else 1):
            if number == 1:
                line = line.removeprefix(BOM_UTF8)
            word = b"" if line[:1].isspace() else line.split(maxsplit=1)[0]
            if b":" in word:  # no labels
                word = b""
            try:
                labels.extend(_label(label) for label in word.split(b",") if label)
            except ValueError:
                shown = word[:40].decode("utf8", "replace")
                raise ValueError(f"{name}:{number}: {shown!r} is not label,label") from None
            ends.append(len(labels))
            features.write(line.removeprefix(word).lstrip(b" \t") or b"\n")
    features.seek(0)
    ids = np.array(labels, np.int64)
    of_labels = None if shape is None else (shape[0], shape[2])
    text = SparseText(name, of_labels, np.array(ends), ids, np.ones(len(ids)))
    return features, text.without_blank_end(), shape


def write_sparse_text(path: str | os.PathLike[str], matrix: Any, *, header: bool = True) -> None:
    """Write a CSR matrix in one step; columns ascend, values are written so that they come back.

    Parameters
    ----------
    path : str or path
    matrix : CSR matrix of numbers; booleans are written as 1
        Stored zeros are written too. Duplicates are summed in a copy.
    header : bool
        Whether to begin with the line ``rows columns``.

    Raises
    ------
    ValueError
        The matrix has NaN or infinity, which could not be read again.
    """
    if not matrix.has_sorted_indices:
        matrix = matrix.sorted_indices()
    matrix = canonical(matrix)
    if not np.isfinite(matrix.data).all():
        raise ValueError("matrix has NaN or infinity, which sparse text does not hold")
    with atomic_write(path) as aside, open(aside, "w", encoding="ascii", newline="\n") as file:
        if header:
            file.write(f"{matrix.shape[0]} {matrix.shape[1]}\n")
        for start in range(0, matrix.shape[0], _BLOCK_ROWS):
            offsets = matrix.indptr[start : start + _BLOCK_ROWS + 1]
            part = slice(offsets[0], offsets[-1])
            data = matrix.data[part]
            # NumPy's conversion writes as many digits as the type needs.
            values = (data.astype(np.int8) if data.dtype == np.bool_ else data).astype(str)
            pairs = [
                f"{column}:{value}"
                for column, value in zip(
                    matrix.indices[part].tolist(), values.tolist(), strict=True
                )
            ]
            ends = (offsets - offsets[0]).tolist()
            file.writelines(" ".join(pairs[first:last]) + "\n" for first, last in pairwise(ends))


def _header(line: bytes, where: str) -> tuple[int, int]:
    try:
        rows, columns = (_number(part) for part in line.split())
    except ValueError:
        rows = columns = -1
    if min(rows, columns) < 0:
        shown = line[:40].decode("utf8", "replace").rstrip("\r\n")
        raise ValueError(f"{where}: header {shown!r}; expected rows and columns")
    return rows, columns


def _hint(word: str) -> str:
    """What a malformed pair may have been meant as."""
    try:
        finite = np.isfinite(float(word.partition(":")[2]))
    except ValueError:
        return ""
    return "" if finite else " with a finite value"


def _check_range(
    found: tuple[Any, Any, Any, int], dtype: np.dtype[Any], name: str, lines: int
) -> None:
    """Reject a value that a type cannot hold; `lines` stand before the block it was found in."""
    counts, ids, values, _ = found
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        fits = (values >= float(limits.min)) & (values < float(limits.max) + 1)
    elif dtype.kind == "f":
        with np.errstate(over="ignore"):
            fits = np.isfinite(values.astype(dtype))
    else:
        return
    if not fits.all():
        pair = int(np.argmin(fits))
        line = lines + int(np.searchsorted(np.cumsum(counts), pair, side="right")) + 1
        raise ValueError(
            f"{name}:{line}: '{ids[pair]}:{values[pair]:g}' has a value too large for {dtype}"
        )


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    """Blocks of whole lines, each with its newline; the first one is the first line."""
    rest = stream.readline().removeprefix(BOM_UTF8)
    if rest:
        yield rest if rest.endswith(b"\n") else rest + b"\n"
    rest = b""
    while block := stream.read(_BLOCK_BYTES):
        block = rest + block
        cut = block.rfind(b"\n") + 1
        rest = block[cut:]
        if cut:
            yield block[:cut]
    if rest:
        yield rest + b"\n"


def _number(word: bytes) -> int:
    """A whole number of at most `_MOST`; unlike `int`, without underscores."""
    number = int(word)
    if b"_" in word or abs(number) > _MOST:
        raise ValueError(f"{word!r} is no number of a file")
    return number


def _label(word: bytes) -> int:
    """A label id; whole numbers in floating-point notation are ids too."""
    try:
        return _number(word)
    except ValueError:
        number = float(word)
        if b"_" in word or not number.is_integer() or abs(number) > _MOST:
            raise ValueError(f"{number} is no label id") from None
        return int(number)

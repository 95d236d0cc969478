"""Files of sparse matrices, of features with labels, of dense arrays and of corpora."""

import os
import warnings
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame.arrays import as_count
from ngame.compat.xclib.utils.sparse import ZeroBased, from_zero
from ngame.data.lines import json_objects
from ngame.data.sparse_text import read_sparse_text, split_labelled_text, write_sparse_text
from ngame.files import reading

File = str | os.PathLike[str]


def read_sparse_file(
    file: File | BinaryIO,
    n_features: int | None = None,
    dtype: npt.DTypeLike = "float32",
    zero_based: ZeroBased = True,
    query_id: bool = False,
    offset: int = 0,
    length: int = -1,
    header: bool = True,
    force_header: bool = True,
    safe_read: bool = True,
) -> sp.csr_matrix:
    """Read a sparse matrix from text: a row a line, ``column:value`` pairs.

    Parameters
    ----------
    file : path, or a file open for reading bytes
    n_features : int, optional
        Number of columns where no header says it; else one more than the largest id.
    dtype : of the values
    zero_based : bool or "auto"
        Whether ids count from 0; "auto": from 1 where there is no id 0.
    query_id, offset, length
        Only the defaults: query ids and parts of files are not read.
    header : bool
        Whether the first line is ``rows columns``.
    force_header : bool
        The shape is the header's; missing rows at the end are empty, with a warning. Otherwise it
        is what the pairs show, with a warning where the header says something else.
    safe_read : bool
        A column twice in a row is an error; otherwise its values are summed.

    Returns
    -------
    csr_matrix, indices sorted

    Raises
    ------
    ValueError
        A line is malformed or does not fit the header (the message names it), or an argument has
        an unknown value.

    Notes
    -----
    pyxclib wants sorted rows when `safe_read`; here their order does not matter. Its rows are lists
    of C longs, whose size is the platform's; its `query_id` never worked.
    """
    if query_id or offset != 0 or length > 0:
        raise ValueError("query_id, offset and length are not supported; the whole file is read")
    text = read_sparse_text(file, header=header, dtype=dtype)
    text = text._replace(ids=from_zero(text.ids, zero_based))
    rows, columns = len(text.offsets) - 1, int(text.ids.max(initial=-1)) + 1
    shape = rows, columns if n_features is None else n_features
    if text.header is not None and force_header:
        if rows < text.header[0]:
            warnings.warn(
                f"{text.name} has {rows} rows of the {text.header[0]} in its header; "
                "the others are empty",
                stacklevel=2,
            )
        shape = text.header
    elif text.header is not None and text.header != shape:
        warnings.warn(f"{text.name}: header {text.header}, pairs {shape}", stacklevel=2)
    return text.matrix(shape, sum_duplicates=not safe_read)


def write_sparse_file(X: Any, filename: File, header: bool = True) -> None:
    """Write a sparse matrix as text, so that `read_sparse_file` gives it back.

    Parameters
    ----------
    X : sparse matrix of numbers
    filename : path
        It appears when it is complete.
    header : bool
        Whether to begin with the line ``rows columns``.

    Notes
    -----
    pyxclib sorts the caller's indices in place and writes booleans as words.
    """
    if not sp.issparse(X):
        raise TypeError(f"X is a {type(X).__name__}, expected a scipy.sparse matrix")
    write_sparse_text(filename, X.tocsr(), header=header)


def read_gen_sparse(
    file: File,
    n_features: int | None = None,
    dtype: npt.DTypeLike = "float32",
    zero_based: ZeroBased = True,
    query_id: bool = False,
    offset: int = 0,
    length: int = -1,
    header: bool = True,
    force_header: bool = True,
    safe_read: bool = True,
) -> sp.csr_matrix:
    """Read a sparse matrix: ``.npz`` as SciPy writes it, ``.txt`` as `read_sparse_file` reads it.

    Parameters
    ----------
    file : path
        The case of its suffix does not matter.
    n_features, zero_based, query_id, offset, length, header, force_header, safe_read
        As in `read_sparse_file`; without effect on ``.npz``.
    dtype : of the values

    Raises
    ------
    ValueError
        Another suffix, or what `read_sparse_file` refuses.

    Notes
    -----
    pyxclib reads ``.pkl`` too. A pickle can run any code, so it is refused here.
    """
    suffix = Path(file).suffix.lower()
    if suffix == ".npz":
        # NumPy leaves a damaged file open.
        with reading(file, "cannot be read"), open(file, "rb") as stream:
            matrix = sp.load_npz(stream)
        return sp.csr_matrix(matrix, dtype=dtype)
    if suffix == ".txt":
        return read_sparse_file(
            file,
            n_features,
            dtype,
            zero_based,
            query_id,
            offset,
            length,
            header,
            force_header,
            safe_read,
        )
    raise ValueError(f"{os.fspath(file)}: suffix {suffix!r}, expected .npz or .txt")


def read_gen_dense(
    file: File,
    dtype: npt.DTypeLike = "float32",
    delimiter: str | None = ",",
    skip_header: int = 0,
) -> npt.NDArray[Any]:
    """Read a dense array: ``.npy``, or ``.txt`` of a row of numbers a line.

    Parameters
    ----------
    file : path
        The case of its suffix does not matter. Without `skip_header`, a ``.txt`` file may begin
        with a line ``rows columns``.
    dtype : of the array
    delimiter : str, optional
        Parts the numbers of a line; blanks and tabs do where it is None or not in the line.
    skip_header : int
        Lines to leave out at the beginning of a ``.txt`` file.

    Raises
    ------
    ValueError
        Another suffix, an array of Python objects, or a line that is malformed (the message names
        it).

    Notes
    -----
    pyxclib reads ``.pkl`` too. A pickle can run any code, so it is refused here. Its `delimiter`
    may also be widths of columns, and what is no number becomes NaN; here both are errors.
    """
    if not isinstance(delimiter, str | None):
        raise TypeError(f"delimiter is a {type(delimiter).__name__}, expected a str or None")
    skip_header = as_count(skip_header, "skip_header", 0)
    suffix = Path(file).suffix.lower()
    if suffix == ".npy":
        with reading(file, "cannot be read"), open(file, "rb") as stream:
            array: npt.NDArray[Any] = np.load(stream, allow_pickle=False)
        return array.astype(dtype, copy=False)
    if suffix == ".txt":
        array = _read_dense_text(os.fspath(file), delimiter, skip_header)
        return array.astype(dtype, copy=False)
    raise ValueError(f"{os.fspath(file)}: suffix {suffix!r}, expected .npy or .txt")


def _read_dense_text(name: str, delimiter: str | None, skip_header: int) -> npt.NDArray[np.float64]:
    with open(name, "rb") as file:
        lines = file.read().removeprefix(BOM_UTF8).rstrip().splitlines()
    mark = delimiter.encode() if delimiter else None
    parts = [line.split(mark if mark and mark in line else None) for line in lines[skip_header:]]
    first = skip_header
    # Two integers with a blank between them are a header if they say what follows.
    said = parts and not skip_header and not (mark and mark in lines[0])
    if said and [b"%d" % (len(parts) - 1), b"%d" % len(parts[-1])] == parts[0]:
        parts, first = parts[1:], 1
    width = len(parts[0]) if parts else 0
    array = np.empty((len(parts), width))
    for row, words in enumerate(parts):
        try:
            array[row] = np.array(words, np.float64).reshape(width)
        except ValueError:
            raise ValueError(f"{name}:{row + first + 1}: expected {width} numbers") from None
    return array


def read_corpus(fname: File) -> Iterator[dict[str, Any]]:
    """Read the JSON object of every line, one after the other.

    Parameters
    ----------
    fname : path
        Unpacked if its suffix is ``.gz``.

    Raises
    ------
    ValueError
        A line is no JSON object, or the file is damaged or empty; the message names the line.
    """
    return (row for _, row in json_objects(Path(fname)))


def read_data(
    filename: File,
    header: bool = True,
    dtype: npt.DTypeLike = "float32",
    zero_based: bool = True,
) -> tuple[sp.csr_matrix, sp.csr_matrix, int | None, int | None, int | None]:
    """Read features and labels from one file: ``label,label column:value column:value``.

    Blanks or tabs part a line; a label may be written as ``3.0``.

    Parameters
    ----------
    filename : path
    header : bool
        Whether the first line is ``rows features labels``.
    dtype : of the values
    zero_based : bool
        Whether labels and features count from 0.

    Returns
    -------
    features : csr_matrix of shape [rows, features]
    labels : csr_matrix of ones, of shape [rows, labels]
    rows, features, labels : int, or None without a header

    Raises
    ------
    ValueError
        A line is malformed or does not fit the header; the message names it.

    Notes
    -----
    In pyxclib features take their shape from the largest id and count from 1 where there is no id
    0, both whatever the header and `zero_based` say, and an empty line is no row.
    """
    features, labels, shape = split_labelled_text(filename, header=header)
    X = read_sparse_file(features, dtype=dtype, zero_based=zero_based, header=header)
    text = labels._replace(ids=from_zero(labels.ids, zero_based))
    rows = len(text.offsets) - 1
    Y = text.matrix(text.header or (rows, int(text.ids.max(initial=-1)) + 1)).astype(dtype)
    return X, Y, *(shape or (None, None, None))

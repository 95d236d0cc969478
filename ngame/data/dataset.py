"""Texts and their labels, checked."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import sparse

from ngame.arrays import as_array, as_texts

Labels: TypeAlias = (
    sparse.sparray
    | sparse.spmatrix
    | npt.ArrayLike
    | Iterable[Iterable[int]]
    | Iterable[Iterable[str]]
)
"""Labels of points: a matrix of 0 and 1, or a row of label ids or of label texts for each point."""

_INTEGERS = int, np.integer
_NUMBERS = int, float, np.number, np.bool_


class Dataset:
    """Points with texts, labels with texts, and which labels each point has.

    Points without a label and labels without a point are kept.

    Parameters
    ----------
    train_texts : sequence of str, length N
        Texts of the training points. Empty texts are kept; one warning counts all that there are.
    train_labels : sparse matrix or 2-d array of shape [N, L], or N rows of labels
        1 where a point has a label, 0 elsewhere. A canonical float32 CSR matrix of ones is shared,
        anything else is copied. Or a row for each point, such as a list, tuple, set or array: of
        label ids, or of names, which are in `label_texts`. A row may be empty; a label given twice
        in it counts once. Rows of 0 and 1 as long as `label_texts` are a matrix.
    label_texts : sequence of str, length L
        Texts of the labels; several may be the same, but not that of a label given by name.
    test_texts, test_labels : optional
        The test points, in the same form. Both or neither.
    val_texts, val_labels : optional
        Validation points, in the same form: training holds these out instead of a part of the
        training points. Both or neither.
    drop_train, drop_test, drop_val : integer array of shape [n, 2], optional
        Pairs of (row, label) to leave out of predictions and truth.
    same_train, same_test, same_val : integer array of shape [n, 2], optional
        Pairs of (row, label) in which the point and the label are the same thing.
    label_titles : sequence of str, optional
        What each label's text begins with: its title, where more follows. Empty for a label that
        has none. They are not kept where nothing follows any of them.
    name : str, optional
        Name of the data in tables.

    Attributes
    ----------
    train_texts, label_texts : list of str
    test_texts, val_texts : list of str or None
    train_labels : csr_matrix, float32 [N, L]
        Sorted indices, each pair once, all stored values 1. So are `test_labels` and `val_labels`,
        or they are None.
    drop_train, drop_test, drop_val : int64 array of shape [n, 2] or None
    same_train, same_test, same_val : int64 array of shape [n, 2] or None
    label_titles : list of str or None
    name : str
    path : str
        Where `load_dataset` read the data; empty for data made in memory.

    Raises
    ------
    TypeError
        A text is not a string, labels or pairs are not of the right kind, or a row of labels is a
        string.
    ValueError
        There are no texts, a text cannot be encoded, shapes do not agree, a label value is not 0 or
        1, a pair is given twice, or a name is not in `label_texts`, or is there several times.
    IndexError
        A label id or a pair out of range.

    Examples
    --------
    >>> Dataset(["red apple", "green pear"], [[1, 0], [1, 1]], ["fruit", "green"])
    <Dataset: 2 training points, 0 test points, 2 labels>

    By names, as a column of a table holds them:

    >>> tags = [["fruit"], ["green", "fruit"], []]
    >>> names = sorted({tag for row in tags for tag in row})
    >>> Dataset(["red apple", "green pear", "stone"], tags, names).train_labels.toarray()
    array([[1., 0.],
           [1., 1.],
           [0., 0.]], dtype=float32)
    """

    def __init__(
        self,
        train_texts: Sequence[str],
        train_labels: Labels,
        label_texts: Sequence[str],
        *,
        test_texts: Sequence[str] | None = None,
        test_labels: Labels | None = None,
        val_texts: Sequence[str] | None = None,
        val_labels: Labels | None = None,
        drop_train: npt.ArrayLike | None = None,
        drop_test: npt.ArrayLike | None = None,
        drop_val: npt.ArrayLike | None = None,
        same_train: npt.ArrayLike | None = None,
        same_test: npt.ArrayLike | None = None,
        same_val: npt.ArrayLike | None = None,
        label_titles: Sequence[str] | None = None,
        name: str = "",
    ) -> None:
        self.name = name
        self.path = ""
        self.label_texts = _checked_texts(label_texts, "label_texts")
        self.label_titles = _checked_titles(label_titles, self.label_texts)
        self.train_texts = _checked_texts(train_texts, "train_texts")
        self.train_labels = _checked_labels(
            train_labels, "train", len(self.train_texts), self.label_texts
        )
        self.drop_train = _checked_pairs(drop_train, "drop_train", self.train_labels.shape)
        self.same_train = _checked_pairs(same_train, "same_train", self.train_labels.shape)
        self.test_texts, self.test_labels, self.drop_test, self.same_test = _checked_split(
            "test", test_texts, test_labels, drop_test, same_test, self.label_texts
        )
        self.val_texts, self.val_labels, self.drop_val, self.same_val = _checked_split(
            "val", val_texts, val_labels, drop_val, same_val, self.label_texts
        )
        self._warn_of_empty_texts()

    def _warn_of_empty_texts(self) -> None:
        found = []
        for name in ("train_texts", "test_texts", "val_texts", "label_texts"):
            texts = getattr(self, name) or []
            empty = [row for row, text in enumerate(texts) if not text or text.isspace()]
            if empty:
                found.append(f"{len(empty)} of {len(texts)} {name} (the first is {empty[0]})")
        if found:
            warnings.warn(f"empty texts are kept: {', '.join(found)}", stacklevel=3)

    def __repr__(self) -> str:
        validation = f"{len(self.val_texts)} validation points, " if self.val_texts else ""
        splits = {"training": self.drop_train, "validation": self.drop_val, "test": self.drop_test}
        left_out = [
            f"{len(pairs)} {split}"
            for split, pairs in splits.items()
            if pairs is not None and len(pairs)
        ]
        return (
            f"<Dataset{self.name and ' ' + self.name}: {len(self.train_texts)} training points, "
            f"{validation}{len(self.test_texts or [])} test points, {len(self.label_texts)} labels"
            + (f", pairs left out: {', '.join(left_out)}" if left_out else "")
            + ">"
        )


class Points(NamedTuple):
    """Points to score: texts, labels CSR [n, L], and pairs to leave out of both sides."""

    texts: Sequence[Any]
    truth: sparse.csr_matrix
    drop: npt.NDArray[np.int64] | None

    def predictable(self, labels: int) -> npt.NDArray[np.int64] | None:
        """The pairs to leave out that are of the first so many labels, which can be predicted."""
        return None if self.drop is None else self.drop[self.drop[:, 1] < labels]


def test_points(dataset: Dataset) -> Points:
    """The test points; without any, `ValueError` says where they come from."""
    if dataset.test_texts is None or dataset.test_labels is None:
        file = bool(dataset.path) and not Path(dataset.path).is_dir()
        cure = ": of a file, about one line in ten is one" if file else ": a folder has them in tst"
        raise ValueError(f"{dataset.name} has no test points{cure}")
    return Points(dataset.test_texts, dataset.test_labels, dataset.drop_test)


def _checked_texts(texts: Sequence[str], name: str) -> list[str]:
    checked = as_texts(texts, name)
    if not checked:
        raise ValueError(f"{name} has no entries")
    return checked


def _checked_titles(titles: Sequence[str] | None, texts: list[str]) -> list[str] | None:
    if titles is None:
        return None
    checked = as_texts(titles, "label_titles")
    if len(checked) != len(texts):
        raise ValueError(
            f"label_titles has {len(checked)} entries, label_texts has {len(texts)} entries"
        )
    for label, (title, text) in enumerate(zip(checked, texts, strict=True)):
        if title and text != title and not text.startswith(f"{title} "):
            raise ValueError(
                f"label_titles has {title[:40]!r} for label {label}, whose text begins otherwise: "
                f"{text[:40]!r}"
            )
    longer = any(title not in ("", text) for title, text in zip(checked, texts, strict=True))
    return checked if longer else None


def _checked_split(
    split: str,
    texts: Sequence[str] | None,
    labels: Any,
    drop: npt.ArrayLike | None,
    same: npt.ArrayLike | None,
    label_texts: list[str],
) -> tuple[
    list[str] | None,
    sparse.csr_matrix | None,
    npt.NDArray[np.int64] | None,
    npt.NDArray[np.int64] | None,
]:
    """Texts, labels and both kinds of pairs of a split that may be missing."""
    if (texts is None) != (labels is None):
        raise ValueError(f"{split}_texts and {split}_labels must be given together")
    pairs = {f"drop_{split}": drop, f"same_{split}": same}
    if texts is None:
        for name, given in pairs.items():
            if given is not None:
                raise ValueError(f"{name} was given without {split}_texts")
        return None, None, None, None
    checked = _checked_texts(texts, f"{split}_texts")
    matrix = _checked_labels(labels, split, len(checked), label_texts)
    dropped, equal = (_checked_pairs(given, name, matrix.shape) for name, given in pairs.items())
    return checked, matrix, dropped, equal


def _checked_labels(
    labels: Any, split: str, n_rows: int, label_texts: list[str]
) -> sparse.csr_matrix:
    name, n_labels = f"{split}_labels", len(label_texts)
    wanted = (
        f"expected a matrix of 0 and 1, {n_rows} points by {n_labels} labels, or a row of label "
        "ids or names for each point"
    )
    listed = False
    if not sparse.issparse(labels):
        # A column of lists is an array of objects.
        listed = isinstance(labels, Iterable) and not hasattr(labels, "__array__")
        labels = list(labels) if listed else as_array(labels, name)
        if listed or (labels.dtype.kind in "OU" and labels.ndim):
            labels = _matrix_of_rows(list(labels), name, label_texts)
    if labels.dtype.kind not in "biuf":
        raise TypeError(f"{name} has dtype {labels.dtype}; {wanted}")
    if labels.ndim != 2:
        raise ValueError(f"{name} has {labels.ndim} dimensions; {wanted}")
    if listed and split == "train" and not sparse.issparse(labels) and not labels.any():
        raise ValueError(f"{name} has no 1; {wanted}")
    # float32 first: the conversion of a boolean COO matrix to CSR would hide pairs given twice.
    matrix = sparse.csr_matrix(labels.astype(np.float32, copy=False))
    if matrix.shape[0] != n_rows:
        raise ValueError(f"{name} has {matrix.shape[0]} rows, {split}_texts has {n_rows} entries")
    if matrix.shape[1] != n_labels:
        raise ValueError(
            f"{name} has {matrix.shape[1]} columns, label_texts has {n_labels} entries; {wanted}"
        )
    outside = np.flatnonzero((matrix.indices < 0) | (matrix.indices >= n_labels))
    if len(outside):
        row, label = _entry(matrix, outside[0])
        raise IndexError(f"{name} has label id {label} in row {row}; there are {n_labels} labels")
    if not matrix.has_canonical_format or (matrix.data != 1).any():
        matrix = matrix.copy()  # it may share its arrays with the caller's
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        wrong = np.flatnonzero(matrix.data != 1)
        if len(wrong):
            row, label = _entry(matrix, wrong[0])
            raise ValueError(
                f"{name} adds up to {matrix.data[wrong[0]]:g} in row {row}, column {label}, "
                f"each pair must come once; {wanted}"
            )
    return matrix


def _matrix_of_rows(given: list[Any], name: str, label_texts: list[str]) -> Any:
    """The matrix that rows of label ids or names stand for, or whose rows they are."""
    rows: list[list[Any]] = []
    for labels in given:
        labels = np.asarray(labels).tolist() if hasattr(labels, "__array__") else labels
        if isinstance(labels, str | bytes | Mapping) or not isinstance(labels, Iterable):
            raise TypeError(
                f"{name}[{len(rows)}] is a {type(labels).__name__}, "
                "expected a list of label ids or names"
            )
        rows.append(list(labels))
    n_labels = len(label_texts)
    if _is_matrix(rows, name, n_labels):
        return np.asarray(rows)
    places: dict[str, int | None] = {}
    for number, text in enumerate(label_texts):
        places[text] = None if text in places else number
    found = []
    for row, labels in enumerate(rows):
        ids = set()
        for label in labels:
            place = places.get(label) if isinstance(label, str) else label
            if isinstance(label, str) and place is None:
                many = "is several times" if label in places else "is not"
                raise ValueError(f"{name}[{row}] has {label!r}, which {many} in label_texts")
            if not isinstance(place, _INTEGERS) or isinstance(place, bool):
                raise TypeError(f"{name}[{row}] has {label!r}, which is no label id and no name")
            if not 0 <= place < n_labels:
                raise IndexError(
                    f"{name} has label id {label} in row {row}; there are {n_labels} labels"
                )
            ids.add(int(place))
        found.append(sorted(ids))
    indices = np.fromiter(chain.from_iterable(found), np.int32)
    offsets = np.append(0, np.cumsum([len(row) for row in found], dtype=np.int64))
    content = np.ones(len(indices), np.float32), indices, offsets
    return sparse.csr_matrix(content, shape=(len(found), n_labels))


def _is_matrix(rows: list[list[Any]], name: str, n_labels: int) -> bool:
    """Whether the rows are those of a matrix of 0 and 1, even of one with a fault.

    As label ids they would mean something else, which nobody would notice.
    """
    values = [value for row in rows for value in row]
    numbers = all(isinstance(value, _NUMBERS) for value in values)
    if not numbers:
        return False
    flags, wide = all(value in (0, 1) for value in values), len(values) == len(rows) * n_labels
    repeated = any(len({*row}) < len(row) for row in rows)
    if len({len(row) for row in rows}) > 1:
        if flags and repeated and n_labels > 2:
            raise ValueError(
                f"{name} has rows of 0 and 1 of different lengths, expected {n_labels}"
            )
        return False
    floats = any(isinstance(value, float | np.floating) for value in values)
    return floats or (flags and wide) or ((flags or wide) and repeated)


def _entry(matrix: sparse.csr_matrix, position: int) -> tuple[int, int]:
    """Row and column of the stored entry at a position."""
    row = np.searchsorted(matrix.indptr, position, side="right") - 1
    return int(row), int(matrix.indices[position])


def _checked_pairs(
    pairs: npt.ArrayLike | None, name: str, shape: tuple[int, int]
) -> npt.NDArray[np.int64] | None:
    if pairs is None:
        return None
    array = np.asarray(pairs)
    if array.size == 0:  # NumPy makes an empty list one-dimensional and float
        return np.empty((0, 2), np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}; expected integers")
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"{name} has shape {array.shape}; expected [n, 2]")
    outside = np.flatnonzero(((array < 0) | (array >= shape)).any(axis=1))
    if len(outside):
        row, label = array[outside[0]]
        raise IndexError(
            f"{name}[{outside[0]}] is row {row}, label {label}; "
            f"there are {shape[0]} rows and {shape[1]} labels"
        )
    return array.astype(np.int64)

"""Data sets as files: a folder of points and labels, or one file of texts with tags."""

import gzip
import json
import os
import warnings
from array import array
from codecs import BOM_UTF8
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from ngame.arrays import text_fault
from ngame.data.dataset import Dataset
from ngame.data.lines import json_objects, text_lines
from ngame.data.sparse_text import SparseText, read_sparse_text, split_labelled_text
from ngame.files import atomic_folder

_SUFFIXES = (".json.gz", ".json", ".jsonl.gz", ".jsonl")
_PAIRS = "filter_labels_{}.txt"
# Other names of points and labels, as public data sets have them.
_RAW = {
    "trn": ("trn", "train"),
    "tst": ("tst", "test"),
    "val": ("val",),
    "lbl": ("lbl", "label", "labels"),
}
_SCORED = ("trn", "tst")
_NO_PAIRS = np.empty((0, 2), np.int64)
_SUPPORTED = (
    "a folder with trn.json.gz (or .json, .jsonl), or with trn_X_Y.txt and either "
    "raw_data/train.raw.txt or trn_X_Xf.txt, or with train.txt; or one file of texts with tags, "
    ".jsonl or .jsonl.gz"
)


def load_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Read a data set from a folder, or from one file of texts with tags.

    **A folder** holds ``trn``, ``lbl`` and, if there are test or validation points, ``tst`` and
    ``val``, each as ``.json.gz``, ``.json``, ``.jsonl.gz`` or ``.jsonl``: one JSON object a line,
    the line's number, from 0, is the row or label id. A text is ``title`` and ``content`` joined by
    a space; either may be missing or null. ``target_ind`` lists a point's label ids;
    ``target_rel``, if there, must be as many positive numbers, and is not used further. Where there
    is a ``trn_X_Y.txt``, ``tst_X_Y.txt`` or ``val_X_Y.txt``, in the sparse text format of the
    extreme-classification repository (a header ``rows columns``, then a row a line, ``label:value``
    pairs counted from 0), the labels come from there; values must be positive and are not used.
    ``filter_labels_train.txt``, ``filter_labels_test.txt`` and ``filter_labels_val.txt`` hold the
    ``row label`` pairs of `Dataset.drop_train`, `Dataset.drop_test` and `Dataset.drop_val`. The
    last also gets the labels of training points with the text of a validation point, but for that
    point's own labels. A point with the ``uid`` of a label is in `Dataset.same_train`, `same_test`
    or `same_val`; uids that are numbers, as those of counted lines, are not used. Other files are
    ignored, with a warning of those whose names begin with ``filter``.

    Where there is no ``trn`` of that kind, points are read from ``trn.raw.txt`` or
    ``train.raw.txt``, there or in ``raw_data/``, a text a line; or from ``trn_X_Xf.txt``, sparse
    features, a row a line; both with labels in ``trn_X_Y.txt``; or from ``train.txt``, the
    repository's older format (a header ``rows features labels``, then a line
    ``label,label feature:value feature:value`` for each row). So are test points (``tst``,
    ``test``) and validation points (``val``). A point of sparse features becomes a text of words,
    the largest value first: the lines of ``Xf.txt`` if there is one, else ``f0``, ``f1``, ...; the
    values are not used further.
    Where there is no ``lbl``, nor a ``lbl.raw.txt`` or ``label.raw.txt``, the labels' ids are their
    texts. A warning says so in both cases.

    **A file** (``.jsonl`` or ``.jsonl.gz``) has lines ``{"text": "...", "labels": ["...", ...]}``.
    Empty labels are left out, with one warning that counts them. The others are numbered in sorted
    order. A line is a test point where
    ``hash_bucket(text, 10) == 0``, about one in ten; so the split does not depend on the order of
    the lines, and the same text is never on both sides. A small file may have no test point at all.

    White space around a text or a label is stripped. Empty texts are kept, a label given twice in a
    row counts once, and a byte-order mark and blank lines at the end of a file are skipped. A bar
    shows the progress of a long read on a terminal.

    Parameters
    ----------
    path : str or path
        The folder or the file.

    Returns
    -------
    Dataset
        Named after the folder or the file.

    Raises
    ------
    FileNotFoundError
        There is no such path, or the folder lacks a file.
    ValueError
        The content of a file is wrong; the message says ``file:line: what``.
    """
    path = _checked(path)
    if not path.is_dir():
        return read_tagged(path).dataset()
    _warn_of_unread_pairs(path)
    dataset = _load_folder(path)
    dataset.path = str(path.resolve())
    return dataset


def _warn_of_unread_pairs(folder: Path) -> None:
    """Warn of files that look like pairs to leave out, but have another name."""
    names = [_PAIRS.format(split) for split in ("train", "test", "val")]
    unread = sorted(path.name for path in folder.glob("filter*") if path.name not in names)
    if unread:
        warnings.warn(
            f"{folder} has files that are not read: {', '.join(unread)}; pairs to leave out are in "
            f"{', '.join(names)}",
            stacklevel=3,
        )


def _checked(path: str | os.PathLike[str]) -> Path:
    """A path that is there and may be a data set."""
    if not os.fspath(path):  # Python would take it for the current folder
        raise ValueError("path is empty, expected a folder or a file")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not path.is_dir() and not path.name.endswith(_SUFFIXES):
        table = path.suffix.lower() in (".csv", ".tsv")
        cure = " (docs/formats.md has a few lines that make one of a CSV file)" if table else ""
        raise ValueError(f"{path} is no data set: that is {_SUPPORTED}{cure}")
    return path


class Matrices(NamedTuple):
    """Labels of training and test points, CSR [n, labels], and the pairs to leave out of each."""

    train_labels: sparse.csr_matrix
    test_labels: sparse.csr_matrix
    drop_train: npt.NDArray[np.int64] | None
    drop_test: npt.NDArray[np.int64] | None


def read_matrices(folder: str | os.PathLike[str]) -> Matrices | None:
    """Read what metrics need of a folder that has no texts of its points.

    Its files are ``trn_X_Y.txt``, ``tst_X_Y.txt`` and, if they are there,
    ``filter_labels_train.txt`` and ``filter_labels_test.txt``.

    Returns
    -------
    Matrices, or None where one of the first two is missing, or `load_dataset` finds texts
    """
    folder = _checked(folder)
    train, test = folder / "trn_X_Y.txt", folder / "tst_X_Y.txt"
    if not (train.exists() and test.exists()) or all(_has_texts(folder, stem) for stem in _SCORED):
        return None
    _warn_of_unread_pairs(folder)
    train_labels = _read_sparse_text(train, None, None)
    matrices = train_labels, _read_sparse_text(test, None, train_labels.shape[1])
    drop = []
    for split, labels in zip(("train", "test"), matrices, strict=True):
        pairs = folder / _PAIRS.format(split)
        drop.append(_read_pairs(pairs, *labels.shape) if pairs.exists() else None)
    return Matrices(*matrices, *drop)


def _has_texts(folder: Path, stem: str) -> bool:
    """Whether there are texts of the points of a split, or features that stand for them."""
    if _candidates(folder, stem) or (folder / f"{stem}_X_Xf.txt").exists():
        return True
    return bool(_raw_file(folder, stem) or _raw_file(folder, stem, ".txt"))


def save_dataset(dataset: Dataset, folder: str | os.PathLike[str]) -> None:
    """Write a data set as a folder that `load_dataset` reads.

    The folder appears when it is complete. Reading it gives everything but the name, and white
    space around texts.

    Parameters
    ----------
    dataset : Dataset
        What to write.
    folder : str or path
        A folder that is not there yet, or is empty.

    Raises
    ------
    FileExistsError
        The folder holds something.
    ValueError
        A point is the same thing as several labels: a line has one ``uid``.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty")
    for split in ("train", "test", "val"):
        _check_one_label(getattr(dataset, f"same_{split}"), f"same_{split}")
    with atomic_folder(folder) as aside:
        _write_rows(
            aside / "lbl.json.gz", dataset.label_texts, None, None, titles=dataset.label_titles
        )
        _write_rows(
            aside / "trn.json.gz", dataset.train_texts, dataset.train_labels, dataset.same_train
        )
        if dataset.test_texts is not None:
            _write_rows(
                aside / "tst.json.gz", dataset.test_texts, dataset.test_labels, dataset.same_test
            )
        if dataset.val_texts is not None:
            _write_rows(
                aside / "val.json.gz", dataset.val_texts, dataset.val_labels, dataset.same_val
            )
        for split in ("train", "test", "val"):
            pairs = getattr(dataset, f"drop_{split}")
            if pairs is not None:
                np.savetxt(aside / _PAIRS.format(split), pairs, fmt="%d")


def hash_bucket(text: str, buckets: int) -> int:
    """Put a text into one of `buckets` by its content: the same on every machine and in every run.

    Returns
    -------
    int
        The 64-bit BLAKE2b hash of the UTF-8 text, modulo `buckets`.
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") % buckets


def _load_folder(folder: Path) -> Dataset:
    uids: dict[str, int] = {}
    label_texts, label_titles = _label_texts(folder, uids)
    splits = [_read_split(folder, "trn", "train", label_texts, uids)]
    for stem, name in (("tst", "test"), ("val", "val")):
        own = [*_candidates(folder, stem), folder / f"{stem}_X_Y.txt"]
        own.append(folder / _PAIRS.format(name))
        if any(path.exists() for path in own) or _raw_file(folder, stem, ".txt"):
            splits.append(_read_split(folder, stem, name, label_texts, uids))
    n_labels = max(split.n_labels for split in splits)
    if label_texts is None:
        warnings.warn(
            f"{folder} has no texts of labels: their ids, 0 to {n_labels - 1}, are their texts",
            stacklevel=3,
        )
        label_texts = [str(label) for label in range(n_labels)]
    arguments: dict[str, Any] = {"label_titles": label_titles}
    for split in splits:
        split.labels.resize(split.labels.shape[0], n_labels)
        arguments |= split.arguments(folder)
    if "val_texts" in arguments:
        pairs = np.concatenate([arguments.get("drop_val", _NO_PAIRS), _known_pairs(arguments)])
        _, first = np.unique(pairs, axis=0, return_index=True)
        arguments["drop_val"] = pairs[np.sort(first)]  # in their order, which the digest depends on
    return Dataset(label_texts=label_texts, name=folder.resolve().name, **arguments)


def _known_pairs(arguments: dict[str, Any]) -> npt.NDArray[np.int64]:
    """Labels of training points with a validation point's text, but for its own: [pairs, 2]."""
    rows_of: dict[str, list[int]] = {text: [] for text in arguments["val_texts"]}
    for row, text in enumerate(arguments["train_texts"]):
        if text in rows_of:
            rows_of[text].append(row)
    counts = [len(rows_of[text]) for text in arguments["val_texts"]]
    same = [row for text in arguments["val_texts"] for row in rows_of[text]]
    shape = len(counts), len(arguments["train_texts"])
    ones = np.ones(len(same), np.float32)
    equal = sparse.csr_matrix((ones, same, np.append(0, np.cumsum(counts))), shape=shape)
    known = sparse.csr_matrix(equal @ arguments["train_labels"]).astype(bool)
    known = known > arguments["val_labels"].astype(bool)
    return np.stack(known.nonzero(), axis=1).astype(np.int64)


class _Split(NamedTuple):
    """The points of one split."""

    name: str
    texts: list[str]
    labels: sparse.csr_matrix
    same: "array[int]"

    @property
    def n_labels(self) -> int:
        return int(self.labels.shape[1])

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Arguments of `Dataset`."""
        found: dict[str, Any] = {
            f"{self.name}_texts": self.texts,
            f"{self.name}_labels": self.labels,
        }
        if self.same:
            found[f"same_{self.name}"] = np.asarray(self.same).reshape(-1, 2)
        pairs = folder / _PAIRS.format(self.name)
        if pairs.exists():
            found[f"drop_{self.name}"] = _read_pairs(pairs, len(self.texts), self.n_labels)
        return found


def _label_texts(folder: Path, uids: dict[str, int]) -> tuple[list[str] | None, list[str] | None]:
    """Texts and titles of the labels, or None; fills `uids` with the numbers of labels."""
    if not _candidates(folder, "lbl"):
        raw = _raw_file(folder, "lbl")
        return None if raw is None else _raw_lines(raw), None
    texts: list[str] = []
    titles: list[str] = []
    for where, row in json_objects(_rows_file(folder, "lbl")):
        if uid := _uid(row):
            uids[uid] = len(texts)
        texts.append(_text(row, where))
        titles.append(_string(row.get("title"), "title", where))
    return texts, titles


def _read_split(
    folder: Path, stem: str, split: str, label_texts: list[str] | None, uids: dict[str, int]
) -> _Split:
    """The points of one split; `uids` has the labels' numbers."""
    n_labels = None if label_texts is None else len(label_texts)
    sparse_text = folder / f"{stem}_X_Y.txt"
    features = folder / f"{stem}_X_Xf.txt"
    texts: list[str] = []
    same = array("q")
    labels: sparse.csr_matrix | None = None
    if _candidates(folder, stem):
        targets = _LabelRows()
        has_targets = not sparse_text.exists()
        for where, row in json_objects(_rows_file(folder, stem)):
            if (own := uids.get(_uid(row))) is not None:
                same.extend((len(texts), own))
            texts.append(_text(row, where))
            if has_targets:
                most = np.iinfo(np.int32).max if n_labels is None else n_labels
                targets.append(_targets(row, where), most, where)
        if has_targets:
            most = 1 + max(targets.ids, default=-1) if n_labels is None else n_labels
            labels = targets.matrix(most)
    elif raw := _raw_file(folder, stem):
        texts = _raw_lines(raw)
    elif features.exists():
        names = folder / "Xf.txt"
        texts = _words_of(read_sparse_text(features), _raw_lines(names) if names.exists() else None)
    elif both := _raw_file(folder, stem, ".txt"):
        content, text, shape = split_labelled_text(both)
        texts = _words_of(read_sparse_text(content), None)
        if shape is not None and n_labels not in (None, shape[2]):
            raise ValueError(f"{both}:1: header says {shape[2]} labels; there are {n_labels} texts")
        if len(texts) != len(text.offsets) - 1 or (shape is not None and len(texts) != shape[0]):
            raise ValueError(f"{both}:1: header {shape}; there are {len(texts)} rows")
        labels = _ones(text, text.header or (0, 0))
    else:
        raise FileNotFoundError(f"{folder} has no {split} points: a data set is {_SUPPORTED}")
    if labels is None:
        if not sparse_text.exists():
            raise FileNotFoundError(f"{sparse_text} with the labels of the points is not there")
        labels = _read_sparse_text(sparse_text, len(texts), n_labels)
    return _Split(split, texts, labels, same)


def _raw_file(folder: Path, stem: str, suffix: str = ".raw.txt") -> Path | None:
    """The file of points or labels by its other names, here or in ``raw_data``."""
    for place in (folder, folder / "raw_data"):
        for name in _RAW[stem]:
            if (path := place / f"{name}{suffix}").exists():
                return path
    return None


def _raw_lines(path: Path) -> list[str]:
    """The text of every line; blank ones in between are empty texts."""
    lines = path.read_bytes().removeprefix(BOM_UTF8).rstrip(b"\r\n").split(b"\n")
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.decode().strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 at byte {error.start + 1}") from None
    return texts


def _words_of(features: SparseText, names: list[str] | None) -> list[str]:
    """Sparse features as texts of words, the largest value of a row first."""
    columns = None if features.header is None else features.header[1]
    if names is not None and columns is not None and len(names) != columns:
        raise ValueError(f"{features.name}:1: header says {columns} features, Xf.txt {len(names)}")
    # `read_sparse_text` reads no file without a header, unless told to.
    most = columns or 0
    wrong = (features.ids < 0) | (features.ids >= most)
    features.refuse(wrong, f"feature {{id}} is out of range; there are {most}")
    warnings.warn(
        f"{features.name} has features instead of texts: "
        + ("their names in Xf.txt" if names is not None else "words such as f0")
        + " are read, in the order of their values",
        stacklevel=5,
    )
    rows = np.repeat(np.arange(len(features.offsets) - 1), np.diff(features.offsets))
    order = np.lexsort((-features.values.astype(np.float64), rows))
    words = [f"f{id}" if names is None else names[id] for id in features.ids[order].tolist()]
    return [" ".join(words[first:last]) for first, last in pairwise(features.offsets.tolist())]


class Tagged(NamedTuple):
    """Texts with labels by name, as one file has them.

    Attributes
    ----------
    path : Path
    texts : list of str, in the order of the lines
    labels : csr_matrix [n, L]
    label_texts : list of str, sorted
    """

    path: Path
    texts: list[str]
    labels: sparse.csr_matrix
    label_texts: list[str]

    @property
    def name(self) -> str:
        """The name of the data set."""
        return self.path.name.split(".")[0]

    @property
    def is_test(self) -> npt.NDArray[np.bool_]:
        """Which rows `dataset` makes test points."""
        return np.array([hash_bucket(text, 10) == 0 for text in self.texts])

    def dataset(self) -> Dataset:
        """Split it into training and test points."""
        is_test = self.is_test
        if is_test.all():
            raise ValueError(
                f"{self.path}: by the split rule every line is a test point; add lines"
            )
        train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
        dataset = Dataset(
            [self.texts[row] for row in train],
            self.labels[train],
            self.label_texts,
            test_texts=[self.texts[row] for row in test] if len(test) else None,
            test_labels=self.labels[test] if len(test) else None,
            name=self.name,
        )
        dataset.path = str(self.path.resolve())
        return dataset


def read_tagged(path: str | os.PathLike[str]) -> Tagged:
    """Read a file of texts with labels by name, without splitting it; see `load_dataset`."""
    path = _checked(path)
    texts: list[str] = []
    labels = _LabelRows()
    first_ids: dict[str, int] = {}  # label -> number in order of first appearance
    empty: list[str] = []  # where labels are empty
    for where, row in json_objects(path):
        texts.append(_string(_field(row, "text", where), "text", where))
        tags = _field(row, "labels", where) or []
        if not isinstance(tags, list):
            raise ValueError(f"{where}: labels is not a list of strings: {_shown(tags)}")
        tags = [_string(tag, "a label", where) for tag in tags]
        empty += [where] * tags.count("")
        ids = [first_ids.setdefault(tag, len(first_ids)) for tag in tags if tag]
        labels.append(ids, len(first_ids), where)
    if not first_ids:
        raise ValueError(f"{path}: no line has a label")
    if empty:
        warnings.warn(
            f"empty labels are left out: {len(empty)} (the first at {empty[0]})", stacklevel=3
        )
    label_texts = sorted(first_ids)
    order = np.array([first_ids[label] for label in label_texts])
    return Tagged(path, texts, labels.matrix(len(label_texts))[:, order], label_texts)


class _LabelRows:
    """Label ids of many rows, four bytes each, and the ends of the rows."""

    def __init__(self) -> None:
        self.ids = array("i")
        self.ends = array("q", [0])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def append(self, ids: list[int], n_labels: int, where: str) -> None:
        if ids and (min(ids) < 0 or max(ids) >= n_labels):
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(
                f"{where}: label id {wrong} is out of range; there are {n_labels} labels"
            )
        self.ids.extend(dict.fromkeys(ids))
        self.ends.append(len(self.ids))

    def matrix(self, n_labels: int) -> sparse.csr_matrix:
        ids, ends = np.asarray(self.ids), np.asarray(self.ends)
        ones = np.ones(len(ids), np.float32)
        matrix = sparse.csr_matrix((ones, ids, ends), shape=(len(self), n_labels))
        matrix.sort_indices()
        return matrix


def _candidates(folder: Path, stem: str) -> list[Path]:
    return [path for suffix in _SUFFIXES if (path := folder / (stem + suffix)).exists()]


def _rows_file(folder: Path, stem: str) -> Path:
    found = _candidates(folder, stem)
    if not found:
        names = ", ".join(stem + suffix for suffix in _SUFFIXES)
        raise FileNotFoundError(f"{folder}: none of {names} is there")
    if len(found) > 1:
        raise ValueError(f"{folder}: both {found[0].name} and {found[1].name} are there; keep one")
    return found[0]


def _read_sparse_text(path: Path, n_rows: int | None, n_labels: int | None) -> sparse.csr_matrix:
    """Labels of points; where there are no texts of either, as many as the file says."""
    text = read_sparse_text(path)
    rows = len(text.offsets) - 1
    if n_rows is None:
        n_rows = 0 if text.header is None else text.header[0]
    if n_labels is None:
        n_labels = 0 if text.header is None else text.header[1]
    if text.header is not None and text.header != (n_rows, n_labels):
        raise ValueError(
            f"{path}:1: header says {text.header[0]} rows and {text.header[1]} columns; "
            f"there are {n_rows} points and {n_labels} labels with texts"
        )
    if rows != n_rows:
        what = f"the file ends after {rows} rows; the header says {n_rows}"
        raise ValueError(f"{path}:{rows + 1}: {what}")
    positive = (text.values > 0) & np.isfinite(text.values)
    text.refuse(~positive, "'{id}:{value:g}' is not label:value with a positive value")
    return _ones(text, (n_rows, n_labels))


def _ones(text: SparseText, shape: tuple[int, int]) -> sparse.csr_matrix:
    matrix = text.matrix(shape, sum_duplicates=True).astype(np.float32)
    matrix.data.fill(1)
    return matrix


def _read_pairs(path: Path, n_rows: int, n_labels: int) -> npt.NDArray[np.int64]:
    flat = array("q")
    for where, line in text_lines(path):
        try:
            row, label = (int(part) for part in line.split())
        except ValueError:
            raise ValueError(f"{where}: {line[:40]!r} is not a pair of integers") from None
        if not (0 <= row < n_rows and 0 <= label < n_labels):
            raise ValueError(
                f"{where}: row {row}, label {label} is out of range; "
                f"there are {n_rows} rows and {n_labels} labels"
            )
        flat.extend((row, label))
    return np.asarray(flat).reshape(-1, 2)


def _text(row: dict[str, Any], where: str) -> str:
    parts = [row[field] for field in ("title", "content") if field in row]
    if not parts:
        raise ValueError(f'{where}: missing field "title" or "content"; {_fields(row)}')
    return _string(
        " ".join(_string(part, "title or content", where) for part in parts), "the text", where
    )


def _uid(row: dict[str, Any]) -> str:
    """What names a point or a label in both files; empty where nothing does, or a number."""
    uid = row.get("uid")
    return uid if isinstance(uid, str) and not uid.isdecimal() else ""


def _targets(row: dict[str, Any], where: str) -> list[int]:
    ids = _field(row, "target_ind", where)
    if not (isinstance(ids, list) and all(type(label) is int for label in ids)):
        raise ValueError(f"{where}: target_ind is not a list of integers: {_shown(ids)}")
    if "target_rel" in row:
        weights = row["target_rel"]
        if not isinstance(weights, list) or len(weights) != len(ids):
            raise ValueError(f"{where}: target_rel is not a list as long as target_ind")
        for label, weight in zip(ids, weights, strict=True):
            # As in the sparse text: a label of no relevance would count as a positive.
            if not (isinstance(weight, int | float) and weight > 0):
                raise ValueError(
                    f"{where}: target_rel is {_shown(weight)} for label {label}, expected a "
                    "positive number; leave out labels that are not relevant"
                )
    return ids


def _field(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise ValueError(f'{where}: missing field "{name}"; {_fields(row)}')
    return row[name]


def _fields(row: dict[str, Any]) -> str:
    """What a line has instead."""
    names = [f'"{name}"' for name in row]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"the line has {', '.join(names[:8])}{more}" if names else "the line has no fields"


def _shown(value: Any) -> str:
    """The beginning of a value as JSON has it."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"


def _string(value: Any, name: str, where: str) -> str:
    """A text without white space around it; empty where it is null."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} is not a string: {_shown(value)}")
    if fault := text_fault(value):
        raise ValueError(f"{where}: {name} {fault}")
    return value.strip()


# Writing


def _check_one_label(same: npt.NDArray[np.int64] | None, name: str) -> None:
    """Raise for a row that is the same as several labels, of which one alone could be written."""
    if same is None:
        return
    rows, counts = np.unique(np.unique(same, axis=0)[:, 0], return_counts=True)
    if (counts > 1).any():
        row = rows[counts > 1][0]
        raise ValueError(f"{name} has several labels for row {row}; a folder of data has one a row")


def _write_rows(
    path: Path,
    texts: list[str],
    labels: sparse.csr_matrix | None,
    same: npt.NDArray[np.int64] | None,
    *,
    titles: list[str] | None = None,
) -> None:
    own = {} if same is None else {row: f"label {label}" for row, label in same.tolist()}
    # Without a time stamp, so that equal data give equal bytes.
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        for number, text in enumerate(texts):
            uid = f"label {number}" if labels is None else own.get(number, str(number))
            title = text if titles is None else titles[number]
            row: dict[str, Any] = {
                "uid": uid,
                "title": title,
                "content": text[len(title) :].lstrip(),
            }
            if labels is not None:
                first, last = labels.indptr[number : number + 2]
                row["target_ind"] = labels.indices[first:last].tolist()
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

"""Predictions as files: a text a line, a label a line, or a matrix."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from ngame.data.lines import json_objects, text_lines
from ngame.data.sparse_text import read_sparse_text
from ngame.files import atomic_write, reading

SUFFIXES = (".jsonl", ".tsv", ".npz")
"""Of the files that are written and read."""
_READ = (*SUFFIXES, ".txt")

_HEADER = ("row", "rank", "id", "score", "label", "text")


class OtherTextsError(ValueError):
    """A file of predictions is of other texts, or of another number of them."""


def write_predictions(
    path: str, texts: Sequence[str], found: sparse.csr_matrix, label_texts: Sequence[str]
) -> None:
    """Write the scores of labels [n, L] of n texts, in the form that the suffix names."""
    with atomic_write(path) as aside:
        if aside.suffix == ".npz":
            with open(aside, "wb") as file:
                sparse.save_npz(file, found)
            return
        lines = as_jsonl if aside.suffix == ".jsonl" else _as_tsv
        with open(aside, "w", encoding="utf8", newline="\n") as table:
            table.writelines(lines(texts, found, label_texts))


def as_jsonl(
    texts: Sequence[str], found: sparse.csr_matrix, label_texts: Sequence[str]
) -> Iterator[str]:
    """A text a line, with its labels best first."""
    for row, text in enumerate(texts):
        best = list(best_first(found[row]))
        line = {
            "text": text,
            "labels": [label_texts[label] for label, _ in best],
            "ids": [label for label, _ in best],
            "scores": [score for _, score in best],
        }
        yield json.dumps(line, ensure_ascii=False) + "\n"


def _as_tsv(
    texts: Sequence[str], found: sparse.csr_matrix, label_texts: Sequence[str]
) -> Iterator[str]:
    """A header, then a label a line; tabs and line ends within texts become spaces."""
    yield "\t".join(_HEADER) + "\n"
    for row, text in enumerate(texts):
        for rank, (label, score) in enumerate(best_first(found[row]), 1):
            words = _one_line(label_texts[label]), _one_line(text)
            yield "\t".join([str(row), str(rank), str(label), f"{score:.6g}", *words]) + "\n"


def best_first(row: sparse.csr_matrix) -> Iterator[tuple[int, float]]:
    """Labels and scores of a matrix of one row; ties go to the lower id."""
    for place in np.argsort(-row.data, kind="stable"):
        yield int(row.indices[place]), float(row.data[place])


def read_predictions(
    path: Path, texts: Sequence[str | None], label_texts: Sequence[str | None]
) -> sparse.csr_matrix:
    """Read predictions of n texts, of L labels, from a file of any of these forms.

    A text that is None is not compared.

    - ``.jsonl``: an object a line, of a text a line: ``ids`` or, where no two labels have the same
      text, ``labels``, best first. If ``scores``, ``labels`` or ``text`` are there, they must fit.
    - ``.tsv``: a header, then a label a line, best first. ``row``, from 0, and ``id`` are read;
      ``score``, ``label`` and ``text``, if they are there, must fit.
    - ``.npz``: a CSR matrix of scores [n, L] as `scipy.sparse.save_npz` writes it, or arrays
      ``ids`` and ``scores`` [n, k], as `numpy.savez` writes them; an id of -1 is none.
    - ``.txt``: sparse text, a header ``rows columns``, then a row a line, ``label:score`` pairs
      in any order.

    Returns
    -------
    csr_matrix [n, L]
        Scores; from ``.jsonl`` and ``.tsv``, numbers that fall with the rank.

    Raises
    ------
    ValueError
        The file has another form, or is of other labels; the message says which line.
    OtherTextsError
        It is of other texts.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix not in _READ:
        raise ValueError(
            f"{path} cannot be read: it ends in none of {', '.join(_READ)}, as files of "
            "predictions do; `ngame predict -o FILE` writes them"
        )
    readers: tuple[Callable[..., sparse.csr_matrix], ...]
    readers = _read_jsonl, _read_tsv, _read_npz, _read_txt
    found: sparse.csr_matrix = readers[_READ.index(path.suffix)](path, texts, label_texts)
    if found.shape != (len(texts), len(label_texts)):
        kind = ValueError if found.shape[0] == len(texts) else OtherTextsError
        raise kind(
            f"{path} has {found.shape[0]} rows and {found.shape[1]} labels, the data have "
            f"{len(texts)} test points and {len(label_texts)} labels"
        )
    return found


class _Ranked:
    """Labels of texts, best first, checked as they come."""

    def __init__(self, texts: Sequence[str | None], label_texts: Sequence[str | None]) -> None:
        self.texts, self.label_texts = texts, label_texts
        self.ids: list[list[int]] = [[] for _ in texts]
        self._last = [np.inf] * len(texts)

    def add(self, where: str, row: int, label: int, score: float | None, text: str | None) -> None:
        """The next label of a row; its text and its score may be unknown."""
        if not 0 <= label < len(self.label_texts):
            raise ValueError(
                f"{where}: label id {label} is out of range; there are {len(self.label_texts)} "
                "labels"
            )
        expected = self.label_texts[label]
        if text is not None and expected is not None and _one_line(text) != _one_line(expected):
            raise ValueError(f"{where}: label {label} is {text!r}, in the data {expected!r}")
        if score is not None:
            if not score <= self._last[row]:  # nor NaN
                raise ValueError(f"{where}: the scores do not fall, expected labels best first")
            self._last[row] = score
        if label in self.ids[row]:
            raise ValueError(f"{where}: label {label} comes twice in row {row}")
        self.ids[row].append(label)

    def check_row(self, where: str, row: int, text: Any) -> None:
        """The row is there and, if its text is known, of that text, but for white space."""
        if not 0 <= row < len(self.texts):
            raise OtherTextsError(f"{where}: row {row}; there are {len(self.texts)} test points")
        if text is None:
            return
        if not isinstance(text, str):
            raise ValueError(f"{where}: text is not a string")
        expected = self.texts[row]
        if expected is not None and _one_line(text) != _one_line(expected):
            raise OtherTextsError(
                f"{where}: the text is {_start(text)}, that of test point {row} {_start(expected)}"
            )

    def matrix(self) -> sparse.csr_matrix:
        """Scores that fall with the rank."""
        counts = [len(row) for row in self.ids]
        scores = [-float(rank) for row in self.ids for rank in range(len(row))]
        ids = np.array([label for row in self.ids for label in row], np.int32)
        content = np.array(scores, np.float32), ids, np.append(0, np.cumsum(counts))
        matrix = sparse.csr_matrix(content, shape=(len(self.texts), len(self.label_texts)))
        matrix.sort_indices()
        return matrix


def _read_jsonl(
    path: Path, texts: Sequence[str | None], label_texts: Sequence[str | None]
) -> sparse.csr_matrix:
    ranked = _Ranked(texts, label_texts)
    numbers = {text: label for label, text in enumerate(label_texts) if text is not None}
    row = -1
    for row, (where, line) in enumerate(json_objects(path)):
        ranked.check_row(where, row, line.get("text"))
        names, ids, scores = (_list(line, name, where) for name in ("labels", "ids", "scores"))
        if ids is None:
            ids = _numbered(names, numbers, len(label_texts), where, line)
        for name, given in (("labels", names), ("scores", scores)):
            if given is not None and len(given) != len(ids):
                raise ValueError(f"{where}: {name} is not a list as long as ids")
        if not all(type(label) is int for label in ids):
            raise ValueError(f"{where}: ids is not a list of integers")
        if not all(isinstance(score, int | float) for score in scores or []):
            raise ValueError(f"{where}: scores is not a list of numbers")
        for place, label in enumerate(ids):
            score = None if scores is None else scores[place]
            ranked.add(where, row, label, score, None if names is None else str(names[place]))
    if row + 1 < len(texts):
        raise OtherTextsError(f"{path} has {row + 1} lines, the data have {len(texts)} test points")
    return ranked.matrix()


def _list(line: dict[str, Any], name: str, where: str) -> list[Any] | None:
    given = line.get(name)
    if given is not None and not isinstance(given, list):
        raise ValueError(f"{where}: {name} is not a list")
    return given


def _numbered(
    names: list[Any] | None,
    numbers: dict[str, int],
    labels: int,
    where: str,
    line: dict[str, Any],
) -> list[int]:
    """Ids of labels by their texts."""
    if names is None:
        raise ValueError(
            f'{where}: neither "ids" nor "labels" is among its fields, {", ".join(line)}'
        )
    if not numbers:
        raise ValueError(f'{where}: no "ids", and the data have no texts of labels')
    if len(numbers) < labels:
        raise ValueError(f'{where}: no "ids", and some labels have the same text')
    for name in names:
        if not isinstance(name, str) or name not in numbers:
            raise ValueError(f"{where}: {name!r} is no label of the data")
    return [numbers[name] for name in names]


def _read_tsv(
    path: Path, texts: Sequence[str | None], label_texts: Sequence[str | None]
) -> sparse.csr_matrix:
    ranked = _Ranked(texts, label_texts)
    header: list[str] | None = None
    for where, line in text_lines(path):
        fields = line.split("\t")
        if header is None:
            header = fields
            if not {"row", "id"} <= {*header}:
                raise ValueError(
                    f"{where}: the columns are {', '.join(header)}, expected row, id and others, "
                    "with tabs between"
                )
            continue
        if len(fields) != len(header):
            raise ValueError(f"{where}: {len(fields)} columns, the header has {len(header)}")
        named = dict(zip(header, fields, strict=True))
        try:
            row, label = int(named["row"]), int(named["id"])
            score = float(named["score"]) if "score" in named else None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        ranked.check_row(where, row, named.get("text"))
        ranked.add(where, row, label, score, named.get("label"))
    if header is None:
        raise ValueError(f"{path}:1: the file is empty")
    return ranked.matrix()


def _read_txt(path: Path, *_: Any) -> sparse.csr_matrix:
    text = read_sparse_text(path)
    rows, shape = len(text.offsets) - 1, text.header or (0, 0)
    if rows < shape[0]:
        raise ValueError(f"{path}: the file ends after {rows} rows; the header says {shape[0]}")
    return text.matrix(shape)


def _read_npz(path: Path, _: Any, label_texts: Sequence[str | None]) -> sparse.csr_matrix:
    expected = (
        "a .npz file of predictions: a CSR matrix, as `ngame predict -o FILE.npz` writes, or the "
        "arrays ids and scores"
    )
    with open(path, "rb") as file:  # NumPy leaves a damaged file open
        if file.read(2) != b"PK":
            raise ValueError(f"{path} cannot be read: it is not {expected}")
        file.seek(0)
        with reading(path, f"cannot be read as {expected}"), np.load(file) as arrays:
            if "format" in arrays:
                file.seek(0)
                return sparse.csr_matrix(sparse.load_npz(file))
            if not {"ids", "scores"} <= {*arrays}:
                raise ValueError(f"its arrays are {', '.join(arrays) or 'none'}")
            return _of_arrays(arrays["ids"], arrays["scores"], len(label_texts))


def _of_arrays(ids: npt.NDArray[Any], scores: npt.NDArray[Any], labels: int) -> sparse.csr_matrix:
    """Scores [n, labels] of label ids [n, k]; an id of -1 is none."""
    if ids.ndim != 2 or ids.shape != scores.shape or ids.dtype.kind not in "iu":
        raise ValueError(
            f"ids is {ids.dtype} {ids.shape} and scores {scores.shape}, expected integers [n, k] "
            "and as many scores"
        )
    rows, places = np.nonzero(ids != -1)
    columns = ids[rows, places].astype(np.int64)
    wrong = (columns < 0) | (columns >= labels)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise ValueError(
            f"label id {columns[first]} in row {rows[first]} is out of range; there are {labels} "
            "labels"
        )
    offsets = np.append(0, np.cumsum(np.bincount(rows, minlength=len(ids))))
    content = scores[rows, places].astype(np.float32), columns, offsets
    return sparse.csr_matrix(content, shape=(len(ids), labels))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _start(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")

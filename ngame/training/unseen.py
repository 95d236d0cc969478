"""The points of a data set that a run was not trained on, with the run's ids of labels."""

import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from ngame.arrays import widened
from ngame.config import Config
from ngame.data.dataset import Dataset, Points, test_points
from ngame.data.formats import Tagged, load_dataset, read_tagged
from ngame.data.self_pairs import drop_self_pairs, without_self_pairs
from ngame.data.tokens import Tokens
from ngame.files import read_json, reading
from ngame.training.run import is_digest_of

if TYPE_CHECKING:
    from ngame.prediction.model import Model


def unseen_points(
    data: str, model: "Model", run: Path, self_pairs: str | None = None, hint: str = ""
) -> Points:
    """The points of a data set that a run has not seen, with the run's ids of labels.

    Of the run's own data, and of folders, they are the test points. Of another file they are all
    rows but those that the run was trained on; labels that the run does not have follow its own.

    Parameters
    ----------
    data
        A folder, or a ``.jsonl`` of texts with labels.
    model, run
        The trained model and its folder.
    self_pairs
        "drop" each point's own label where points are labels, or "keep" it; as the run was told
        to if None. `hint` is printed behind the count of those left out.

    Raises
    ------
    ValueError
        The labels are not the run's, no row is left, or a file is malformed.
    """
    own = Config.load(run / "config.toml", whole=True).self_pairs
    wanted = self_pairs or own
    if Path(data).is_dir():
        dataset = load_dataset(data)
        _check_labels(dataset, model)
    else:
        tagged = read_tagged(data)
        found = _own_data(tagged, model, run, own)
        if found is None:
            dataset = without_self_pairs(_by_name(tagged, model, run), wanted, hint)
            return Points(dataset.train_texts, dataset.train_labels, dataset.drop_train)
        dataset = found
    points = test_points(without_self_pairs(dataset, wanted, hint))
    return points._replace(truth=widened(points.truth, len(model.label_texts)))


def _check_labels(dataset: Dataset, model: "Model") -> None:
    """Check that the labels are the run's: their ids are what is compared.

    Those that came after training may be missing.
    """
    ours, theirs = model.label_texts, dataset.label_texts
    if len(theirs) == len(ours) - model.new_labels:
        ours = ours[: len(theirs)]
    cure = (
        "; the labels of a folder are told by their ids: give the points as one .jsonl of texts "
        "and label names, which are matched with the run's"
    )
    if len(ours) != len(theirs):
        raise ValueError(f"{dataset.name} has {len(theirs)} labels, the run {len(ours)}{cure}")
    for label, (text, expected) in enumerate(zip(theirs, ours, strict=True)):
        if text != expected:
            raise ValueError(
                f"label {label} of {dataset.name} is {text!r}, that of the run {expected!r}{cure}"
            )


def _own_data(tagged: Tagged, model: "Model", run: Path, self_pairs: str) -> Dataset | None:
    """The file as the data set that the run was trained on, or None where it is another one."""
    if not (run / "data.json").exists() or tagged.label_texts != model.label_texts:
        return None
    before = read_json(run / "data.json")
    points, labels = len(tagged.texts) - int(tagged.is_test.sum()), len(tagged.label_texts)
    with reading(run / "data.json"):  # sizes first: without training points there is no split
        if points == 0 or (points, labels) != (before["points"], before["labels"]):
            return None
    dataset = tagged.dataset()
    seen = drop_self_pairs(dataset)[0] if self_pairs == "drop" else dataset
    return dataset if is_digest_of(before, seen) else None


def _by_name(tagged: Tagged, model: "Model", run: Path) -> Dataset:
    """Rows that the run was not trained on, as training points; labels by their texts."""
    rows = _unseen_rows(tagged, model, run)
    counts = Counter(model.label_texts)
    for name in tagged.label_texts:
        if counts[name] > 1:
            raise ValueError(f"{counts[name]} labels of the run are {name!r}: names do not tell")
    ids = {name: label for label, name in enumerate(model.label_texts)}
    unknown = [name for name in tagged.label_texts if name not in ids]
    if len(unknown) == len(tagged.label_texts):
        raise ValueError(
            f"no label of {tagged.name} is one of the run's, such as {model.label_texts[0]!r}"
        )
    ids |= {name: len(ids) + place for place, name in enumerate(unknown)}
    labels = tagged.labels[rows]
    columns = np.array([ids[name] for name in tagged.label_texts])[labels.indices]
    if lost := int((columns >= len(model.label_texts)).sum()):
        warnings.warn(
            f"the run does not know {len(unknown)} labels of {tagged.name} ({lost} pairs), and "
            "cannot predict them",
            stacklevel=2,
        )
    truth = sp.csr_matrix((labels.data, columns, labels.indptr), shape=(len(rows), len(ids)))
    texts = [tagged.texts[row] for row in rows]
    with warnings.catch_warnings():  # it would speak of training texts
        warnings.filterwarnings("ignore", "empty texts are kept")
        return Dataset(texts, truth, [*model.label_texts, *unknown], name=tagged.name)


def _unseen_rows(tagged: Tagged, model: "Model", run: Path) -> list[int]:
    """Rows of which the run was not trained on the text, as far as its encoder reads it."""
    if not (run / "tokens" / "points.offsets.npy").exists():
        warnings.warn(
            f"{run}/tokens is gone: if the run was trained on rows of {tagged.name}, they are "
            "scored like others",
            stacklevel=2,
        )
        return list(range(len(tagged.texts)))

    def contents(tokens: Tokens) -> Iterator[bytes]:
        return (tokens.ids[first:last].tobytes() for first, last in pairwise(tokens.offsets))

    read = list(contents(model.encoder.tokenize(tagged.texts)))
    wanted, seen = set(read), set()
    for name in ("points", "validation"):
        if (run / "tokens" / f"{name}.offsets.npy").exists():
            seen |= wanted.intersection(contents(Tokens.load(run / "tokens" / name)))
    rows = [row for row, content in enumerate(read) if content not in seen]
    if not rows:
        raise ValueError(f"the run was trained on all {len(read)} rows of {tagged.name}")
    if len(rows) < len(read):
        warnings.warn(
            f"the run was trained on {len(read) - len(rows)} of {len(read)} rows of "
            f"{tagged.name}: they are left out",
            stacklevel=2,
        )
    return rows

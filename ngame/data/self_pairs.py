"""Points that are labels: find each one's own label, and leave the pair out."""

import copy

import numpy as np
import numpy.typing as npt

from ngame.data.dataset import Dataset
from ngame.progress import say

# Points and labels are the same things if so many training points are labels, and at most this
# share of them has itself as a label. A few tags have the text of a title and belong to it.
_LEAST_PAIRS, _MOST_POSITIVE = 10, 0.1

_Pairs = npt.NDArray[np.int64]


def drop_self_pairs(dataset: Dataset) -> tuple[Dataset, int]:
    """Add the pair of each point and its own label to the pairs to leave out.

    Where points and labels are the same things, as articles that link to articles, a point's own
    label is the nearest to its text and hardly ever right. A point's own label has its ``uid``
    (`Dataset.same_train`), or else its text. Such pairs are left out if at least ten training
    points have one and at most a tenth of these pairs are positive, judged apart for uids and for
    texts. Test and validation pairs are left out by that alone, whatever the labels are.

    Returns
    -------
    Dataset
        With the pairs in `drop_train`, `drop_test` and `drop_val`; all else is shared. `dataset`
        itself if there are none.
    int
        Number of points, of all splits, whose own label is left out.
    """
    by_text: dict[str, list[int]] = {}
    for label, text in enumerate(dataset.label_texts):
        if text:
            by_text.setdefault(text, []).append(label)
    found = {
        "train": _pairs(dataset.train_texts, dataset.same_train, by_text),
        "test": _pairs(dataset.test_texts or [], dataset.same_test, by_text),
        "val": _pairs(dataset.val_texts or [], dataset.same_val, by_text),
    }
    kept: dict[str, list[_Pairs]] = {"train": [], "test": [], "val": []}
    for of_train, of_test, of_val in zip(*found.values(), strict=True):
        positive = np.asarray(dataset.train_labels[of_train[:, 0], of_train[:, 1]]).sum()
        if len(of_train) >= _LEAST_PAIRS and positive <= _MOST_POSITIVE * len(of_train):
            kept["train"].append(of_train)
            kept["test"].append(of_test)
            kept["val"].append(of_val)
    if not kept["train"]:
        return dataset, 0
    changed = copy.copy(dataset)
    count = 0
    for split, parts in kept.items():
        pairs = np.concatenate(parts)
        count += len(np.unique(pairs[:, 0]))
        given = getattr(dataset, f"drop_{split}")
        if len(pairs):
            every = pairs if given is None else np.concatenate([given, pairs])
            setattr(changed, f"drop_{split}", np.unique(every, axis=0))
    return changed, count


def without_self_pairs(dataset: Dataset, self_pairs: str, hint: str = "") -> Dataset:
    """`drop_self_pairs`, printing the count and `hint`, unless `self_pairs` is "keep"."""
    if self_pairs == "keep":
        return dataset
    dataset, count = drop_self_pairs(dataset)
    if count:
        say(f"{count} points are labels: their own label is left out{hint}")
    return dataset


def _pairs(
    texts: list[str], same: _Pairs | None, by_text: dict[str, list[int]]
) -> tuple[_Pairs, _Pairs]:
    """Pairs by uid, and pairs by text of the points that have none by uid."""
    by_uid = np.empty((0, 2), np.int64) if same is None else same
    named = set(by_uid[:, 0].tolist())
    equal = [
        (row, label)
        for row, text in enumerate(texts)
        if row not in named
        for label in by_text.get(text, ())
    ]
    return by_uid, np.array(equal, np.int64).reshape(-1, 2)

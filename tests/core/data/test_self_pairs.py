"""Points that are labels: which pairs are found and left out."""

import json

import numpy as np
import pytest
import scipy.sparse as sp

from ngame.data.dataset import Dataset
from ngame.data.formats import load_dataset, save_dataset
from ngame.data.self_pairs import drop_self_pairs

TEXTS = [f"article {number}" for number in range(20)]


def ring(shift=1):
    """Article i links to article i + shift; the first twelve are for training."""
    links = sp.csr_matrix(np.roll(np.eye(20, dtype=np.float32), shift, axis=1))
    return {
        "train_texts": TEXTS[:12],
        "train_labels": links[:12],
        "label_texts": TEXTS,
        "test_texts": TEXTS[12:],
        "test_labels": links[12:],
    }


def own(rows, first=0):
    return [[row, row + first] for row in range(rows)]


def test_by_text():
    data = Dataset(**ring())
    changed, count = drop_self_pairs(data)
    assert count == 20
    assert changed.drop_train.tolist() == own(12)
    assert changed.drop_test.tolist() == own(8, 12)
    assert (data.drop_train, data.drop_test) == (None, None)
    assert changed.train_labels is data.train_labels
    # A second time changes nothing: the pairs are there.
    again, count = drop_self_pairs(changed)
    assert count == 20
    assert again.drop_train.tolist() == own(12)


def test_pairs_that_are_given_stay():
    data = Dataset(**ring(), drop_train=[(11, 3), (2, 2)], drop_test=[(0, 5)])
    changed, _ = drop_self_pairs(data)
    assert changed.drop_train.tolist() == sorted([*own(12), [11, 3]])
    assert changed.drop_test.tolist() == sorted([*own(8, 12), [0, 5]])


def test_tags_that_are_titles_are_no_self_pairs():
    """There the label of the same text is right, so the few that lack it are mistakes to count."""
    data = Dataset(**ring(0))
    assert drop_self_pairs(data) == (data, 0)
    y = data.train_labels.tolil()
    y[:10] = 0
    y[:10, 19] = 1
    changed, _ = drop_self_pairs(Dataset(**ring() | {"train_labels": y.tocsr()}))
    assert changed.drop_train is None


def test_one_positive_in_ten_is_the_most():
    y = ring()["train_labels"].tolil()
    y[0, 0] = 1
    assert drop_self_pairs(Dataset(**ring() | {"train_labels": y.tocsr()}))[1] == 20
    y[1, 1] = 1
    assert drop_self_pairs(Dataset(**ring() | {"train_labels": y.tocsr()}))[1] == 0


def test_a_few_equal_texts_say_nothing():
    parts = ring()
    parts["train_texts"] = [*TEXTS[:9], "a", "b", "c"]
    assert drop_self_pairs(Dataset(**parts))[1] == 0
    parts["train_texts"] = [*TEXTS[:10], "b", "c"]
    assert drop_self_pairs(Dataset(**parts))[1] == 18


def test_labels_of_the_same_text_and_empty_texts():
    parts = ring()
    parts["label_texts"] = [*TEXTS[:18], TEXTS[0], ""]
    parts["train_texts"] = [*TEXTS[:11], ""]
    with pytest.warns(UserWarning, match="empty texts"):
        data = Dataset(**parts)
    changed, count = drop_self_pairs(data)
    assert changed.drop_train.tolist() == sorted([*own(11), [0, 18]])
    assert count == 11 + 6


def test_without_test_points():
    parts = {name: value for name, value in ring().items() if not name.startswith("test")}
    changed, count = drop_self_pairs(Dataset(**parts))
    assert count == 12
    assert changed.drop_test is None


def folder_of(path, point_uids, label_uids):
    parts = ring()
    path.mkdir()
    for stem, uids, texts, labels in (
        ("trn", point_uids[:12], [f"text {number}" for number in range(12)], parts["train_labels"]),
        ("tst", point_uids[12:], [f"text {number}" for number in range(8)], parts["test_labels"]),
        ("lbl", label_uids, TEXTS, None),
    ):
        rows = [{"uid": uid, "title": text} for uid, text in zip(uids, texts, strict=True)]
        if labels is not None:
            for number, row in enumerate(rows):
                row["target_ind"] = labels[number].indices.tolist()
        (path / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_by_uid(tmp_path):
    uids = [f"u{number}" for number in range(20)]
    data = load_dataset(folder_of(tmp_path / "data", uids, uids))
    assert data.same_train.tolist() == own(12)
    assert data.same_test.tolist() == own(8, 12)
    changed, count = drop_self_pairs(data)
    assert count == 20
    assert changed.drop_test.tolist() == own(8, 12)
    save_dataset(data, tmp_path / "saved")
    again = load_dataset(tmp_path / "saved")
    assert again.same_train.tolist() == own(12)
    assert again.same_test.tolist() == own(8, 12)


def test_uids_that_are_numbers_say_nothing(tmp_path):
    numbers = [str(number) for number in range(20)]
    data = load_dataset(folder_of(tmp_path / "data", numbers, numbers))
    assert data.same_train is None
    assert drop_self_pairs(data) == (data, 0)


def test_uids_of_pairs_say_nothing(tmp_path):
    """A question and its answer may share a uid: there the pair is the positive one."""
    uids = [f"u{number}" for number in range(20)]
    data = load_dataset(folder_of(tmp_path / "data", uids, [*uids[-1:], *uids[:-1]]))
    assert len(data.same_train) == 12
    assert drop_self_pairs(data) == (data, 0)


def test_pairs_that_do_not_fit_are_refused():
    with pytest.raises(IndexError, match=r"same_train\[0\] is row 12"):
        Dataset(**ring(), same_train=[(12, 0)])
    with pytest.raises(ValueError, match="same_test was given without test_texts"):
        Dataset(["a"], [[1]], ["b"], same_test=[(0, 0)])


def test_a_point_that_is_several_labels_is_not_saved(tmp_path):
    """A line has one uid: the others would be lost."""
    data = Dataset(**ring(), same_train=[(0, 0), (3, 3), (3, 4)], same_test=[(1, 13), (1, 13)])
    with pytest.raises(ValueError, match="same_train has several labels for row 3; a folder of"):
        save_dataset(data, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    data.same_train = data.same_train[:2]
    save_dataset(data, tmp_path / "data")
    again = load_dataset(tmp_path / "data")
    assert again.same_train.tolist() == [*own(1), [3, 3]]
    assert again.same_test.tolist() == [[1, 13]]

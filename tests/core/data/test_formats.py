"""Data sets in files: what comes back, and what every fault is answered with."""

import gzip
import json
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ngame.data.dataset import Dataset
from ngame.data.formats import hash_bucket, load_dataset, read_matrices, save_dataset

POINTS = [
    {"uid": "a", "title": "red", "content": "apple", "target_ind": [2, 0], "target_rel": [1, 1]},
    {"uid": "b", "title": "green pear", "content": "", "target_ind": []},
    {"content": " Öl ", "target_ind": [1]},
]
LABELS = [{"title": "fruit"}, {"title": "oil", "content": "fat"}, {"title": "red"}]
Y = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], np.float32)


def write(path, rows):
    """Write objects, or bytes as they are, as lines; packed where the name says so."""
    if not isinstance(rows, bytes):
        rows = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(gzip.compress(rows) if path.suffix == ".gz" else rows)
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "trn.json", POINTS)
    write(tmp_path / "lbl.json", LABELS)
    return tmp_path


def same(left, right):
    """Whether two data sets hold the same, but for their names."""
    for field in ("train_labels", "test_labels", "val_labels"):
        a, b = getattr(left, field), getattr(right, field)
        if (a is None) != (b is None) or (a is not None and (a.toarray() != b.toarray()).any()):
            return False
    pairs = ("drop_train", "drop_test", "drop_val", "same_train", "same_test", "same_val")
    for field in pairs:
        if not np.array_equal(getattr(left, field), getattr(right, field)):
            return False
    texts = ("train_texts", "test_texts", "val_texts", "label_texts", "label_titles")
    return all(getattr(left, field) == getattr(right, field) for field in texts)


# Folders


@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".jsonl", ".jsonl.gz"])
def test_folder(tmp_path, suffix):
    write(tmp_path / f"trn{suffix}", POINTS)
    write(tmp_path / f"tst{suffix}", POINTS[:1])
    write(tmp_path / f"lbl{suffix}", LABELS)
    write(tmp_path / "filter_labels_test.txt", b"0 1\n0 2\n")
    write(tmp_path / "filter_labels_train.txt", b"")
    write(tmp_path / "raw.json.gz", b"ignored")
    data = load_dataset(tmp_path)
    assert data.train_texts == ["red apple", "green pear", "Öl"]
    assert data.test_texts == ["red apple"]
    assert data.label_texts == ["fruit", "oil fat", "red"]
    assert data.label_titles == ["fruit", "oil", "red"]
    np.testing.assert_array_equal(data.train_labels.toarray(), Y)
    np.testing.assert_array_equal(data.test_labels.toarray(), Y[:1])
    assert data.train_labels.has_canonical_format
    assert data.drop_test.tolist() == [[0, 1], [0, 2]]
    assert data.drop_train.shape == (0, 2)
    assert data.name == tmp_path.name


@pytest.mark.parametrize(
    ("labels", "titles"),
    [
        ([{"title": "x"}, {"title": "y", "content": ""}, {"title": "z", "content": None}], None),
        ([{"content": "x"}, {"title": "", "content": "y"}, {"title": "z"}], None),
        (
            [{"content": "x"}, {"title": " y ", "content": " and more"}, {"title": ""}],
            ["", "y", ""],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:empty texts are kept")
def test_titles_are_apart_where_more_follows(folder, labels, titles):
    write(folder / "lbl.json", labels)
    assert load_dataset(folder).label_titles == titles


def test_validation_points(folder):
    """Labels of training points with the same text are left out, beside those of a filter file."""
    val = [
        {"title": "red apple", "target_ind": [1]},
        {"title": "blue", "target_ind": [0]},
        {"title": "red", "content": "apple", "target_ind": [0]},
    ]
    write(folder / "val.jsonl", val)
    dataset = load_dataset(folder)
    assert dataset.val_texts == ["red apple", "blue", "red apple"]
    assert dataset.val_labels.toarray().tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert dataset.drop_val.tolist() == [[0, 0], [0, 2], [2, 2]]
    assert repr(dataset).endswith(
        "3 validation points, 0 test points, 3 labels, pairs left out: 3 validation>"
    )
    write(folder / "filter_labels_val.txt", b"2 2\n1 1\n")
    assert load_dataset(folder).drop_val.tolist() == [[2, 2], [1, 1], [0, 0], [0, 2]]
    save_dataset(dataset, folder / "saved")
    assert same(load_dataset(folder / "saved"), dataset)


def test_filters_that_are_not_read(folder):
    """A name that is nearly right would leave the filter off without a word."""
    write(folder / "filter_labels_train.txt", b"0 1\n")
    for name in ("filter_test.txt", "filter_labels_tst.txt"):
        write(folder / name, b"0 1\n")
    message = r"not read: filter_labels_tst.txt, filter_test.txt; pairs to leave out are in filter_"
    with pytest.warns(UserWarning, match=message) as caught:
        load_dataset(folder)
    assert [warning.filename for warning in caught] == [__file__]


def test_sparse_text_stands_in_for_target_ind(folder):
    write(folder / "trn.json", [{"title": point.get("title", "o")} for point in POINTS])
    write(folder / "trn_X_Y.txt", b"3 3\n2:1.0 0:0.5\n\n1:1\n")
    np.testing.assert_array_equal(load_dataset(folder).train_labels.toarray(), Y)


def test_line_ends_of_other_systems(folder):
    lines = (folder / "trn.json").read_bytes().replace(b"\n", b"\r\n")
    write(folder / "trn.json", lines.rstrip())
    write(folder / "trn_X_Y.txt", b"3 3\r\n2:1 0:1\r\n\r\n1:1")
    np.testing.assert_array_equal(load_dataset(folder).train_labels.toarray(), Y)


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_byte_order_marks_and_blank_last_lines(tmp_path, suffix):
    for stem, rows in (("trn", POINTS), ("tst", POINTS[:1]), ("lbl", LABELS)):
        lines = b"".join(json.dumps(row).encode() + b"\r\n" for row in rows)
        write(tmp_path / f"{stem}{suffix}", BOM + lines + b"\r\n \n\n")
    write(tmp_path / "trn_X_Y.txt", BOM + b"3 3\r\n2:1 0:1\r\n\r\n1:1\r\n\r\n\n")
    write(tmp_path / "filter_labels_test.txt", BOM + b"0 1\r\n0 2\r\n\r\n")
    data = load_dataset(tmp_path)
    assert data.train_texts == ["red apple", "green pear", "Öl"]
    assert data.label_texts == ["fruit", "oil fat", "red"]
    np.testing.assert_array_equal(data.train_labels.toarray(), Y)
    np.testing.assert_array_equal(data.test_labels.toarray(), Y[:1])
    assert data.drop_test.tolist() == [[0, 1], [0, 2]]


def test_empty_texts_are_kept_and_counted_in_one_warning(folder):
    points = [
        {**POINTS[0], "title": None, "content": "\t "},
        {**POINTS[1], "title": None},
        POINTS[2],
    ]
    write(folder / "trn.json", points)
    write(folder / "tst.json", [{"content": None, "target_ind": []}])
    write(folder / "lbl.json", [LABELS[0], {"title": ""}, LABELS[2]])
    message = (
        r"^empty texts are kept: 2 of 3 train_texts \(the first is 0\), "
        r"1 of 1 test_texts \(the first is 0\), 1 of 3 label_texts \(the first is 1\)$"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        data = load_dataset(folder)
    assert len(caught) == 1
    assert data.train_texts == ["", "", "Öl"]
    assert data.label_texts == ["fruit", "", "red"]
    np.testing.assert_array_equal(data.train_labels.toarray(), Y)
    save_dataset(data, folder / "again")
    with pytest.warns(UserWarning, match="empty texts are kept"):
        again = load_dataset(folder / "again")
    assert same(again, data)


def test_a_label_given_twice_in_a_row_counts_once(folder):
    points = [{**POINTS[0], "target_ind": [2, 0, 2], "target_rel": [1, 1, 1]}, *POINTS[1:]]
    write(folder / "trn.json", points)
    np.testing.assert_array_equal(load_dataset(folder).train_labels.toarray(), Y)
    write(folder / "trn_X_Y.txt", b"3 3\n2:1.0 0:0.5 2:1\n\n1:1\n")
    labels = load_dataset(folder).train_labels
    np.testing.assert_array_equal(labels.toarray(), Y)
    assert labels.has_canonical_format


def test_reading_is_quiet_without_a_terminal(folder, capsys):
    load_dataset(folder)
    assert capsys.readouterr() == ("", "")


def test_no_test_points(folder):
    data = load_dataset(str(folder))
    assert data.test_texts is None
    assert data.test_labels is None


def point(**change):
    return [POINTS[0], POINTS[1] | change]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trn.json", b'{"title": "a", "target_ind": []}\n{"tit', r":2: malformed JSON: .*column 2"),
        ("trn.json", b'{"title": ' + b"1" * 5000 + b"}", ":1: malformed JSON: "),
        ("trn.json", b"[" * 100_000, ":1: malformed JSON: "),
        ("trn.json", b"\n", ":1: the file is empty"),
        ("trn.json", b'{"title": "a", "target_ind": []}\n \r\n\n{}\n', ":2: the line is blank"),
        ("trn.json", b"[1, 2]\n", ":1: expected a JSON object"),
        ("trn.json", b"", ":1: the file is empty"),
        (
            "trn.json",
            json.dumps(POINTS[0]).encode() + b'\n{"title": "\xff"}',
            ":2: not UTF-8 at byte",
        ),
        ("trn.json", [{"uid": "a", "target_ind": []}], ':1: missing field "title" or "content"'),
        ("trn.json", [{"title": "a"}], ':1: missing field "target_ind"; the line has "title"'),
        ("trn.json", point(title=3), ":2: title or content is not a string"),
        ("trn.json", point(title="\ud800"), ":2: title or content holds a lone surrogate"),
        ("trn.json", point(target_ind=3), ":2: target_ind is not a list of integers"),
        ("trn.json", point(target_ind=["3"]), ":2: target_ind is not a list of integers"),
        ("trn.json", point(target_ind=[True]), ":2: target_ind is not a list of integers"),
        ("trn.json", point(target_ind=[0, 3]), ":2: label id 3 is out of range; there are 3"),
        ("trn.json", point(target_ind=[-1]), ":2: label id -1 is out of range"),
        ("trn.json", point(target_ind=[2**70]), f":2: label id {2**70} is out of range"),
        ("trn.json", point(target_rel=[1.0]), ":2: target_rel is not a list as long as target_ind"),
        ("trn.json", point(target_rel=1.0), ":2: target_rel is not a list as long as target_ind"),
        (
            "trn.json",
            point(target_ind=[0, 2], target_rel=[1, 0]),
            ":2: target_rel is 0 for label 2, expected a positive number",
        ),
        ("trn.json", point(target_ind=[1], target_rel=["x"]), r':2: target_rel is "x" for label 1'),
        ("lbl.json", b"", ":1: the file is empty"),
        ("tst.json", [{"title": "a"}], ':1: missing field "target_ind"'),
        ("trn_X_Y.txt", b"", ":1: header ''; expected rows and columns"),
        ("trn_X_Y.txt", b"3 3 3\n", ":1: header '3 3 3'; expected rows and columns"),
        ("trn_X_Y.txt", b"3 4\n\n\n\n", ":1: .* 4 columns; there are 3 points and 3 labels"),
        ("trn_X_Y.txt", b"2 3\n\n\n", ":1: header says 2 rows"),
        ("trn_X_Y.txt", b"3 3\n0:1\n\n", ":3: the file ends after 2 rows; the header says 3"),
        ("trn_X_Y.txt", b"3 3\n0:1\n\n\n\n1:1\n", ":6: the file ends after 5 rows"),
        ("trn_X_Y.txt", b"3 3\n0:1\n3:1\n\n", ":3: id 3 is out of range"),
        ("trn_X_Y.txt", b"3 3\n0\n\n\n", ":2: '0' is not label:value"),
        ("trn_X_Y.txt", b"3 3\nx:1\n\n\n", ":2: 'x:1' is not label:value"),
        ("trn_X_Y.txt", b"3 3\n0:0\n\n\n", ":2: '0:0' is not label:value with a positive value"),
        ("trn_X_Y.txt", b"3 3\n0:nan\n\n\n", ":2: '0:nan' is not label:value"),
        ("filter_labels_train.txt", b"0 0\n0\n", ":2: '0' is not a pair of integers"),
        ("filter_labels_train.txt", b"0 0\n\n0 1\n", ":2: the line is blank"),
        (
            "filter_labels_train.txt",
            b"0 0\n3 0\n",
            ":2: row 3, label 0 is out of range; there are 3",
        ),
        ("filter_labels_train.txt", b"0 -1\n", ":1: row 0, label -1 is out of range"),
    ],
)
def test_bad_folder(folder, name, content, message):
    write(folder / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(folder)
    assert str(caught.value).startswith(str(folder / name))


@pytest.mark.parametrize("cut", [5, 60, -4])
def test_truncated_gzip_file(folder, cut):
    (folder / "trn.json").unlink()
    path = write(folder / "trn.json.gz", POINTS)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"trn\.json\.gz:\d+: truncated or damaged gzip file"):
        load_dataset(folder)


def test_not_a_gzip_file(folder):
    (folder / "lbl.json").rename(folder / "lbl.json.gz")
    with pytest.raises(ValueError, match=r"lbl\.json\.gz:1: truncated or damaged gzip file"):
        load_dataset(folder)


def test_missing_files(folder):
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        load_dataset(folder / "nowhere")
    write(folder / "tst_X_Y.txt", b"1 3\n0:1\n")
    with pytest.raises(FileNotFoundError, match=r"has no test points: a data set is a folder"):
        load_dataset(folder)
    (folder / "trn.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no train points: a data set is a folder"):
        load_dataset(folder)


def test_two_files_for_one_thing(folder):
    write(folder / "trn.jsonl", POINTS)
    with pytest.raises(ValueError, match=r"both trn\.json and trn\.jsonl are there; keep one"):
        load_dataset(folder)


# One file of texts and tags


def tagged(n):
    return [{"text": f"text {i}", "labels": [f"tag {i % 7}", f"tag {i % 3}x"]} for i in range(n)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_tagged_file(tmp_path, suffix):
    rows = tagged(200)
    data = load_dataset(write(tmp_path / f"notes{suffix}", rows))
    tags = sorted({tag for row in rows for tag in row["labels"]})
    assert data.name == "notes"
    assert data.label_texts == tags
    wanted = {row["text"]: sorted(row["labels"]) for row in rows}
    test_texts = [row["text"] for row in rows if hash_bucket(row["text"], 10) == 0]
    assert data.test_texts == test_texts
    assert data.train_texts == [row["text"] for row in rows if row["text"] not in test_texts]
    for texts, labels in (
        (data.train_texts, data.train_labels),
        (data.test_texts, data.test_labels),
    ):
        assert labels.has_canonical_format
        for row, text in enumerate(texts):
            assert [tags[label] for label in labels[row].indices] == wanted[text]


def test_tagged_split_does_not_depend_on_the_order_of_lines(tmp_path):
    rows = tagged(200)
    one = load_dataset(write(tmp_path / "one.jsonl", rows))
    two = load_dataset(write(tmp_path / "two.jsonl", rows[::-1]))
    assert one.test_texts == two.test_texts[::-1]
    assert one.label_texts == two.label_texts
    np.testing.assert_array_equal(one.test_labels.toarray(), two.test_labels.toarray()[::-1])


def test_hash_bucket_is_the_same_everywhere():
    assert [hash_bucket(text, 10) for text in ("", "a", "Öl", "numpy")] == [6, 3, 4, 1]
    counts = np.bincount([hash_bucket(str(i), 10) for i in range(10_000)])
    assert (abs(counts - 1000) < 150).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"", ":1: the file is empty"),
        ([{"text": "a"}], ':1: missing field "labels"; the line has "text"$'),
        ([{"body": "a", "tags": 1}], 'missing field "text"; the line has "body", "tags"$'),
        ([{}], 'missing field "text"; the line has no fields$'),
        ([{str(i): i for i in range(20)}], 'has "0", "1", .*, "7" and 12 more$'),
        ([{"labels": ["x"]}], ':1: missing field "text"'),
        ([{"text": 1, "labels": ["x"]}], ":1: text is not a string"),
        ([{"text": "a", "labels": "x;y"}], ':1: labels is not a list of strings: "x;y"$'),
        ([{"text": "a", "labels": [1]}], ":1: a label is not a string: 1$"),
        ([{"text": ["a"] * 99, "labels": []}], r':1: text is not a string: \["a", .*…$'),
        ([{"text": "a", "labels": []}], ": no line has a label"),
        (
            [{"text": "a", "labels": ["", None, " "]}, {"text": "b", "labels": None}],
            ": no line has",
        ),
    ],
)
def test_bad_tagged_file(tmp_path, rows, message):
    path = write(tmp_path / "notes.jsonl", rows)
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset(path)
    assert str(caught.value).startswith(str(path))


def test_tables_and_empty_paths(tmp_path):
    (tmp_path / "notes.csv").write_text("title,tags\n")
    with pytest.raises(ValueError, match=r"\.jsonl\.gz \(docs/formats\.md has .* a CSV file\)$"):
        load_dataset(tmp_path / "notes.csv")
    with pytest.raises(ValueError, match="path is empty, expected a folder or a file"):
        load_dataset("")


def test_tagged_file_as_it_comes(tmp_path):
    rows = [
        {"text": "apple", "labels": ["fruit", "fruit ", "", None, "red"]},
        {"text": None, "labels": ["red"]},
        {"text": "nothing", "labels": None},
    ]
    lines = b"".join(json.dumps(row).encode() + b"\r\n" for row in rows)
    path = write(tmp_path / "notes.jsonl", BOM + lines + b"\r\n")
    left_out = rf"^empty labels are left out: 2 \(the first at {path}:1\)$"
    with (
        pytest.warns(UserWarning, match=left_out),
        pytest.warns(UserWarning, match=r"1 of 3 train_texts \(the first is 1\)$"),
    ):
        data = load_dataset(path)
    assert data.train_texts == ["apple", "", "nothing"]
    assert data.label_texts == ["fruit", "red"]
    assert data.train_labels.toarray().tolist() == [[1, 1], [0, 1], [0, 0]]


def test_tagged_file_of_test_points_alone(tmp_path):
    text = next(str(i) for i in range(1000) if hash_bucket(str(i), 10) == 0)
    path = write(tmp_path / "notes.jsonl", [{"text": text, "labels": ["x"]}])
    with pytest.raises(ValueError, match="by the split rule every line is a test point"):
        load_dataset(path)


def test_tagged_file_without_test_points(tmp_path):
    text = next(str(i) for i in range(1000) if hash_bucket(str(i), 10) != 0)
    data = load_dataset(write(tmp_path / "notes.jsonl", [{"text": text, "labels": ["x"]}]))
    assert data.train_texts == [text]
    assert data.test_texts is None


# Writing


@st.composite
def datasets(draw):
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8).map(str.strip)
    texts = st.lists(text.filter(bool), min_size=1, max_size=5)
    label_texts = draw(texts)
    label_titles = draw(st.none() | st.just([*label_texts]))
    if label_titles:  # a title that stands for the whole text is saved as such
        label_texts[0] = f"{label_titles[0]} and more"

    def split():
        points = draw(texts)
        shape = (len(points), len(label_texts))
        bits = st.lists(st.booleans(), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])
        pair = st.tuples(st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1))
        drop = draw(st.none() | st.lists(pair, max_size=4))
        return points, np.reshape(draw(bits), shape), drop

    train_texts, train_labels, drop_train = split()
    test_texts, test_labels, drop_test = split() if draw(st.booleans()) else (None, None, None)
    return Dataset(
        train_texts,
        train_labels,
        label_texts,
        label_titles=label_titles,
        test_texts=test_texts,
        test_labels=test_labels,
        drop_train=drop_train,
        drop_test=drop_test,
    )


@given(datasets())
@settings(max_examples=50, deadline=None)
def test_what_is_saved_comes_back(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("saved")
    save_dataset(data, folder)
    assert same(load_dataset(folder), data)


def test_same_data_same_bytes(tmp_path, monkeypatch):
    data = Dataset(["a", "b", "c"], Y, ["x", "y", "z"], drop_train=[(0, 1)])
    save_dataset(data, tmp_path / "one")
    monkeypatch.setattr("time.time", lambda: 0.0)
    save_dataset(data, tmp_path / "two")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["filter_labels_train.txt", "lbl.json.gz", "trn.json.gz"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_full_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_dataset(Dataset(["a"], [[1]], ["x"]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_nothing_is_left_of_a_failed_save(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savetxt", full)
    data = Dataset(["a"], [[1]], ["x"], drop_train=[(0, 0)])
    with pytest.raises(OSError, match="No space left"):
        save_dataset(data, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


# Anything at all


@given(
    st.lists(st.binary(max_size=12) | st.sampled_from([b"{", b'"title"', b":", b"[1e9]", b"\n"]))
)
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_rubbish_is_a_value_error_that_names_file_and_line(folder, parts):
    write(folder / "trn.json", b"".join(parts))
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the message is looked at below
        load_dataset(folder)
    where, number, _ = str(caught.value)[len(str(folder)) :].split(":", 2)
    assert where == "/trn.json"
    assert int(number) >= 1


# Data sets of the extreme-classification repository in other forms


@pytest.mark.filterwarnings("ignore:empty texts are kept")
def test_sparse_features_are_read_as_words(tmp_path):
    folder = written(
        tmp_path / "bags",
        {
            "trn_X_Xf.txt": "3 4\n3:0.5 0:0.9\n\n1:2 2:2\n",
            "trn_X_Y.txt": "3 2\n0:1\n1:1\n0:1 1:1\n",
            "tst_X_Xf.txt": "1 4\n2:1\n",
            "tst_X_Y.txt": "1 2\n1:1\n",
            "filter_labels_test.txt": "0 0\n",
        },
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = load_dataset(folder)
    messages = [str(one.message) for one in caught]
    assert any(
        "trn_X_Xf.txt has features instead of texts: words such as f0" in m for m in messages
    )
    assert any("no texts of labels: their ids, 0 to 1, are their texts" in m for m in messages)
    assert dataset.train_texts == ["f0 f3", "", "f1 f2"]
    assert dataset.test_texts == ["f2"]
    assert dataset.label_texts == ["0", "1"]
    assert dataset.train_labels.toarray().tolist() == [[1, 0], [0, 1], [1, 1]]
    assert dataset.drop_test.tolist() == [[0, 0]]
    written(folder, {"Xf.txt": "red\ngreen\nblue\nround\n", "lbl.json": '{"title": "a"}\n' * 2})
    with pytest.warns(UserWarning, match="their names in Xf.txt are read"):
        dataset = load_dataset(folder)
    assert dataset.train_texts == ["red round", "", "green blue"]
    assert dataset.label_texts == ["a", "a"]
    written(folder, {"Xf.txt": "red\n"})
    with pytest.raises(ValueError, match=r"trn_X_Xf.txt:1: header says 4 features, Xf.txt 1"):
        load_dataset(folder)
    written(folder, {"Xf.txt": "a\nb\nc\nd\n", "trn_X_Xf.txt": "3 4\n0:1\n4:1\n1:1\n"})
    with pytest.raises(ValueError, match=r"trn_X_Xf.txt:3: feature 4 is out of range; there are 4"):
        load_dataset(folder)


@pytest.mark.filterwarnings("ignore:.*has features instead|.*has no texts of labels")
def test_the_older_format_of_one_file(tmp_path):
    folder = written(
        tmp_path / "old",
        {"train.txt": "3 4 3\n2,0 1:0.5 3:1\n 0:1\n1\t2:1\n", "test.txt": "1 4 3\n0 3:1\n"},
    )
    dataset = load_dataset(folder)
    assert dataset.train_texts == ["f3 f1", "f0", "f2"]
    assert dataset.train_labels.toarray().tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert dataset.test_texts == ["f3"]
    assert dataset.label_texts == ["0", "1", "2"]
    written(folder, {"train.txt": "4 4 3\n2 1:1\n0 1:1\n1 1:1\n"})
    with pytest.raises(ValueError, match=r"train.txt:1: header \(4, 4, 3\); there are 3 rows"):
        load_dataset(folder)
    written(folder, {"train.txt": "1 4 3\n3 1:1\n"})
    with pytest.raises(ValueError, match=r"train.txt:2: id 3 is out of range; there are 3 columns"):
        load_dataset(folder)
    written(folder, {"train.txt": "1 4 3\n0 1:1\n", "lbl.json": '{"title": "a"}\n'})
    with pytest.raises(ValueError, match=r"train.txt:1: header says 3 labels; there are 1 texts"):
        load_dataset(folder)


@pytest.mark.parametrize("names", [("train", "test", "label"), ("trn", "tst", "lbl")])
@pytest.mark.parametrize("place", ["raw_data/", ""])
def test_raw_texts(names, place, tmp_path):
    train, test, label = names
    folder = written(
        tmp_path / "raw",
        {
            f"{place}{train}.raw.txt": "\ufeffred apple\r\n pear \r\n",
            f"{place}{test}.raw.txt": "plum\n",
            f"{place}{label}.raw.txt": "fruit\nround\n",
            "trn_X_Y.txt": "2 2\n0:1 1:1\n0:1\n",
            "tst_X_Y.txt": "1 2\n0:1\n",
        },
    )
    dataset = load_dataset(folder)
    assert dataset.train_texts == ["red apple", "pear"]
    assert dataset.test_texts == ["plum"]
    assert dataset.label_texts == ["fruit", "round"]
    assert dataset.train_labels.toarray().tolist() == [[1, 1], [1, 0]]
    (folder / "trn_X_Y.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"trn_X_Y.txt with the labels of the points"):
        load_dataset(folder)
    (folder / f"{place}{train}.raw.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"raw.txt:2: not UTF-8 at byte 1"):
        load_dataset(folder)


def test_labels_without_texts(tmp_path):
    folder = written(
        tmp_path / "ids",
        {
            "trn.json": '{"title": "a", "target_ind": [2]}\n{"title": "b", "target_ind": []}\n',
            "tst.json": '{"title": "c", "target_ind": [3, 0]}\n',
        },
    )
    with pytest.warns(UserWarning, match="no texts of labels: their ids, 0 to 3, are their texts"):
        dataset = load_dataset(folder)
    assert dataset.label_texts == ["0", "1", "2", "3"]
    assert dataset.train_labels.toarray().tolist() == [[0, 0, 1, 0], [0] * 4]
    assert dataset.test_labels.toarray().tolist() == [[1, 0, 0, 1]]


def test_what_is_no_data_set(tmp_path):
    for name in ("train.txt", "data.csv", "x.npz"):
        (tmp_path / name).write_text("1 2 3\n")
        with pytest.raises(ValueError, match=rf"{name} is no data set: that is a folder with trn"):
            load_dataset(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match="empty has no train points: a data set is a folder"
    ):
        load_dataset(tmp_path / "empty")


def written(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf8")
    return folder


def test_matrices_of_a_folder_without_texts(tmp_path):
    folder = tmp_path
    (folder / "trn_X_Y.txt").write_text("2 3\n0:1 2:0.5\n\n")
    assert read_matrices(folder) is None
    (folder / "tst_X_Y.txt").write_text("1 3\n1:1\n")
    (folder / "filter_labels_test.txt").write_text("0 2\n")
    train, test, drop_train, drop_test = read_matrices(folder)
    assert train.toarray().tolist() == [[1, 0, 1], [0, 0, 0]]
    assert test.toarray().tolist() == [[0, 1, 0]]
    assert drop_train is None
    assert drop_test.tolist() == [[0, 2]]
    (folder / "tst_X_Y.txt").write_text("1 4\n1:1\n")
    with pytest.raises(ValueError, match=r"tst_X_Y\.txt:1: header says 1 rows and 4 columns"):
        read_matrices(folder)
    for stem in ("trn", "tst"):
        write(folder / f"{stem}.json", POINTS)
    assert read_matrices(folder) is None

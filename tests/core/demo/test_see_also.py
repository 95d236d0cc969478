"""The see-also task: its size, no answer in any text, and the same data every time."""

import inspect
import re
from operator import attrgetter

import numpy as np
import pytest
import scipy

from ngame.data.formats import hash_bucket
from ngame.demo.see_also import see_also_dataset


@pytest.fixture(scope="module")
def data():
    return see_also_dataset()


def name_of(text):
    """The dotted name at the start of a text: ``numpy.fill_diagonal (fill diagonal): Fill ...``."""
    return re.match(r"[\w.]+", text)[0]


def docstring_of(name):
    package, _, path = name.partition(".")
    return inspect.cleandoc(attrgetter(path)({"numpy": np, "scipy": scipy}[package]).__doc__)


def answers(data, name):
    for texts, labels in (
        (data.train_texts, data.train_labels),
        (data.test_texts, data.test_labels),
    ):
        for row, text in enumerate(texts):
            if name_of(text) == name:
                return {name_of(data.label_texts[label]) for label in labels[row].indices}
    return None


def test_sizes(data):
    assert 1000 < len(data.train_texts) < 3000
    assert 0.1 < len(data.test_texts) / len(data.train_texts) < 0.4
    assert 1500 < len(data.label_texts) < 4000
    assert 1.5 < data.train_labels.nnz / len(data.train_texts) < 5
    assert data.train_labels.getnnz(axis=1).min() == 1
    assert data.test_labels.getnnz(axis=1).min() == 1


def test_names_are_unique_and_sorted(data):
    for texts in (data.train_texts, data.test_texts, data.label_texts):
        names = [name_of(text) for text in texts]
        assert names == sorted(set(names))


def test_known_answers(data):
    assert answers(data, "numpy.fill_diagonal") == {"numpy.diag_indices", "numpy.diag_indices_from"}
    assert answers(data, "scipy.fft.fht") == {"scipy.fft.fhtoffset", "scipy.fft.ifht"}
    assert "numpy.sum" in answers(
        data, "numpy.ndarray.sum"
    )  # a full name, in the docstring of a method


def test_texts_are_names_and_descriptions(data):
    texts = {name_of(text): text for text in data.train_texts + data.test_texts}
    assert texts["scipy.fft.fht"].startswith(
        "scipy.fft.fht: Compute the fast Hankel transform. Computes the discrete Hankel transform"
    )
    assert texts["numpy.fill_diagonal"].startswith("numpy.fill_diagonal (fill diagonal): Fill the ")
    labels = {name_of(text): text for text in data.label_texts}
    assert labels["scipy.fft.fht"] == "scipy.fft.fht: Compute the fast Hankel transform."
    assert max(map(len, texts.values())) <= 600
    assert not any(re.search(r"\n|  |\.\. \w+::", text) for text in texts.values())


def test_no_text_contains_its_see_also_section(data):
    checked = 0
    for text in data.train_texts + data.test_texts:
        _, _, section = docstring_of(name_of(text)).partition("See Also\n")
        for entry in section.partition("\n\n")[0].splitlines()[1:]:
            if " : " in entry:
                assert entry.strip() not in text
                checked += 1
    assert checked > 500


def test_a_function_is_never_its_own_answer(data):
    for texts, labels, drop in (
        (data.train_texts, data.train_labels, data.drop_train),
        (data.test_texts, data.test_labels, data.drop_test),
    ):
        assert drop[:, 0].tolist() == list(range(len(texts)))
        for row, label in drop:
            assert name_of(texts[row]) == name_of(data.label_texts[label])
            assert labels[row, label] == 0


def test_split_is_by_name_alone(data):
    assert all(hash_bucket(name_of(text), 5) == 0 for text in data.test_texts)
    assert not any(hash_bucket(name_of(text), 5) == 0 for text in data.train_texts)


def test_same_versions_same_data(data):
    again = see_also_dataset()
    assert again.train_texts == data.train_texts
    assert again.test_texts == data.test_texts
    assert again.label_texts == data.label_texts
    np.testing.assert_array_equal(again.train_labels.indices, data.train_labels.indices)
    np.testing.assert_array_equal(again.test_labels.indptr, data.test_labels.indptr)

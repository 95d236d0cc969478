"""`NgameClassifier` in scikit-learn: its estimator checks, pipelines, grid search, multilabel y."""

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import tiny

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.exceptions import NotFittedError, SkipTestWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MultiLabelBinarizer
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data

import ngame
from ngame.adapters.sklearn import NgameClassifier

DATA = tiny.dataset()
TEXTS = np.array(DATA.train_texts)
FIRST = np.array([f"class {ids[0]:02}" for ids in DATA.train_labels.tolil().rows])
ALONE = ("prediction.scorers=['encoder']",)
EPOCHS = "encoder_stage.epochs=8", "classifier_stage.epochs=8"
SETTINGS = [*(item for item in tiny.SETTINGS if "epochs" not in item), *EPOCHS]


def classifier(**parameters: Any) -> NgameClassifier:
    return NgameClassifier(**{"settings": SETTINGS, **parameters})


def test_texts_that_no_scorer_has_a_class_for():
    """By words alone, of a text that shares none: it gets the most frequent class."""
    texts = ["red apple", "green apple", "red pear", "green pear", "red plum"]
    kinds = np.array(["apple", "apple", "pear", "pear", "apple"])
    by_words = NgameClassifier(["prediction.scorers=['tfidf']"], scorer="tfidf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_words.fit(texts, kinds)
    asked = ["a pear", "zzz", "an apple", "qqq"]
    assert by_words.predict(asked).tolist() == ["pear", "apple", "apple", "apple"]
    assert by_words.decision_function(["zzz"])[0] < 0  # of two: less than 0 is the first
    assert by_words.score(asked, ["pear", "pear", "apple", "apple"]) == 0.75
    marks = sp.csr_matrix(kinds[:, None] == ["apple", "pear"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_words = clone(by_words).set_params(label_texts=["apple", "pear"]).fit(texts, marks)
    assert by_words.predict(asked).tolist() == [[0, 1], [0, 0], [1, 0], [0, 0]]
    assert by_words.score(asked, [[0, 1], [1, 1], [1, 0], [0, 0]]) == 0.5


class OnNumbers(NgameClassifier):
    """The classifier on texts made of numbers, so that the checks of scikit-learn can call it.

    Each feature becomes one word of its name and its value, rounded.
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = False
        tags.input_tags.two_d_array = True
        tags.input_tags.string = False
        return tags

    def fit(self, X: Any, y: Any) -> Any:
        if y is None:
            return super().fit(["a", "b"], y)
        X, y = validate_data(self, X, y, multi_output=True, dtype="numeric")
        return super().fit(as_texts(X), y)

    def _found(self, X: Any, k: int, **options: Any) -> Any:
        check_is_fitted(self)
        return super()._found(as_texts(validate_data(self, X, reset=False)), k, **options)


def as_texts(x: Any) -> list[str]:
    def word(column: int, value: float) -> str:
        return f"f{column}v{round(2 * value)}".replace("-", "m")

    return [" ".join(word(*pair) for pair in enumerate(row)) for row in x.tolist()]


@parametrize_with_checks([OnNumbers(SETTINGS)])
def test_estimator_checks(estimator: Any, check: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(estimator)


def test_checks_that_need_numbers_are_skipped_by_tag() -> None:
    """scikit-learn has no checks for texts: `OnNumbers` stands in."""
    with pytest.warns(SkipTestWarning, match="Can't test estimator NgameClassifier"):
        check_estimator(classifier())


def test_classes() -> None:
    held_out = np.arange(len(TEXTS)) % 5 == 0
    fitted = classifier().fit(TEXTS[~held_out], FIRST[~held_out])
    assert fitted.classes_.tolist() == sorted({*FIRST[~held_out]})
    assert fitted.model_.label_texts == fitted.classes_.tolist()
    texts, truth = TEXTS[held_out], FIRST[held_out]
    found, scores = fitted.predict(texts), fitted.decision_function(texts)
    assert scores.shape == (len(texts), len(fitted.classes_))
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(found, fitted.classes_[scores.argmax(axis=1)])
    assert fitted.score(texts, truth) == np.mean(found == truth) > 0.3
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.decision_function(texts), scores)


@pytest.mark.parametrize("given", ["sparse", "dense", "lists"])
def test_multilabel(given: str) -> None:
    y: Any = DATA.train_labels
    if given != "sparse":
        y = y.toarray().astype(int)
    if given == "lists":
        y = y.tolist()
    fitted = classifier(label_texts=DATA.label_texts).fit(list(TEXTS), y)
    truth = DATA.test_labels
    assert truth is not None
    assert fitted.model_.label_texts == DATA.label_texts
    assert fitted.classes_.tolist() == list(range(tiny.LABELS))
    assert fitted.n_labels_ == round(DATA.train_labels.nnz / len(TEXTS))
    found, scores = fitted.predict(DATA.test_texts), fitted.decision_function(DATA.test_texts)
    assert found.shape == scores.shape == truth.shape
    assert (found.sum(axis=1) == fitted.n_labels_).all()
    worst_of_ours = np.where(found == 1, scores, np.inf).min(axis=1)
    assert (worst_of_ours >= np.where(found == 0, scores, -np.inf).max(axis=1)).all()
    # The reference: evaluate, on what train and predict give without scikit-learn.
    data = ngame.Dataset(DATA.train_texts, DATA.train_labels, DATA.label_texts)
    model = ngame.train(data, ngame.Config.load(sets=SETTINGS, points=300, labels=tiny.LABELS))
    expected = ngame.metrics.evaluate(model.predict(DATA.test_texts, 1), truth, ks=[1])["P@1"]
    assert fitted.score(DATA.test_texts, truth) == pytest.approx(expected)
    assert fitted.score(DATA.test_texts, 3 * truth) == pytest.approx(expected)
    assert expected > 0.5


def test_probabilities() -> None:
    fitted = classifier().fit(TEXTS, FIRST)
    likely = fitted.predict_proba(DATA.test_texts)
    np.testing.assert_allclose(likely.sum(axis=1), 1, rtol=1e-5)
    found = fitted.model_.predict(DATA.test_texts, tiny.LABELS, probabilities=True).toarray()
    np.testing.assert_allclose(likely, found / found.sum(axis=1, keepdims=True), rtol=1e-5)
    best = fitted.classes_[likely.argmax(axis=1)]
    assert best.tolist() == fitted.predict(DATA.test_texts).tolist()


def test_log_loss() -> None:
    losses = cross_val_score(classifier(), TEXTS, FIRST, cv=2, scoring="neg_log_loss")
    assert losses.min() > -np.log(len(np.unique(FIRST)))  # better than no knowledge


def test_probabilities_of_several_labels() -> None:
    several = classifier().fit(TEXTS, DATA.train_labels)
    expected = several.model_.predict(DATA.test_texts, tiny.LABELS, probabilities=True)
    np.testing.assert_array_equal(several.predict_proba(DATA.test_texts), expected.toarray())
    assert not hasattr(classifier(scorer="encoder"), "predict_proba")


def test_probabilities_of_a_text_that_no_scorer_has_a_class_for() -> None:
    settings = [*SETTINGS, "prediction.scorers=['tfidf']"]
    by_words = classifier(settings=settings, label_texts=DATA.label_texts).fit(TEXTS, FIRST)
    shares = np.unique(FIRST, return_counts=True)[1] / len(FIRST)
    np.testing.assert_allclose(by_words.predict_proba(["zzz"]), [shares], rtol=1e-6)
    assert by_words.predict(["zzz"]).tolist() == [by_words.classes_[shares.argmax()]]


@tiny.few_held_out
def test_no_probabilities_of_few_texts() -> None:
    few = classifier().fit(["red apple", "green pear", "blue car", "old bus"] * 3, [0, 0, 1, 1] * 3)
    assert hasattr(classifier(), "predict_proba")
    assert not hasattr(few, "predict_proba")


def test_labels_that_no_scorer_proposes_come_last() -> None:
    fitted = classifier(scorer="neighbours").fit(TEXTS, FIRST)
    fitted.model_.config = ngame.config.PredictionConfig(neighbours=2)
    scores = fitted.decision_function(TEXTS[:20])
    votes = fitted.model_.predict(list(TEXTS[:20]), 20, scorer="neighbours").toarray()
    for row, proposed in zip(scores, votes, strict=True):
        lowest = proposed[proposed > 0].min()
        np.testing.assert_allclose(row[proposed == 0], lowest - 1, atol=1e-6)
        np.testing.assert_array_equal(row[proposed > 0], proposed[proposed > 0])


def test_pipeline_and_grid_search() -> None:
    pipeline = make_pipeline(FunctionTransformer(np.char.upper), classifier(n_labels=1))
    grid = {"ngameclassifier__settings": [[*SETTINGS, "encoder.dim=2", *ALONE], SETTINGS]}
    y = MultiLabelBinarizer().fit_transform([row.indices for row in DATA.train_labels])
    search = GridSearchCV(pipeline, grid, cv=2, scoring="f1_micro", error_score="raise")
    search.fit(TEXTS, y)
    assert search.best_params_ == {"ngameclassifier__settings": SETTINGS}
    assert search.best_score_ > 0.4
    assert len(cross_val_score(classifier(), list(TEXTS), FIRST, cv=2)) == 2


@tiny.few_held_out
def test_two_classes_and_one() -> None:
    texts = ["red apple", "green pear", "blue car", "old bus"] * 10
    two = classifier().fit(texts, ["fruit", "fruit", "wheels", "wheels"] * 10)
    assert two.decision_function(texts).shape == (40,)
    assert two.predict(["green apple", "blue bus"]).tolist() == ["fruit", "wheels"]
    one = classifier().fit(texts, [7] * 40)
    assert one.predict(["anything"]).tolist() == [7]


@pytest.mark.parametrize(
    ("X", "y", "error", "message"),
    [
        ("one text", [1], TypeError, "X is a str, expected a sequence"),
        ([["a"], ["b"]], [0, 1], ValueError, "X has 2 dimensions, expected one text a row"),
        (["a", 3.5], [0, 1], TypeError, r"X\[1\] is a float, expected a str"),
        (["a", None], [0, 1], TypeError, r"X\[1\] is a NoneType, expected a str"),
        (sp.eye(3), [0, 1, 2], TypeError, "Sparse data was passed"),
        ([], [], ValueError, "0 sample"),
        (["a"], [0], ValueError, "minimum of 2 is required"),
        (["a", "b"], [0, 1, 2], ValueError, "inconsistent numbers of samples"),
        (["a", "b"], [0.5, 1.7], ValueError, "Unknown label type"),
        (["a", "b"], None, ValueError, "requires y"),
    ],
)
def test_bad_input(X: Any, y: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        classifier().fit(X, y)


def test_bad_parameters() -> None:
    with pytest.raises(TypeError, match="settings is a str"):
        classifier(settings="encoder.dim=8").fit(TEXTS, FIRST)
    with pytest.raises(ValueError, match="label_texts has 2 entries"):
        classifier(label_texts=["a", "b"]).fit(TEXTS, FIRST)
    with pytest.raises(ValueError, match="n_labels is 0, expected 1 or more"):
        classifier(n_labels=0).fit(TEXTS, DATA.train_labels)
    with pytest.raises(ValueError, match="label_texts has 1 entries, y has 2 classes"):
        classifier(label_texts=["one"]).fit(TEXTS[:4], [0, 1, 0, 1])
    message = f"label_texts has 1 entries, y has {DATA.train_labels.shape[1]} columns"
    with pytest.raises(ValueError, match=message):
        classifier(label_texts=["one"]).fit(TEXTS, DATA.train_labels)
    with pytest.raises(ValueError, match="scorer is 'best'"):
        classifier(scorer="best").fit(TEXTS, FIRST).predict(TEXTS)
    for method in ("predict", "decision_function"):
        with pytest.raises(NotFittedError):
            getattr(classifier(), method)(TEXTS)
    assert clone(classifier(n_labels=3)).get_params()["n_labels"] == 3

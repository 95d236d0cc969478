"""A classifier of texts for scikit-learn 1.9: pipelines, cross-validation, grid search."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_array, check_consistent_length, column_or_1d
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted

from ngame.arrays import as_count, pairs_of
from ngame.config import Config
from ngame.data.dataset import Dataset
from ngame.prediction.model import Scorer
from ngame.training.loops import train


def _has_probabilities(classifier: "NgameClassifier") -> bool:
    """Whether the scores are the fused ones, and enough texts were held out to calibrate them."""
    fitted = hasattr(classifier, "model_")
    calibrated = not fitted or classifier.model_.fusions["all"].calibration is not None
    return classifier.scorer == "fused" and calibrated


class NgameClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Train on texts with one class each or, multilabel, with any number of labels.

    Parameters
    ----------
    settings : sequence of str
        Settings of the training, ``"KEY=VALUE"`` each, as `ngame train --set` takes them. What is
        not set has the default for the size of the data.
    label_texts : sequence of str, length L, optional
        Texts of the classes, in the order of `classes_`: ngame encodes them. By default the names
        of the classes; of a multilabel y, which has no names, the numbers of its columns.
    n_labels : int, optional
        Labels that `predict` gives a text where y is multilabel. By default as many as a training
        text has on average.
    scorer : str
        "fused", or one of `ngame.Model.scorers`. Of the lexical ones alone a text may get no label,
        for it shares no word with any: of classes it gets the most frequent one.

    Attributes
    ----------
    classes_ : array of shape [L]
        The classes, sorted; the numbers of the columns if y is multilabel.
    multilabel_ : bool
        Whether y was multilabel.
    n_labels_ : int
        Labels that `predict` gives a text.
    model_ : ngame.Model
        Predicts without dense matrices, and is saved by its `save`.
    """

    def __init__(
        self,
        settings: Sequence[str] = (),
        *,
        label_texts: Sequence[str] | None = None,
        n_labels: int | None = None,
        scorer: Scorer = "fused",
    ) -> None:
        self.settings = settings
        self.label_texts = label_texts
        self.n_labels = n_labels
        self.scorer = scorer

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.classifier_tags.multi_label = True
        return tags

    def fit(self, X: Any, y: Any) -> Self:
        """Train.

        Parameters
        ----------
        X : array, list or Series of str, length n
        y : array of shape [n], the class of each text; or indicator matrix of shape [n, L], dense
            or sparse, 1 where a text has a label. Texts without a label are left out.

        Raises
        ------
        TypeError
            X holds something other than strings, or `settings` is one string.
        ValueError
            There are fewer than two texts, X and y differ in length, y is neither classes nor an
            indicator matrix, `label_texts` has another length than `classes_`, or a setting is
            wrong.
        """
        if isinstance(self.settings, str):
            raise TypeError("settings is a str, expected a sequence of them")
        texts = _texts(X, least=2)
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        check_classification_targets(y)
        check_consistent_length(texts, y)
        self.multilabel_ = type_of_target(y) == "multilabel-indicator"
        if self.multilabel_:
            labels = sp.csr_matrix(y)
            self.classes_: npt.NDArray[Any] = np.arange(labels.shape[1])
        else:
            self.classes_, ids = np.unique(column_or_1d(y, warn=True), return_inverse=True)
            ones, offsets = np.ones(len(ids), np.float32), np.arange(len(ids) + 1)
            shape = len(ids), len(self.classes_)
            labels = sp.csr_matrix((ones, ids, offsets), shape=shape)
        label_texts = self.classes_.astype(str) if self.label_texts is None else self.label_texts
        if len(label_texts) != len(self.classes_):
            raise ValueError(
                f"label_texts has {len(label_texts)} entries, y has {len(self.classes_)} "
                + ("columns" if self.multilabel_ else "classes")
            )
        mean = round(labels.sum() / len(texts)) if self.multilabel_ else 1
        given = self.n_labels if self.multilabel_ else None
        self.n_labels_ = max(1, mean) if given is None else as_count(given, "n_labels")
        config = Config.load(sets=self.settings, points=len(texts), labels=labels.shape[1])
        self.model_ = train(Dataset(texts, labels, [str(text) for text in label_texts]), config)
        return self

    def decision_function(self, X: Any) -> npt.NDArray[np.float32]:
        """Scores of every label, float32 [n, L]; of two classes, by how much the second wins, [n].

        The matrix is dense: for many labels, use `model_`. A label that no scorer proposes for a
        text scores 1 less than the lowest that one does.
        """
        check_is_fitted(self)
        found = self._found(X, len(self.classes_))
        rows, _ = pairs_of(found)
        lowest = np.full(found.shape[0], np.inf, np.float32)
        np.minimum.at(lowest, rows, found.data)
        lowest[np.isinf(lowest)] = 0
        scores: npt.NDArray[Any] = np.repeat(lowest[:, np.newaxis] - 1, len(self.classes_), axis=1)
        scores[rows, found.indices] = found.data
        if len(self.classes_) == 2 and not self.multilabel_:
            scores = scores[:, 1] - scores[:, 0]
        return scores

    @available_if(_has_probabilities)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> npt.NDArray[np.float32]:
        """Calibrated probability of every label, float32 [n, L]; of classes, they sum to 1.

        The matrix is dense: for many labels, use `model_`. A label that no scorer proposes for a
        text has 0. Of classes, a text for which no scorer proposes any has their shares of the
        training texts. The method is missing if `scorer` is not "fused", and after a `fit` on so
        few texts that too few were held out for the calibration.
        """
        check_is_fitted(self)
        likely: npt.NDArray[np.float32]
        likely = self._found(X, len(self.classes_), probabilities=True).toarray()
        if not self.multilabel_:
            likely[~likely.any(axis=1)] = np.bincount(self.model_.point_labels.indices)
            likely /= likely.sum(axis=1, keepdims=True)
        return likely

    def predict(self, X: Any) -> npt.NDArray[Any]:
        """The best class of each text, [n]; of a multilabel y, `n_labels_` ones a row, [n, L]."""
        check_is_fitted(self)
        found = self._found(X, min(self.n_labels_, len(self.classes_)))
        if self.multilabel_:
            ones = np.ones(found.nnz, np.int64)
            marks = sp.csr_matrix((ones, found.indices, found.indptr), found.shape)
            predicted: npt.NDArray[Any] = marks.toarray()
        else:
            predicted = self.classes_[found.indices]
        return predicted

    def score(self, X: Any, y: Any) -> float:
        """P@1: the share of texts whose best label is right. Of classes, this is the accuracy.

        Where y is multilabel, labels that are not 0 are right.
        """
        check_is_fitted(self)
        found = self._found(X, 1)
        check_consistent_length(found, y)
        if self.multilabel_:
            if sp.csr_matrix(y).shape != (found.shape[0], len(self.classes_)):
                width = sp.csr_matrix(y).shape[1]
                raise ValueError(f"y has {width} columns, expected {len(self.classes_)}")
            rows = np.flatnonzero(np.diff(found.indptr))  # others have no label that is right
            right = (sp.csr_matrix(y) != 0)[rows, found.indices].sum()
            return float(right / found.shape[0])
        return float((self.classes_[found.indices] == column_or_1d(y)).mean())

    def _found(self, X: Any, k: int, *, probabilities: bool = False) -> sp.csr_matrix:
        found = self.model_.predict(_texts(X), k, scorer=self.scorer, probabilities=probabilities)
        counts = np.diff(found.indptr)
        if self.multilabel_ or counts.all():
            return found
        frequent = np.bincount(self.model_.point_labels.indices).argmax()
        places = found.indptr[:-1][counts == 0]
        data, ids = np.insert(found.data, places, 0), np.insert(found.indices, places, frequent)
        offsets = np.append(0, np.cumsum(np.maximum(counts, 1)))
        return sp.csr_matrix((data, ids, offsets), found.shape)


def _texts(X: Any, least: int = 1) -> list[str]:
    """X as a list, after a check that it holds at least that many strings."""
    if isinstance(X, str):
        raise TypeError("X is a str, expected a sequence of them")
    array = check_array(X, dtype=object, ensure_2d=False, ensure_min_samples=least, input_name="X")
    if array.ndim != 1:
        raise ValueError(f"X has {array.ndim} dimensions, expected one text a row: pass the column")
    for row, text in enumerate(array):
        if not isinstance(text, str):
            raise TypeError(f"X[{row}] is a {type(text).__name__}, expected a str")
    return list(array)

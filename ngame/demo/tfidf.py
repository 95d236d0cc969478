"""The baseline of the demo: TF-IDF similarity of a text to labels and training texts."""

import re
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from ngame.shortlist import keep_topk

_WORD = re.compile(r"\w+")


class TfIdf:
    """TF-IDF of words: sublinear term frequency, smoothed inverse document frequency, unit rows."""

    def __init__(self, texts: Sequence[str]) -> None:
        words = sorted({word for text in texts for word in _WORD.findall(text.lower())})
        self._terms = {word: number for number, word in enumerate(words)}
        self._idf = np.ones(len(words), np.float32)
        frequency = np.bincount(self(texts).indices, minlength=len(words))
        self._idf = (np.log((1 + len(texts)) / (1 + frequency)) + 1).astype(np.float32)

    def __call__(self, texts: Sequence[str]) -> sp.csr_matrix:
        """Texts to rows, float32 [n, terms]. Words outside the vocabulary are ignored."""
        rows: list[int] = []
        columns: list[int] = []
        for row, text in enumerate(texts):
            found = [self._terms.get(word, -1) for word in _WORD.findall(text.lower())]
            columns += [term for term in found if term >= 0]
            rows += [row] * (len(columns) - len(rows))
        x = sp.csr_matrix(
            (np.ones(len(rows), np.float32), (rows, columns)), shape=(len(texts), len(self._terms))
        )
        x.sum_duplicates()
        x.data = (1 + np.log(x.data)) * self._idf[x.indices]
        norms = np.sqrt(np.asarray(x.multiply(x).sum(axis=1)).ravel())
        x.data /= np.repeat(np.maximum(norms, 1e-12), np.diff(x.indptr))
        return x


def predict(
    texts: Sequence[str],
    train_texts: Sequence[str],
    train_labels: sp.csr_matrix,
    label_texts: Sequence[str],
    *,
    k: int,
    neighbours: int = 20,
) -> dict[str, sp.csr_matrix]:
    """Score labels by their text alone, and with votes of the nearest training texts added.

    Returns
    -------
    dict of csr_matrix, float32 [n, L], k entries per row
        ``"TF-IDF"``: cosine of text and label text. ``"TF-IDF + neighbours"``: the same plus the
        similarity-weighted share of the nearest training texts that have the label.
    """
    tfidf = TfIdf([*train_texts, *label_texts])
    queries = tfidf(texts)
    label_scores = sp.csr_matrix(queries @ tfidf(label_texts).T)
    near = keep_topk(sp.csr_matrix(queries @ tfidf(train_texts).T), neighbours)
    total = np.maximum(np.asarray(near.sum(axis=1)).ravel(), 1e-12)
    near.data /= np.repeat(total, np.diff(near.indptr)).astype(np.float32)
    votes = sp.csr_matrix(near @ train_labels)
    return {
        "TF-IDF": keep_topk(label_scores, k),
        "TF-IDF + neighbours": keep_topk(sp.csr_matrix(label_scores + votes), k),
    }

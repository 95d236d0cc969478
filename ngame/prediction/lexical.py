"""TF-IDF scores: cosines of texts with labels, and votes of the training points nearest by them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame.sparse_topk import SparseIndex

_WORD = re.compile(r"\w+")


class Tfidf:
    """TF-IDF of words and pairs of adjacent words: unit rows, sublinear term frequencies.

    A term is known by a hash of 64 bits, so that no texts need be kept.

    Attributes
    ----------
    terms : int64 [terms], hashes, ascending
    idf : float32 [terms], inverse document frequencies, smoothed as if one more text had all terms
    """

    def __init__(self, terms: npt.NDArray[np.int64], idf: npt.NDArray[np.float32]) -> None:
        self.terms, self.idf = terms, idf

    @classmethod
    def fit(cls, texts: Sequence[str]) -> Self:
        """Count the terms of texts."""
        rows, hashes = _terms(texts)
        terms, columns = np.unique(hashes, return_inverse=True)
        ones = np.ones(len(rows), np.float32)
        counts = sp.csr_matrix((ones, (rows, columns)), shape=(len(texts), len(terms)))
        frequency = np.bincount(counts.indices, minlength=len(terms))
        return cls(terms, (np.log((1 + len(texts)) / (1 + frequency)) + 1).astype(np.float32))

    def __call__(self, texts: Sequence[str]) -> sp.csr_matrix:
        """Texts to rows, float32 [n, terms]; terms that `fit` did not see are ignored."""
        rows, hashes = _terms(texts)
        columns = np.searchsorted(self.terms, hashes)
        columns[columns == len(self.terms)] = 0
        known = self.terms[columns] == hashes if len(self.terms) else np.zeros(len(rows), bool)
        rows, columns = rows[known], columns[known]
        ones = np.ones(len(rows), np.float32)
        x = sp.csr_matrix((ones, (rows, columns)), shape=(len(texts), len(self.terms)))
        x.sort_indices()
        x.data = (1 + np.log(x.data)) * self.idf[x.indices]
        sizes = np.diff(x.indptr)
        squares = np.bincount(np.repeat(np.arange(len(texts)), sizes), x.data**2, len(texts))
        x.data /= np.repeat(np.sqrt(squares), sizes).astype(np.float32)
        return x


def _terms(texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Text and hash of each word and each pair of adjacent words."""
    known: dict[str, int] = {}
    words: list[int] = []
    ends = [0]
    for text in texts:
        for word in _WORD.findall(text.lower()):
            if word not in known:
                digest = blake2b(word.encode("utf8", "replace"), digest_size=8).digest()
                known[word] = int.from_bytes(digest, "little", signed=True)
            words.append(known[word])
        ends.append(len(words))
    hashes = np.array(words, np.int64)
    rows = np.repeat(np.arange(len(texts)), np.diff(ends))
    adjacent = rows[1:] == rows[:-1]
    pairs = (hashes[:-1] * np.int64(6364136223846793005) + hashes[1:])[adjacent]
    return np.concatenate([rows, rows[1:][adjacent]]), np.concatenate([hashes, pairs])


@dataclass(eq=False)
class Lexical:
    """TF-IDF rows of labels and of training points, and searches of both.

    Attributes
    ----------
    tfidf : fitted on the texts of the training points and the labels
    labels : float32 csr_matrix [L, terms]
    points : float32 csr_matrix [N, terms]
    """

    tfidf: Tfidf
    labels: sp.csr_matrix
    points: sp.csr_matrix

    @cached_property
    def _label_index(self) -> SparseIndex:
        return SparseIndex(self.labels)

    @cached_property
    def _point_index(self) -> SparseIndex:
        return SparseIndex(self.points)

    @classmethod
    def fit(cls, point_texts: Sequence[str], label_texts: Sequence[str]) -> Self:
        """Weigh the terms of training points and labels."""
        tfidf = Tfidf.fit([*point_texts, *label_texts])
        return cls(tfidf, tfidf(label_texts), tfidf(point_texts))

    def take(self, points: npt.NDArray[np.integer]) -> "Lexical":
        """The same with some of the points."""
        return Lexical(self.tfidf, self.labels, self.points[points])

    def search_labels(
        self, queries: sp.csr_matrix, k: int, *, drop: Any = None, threads: int = 0
    ) -> sp.csr_matrix:
        """Cosines of the k nearest labels of rows of `tfidf`; labels that share no term have none.

        Returns
        -------
        float32 csr_matrix [n, L]
        """
        return self._label_index.search(queries, k, drop=drop, threads=threads)

    def cosines(
        self, queries: sp.csr_matrix, pairs: sp.csr_matrix, *, threads: int = 0
    ) -> npt.NDArray[np.float32]:
        """Cosine of each stored (query, label) pair of a matrix [n, L], float32 [pairs]."""
        return self._label_index.pair_scores(queries, pairs, threads=threads)

    def voters(self, queries: sp.csr_matrix, k: int, *, threads: int = 0) -> sp.csr_matrix:
        """The k nearest points, each with its share of the squared cosines.

        Returns
        -------
        float32 csr_matrix [n, N]
        """
        near = self._point_index.search(queries, k, threads=threads)
        near.data **= 2
        sizes = np.diff(near.indptr)
        total = np.bincount(np.repeat(np.arange(len(sizes)), sizes), near.data, len(sizes))
        near.data /= np.repeat(total, sizes).astype(np.float32)
        return near

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What `from_arrays` makes the same from."""
        found: dict[str, npt.NDArray[Any]] = {"terms": self.tfidf.terms, "idf": self.tfidf.idf}
        for name, rows in (("labels", self.labels), ("points", self.points)):
            found[f"{name}.indptr"] = rows.indptr.astype(np.int64)
            found[f"{name}.indices"] = rows.indices.astype(np.int32)
            found[f"{name}.data"] = rows.data
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Make it of what `arrays` gave."""
        terms = arrays["terms"]
        matrices = [
            sp.csr_matrix(
                tuple(arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr")),
                shape=(len(arrays[f"{name}.indptr"]) - 1, len(terms)),
            )
            for name in ("labels", "points")
        ]
        return cls(Tfidf(terms, arrays["idf"]), *matrices)

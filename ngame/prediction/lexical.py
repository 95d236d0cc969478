"""TF-IDF scores: cosines with labels, votes of the training points near by, linear classifiers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame.linear import linear_classifiers
from ngame.progress import Progress
from ngame.shortlist import drop_pairs, keep_topk
from ngame.sparse_topk import SparseIndex

_WORD = re.compile(r"\w+")

# Labels that a point's classifiers tell it from.
_NEGATIVES = 100
_POINTS_PER_CHUNK = 4096
# The rows that each scorer searches.
_SEARCHED = {"tfidf": "labels", "tfidf_title": "titles", "tfidf_classifier": "weights"}


def titles_apart(titles: Sequence[str] | None, texts: Sequence[str]) -> bool:
    """Whether titles say something else than texts: half of these, at least, are longer."""
    if titles is None:
        return False
    return 2 * sum(title == text for title, text in zip(titles, texts, strict=True)) <= len(texts)


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
    def fit(cls, texts: Sequence[str]) -> tuple[Self, sp.csr_matrix]:
        """Count the terms of texts. Their rows come with it, as of a call."""
        rows, hashes = _terms(texts)
        terms, columns = np.unique(hashes, return_inverse=True)
        counts = _counts(rows, columns, (len(texts), len(terms)))
        frequency = np.bincount(counts.indices, minlength=len(terms))
        idf = np.log((1 + len(texts)) / (1 + frequency)) + 1
        tfidf = cls(terms, idf.astype(np.float32))
        return tfidf, tfidf._weigh(counts)

    def __call__(self, texts: Sequence[str]) -> sp.csr_matrix:
        """Texts to rows, float32 [n, terms]; terms that `fit` did not see are ignored."""
        rows, hashes = _terms(texts)
        columns = np.searchsorted(self.terms, hashes)
        columns[columns == len(self.terms)] = 0
        known = self.terms[columns] == hashes if len(self.terms) else np.zeros(len(rows), bool)
        return self._weigh(_counts(rows[known], columns[known], (len(texts), len(self.terms))))

    def _weigh(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        counts.data = (1 + np.log(counts.data)) * self.idf[counts.indices]
        _make_unit(counts)
        return counts


def _counts(
    rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], shape: tuple[int, int]
) -> sp.csr_matrix:
    """How often each pair comes: float32 of this shape, indices sorted."""
    counts = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)
    counts.sort_indices()
    return counts


def _make_unit(x: sp.csr_matrix) -> None:
    """Divide each row by its norm."""
    sizes = np.diff(x.indptr)
    squares = np.bincount(np.repeat(np.arange(len(sizes)), sizes), x.data**2, len(sizes))
    x.data /= np.repeat(np.sqrt(squares), sizes).astype(np.float32)


class _Hashes(dict[str, int]):
    """Hashes of words, each made when it is asked for first."""

    def __missing__(self, word: str) -> int:
        digest = blake2b(word.encode("utf8", "replace"), digest_size=8).digest()
        self[word] = found = int.from_bytes(digest, "little", signed=True)
        return found


def _terms(texts: Sequence[str]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Text and hash of each word and each pair of adjacent words."""
    hash_of = _Hashes().__getitem__
    words: list[int] = []
    ends = [0]
    for text in texts:
        words.extend(map(hash_of, _WORD.findall(text.lower())))
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
    titles : float32 csr_matrix [L, terms], titles of labels; None where these are the whole texts
    weights : float32 csr_matrix [L, terms], linear classifiers; None without them
    """

    tfidf: Tfidf
    labels: sp.csr_matrix
    points: sp.csr_matrix
    titles: sp.csr_matrix | None = None
    weights: sp.csr_matrix | None = None
    _indexes: dict[str, SparseIndex] = field(default_factory=dict, init=False, repr=False)

    def index(self, scorer: str) -> SparseIndex:
        """Searches the labels as a scorer does. Labels that share no term with a text have none."""
        if scorer not in self._indexes:
            self._indexes[scorer] = SparseIndex(getattr(self, _SEARCHED[scorer]))
        return self._indexes[scorer]

    @cached_property
    def _point_index(self) -> SparseIndex:
        return SparseIndex(self.points)

    @classmethod
    def fit(
        cls,
        point_texts: Sequence[str],
        label_texts: Sequence[str],
        label_titles: Sequence[str] | None = None,
    ) -> Self:
        """Weigh the terms of training points and labels."""
        tfidf, rows = Tfidf.fit([*point_texts, *label_texts])
        points, labels = rows[: len(point_texts)], rows[len(point_texts) :]
        return cls(tfidf, labels, points, None if label_titles is None else tfidf(label_titles))

    def shortlists(
        self,
        votes: Sequence[sp.csr_matrix],
        known: sp.csr_matrix,
        neighbours: int,
        *,
        threads: int = 0,
    ) -> list[sp.csr_matrix]:
        """For each training point the labels that its classifiers are to tell it from.

        They are those that most of its nearest points have and that it lacks, a hundred at most.

        Parameters
        ----------
        votes : csr_matrix [N, L], each for a shortlist: the labels that points vote for
        known : csr_matrix [N, L], labels that are left out
        neighbours : nearest points that are asked

        Returns
        -------
        list of float32 csr_matrix [N, L]
        """
        parts: list[list[sp.csr_matrix]] = [[] for _ in votes]
        count = self.points.shape[0]
        starts = range(0, count, _POINTS_PER_CHUNK)
        for start in Progress("shortlist", len(starts), "chunk").over(starts):
            rows = np.arange(start, min(count, start + _POINTS_PER_CHUNK))
            itself = np.stack([rows - start, rows], axis=1)
            near = self.voters(self.points[rows], neighbours, drop=itself, threads=threads)
            for labels, part in zip(votes, parts, strict=True):
                found = sp.csr_matrix(near @ labels, dtype=np.float32)
                found.sort_indices()
                found = drop_pairs(found, known[rows], threads=threads)
                part.append(keep_topk(found, _NEGATIVES, threads=threads))
        return [sp.vstack(part, format="csr") for part in parts]

    def take(self, points: npt.NDArray[np.integer]) -> "Lexical":
        """The same with some of the points."""
        return replace(self, points=self.points[points])

    def with_labels(self, texts: Sequence[str], titles: Sequence[str]) -> "Lexical":
        """The same with more labels, of which no linear classifier knows anything."""
        rows = sp.vstack([self.labels, self.tfidf(texts)], format="csr")
        titled, weights = self.titles, self.weights
        if titled is not None:
            titled = sp.vstack([titled, self.tfidf(titles)], format="csr")
        if weights is not None:
            none = sp.csr_matrix((len(texts), weights.shape[1]), dtype=weights.dtype)
            weights = sp.vstack([weights, none], format="csr")
        return replace(self, labels=rows, titles=titled, weights=weights)

    def classified(
        self, labels: sp.csr_matrix, shortlist: sp.csr_matrix, *, seed: int = 0, threads: int = 0
    ) -> "Lexical":
        """The same with linear classifiers, trained on the points.

        Terms of one point alone are left out: they tell a classifier that point, and no other.

        Parameters
        ----------
        labels : csr_matrix [N, L], the labels of the points
        shortlist : csr_matrix [N, L], one of `shortlists`
        """
        x = self.points.copy()
        x.data[np.bincount(x.indices, minlength=x.shape[1])[x.indices] < 2] = 0
        x.eliminate_zeros()
        _make_unit(x)
        weights = linear_classifiers(x, labels, negatives=shortlist, seed=seed, threads=threads)
        return replace(self, weights=weights)

    def voters(
        self, queries: sp.csr_matrix, k: int, *, drop: Any = None, threads: int = 0
    ) -> sp.csr_matrix:
        """The k nearest points, each with its share of the squared cosines.

        Returns
        -------
        float32 csr_matrix [n, N]
        """
        near = self._point_index.search(queries, k, drop=drop, threads=threads)
        near.data **= 2
        sizes = np.diff(near.indptr)
        total = np.bincount(np.repeat(np.arange(len(sizes)), sizes), near.data, len(sizes))
        near.data /= np.repeat(total, sizes).astype(np.float32)
        return near

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What `from_arrays` makes the same from."""
        found: dict[str, npt.NDArray[Any]] = {"terms": self.tfidf.terms, "idf": self.tfidf.idf}
        for name, rows in self._matrices().items():
            found[f"{name}.indptr"] = rows.indptr.astype(np.int64)
            found[f"{name}.indices"] = rows.indices.astype(np.int32)
            found[f"{name}.data"] = rows.data
        return found

    def _matrices(self) -> dict[str, sp.csr_matrix]:
        found = {"labels": self.labels, "points": self.points}
        optional = {"titles": self.titles, "weights": self.weights}
        return found | {name: rows for name, rows in optional.items() if rows is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Make it of what `arrays` gave."""
        terms = arrays["terms"]
        matrices = {
            name: sp.csr_matrix(
                tuple(arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr")),
                shape=(len(arrays[f"{name}.indptr"]) - 1, len(terms)),
            )
            for name in ("labels", "points", "titles", "weights")
            if f"{name}.data" in arrays
        }
        for matrix in matrices.values():
            matrix.check_format()  # ids within their bounds
        return cls(Tfidf(terms, arrays["idf"]), **matrices)

"""A trained model predicts labels by each of its scorers, or by all of them fused."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import safetensors.torch
import scipy.sparse as sp
import torch

from ngame import metrics
from ngame.arrays import Pairs, as_count, as_pairs, as_texts, pairs_of, values_at
from ngame.config import Config, PredictionConfig, ScorerName
from ngame.encoders.base import Encoder, as_encoder
from ngame.encoders.encode import encode
from ngame.encoders.load import load_encoder
from ngame.encoders.vectors import (
    Vectors,
    core_device,
    pair_products,
    to_device,
    to_numpy,
    torch_device,
)
from ngame.files import (
    atomic_files,
    atomic_write,
    read_json,
    reading,
    write_json,
    write_tensors,
)
from ngame.prediction import fusion
from ngame.prediction.co_occurrence import label_shares, log_spread, spread
from ngame.prediction.fusion import Features, Fusion
from ngame.prediction.hnsw import HnswIndex
from ngame.prediction.lexical import Lexical
from ngame.progress import Progress
from ngame.shortlist import drop_pairs, keep_topk, merge
from ngame.topk import ExactIndex, ranked_csr, topk_arrays

Scorer = Literal[ScorerName, "fused"]
Scores = dict[Scorer, sp.csr_matrix]

_QUERIES_PER_CHUNK = 4096
_PARTS_SHOWN, _POINTS_SHOWN = 4, 3
# What `Model.save` writes. The last one says that all others are there.
_FILES = (
    "encoder",
    "labels.jsonl",
    "vectors.safetensors",
    "classifier.safetensors",
    "lexical.safetensors",
    "index",
    "metrics.json",
    "fusion.json",
)
# Scorers by votes of training points, and what is added to a label's share of the votes before the
# logarithm is taken: about the share of one of the farther voters.
VOTERS = {"neighbours": 1e-3, "tfidf_neighbours": 1e-2}
# Scorers that know the training points too well to serve them.
REMEMBERING = frozenset[str]({*VOTERS, "tfidf_classifier", "co_occurrence"})
# Scorers that know words alone.
LEXICAL = frozenset[str]({"tfidf", "tfidf_title", "tfidf_neighbours", "tfidf_classifier"})
# Scorers that are made of all others.
_OF_OTHERS = frozenset[str]({"co_occurrence", "fused"})

_PairScores = Callable[[sp.csr_matrix], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Explanation:
    """What brought one label of a text up; printed, the largest parts and the nearest points.

    Attributes
    ----------
    label, text : id and text of the label
    score : of all scorers fused, as `Model.predict` gives it
    parts : what each scorer adds to the score, less what it adds to the text's candidates on
        average; "constant" is what stands for the scorers that labels of `Model.with_labels` lack.
        The sum is what lifts the label above the average candidate.
    points : by each scorer that lets training points vote, the nearest ones that have the label:
        (row of the training set, share of all votes), the largest share first
    """

    label: int
    text: str
    score: float
    parts: dict[str, float]
    points: dict[str, list[tuple[int, float]]]

    def __str__(self) -> str:
        largest = sorted(self.parts.items(), key=lambda part: -abs(part[1]))[:_PARTS_SHOWN]
        lines = [
            f"{self.text}  {self.score:.3f}",
            "  " + ", ".join(f"{name} {value:+.2f}" for name, value in largest),
        ]
        for name, points in self.points.items():
            if points:
                rows = ", ".join(str(row) for row, _ in points[:_POINTS_SHOWN])
                more = ", ..." if len(points) > _POINTS_SHOWN else ""
                lines.append(f"  {name}: training rows {rows}{more}")
        return "\n".join(lines)


@dataclass(eq=False, repr=False)
class Model:
    """Everything that prediction needs: made by `ngame.train`, or read from a run with `load`.

    The vectors are arrays on the host, or tensors on a GPU that the GPU core supports. Predictions
    are always on the host. On the host the first search of each scorer prepares an index of its
    vectors: to change vectors afterwards, assign a new array of the same shape. `with_labels` gives
    a model of more labels.

    Attributes
    ----------
    encoder : an `Encoder`
    label_texts : list of str, length L
    label_vectors : float32 [L, dim], unit length
    point_vectors : float16 [N, dim], unit length; the training points that have a label
    point_labels : csr_matrix [N, L], their labels
    point_rows : int64 [N], their rows in the training set
    classifier : float32 [L, dim], unit length; None without a classifier stage
    fusions : "all" fuses all scorers, "trained" those that serve training points, and "base", if
        co-occurrence is among all, those whose probabilities it spreads: all others
    config : scorers, number of labels to keep, votes of the neighbours, kind of search
    threads : threads of searches; 0 means the CPUs this process may use
    metrics : of each scorer on the data set's test points; empty if it has none
    lexical : TF-IDF of labels and training points; None if no scorer needs it
    new_labels : number of labels, the last ones, that came after training: see `with_labels`
    run_config : all settings of the run that made it; None if they are not known
    """

    encoder: Encoder
    label_texts: list[str]
    label_vectors: Vectors
    point_vectors: Vectors
    point_labels: sp.csr_matrix
    point_rows: npt.NDArray[np.int64]
    classifier: Vectors | None
    fusions: dict[str, Fusion]
    config: PredictionConfig
    threads: int = 0
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    lexical: Lexical | None = None
    new_labels: int = 0
    run_config: Config | None = None
    _indexes: dict[Scorer, tuple[Vectors, ExactIndex | HnswIndex]] = field(
        default_factory=dict, init=False, repr=False
    )
    _shares: tuple[sp.csr_matrix, sp.csr_matrix] | None = field(
        default=None, init=False, repr=False
    )

    def __repr__(self) -> str:
        points, dim = self.point_vectors.shape
        return (
            f"<Model: {len(self.label_texts)} labels, {points} training points, "
            f"{type(self.encoder).__name__} of width {dim}, scorers {', '.join(self.scorers)}>"
        )

    @property
    def scorers(self) -> tuple[Scorer, ...]:
        """Names of the model's scorers."""
        return (*self._on(seen=False), "fused")

    def _on(self, seen: bool) -> list[ScorerName]:
        """The scorers that are on and that the model has, of those that serve such points."""
        missing = set(REMEMBERING) if seen else set()
        if self.classifier is None:
            missing.add("classifier")
        if "base" not in self.fusions:
            missing.add("co_occurrence")
        if self.lexical is None:
            missing |= LEXICAL
        else:
            if self.lexical.titles is None:
                missing.add("tfidf_title")
            if self.lexical.weights is None:
                missing.add("tfidf_classifier")
        return [name for name in self.config.scorers if name not in missing]

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors of texts, float32 [n, dim], on the device of the model's vectors."""
        texts = as_texts(texts, "texts")
        ours = self.label_vectors
        device = ours.device if isinstance(ours, torch.Tensor) else None
        return encode(self.encoder, self.encoder.tokenize(texts), device=device, unit=True)

    def predict(
        self,
        texts: Sequence[str],
        k: int | None = None,
        *,
        scorer: Scorer = "fused",
        drop: Pairs | None = None,
        seen: bool = False,
        probabilities: bool = False,
        threshold: float | None = None,
    ) -> sp.csr_matrix:
        """Find the best labels of every text.

        Parameters
        ----------
        texts : sequence of str, length n
        k : labels per text; by default the number in the config. A smaller k gives the first of
            the same labels, one above L gives all.
        scorer : "fused", or one of `scorers`
        drop : CSR matrix of shape [n, L] or integer array of shape [p, 2], optional
            (text, label) pairs to leave out.
        seen : set it if the texts are training points. Neighbours then do not vote, because each
            text would find itself among them, and linear classifiers, which know it by heart, do
            not score.
        probabilities : give the fused scores as probabilities that a label is relevant, calibrated
            on held-out points. The ranking stays the same, but for ties near 1.
        threshold : with `probabilities`, keep only labels with at least this one

        Returns
        -------
        float32 csr_matrix of shape [n, L]
            k entries per row, or fewer if fewer labels are candidates: those that any scorer has
            among its best `config.k`.

        Raises
        ------
        TypeError
            `texts` is a single string, or holds something other than strings.
        ValueError
            The model has no such scorer, or k is below 1; or probabilities are asked of a single
            scorer, or of a model that is not calibrated; or a text holds a lone surrogate; or
            `threshold` is given without `probabilities`, or is not between 0 and 1.
        """
        if threshold is not None:
            if not probabilities:
                raise ValueError("threshold is a probability: it needs probabilities=True")
            if not 0 <= threshold <= 1:
                raise ValueError(f"threshold is {threshold}, expected a probability, from 0 to 1")
        if probabilities and scorer != "fused":
            raise ValueError(f"probabilities are of fused scores, scorer is {scorer!r}")
        found = self.scores(
            texts, k, scorers=[scorer], drop=drop, seen=seen, probabilities=probabilities
        )[scorer]
        if threshold is None:
            return found
        likely = found.data >= threshold
        offsets = np.append(0, np.cumsum(likely))[found.indptr]
        return sp.csr_matrix((found.data[likely], found.indices[likely], offsets), found.shape)

    def scores(
        self,
        texts: Sequence[str],
        k: int | None = None,
        *,
        scorers: Sequence[Scorer] | None = None,
        vectors: Vectors | None = None,
        drop: Pairs | None = None,
        seen: bool = False,
        probabilities: bool = False,
    ) -> Scores:
        """Predict with every scorer at once, or with those named.

        `vectors` are what `encode` gives for the texts, if that is known already. The other
        arguments are those of `predict`.
        """
        labels = len(self.label_texts)
        k = min(self.config.k if k is None else as_count(k, "k"), labels)
        texts = as_texts(texts, "texts")
        if not self._on(seen):
            raise ValueError("no scorer is on that serves training points")
        known: Sequence[Scorer] = (*self._on(seen), "fused")
        names = known if scorers is None else scorers
        for name in names:
            if name not in known:
                raise ValueError(f"scorer is {name!r}, expected one of {', '.join(known)}")
        if vectors is None:
            by_words = LEXICAL.issuperset(names)
            vectors = np.empty((len(texts), 0), np.float32) if by_words else self.encode(texts)
        fusion = self.fusions["trained" if seen else "all"]
        parts: dict[Scorer, list[sp.csr_matrix]] = {name: [] for name in names}
        chunks = _chunks(len(vectors), drop, labels)
        total = -(-len(vectors) // _QUERIES_PER_CHUNK)
        for rows, dropped in Progress("predicting", total, "chunk").over(chunks):
            if _OF_OTHERS.isdisjoint(names):
                found, _ = self._found(names, texts[rows], vectors[rows], dropped, k)
            else:
                fused, features, found = self.candidates(
                    texts[rows], vectors[rows], drop=dropped, seen=seen, at_least=k
                )
                fused.data = fusion(features, self._is_new(fused.indices))
                found["fused"] = fused
            best = {name: keep_topk(found[name], k, threads=self.threads) for name in names}
            if probabilities and "fused" in best:
                fused.data = fusion.probabilities(fused.data, pairs_of(fused)[0])
                best["fused"].data = values_at(fused, best["fused"])
            for name, matrix in best.items():
                parts[name].append(matrix)
        empty = sp.csr_matrix((0, labels), dtype=np.float32)
        return {
            name: sp.vstack(part, format="csr") if len(part) > 1 else [*part, empty][0]
            for name, part in parts.items()
        }

    def explain(self, text: str, k: int = 5) -> list[Explanation]:
        """Say what brought the best labels of a text up: which scorer, which training points.

        Parameters
        ----------
        text : str
        k : number of labels; above L, all of them

        Returns
        -------
        list of Explanation, best first
            The labels and scores of ``predict([text], k)``.

        Raises
        ------
        TypeError
            `text` is not a str.
        ValueError
            k is below 1, or the text holds a lone surrogate.
        """
        if not isinstance(text, str):
            raise TypeError(f"text is a {type(text).__name__}, expected a str")
        k = min(as_count(k, "k"), len(self.label_texts))
        vectors = self.encode([text])
        candidates, features, _ = self.candidates([text], vectors, at_least=k)
        fusion = self.fusions["all"]
        new = self._is_new(candidates.indices)
        scores = fusion(features, new)
        parts: dict[str, npt.NDArray[np.float32]] = {}
        for name, values in fusion.parts(features, new):
            scorer = name.removeprefix("log ")
            parts[scorer] = parts.get(scorer, np.float32(0)) + (values - values.mean())
        terms = None if self.lexical is None else self.lexical.tfidf([text])
        voters = {
            name: self._voters(name, vectors, terms)
            for name in self._on(seen=False)
            if name in VOTERS
        }
        found = []
        for place in np.lexsort((candidates.indices, -scores))[:k]:
            label = int(candidates.indices[place])
            points: dict[str, list[tuple[int, float]]] = {}
            for name, near in voters.items():
                has = self.point_labels[near.indices, label].toarray().ravel() > 0
                ids, shares = self.point_rows[near.indices[has]], near.data[has]
                order = np.argsort(-shares, kind="stable")
                points[name] = list(zip(ids[order].tolist(), shares[order].tolist(), strict=True))
            found.append(
                Explanation(
                    label=label,
                    text=self.label_texts[label],
                    score=float(scores[place]),
                    parts={name: float(values[place]) for name, values in parts.items()},
                    points=points,
                )
            )
        return found

    def evaluate(
        self,
        predictions: Mapping[Scorer, sp.csr_matrix] | Mapping[str, sp.csr_matrix],
        truth: sp.csr_matrix,
        *,
        ks: Sequence[int] = (1, 3, 5, 10, 100),
        drop: Pairs | None = None,
    ) -> dict[str, dict[str, float]]:
        """All metrics at `ks` of each scorer, with propensities of the training points.

        Parameters
        ----------
        predictions : float32 csr_matrix [n, L] by name, as `scores` gives
        truth : csr_matrix [n, L]; nonzero entries are positives
        ks, drop : as in `ngame.metrics.evaluate`

        One warning counts the rows without a label, which count as wrong. Where fewer than three
        training points have a label, another says that PSP and PSN are left out.

        Returns
        -------
        dict of dict
            By name, then by metric, as `ngame.metrics.evaluate` names them: fractions.

        Raises
        ------
        TypeError, ValueError, IndexError
            `predictions` is no mapping; or as `ngame.metrics.evaluate`.
        """
        if not isinstance(predictions, Mapping):
            raise TypeError(
                f"predictions is a {type(predictions).__name__}, expected a mapping of names to "
                "predictions, as `scores` gives; ngame.metrics.evaluate takes one"
            )
        return metrics.evaluate_each(
            predictions, truth, self.point_labels, ks=ks, drop=drop, threads=self.threads
        )

    def candidates(
        self,
        texts: Sequence[str],
        vectors: Vectors,
        *,
        drop: Pairs | None = None,
        seen: bool = False,
        at_least: int = 0,
    ) -> tuple[sp.csr_matrix, Features, Scores]:
        """The (text, label) pairs to fuse, their scores, and the best labels by each scorer.

        The pairs are those that any scorer has among its best `config.k` labels: they do not
        depend on how many labels are asked for.

        Parameters
        ----------
        texts : length n
        vectors : what `encode` gives for them
        drop, seen : as in `predict`
        at_least : labels by each scorer, if more than `config.k` are wanted

        Returns
        -------
        candidates : csr_matrix [n, L]; its values mean nothing
        features : of the candidates by every scorer, float32 [candidates]; of votes also the
            logarithm, such as "log neighbours", and of co-occurrence that alone
        found : by each scorer but the fused one, its best labels
        """
        threads = self.threads
        on = [name for name in self._on(seen) if name != "co_occurrence"]
        found, of_pairs = self._found(on, texts, vectors, drop, at_least)
        depth = min(self.config.k, len(self.label_texts))
        most = max(depth, at_least)
        proposed = list(found.values())
        if most > depth:
            proposed = [keep_topk(matrix, depth, threads=threads) for matrix in proposed]
        pattern = merge(proposed, threads=threads)
        features: dict[str, npt.NDArray[np.float32]] = {}
        for scorer in on:
            features[scorer] = of_pairs[scorer](pattern)
            if scorer in VOTERS:
                features[f"log {scorer}"] = np.log(features[scorer] + np.float32(VOTERS[scorer]))
        if "co_occurrence" in self._on(seen):
            features, spreads = self.with_co_occurrence(pattern, features)
            found["co_occurrence"] = keep_topk(spreads, most, threads=threads)
        return pattern, features, found

    def _found(
        self,
        scorers: Sequence[Scorer],
        texts: Sequence[str],
        vectors: Vectors,
        drop: Pairs | None,
        at_least: int,
    ) -> tuple[Scores, dict[str, _PairScores]]:
        """The best labels by each scorer alone, and what gives its scores of any pairs.

        At least `config.k` labels, so that what an approximate index finds is not another thing
        where fewer are asked for.
        """
        labels, threads = len(self.label_texts), self.threads
        most = max(min(self.config.k, labels), at_least)
        drop = _drop_matrix(drop, len(vectors), labels)
        terms = None
        if self.lexical is not None and not LEXICAL.isdisjoint(scorers):
            terms = self.lexical.tfidf(texts)
        found: Scores = {}
        of_pairs: dict[str, _PairScores] = {}
        for name in scorers:
            if name in VOTERS:
                votes = sp.csr_matrix(
                    self._voters(name, vectors, terms) @ self.point_labels, dtype=np.float32
                )
                votes.sort_indices()
                if drop is not None:
                    votes = drop_pairs(votes, drop, threads=threads)
                found[name] = keep_topk(votes, most, threads=threads)
                of_pairs[name] = partial(values_at, votes)
            elif name in LEXICAL:
                index = cast(Lexical, self.lexical).index(name)
                found[name] = index.search(terms, most, drop=drop, threads=threads)
                of_pairs[name] = partial(index.pair_scores, terms, threads=threads)
            else:
                found[name] = ranked_csr(*self._search(name, vectors, most, drop), labels)
                of_pairs[name] = partial(self._pair_scores, name, vectors)
        return found, of_pairs

    def with_co_occurrence(
        self, candidates: sp.csr_matrix, features: Features
    ) -> tuple[dict[str, npt.NDArray[np.float32]], sp.csr_matrix]:
        """Add what the labels that all other scorers find probable say of each candidate.

        Parameters
        ----------
        candidates, features : as `candidates` gives them, of all other scorers

        Returns
        -------
        features : with "log co_occurrence"
        spreads : float32 csr_matrix [n, L], what it is the logarithm of
        """
        if self._shares is None or self._shares[0] is not self.point_labels:
            self._shares = self.point_labels, label_shares(self.point_labels, threads=self.threads)
        base = self.fusions["base"]
        fused = base(features, self._is_new(candidates.indices))
        likely = _with_data(candidates, base.probabilities(fused, pairs_of(candidates)[0]))
        spreads = spread(likely, self._shares[1], threads=self.threads)
        values = values_at(spreads, candidates)
        more = {**features, "log co_occurrence": log_spread(values)}
        return more, _with_data(candidates, values)

    def _is_new(self, labels: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
        """Which of the labels training has not seen."""
        return labels >= len(self.label_texts) - self.new_labels

    def _voters(self, name: Scorer, vectors: Vectors, terms: sp.csr_matrix | None) -> sp.csr_matrix:
        """The nearest training points by a scorer, with the shares of their votes [n, N]."""
        k = min(self.config.neighbours, len(self.point_vectors))
        if name == "tfidf_neighbours":
            return cast(Lexical, self.lexical).voters(terms, k, threads=self.threads)
        # A softmax of the similarities.
        scores, ids = self._search(name, vectors, k)
        weights = np.exp((scores - scores[:, :1]) / self.config.vote_temperature)
        weights /= weights.sum(axis=1, keepdims=True)
        return ranked_csr(weights, ids, len(self.point_vectors))

    @property
    def _items(self) -> dict[Scorer, Vectors]:
        """The vectors that each scorer searches."""
        items: dict[Scorer, Vectors] = {"encoder": self.label_vectors}
        if self.classifier is not None:
            items["classifier"] = self.classifier
        return {**items, "neighbours": self.point_vectors}

    def _search(
        self,
        name: Scorer,
        queries: Vectors,
        k: int,
        drop: sp.csr_matrix | None = None,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Scores and ids of the scorer's k nearest items, on the host."""
        items, threads = self._items[name], self.threads
        if self.config.search == "exact" and isinstance(items, torch.Tensor):
            found = topk_arrays(queries, items, k, metric="dot", drop=drop, threads=threads)
            return to_numpy(found[0]), to_numpy(found[1])
        return self._index(name).search(to_numpy(queries), k, drop=drop, threads=threads)

    def _pair_scores(
        self, name: Scorer, queries: Vectors, pairs: sp.csr_matrix
    ) -> npt.NDArray[np.float32]:
        """Scores of the stored entries by the scorer's vectors, on the host."""
        items = self._items[name]
        if isinstance(items, torch.Tensor) or self.config.search == "hnsw":
            return pair_products(queries, items, *pairs_of(pairs))
        index = cast(ExactIndex, self._index(name))
        return index.pair_scores(to_numpy(queries), pairs, threads=self.threads)

    def _index(self, name: Scorer) -> ExactIndex | HnswIndex:
        """The index of a scorer's items on the host, built when first used."""
        items = self._items[name]
        approximate = self.config.search == "hnsw"
        indexed, index = self._indexes.get(name, (None, None))
        if index is None or indexed is not items or approximate != isinstance(index, HnswIndex):
            vectors = to_numpy(items)
            index = (
                HnswIndex(vectors, threads=self.threads)
                if approximate
                else ExactIndex(vectors, "dot", threads=self.threads)
            )
            self._indexes[name] = items, index
        return index

    def with_labels(self, texts: Sequence[str], *, titles: Sequence[str] | None = None) -> "Model":
        """The same model with more labels, which follow its own; nothing is trained.

        A new label is known by its text: the text's vector is also its classifier vector, and its
        words are compared. What training points would add to its fused score is estimated from
        these (bench/results/new_labels.md). The other scorers, which know labels by training
        points, never find it. This model stays as it is; `metrics` of the new one are empty. Save
        it to a folder of its own: resuming the run would train it without the new labels.

        Parameters
        ----------
        texts : sequence of str
            Texts of the new labels, such as those of `label_texts`; white space around them is
            left out.
        titles : sequence of str, optional
            Their titles, where the model compares titles alone too; by default the texts.

        Raises
        ------
        TypeError
            `texts` or `titles` is a single string, or holds something other than strings.
        ValueError
            There is not a title for each text, or a text is empty, or a label already, or is there
            twice.
        """
        texts = [text.strip() for text in as_texts(texts, "texts")]
        titles = texts if titles is None else as_texts(titles, "titles")
        if len(titles) != len(texts):
            raise ValueError(f"titles has {len(titles)} entries, texts has {len(texts)}")
        known = {*self.label_texts}
        for text in texts:
            if not text:
                raise ValueError("texts has an empty text, expected the text of a label")
            if text in known:
                raise ValueError(f"texts has {text!r}, which is a label already")
            known.add(text)
        vectors = self.encode(texts)
        points, labels = self.point_labels.shape
        pattern = self.point_labels.data, self.point_labels.indices, self.point_labels.indptr
        return replace(
            self,
            label_texts=[*self.label_texts, *texts],
            label_vectors=_appended(self.label_vectors, vectors),
            point_labels=sp.csr_matrix(pattern, shape=(points, labels + len(texts))),
            classifier=None if self.classifier is None else _appended(self.classifier, vectors),
            lexical=None if self.lexical is None else self.lexical.with_labels(texts, titles),
            new_labels=self.new_labels + len(texts),
            metrics={},
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files that `load` reads.

        A ``config.toml`` that is already in the folder, as in a run's, is kept. All is written
        aside and then renamed: a model that is already there stays until the new one is whole.

        Raises
        ------
        OSError
            A file cannot be written; the message names it and says why.
        """
        folder = Path(folder)
        if not (folder / "config.toml").exists():
            run = self.run_config or Config()
            own = replace(run, threads=self.threads, prediction=self.config)
            own.save(folder / "config.toml")
        with atomic_files(folder, _FILES) as aside:
            (aside / "encoder").mkdir()
            self.encoder.save(aside / "encoder")
            self._save_label_texts(aside)
            vectors = {
                "labels": self.label_vectors,
                "points": self.point_vectors,
                "point_labels.indptr": self.point_labels.indptr.astype(np.int64),
                "point_labels.indices": self.point_labels.indices.astype(np.int32),
                "point_rows": self.point_rows,
            }
            tensors = {name: torch.as_tensor(array) for name, array in vectors.items()}
            write_tensors(aside / "vectors.safetensors", tensors)
            if self.classifier is not None:
                weight = torch.as_tensor(self.classifier)
                write_tensors(aside / "classifier.safetensors", {"weight": weight})
            if self.lexical is not None:
                arrays = self.lexical.arrays()
                tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
                write_tensors(aside / "lexical.safetensors", tensors)
            if self.config.search == "hnsw":
                (aside / "index").mkdir()
                for name in self._items:
                    self._index(name).save(aside / "index" / f"{name}.hnsw")
            if self.metrics:
                write_json(aside / "metrics.json", self.metrics)
            fusion.save(self.fusions, aside / "fusion.json")

    def _save_label_texts(self, folder: Path) -> None:
        with atomic_write(folder / "labels.jsonl") as aside:
            new = self._is_new(np.arange(len(self.label_texts))).tolist()
            lines = (
                json.dumps({"title": text} | ({"new": True} if is_new else {}), ensure_ascii=False)
                for text, is_new in zip(self.label_texts, new, strict=True)
            )
            aside.write_text("".join(line + "\n" for line in lines), encoding="utf8")

    def export(self, folder: str | os.PathLike[str]) -> None:
        """Write the labels' vectors as NumPy files, for an index of your own.

        ``labels.npy`` holds the embeddings and ``classifier.npy``, if there is a classifier, its
        vectors: float32 [L, dim], unit length, compared with what `encode` returns by dot product.
        A row's text is in the same line of ``labels.jsonl``. The folder is made if it is not there.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_label_texts(folder)
        for name, vectors in (("labels", self.label_vectors), ("classifier", self.classifier)):
            path = folder / f"{name}.npy"
            if vectors is None:
                path.unlink(missing_ok=True)  # of a model exported here before
                continue
            with atomic_write(path) as aside, open(aside, "wb") as file:
                np.save(file, to_numpy(vectors))

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        encoder: torch.nn.Module | None = None,
        device: str = "cpu",
    ) -> "Model":
        """Read the folder of a finished run.

        Parameters
        ----------
        folder : the output of `ngame.train` or ``ngame train``
        encoder : your own encoder, if the run was trained with one; it stays on its device
        device : where to encode and, with the GPU core, search; "auto" means a GPU if there is one

        Raises
        ------
        FileNotFoundError
            The folder has no finished run.
        TypeError
            `encoder` lacks a member of `ngame.Encoder`.
        ValueError
            torch cannot use the device, the run has an encoder that only you can load, or a file is
            damaged; the message names it.
        """
        encoder_device = torch_device(device)
        folder = Path(folder)
        if not (folder / "fusion.json").exists():
            begun = (folder / "config.toml").exists()
            cure = "; `ngame train DATA -o RUN --resume` finishes it" if begun else ""
            raise FileNotFoundError(f"{folder} holds no finished run: it has no fusion.json{cure}")
        config = Config.load(folder / "config.toml", whole=True)
        core = core_device(encoder_device, config.prediction.search)
        with reading(folder / "vectors.safetensors"):
            vectors = safetensors.torch.load_file(folder / "vectors.safetensors")
            indptr, indices = (
                vectors[f"point_labels.{name}"].numpy() for name in ("indptr", "indices")
            )
            labels = len(vectors["labels"])
            # Earlier versions did not write them: right for data whose points all have labels.
            rows = vectors.get("point_rows", torch.arange(len(vectors["points"]))).numpy()
        with (
            reading(folder / "labels.jsonl"),
            open(folder / "labels.jsonl", encoding="utf8") as lines,
        ):
            described = [json.loads(line) for line in lines]
            label_texts = [label["title"] for label in described]
            if len(label_texts) != labels:
                raise ValueError(f"it has {len(label_texts)} labels, expected {labels}")
        weight = None
        classifier = folder / "classifier.safetensors"
        if classifier.exists():
            with reading(classifier):
                weight = to_device(safetensors.torch.load_file(classifier)["weight"], core)
                _check_shape(weight, (labels, vectors["labels"].shape[1]))
        lexical = None
        terms = folder / "lexical.safetensors"
        if terms.exists():
            with reading(terms):
                lexical = Lexical.from_arrays(safetensors.numpy.load_file(terms))
                _check_shape(lexical.labels, (labels, len(lexical.tfidf.terms)))
                _check_shape(lexical.points, (len(vectors["points"]), len(lexical.tfidf.terms)))
        with reading(folder / "fusion.json"):
            fusions = fusion.load(folder / "fusion.json")
            if "all" not in fusions:
                raise ValueError("it lacks a fusion")
        needed = {"classifier": classifier, **dict.fromkeys(LEXICAL, terms)}
        for name, file in needed.items():
            if name in fusions["all"].weights and not file.exists():
                raise FileNotFoundError(f"{file}: no such file, and {folder}/fusion.json needs it")
        measured = folder / "metrics.json"
        if encoder is None:
            encoder = load_encoder(folder / "encoder", encoder_device)
        encoder = as_encoder(encoder)
        with reading(folder / "vectors.safetensors"):
            for name in ("labels", "points"):
                _check_shape(vectors[name], (len(vectors[name]), encoder.dim))
        model = cls(
            encoder=encoder,
            label_texts=label_texts,
            label_vectors=to_device(vectors["labels"], core),
            point_vectors=to_device(vectors["points"], core),
            point_labels=sp.csr_matrix(
                (np.ones(len(indices), np.float32), indices, indptr),
                shape=(len(vectors["points"]), len(label_texts)),
            ),
            point_rows=rows,
            classifier=weight,
            fusions=fusions,
            config=config.prediction,
            threads=config.threads,
            metrics=read_json(measured) if measured.exists() else {},
            lexical=lexical,
            new_labels=sum(label.get("new", False) for label in described),
            run_config=config,
        )
        if model.config.search == "hnsw" and (folder / "index").exists():
            for name, items in model._items.items():
                path = folder / "index" / f"{name}.hnsw"
                model._indexes[name] = items, HnswIndex.load(path, to_numpy(items))
        return model


def _check_shape(found: Any, expected: tuple[int, int]) -> None:
    """Raise if a file is of another model than the vectors."""
    if tuple(found.shape) != expected:
        raise ValueError(f"it is of another model: shape {tuple(found.shape)}, expected {expected}")


def _appended(vectors: Vectors, more: Vectors) -> Vectors:
    """Two arrays, or two tensors of one device, as one."""
    if isinstance(vectors, torch.Tensor):
        return torch.cat([vectors, torch.as_tensor(more).to(vectors)])
    joined: Vectors = np.concatenate([vectors, to_numpy(more)])
    return joined


def _chunks(rows: int, drop: Any, labels: int) -> Iterator[tuple[slice, sp.csr_matrix | None]]:
    """Slices of rows, each with the same rows of `drop` as a CSR matrix, or None."""
    matrix = _drop_matrix(drop, rows, labels)
    for start in range(0, rows, _QUERIES_PER_CHUNK):
        part = slice(start, min(rows, start + _QUERIES_PER_CHUNK))
        yield part, None if matrix is None else matrix[part]


def _drop_matrix(drop: Any, rows: int, labels: int) -> Any:
    """The pairs to leave out, in any accepted form, as a CSR matrix."""
    return None if drop is None else as_pairs(drop, "drop", (rows, labels))


def _with_data(matrix: sp.csr_matrix, data: npt.NDArray[np.float32]) -> sp.csr_matrix:
    return sp.csr_matrix((data, matrix.indices, matrix.indptr), shape=matrix.shape)

"""What a report says of a run: read from its folder, and measured on its model and data."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame import metrics
from ngame.arrays import pairs_of, values_at, widened
from ngame.batches import ClusterBatchSampler
from ngame.config import Config, flat
from ngame.data.dataset import Dataset
from ngame.data.self_pairs import drop_self_pairs
from ngame.encoders.vectors import to_numpy
from ngame.files import read_json, reading
from ngame.prediction.model import Model
from ngame.topk import topk_arrays
from ngame.training.run import Truth, is_digest_of

GROUPS = ("head", "middle", "tail")
"""Groups of labels, each with a third of the training pairs, the most frequent labels first."""
K = 5
"""Predictions of a point that count in measures of labels."""
_DEPTH = 10  # predictions of a point that any measure reads
_TEST_POINTS = 10_000  # at most, drawn at random
_CALIBRATED_POINTS = 2_000  # of these, at most, whose probabilities are compared with the truth
_DUPLICATES, _SAME = (
    2_000,
    0.95,
)  # points looked at, and the least cosine of texts that say the same
_FEW = 20  # pairs that give no estimate
_Z95 = 1.96

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScoredPoints:
    """The test points of the report and what each scorer predicts for them, best first.

    Attributes
    ----------
    texts : n texts
    truth : csr_matrix [n, L]
    dropped : csr_matrix [n, L], pairs that are not predicted
    found : ids [n, 10] of each scorer, -1 where there are fewer
    scores : of the fused predictions, best first, 0 where there are fewer
    """

    texts: list[str]
    truth: sp.csr_matrix
    dropped: sp.csr_matrix
    found: dict[str, Ids]
    scores: npt.NDArray[np.float32]

    def hits(self, scorer: str) -> npt.NDArray[np.bool_]:
        """Which predictions are right, [n, 10]."""
        return are_right(self.found[scorer], self.truth)


class RunReport:
    """A run's folder, and what can be measured with what is in it.

    Parameters
    ----------
    folder : the folder of a run, finished or not
    dataset : its data, for what needs texts or test points

    Raises
    ------
    FileNotFoundError
        The folder holds no run.
    ValueError
        The data are not those of the run, or a file is malformed.
    """

    def __init__(self, folder: Path, dataset: Dataset | None = None) -> None:
        self.folder = folder
        if not (folder / "config.toml").exists():
            raise FileNotFoundError(f"{folder} holds no run: it has no config.toml")
        self.config = Config.load(folder / "config.toml", whole=True)
        self.about: dict[str, Any] = read_about(folder)
        self.log: list[dict[str, Any]] = _read_log(folder / "log.jsonl")
        self.metrics: dict[str, dict[str, float]] = _read_metrics(folder / "metrics.json")
        self.model = Model.load(folder) if (folder / "fusion.json").exists() else None
        if dataset is not None and self.config.self_pairs == "drop":
            dataset, _ = drop_self_pairs(dataset)  # as the run did
        self.dataset = dataset
        begun = folder / "data.json"
        if dataset is not None and begun.exists():
            before = read_json(begun)
            if not is_digest_of(before, dataset):
                raise ValueError(f"{dataset.name} is not the data of {folder}: {before}")

    @cached_property
    def frequencies(self) -> npt.NDArray[np.int64]:
        """Training points of each label."""
        assert self.model is not None
        return np.bincount(
            self.model.point_labels.indices, minlength=len(self.model.label_texts)
        ).astype(np.int64)

    @cached_property
    def label_names(self) -> list[str]:
        """What names each label in a table: its title if the data have one, else its text."""
        assert self.model is not None
        titles = (self.dataset and self.dataset.label_titles) or []
        # The model may have labels that came after training.
        names = zip_longest(titles, self.model.label_texts, fillvalue="")
        return [title or text for title, text in names]

    @cached_property
    def test(self) -> ScoredPoints | None:
        """The test points and their predictions; None without a model or test points."""
        model, data = self.model, self.dataset
        if model is None or data is None or data.test_texts is None or data.test_labels is None:
            return None
        rows = np.arange(len(data.test_texts))
        if len(rows) > _TEST_POINTS:
            rows = np.sort(np.random.default_rng(0).choice(rows, _TEST_POINTS, replace=False))
        truth = Truth.of(data.test_labels, data.drop_test)
        texts = [data.test_texts[row] for row in rows]
        targets, drop = truth.targets[rows], truth.dropped[rows]
        # The model may have labels that came after training.
        targets, drop = (widened(matrix, len(model.label_texts)) for matrix in (targets, drop))
        found = model.scores(texts, drop=drop if drop.nnz else None)
        ids = {str(name): best_ids(matrix, _DEPTH) for name, matrix in found.items()}
        return ScoredPoints(texts, targets, drop, ids, _best_scores(found["fused"], ids["fused"]))

    @cached_property
    def reliability(self) -> "Reliability | None":
        """How often the test points' predictions are right; None without probabilities."""
        model, test = self.model, self.test
        if model is None or test is None or model.fusions["all"].calibration is None:
            return None
        step = -(-len(test.texts) // _CALIBRATED_POINTS) or 1
        rows = slice(None, None, step)
        drop = test.dropped[rows]
        found = model.predict(test.texts[rows], drop=drop if drop.nnz else None, probabilities=True)
        return Reliability.of(found, test.truth[rows]) if found.nnz else None

    @cached_property
    def point_texts(self) -> list[str] | None:
        """Texts of the points whose vectors the model holds; None without the data."""
        if self.model is None or self.dataset is None:
            return None
        return [self.dataset.train_texts[row] for row in self.model.point_rows]

    def seconds(self) -> dict[str, float]:
        """Seconds of each part of the run that its files tell of.

        Logs of earlier versions count some or all of the measuring as updates.
        """
        spent: dict[str, float] = {}
        parts = dict(self.about.get("seconds", {}))
        if "tokenizing" in parts:
            spent["tokenizing"] = parts.pop("tokenizing")
        for entry in self.log:
            total, measuring = entry["seconds"], entry.get("measure_seconds") or 0.0
            refreshing = (entry.get("refresh_share") or 0.0) * total
            for part, value in (
                ("refreshes", refreshing),
                ("measuring", measuring),
                ("updates", total - refreshing - measuring),
            ):
                name = f"{entry['stage']}: {part}"
                spent[name] = spent.get(name, 0.0) + value
        return {part: seconds for part, seconds in (spent | parts).items() if seconds > 0}


def read_about(folder: Path) -> dict[str, Any]:
    """What ``run.json`` says; nothing for runs of versions that did not write it."""
    path = folder / "run.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    with reading(path):
        _check(isinstance(found, dict), "it is no object")
        data, seconds = found.get("data", {"name": "", "path": ""}), found.get("seconds", {})
        known = isinstance(data, dict) and all(
            isinstance(data.get(key), str) for key in ("name", "path")
        )
        _check(known, "data has no name and path")
        _check(isinstance(found.get("ngame", ""), str), "ngame is no version")
        _check(isinstance(seconds, dict) and _numbers(seconds.values()), "seconds are no numbers")
    return found


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of ``log.jsonl``, one an epoch; none before the first one ended."""
    entries = []
    with reading(path):
        lines = path.read_bytes().splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            entry = json.loads(line)
            _check(isinstance(entry, dict), f"line {number} is no object")
            stage, others = entry.get("stage"), {**entry, "stage": None}
            _check(isinstance(stage, str), f"line {number} has no stage")
            _check(_numbers([entry.get("epoch")]), f"line {number} has no epoch")
            _check(_numbers([entry.get("seconds")]), f"line {number} has no seconds")
            known = [value for value in others.values() if value is not None]
            _check(_numbers(known), f"line {number} has a value that is no number")
            entries.append(entry)
    return entries


def _read_metrics(path: Path) -> dict[str, dict[str, float]]:
    """The scores of each scorer, if they were recorded."""
    found: dict[str, dict[str, float]] = read_json(path) if path.exists() else {}
    with reading(path):
        _check(isinstance(found, dict), "it is no object")
        for scorer, scores in found.items():
            whole = isinstance(scores, dict) and "P@1" in scores and _numbers(scores.values())
            _check(whole, f"{scorer} has no scores")
    return found


def _numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _check(found: bool, otherwise: str) -> None:
    if not found:
        raise ValueError(otherwise)


def best_ids(found: sp.csr_matrix, k: int) -> Ids:
    """The ids of the best k entries of each row, best first, ties to the lower id; -1 pads."""
    rows, _ = pairs_of(found)
    order = np.lexsort((found.indices, -found.data, rows))
    place = np.arange(len(rows)) - found.indptr[rows]  # `order` keeps the rows in place
    ids = np.full((found.shape[0], k), -1, np.int64)
    kept = place < k
    ids[rows[kept], place[kept]] = found.indices[order][kept]
    return ids


def _best_scores(found: sp.csr_matrix, ids: Ids) -> npt.NDArray[np.float32]:
    rows = np.repeat(np.arange(len(ids)), ids.shape[1])
    scores = np.asarray(found[rows, np.maximum(ids, 0).ravel()]).reshape(ids.shape)
    return np.where(ids >= 0, scores, 0).astype(np.float32)


def are_right(ids: Ids, truth: sp.csr_matrix) -> npt.NDArray[np.bool_]:
    """Which of the ids [n, k] are in the truth's row."""
    width = truth.shape[1]
    rows = np.arange(len(ids))[:, None]
    pairs = np.repeat(rows.ravel(), np.diff(truth.indptr)) * width + truth.indices
    return (ids >= 0) & np.isin(rows * width + ids, pairs)


def point_scores(
    hits: npt.NDArray[np.bool_], truth: sp.csr_matrix
) -> dict[str, npt.NDArray[np.float64]]:
    """P@1, P@3, P@5, N@5 and R@10 of each point, whose means `metrics.evaluate` gives."""
    positives = np.diff(truth.indptr)
    discounts = 1 / np.log2(np.arange(2, K + 2))
    ideal = np.append(0, np.cumsum(discounts))[np.minimum(positives, K)]
    return {
        **{f"P@{k}": hits[:, :k].sum(axis=1) / k for k in (1, 3, 5)},
        "N@5": hits[:, :K] @ discounts / np.where(ideal > 0, ideal, 1),
        "R@10": hits[:, :10].sum(axis=1) / np.maximum(positives, 1),
    }


def mean_and_spread(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The mean, and half of its 95 % interval for test points drawn at random."""
    if len(values) < 2:
        return float(values.sum()), 0.0
    return float(values.mean()), float(_Z95 * values.std(ddof=1) / np.sqrt(len(values)))


def frequency_groups(frequencies: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The group of each label, an index into `GROUPS`: each has a third of the training pairs."""
    order = np.argsort(-frequencies, kind="stable")
    before = np.cumsum(frequencies[order]) - frequencies[order]
    groups = np.empty(len(frequencies), np.int64)
    groups[order] = np.minimum(3 * before // max(1, int(frequencies.sum())), 2)
    return groups


@dataclass(frozen=True)
class LabelCounts:
    """Counts of each label in the first 5 predictions of the test points.

    Attributes
    ----------
    true : points that have the label
    predicted : points it is predicted for
    right : points that have it and for which it is predicted
    """

    true: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    right: npt.NDArray[np.int64]

    @classmethod
    def of(cls, ids: Ids, truth: sp.csr_matrix) -> "LabelCounts":
        """Count predictions [n, k], of which the first 5 are read."""
        ids, labels = ids[:, :K], truth.shape[1]
        hits = are_right(ids, truth)
        return cls(
            *(
                np.bincount(values, minlength=labels)
                for values in (truth.indices, ids[ids >= 0], ids[hits])
            )
        )

    def by(
        self, groups: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Precision and recall of each group of labels; nan where there is nothing to divide by."""
        true, predicted, right = (
            np.bincount(groups, values, minlength=len(GROUPS))
            for values in (self.true, self.predicted, self.right)
        )
        return _share(right, predicted), _share(right, true)

    @property
    def precision(self) -> npt.NDArray[np.float64]:
        """Of each label's predictions, the share that is right."""
        return _share(self.right, self.predicted)

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        """Of the points that have a label, the share it is predicted for."""
        return _share(self.right, self.true)


def _share(part: npt.NDArray[Any], whole: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def worst_labels(counts: LabelCounts, most: int) -> list[int]:
    """The labels with the lowest recall, more missed points first, of those with enough points.

    Enough is 5 test points; if no label has that many, 1.
    """
    enough = 5 if (counts.true >= 5).any() else 1
    missed = counts.true - counts.right
    usable = np.flatnonzero((counts.true >= enough) & (missed > 0))
    order = np.lexsort((usable, -missed[usable], counts.recall[usable]))
    return [int(label) for label in usable[order][:most]]


def confused_labels(ids: Ids, truth: sp.csr_matrix, most: int) -> list[tuple[int, int, int, int]]:
    """Pairs of labels that are mistaken for each other most often, at two points or more.

    Returns
    -------
    list of (label, the label predicted first instead, points, row of one such point)
    """
    count: Counter[tuple[int, int]] = Counter()
    example: dict[tuple[int, int], int] = {}
    hits = are_right(ids, truth)
    for row in np.flatnonzero(~hits[:, 0] & (ids[:, 0] >= 0)):
        first = int(ids[row, 0])
        missed = set(truth[row].indices.tolist()) - set(ids[row, :K].tolist())
        for label in missed:
            count[label, first] += 1
            example.setdefault((label, first), int(row))
    # Pairs seen once, of which small test sets have many, are chance.
    repeated = [item for item in count.items() if item[1] > 1]
    ordered = sorted(repeated, key=lambda item: (-item[1], item[0]))
    return [(*pair, points, example[pair]) for pair, points in ordered[:most]]


@dataclass(frozen=True)
class Reliability:
    """How often predictions are right, by the tenth of probability that the model gave them.

    Attributes
    ----------
    points : test points
    predictions : how many there are in each tenth, int64 [10]
    said : the mean of their probabilities, float64 [10]; nan where there are none
    right : the share of them that is right
    """

    points: int
    predictions: npt.NDArray[np.int64]
    said: npt.NDArray[np.float64]
    right: npt.NDArray[np.float64]

    @classmethod
    def of(cls, found: sp.csr_matrix, truth: sp.csr_matrix) -> "Reliability":
        """Compare probabilities, float csr_matrix [n, L], with the truth."""
        is_right = values_at(truth, found) > 0
        tenths = np.minimum((10 * found.data).astype(np.int64), 9)
        predictions, said, right = (
            np.bincount(tenths, values, minlength=10) for values in (None, found.data, is_right)
        )
        return cls(
            found.shape[0], predictions, _share(said, predictions), _share(right, predictions)
        )


@dataclass(frozen=True)
class MissingPositives:
    """Estimates of the share of true pairs that the training data do not have.

    Attributes
    ----------
    by_propensity : by the propensity model of Jain et al. (2016), from label frequencies alone;
        None with too few points
    by_duplicates : from training points with almost the same vector, labelled twice: if each keeps
        a true label with probability p, two of them share p / (2 - p) of the labels that either
        has; None with too few such pairs
    pairs : pairs of points behind `by_duplicates`
    """

    by_propensity: float | None
    by_duplicates: float | None
    pairs: int


def missing_positives(model: Model) -> MissingPositives:
    """Estimate how many positives the training points lack."""
    labels = model.point_labels
    frequencies = np.bincount(labels.indices, minlength=labels.shape[1])
    by_propensity = None
    if labels.nnz and labels.shape[0] >= metrics.FEWEST_ROWS:
        weights = metrics.inverse_propensity(labels)
        by_propensity = 1 - labels.nnz / float(frequencies @ weights.astype(np.float64))
    vectors = to_numpy(model.point_vectors)
    rows = np.arange(len(vectors))
    if len(rows) > _DUPLICATES:
        rows = np.sort(np.random.default_rng(0).choice(rows, _DUPLICATES, replace=False))
    k = min(2, len(vectors))
    scores, ids = topk_arrays(
        vectors[rows].astype(np.float32), vectors, k, metric="dot", threads=model.threads
    )
    other = np.where(ids[:, 0] == rows, ids[:, -1], ids[:, 0])
    near = np.where(ids[:, 0] == rows, scores[:, -1], scores[:, 0]) >= _SAME
    near &= other != rows
    a, b = labels[rows[near]], labels[other[near]]
    both = int(a.multiply(b).nnz)
    either = a.nnz + b.nnz - both
    share = both / either if either else 0.0
    kept = 2 * share / (1 + share)
    pairs = int(near.sum())
    return MissingPositives(by_propensity, 1 - kept if pairs >= _FEW else None, pairs)


def unlabelled_agreements(test: ScoredPoints, most: int) -> list[tuple[int, int]]:
    """Points and labels on which all scorers agree and which the data do not have, surest first."""
    first = np.stack([ids[:, 0] for ids in test.found.values()])
    agree = (first == first[0]).all(axis=0) & (first[0] >= 0) & ~test.hits("fused")[:, 0]
    rows = np.flatnonzero(agree)
    rows = rows[np.argsort(-test.scores[rows, 0], kind="stable")][:most]
    return [(int(row), int(first[0, row])) for row in rows]


@dataclass(frozen=True)
class BatchView:
    """A batch and how hard it is.

    Attributes
    ----------
    rows : rows of the model's points
    cosines : float32 [m, m] of its first m points
    nearest : mean cosine of a point and its nearest in the batch
    hardest : of each point, the cosine of the hardest negative in the batch's label pool
    recall : hard-negative recall@10
    """

    rows: Ids
    cosines: npt.NDArray[np.float32]
    nearest: float
    hardest: npt.NDArray[np.float32]
    recall: float


def batches(model: Model, config: Config, cluster_size: int, shown: int) -> list[BatchView]:
    """A random and a clustered batch of the model's points, at the run's batch size."""
    vectors = to_numpy(model.point_vectors)
    sampler = ClusterBatchSampler(
        len(vectors),
        min(config.encoder_stage.batch_size, len(vectors)),
        cluster_size=min(cluster_size, len(vectors)),
        start_epoch=1,
        seed=config.seed,
        threads=config.threads,
    )
    views = [_view(model, np.asarray(next(iter(sampler)), np.int64), shown)]
    sampler.refresh(vectors)
    sampler.set_epoch(1)
    return [*views, _view(model, np.asarray(next(iter(sampler)), np.int64), shown)]


def _view(model: Model, rows: Ids, shown: int) -> BatchView:
    x = to_numpy(model.point_vectors)[rows].astype(np.float32)
    labels = to_numpy(model.label_vectors)
    own = model.point_labels[rows]
    pool = np.unique(own.indices)
    scores = x @ labels[pool].T
    scores[own[:, pool].toarray() > 0] = -np.inf
    hardest = scores.max(axis=1, initial=-np.inf)
    k = min(10, len(labels))
    _, near = topk_arrays(x, labels, k, metric="dot", drop=own, threads=model.threads)
    valid = near >= 0
    cosines = x @ x.T
    others = cosines - 2 * np.eye(len(x), dtype=np.float32)
    return BatchView(
        rows=rows,
        cosines=cosines[:shown, :shown],
        nearest=float(others.max(axis=1).mean()) if len(x) > 1 else 0.0,
        hardest=hardest[np.isfinite(hardest)],
        recall=float((np.isin(near, pool) & valid).sum() / max(1, valid.sum())),
    )


def settings_that_differ(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Dotted names of the settings that are not the same in all, with the value of each."""
    tables = [flat(config) for config in configs]
    names = dict.fromkeys(name for table in tables for name in table)
    values = [(name, [table.get(name) for table in tables]) for name in names]
    return [(name, found) for name, found in values if any(one != found[0] for one in found)]

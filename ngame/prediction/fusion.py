"""Fuses the scores of a (point, label) pair: a weighted sum, fitted on held-out points."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ngame.files import write_json
from ngame.prediction.calibration import Calibration, groups, least

FEWEST_POINTS = 10
"""With fewer held-out points than this the weights are not fitted: see `Fusion.fit`."""

# Fixed weights, before any point is seen, in units of standard deviations: what did best on a
# hundred small data sets of nine kinds (bench/results/defaults.md). Few training points teach an
# encoder little, and its two scorers say the same; shares of votes by words can be trusted at once.
# The logarithm of votes tells more where most labels have some, so only where points are many.
_PRIOR = {
    "encoder": 0.5,
    "classifier": 0.5,
    "neighbours": 0.5,
    "tfidf": 1.0,
    "tfidf_title": 0.5,
    "tfidf_neighbours": 2.0,
    "tfidf_classifier": 0.5,
}
_PRIOR_OF_LOGARITHMS = 0.1
# An encoder that was trained from a few points alone is little better than a random one, which sees
# words as TF-IDF does, but blurred: below so many points its scorers get less, in proportion. So do
# linear classifiers.
_TAUGHT_BY = 100
_TAUGHT = frozenset({"encoder", "classifier", "neighbours", "tfidf_classifier"})
# Penalties on weights in units of these: on their spread, which fades with the square of this
# number of points over their number, so that a few points move them little; and on their distance
# from 1, which keeps them finite and leaves them at 1 where the points say nothing.
_SPREAD, _RIDGE = 15, 1e-4
# By how much values may differ through float32 alone, as a share of the largest; of 1 at least,
# for shares of votes near 1 have logarithms near 0.
_ROUNDING = 1e-6
# What scorers say by a label's text, not by the points that have it: all that is known of a label
# that training has not seen.
_BY_TEXT = ("encoder", "classifier", "tfidf", "tfidf_title")

Features = Mapping[str, npt.NDArray[np.float32]]
"""Features of every candidate pair: name -> float32 [pairs]."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """One weight per feature; the fused score of a pair is the weighted sum of its features.

    Labels that training has not seen have weights of their own, `of_new`: no training point has
    them, so what points would add is estimated from the features by the label's text. "constant" is
    added to these. `calibration` turns fused scores into probabilities. Both are None where
    there were too few points to fit them.
    """

    weights: dict[str, float]
    calibration: Calibration | None = None
    of_new: dict[str, float] | None = None

    def __call__(
        self, features: Features, new: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.float32]:
        """Fused scores, float32 [pairs]; `new` says which pairs are of labels not seen."""
        total = np.zeros(len(next(iter(features.values()))), np.float32)
        for _, values in self.parts(features, new):
            total += values
        return total

    def parts(
        self, features: Features, new: npt.NDArray[np.bool_] | None = None
    ) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """What each feature adds to the scores, and "constant" to those of labels not seen."""
        places = np.flatnonzero(False if new is None else new)
        of_new = self.of_new if len(places) else None
        for name, weight in self.weights.items():
            values = np.float32(weight) * features[name]
            if of_new is not None:
                values[places] = np.float32(of_new.get(name, 0)) * features[name][places]
            yield name, values
        if of_new is not None:
            constant = np.zeros(len(values), np.float32)
            constant[places] = of_new["constant"]
            yield "constant", constant

    def probabilities(
        self, scores: npt.NDArray[np.float32], rows: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.float32]:
        """Probability that each candidate is relevant, float32 [pairs].

        Parameters
        ----------
        scores : fused scores of all candidates
        rows : integer array of shape [pairs], the point of each candidate, ascending

        Raises
        ------
        ValueError
            The fusion is not calibrated.
        """
        if self.calibration is None:
            raise ValueError(
                "there are no probabilities: scores are calibrated on held-out points, and this "
                f"model was made before that, or with fewer than {FEWEST_POINTS} of them"
            )
        return self.calibration(scores, rows)

    @classmethod
    def fit(
        cls,
        features: Features,
        rows: npt.NDArray[np.integer],
        relevant: npt.NDArray[np.bool_],
        gains: npt.NDArray[np.floating[Any]] | None = None,
        *,
        taught_by: int | None = None,
    ) -> "Fusion":
        """Fit the weights so that relevant candidates of a point outrank its others; calibrate.

        The weights are at least 0. They minimise the decoupled softmax of the fused scores (see
        `ngame.loss`), averaged over the points that have a relevant candidate, plus a penalty on
        their distance from fixed weights that fades as points increase. The fixed weights are
        those of `_PRIOR` for features of unit variance, a tenth for logarithms, whose names start
        with "log", and 1 for any other. Fewer than `FEWEST_POINTS` such points leave them.

        If the best candidates are then worse than those of the best feature alone, by more than
        one standard deviation of the difference, the other weights fall by a sixth at a time until
        they are not.

        Parameters
        ----------
        features : of candidate pairs, of points that no scorer was trained on
        rows : integer array of shape [pairs], the point of each pair
        relevant : bool array of shape [pairs]
        gains : array of shape [pairs], optional
            What a relevant candidate counts; by default each counts 1.
        taught_by : int, optional
            Number of points that the encoder was trained on, where it knows nothing but these.
            Below a hundred the fixed weights of its scorers fall in proportion.
        """
        order = np.argsort(rows, kind="stable")
        candidates = _Candidates(
            {name: values[order] for name, values in features.items()},
            rows[order],
            relevant[order],
            np.ones(len(rows)) if gains is None else gains[order].astype(np.float64),
            1.0 if taught_by is None else min(1.0, taught_by / _TAUGHT_BY),
        )
        weights = np.ones(len(features))
        if candidates.answered >= FEWEST_POINTS:
            weights = least(candidates.loss, weights, [(0, None)] * len(weights), maxiter=200)
        if candidates.answered:
            weights = candidates.not_below_best(weights)
        weights = weights / candidates.scale
        fusion = cls(dict(zip(features, weights.tolist(), strict=True)))
        if candidates.answered < FEWEST_POINTS:
            return fusion
        fused = fusion(features)[order]
        calibration = Calibration.fit(fused, rows[order], relevant[order])
        return cls(fusion.weights, calibration, _of_new(features, fusion.weights))


class _Candidates:
    """Candidates of held-out points, sorted by point.

    Attributes
    ----------
    x : float64 [features, pairs], scaled so that the fixed weights are 1
    scale : float64 [features], what each feature was divided by
    answered : number of points that have a relevant candidate
    """

    def __init__(
        self,
        features: Features,
        rows: npt.NDArray[np.integer],
        relevant: npt.NDArray[np.bool_],
        gains: npt.NDArray[np.float64],
        taught: float,
    ) -> None:
        self.x = np.stack(list(features.values())).astype(np.float64)
        deviation = self.x.std(axis=1) if self.x.size else np.ones(len(self.x))
        prior = [_fixed_weight(name) * (taught if name in _TAUGHT else 1) for name in features]
        # What is constant but for rounding says nothing; divided by that, it would drown the rest.
        least_spread = _ROUNDING * np.abs(self.x).max(axis=1, initial=1)
        self.scale = np.where(deviation > least_spread, deviation, 1) / prior
        self.x /= self.scale[:, None]
        # Points are numbered anew, without gaps.
        self._starts, sizes = groups(rows)
        self._points = np.repeat(np.arange(len(self._starts)), sizes)
        self._relevant, self._gains = relevant, gains
        self._positives = np.flatnonzero(relevant)
        self._point = self._points[self._positives]
        counts = np.bincount(self._point, minlength=len(self._starts))
        self.answered = int((counts > 0).sum())
        share = gains[self._positives] / counts[self._point]
        self._share = share / share.sum() if len(share) else share

    def loss(self, weights: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        """What `Fusion.fit` minimises, and its gradient."""
        # Not by BLAS, whose sums depend on the number of threads.
        scores = np.einsum("fp,f->p", self.x, weights)
        top = np.maximum.reduceat(scores, self._starts)
        others = np.where(self._relevant, 0, np.exp(scores - top[self._points]))
        total = np.add.reduceat(others, self._starts) + 1e-30
        above = (np.log(total) + top)[self._point] - scores[self._positives]
        slope = self._share / (1 + np.exp(-above))
        pull = np.bincount(self._point, slope, minlength=len(total)) / total
        slopes = pull[self._points] * others
        slopes[self._positives] -= slope
        spread = weights - weights.mean()
        even = (_SPREAD / self.answered) ** 2
        value = (self._share * np.logaddexp(0, above)).sum()
        value += even * (spread**2).sum() + _RIDGE * ((weights - 1) ** 2).sum()
        gradient = np.einsum("fp,p->f", self.x, slopes)
        return value, gradient + 2 * even * spread + 2 * _RIDGE * (weights - 1)

    def not_below_best(self, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Weights that are not worse at rank 1 than the best feature alone, beyond noise."""
        alone = [self._hits(feature) for feature in self.x]
        best = int(np.argmax([hits.sum() for hits in alone]))
        for _ in range(120):  # after which nothing is left of the others
            lost = alone[best] - self._hits(np.einsum("fp,f->p", self.x, weights))
            if lost.sum() <= np.sqrt((lost**2).sum()):
                break
            # In small steps: where a little less of the others will do, a large one costs recall.
            # A best feature without weight gets some.
            others = weights * (5 / 6)
            others[best] = max(weights[best], weights.max() / 16)
            weights = others
        return weights

    def _hits(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """What the best candidate of each point counts: the mean of those that share rank 1."""
        top = np.maximum.reduceat(scores, self._starts)
        first = scores == top[self._points]
        counts = np.where(first & self._relevant, self._gains, 0)
        hits: npt.NDArray[np.float64] = np.add.reduceat(counts, self._starts)
        return hits / np.add.reduceat(first.astype(np.float64), self._starts)


def _of_new(features: Features, weights: Mapping[str, float]) -> dict[str, float]:
    """`Fusion.of_new`: a linear estimate, by least squares over all candidates."""
    by_text = [name for name in _BY_TEXT if name in weights]
    pairs = len(next(iter(features.values())))
    rest = np.zeros(pairs)
    for name, weight in weights.items():
        if name not in by_text:
            rest += weight * features[name]
    x = np.stack([np.ones(pairs), *(features[name] for name in by_text)])
    # The normal equations, not by BLAS. The small ridge is for features that are constant.
    square = np.einsum("fp,gp->fg", x, x) + 1e-9 * pairs * np.eye(len(x))
    found = np.linalg.solve(square, np.einsum("fp,p->f", x, rest))
    more = zip(by_text, found[1:].tolist(), strict=True)
    return {"constant": float(found[0]), **{name: weights[name] + slope for name, slope in more}}


def _fixed_weight(name: str) -> float:
    return _PRIOR_OF_LOGARITHMS if name.startswith("log ") else _PRIOR.get(name, 1.0)


def save(fusions: Mapping[str, Fusion], path: str | os.PathLike[str]) -> None:
    """Write the fusions as JSON."""
    write_json(path, {name: asdict(fusion) for name, fusion in fusions.items()})


def load(path: str | os.PathLike[str]) -> dict[str, Fusion]:
    """Read what `save` wrote, now or in older versions: the weights alone, then Platt's sigmoid."""
    fusions = {}
    for name, saved in json.loads(Path(path).read_text(encoding="utf8")).items():
        calibration = saved.get("calibration")
        if isinstance(calibration, list):
            score, every, constant = calibration
            calibration = {"score": score, "others": 0.0, "every": every, "constant": constant}
        weights = saved.get("weights", saved)
        fusions[name] = Fusion(
            weights, calibration and Calibration(**calibration), saved.get("of_new")
        )
    return fusions

"""Turns the fused scores of a point's candidates into probabilities, fitted on held-out points."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit, log_expit

# Only the best candidates of each point are fitted: the many irrelevant ones far below would
# outweigh them.
_RANKS = 10
# Penalty on the squared logarithms of `low` and `high`, in units of one pair's loss; and bounds of
# the logarithms.
_BENDING, _MOST_BENT = 3.0, 2.0
# Least sum of the others, as a logarithm relative to the candidate: a single candidate has none.
_LEAST_OTHERS = -30.0


@dataclass(frozen=True, slots=True)
class Calibration:
    """How likely a candidate is relevant, by its score and by those of its point's candidates.

    First a sigmoid of ``score * s + others * log(sum of exp of the other scores) + every * log(sum
    of exp of all scores) + constant``: where points have one label each, candidates compete, and
    the probability is near a softmax; where they have many, a score means about the same beside
    any others. Then a bend, the beta calibration of Kull et al. (2017): the probability p becomes
    ``sigmoid(low * log(p) - high * log(1 - p))``. Of one point's candidates probabilities rank as
    scores do, for `score` is positive and `others` is not; near 1 they may be equal.
    """

    score: float
    others: float
    every: float
    constant: float
    low: float = 1.0
    high: float = 1.0

    def __call__(
        self, scores: npt.NDArray[np.float32], rows: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.float32]:
        """Probabilities, float32 [pairs].

        Parameters
        ----------
        scores : fused scores of all candidates
        rows : integer array of shape [pairs], the point of each candidate, ascending
        """
        factors = np.array([self.score, self.others, self.every, self.constant])
        logits = np.einsum("f,fp->p", factors, _inputs(scores, rows))
        bent = self.low * log_expit(logits) - self.high * log_expit(-logits)
        found: npt.NDArray[np.float32] = expit(bent).astype(np.float32)
        return found

    @classmethod
    def fit(
        cls,
        scores: npt.NDArray[np.float32],
        rows: npt.NDArray[np.integer],
        relevant: npt.NDArray[np.bool_],
    ) -> "Calibration":
        """Fit by maximum likelihood of the best candidates, with Platt's smoothed targets.

        Parameters
        ----------
        scores, rows : as in a call
        relevant : bool array of shape [pairs]
        """
        inputs = _inputs(scores, rows)
        order = np.lexsort((-scores, rows))
        starts, sizes = groups(rows)
        ranks = np.arange(len(rows)) - np.repeat(starts, sizes)
        best = order[ranks < _RANKS]
        x, good = inputs[:, best], relevant[best]
        pairs, count = len(good), good.sum()
        target = np.where(good, (count + 1) / (count + 2), 1 / (pairs - count + 2))

        def loss(w: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
            logits = np.einsum("fp,f->p", x, w[:4])
            below, above = log_expit(logits), log_expit(-logits)
            low, high = np.exp(w[4:])
            bent = low * below - high * above
            value = (np.logaddexp(0, bent) - target * bent).mean()
            value += _BENDING / pairs * (w[4:] ** 2).sum()
            slope = (expit(bent) - target) / pairs
            p = expit(logits)
            gradient = np.einsum("fp,p->f", x, slope * (low * (1 - p) + high * p))
            bends = np.array([low * (slope * below).sum(), -high * (slope * above).sum()])
            return value, np.append(gradient, bends + 2 * _BENDING / pairs * w[4:])

        bounds = [(1e-3, None), (None, 0.0), (None, None), (None, None)]
        bounds += [(-_MOST_BENT, _MOST_BENT)] * 2
        found = least(loss, np.array([1.0, 0, 0, 0, 0, 0]), bounds)
        return cls(*found[:4].tolist(), *np.exp(found[4:]).tolist())


def _inputs(
    scores: npt.NDArray[np.float32], rows: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """What the sigmoid is of: float64 [4, pairs]."""
    exact = scores.astype(np.float64)
    starts, sizes = groups(rows)
    if not len(exact):
        return np.zeros((4, 0))
    top = np.repeat(np.maximum.reduceat(exact, starts), sizes)
    parts = np.exp(exact - top)
    total = np.repeat(np.add.reduceat(parts, starts), sizes)
    # The sum without the best one is computed anew: by subtraction it would be lost to rounding.
    is_top = exact == top
    rest = np.repeat(np.add.reduceat(np.where(is_top, 0.0, parts), starts), sizes)
    rest += np.repeat(np.add.reduceat(is_top.astype(np.float64), starts), sizes)
    rest = np.where(is_top, rest - 1, total - parts)
    others = top + np.log(np.maximum(rest, np.exp(_LEAST_OTHERS)))
    return np.stack([exact, others, top + np.log(total), np.ones(len(exact))])


def groups(
    rows: npt.NDArray[np.integer],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each point's candidates start, and how many there are; `rows` ascend."""
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    return starts, np.diff(starts, append=len(rows))


def least(
    loss: Callable[[npt.NDArray[np.float64]], tuple[float, npt.NDArray[np.float64]]],
    start: npt.NDArray[np.float64],
    bounds: Sequence[tuple[float | None, float | None]],
    **options: int,
) -> npt.NDArray[np.float64]:
    """Where a loss, which returns its gradient as well, is least within the bounds."""
    # Half a second to import, which predictions need not wait for.
    from scipy.optimize import minimize

    found: npt.NDArray[np.float64] = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options
    ).x
    return found

"""Fuses the scores of a (point, label) pair by a linear model."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ngame.files import write_json

# L2 penalty: keeps the weights finite with few held-out points or uninformative features.
_RIDGE = 1e-4

Features = Mapping[str, npt.NDArray[np.float32]]
"""Score of every candidate pair by each scorer: name -> float32 [pairs]."""


@dataclass(frozen=True, slots=True)
class Fusion:
    """One weight per scorer; the fused score of a pair is the weighted sum of its scores."""

    weights: dict[str, float]

    def __call__(self, features: Features) -> npt.NDArray[np.float32]:
        """Fused scores, float32 [pairs]."""
        total = np.zeros(len(next(iter(features.values()))), np.float32)
        for name, weight in self.weights.items():
            total += np.float32(weight) * features[name]
        return total

    @classmethod
    def fit(
        cls,
        features: Features,
        rows: npt.NDArray[np.integer],
        relevant: npt.NDArray[np.bool_],
    ) -> "Fusion":
        """Fit the weights so that relevant candidates of a point outrank its other candidates.

        Minimises the decoupled softmax of the fused scores (see `ngame.loss`) by L-BFGS, averaged
        over the points that have a relevant candidate.

        Parameters
        ----------
        features : scores of candidate pairs, of points that no scorer was trained on
        rows : integer array of shape [pairs], the point of each pair
        relevant : bool array of shape [pairs]
        """
        names = list(features)
        x = torch.from_numpy(np.stack([features[name] for name in names], axis=1)).double()
        scale = x.std(dim=0, correction=0)
        scale[scale == 0] = 1
        x = x / scale
        row = torch.from_numpy(rows.astype(np.int64))
        positive = torch.from_numpy(np.flatnonzero(relevant))
        weights = torch.zeros(len(names), dtype=torch.float64, requires_grad=True)
        if len(positive) == 0:
            return cls(dict.fromkeys(names, 1.0))
        points = int(row.max()) + 1
        share = 1 / torch.bincount(row[positive], minlength=points)[row[positive]].double()
        irrelevant = torch.from_numpy(~relevant).double()
        optimizer = torch.optim.LBFGS(
            [weights], max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-7
        )

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            score = x @ weights
            top = torch.full((points,), -torch.inf, dtype=torch.float64)
            top = top.scatter_reduce(0, row, score.detach(), "amax")
            others = torch.zeros(points, dtype=torch.float64).index_add(
                0, row, torch.exp(score - top[row]) * irrelevant
            )
            above = torch.log(others[row[positive]] + 1e-30) + top[row[positive]] - score[positive]
            value = (share * F.softplus(above)).sum() / share.sum()
            value = value + _RIDGE * weights.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        found = (weights.detach() / scale).tolist()
        return cls(dict(zip(names, found, strict=True)))


def save(fusions: Mapping[str, Fusion], path: str | os.PathLike[str]) -> None:
    """Write the fusions as JSON."""
    write_json(path, {name: fusion.weights for name, fusion in fusions.items()})


def load(path: str | os.PathLike[str]) -> dict[str, Fusion]:
    """Read what `save` wrote."""
    saved = json.loads(Path(path).read_text(encoding="utf8"))
    return {name: Fusion(weights) for name, weights in saved.items()}

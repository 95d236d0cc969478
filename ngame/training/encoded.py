"""The vectors of a run's texts, each text encoded once, by the rank whose share it is in."""

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ngame.encoders.vectors import Vectors, to_device, to_float16
from ngame.training.run import Run
from ngame.transfer import sent


class EncodedTexts:
    """Unit vectors of a run's texts by its encoder as it is now, computed when first used.

    Valid until the encoder changes. Make a new one after training steps. With several ranks each
    has the vectors of its share of the texts, until `gather`.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    @cached_property
    def labels(self) -> Vectors:
        """float32 [L, dim]."""
        return self._run.encode(self._run.own(self._run.labels), unit=True)

    @cached_property
    def held_out(self) -> Vectors:
        """float32 [held-out points, dim]."""
        return self._run.encode(self._run.own(self._run.held_out.tokens), unit=True)

    @cached_property
    def points(self) -> Vectors:
        """float16 [training points, dim], the largest array of a run; never whole in float32."""
        own = self._run.own(self._run.points.tokens)
        return self._run.encode(own, unit=True, dtype=torch.float16)

    def gather(self) -> None:
        """Gather all vectors on rank 0; the others have none afterwards."""
        run = self._run
        if run.ranks.size == 1:
            return
        for name, tokens in (
            ("labels", run.labels),
            ("held_out", run.held_out.tokens),
            ("points", run.points.tokens),
        ):
            self.__dict__[name] = run.gather(getattr(self, name), len(tokens))

    def some_points(self, rows: npt.NDArray[np.integer]) -> Vectors:
        """Vectors of some training points. Encodes only these if `points` was not used before."""
        if "points" in self.__dict__ and self._run.ranks.size == 1:
            return self.points[rows]
        return self._run.encode(self._run.points.tokens.take(rows), unit=True)

    def batch(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Vectors of this rank's part of a batch of training points, float32 on the run's device.

        Each rank sends those it has to all: no rank has the vectors of all points.
        """
        run, ranks = self._run, self._run.ranks
        if ranks.size == 1:
            return _rows(self.points, rows, run.device).float()
        ends = np.cumsum(ranks.counts(len(run.points.tokens)))
        owners = np.searchsorted(ends, rows, side="right")
        own = rows[owners == ranks.rank] - (ends[ranks.rank] - len(self.points))
        counts = np.bincount(owners, minlength=ranks.size).tolist()
        found = ranks.all_rows(torch.as_tensor(self.points[own]), counts)
        # Sent rank by rank; back to the order of the batch.
        places = np.argsort(np.argsort(owners, kind="stable"))[ranks.share(len(rows))]
        return found[torch.from_numpy(places)].to(run.device, torch.float32)

    def all_points(self) -> Vectors:
        """float16 [training points, dim], those held out among them, in the data set's order."""
        run, device = self._run, self._run.core_device
        if run.dataset.val_texts is not None:
            return self.points
        shape = len(run.rows), run.encoder.dim
        vectors: Any = to_device(torch.empty(shape, dtype=torch.float16, device=device), device)
        vectors[np.searchsorted(run.rows, run.points.rows)] = self.points
        vectors[np.searchsorted(run.rows, run.held_out.rows)] = to_float16(self.held_out)
        merged: Vectors = vectors
        return merged


def _rows(vectors: Vectors, rows: npt.NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Some of the vectors on a device, which is not waited for."""
    if isinstance(vectors, torch.Tensor):
        return vectors.index_select(0, sent(torch.from_numpy(rows), vectors.device)).to(device)
    return sent(torch.from_numpy(vectors[rows]), device)

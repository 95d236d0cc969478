"""The vectors of a run's texts, each text encoded once."""

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ngame.data.tokens import Tokens
from ngame.encoders.encode import encode
from ngame.encoders.vectors import Vectors, normalize, to_device, to_float16
from ngame.training.run import Run


class EncodedTexts:
    """Unit vectors of a run's texts by its encoder as it is now, computed when first used.

    Valid until the encoder changes. Make a new one after training steps.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    @cached_property
    def labels(self) -> Vectors:
        """float32 [L, dim]."""
        return self._encode(self._run.labels)

    @cached_property
    def held_out(self) -> Vectors:
        """float32 [held-out points, dim]."""
        return self._encode(self._run.held_out.tokens)

    @cached_property
    def points(self) -> Vectors:
        """float16 [training points, dim]: half the memory of the largest array of a run."""
        return to_float16(self._encode(self._run.points.tokens))

    def some_points(self, rows: npt.NDArray[np.integer]) -> Vectors:
        """Vectors of some training points. Encodes only these if `points` was not used before."""
        if "points" in self.__dict__:
            return self.points[rows]
        return self._encode(self._run.points.tokens.take(rows))

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

    def _encode(self, tokens: Tokens) -> Vectors:
        return normalize(encode(self._run.encoder, tokens, device=self._run.core_device))

"""A number that changes while training goes on."""

import math
from collections.abc import Mapping
from typing import Literal

import numpy as np


class Schedule:
    """A number over the steps or epochs of a training: cluster size, margin, temperature, ...

    Calling it with a place gives the number there. Before the first place named it is the first
    number, after the last place the last. The parts of `ngame.negatives` that take a `Number` take
    a plain number or a schedule over steps; where something else wants a number, call the schedule.

    Parameters
    ----------
    values : mapping of place to number
        At least one place; places are steps or epochs, whichever the caller counts.
    shape : "step", "linear" or "cosine"
        Between two places: the number of the earlier one, a straight line, or half a cosine wave.

    Raises
    ------
    ValueError
        There are no values, a place is not finite, a value is NaN, or there is no such shape;
        values are infinite, which only "step" can have.

    Examples
    --------
    >>> temperature = Schedule({0: 0.1, 1000: 0.02}, "linear")
    >>> round(temperature(500), 3), temperature(5000)
    (0.06, 0.02)
    >>> cluster_size = Schedule({0: 1, 1: 8, 5: 32})
    >>> [int(cluster_size(epoch)) for epoch in range(7)]
    [1, 8, 8, 8, 8, 32, 32]
    """

    def __init__(
        self,
        values: Mapping[float, float],
        shape: Literal["step", "linear", "cosine"] = "step",
    ) -> None:
        if shape not in ("step", "linear", "cosine"):
            raise ValueError(f"shape is {shape!r}, expected 'step', 'linear' or 'cosine'")
        if not values:
            raise ValueError("values is empty, expected at least one place")
        self._places = np.array(sorted(values), np.float64)
        self._values = np.array([values[place] for place in sorted(values)], np.float64)
        if not np.isfinite(self._places).all() or np.isnan(self._values).any():
            raise ValueError(f"values is {dict(values)}, expected finite places and no NaN")
        if shape != "step" and not np.isfinite(self._values).all():
            raise ValueError(f"values is {dict(values)}, expected finite numbers for {shape!r}")
        self.shape = shape

    def __call__(self, place: float) -> float:
        """The number at a place."""
        after = int(np.searchsorted(self._places, place, side="right"))
        if after in (0, len(self._places)) or self.shape == "step":
            return float(self._values[max(after - 1, 0)])
        begin, end = self._places[after - 1 : after + 1]
        share = (place - begin) / (end - begin)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        first, second = self._values[after - 1 : after + 1]
        return float(first + share * (second - first))

    def __repr__(self) -> str:
        values = dict(zip(self._places.tolist(), self._values.tolist(), strict=True))
        return f"Schedule({values}, {self.shape!r})"


Number = float | Schedule
"""A number, or a schedule over steps."""


def value_at(number: Number, step: float) -> float:
    """The number that holds at a step."""
    return number(step) if isinstance(number, Schedule) else float(number)

"""Drawings of a report as SVG, by matplotlib."""

import importlib.util
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours that people with any colour vision can tell apart (Okabe and Ito)."""
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: small, and sharp at any size
    "svg.hashsalt": "ngame",  # the same drawing gives the same bytes
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_SIZE = 4.2, 2.7  # inches: about a phone's width

Series = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Name -> x and y of a line."""


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises
    ------
    ModuleNotFoundError
        It is not; the message says how to install it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError('a report needs matplotlib: pip install "ngame[report]"')


def _drawn(draw: Callable[[Any], None], size: tuple[float, float] = _SIZE) -> str:
    """The SVG of what `draw` puts on an empty figure."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def lines(series: Series, x_label: str, y_label: str) -> str:
    """Lines over epochs. The first word of a name gives the colour, the whole name the dashes."""
    runs = list(dict.fromkeys(name.partition(", ")[0] for name in series))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, (x, y) in series.items():
            run = runs.index(name.partition(", ")[0])
            dashes = "--" if name.endswith("classifier") else "-"
            axes.plot(x, y, dashes, marker=".", color=COLOURS[run % len(COLOURS)], label=name)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(series) > 1:
            axes.legend(fontsize=8)

    return _drawn(draw)


def bars(
    groups: Sequence[str],
    values: Mapping[str, Sequence[float]],
    y_label: str,
    spreads: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """A group of bars for each name, a bar for each series, with error bars if given."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        width = 0.8 / max(1, len(values))
        for number, (name, heights) in enumerate(values.items()):
            x = np.arange(len(groups)) + (number - (len(values) - 1) / 2) * width
            axes.bar(
                x,
                heights,
                width * 0.92,
                label=name,
                color=COLOURS[number % len(COLOURS)],
                yerr=None if spreads is None else spreads[name],
                error_kw={"elinewidth": 1, "capsize": 2},
            )
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(y_label)
        axes.grid(axis="x", visible=False)
        if len(values) > 1:
            columns = min(len(values), 3)
            figure.legend(fontsize=8, ncols=columns, loc="outside upper center")

    return _drawn(draw)


def stacked(rows: Sequence[str], parts: Mapping[str, Sequence[float]], x_label: str) -> str:
    """A horizontal bar for each row, made of parts."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        left = np.zeros(len(rows))
        for number, (name, widths) in enumerate(parts.items()):
            colour = COLOURS[number % len(COLOURS)]
            faded = 1 - 0.5 * (number // len(COLOURS))
            axes.barh(rows, widths, 0.6, left=left, label=name, color=colour, alpha=faded)
            left += widths
        axes.set_xlabel(x_label)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        figure.legend(fontsize=7.5, ncols=2, loc="outside upper center")

    return _drawn(draw, (_SIZE[0], 1.3 + 0.45 * len(rows) + 0.17 * math.ceil(len(parts) / 2)))


def shades(cosines: npt.NDArray[np.float32]) -> str:
    """The cosine of every pair of points as a shade."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(cosines, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)

    return _drawn(draw, (_SIZE[0], 3.3))


def distributions(values: Mapping[str, npt.NDArray[np.float32]], x_label: str) -> str:
    """The distribution of each series over the same bins, as shares."""

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        together = np.concatenate(list(values.values()))
        bins = np.histogram_bin_edges(together, 30)
        for number, (name, one) in enumerate(values.items()):
            weights = np.full(len(one), 100 / max(1, len(one)))
            colour = COLOURS[number % len(COLOURS)]
            axes.hist(one, bins, weights=weights, histtype="step", color=colour, lw=1.6, label=name)
        axes.set(xlabel=x_label, ylabel="% of the points")
        figure.legend(fontsize=8, ncols=2, loc="outside upper center")

    return _drawn(draw)

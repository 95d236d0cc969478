"""One HTML file that says what happened in a run, or compares runs: ``ngame report``."""

import base64
import dataclasses
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ngame.data.dataset import Dataset
from ngame.files import atomic_write
from ngame.report import charts
from ngame.report.measures import (
    GROUPS,
    BatchView,
    K,
    LabelCounts,
    RunReport,
    ScoredPoints,
    batches,
    confused_labels,
    frequency_groups,
    mean_and_spread,
    missing_positives,
    point_scores,
    settings_that_differ,
    unlabelled_agreements,
    worst_labels,
)

_STYLE = """
body { margin: 0 auto; max-width: 70rem; padding: 1rem; line-height: 1.45; color: #1c2126;
  background: #fff; font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem;
  border-top: 1px solid #dde; padding-top: 1rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { max-width: 46rem; } .small { color: #59636e; font-size: .85rem; }
.charts { display: grid; gap: 1rem; 
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
figure { margin: 0; } figure img { width: 100%; max-width: 32rem; height: auto; display: block; }
figcaption { font-weight: 600; font-size: .9rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .25rem .6rem .25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #e6e8eb; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.text { min-width: 11rem; overflow-wrap: anywhere; }
summary { cursor: pointer; padding: .3rem 0; }
"""
_SHOWN_POINTS = 64  # of a batch, in the drawing of its cosines
_EXAMPLES = 8
_NAME = 90  # characters of what names labels, at most
_LABELS = 300  # rows of the table of labels
_SIZE_IF_RANDOM = 32  # of the clusters that a run with random batches is shown


def write_report(
    folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    dataset: Dataset | None = None,
) -> None:
    """Write the report of a run, or of several to compare, as one HTML file without links.

    Parameters
    ----------
    folders : folders of runs; of those that are not finished only the log is shown
    output : the file to write
    dataset : the data of the runs; without it, what needs texts or test points is left out

    Raises
    ------
    ModuleNotFoundError
        matplotlib is not installed (extra ``report``).
    FileNotFoundError
        A folder holds no run.
    ValueError
        The data are not those of the runs, or a file is malformed.
    """
    charts.require_matplotlib()
    runs = [RunReport(Path(folder), dataset) for folder in folders]
    names = _names([run.folder for run in runs])
    sections = [
        _about(runs, names),
        _scores(runs, names),
        _curves(runs, names),
        _frequencies(runs, names),
        *_each(runs, names, "Probabilities", _probabilities),
        *_each(runs, names, "Labels", _labels),
        *_each(runs, names, "Missing positives", _missing),
        *_each(runs, names, "Batches", _batches),
        _time(runs, names),
    ]
    title = f"ngame: {' and '.join(names)}"
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head>
<body><h1>{escape(title)}</h1>
{"".join(sections)}
</body></html>
"""
    with atomic_write(output) as aside:
        aside.write_text(page, encoding="utf8")


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each folder, or the whole path where that is not unique."""
    short = [folder.resolve().name for folder in folders]
    return short if len({*short}) == len(short) else [str(folder) for folder in folders]


def _each(runs: Sequence[RunReport], names: Sequence[str], title: str, part: Any) -> Iterable[str]:
    """A section that tells of one run, for each run that has what it takes."""
    for run, name in zip(runs, names, strict=True):
        text = part(run)
        if text:
            yield _section(title if len(runs) == 1 else f"{title}: {name}", text)


def _about(runs: Sequence[RunReport], names: Sequence[str]) -> str:
    rows = []
    for run, name in zip(runs, names, strict=True):
        model, about = run.model, run.about
        seconds = sum(run.seconds().values())
        rows.append(
            [
                name,
                about.get("data", {}).get("name") or (run.dataset.name if run.dataset else "?"),
                "not finished" if model is None else f"{len(model.point_vectors):,}",
                "" if model is None else f"{len(model.label_texts):,}",
                about.get("ngame", "not recorded"),
                _duration(seconds),
            ]
        )
    text = _table(["run", "data", "points", "labels", "ngame", "time"], rows, numbers={2, 3, 5})
    if all(run.dataset is None for run in runs):
        text += _note("The data were not found: what needs texts or test points is left out.")
    differing = settings_that_differ([dataclasses.asdict(run.config) for run in runs])
    if differing:
        text += "<h3>Settings that differ</h3>"
        text += _table(["setting", *names], [[name, *map(str, found)] for name, found in differing])
    return text


def _scores(runs: Sequence[RunReport], names: Sequence[str]) -> str:
    """Scores by scorer: with spread where there are test points, else those the run recorded."""
    shown = ("P@1", "P@3", "P@5", "N@5", "R@10", "PSP@1", "PSP@5")
    text, rows = "", []
    heights: dict[str, list[float]] = {}
    spreads: dict[str, list[float]] = {}
    fused: list[npt.NDArray[np.float64]] = []
    scorers: list[str] = list(dict.fromkeys(name for run in runs for name in run.metrics))
    for run, name in zip(runs, names, strict=True):
        for scorer in run.metrics:
            cells = []
            by_point = {}
            if run.test is not None and scorer in run.test.found:
                by_point = point_scores(run.test.hits(scorer), run.test.truth)
                if scorer == "fused":
                    fused.append(by_point["P@1"])
            for measure in shown:
                if measure in by_point:
                    mean, half = mean_and_spread(by_point[measure])
                    cells.append(f"{100 * mean:.2f} ± {100 * half:.2f}")
                else:
                    value = run.metrics[scorer].get(measure)
                    cells.append("" if value is None else f"{100 * value:.2f}")
            rows.append([*([name] if len(runs) > 1 else []), scorer, *cells])
            if by_point:
                mean, half = mean_and_spread(by_point["P@1"])
            else:
                mean, half = run.metrics[scorer]["P@1"], 0.0
            heights.setdefault(name, [0.0] * len(scorers))[scorers.index(scorer)] = 100 * mean
            spreads.setdefault(name, [0.0] * len(scorers))[scorers.index(scorer)] = 100 * half
    if not rows:
        return ""
    head = [*(["run"] if len(runs) > 1 else []), "scorer", *shown]
    numbers = set(range(len(head) - len(shown), len(head)))
    text += _charts(("P@1 on the test points, %", charts.bars(scorers, heights, "%", spreads)))
    text += _table(head, rows, numbers=numbers)
    if fused:
        text += _note(
            f"In percent, on {len(fused[0]):,} test points. ± is half of the 95 % interval for "
            "test points drawn at random; it says nothing of other seeds."
        )
    for number in range(1, len(runs)):
        if len(fused) == len(runs) and len(fused[0]) == len(fused[number]):
            mean, half = mean_and_spread(fused[number] - fused[0])
            beyond = "beyond" if abs(mean) > half else "within"
            text += (
                f"<p>Fused P@1 of {escape(names[number])} less that of {escape(names[0])}, point "
                f"by point: {100 * mean:+.2f} ± {100 * half:.2f}, {beyond} what the choice of test "
                "points explains.</p>"
            )
    return _section("Scores", text)


def _curves(runs: Sequence[RunReport], names: Sequence[str]) -> str:
    measures = (
        ("loss", "Loss", 1),
        ("P@1", "P@1 on held-out training points, %", 100),
        ("hard_negative_recall", "Hard-negative recall@10, %", 100),
        ("neighbour_share", "NN10 of the clusters, %", 100),
    )
    drawn = []
    for key, title, scale in measures:
        series = {}
        for run, name in zip(runs, names, strict=True):
            for stage in ("encoder", "classifier"):
                points = [
                    (entry["epoch"] + 1, scale * entry[key])
                    for entry in run.log
                    if entry["stage"] == stage and entry.get(key) is not None
                ]
                if points:
                    x, y = zip(*points, strict=True)
                    series[f"{name}, {stage}" if len(runs) > 1 else stage] = x, y
        if series:
            drawn.append((title, charts.lines(series, "epoch", title.rpartition(", ")[2])))
    if not drawn:
        return ""
    return _section(
        "Learning curves",
        _charts(*drawn)
        + _note(
            "Hard-negative recall@10: of each point's 10 nearest labels that are not its own, the "
            "share that its batch compared it with. NN10: of each point's 10 nearest points, the "
            "share in its cluster; random batches have none."
        ),
    )


def _frequencies(runs: Sequence[RunReport], names: Sequence[str]) -> str:
    text = ""
    compared: dict[str, Any] = {}
    for run, name in zip(runs, names, strict=True):
        if run.test is None or run.model is None:
            continue
        groups = frequency_groups(run.frequencies)
        counts = {
            scorer: LabelCounts.of(ids, run.test.truth) for scorer, ids in run.test.found.items()
        }
        precision, recall = counts["fused"].by(groups)
        rows = []
        for number, group in enumerate(GROUPS):
            inside = groups == number
            if not inside.any():
                continue
            seen = run.frequencies[inside]
            rows.append(
                [
                    group,
                    f"{inside.sum():,}",
                    f"{seen.min():,} to {seen.max():,}",
                    f"{counts['fused'].true[inside].sum():,}",
                    _percent(precision[number]),
                    _percent(recall[number]),
                ]
            )
        heading = f"<h3>{escape(name)}</h3>" if len(runs) > 1 else ""
        table = _table(
            ["labels", "number", "training points", "test pairs", f"P@{K}, %", f"R@{K}, %"],
            rows,
            numbers={1, 2, 3, 4, 5},
        )
        by_scorer = [(scorer, *one.by(groups)) for scorer, one in counts.items()]
        if len(runs) == 1:
            text += _charts(
                (
                    f"Precision of the first {K} predictions by label frequency, %",
                    charts.bars(GROUPS, {s: _drawable(p) for s, p, _ in by_scorer}, "%"),
                ),
                (
                    f"Recall in the first {K} predictions by label frequency, %",
                    charts.bars(GROUPS, {s: _drawable(r) for s, _, r in by_scorer}, "%"),
                ),
            )
        else:
            compared[name] = _drawable(precision), _drawable(recall)
        text += heading + table
    if not text:
        return ""
    if compared:
        text = (
            _charts(
                *(
                    (
                        f"{title} by label frequency, fused, %",
                        charts.bars(GROUPS, {name: v[number] for name, v in compared.items()}, "%"),
                    )
                    for number, title in enumerate((f"Precision@{K}", f"Recall@{K}"))
                )
            )
            + text
        )
    return _section(
        "Frequent and rare labels",
        text
        + _note(
            "Head, middle and tail have a third of the training pairs each. Precision: of the "
            f"predictions of such labels among the first {K}, the share that is right. Recall: of "
            "the test pairs with such labels, the share found. The table is of the fused scores."
        ),
    )


def _probabilities(run: RunReport) -> str:
    """How often predictions are right, by the probability that the model gave them."""
    found = run.reliability
    if found is None:
        return ""
    rows = [
        [
            f"{10 * tenth} to {10 * (tenth + 1)}",
            f"{found.predictions[tenth]:,}",
            _percent(found.said[tenth]),
            _percent(found.right[tenth]),
        ]
        for tenth in range(10)
    ]
    return _table(
        ["probability, %", "predictions", "said on average, %", "right, %"], rows, {1, 2, 3}
    ) + _note(
        f"The predictions for {found.points:,} test points. A label that a point should have and "
        "the data lack counts as wrong."
    )


def _labels(run: RunReport) -> str:
    test, model = run.test, run.model
    if test is None or model is None:
        return ""
    ids, labels = test.found["fused"], [_short(name, _NAME) for name in run.label_names]
    counts = LabelCounts.of(ids, test.truth)
    worst = []
    for label in worst_labels(counts, _EXAMPLES):
        row = _missed(test, label)
        worst.append(
            [
                labels[label],
                f"{run.frequencies[label]:,}",
                f"{counts.right[label]} of {counts.true[label]}",
                _short(test.texts[row]),
                _first(labels, ids[row, 0]),
            ]
        )
    text = "<h3>Worst labels</h3>" + _table(
        ["label", "training points", "found", "a text that has it", "predicted first"],
        worst,
        numbers={1, 2},
    )
    confused = [
        [labels[label], labels[other], str(points), _short(test.texts[row])]
        for label, other, points, row in confused_labels(ids, test.truth, _EXAMPLES)
    ]
    text += "<h3>Most confused labels</h3>"
    if confused:
        text += _table(
            ["missed", "wrong, and predicted first", "test points", "for example"], confused, {2}
        )
    else:
        text += "<p>No two labels were confused at more than one test point.</p>"
    order = np.lexsort((np.arange(len(labels)), -counts.true))
    order = order[counts.true[order] + counts.predicted[order] > 0][:_LABELS]
    rows = [
        [
            labels[label],
            f"{run.frequencies[label]:,}",
            str(counts.true[label]),
            _percent(counts.precision[label]),
            _percent(counts.recall[label]),
        ]
        for label in order
    ]
    table = _table(
        ["label", "training points", "test points", f"P@{K}, %", f"R@{K}, %"], rows, {1, 2, 3, 4}
    )
    text += f"<details><summary>The {len(rows)} labels most frequent in the test</summary>{table}"
    return (
        text
        + "</details>"
        + _note(f"Found: in the first {K} fused predictions. Worst: of labels with 5 test points.")
    )


def _missing(run: RunReport) -> str:
    model = run.model
    if model is None:
        return ""
    found = missing_positives(model)
    text = "<p>How many true pairs the training data lack can only be guessed. "
    if found.by_propensity is not None:
        text += (
            "The propensity model of extreme classification (Jain et al., 2016) knows nothing but "
            "how frequent labels are, and its constants come from other data, so it may be far "
            f"off: it says {100 * found.by_propensity:.0f} %. "
        )
    if found.by_duplicates is None:
        text += "Too few points say the same for an estimate from the labels themselves.</p>"
    else:
        text += (
            f"By {found.pairs:,} pairs of training points with almost the same vector, whose "
            f"labels should agree, at most {100 * found.by_duplicates:.0f} %: texts that "
            "only look alike count as well.</p>"
        )
    if run.test is not None:
        names = run.label_names
        rows = [
            [_short(run.test.texts[row]), _short(names[label], _NAME), _own(run.test, names, row)]
            for row, label in unlabelled_agreements(run.test, _EXAMPLES)
        ]
        if rows:
            text += "<h3>Likely ones</h3>" + _table(
                ["test point", "all scorers say", "its labels in the data"], rows
            )
            text += _note("Every scorer has this label first, and the data do not have it.")
    return text


def _batches(run: RunReport) -> str:
    model = run.model
    if model is None or len(model.point_vectors) < 2:
        return ""
    sizes = run.config.encoder_stage.sizes()
    size = sizes[max(sizes)]
    batch = min(run.config.encoder_stage.batch_size, len(model.point_vectors))
    planned = min(size if size > 1 else _SIZE_IF_RANDOM, batch)  # larger ones would be cut
    views = batches(model, run.config, planned, _SHOWN_POINTS)
    titles = "Random batch", f"Clustered batch, clusters of {planned}"
    text = ""
    if size == 1:
        text = "<p>This run trained on random batches; the other one shows what clusters give.</p>"
    drawn = [
        (title, charts.shades(view.cosines)) for title, view in zip(titles, views, strict=True)
    ]
    hardest = {title: view.hardest for title, view in zip(titles, views, strict=True)}
    if all(map(len, hardest.values())):
        drawn.append(
            ("Hardest negative of each point", charts.distributions(hardest, "cosine of the label"))
        )
    rows = [
        [
            title,
            f"{len(view.rows):,}",
            f"{view.nearest:.2f}",
            f"{view.hardest.mean():.2f}" if len(view.hardest) else "",
            _percent(view.recall),
        ]
        for title, view in zip(titles, views, strict=True)
    ]
    text += _charts(*drawn) + _table(
        ["", "points", "cosine of the nearest mate", "of the hardest negative", "its recall@10, %"],
        rows,
        numbers={1, 2, 3, 4},
    )
    text += _note(
        f"By the vectors of the finished encoder. The first {_SHOWN_POINTS} points of each batch "
        "are drawn: a row and a column for each, a shade for the cosine of a pair."
    )
    if run.point_texts is not None and len(run.point_texts) == len(model.point_vectors):
        for title, view in zip(titles, views, strict=True):
            text += _texts_of(title, view, run.point_texts, run)
    return text


def _texts_of(title: str, view: BatchView, texts: Sequence[str], run: RunReport) -> str:
    assert run.model is not None
    rows = [
        [_short(texts[row]), _joined(run.label_names, run.model.point_labels[row].indices)]
        for row in view.rows[:_EXAMPLES].tolist()
    ]
    table = _table(["point", "labels"], rows)
    return f"<details><summary>{title}: its first points</summary>{table}</details>"


def _time(runs: Sequence[RunReport], names: Sequence[str]) -> str:
    spent = [run.seconds() for run in runs]
    parts = list(dict.fromkeys(part for one in spent for part in one))
    if not parts:
        return ""
    values = {part: [one.get(part, 0.0) for one in spent] for part in parts}
    rows = [
        [part, *(f"{_duration(one)}" for one in values[part])]
        for part in sorted(parts, key=lambda part: -max(values[part]))
    ]
    drawn = charts.stacked(names, values, "seconds")
    table = _table(["part", *names], rows, numbers=set(range(1, len(names) + 1)))
    return _section("Time", _charts(("Time by part", drawn)) + table)


# HTML


def _section(title: str, text: str) -> str:
    return f"\n<h2>{escape(title)}</h2>\n{text}"


def _note(text: str) -> str:
    return f'<p class="small">{escape(text)}</p>'


def _charts(*drawn: tuple[str, str]) -> str:
    """Drawings, each with its title, as images: their ids cannot clash."""
    figures = (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<img alt="{escape(title)}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(svg.encode()).decode()}"></figure>'
        for title, svg in drawn
    )
    return f'<div class="charts">{"".join(figures)}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table that scrolls by itself where the screen is narrow."""
    right = {*numbers}

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (
            "number" if place in right else "text" if len(cell) > 30 else ""
            for place, cell in enumerate(cells)
        )
        filled = "".join(
            f'<{tag} class="{kind}">{escape(cell)}</{tag}>'
            if kind
            else f"<{tag}>{escape(cell)}</{tag}>"
            for kind, cell in zip(kinds, cells, strict=True)
        )
        return f"<tr>{filled}</tr>"

    body = "".join(line(cells, "td") for cells in rows)
    return f'<div class="wide"><table>{line(head, "th")}{body}</table></div>'


def _missed(test: ScoredPoints, label: int) -> int:
    """A test point that has the label without it being predicted."""
    having = test.truth[:, [label]].nonzero()[0]
    missed = ~(test.found["fused"][having, :K] == label).any(axis=1)
    return int(having[missed][0])


def _own(test: ScoredPoints, names: Sequence[str], row: int) -> str:
    return _joined(names, test.truth[row].indices)


def _joined(names: Sequence[str], labels: Iterable[int]) -> str:
    return _short(", ".join(names[label] for label in labels), _NAME)


def _first(labels: Sequence[str], label: int) -> str:
    return labels[label] if label >= 0 else ""


def _short(text: str, length: int = 140) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _drawable(shares: npt.NDArray[np.float64]) -> list[float]:
    """Shares in percent; nothing is drawn where there is nothing to divide by."""
    return [float(share) for share in 100 * np.nan_to_num(shares)]


def _percent(share: float) -> str:
    return "" if np.isnan(share) else f"{100 * share:.1f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"

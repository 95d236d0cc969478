"""Whole runs beside the classical baseline, XR-Linear of PECOS on TF-IDF, on the test points.

    python bench/studies/baseline.py DATA ... [--seeds 0 1 2] [--set KEY=VALUE] -o runs.jsonl
    python bench/studies/baseline.py DATA ... --peers PYTHON -o runs.jsonl
    python bench/studies/baseline.py --table runs.jsonl

The first trains with `ngame.train`, by the defaults for the size of the data. A line of the output
has the scores of all scorers of a run; runs that it already has are skipped. The second adds the
baseline, of an interpreter that has PECOS: words and pairs of words, weighed as is usual there. The
table has mean and standard deviation over the seeds, and for each data set and metric how far the
fused scores are ahead of the best of all others.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import scipy.sparse as sp
from sklearn.feature_extraction.text import TfidfVectorizer

import ngame
from ngame.config import Config
from ngame.data.self_pairs import drop_self_pairs
from ngame.demo.see_also import see_also_dataset

sys.path.append(str(Path(__file__).resolve().parent.parent))
from conftest import Peer
from negatives import read, spread

METRICS = ("P@1", "P@3", "P@5", "PSP@1", "R@10", "R@100")
BASELINE = "XR-Linear"


def main() -> None:
    """Make the runs that are missing, or print the table of those there are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="*", help="data sets with test points")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peers", metavar="PYTHON", help="run the baseline, by this interpreter")
    parser.add_argument("-o", "--output", default="baseline.jsonl", metavar="FILE")
    parser.add_argument("--table", metavar="FILE", help="print the runs of FILE as Markdown")
    options = parser.parse_args()
    if options.table:
        print(table(read(options.table)))
        return
    for path in options.data:
        # A folder, or the demo's data.
        dataset = see_also_dataset() if path == "demo" else ngame.load_dataset(path)
        dataset, _ = drop_self_pairs(dataset)
        for seed in [None] if options.peers else options.seeds:
            cell = {"data": dataset.name, "settings": sorted(options.set), "seed": seed}
            if seed is None:
                cell["settings"] = []
            if any(run.items() >= cell.items() for run in read(options.output)):
                continue
            begun = time.process_time()
            if seed is None:
                scores = {BASELINE: xr_linear(dataset, options.peers, options.threads)}
            else:
                scores = train(dataset, [*options.set, f"seed={seed}"], options.threads)
            run = {**cell, "seconds": round(time.process_time() - begun, 1), "scores": scores}
            with open(options.output, "a", encoding="utf8") as file:
                file.write(json.dumps(run) + "\n")
            print(json.dumps(run), file=sys.stderr)


def train(dataset: ngame.Dataset, sets: list[str], threads: int) -> dict[str, dict[str, float]]:
    """Scores of every scorer of one run."""
    points, labels = dataset.train_labels.shape
    config = Config.load(sets=[*sets, f"threads={threads}"], points=points, labels=labels)
    model = ngame.train(dataset, config)
    return {name: {key: found[key] for key in METRICS} for name, found in model.metrics.items()}


def xr_linear(dataset: ngame.Dataset, python: str, threads: int) -> dict[str, float]:
    """Scores of PECOS."""
    words = TfidfVectorizer(
        ngram_range=(1, 2), min_df=2, sublinear_tf=True, dtype="float32", max_features=500_000
    )
    x = words.fit_transform(text[:2000] for text in dataset.train_texts)
    x_test = words.transform(text[:2000] for text in dataset.test_texts)
    y = sp.csr_matrix(dataset.train_labels, dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"x": x, "y": y, "x_test": x_test, "k": 100}
        peer = Peer(python, Path(folder), "pecos_xr_linear", threads, arguments)
        peer.load()
        peer()
        found = peer.result()
        peer.close()
    predicted = sp.csr_matrix(
        (found["data"], found["indices"], found["offsets"]), dataset.test_labels.shape
    )
    inverse = ngame.metrics.inverse_propensity(dataset.train_labels)
    options = {"drop": dataset.drop_test, "inverse_propensity": inverse}
    scored = ngame.metrics.evaluate(
        predicted, dataset.test_labels, ks=[1, 3, 5, 10, 100], **options
    )
    return {key: scored[key] for key in METRICS}


def table(runs: list[dict[str, Any]]) -> str:
    """Mean ± sample standard deviation over the seeds, as a Markdown table."""
    cells = defaultdict(list)
    for run in runs:
        for scorer, scores in run["scores"].items():
            cells[run["data"], ", ".join(run["settings"]), scorer].append((scores, run["seconds"]))
    found = {cell: {key: mean(same, key) for key in METRICS} for cell, same in cells.items()}
    lines = [
        f"| data | settings | by | runs | {' | '.join(METRICS)} | seconds |",
        "|---|---|---|---:|" + "---:|" * (len(METRICS) + 1),
    ]
    for (data, settings, scorer), same in cells.items():
        values = [spread([100 * scores[key] for scores, _ in same], 2) for key in METRICS]
        seconds = f"{statistics.mean(each for _, each in same):.0f}" if scorer == "fused" else ""
        row = [data, settings, scorer, str(len(same)), *values, seconds]
        lines.append(f"| {' | '.join(row)} |")
        if scorer == "fused":
            others = [
                those
                for cell, those in found.items()
                if cell[0] == data and cell[2] != "fused" and cell[1] in ("", settings)
            ]
            own = found[data, settings, scorer]
            best = {key: max(those[key] for those in others) for key in METRICS}
            ahead = [f"{100 * (own[key] - best[key]):+.2f}" for key in METRICS]
            row = [data, settings, "*fused, ahead of the best other*", "", *ahead, ""]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def mean(same: list[Any], key: str) -> float:
    """Mean of a metric over runs."""
    return statistics.mean(scores[key] for scores, _ in same)


if __name__ == "__main__":
    main()

"""NGAME batches against plain random ones: the same encoder and the same steps, on real data.

Only the encoder stage is trained, and only the encoder is scored, on the test points. A run is one
line of JSON. Runs that are in the output file already are skipped, so a long measurement can be
made in pieces. Two commands make a table::

    python bench/studies/ngame_vs_random.py DATA --epochs 5 --cluster-size 1 8 -o runs.jsonl
    python bench/studies/ngame_vs_random.py --table runs.jsonl

Runs of one batch size take the same number of steps; runs of different batch sizes see the same
number of points. Settings are the plain defaults of `ngame.config.Config`, not those for the
size of the data, except for what ``--set`` gives.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import ngame
from ngame import metrics
from ngame.config import Config

# What identifies a run; what is measured of it: name, factor for the table, decimals.
KEYS = ("data", "batch_size", "cluster_size", "seed", "epochs", "settings")
MEASURED = (
    ("P@1", 100, 2),
    ("P@5", 100, 2),
    ("R@100", 100, 2),
    ("hard_negative_recall", 1, 3),
    ("seconds", 1, 0),
)


def main() -> None:
    """Make the runs that are missing, or print the table of those there are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="?", help="data set with test points")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024], metavar="S")
    parser.add_argument(
        "--cluster-size", type=int, nargs="+", default=[1, 8], metavar="C", help="1: random"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. SEEDS - 1")
    parser.add_argument("--epochs", type=int, default=5, help="the first one is always random")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("-o", "--output", default="ngame_vs_random.jsonl", metavar="FILE")
    parser.add_argument("--table", metavar="FILE", help="print the runs of FILE as Markdown")
    options = parser.parse_args()
    if options.table:
        print(table(read(options.table)))
        return
    if not options.data:
        parser.error("DATA is missing")
    done = {key(run) for run in read(options.output)}
    dataset = ngame.load_dataset(options.data)
    cells = itertools.product(range(options.seeds), options.sizes, options.cluster_size)
    for seed, batch_size, cluster_size in cells:
        cell = {
            "data": dataset.name,
            "batch_size": batch_size,
            "cluster_size": cluster_size,
            "seed": seed,
            "epochs": options.epochs,
            "settings": sorted(options.set),
        }
        if key(cell) in done:
            continue
        run = {**cell, "threads": options.threads, **measure(dataset, cell, options.threads)}
        with open(options.output, "a", encoding="utf8") as file:
            file.write(json.dumps(run) + "\n")
        print(json.dumps(run), file=sys.stderr)


def measure(dataset: ngame.Dataset, cell: dict[str, Any], threads: int) -> dict[str, float]:
    """Train one encoder and score the test points: fractions, and seconds of training."""
    if dataset.test_texts is None:
        raise ValueError(f"{dataset.name} has no test points")
    config = Config.load(
        sets=[
            *cell["settings"],
            f"seed={cell['seed']}",
            f"threads={threads}",
            f"encoder_stage.epochs={cell['epochs']}",
            f"encoder_stage.batch_size={cell['batch_size']}",
            f"encoder_stage.cluster_size={cell['cluster_size']}",
            "classifier_stage.epochs=0",
            "checkpoint_minutes=1e9",
        ]
    )
    model, log = trained(dataset, config)
    found = ngame.topk(
        model.encode(dataset.test_texts),
        model.label_vectors,
        min(100, len(dataset.label_texts)),
        metric="dot",
        drop=dataset.drop_test,
        threads=threads,
    )
    scored = metrics.evaluate(
        found, dataset.test_labels, ks=[1, 5, 100], drop=dataset.drop_test, threads=threads
    )
    return {
        **{name: scored[name] for name in ("P@1", "P@5", "R@100")},
        "hard_negative_recall": log[-1]["hard_negative_recall"],
        "seconds": round(sum(epoch["seconds"] for epoch in log), 1),
    }


def trained(dataset: ngame.Dataset, config: Config) -> tuple[ngame.Model, list[dict[str, Any]]]:
    """Train without test points, which `train` would score by every scorer: model and log."""
    training = ngame.Dataset(
        dataset.train_texts,
        dataset.train_labels,
        dataset.label_texts,
        drop_train=dataset.drop_train,
    )
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "run"
        model = ngame.train(training, config, folder=folder)
        return model, read(folder / "log.jsonl")


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and sample standard deviation over the seeds of each cell, as a Markdown table."""
    cells = defaultdict(list)
    for run in runs:
        name = run["data"], run["epochs"], ", ".join(run["settings"])
        cells[*name, run["batch_size"], run["cluster_size"]].append(run)
    lines = [
        "| data | epochs | settings | batch | batches | seeds | P@1 | P@5 | R@100 "
        "| hard-negative recall | seconds |",
        "|---|" + "---:|" * 10,
    ]
    for (data, epochs, settings, batch_size, cluster_size), same in sorted(cells.items()):
        batches = "random" if cluster_size == 1 else f"clusters of {cluster_size}"
        values = [
            spread([run[name] * factor for run in same], decimals)
            for name, factor, decimals in MEASURED
        ]
        row = [data, epochs, settings or "defaults", batch_size, batches, len(same), *values]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def spread(values: list[float], decimals: int) -> str:
    """Mean ± sample standard deviation; of a single value the value alone."""
    mean = f"{statistics.mean(values):.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else mean


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; none if there is no file yet."""
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf8").splitlines()]


def key(run: dict[str, Any]) -> str:
    """What tells one run from another."""
    return json.dumps([run[name] for name in KEYS])


if __name__ == "__main__":
    main()

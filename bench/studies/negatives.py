"""When do which batches pay? Random or clustered ones, with labels drawn at random or without.

Only the encoder stage is trained, and its scores alone are measured, on the test points. A run is
one line of JSON; runs that the output file already holds are skipped, so that a long measurement
can be made in pieces. Two commands make a table::

    python bench/studies/negatives.py DATA ... --batches random tree refined -o runs.jsonl
    python bench/studies/negatives.py --table runs.jsonl

Runs of one batch size take the same number of steps; runs of different batch sizes see the same
number of points. With ``--seconds S`` they get the same time instead: as many whole epochs as took
S seconds in the runs of a number of epochs that the output file holds of the same cell. Seconds are
the processor's, and threads add up; where there is a GPU, those of the clock.

Batches are random; or whole clusters, from the second epoch on: those of the tree alone, or
refined. Settings are the plain defaults of `ngame.config.Config`, whatever the size of the data,
but for those that ``--set`` gives. For a knowledge graph, take a folder that ``head_entities.py``
made.
"""

import argparse
import inspect
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from scipy.sparse import csr_matrix

import ngame
from ngame import metrics
from ngame.config import Config

# What names a run, and what is measured of it: name, factor for the table, decimals.
CELL = ("data", "batch_size", "batches", "random_labels", "seed", "settings")
KEYS = (*CELL, "epochs", "budget")
MEASURED = (
    ("P@1", 100, 2),
    ("P@5", 100, 2),
    ("R@10", 100, 2),
    ("R@100", 100, 2),
    ("hard_negative_recall", 1, 3),
    ("seconds", 1, 0),
)


def main() -> None:
    """Make the runs that are missing, or print the table of those there are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="*", help="data sets with test points")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024], metavar="S")
    parser.add_argument(
        "--batches",
        nargs="+",
        default=["random", "tree"],
        choices=["random", "tree", "refined"],
    )
    parser.add_argument("--cluster-size", type=int, default=32, metavar="C")
    parser.add_argument(
        "--random-labels", type=int, nargs="+", default=[0], metavar="M", help="0: none"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--epochs", type=int, default=4, help="the first one is always random")
    parser.add_argument("--seconds", type=float, help="time of each run, instead of epochs")
    parser.add_argument("--points", type=int, metavar="N", help="training and test points at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("-o", "--output", default="negatives.jsonl", metavar="FILE")
    parser.add_argument("--table", metavar="FILE", help="print the runs of FILE as Markdown")
    options = parser.parse_args()
    if options.table:
        print(table(read(options.table)))
        return
    if not options.data:
        parser.error("DATA is missing")
    refines = "refine" in inspect.signature(ngame.balanced_clusters).parameters
    if "refined" in options.batches and not refines:
        parser.error("this version of ngame does not refine clusters")
    for data in options.data:
        dataset = ngame.load_dataset(data)
        if dataset.test_texts is None:
            raise SystemExit(f"{dataset.name} has no test points")
        if options.points:
            dataset = part(dataset, options.points)
        for seed, batch_size, batches, random_labels in itertools.product(
            options.seeds, options.sizes, options.batches, options.random_labels
        ):
            cell = {
                "data": dataset.name,
                "batch_size": batch_size,
                "batches": "random" if batches == "random" else f"{batches} {options.cluster_size}",
                "random_labels": random_labels,
                "seed": seed,
                "settings": sorted(options.set),
            }
            done = read(options.output)
            epochs = options.epochs
            if options.seconds:
                epochs = epochs_within(options.seconds, cell, done)
            cell |= {"epochs": epochs, "budget": options.seconds}
            if name(cell, KEYS) in {name(run, KEYS) for run in done}:
                continue
            # Without refinement in this version, its clusters are those of the tree.
            how = {"refine": 0} if batches == "tree" and refines else {}
            clustered = partial(ngame.balanced_clusters, **how)
            # A busy machine does not change the processor seconds of a run on one thread. A GPU
            # works beside the processor.
            on_gpu = torch.cuda.is_available()
            clock = SimpleNamespace(monotonic=time.monotonic if on_gpu else time.process_time)
            with (
                mock.patch("ngame.batches.clusters.balanced_clusters", clustered),
                mock.patch("ngame.batches.timer.time", clock),
            ):
                measured = measure(dataset, cell, options.cluster_size, options.threads)
            run = {**cell, "threads": options.threads, **measured}
            with open(options.output, "a", encoding="utf8") as file:
                file.write(json.dumps(run) + "\n")
            print(json.dumps(run), file=sys.stderr)


def part(dataset: ngame.Dataset, points: int) -> ngame.Dataset:
    """The data with at most so many training points and test points, the same ones in every run."""
    rng = np.random.default_rng(0)

    def drawn(texts: list[str], labels: csr_matrix, pairs: Any) -> tuple[Any, ...]:
        rows = np.sort(rng.permutation(len(texts))[:points])
        if pairs is not None:  # their rows are counted anew
            pairs = pairs[np.isin(pairs[:, 0], rows)]
            pairs = np.column_stack([np.searchsorted(rows, pairs[:, 0]), pairs[:, 1]])
        return [texts[row] for row in rows], labels[rows], pairs

    train = drawn(dataset.train_texts, dataset.train_labels, dataset.drop_train)
    test = drawn(dataset.test_texts, dataset.test_labels, dataset.drop_test)
    return ngame.Dataset(
        *train[:2],
        dataset.label_texts,
        test_texts=test[0],
        test_labels=test[1],
        drop_train=train[2],
        drop_test=test[2],
        name=f"{dataset.name}, {points:,} points",
    )


def epochs_within(seconds: float, cell: dict[str, Any], done: list[dict[str, Any]]) -> int:
    """Whole epochs that a cell gets in that time, by what its runs of given epochs took."""
    same = [run for run in done if name(run, CELL) == name(cell, CELL) and not run["budget"]]
    if not same:
        raise SystemExit(f"--seconds needs a run with --epochs of {cell} first")
    return max(1, round(seconds * same[-1]["epochs"] / same[-1]["seconds"]))


def measure(
    dataset: ngame.Dataset, cell: dict[str, Any], cluster_size: int, threads: int
) -> dict[str, float]:
    """Train one encoder and score the test points; fractions, and processor seconds of training."""
    config = Config.load(
        sets=[
            *cell["settings"],
            f"seed={cell['seed']}",
            f"threads={threads}",
            f"encoder_stage.epochs={cell['epochs']}",
            f"encoder_stage.batch_size={cell['batch_size']}",
            f"encoder_stage.random_labels={cell['random_labels']}",
            f"encoder_stage.cluster_size={1 if cell['batches'] == 'random' else cluster_size}",
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
        found, dataset.test_labels, ks=[1, 5, 10, 100], drop=dataset.drop_test, threads=threads
    )
    return {
        **{key: scored[key] for key in ("P@1", "P@5", "R@10", "R@100")},
        "hard_negative_recall": log[-1]["hard_negative_recall"],
        "seconds": round(sum(epoch["seconds"] for epoch in log), 1),
    }


def trained(dataset: ngame.Dataset, config: Config) -> tuple[ngame.Model, list[dict[str, Any]]]:
    """Train on all but the test points, on which `train` would try every scorer; model and log."""
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
        budget = f"{run['budget']:g} s" if run["budget"] else f"{run['epochs']} epochs"
        place = run["data"], budget, ", ".join(run["settings"]) or "defaults", run["batch_size"]
        cells[*place, run["random_labels"], run["batches"]].append(run)
    lines = [
        "| data | training | settings | batch | random labels | batches | seeds | P@1 | P@5 "
        "| R@10 | R@100 | hard-negative recall | seconds |",
        "|---|---|---|---:|---:|---|" + "---:|" * 7,
    ]
    for cell, same in sorted(cells.items()):
        values = [
            spread([run[key] * factor for run in same], decimals)
            for key, factor, decimals in MEASURED
        ]
        lines.append(f"| {' | '.join(map(str, (*cell, len(same), *values)))} |")
    return "\n".join(lines)


def spread(values: list[float], decimals: int) -> str:
    """Mean ± sample standard deviation; the mean alone of a single value."""
    mean = f"{statistics.mean(values):.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else mean


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; none if there is no file yet."""
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf8").splitlines()]


def name(run: dict[str, Any], keys: tuple[str, ...]) -> str:
    """What tells one run, or one cell, from another."""
    return json.dumps([run[key] for key in keys])


if __name__ == "__main__":
    main()

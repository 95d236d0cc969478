"""NGAME batches in the trainer of sentence-transformers against the trainer's own batches.

All have the same model, pairs and number of steps; the test points are scored. `default` and
`no_duplicates` are the trainer's, with its MultipleNegativesRankingLoss. `ngame` has clusters from
the first epoch on, refreshed every epoch, and masks known positives. `masked` has the default
batches with that mask, which separates the two effects. `shared` and `masked_shared` are these two
with labels drawn at random for each step, as negatives of all rows (`--random-labels`). A run is
one line of JSON. Runs that are in the output file already are skipped. Two commands make a table::

    python bench/studies/sentence_transformers_batches.py DATA MODEL -o runs.jsonl
    python bench/studies/sentence_transformers_batches.py --table runs.jsonl

A subset of the training pairs may be taken (`--pairs`), the same for all batches of one seed.
Seconds are the processor's; with ``--device cuda``, where training is in bfloat16, the clock's.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from datasets import Dataset  # type: ignore[import-untyped]
from negatives import read, spread
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import ngame
from ngame.adapters.sentence_transformers import (
    BatchSamplerFactory,
    MaskedMultipleNegativesRankingLoss,
    RefreshCallback,
    SharedTexts,
)

CLUSTERED, SHARED = ("ngame", "shared"), ("masked_shared", "shared")
MASKED = ("masked", "ngame", *SHARED)
BATCHES = ("default", "no_duplicates", *MASKED)
# What identifies a run; what is measured of it: name, factor for the table, decimals.
SETTINGS = ("data", "device", "pairs", "batch_size", "cluster_size", "epochs", "max_length")
KEYS = (*SETTINGS, "batches", "random_labels", "seed")
# What runs lack that were made before there was a choice.
ONCE = {"device": "cpu", "random_labels": 0}
MEASURED = (
    ("P@1", 100, 2),
    ("R@10", 100, 2),
    ("R@100", 100, 2),
    ("hard_negative_recall", 1, 3),
    ("seconds", 1, 0),
)
NEAREST = 10


def main() -> None:
    """Make the runs that are missing, or print the table of those there are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="?", help="data set with test points")
    parser.add_argument("model", nargs="?", help="folder or name of the model to begin with")
    parser.add_argument("--batches", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. SEEDS - 1")
    parser.add_argument("--pairs", type=int, default=2048, help="training pairs, at most")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--cluster-size", type=int, default=8)
    parser.add_argument(
        "--random-labels", type=int, default=512, metavar="M", help="labels drawn for a step"
    )
    parser.add_argument("--max-length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", default="sentence_transformers.jsonl", metavar="FILE")
    parser.add_argument("--table", metavar="FILE", help="print the runs of FILE as Markdown")
    options = parser.parse_args()
    if options.table:
        print(table(runs(options.table)))
        return
    if not options.data or not options.model:
        parser.error("DATA or MODEL is missing")
    torch.set_num_threads(options.threads)
    dataset = ngame.load_dataset(options.data)
    done = {tuple(run[name] for name in KEYS) for run in runs(options.output)}
    for seed, batches in itertools.product(range(options.seeds), options.batches):
        cell = {name: value for name, value in vars(options).items() if name in KEYS}
        cell |= {"data": dataset.name, "batches": batches, "seed": seed}
        if batches not in SHARED:
            cell["random_labels"] = 0
        if tuple(cell[name] for name in KEYS) in done:
            continue
        run = {**cell, "threads": options.threads, **measure(dataset, options.model, cell)}
        with open(options.output, "a", encoding="utf8") as file:
            file.write(json.dumps(run) + "\n")
        print(json.dumps(run), file=sys.stderr)


def runs(path: str) -> list[dict[str, Any]]:
    """The runs of a file, those of earlier versions too."""
    return [{**ONCE, **run} for run in read(path)]


def measure(data: ngame.Dataset, name: str, cell: dict[str, Any]) -> dict[str, float]:
    """Train one model, score the test points with it: fractions, and seconds of training."""
    points, labels = data.train_labels.nonzero()
    rng = np.random.default_rng(cell["seed"])
    chosen = rng.permutation(len(points))[: cell["pairs"]]
    points, labels = points[chosen], labels[chosen]
    masked, clusters = cell["batches"] in MASKED, cell["batches"] in CLUSTERED
    on_gpu = cell["device"] == "cuda"
    ids = np.stack([points, labels], axis=1) if masked else np.arange(len(chosen))
    pairs = Dataset.from_dict(
        {
            "anchor": [data.train_texts[point] for point in points],
            "positive": [data.label_texts[label] for label in labels],
            "label": ids.tolist(),
        }
    )
    torch.manual_seed(cell["seed"])
    model = SentenceTransformer(name, device=cell["device"]).float()  # the weights may be halves
    model.max_seq_length = cell["max_length"]
    if masked:
        drawn = []
        if cell["random_labels"]:
            drawn = [SharedTexts(data.label_texts, cell["random_labels"], seed=cell["seed"])]
        loss: torch.nn.Module = MaskedMultipleNegativesRankingLoss(
            model, data.train_labels, sources=drawn
        )
    else:
        loss = MultipleNegativesRankingLoss(model)
    seen: list[list[Any]] = []
    loss.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].tolist()))
    batches: Any = "no_duplicates" if cell["batches"] == "no_duplicates" else "batch_sampler"
    if clusters:
        batches = BatchSamplerFactory(
            pairs,
            cluster_size=cell["cluster_size"],
            start_epoch=0,
            keys=points,  # no point twice in a batch
            seed=cell["seed"],
        )
    with tempfile.TemporaryDirectory() as folder:
        args = SentenceTransformerTrainingArguments(
            folder,
            num_train_epochs=cell["epochs"],
            per_device_train_batch_size=cell["batch_size"],
            dataloader_drop_last=True,
            learning_rate=5e-5,
            warmup_steps=0.1,
            batch_sampler=batches,
            seed=cell["seed"],
            use_cpu=not on_gpu,
            bf16=on_gpu,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SentenceTransformerTrainer(
            model,
            args,
            train_dataset=pairs,
            loss=loss,
            callbacks=[RefreshCallback()] if clusters else [],
        )
        # A GPU works beside the processor.
        clock = time.perf_counter if on_gpu else time.process_time
        start = clock()
        trainer.train()
        seconds = clock() - start
    steps = len(seen) // cell["epochs"]
    last = [np.array(batch) for batch in seen[-steps:]]
    if not masked:
        last = [np.stack([points[batch], labels[batch]], axis=1) for batch in last]
    label_vectors = model.encode(data.label_texts, show_progress_bar=False)
    found = ngame.topk(
        model.encode(data.test_texts, show_progress_bar=False),
        label_vectors,
        100,
        drop=data.drop_test,
    )
    scored = ngame.metrics.evaluate(found, data.test_labels, ks=[1, 10, 100], drop=data.drop_test)
    return {
        **{name: scored[name] for name in ("P@1", "R@10", "R@100")},
        "hard_negative_recall": recall(data, model, label_vectors, last),
        "steps": len(seen),
        "seconds": round(seconds, 1),
    }


def recall(data: ngame.Dataset, model: SentenceTransformer, label_vectors: Any, last: Any) -> float:
    """Of each point's nearest labels that are not its positives, the share in its batch.

    Measured with the final model over `last`, the batches of the last epoch as (point, label)
    pairs. Only the labels of these pairs count, since no batch can hold others. Labels drawn at
    random are not taken as part of the batch.
    """
    points, labels = (np.unique(side) for side in np.concatenate(last).T)
    _, nearest = ngame.topk_arrays(
        model.encode([data.train_texts[point] for point in points], show_progress_bar=False),
        label_vectors[labels],
        NEAREST,
        drop=np.stack(data.train_labels[points][:, labels].nonzero(), axis=1),
    )
    shares = [
        np.isin(labels[nearest[np.searchsorted(points, batch[:, 0])]], batch[:, 1]).mean(axis=1)
        for batch in last
    ]
    return float(np.concatenate(shares).mean())


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and sample standard deviation over the seeds of each cell, as a Markdown table."""
    cells = defaultdict(list)
    for run in runs:
        cells[tuple(run[name] for name in KEYS[:-1])].append(run)
    lines = [
        "| data | device | pairs | batch size | epochs | steps | batches | random labels | seeds "
        "| P@1 | R@10 | R@100 | hard-negative recall | seconds |",
        "|---|---|---:|---:|---:|---:|---|" + "---:|" * 7,
    ]
    for cell, same in cells.items():
        data, device, pairs, batch_size, cluster_size, epochs, _, batches, random_labels = cell
        values = [
            spread([run[name] * factor for run in same], decimals)
            for name, factor, decimals in MEASURED
        ]
        steps = "/".join(map(str, sorted({run["steps"] for run in same})))
        kind = "masked" if batches in MASKED else batches
        if batches in CLUSTERED:
            kind = f"clusters of {cluster_size}, masked"
        row = [data, device, pairs, batch_size, epochs, steps, kind, random_labels, len(same)]
        row += values
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

"""NGAME batches in the trainer of sentence-transformers against the trainer's own batches.

All have the same model, pairs and number of steps; the test points are scored. `default` and
`no_duplicates` are the trainer's, with its MultipleNegativesRankingLoss. `ngame` has clusters from
the first epoch on, refreshed every epoch, and masks known positives. `masked` has the default
batches with that mask, which separates the two effects. A run is one line of JSON. Runs that are in
the output file already are skipped. Two commands make a table::

    python bench/studies/sentence_transformers_batches.py DATA MODEL -o runs.jsonl
    python bench/studies/sentence_transformers_batches.py --table runs.jsonl

A subset of the training pairs may be taken (`--pairs`), the same for all batches of one seed.
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
from datasets import Dataset
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
)

BATCHES = ("default", "no_duplicates", "masked", "ngame")
# What identifies a run; what is measured of it: name, factor for the table, decimals.
KEYS = ("data", "pairs", "batch_size", "cluster_size", "epochs", "max_length", "batches", "seed")
MEASURED = (("R@10", 100, 2), ("P@1", 100, 2), ("hard_negative_recall", 1, 3), ("seconds", 1, 0))
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
    parser.add_argument("--max-length", type=int, default=32, help="tokens of a text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", default="sentence_transformers.jsonl", metavar="FILE")
    parser.add_argument("--table", metavar="FILE", help="print the runs of FILE as Markdown")
    options = parser.parse_args()
    if options.table:
        print(table(read(options.table)))
        return
    if not options.data or not options.model:
        parser.error("DATA or MODEL is missing")
    torch.set_num_threads(options.threads)
    dataset = ngame.load_dataset(options.data)
    done = {tuple(run[name] for name in KEYS) for run in read(options.output)}
    for seed, batches in itertools.product(range(options.seeds), options.batches):
        cell = {name: value for name, value in vars(options).items() if name in KEYS}
        cell |= {"data": dataset.name, "batches": batches, "seed": seed}
        if tuple(cell[name] for name in KEYS) in done:
            continue
        run = {**cell, "threads": options.threads, **measure(dataset, options.model, cell)}
        with open(options.output, "a", encoding="utf8") as file:
            file.write(json.dumps(run) + "\n")
        print(json.dumps(run), file=sys.stderr)


def measure(data: ngame.Dataset, name: str, cell: dict[str, Any]) -> dict[str, float]:
    """Train one model, score the test points with it: fractions, processor seconds of training."""
    points, labels = data.train_labels.nonzero()
    rng = np.random.default_rng(cell["seed"])
    chosen = rng.permutation(len(points))[: cell["pairs"]]
    points, labels = points[chosen], labels[chosen]
    masked = cell["batches"] in ("masked", "ngame")
    ids = np.stack([points, labels], axis=1) if masked else np.arange(len(chosen))
    pairs = Dataset.from_dict(
        {
            "anchor": [data.train_texts[point] for point in points],
            "positive": [data.label_texts[label] for label in labels],
            "label": ids.tolist(),
        }
    )
    torch.manual_seed(cell["seed"])
    model = SentenceTransformer(name, device="cpu")
    model.max_seq_length = cell["max_length"]
    if masked:
        loss: torch.nn.Module = MaskedMultipleNegativesRankingLoss(model, data.train_labels)
    else:
        loss = MultipleNegativesRankingLoss(model)
    seen: list[list[Any]] = []
    loss.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].tolist()))
    clusters = cell["batches"] == "ngame"
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
            use_cpu=True,
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
        start = time.process_time()
        trainer.train()
        seconds = time.process_time() - start
    steps = len(seen) // cell["epochs"]
    last = [np.array(batch) for batch in seen[-steps:]]
    if not masked:
        last = [np.stack([points[batch], labels[batch]], axis=1) for batch in last]
    label_vectors = model.encode(data.label_texts, show_progress_bar=False)
    found = ngame.topk(
        model.encode(data.test_texts, show_progress_bar=False),
        label_vectors,
        10,
        drop=data.drop_test,
    )
    scored = ngame.metrics.evaluate(found, data.test_labels, ks=[1, 10], drop=data.drop_test)
    return {
        "R@10": scored["R@10"],
        "P@1": scored["P@1"],
        "hard_negative_recall": recall(data, model, label_vectors, last),
        "steps": len(seen),
        "seconds": round(seconds, 1),
    }


def recall(data: ngame.Dataset, model: SentenceTransformer, label_vectors: Any, last: Any) -> float:
    """Of each point's nearest labels that are not its positives, the share in its batch.

    Measured with the final model over `last`, the batches of the last epoch as (point, label)
    pairs. Only the labels of these pairs count, since no batch can hold others.
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
        "| data | pairs | batch size | epochs | steps | batches | seeds | R@10 | P@1 "
        "| hard-negative recall | seconds |",
        "|---|---:|---:|---:|---:|---|" + "---:|" * 5,
    ]
    for (data, pairs, batch_size, cluster_size, epochs, _, batches), same in cells.items():
        values = [
            spread([run[name] * factor for run in same], decimals)
            for name, factor, decimals in MEASURED
        ]
        steps = "/".join(map(str, sorted({run["steps"] for run in same})))
        kind = f"clusters of {cluster_size}, masked" if batches == "ngame" else batches
        row = [data, pairs, batch_size, epochs, steps, kind, len(same), *values]
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

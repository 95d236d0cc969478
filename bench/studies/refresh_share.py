"""What a refresh of the batches costs, as a share of its epoch, in processor seconds.

``train`` trains the encoder stage as `ngame train` does; ``trainer`` trains MODEL in the trainer of
sentence-transformers. Each trains twice: once the clustered vectors come from the bank that
training fills, once from a fresh encoding pass. It prints a line of Markdown for each::

    python bench/studies/refresh_share.py train DATA --set encoder_stage.cluster_size=8
    python bench/studies/refresh_share.py trainer DATA MODEL

An epoch consists of its refresh, its batches and updates, and in ``train``, where it is scored, of
measuring: NN10 of the clusters, and the scores of the held-out points. The first epoch has no
refresh and is left out.
"""

import argparse
import os
import tempfile
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from datasets import Dataset
from negatives import trained
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

import ngame
from ngame.adapters.sentence_transformers import (
    BatchSamplerFactory,
    MaskedMultipleNegativesRankingLoss,
    RefreshCallback,
)
from ngame.config import Config


def main() -> None:
    """Print the table's head and a line for each source of the vectors."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    train, trainer = kinds.add_parser("train"), kinds.add_parser("trainer")
    for kind in (train, trainer):
        kind.add_argument("data", help="data set")
        kind.add_argument("--epochs", type=int, default=4)
        kind.add_argument("--threads", type=int, default=1)
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    trainer.add_argument("model", help="folder or name of the model to begin with")
    trainer.add_argument("--pairs", type=int, default=2048, help="training pairs, at most")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset = ngame.load_dataset(options.data)
    print("| data | by | vectors | epoch, s | refresh, s | share | measuring, s |")
    print("|---|---|---|---:|---:|---:|---:|")
    # Processor time, because the clocks of the loops also count other work on the machine.
    clock = SimpleNamespace(monotonic=time.process_time)
    with (
        mock.patch("ngame.batches.timer.time", clock),
        mock.patch("ngame.training.stage.time", clock),
    ):
        for vectors in ("bank", "fresh"):
            if options.kind == "train":
                epochs = by_train(dataset, vectors, options)
            else:
                epochs = by_trainer(dataset, vectors, options)
            seconds, refresh, measuring = np.mean(epochs[1:], axis=0)
            row = [dataset.name, options.kind, vectors, f"{seconds:.1f}", f"{refresh:.2f}"]
            row += [f"{100 * refresh / seconds:.1f} %", f"{measuring:.2f}"]
            print(f"| {' | '.join(row)} |", flush=True)


def by_train(
    dataset: ngame.Dataset, vectors: str, options: argparse.Namespace
) -> list[tuple[float, float, float]]:
    """Seconds of each epoch of the encoder stage, of its refresh and of measuring."""
    points, labels = dataset.train_labels.shape
    config = Config.load(
        sets=[
            *options.set,
            f"threads={options.threads}",
            f"encoder_stage.epochs={options.epochs}",
            f'encoder_stage.embeddings="{vectors}"',
            "classifier_stage.epochs=0",
            "checkpoint_minutes=1e9",
        ],
        points=points,
        labels=labels,
    )
    _, log = trained(dataset, config)
    return [
        (epoch["seconds"], epoch["seconds"] * epoch["refresh_share"], epoch["measure_seconds"])
        for epoch in log
    ]


class Timed(RefreshCallback):
    """The callback, with the seconds of each epoch and of its refresh."""

    def __init__(self, bank: ngame.EmbeddingBank | None) -> None:
        super().__init__(bank=bank)
        self.timer = ngame.RefreshTimer()
        self.epochs: list[tuple[float, float, float]] = []

    def on_epoch_begin(self, *arguments: Any, **kwargs: Any) -> None:
        self.timer.start_epoch()
        with self.timer:
            super().on_epoch_begin(*arguments, **kwargs)

    def on_epoch_end(self, *arguments: Any, **kwargs: Any) -> None:
        self.epochs.append((self.timer.seconds, self.timer.refresh_seconds, 0.0))


def by_trainer(
    dataset: ngame.Dataset, vectors: str, options: argparse.Namespace
) -> list[tuple[float, float, float]]:
    """Seconds of each epoch in the trainer of sentence-transformers, of its refresh, and 0."""
    points, labels = dataset.train_labels.nonzero()
    chosen = np.random.default_rng(0).permutation(len(points))[: options.pairs]
    points, labels = points[chosen], labels[chosen]
    pairs = Dataset.from_dict(
        {
            "anchor": [dataset.train_texts[point] for point in points],
            "positive": [dataset.label_texts[label] for label in labels],
            "label": np.stack([points, labels], axis=1).tolist(),
        }
    )
    torch.manual_seed(0)
    model = SentenceTransformer(options.model, device="cpu")
    model.max_seq_length = 32
    width = model.encode("width").shape[0]
    bank = ngame.EmbeddingBank(len(dataset.train_texts), width) if vectors == "bank" else None
    timed = Timed(bank)
    with tempfile.TemporaryDirectory() as folder:
        args = SentenceTransformerTrainingArguments(
            folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            batch_sampler=BatchSamplerFactory(pairs, cluster_size=8, threads=options.threads),
            use_cpu=True,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        SentenceTransformerTrainer(
            model,
            args,
            train_dataset=pairs,
            loss=MaskedMultipleNegativesRankingLoss(model, dataset.train_labels, bank=bank),
            callbacks=[timed],
        ).train()
    return timed.epochs


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()

"""A run: its folder, its data split and tokenized, its encoder."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from ngame.arrays import as_pairs
from ngame.config import Config, EncoderConfig
from ngame.data.dataset import Dataset
from ngame.data.tokens import Tokens
from ngame.encoders.bag import BagEncoder
from ngame.encoders.vectors import core_device, torch_device
from ngame.files import atomic_folder, atomic_write, remove_leftovers, write_json
from ngame.prediction.hnsw import require_hnswlib
from ngame.prediction.model import load_encoder
from ngame.training.checkpoint import Checkpoint

# First words of the seeds of a run: the random streams of its parts have nothing in common.
HELD_OUT, ENCODER, CLASSIFIER = range(3)


class Truth(NamedTuple):
    """What is relevant to each of n points: csr [n, L] both."""

    targets: sp.csr_matrix
    """What training ranks up."""
    known: sp.csr_matrix
    """What is never a negative: the targets, and the pairs that are left out."""

    @property
    def left_out(self) -> sp.csr_matrix:
        """The pairs that are left out."""
        pairs = sp.csr_matrix(self.known - self.targets)
        pairs.eliminate_zeros()
        return pairs


@dataclass(frozen=True, slots=True)
class Points:
    """Points of a run: their texts as tokens, and their truth."""

    tokens: Tokens
    truth: Truth


class Run:
    """The parts that both stages share: data, encoder, checkpoint, log.

    Attributes
    ----------
    device : where the encoder and the classifier are trained
    core : where their vectors are clustered and searched (see `ngame.encoders.vectors.core_device`)
    """

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        folder: Path | None,
        resume: bool,
        encoder: torch.nn.Module | None,
    ) -> None:
        self.dataset = dataset
        self.config = config
        self.folder = folder
        self.device = torch_device(config.device)
        self.core = core_device(self.device, config.prediction.search)
        if config.prediction.search == "hnsw":
            require_hnswlib()
        truth = truth_of(dataset.train_labels, dataset.drop_train)
        trained, held_out = hold_out(truth, config)
        # Only now: what is wrong with settings or data leaves no folder behind.
        if folder is not None:
            _claim(folder, config, dataset, resume)
        self.encoder: Any = _make_encoder(dataset, config, folder) if encoder is None else encoder
        self.encoder.to(self.device)
        texts = _tokens(self.encoder, dataset.train_texts, folder, "points")
        self.labels = _tokens(self.encoder, dataset.label_texts, folder, "labels")
        self.rows = np.sort(np.concatenate([trained, held_out]))
        self.points = _subset(texts, truth, trained)
        self.held_out = _subset(texts, truth, held_out)
        self.all_points = _subset(texts, truth, self.rows)
        self.checkpoint = Checkpoint(
            folder / "checkpoint" if folder is not None else None, config.checkpoint_minutes
        )
        self.log: list[dict[str, Any]] = []

    def write_log(self) -> None:
        if self.folder is not None:
            with atomic_write(self.folder / "log.jsonl") as aside:
                lines = (json.dumps(entry) + "\n" for entry in self.log)
                aside.write_text("".join(lines), encoding="utf8")


def truth_of(labels: sp.csr_matrix, drop: npt.NDArray[np.int64] | None) -> Truth:
    if drop is None or len(drop) == 0:
        return Truth(labels, labels)
    pairs = as_pairs(drop, "drop_train", labels.shape).astype(np.float32)
    targets = sp.csr_matrix(labels - labels.multiply(pairs))
    targets.eliminate_zeros()
    known = sp.csr_matrix(targets + pairs)
    for matrix in (targets, known):
        matrix.sort_indices()
        matrix.data[:] = 1
    return Truth(targets, known)


def _subset(texts: Tokens, truth: Truth, rows: npt.NDArray[np.int64]) -> Points:
    targets = truth.targets[rows]
    known = targets if truth.known is truth.targets else truth.known[rows]
    return Points(texts.take(rows), Truth(targets, known))


def hold_out(truth: Truth, config: Config) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows to train on and rows held out, both sorted; rows without a label are in neither."""
    labelled = np.flatnonzero(np.diff(truth.targets.indptr))
    missing = truth.targets.shape[0] - len(labelled)
    if missing:
        warnings.warn(
            f"{missing} of {truth.targets.shape[0]} training points have no label and are dropped",
            stacklevel=4,
        )
    if len(labelled) < 2:
        raise ValueError(f"{len(labelled)} training points have a label, expected at least 2")
    # A fusion fitted on a handful of points is worse than none.
    count = min(config.max_validation, max(100, round(config.validation * len(labelled))))
    count = max(1, min(count, len(labelled) // 5))
    seeds = np.random.SeedSequence(config.seed, spawn_key=(HELD_OUT,))
    shuffled = np.random.default_rng(seeds).permutation(labelled)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def _make_encoder(dataset: Dataset, config: Config, folder: Path | None) -> torch.nn.Module:
    """The encoder that the config asks for, as it is before training; kept beside the run."""
    start = folder / "checkpoint" / "encoder" if folder is not None else None
    if start is not None and start.exists():
        return load_encoder(start)
    settings = config.encoder
    encoder: torch.nn.Module
    if settings.kind == "bag":
        encoder = BagEncoder.fit(
            [*dataset.train_texts, *dataset.label_texts],
            dim=settings.dim,
            layers=settings.layers,
            dropout=settings.dropout,
            vocab_size=settings.vocab_size,
            seed=config.seed,
        )
    else:
        encoder = _transformer(settings)
    if start is not None:
        with atomic_folder(start) as aside:
            encoder.save(aside)  # type: ignore[operator]
    return encoder


def _transformer(settings: EncoderConfig) -> torch.nn.Module:
    from ngame.encoders.transformer import TransformerEncoder

    bf16 = {"auto": None, "float32": False, "bf16": True}[settings.precision]
    return TransformerEncoder(settings.model, max_length=settings.max_length, bf16=bf16)


def _tokens(
    encoder: torch.nn.Module, texts: Sequence[str], folder: Path | None, name: str
) -> Tokens:
    """Tokens of all texts; beside the run they are written once and memory-mapped."""
    if folder is None:
        return encoder.tokenize(texts)  # type: ignore[operator, no-any-return]
    stem = folder / "tokens" / name
    # The offsets are written last: where they are, the ids are whole.
    if not stem.with_name(f"{name}.offsets.npy").exists():
        encoder.tokenize(texts).save(stem)  # type: ignore[operator]
    return Tokens.load(stem)


def _claim(folder: Path, config: Config, dataset: Dataset, resume: bool) -> None:
    """Make sure that the folder is free, or holds this very run; write down what run it is."""
    ours = folder / "config.toml"
    identity = folder / "checkpoint" / "data.json"
    about = _describe(dataset)
    if ours.exists():
        if not resume:
            raise FileExistsError(
                f"{folder} already holds a run: resume it, or choose another folder"
            )
        remove_leftovers(folder)
        if replace(Config.load(ours), checkpoint_minutes=config.checkpoint_minutes) != config:
            raise ValueError(f"{ours} has other settings than those given: resume with its own")
        if identity.exists():
            before = json.loads(identity.read_text(encoding="utf8"))
            if before != about:
                raise ValueError(f"{folder} was begun on other data: {before}, now {about}")
    elif folder.exists():
        remove_leftovers(folder)
        if any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty and holds no run: choose another folder")
    # In this order: a folder with anything in it says whose it is.
    config.save(ours)
    write_json(identity, about)


def _describe(dataset: Dataset) -> dict[str, Any]:
    """What tells one data set from another, for a resumed run."""
    digest = hashlib.blake2b(digest_size=8)
    for labels in (dataset.train_labels, dataset.test_labels):
        if labels is not None:
            digest.update(labels.indptr.astype(np.int64).tobytes())
            digest.update(labels.indices.astype(np.int32).tobytes())
    for pairs in (dataset.drop_train, dataset.drop_test):
        digest.update(b"" if pairs is None else pairs.tobytes())
        digest.update(b"|")
    for texts in (dataset.train_texts, dataset.label_texts, dataset.test_texts or []):
        for text in texts:
            digest.update(text.encode("utf8") + b"\0")
    points, labels = dataset.train_labels.shape
    return {"points": points, "labels": labels, "digest": digest.hexdigest()}

"""The two stages of NGAME, and the run around them."""

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ngame import metrics
from ngame.bag import BagEncoder
from ngame.batches import ClusterBatchSampler
from ngame.checkpoint import (
    Checkpoint,
    arrays,
    joined,
    load_optimizer,
    optimizer_tensors,
    sampler_state,
    split,
)
from ngame.config import Config, EncoderConfig, StageConfig
from ngame.data import Dataset
from ngame.encoder import checked, encode
from ngame.files import remove_leftovers, replacing, replacing_folder, write_json
from ngame.fusion import Fusion
from ngame.loss import Entries, decoupled_softmax, triplet
from ngame.model import Model, load_encoder, unit
from ngame.positives import in_batch_positives, label_pool
from ngame.shortlist import topk, topk_arrays
from ngame.tokens import Tokens

# First word of the seeds of each stage: their random streams have nothing in common.
_HELD_OUT, _ENCODER, _CLASSIFIER = range(3)
# The negatives that hard-negative recall asks for, and the points it is measured on.
_NEAREST, _MEASURED_POINTS = 10, 2048


class _Loss(Protocol):
    def __call__(self, scores: torch.Tensor, known: Entries, targets: Entries) -> torch.Tensor: ...


class Truth(NamedTuple):
    """What is relevant to each of n points: csr [n, L] both."""

    targets: sp.csr_matrix
    """What training ranks up."""
    known: sp.csr_matrix
    """What is never a negative: the targets, and the pairs that are left out."""


@dataclass(frozen=True, slots=True)
class Points:
    """Points of a run: their texts as tokens, and their truth."""

    tokens: Tokens
    truth: Truth


def train(
    dataset: Dataset,
    config: Config | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    encoder: torch.nn.Module | None = None,
) -> Model:
    """Train both stages, fit the fusion, and evaluate on the test points if there are any.

    A held-out part of the training points chooses the weights (`Config.keep`) and fits the fusion;
    the test points are only ever scored, at the very end.

    Parameters
    ----------
    dataset : the points and labels
    config : all settings; those suited to the size of the data if not given
    folder : where to leave the run (see the README); nothing is written if not given
    resume : go on with the run that `folder` holds, or begin it; it ends in the same numbers as
        one that was never stopped, on the same machine with the same number of threads
    encoder : a module of your own that is an `ngame.encoder.Encoder`, trained in place

    Returns
    -------
    Model

    Raises
    ------
    FileExistsError
        `folder` holds another run, or files that are none.
    ValueError
        The run to resume had other settings or other data; no training point has a label; the
        encoder returns vectors of a wrong shape or that are not finite.
    """
    if config is None:
        points, labels = dataset.train_labels.shape
        config = Config.load(points=points, labels=labels)
    folder = Path(folder) if folder is not None else None
    with _threads(config.threads), torch.random.fork_rng(devices=[]):
        run = _Run(dataset, config, folder, resume, encoder)
        train_encoder(run)
        classifier = train_classifier(run)
        model = _finish(run, classifier)
    return model


class _Run:
    """The parts that both stages share: data, encoder, checkpoint, log."""

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
        self.device = _device(config.device)
        truth = _truth(dataset.train_labels, dataset.drop_train)
        trained, held_out = _hold_out(truth, config)
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
            with replacing(self.folder / "log.jsonl") as aside:
                lines = (json.dumps(entry) + "\n" for entry in self.log)
                aside.write_text("".join(lines), encoding="utf8")


class _Stage:
    """What both loops share: the plan of the batches, updates, checkpoints, the log."""

    def __init__(
        self,
        run: _Run,
        name: str,
        number: int,
        config: StageConfig,
        modules: Mapping[str, "_Rated"],
    ) -> None:
        self.run, self.name, self.number, self.config = run, name, number, config
        self.modules = {key: rated.module for key, rated in modules.items()}
        rows = len(run.points.tokens)
        self.sampler = ClusterBatchSampler(
            rows,
            min(config.batch_size, rows),
            schedule={epoch: min(size, rows) for epoch, size in config.sizes().items()},
            refresh_every=config.refresh_every,
            random_share=config.random_share,
            seed=run.config.seed,
            threads=run.config.threads,
        )
        per_epoch = math.ceil(len(self.sampler) / config.accumulate)
        self.optimizer = _Optimizer(modules.values(), config, config.epochs * per_epoch)
        self.loss: _Loss = (
            partial(decoupled_softmax, temperature=config.temperature)
            if config.loss == "softmax"
            else partial(triplet, margin=config.margin, negatives=config.negatives)
        )
        self.bank: npt.NDArray[np.float16] | None = None
        self.epoch = self.batch = 0
        self.total_loss = torch.zeros((), dtype=torch.float64, device=run.device)
        self.best = -math.inf
        self.best_weights: dict[str, torch.Tensor] = {}
        self.started = time.monotonic()

    def restore(self, saved: tuple[dict[str, Any], dict[str, torch.Tensor]] | None) -> None:
        """Go on from a checkpoint, if it is one of this stage."""
        if saved is None or saved[0]["stage"] != self.name:
            return
        meta, tensors = saved
        self.epoch, self.batch, self.best = meta["epoch"], meta["batch"], meta["best"]
        self.run.log = meta["log"]
        for name, module in self.modules.items():
            module.load_state_dict(split(tensors, f"{name}."))
        self.optimizer.load(split(tensors, "optimizer."), meta["updates"])
        self.sampler.load_state_dict(sampler_state(split(tensors, "sampler.")))
        self.total_loss = tensors["total_loss"].to(self.run.device)
        self.best_weights = split(tensors, "best.")
        if self.bank is not None and "bank" in tensors:
            self.bank[:] = tensors["bank"].numpy()

    def epochs(self) -> Iterator[int]:
        """Epochs still to do; a bar over their batches is drawn on a terminal."""
        total = self.config.epochs * len(self.sampler)
        with tqdm(total=total, desc=self.name, disable=None, unit="batch") as self.bar:
            self.bar.update(self.epoch * len(self.sampler) + self.batch)
            while self.epoch < self.config.epochs:
                self.sampler.set_epoch(self.epoch)
                self.started = time.monotonic()
                yield self.epoch
        if self.best_weights:
            for name, module in self.modules.items():
                module.load_state_dict(split(self.best_weights, f"{name}."))

    def batches(self) -> Iterator[tuple[npt.NDArray[np.int64], np.random.Generator]]:
        """Rows of each batch still to do, and the generator of its random choices.

        Every batch seeds its own choices from its place in the run: so nothing has to be known of
        the batches before it when a run goes on.
        """
        plan = self.sampler.plan()
        for batch in range(self.batch, len(plan)):
            seeds = np.random.SeedSequence(
                self.run.config.seed, spawn_key=(self.number, self.epoch, batch)
            )
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))
            yield plan[batch], np.random.default_rng(seeds)

    def step(self, loss: torch.Tensor) -> None:
        """Take one batch's gradient; update, and save, where it is time."""
        done = self.batch % self.config.accumulate
        averaged = min(self.config.accumulate, len(self.sampler) - self.batch + done)
        (loss / averaged).backward()  # type: ignore[no-untyped-call]
        self.total_loss += loss.detach()
        self.batch += 1
        last = self.batch == len(self.sampler)
        if self.batch % self.config.accumulate == 0 or last:
            self.optimizer.step()
            if not last and self.run.checkpoint.due():
                self.save()
        self.bar.update()
        if self.bar.n % 20 == 0 and not self.bar.disable:
            loss_so_far = self.total_loss.item() / self.batch
            self.bar.set_postfix_str(self._status(loss_so_far, self.run.log))

    def _status(self, loss: float, log: Sequence[Mapping[str, Any]]) -> str:
        status = f"epoch {self.epoch + 1}/{self.config.epochs}, loss {loss:.4f}"
        if log and log[-1]["stage"] == self.name:
            recall, best = log[-1]["hard_negative_recall"], log[-1]["P@1"]
            status += f", hard-negative recall {recall:.3f}, held-out P@1 {100 * best:.2f}"
        return status

    def end_epoch(self, measured: Mapping[str, float]) -> None:
        """Log the epoch, keep its weights if they are the best so far, go to the next."""
        self.run.log.append(
            {
                "stage": self.name,
                "epoch": self.epoch,
                "cluster_size": self.sampler.cluster_size_at(self.epoch),
                "loss": self.total_loss.item() / len(self.sampler),
                **measured,
                "seconds": round(time.monotonic() - self.started, 2),
            }
        )
        self.run.write_log()
        if self.run.config.keep == "best" and measured["P@1"] > self.best:
            self.best = measured["P@1"]
            self.best_weights = {k: v.detach().clone() for k, v in self._weights().items()}
        self.epoch, self.batch = self.epoch + 1, 0
        self.total_loss.zero_()
        if self.epoch == self.config.epochs or self.run.checkpoint.due():
            self.save()

    def save(self) -> None:
        """Put all that `restore` needs into the checkpoint."""
        meta = {
            "stage": self.name,
            "epoch": self.epoch,
            "batch": self.batch,
            "updates": self.optimizer.updates,
            "best": self.best,
            "log": self.run.log,
        }
        tensors = {
            # A stage that does not train the encoder needs it all the same.
            **joined(encoder=self.run.encoder.state_dict()),
            **self._weights(),
            **joined(
                optimizer=self.optimizer.tensors(),
                sampler=arrays(self.sampler.state_dict()),
                best=self.best_weights,
            ),
            "total_loss": self.total_loss,
        }
        if self.bank is not None:
            tensors["bank"] = torch.from_numpy(self.bank)
        self.run.checkpoint.save(meta, tensors)

    def _weights(self) -> dict[str, torch.Tensor]:
        return joined(**{name: module.state_dict() for name, module in self.modules.items()})


class _Rated(NamedTuple):
    """A module to train, and the learning rates of its parameters."""

    module: torch.nn.Module
    dense: float
    sparse: float


class _Optimizer:
    """AdamW, and SparseAdam where gradients are sparse, on one schedule."""

    def __init__(
        self,
        modules: Iterable[_Rated],
        config: StageConfig,
        updates: int,
    ) -> None:
        dense: list[dict[str, Any]] = []
        sparse: list[dict[str, Any]] = []
        self._parameters: list[torch.nn.Parameter] = []
        for module, dense_rate, sparse_rate in modules:
            lookups = {
                id(part.weight) for part in module.modules() if getattr(part, "sparse", False)
            }
            trained = [p for p in module.parameters() if p.requires_grad]
            self._parameters += trained
            for found, kind, rate in ((dense, False, dense_rate), (sparse, True, sparse_rate)):
                chosen = [p for p in trained if (id(p) in lookups) is kind]
                if chosen:
                    found.append({"params": chosen, "lr": rate, "full": rate})
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if dense:
            self._optimizers["dense"] = torch.optim.AdamW(dense, weight_decay=config.weight_decay)
        if sparse:
            self._optimizers["sparse"] = torch.optim.SparseAdam(sparse)
        self._clip = config.clip
        self._warmup = max(1, round(config.warmup * updates))
        self._all_updates = max(1, updates)
        self.updates = 0

    def step(self) -> None:
        """Update by the gradients at hand, and clear them."""
        if self._clip:
            _clip(self._parameters, self._clip)
        rise = (self.updates + 1) / self._warmup
        fall = (self._all_updates - self.updates) / max(1, self._all_updates - self._warmup)
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * min(1.0, rise, fall)
            optimizer.step()
            optimizer.zero_grad()
        self.updates += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        return joined(**{k: optimizer_tensors(o) for k, o in self._optimizers.items()})

    def load(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        for name, optimizer in self._optimizers.items():
            load_optimizer(optimizer, split(tensors, f"{name}."))
        self.updates = updates


def train_encoder(run: _Run) -> None:
    """Encoder stage: points against the labels that the points of their batch brought along."""
    config = run.config.encoder_stage
    encoder, points = run.encoder, run.points
    saved = run.checkpoint.load()
    if saved is not None and saved[0]["stage"] == "classifier":
        encoder.load_state_dict(split(saved[1], "encoder."))
        return
    rated = _Rated(encoder, config.learning_rate, config.sparse_learning_rate)
    stage = _Stage(run, "encoder", _ENCODER, config, {"encoder": rated})
    if config.embeddings == "bank":
        stage.bank = np.zeros((len(points.tokens), int(encoder.dim)), np.float16)
    stage.restore(saved)
    for epoch in stage.epochs():
        if stage.sampler.due(epoch):
            filled = stage.bank is not None and epoch > 0
            stage.sampler.refresh(stage.bank if filled else encode(encoder, points.tokens))
        encoder.train()
        for rows, rng in stage.batches():
            drawn = rng if config.positives == "one" else None
            pool, known, targets = _batch_labels(points.truth, rows, drawn, run.device)
            x = _vectors(encoder, points.tokens.take(rows))
            z = _vectors(encoder, run.labels.take(pool))
            if stage.bank is not None:
                stage.bank[rows] = x.detach().half().cpu().numpy()
            stage.step(stage.loss(x @ z.T, known, targets))
        labels = unit(encode(encoder, run.labels))
        stage.end_epoch(
            {
                **_precision(run, unit(encode(encoder, run.held_out.tokens)), labels),
                "hard_negative_recall": _hard_negative_recall(stage, labels, config.positives),
            }
        )


def train_classifier(run: _Run) -> npt.NDArray[np.float32] | None:
    """Classifier stage: one vector a label, against the union of the batch's positives."""
    config = run.config.classifier_stage
    encoder, points = run.encoder, run.points
    if config.epochs == 0:
        return None
    classifier = torch.nn.Embedding(len(run.labels), int(encoder.dim), sparse=True)
    classifier.to(run.device)
    saved = run.checkpoint.load()
    fresh = saved is None or saved[0]["stage"] != "classifier"
    if fresh:
        with torch.no_grad():
            classifier.weight.copy_(torch.from_numpy(unit(encode(encoder, run.labels))))
    modules = {
        "classifier": _Rated(classifier, config.learning_rate, config.sparse_learning_rate)
    }
    if config.finetune:
        rate = config.encoder_learning_rate
        modules["encoder"] = _Rated(encoder, rate, rate)
    stage = _Stage(run, "classifier", _CLASSIFIER, config, modules)
    stage.restore(saved)
    frozen = None if config.finetune else _unit_half(encode(encoder, points.tokens))
    for epoch in stage.epochs():
        if stage.sampler.due(epoch):
            stage.sampler.refresh(encode(encoder, points.tokens) if frozen is None else frozen)
        encoder.train(config.finetune)
        for rows, _ in stage.batches():
            pool, known, targets = _batch_labels(points.truth, rows, None, run.device)
            if frozen is None:
                x = _vectors(encoder, points.tokens.take(rows))
            else:
                x = torch.from_numpy(frozen[rows].astype(np.float32)).to(run.device)
            x = F.normalize(F.dropout(x, config.dropout), dim=1)
            w = F.normalize(classifier(torch.from_numpy(pool).to(run.device).long()), dim=1)
            stage.step(stage.loss(x @ w.T, known, targets))
        weight = unit(classifier.weight.detach().cpu().numpy())
        stage.end_epoch(
            {
                **_precision(run, unit(encode(encoder, run.held_out.tokens)), weight),
                "hard_negative_recall": _hard_negative_recall(stage, weight, "all"),
            }
        )
    return unit(classifier.weight.detach().cpu().numpy())


def _finish(run: _Run, classifier: npt.NDArray[np.float32] | None) -> Model:
    """Fit the fusion on the held-out points, then let them vote with the others; save, evaluate."""
    config, dataset = run.config, run.dataset
    model = Model(
        encoder=run.encoder.eval(),
        label_texts=dataset.label_texts,
        label_vectors=unit(encode(run.encoder, run.labels)),
        point_vectors=_unit_half(encode(run.encoder, run.points.tokens)),
        point_labels=run.points.truth.targets,
        classifier=classifier,
        fusions={},
        config=config.prediction,
        threads=config.threads,
    )
    vectors = unit(encode(run.encoder, run.held_out.tokens))
    truth = run.held_out.truth
    left_out = sp.csr_matrix(truth.known - truth.targets)
    left_out.eliminate_zeros()
    k = min(config.prediction.k, len(dataset.label_texts))
    for name, seen in (("all", False), ("trained", True)):
        single = model.single_scores(vectors, k, drop=left_out, seen=seen)
        pattern, features = model.candidates(vectors, single)
        rows = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr))
        relevant = np.asarray(truth.targets[rows, pattern.indices]).ravel() > 0
        model.fusions[name] = Fusion.fit(features, rows, relevant)
    model.point_vectors = _unit_half(encode(run.encoder, run.all_points.tokens))
    model.point_labels = run.all_points.truth.targets
    if dataset.test_texts is not None and dataset.test_labels is not None:
        found = model.scores(model.encode(dataset.test_texts), drop=dataset.drop_test)
        scored = model.evaluate(found, dataset.test_labels, drop=dataset.drop_test)
        # The field's table: recall far down the ranking, the others at its top.
        for name, values in scored.items():
            model.metrics[name] = {
                key: value
                for key, value in values.items()
                if key.startswith("R@") is (int(key.partition("@")[2]) >= 10)
            }
    if run.folder is not None:
        model.save(run.folder)
    return model


def _batch_labels(
    truth: Truth,
    rows: npt.NDArray[np.int64],
    rng: np.random.Generator | None,
    device: torch.device,
) -> tuple[npt.NDArray[np.int32], Entries, Entries]:
    """Label pool of a batch, its known positives and its targets: one a point with `rng`, else all.

    Every label of the pool stands in it once, however many points brought it along.
    """
    if rng is None:
        pool, positives = label_pool(truth.targets, rows)
        targets = Entries.of(positives, device)
        if truth.known is truth.targets:
            return pool, targets, targets
    else:
        begin, end = truth.targets.indptr[rows], truth.targets.indptr[rows + 1]
        drawn = truth.targets.indices[begin + (rng.random(len(rows)) * (end - begin)).astype(int)]
        pool, columns = np.unique(drawn, return_inverse=True)
        targets = Entries(
            torch.arange(len(rows), device=device), torch.from_numpy(columns).to(device)
        )
    return pool, Entries.of(in_batch_positives(truth.known, rows, pool), device), targets


def _vectors(encoder: torch.nn.Module, tokens: Tokens) -> torch.Tensor:
    x = checked(encoder(tokens), len(tokens), int(encoder.dim))  # type: ignore[arg-type]
    return F.normalize(x.float(), dim=1)


def _unit_half(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    return unit(vectors).astype(np.float16)


def _precision(
    run: _Run, vectors: npt.NDArray[np.float32], items: npt.NDArray[np.float32]
) -> dict[str, float]:
    """Precision at 1 on the held-out points, by one scorer."""
    truth = run.held_out.truth
    left_out = sp.csr_matrix(truth.known - truth.targets)
    left_out.eliminate_zeros()
    best = topk(vectors, items, 1, metric="dot", drop=left_out, threads=run.config.threads)
    return metrics.evaluate(best, truth.targets, ks=[1]) | {}


def _hard_negative_recall(stage: _Stage, items: npt.NDArray[np.float32], positives: str) -> float:
    """Of each point's nearest labels that are not its positives, the share in its batch's pool.

    Measured on the first batches of the epoch just ended, at its end.
    """
    run = stage.run
    plan = stage.sampler.plan()
    found = asked = 0
    for batch in range(min(len(plan), max(1, _MEASURED_POINTS // stage.sampler.batch_size))):
        rows = plan[batch][:_MEASURED_POINTS]
        seeds = np.random.SeedSequence(
            run.config.seed, spawn_key=(stage.number, stage.epoch, batch)
        )
        rng = np.random.default_rng(seeds) if positives == "one" else None
        pool, _, _ = _batch_labels(run.points.truth, plan[batch], rng, torch.device("cpu"))
        _, nearest = topk_arrays(
            encode(run.encoder, run.points.tokens.take(rows)),
            items,
            min(_NEAREST, len(items)),
            drop=run.points.truth.known[rows],
            threads=run.config.threads,
        )
        there = nearest[nearest >= 0]
        found += int(np.isin(there, pool).sum())
        asked += len(there)
    return found / max(1, asked)


def _truth(labels: sp.csr_matrix, drop: npt.NDArray[np.int64] | None) -> Truth:
    if drop is None or len(drop) == 0:
        return Truth(labels, labels)
    pairs = sp.csr_matrix(
        (np.ones(len(drop), np.float32), (drop[:, 0], drop[:, 1])), shape=labels.shape
    )
    pairs.data[:] = 1  # a pair may be given twice
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


def _hold_out(truth: Truth, config: Config) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
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
    seeds = np.random.SeedSequence(config.seed, spawn_key=(_HELD_OUT,))
    shuffled = np.random.default_rng(seeds).permutation(labelled)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def _device(name: str) -> torch.device:
    """The device that a config names, if torch can use it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which torch cannot use: {error}") from None


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
        with replacing_folder(start) as aside:
            encoder.save(aside)  # type: ignore[operator]
    return encoder


def _transformer(settings: EncoderConfig) -> torch.nn.Module:
    from ngame.transformer import TransformerEncoder

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


def _clip(parameters: Sequence[torch.nn.Parameter], limit: float) -> None:
    """Scale all gradients so that their common norm is at most `limit`; sparse ones too."""
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad._values())
        else:
            values.append(parameter.grad)
    if not values:
        return
    norm = torch.stack([value.norm() for value in values]).norm()
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(scale)


class _threads:
    """Let torch use that many threads within the block; 0 leaves it as it is."""

    def __init__(self, count: int) -> None:
        self._count, self._before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        if self._count:
            torch.set_num_threads(self._count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)

"""The two stages of NGAME, each one loop, and what is made of them."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ngame import metrics
from ngame.config import Config
from ngame.data.dataset import Dataset
from ngame.data.tokens import Tokens
from ngame.encoders.bank import EmbeddingBank
from ngame.encoders.encode import checked, encode
from ngame.encoders.vectors import Vectors, to_device, to_float16, to_numpy, unit
from ngame.loss import CooIndex
from ngame.positives import in_batch_positives, label_pool
from ngame.prediction.fusion import Fusion
from ngame.prediction.model import Model
from ngame.state import take_prefix
from ngame.topk import topk, topk_arrays
from ngame.training.optimizer import ParameterGroup
from ngame.training.run import CLASSIFIER, ENCODER, Run, Truth
from ngame.training.stage import Stage

# The negatives that hard-negative recall asks for, and the points it is measured on.
_NEAREST, _MEASURED_POINTS = 10, 2048


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
    folder : where to leave the run (see docs/formats.md); nothing is written if not given
    resume : go on with the run that `folder` holds, or begin it; it ends in the same numbers as
        one that was never stopped, on the same machine with the same number of threads
    encoder : a module of your own that is an `ngame.encoders.base.Encoder`, trained in place

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
        run = Run(dataset, config, folder, resume, encoder)
        train_encoder(run)
        classifier = train_classifier(run)
        model = _finish(run, classifier)
    return model


def train_encoder(run: Run) -> None:
    """Encoder stage: points against the labels that the points of their batch brought along."""
    config = run.config.encoder_stage
    encoder, points = run.encoder, run.points
    saved = run.checkpoint.load()
    if saved is not None and saved[0]["stage"] == "classifier":
        encoder.load_state_dict(take_prefix(saved[1], "encoder."))
        return
    rated = ParameterGroup(encoder, config.learning_rate, config.sparse_learning_rate)
    stage = Stage(run, "encoder", ENCODER, config, {"encoder": rated})
    if config.embeddings == "bank":
        stage.bank = EmbeddingBank(len(points.tokens), int(encoder.dim), device=run.core)
    stage.restore(saved)
    for _ in stage.epochs():
        stage.refresh(lambda: _point_vectors(run, stage.bank))
        encoder.train()
        for rows, rng in stage.batches():
            drawn = rng if config.positives == "one" else None
            pool, known, targets = _batch_labels(points.truth, rows, drawn, run.device)
            x = _vectors(encoder, points.tokens.take(rows))
            z = _vectors(encoder, run.labels.take(pool))
            if stage.bank is not None:
                stage.bank.update(rows, x)
            stage.step(stage.loss(x @ z.T, known, targets))
        labels = unit(_encoded(run, run.labels))
        stage.end_epoch(
            {
                "P@1": _precision(run, unit(_encoded(run, run.held_out.tokens)), labels),
                "hard_negative_recall": _hard_negative_recall(stage, labels, config.positives),
            }
        )


def train_classifier(run: Run) -> Vectors | None:
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
            classifier.weight.copy_(torch.as_tensor(unit(_encoded(run, run.labels))))
    modules = {"classifier": ParameterGroup(classifier, config.learning_rate, config.learning_rate)}
    if config.finetune:
        rate = config.encoder_learning_rate
        modules["encoder"] = ParameterGroup(encoder, rate, rate)
    stage = Stage(run, "classifier", CLASSIFIER, config, modules)
    stage.restore(saved)
    frozen = None if config.finetune else to_float16(unit(_encoded(run, points.tokens)))
    for _ in stage.epochs():
        stage.refresh(lambda: _encoded(run, points.tokens) if frozen is None else frozen)
        encoder.train(config.finetune)
        for rows, _ in stage.batches():
            pool, known, targets = _batch_labels(points.truth, rows, None, run.device)
            if frozen is None:
                x = _vectors(encoder, points.tokens.take(rows))
            else:
                x = torch.as_tensor(frozen[rows]).to(run.device, torch.float32)
            x = F.normalize(F.dropout(x, config.dropout), dim=1)
            w = F.normalize(classifier(torch.from_numpy(pool).to(run.device).long()), dim=1)
            stage.step(stage.loss(x @ w.T, known, targets))
        weight = unit(to_device(classifier.weight, run.core))
        stage.end_epoch(
            {
                "P@1": _precision(run, unit(_encoded(run, run.held_out.tokens)), weight),
                "hard_negative_recall": _hard_negative_recall(stage, weight, "all"),
            }
        )
    return unit(to_device(classifier.weight, run.core))


def _finish(run: Run, classifier: Vectors | None) -> Model:
    """Fit the fusion on the held-out points, then let them vote with the others; save, evaluate."""
    config, dataset = run.config, run.dataset
    model = Model(
        encoder=run.encoder.eval(),
        label_texts=dataset.label_texts,
        label_vectors=unit(_encoded(run, run.labels)),
        point_vectors=to_float16(unit(_encoded(run, run.points.tokens))),
        point_labels=run.points.truth.targets,
        classifier=classifier,
        fusions={},
        config=config.prediction,
        threads=config.threads,
    )
    vectors = unit(_encoded(run, run.held_out.tokens))
    truth = run.held_out.truth
    left_out = truth.left_out
    k = min(config.prediction.k, len(dataset.label_texts))
    for name, seen in (("all", False), ("trained", True)):
        single = model.single_scores(vectors, k, drop=left_out, seen=seen)
        pattern, features = model.candidates(vectors, single)
        rows = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr))
        relevant = np.asarray(truth.targets[rows, pattern.indices]).ravel() > 0
        model.fusions[name] = Fusion.fit(features, rows, relevant)
    model.point_vectors = to_float16(unit(_encoded(run, run.all_points.tokens)))
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
) -> tuple[npt.NDArray[np.int32], CooIndex, CooIndex]:
    """Label pool of a batch, its known positives and its targets: one a point with `rng`, else all.

    Every label of the pool stands in it once, however many points brought it along.
    """
    if rng is None:
        pool, positives = label_pool(truth.targets, rows)
        targets = CooIndex.of(positives, device)
        if truth.known is truth.targets:
            return pool, targets, targets
    else:
        begin, end = truth.targets.indptr[rows], truth.targets.indptr[rows + 1]
        drawn = truth.targets.indices[begin + (rng.random(len(rows)) * (end - begin)).astype(int)]
        pool, columns = np.unique(drawn, return_inverse=True)
        targets = CooIndex(
            torch.arange(len(rows), device=device), torch.from_numpy(columns).to(device)
        )
    return pool, CooIndex.of(in_batch_positives(truth.known, rows, pool), device), targets


def _vectors(encoder: torch.nn.Module, tokens: Tokens) -> torch.Tensor:
    x = checked(encoder(tokens), len(tokens), int(encoder.dim))  # type: ignore[arg-type]
    return F.normalize(x.float(), dim=1)


def _encoded(run: Run, tokens: Tokens) -> Vectors:
    """Vectors of texts as the encoder is now, where the core works on them."""
    return encode(run.encoder, tokens, device=run.core)


def _point_vectors(run: Run, bank: EmbeddingBank | None) -> Vectors:
    """Vectors of the training points: those in the bank, encoded where it has none."""
    tokens = run.points.tokens
    if bank is None:
        return _encoded(run, tokens)
    rows = bank.unseen
    bank.update(rows, _encoded(run, tokens.take(rows)))
    vectors: Vectors = bank.vectors
    return vectors


def _precision(run: Run, vectors: Vectors, items: Vectors) -> float:
    """Precision at 1 on the held-out points, by one scorer."""
    truth = run.held_out.truth
    left_out = truth.left_out
    best = topk(vectors, items, 1, metric="dot", drop=left_out, threads=run.config.threads)
    return metrics.evaluate(best, truth.targets, ks=[1])["P@1"]


def _hard_negative_recall(stage: Stage, items: Vectors, positives: str) -> float:
    """Of each point's nearest labels that are not its positives, the share in its batch's pool.

    Measured on the first batches of the epoch just ended, at its end.
    """
    run = stage.run
    plan = stage.sampler.plan()
    found = asked = 0
    for batch in range(min(len(plan), max(1, _MEASURED_POINTS // stage.sampler.batch_size))):
        rows = plan[batch][:_MEASURED_POINTS]
        rng = np.random.default_rng(stage.seeds(batch)) if positives == "one" else None
        pool, _, _ = _batch_labels(run.points.truth, plan[batch], rng, torch.device("cpu"))
        _, nearest = topk_arrays(
            _encoded(run, run.points.tokens.take(rows)),
            items,
            min(_NEAREST, len(items)),
            drop=run.points.truth.known[rows],
            threads=run.config.threads,
        )
        there = to_numpy(nearest)
        there = there[there >= 0]
        found += int(np.isin(there, pool).sum())
        asked += len(there)
    return found / max(1, asked)


class _threads:
    """Let torch use that many threads within the block; 0 leaves it as it is."""

    def __init__(self, count: int) -> None:
        self._count, self._before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        if self._count:
            torch.set_num_threads(self._count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)

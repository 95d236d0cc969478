"""Training: a loop for each of the two stages of NGAME, and the model they give."""

import math
import os
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ngame import metrics
from ngame.arrays import pairs_of, values_at
from ngame.config import Config, StageConfig
from ngame.data.dataset import Dataset
from ngame.data.tokens import Tokens
from ngame.encoders.bag import BagEncoder
from ngame.encoders.bank import EmbeddingBank
from ngame.encoders.base import Encoder
from ngame.encoders.encode import check_vectors
from ngame.encoders.ensemble import Ensemble, split
from ngame.encoders.transformer import TransformerEncoder
from ngame.encoders.vectors import Vectors, normalize, to_device, to_numpy
from ngame.loss import CooIndex
from ngame.negatives import BatchLabels, SharedRandom, batch_labels
from ngame.prediction.fusion import FEWEST_POINTS, Fusion
from ngame.prediction.lexical import Lexical, titles_apart
from ngame.prediction.model import LEXICAL, REMEMBERING, Model
from ngame.state import take_prefix
from ngame.topk import topk, topk_arrays
from ngame.training.all_labels import AllLabels
from ngame.training.encoded import EncodedTexts
from ngame.training.optimizer import ParameterGroup
from ngame.training.run import CLASSIFIER, ENCODER, Run
from ngame.training.shards import is_sharded, parts
from ngame.training.stage import Stage
from ngame.transfer import sent

# Hard-negative recall: hard negatives per point, and number of points it is measured on.
_HARD_NEGATIVES, _MEASURED_POINTS = 10, 2048

# What parts of the work cost, where encoding a token is 1: training on a token, and a pair of a
# point and a label in a loss and in a search. Measured with the bag encoder.
_TRAINED_TOKEN, _LOSS_PAIR, _SEARCH_PAIR = 4, 1 / 11, 1 / 250
# Scoring an epoch takes at most this share of the work of training, or is too little to matter.
_SCORING_SHARE, _LITTLE_WORK = 0.05, 50_000

# The labels of a batch, from its number in the epoch and its rows.
_LabelsOf = Callable[[int, npt.NDArray[np.int64]], BatchLabels]


def train(
    dataset: Dataset,
    config: Config | None = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    encoder: torch.nn.Module | None = None,
) -> Model:
    """Train both stages, fit the fusion, and evaluate on the test points if there are any.

    Held-out training points choose the weights (`Config.keep`) and fit the fusion. The test points
    are only scored, after training.

    Parameters
    ----------
    dataset : points and labels
    config : all settings; if not given, the defaults for the size of the data
    folder : where to write the run (see docs/formats.md); nothing is written if not given
    resume : continue the run in `folder`, or start it if there is none. A resumed run ends with
        the same numbers as one that was never stopped, on the same machine with the same number
        of threads.
    encoder : a module of your own with the members of `ngame.Encoder`; it is trained in place

    Random numbers are PyTorch's global ones, seeded anew for each batch. So of several threads
    that call this one trains at a time, and a thread that draws from them meanwhile changes the
    results.

    If torch.distributed is initialized, all its processes must call this with the same arguments.
    They train together: see docs/scale.md.

    Returns
    -------
    Model
        With several processes, rank 0 gets the model and the others None.

    Raises
    ------
    BlockingIOError
        Another process is training in `folder`.
    FileExistsError
        `folder` holds another run, or files that do not belong to a run.
    ConnectionError
        Another process of several has ended, because of an error of its own, say.
    KeyboardInterrupt, SystemExit
        Ctrl-C, SIGTERM or SIGHUP came. The checkpoint has all updates until then.
    TypeError
        `dataset` or `config` is of another type, or `encoder` lacks a member of `ngame.Encoder`.
    ValueError
        The run to resume had other settings or other data; `encoder.model` cannot be read; fewer
        than two training points have a label; the encoder returns vectors of a wrong shape, or NaN
        or infinity.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"dataset is a {type(dataset).__name__}, expected an ngame.Dataset, such as "
            "ngame.load_dataset(path)"
        )
    if not isinstance(config, Config | None):
        raise TypeError(f"config is a {type(config).__name__}, expected an ngame.Config")
    if config is None:
        points, labels = dataset.train_labels.shape
        config = Config.load(points=points, labels=labels)
    if folder is not None and not os.fspath(folder):
        raise ValueError("folder is empty, expected the name of one, or None")
    folder = Path(folder) if folder is not None else None
    with (
        _lock,
        _torch_threads(config.threads),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        _check_scorers(dataset, config)
        run = Run(dataset, config, folder, resume, encoder)
        try:
            if run.ranks.rank == 0:
                _warn_of_clusters_never_reached(config)
            with run.stop:
                model = _train(run)
        except (KeyboardInterrupt, SystemExit):
            if run.stage is not None and run.stop.whole:
                run.stage.save()
            raise
        finally:
            run.close()
    return model


def _train(run: Run) -> Model:
    config = run.config.classifier_stage
    train_encoder(run)
    _warn_of_collapse(run, "encoder", run.config.encoder_stage)
    encoded, classifier = EncodedTexts(run), None
    if config.epochs > 0:
        train_labels = train_all_labels if config.labels == "all" else train_classifier
        classifier = run.gather(train_labels(run, encoded), len(run.labels))
        _warn_of_collapse(run, "classifier", config)
    if config.finetune:
        encoded = EncodedTexts(run)
    encoded.gather()
    run.unshard_encoder()
    if run.ranks.rank > 0:
        return cast(Model, None)
    with run.timed("fusion and test points"):
        return _make_model(run, encoded, classifier)


def train_encoder(run: Run) -> None:
    """Encoder stage: train on the label pool of each batch, its points' positives."""
    config = run.config.encoder_stage
    encoder, points, ranks = run.encoder, run.points, run.ranks
    saved = run.checkpoint.load()
    if saved is not None and saved[0]["stage"] == "classifier":
        weights = take_prefix(saved[1], "encoder.")
        encoder.load_state_dict(parts(weights, like=encoder.state_dict()))
        return
    group = ParameterGroup(encoder, config.learning_rate, config.sparse_learning_rate)
    stage = Stage(run, "encoder", ENCODER, config, {"encoder": group})
    if config.embeddings == "bank" and stage.last_refresh >= 0:
        held = len(run.own(points.tokens))
        stage.bank = EmbeddingBank(held, encoder.dim, device=run.core_device)
    stage.score_every = _score_every(run, config, encodes=True, trains_labels=True)
    stage.restore(saved)
    one = config.positives == "one"
    labels_of = partial(
        _batch_labels, stage, one=one, random_labels=config.random_labels, gather=config.gather
    )
    for epoch in stage.epochs():
        stage.refresh(lambda: _point_vectors(run, stage.bank))
        if epoch >= stage.last_refresh:
            stage.bank = None  # nothing reads it any more
        encoder.train()
        for rows in stage.batches():
            pool, known, targets = labels_of(stage.batch, rows)
            # With `gather` each rank encodes its part of the pool, else all of its own.
            part = pool[ranks.share(len(pool))] if config.gather else pool
            own = points.tokens.take(rows[ranks.share(len(rows))])
            x, z = _embed_both(encoder, own, run.labels.take(part), run.device)
            if config.gather:
                z = ranks.concatenate(z, ranks.counts(len(pool)))
            if stage.bank is not None:
                _store(run, stage.bank, rows, x)
            stage.step(_loss(stage, x, z, known, targets), len(x) / len(rows))
        measured = None
        if stage.scores_epoch:
            encoded = EncodedTexts(run)
            measured = _measure(stage, encoded, encoded.labels, labels_of)
        stage.end_epoch(measured)


def train_classifier(run: Run, encoded: EncodedTexts) -> Vectors:
    """Classifier stage: train one vector per label on all positives of each batch.

    `encoded` has the vectors of the trained encoder. The stage uses them throughout, unless it
    fine-tunes the encoder.
    """
    ranks, own = run.ranks, run.ranks.share(len(run.labels))
    classifier = torch.nn.Embedding(own.stop - own.start, run.encoder.dim, sparse=True)
    classifier.to(run.device)
    saved = run.checkpoint.load()
    if saved is None or saved[0]["stage"] != "classifier":
        with torch.no_grad():
            classifier.weight.copy_(torch.as_tensor(encoded.labels))
    rate = run.config.classifier_stage.learning_rate
    stage = _label_stage(run, classifier, rate, len(run.labels))
    stage.restore(saved)
    labels_of = partial(_batch_labels, stage)
    bounds = np.append(0, np.cumsum(ranks.counts(len(run.labels))))

    def loss_of(rows: npt.NDArray[np.int64], x: torch.Tensor) -> tuple[torch.Tensor, float]:
        pool, known, targets = labels_of(stage.batch, rows)
        # The pool ascends, and so do the ranks' labels.
        places = np.searchsorted(pool, bounds)
        ids = pool[places[ranks.rank] : places[ranks.rank + 1]] - own.start
        w = F.normalize(classifier(sent(torch.from_numpy(ids), run.device).long()), dim=1)
        w = ranks.concatenate(w, np.diff(places).tolist())
        return _loss(stage, x, w, known, targets), len(x) / len(rows)

    def trained() -> Vectors:
        return _joined(run, classifier.weight)

    _train_labels(stage, encoded, loss_of, lambda now: _measure(stage, now, trained(), labels_of))
    return trained()


def train_all_labels(run: Run, encoded: EncodedTexts) -> Vectors:
    """Classifier stage, each batch compared with all labels that have a training point.

    The others keep the encoder's vectors: negatives alone would push them away.
    """
    config, ranks = run.config.classifier_stage, run.ranks
    targets, known = run.points.truth.targets, run.points.truth.known
    seen = np.flatnonzero(targets.getnnz(axis=0))
    # All ranks train as many of them, whichever of all labels they have.
    of_all, of_seen = (np.cumsum(ranks.counts(n)) for n in (len(run.labels), len(seen)))
    ends = np.searchsorted(seen, of_all)
    own = ranks.share(len(run.labels))
    has = seen[(seen >= own.start) & (seen < own.stop)] - own.start
    places = torch.from_numpy(has).to(run.device)
    vectors = torch.as_tensor(encoded.labels).to(run.device, copy=True)
    start = ranks.redeal(vectors[places], ends, of_seen)
    labels = torch.nn.ModuleList(
        AllLabels(part, config.temperature, ranks) for part in split(run.encoder, start)
    )
    stage = _label_stage(run, labels, 0.0, len(seen))
    stage.restore(run.checkpoint.load())

    def trained() -> Vectors:
        parts = [cast(AllLabels, part).vectors for part in labels]
        vectors[places] = ranks.redeal(torch.cat(parts, dim=1).float(), of_seen, ends)
        return _joined(run, vectors)

    columns = seen[ranks.share(len(seen))]
    targets, known = (matrix.tocsc()[:, columns].tocsr() for matrix in (targets, known))

    def loss_of(rows: npt.NDArray[np.int64], x: torch.Tensor) -> tuple[torch.Tensor, float]:
        x = ranks.concatenate(x, ranks.counts(len(rows)))
        if not config.finetune:
            x.requires_grad_()
        of_batch = [CooIndex.of(matrix[rows]) for matrix in (known, targets)]
        rate = config.step * stage.optimizer.share
        seeds = stage.seeds(stage.batch).generate_state(1 + len(labels)).tolist()[1:]
        losses = [
            cast(AllLabels, part).step(own, of_batch[0], of_batch[1], rate, seed)
            for part, own, seed in zip(labels, split(run.encoder, x), seeds, strict=True)
        ]
        return torch.stack(losses).mean() if len(losses) > 1 else losses[0], 1.0

    def measure(now: EncodedTexts) -> dict[str, float]:
        # Every batch meets all labels.
        return {"P@1": _precision(run, now.held_out, trained()), "hard_negative_recall": 1.0}

    _train_labels(stage, encoded, loss_of, measure)
    return trained()


def _label_stage(run: Run, labels: torch.nn.Module, rate: float, rows: int) -> Stage:
    """The classifier stage, of a module that has `rows` labels on all ranks; not yet restored."""
    config = run.config.classifier_stage
    modules = {"classifier": ParameterGroup(labels, rate, rate, rows)}
    if config.finetune:
        rate = config.encoder_learning_rate
        modules["encoder"] = ParameterGroup(run.encoder, rate, rate)
    stage = Stage(run, "classifier", CLASSIFIER, config, modules)
    stage.score_every = _score_every(run, config, encodes=config.finetune)
    return stage


def _train_labels(
    stage: Stage,
    encoded: EncodedTexts,
    loss_of: Callable[[npt.NDArray[np.int64], torch.Tensor], tuple[torch.Tensor, float]],
    measure: Callable[[EncodedTexts], dict[str, float]],
) -> None:
    """The frame of both ways to train labels' vectors: `loss_of` gives the arguments of
    `Stage.step`, from a batch's rows and the unit vectors, after dropout, of this rank's part."""
    run, config, ranks = stage.run, stage.run.config.classifier_stage, stage.run.ranks
    frozen = None if config.finetune else encoded
    for _ in stage.epochs():
        stage.refresh(lambda: _point_vectors(run, None) if frozen is None else frozen.points)
        run.encoder.train(config.finetune)
        for rows in stage.batches():
            if frozen is None:
                x = _embed(run.encoder, run.points.tokens.take(rows[ranks.share(len(rows))]))
            else:
                x = frozen.batch(rows)
            x = F.normalize(F.dropout(x, config.dropout), dim=1)
            stage.step(*loss_of(rows, x))
        stage.end_epoch(measure(frozen or EncodedTexts(run)) if stage.scores_epoch else None)


def _make_model(run: Run, encoded: EncodedTexts, classifier: Vectors | None) -> Model:
    """Fit the fusion on the held-out points, add them to the voting points, evaluate and save."""
    config, dataset = run.config, run.dataset
    model = Model(
        encoder=run.encoder.eval(),
        label_texts=dataset.label_texts,
        label_vectors=encoded.labels,
        point_vectors=encoded.points,
        point_labels=run.points.truth.targets,
        point_rows=run.points.rows,
        classifier=classifier,
        fusions={},
        config=config.prediction,
        threads=config.threads,
        run_config=config,
    )
    lexical = _fit_lexical(run, model)
    for name, seen in (("all", False), ("trained", True)):
        if seen and {*model.scorers} <= {*REMEMBERING, "fused"}:
            continue
        model.fusions[name] = _fit_fusion(run, model, encoded.held_out, seen)
    model.lexical = lexical
    model.point_vectors = encoded.all_points()
    model.point_labels = run.all_truth.targets
    model.point_rows = run.rows
    if dataset.test_texts is not None and dataset.test_labels is not None:
        found = model.scores(dataset.test_texts, drop=dataset.drop_test)
        scored = model.evaluate(found, dataset.test_labels, drop=dataset.drop_test)
        # Usual in the literature: recall at 10 and 100, the other metrics at 1, 3 and 5.
        for name, values in scored.items():
            model.metrics[name] = {
                key: value
                for key, value in values.items()
                if key.startswith("R@") is (int(key.partition("@")[2]) >= 10)
            }
    if run.folder is not None:
        run.write_log()  # anew, if a finished run lost it
        model.save(run.folder)
    return model


def _check_scorers(dataset: Dataset, config: Config) -> None:
    """Some scorer must be left, before hours of training rather than after them."""
    on = {*config.prediction.scorers} - {"co_occurrence"}
    if config.classifier_stage.epochs == 0:
        on.discard("classifier")
    if not titles_apart(dataset.label_titles, dataset.label_texts):
        on.discard("tfidf_title")
    if not on:
        raise ValueError(
            f"prediction.scorers is {list(config.prediction.scorers)}, and there are none of "
            "these: classifier needs classifier_stage.epochs above 0, tfidf_title needs labels "
            "with titles and content, co_occurrence needs another scorer"
        )


def _warn_of_clusters_never_reached(config: Config) -> None:
    """Warn of a stage that asks for clusters and ends before the first epoch that has them."""
    for name in ("encoder_stage", "classifier_stage"):
        stage: StageConfig = getattr(config, name)
        first = min((epoch for epoch, size in stage.sizes().items() if size > 1), default=0)
        if 0 < stage.epochs <= first:
            setting = "schedule" if stage.schedule else "start_epoch"
            warnings.warn(
                f"all batches of the {name.removesuffix('_stage')} stage are random: it ends "
                f"before epoch {first}, the first with clusters (counted from 0). Set an earlier "
                f"{name}.{setting}, or more epochs",
                stacklevel=3,
            )


def _warn_of_collapse(run: Run, name: str, config: StageConfig) -> None:
    """Warn if a triplet loss stayed at its margin: where all vectors are the same it is that."""
    losses = [entry["loss"] for entry in run.log if entry["stage"] == name]
    # In passing a loss may have any value.
    stayed = all(math.isclose(loss, config.margin, rel_tol=0.01) for loss in losses[1:])
    if run.ranks.rank == 0 and config.loss == "triplet" and stayed and len(losses) > 2:
        warnings.warn(
            f"the {name} stage learnt nothing: its triplet loss stayed at the margin, "
            f"{config.margin}, as where all vectors are the same. Try another loss, "
            f"{name}_stage.loss=softmax, or a lower learning rate",
            stacklevel=4,
        )


def _fit_lexical(run: Run, model: Model) -> Lexical | None:
    """Fit what knows words alone on all points; the model gets the same without those held out."""
    on = {*run.config.prediction.scorers}
    if not on & LEXICAL:
        return None
    texts = [run.dataset.train_texts[row] for row in run.rows]
    titles, label_texts = run.dataset.label_titles, run.dataset.label_texts
    if "tfidf_title" not in on or not titles_apart(titles, label_texts):
        titles = None
    lexical = Lexical.fit(texts, label_texts, titles)
    trained = np.searchsorted(run.rows, run.points.rows)
    model.lexical = lexical.take(trained)
    if "tfidf_classifier" not in on:
        return lexical
    seed, threads = run.config.seed, run.config.threads
    truth, neighbours = run.all_truth, run.config.prediction.neighbours
    if len(trained) == len(run.rows):  # the data set has validation points of its own
        (short,) = lexical.shortlists([truth.targets], truth.known, neighbours, threads=threads)
        model.lexical = lexical.classified(truth.targets, short, seed=seed, threads=threads)
        return model.lexical
    # Labels of held-out points must not choose negatives either: those near them would be chosen,
    # and teach the classifiers to miss them.
    votes = truth.targets.multiply(np.isin(run.rows, run.points.rows)[:, None]).tocsr()
    votes.eliminate_zeros()
    short, short_of_all = lexical.shortlists(
        [votes, truth.targets], truth.known, neighbours, threads=threads
    )
    model.lexical = model.lexical.classified(
        truth.targets[trained], short[trained], seed=seed, threads=threads
    )
    return lexical.classified(truth.targets, short_of_all, seed=seed, threads=threads)


def _fit_fusion(run: Run, model: Model, held_out: Vectors, seen: bool) -> Fusion:
    """Fit the fusion of all scorers, or of those for training points, on the held-out points."""
    truth = run.held_out.truth
    candidates, features, _ = model.candidates(
        run.held_out_texts(), held_out, drop=truth.dropped, seen=seen
    )
    rows, _ = pairs_of(candidates)
    relevant = values_at(truth.targets, candidates) > 0
    points = len(np.unique(rows[relevant]))
    if points < FEWEST_POINTS and not seen:
        warnings.warn(
            f"held-out points with a label to predict: {points}, fewer than {FEWEST_POINTS}: the "
            "scorers are fused by fixed weights",
            stacklevel=5,
        )
    gains = None
    enough = run.points.truth.targets.shape[0] >= metrics.FEWEST_ROWS
    if run.config.prediction.fuse_for == "psp" and enough:
        gains = metrics.inverse_propensity(run.points.truth.targets)[candidates.indices]
    taught_by = len(run.points.rows) if isinstance(run.encoder, BagEncoder | Ensemble) else None
    fit = partial(Fusion.fit, rows=rows, relevant=relevant, gains=gains, taught_by=taught_by)
    fusion = fit(features)
    on = "co_occurrence" in run.config.prediction.scorers and not seen
    if on and fusion.calibration is not None and np.diff(model.point_labels.indptr).max() > 1:
        model.fusions["base"] = fusion
        features, _ = model.with_co_occurrence(candidates, features)
        fusion = fit(features)
    return fusion


def _batch_labels(
    stage: Stage,
    batch: int,
    rows: npt.NDArray[np.int64],
    *,
    one: bool = False,
    random_labels: int = 0,
    gather: bool = True,
) -> BatchLabels:
    """Labels of a batch of the epoch, the random ones drawn by its place in the run.

    With `one` each point has one target, drawn from its positives; else all its positives. With
    several ranks they are the labels of this rank's rows; but with `gather` the pool is that of the
    whole batch.
    """
    run, shared, ranks = stage.run, None, stage.run.ranks
    own, seeds = ranks.share(len(rows)), stage.seeds(batch)
    if ranks.size > 1 and not gather:
        rows, seeds = rows[own], stage.seeds(batch, ranks.rank)
    if random_labels:
        seed = int(stage.seeds().generate_state(2)[1])
        draws = SharedRandom(len(run.labels), random_labels, seed=seed)
        shared = draws.draw(stage.epoch * len(stage.sampler) + batch).ids
    truth = run.points.truth
    labels = batch_labels(
        truth.targets,
        rows,
        known=truth.known,
        shared=shared,
        rng=np.random.default_rng(seeds) if one else None,
        device=run.device,
    )
    return labels.part(own) if ranks.size > 1 and gather else labels


def _loss(
    stage: Stage, x: torch.Tensor, z: torch.Tensor, known: CooIndex, targets: CooIndex
) -> torch.Tensor:
    """The loss of points x and labels z: of an ensemble, the mean of its members' own losses."""
    members = zip(*(split(stage.run.encoder, vectors) for vectors in (x, z)), strict=True)
    losses = [stage.loss(a @ b.T, known, targets) for a, b in members]
    return torch.stack(losses).mean() if len(losses) > 1 else losses[0]


def _joined(run: Run, vectors: torch.Tensor) -> Vectors:
    """Labels' trained vectors as the core searches them. Members of an ensemble count alike."""
    if isinstance(run.encoder, Ensemble):
        vectors = torch.cat(split(run.encoder, vectors.detach()), dim=1)
    return normalize(to_device(vectors, run.core_device))


def _store(run: Run, bank: EmbeddingBank, rows: npt.NDArray[np.int64], x: torch.Tensor) -> None:
    """Store the vectors of a batch, x of which are this rank's, where each row belongs."""
    if run.ranks.size == 1:
        bank.update(rows, x)
        return
    vectors = run.ranks.all_rows(x.detach(), run.ranks.counts(len(rows)))
    own = run.ranks.share(len(run.points.tokens))
    here = np.flatnonzero((rows >= own.start) & (rows < own.stop))
    bank.update(rows[here] - own.start, vectors[torch.from_numpy(here)])


def _embed(encoder: Encoder, tokens: Tokens) -> torch.Tensor:
    """Unit vectors of texts, with gradients."""
    if not len(tokens) and is_sharded(encoder):  # which all ranks must call
        return _embed(encoder, Tokens.from_lists([[]]))[:0]
    if not len(tokens):  # a rank's part of a very small batch
        device = next(encoder.parameters(), torch.empty(0)).device
        return torch.zeros(0, encoder.dim, device=device, requires_grad=True)
    x = check_vectors(encoder(tokens), len(tokens), encoder.dim)
    return F.normalize(x.float(), dim=1)


def _embed_both(
    encoder: Encoder, points: Tokens, labels: Tokens, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of points and of labels.

    A transformer on a GPU gets both at once: it sorts them by length itself, and half as many
    kernels are launched. So does one that the ranks share: its weights are gathered once.
    """
    at_once = device.type == "cuda" and isinstance(encoder, TransformerEncoder)
    if not at_once and not is_sharded(encoder):
        return _embed(encoder, points), _embed(encoder, labels)
    both = _embed(encoder, Tokens.concatenate([points, labels]))
    return both[: len(points)], both[len(points) :]


def _point_vectors(run: Run, bank: EmbeddingBank | None) -> Vectors:
    """Vectors of the training points to cluster, each rank's share of them: from the bank, encoded
    where it has none."""
    tokens = run.own(run.points.tokens)
    if bank is None:
        return run.encode(tokens)
    rows = bank.unseen
    bank.update(rows, run.encode(tokens.take(rows)))
    vectors: Vectors = bank.vectors
    return vectors


def _score_every(
    run: Run, config: StageConfig, *, encodes: bool, trains_labels: bool = False
) -> int:
    """Epochs from one scoring to the next, by the work that training and scoring are.

    By work and not by time, so that a resumed run scores the same epochs. Where scores choose the
    weights, it is every epoch. `encodes`: each batch encodes its points; `trains_labels`: and its
    labels, so that scoring must encode all labels anew.
    """
    if run.config.keep == "best":
        return 1
    points, held_out, labels = run.points.tokens, run.held_out.tokens, run.labels
    measured = min(len(points), _MEASURED_POINTS)
    per_point = len(points.ids) / len(points)
    scoring = (len(held_out) + measured) * len(labels) * _SEARCH_PAIR
    trained = len(points) * (per_point if encodes else 1.0)
    batch = min(config.batch_size, len(points))
    pool = min(len(labels), batch * run.points.truth.targets.nnz / len(points))
    if encodes:
        scoring += len(held_out.ids) + measured * per_point
    if trains_labels:
        scoring += len(labels.ids)
        batches = math.ceil(len(points) / batch)
        trained += batches * pool * len(labels.ids) / len(labels)
    training = _TRAINED_TOKEN * trained + _LOSS_PAIR * len(points) * pool
    if scoring <= _LITTLE_WORK:
        return 1
    every: int = math.ceil(scoring / (_SCORING_SHARE * training))
    return every


def _measure(
    stage: Stage, encoded: EncodedTexts, label_vectors: Vectors, labels_of: _LabelsOf
) -> dict[str, float]:
    """What the log says of an epoch, for a scorer with these label vectors."""
    return {
        "P@1": _precision(stage.run, encoded.held_out, label_vectors),
        "hard_negative_recall": _hard_negative_recall(stage, encoded, label_vectors, labels_of),
    }


def _precision(run: Run, vectors: Vectors, label_vectors: Vectors) -> float:
    """P@1 on the held-out points."""
    own = run.ranks.share(len(run.held_out.tokens))
    truth = run.held_out.truth
    best = topk(
        vectors,
        label_vectors,
        1,
        metric="dot",
        drop=truth.dropped[own],
        threads=run.config.threads,
        group=run.ranks.group,
    )
    scored = metrics.evaluate(best, truth.targets[own], ks=[1])
    return run.ranks.mean(scored["P@1"], own.stop - own.start)


def _hard_negative_recall(
    stage: Stage, encoded: EncodedTexts, label_vectors: Vectors, labels_of: _LabelsOf
) -> float:
    """Share of each point's nearest non-positive labels that were in its batch's label pool.

    Measured at the end of an epoch, on its first batches.
    """
    run, ranks = stage.run, stage.run.ranks
    plan = stage.sampler.plan()
    in_pool = total = 0
    for batch in range(min(len(plan), max(1, _MEASURED_POINTS // stage.sampler.batch_size))):
        rows = plan[batch][ranks.share(len(plan[batch]))][: -(-_MEASURED_POINTS // ranks.size)]
        pool = labels_of(batch, plan[batch]).pool
        _, nearest = topk_arrays(
            encoded.some_points(rows),
            label_vectors,
            min(_HARD_NEGATIVES, len(run.labels)),
            drop=run.points.truth.known[rows],
            threads=run.config.threads,
            group=ranks.group,
        )
        ids = to_numpy(nearest)
        ids = ids[ids >= 0]
        in_pool += int(np.isin(ids, pool).sum())
        total += len(ids)
    return ranks.mean(in_pool / max(1, total), total)


_lock = threading.RLock()  # one thread trains at a time


def _free_lock() -> None:
    """In a forked process, where the thread that held the lock does not go on."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_free_lock)


class _torch_threads:
    """Let torch use that many threads within the block; 0 leaves the number as it is."""

    def __init__(self, count: int) -> None:
        self._count, self._before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        if self._count:
            torch.set_num_threads(self._count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self._before)

"""Both stages of training, on a small data set."""

import functools
import math
import re
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import scipy.sparse as sp
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import ngame
from ngame.batches import ClusterBatchSampler
from ngame.cluster.clusters import Clusters
from ngame.config import SCORERS
from ngame.data.tokens import Tokens
from ngame.encoders.bag import BagEncoder
from ngame.encoders.bank import EmbeddingBank
from ngame.encoders.encode import encode
from ngame.encoders.vectors import normalize
from ngame.prediction import lexical
from ngame.report.measures import RunReport
from ngame.training import loops as training
from ngame.training import stage as stage_module
from ngame.training.checkpoint import Checkpoint
from ngame.training.encoded import EncodedTexts
from ngame.training.optimizer import Optimizer
from ngame.training.run import Run, Truth, split_held_out

ENCODER_ONLY = ("classifier_stage.epochs=0",)
CLASSIFIER_ONLY = ("encoder_stage.epochs=0", "classifier_stage.epochs=1")


@pytest.fixture(scope="module")
def dataset():
    return tiny.dataset()


@pytest.fixture
def log(logs):
    """The log of the last training."""
    return lambda: logs()[-1]


def weights(model):
    return {name: value.clone() for name, value in model.encoder.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Words(torch.nn.Module):
    """A user's own encoder: the mean of dense word embeddings."""

    dim = 8

    def __init__(self, words=1000):
        super().__init__()
        self.vocabulary = {}
        self.weights = torch.nn.EmbeddingBag(words, self.dim, include_last_offset=True)
        torch.nn.init.normal_(self.weights.weight, generator=torch.Generator().manual_seed(0))
        self.trained_on = set()
        self.rows_evaluated = 0

    def tokenize(self, texts):
        number = self.vocabulary.setdefault
        return Tokens.from_lists(
            [number(word, len(self.vocabulary)) for word in text.split()] for text in texts
        )

    def forward(self, tokens):
        if self.training:
            self.trained_on.update(tokens.ids.tolist())
        else:
            self.rows_evaluated += len(tokens)
        ids = torch.from_numpy(np.asarray(tokens.ids)).long()
        return self.weights(ids, torch.from_numpy(tokens.offsets))

    def save(self, folder):
        pass


# Results


@pytest.mark.parametrize("stage", ["encoder", "classifier"])
def test_a_triplet_loss_that_stays_at_its_margin(stage):
    """As where all texts, and so all vectors, are the same."""
    data = tiny.dataset()
    texts = ["ba ke"] * len(data.train_texts), ["ba ke"] * len(data.label_texts)
    same = ngame.Dataset(texts[0], data.train_labels, texts[1])
    one = "encoder_stage.epochs=0" if stage == "classifier" else "classifier_stage.epochs=0"
    frozen = f"{stage}_stage.learning_rate=1e-9", "encoder_stage.sparse_learning_rate=1e-9"
    more = f"{stage}_stage.loss='triplet'", "self_pairs='keep'"
    config = tiny.config(f"{stage}_stage.epochs=3", one, *frozen, *more)
    says = f"the {stage} stage learnt nothing: its triplet loss stayed at the margin, 0.3, .*"
    with pytest.warns(UserWarning, match=f"{says}{stage}_stage.loss=softmax") as caught:
        ngame.train(same, config)
    assert Path(caught[0].filename) == Path(__file__)
    config = tiny.config(f"{stage}_stage.epochs=3", one, f"{stage}_stage.loss='triplet'")
    ngame.train(data, config)  # in passing its loss may be near the margin: a warning would raise


def test_beside_another_training_and_without_gradients():
    """Of two threads one trains at a time; what the caller set for gradients does not matter."""
    data, config = tiny.dataset(), tiny.config("encoder.dropout=0.2")
    alone = ngame.train(data, config).label_vectors
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(ngame.train, data, config) for _ in range(2)]
        assert all(np.array_equal(one.result().label_vectors, alone) for one in both)
    for ambient in (torch.no_grad, torch.inference_mode):
        with ambient():
            assert np.array_equal(ngame.train(data, config).label_vectors, alone)


def test_it_learns(dataset):
    model = ngame.train(dataset, tiny.config())
    for scorer, scored in model.metrics.items():
        assert scored["P@1"] > 0.6, scorer  # guessing gives 1 in 16
    assert model.metrics["fused"]["R@10"] > 0.8
    untrained = tiny.config("encoder_stage.epochs=0", "classifier_stage.epochs=0")
    start = ngame.train(dataset, untrained).metrics["encoder"]["P@1"]
    assert model.metrics["encoder"]["P@1"] > start


def test_points_that_are_labels(log):
    """Articles that link to others of their topic: each is nearest to itself, and never linked."""
    rng = np.random.default_rng(0)
    topics = rng.integers(0, 30, 150)
    texts = [
        " ".join(map(tiny.word, [5 * topic, 5 * topic + 150, *rng.integers(500, 900, 4)]))
        for topic in topics
    ]
    links = (topics[:, None] == topics) & (rng.random((150, 150)) < 0.5)
    np.fill_diagonal(links, False)
    rows = np.flatnonzero(links.any(axis=1))
    train, test = rows[:100], rows[100:]
    data = ngame.Dataset(
        [texts[row] for row in train],
        links[train],
        texts,
        test_texts=[texts[row] for row in test],
        test_labels=links[test],
    )
    dropped = ngame.train(data, tiny.config()).metrics["encoder"]["P@1"]
    held_out = log()[-1]["P@1"]
    kept = ngame.train(data, tiny.config("self_pairs='keep'")).metrics["encoder"]["P@1"]
    assert dropped > 2 * kept, (dropped, kept)
    assert held_out > 2 * log()[-1]["P@1"]


@pytest.mark.parametrize("loss", ["triplet", "softmax"])
@pytest.mark.parametrize("positives", ["one", "all"])
@pytest.mark.parametrize("embeddings", ["fresh", "bank"])
@pytest.mark.parametrize("finetune", ["false", "true"])
def test_every_combination_runs(dataset, log, loss, positives, embeddings, finetune):
    model = ngame.train(
        dataset,
        tiny.config(
            f"encoder_stage.loss={loss}",
            f"encoder_stage.positives={positives}",
            f"encoder_stage.embeddings={embeddings}",
            "encoder_stage.random_share=0.25",
            f"classifier_stage.loss={loss}",
            f"classifier_stage.finetune={finetune}",
            "classifier_stage.cluster_size=4",
            "encoder.dropout=0.1",
        ),
    )
    assert model.metrics["fused"]["P@1"] > 0.5
    stages = [(entry["stage"], entry["epoch"], entry["cluster_size"]) for entry in log()]
    assert stages == [
        ("encoder", 0, 1),
        ("encoder", 1, 4),
        ("classifier", 0, 1),
        ("classifier", 1, 4),
    ]
    for entry in log():
        assert math.isfinite(entry["loss"])
        assert 0 < entry["hard_negative_recall"] <= 1
        assert 0 <= entry["P@1"] <= 1
        if entry["cluster_size"] == 1:
            assert entry["neighbour_share"] is None
        else:
            assert 0.1 < entry["neighbour_share"] <= 3 / 10  # a row has 3 others in its cluster
    assert log()[1]["loss"] < log()[0]["loss"]


def test_without_a_classifier(dataset):
    model = ngame.train(dataset, tiny.config(*ENCODER_ONLY))
    assert model.classifier is None
    on = tuple(name for name in SCORERS if name not in ("classifier", "tfidf_title"))
    assert model.scorers == (*on, "fused") == tuple(model.metrics)


def test_labels_of_held_out_points_do_not_reach_what_the_fusion_is_fitted_on(monkeypatch):
    """Neither as positives nor by the choice of negatives."""
    config = tiny.config(*ENCODER_ONLY, "encoder_stage.epochs=0")
    dataset = tiny.dataset()
    _, held_out = split_held_out(Truth.of(dataset.train_labels, None), config)
    labels = dataset.train_labels.tolil()
    labels[held_out] = labels[held_out[::-1]]  # of another
    fitted = []
    fit = training._fit_fusion
    monkeypatch.setattr(
        training,
        "_fit_fusion",
        lambda run, model, *rest: fitted.append(model.lexical) or fit(run, model, *rest),
    )
    finished = [
        ngame.train(tiny.dataset(train_labels=sp.csr_matrix(one)), config).lexical
        for one in (dataset.train_labels, labels)
    ]
    assert fitted[0].weights.nnz > 0
    assert (fitted[0].weights != fitted[2].weights).nnz == 0
    assert (finished[0].weights != finished[1].weights).nnz > 0


@tiny.few_held_out
def test_co_occurrence_needs_points_with_two_labels_and_probabilities():
    """And it must be asked for."""
    whole = tiny.dataset()
    settings = (*ENCODER_ONLY, "encoder_stage.epochs=0")
    one = sp.csr_matrix(np.eye(tiny.LABELS, dtype=np.float32)[np.arange(300) % tiny.LABELS])
    for dataset, asked in (
        (tiny.dataset(train_labels=one), ()),
        (whole, ('prediction.scorers=["encoder", "tfidf"]',)),
        (whole, ("max_validation=5",)),  # too few to calibrate on
    ):
        model = ngame.train(dataset, tiny.config(*settings, *asked))
        assert "co_occurrence" not in model.scorers
        assert set(model.fusions) == {"all", "trained"}
        assert "log co_occurrence" not in model.fusions["all"].weights
    model = ngame.train(
        whole, tiny.config(*settings, 'prediction.scorers=["tfidf", "co_occurrence"]')
    )
    assert model.scorers == ("tfidf", "co_occurrence", "fused")
    assert set(model.fusions) == {"all", "trained", "base"}
    with pytest.raises(
        ValueError, match=r"there are none of these: .* co_occurrence needs another"
    ):
        ngame.train(whole, tiny.config('prediction.scorers=["co_occurrence"]'))


def test_labels_of_held_out_points_do_not_speak_for_others(monkeypatch):
    """Where they would, those of rare labels would give themselves away."""
    shared = []
    count = training.Model.with_co_occurrence

    def counted(model, candidates, features):
        found = count(model, candidates, features)
        shared.append(model._shares[0].shape[0])
        return found

    monkeypatch.setattr(training.Model, "with_co_occurrence", counted)
    ngame.train(tiny.dataset(), tiny.config(*ENCODER_ONLY, "encoder_stage.epochs=0"))
    assert shared == [240, 300]


def test_points_that_are_not_held_out_are_classified_once(monkeypatch, dataset):
    config = tiny.config(*ENCODER_ONLY, "encoder_stage.epochs=0")
    own = tiny.dataset(val_texts=dataset.test_texts, val_labels=dataset.test_labels)
    calls = []
    trained = lexical.linear_classifiers
    monkeypatch.setattr(
        lexical,
        "linear_classifiers",
        lambda *a, **k: calls.append(a[0].shape[0]) or trained(*a, **k),
    )
    ngame.train(own, config)
    assert calls == [300]
    ngame.train(dataset, config)
    assert calls == [300, 240, 300]


def test_without_test_points():
    whole = tiny.dataset()
    dataset = ngame.Dataset(whole.train_texts, whole.train_labels, whole.label_texts)
    model = ngame.train(dataset, tiny.config(*ENCODER_ONLY))
    assert model.metrics == {}
    assert model.predict(["x"], 3).nnz == 3


def test_users_own_encoder(dataset):
    encoder = Words()
    before = encoder.weights.weight.detach().clone()
    model = ngame.train(dataset, tiny.config("classifier_stage.finetune=true"), encoder=encoder)
    assert model.encoder is encoder
    assert not torch.equal(encoder.weights.weight, before)
    assert model.metrics["fused"]["P@1"] > 0.2  # three times what guessing gives
    evaluating = Words().eval()  # as a loaded module often is
    ngame.train(dataset, tiny.config(*ENCODER_ONLY), encoder=evaluating)
    assert evaluating.trained_on


# Batches


@pytest.fixture
def plans(monkeypatch):
    """Plans of the samplers, (epoch, clusters, batches), and refreshes, (epoch, clusters)."""
    planned, refreshed = [], []
    plan, refresh = ClusterBatchSampler.plan, ClusterBatchSampler.refresh

    def keep_plan(self, *arguments):
        batches = plan(self, *arguments)
        planned.append((self.epoch, self.clusters, batches))
        return batches

    def keep_refresh(self, source, **options):
        refresh(self, source, **options)
        refreshed.append((self.epoch, self.clusters))

    monkeypatch.setattr(ClusterBatchSampler, "plan", keep_plan)
    monkeypatch.setattr(ClusterBatchSampler, "refresh", keep_refresh)
    return planned, refreshed


def split_clusters(clusters, batches):
    """Number of clusters that are split over several batches."""
    batch_of = np.empty(len(clusters.order), int)
    for number, rows in enumerate(batches):
        batch_of[rows] = number
    return sum(len(set(batch_of[ids].tolist())) > 1 for ids in clusters)


@pytest.mark.parametrize("embeddings", ["fresh", "bank"])
def test_clusters_act_in_the_epoch_they_are_made_for(dataset, plans, embeddings):
    planned, refreshed = plans
    sets = ("encoder_stage.epochs=4", f"encoder_stage.embeddings={embeddings}")
    ngame.train(dataset, tiny.config(*sets, *ENCODER_ONLY))
    assert [epoch for epoch, _ in refreshed] == [1, 2, 3]
    made = dict(refreshed)
    assert [epoch for epoch, _, _ in planned[::2]] == [
        0,
        1,
        2,
        3,
    ]  # twice each: once for the recall
    for epoch, clusters, batches in planned:
        if epoch == 0:
            assert clusters is None
            # Random batches split nearly all of the first clusters.
            assert split_clusters(made[1], batches) > 40
        else:
            assert clusters is made[epoch]
            assert split_clusters(clusters, batches) == 0
    assert made[1] != made[2]


def test_clusters_from_the_first_epoch_on(dataset, plans):
    """The bank is still empty: the first clusters come from an encoding pass, not from zeros."""
    _, refreshed = plans
    sets = ("encoder_stage.start_epoch=0", "encoder_stage.epochs=1", *ENCODER_ONLY)
    ngame.train(dataset, tiny.config(*sets))
    ((epoch, clusters),) = refreshed
    assert epoch == 0
    encoder = ngame.train(dataset, tiny.config("encoder_stage.epochs=0", *ENCODER_ONLY)).encoder
    trained, _ = split_held_out(Truth.of(dataset.train_labels, None), tiny.config())
    texts = [dataset.train_texts[row] for row in trained]
    x = encode(encoder, encoder.tokenize(texts))
    random = ngame.Clusters(np.random.default_rng(0).permutation(240), np.arange(0, 241, 4))
    assert clusters.coherence(x) > random.coherence(x) + 0.2


class RecordingBank(EmbeddingBank):
    """Counts the rows stored in every bank."""

    counts: ClassVar[list[int]] = []

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.counts.append(0)

    def update(self, rows, vectors):
        super().update(rows, vectors)
        self.counts[-1] += len(rows)


@pytest.mark.parametrize(
    ("sets", "epochs_stored"),
    [
        (["encoder_stage.cluster_size=1"], []),
        pytest.param(
            ["encoder_stage.start_epoch=4"],
            [],
            marks=pytest.mark.filterwarnings("ignore:all batches of the encoder stage are random"),
        ),
        (["encoder_stage.start_epoch=1"], [3]),
        (["encoder_stage.start_epoch=0"], [1 + 3]),  # the first refresh encodes all rows
        (["encoder_stage.refresh_every=2"], [3]),
        (["encoder_stage.refresh_every=3"], [1]),
        (["encoder_stage.schedule={0 = 1, 1 = 4, 2 = 1}"], [1]),
        (["encoder_stage.embeddings='fresh'"], []),
    ],
)
def test_vectors_are_stored_only_for_a_later_refresh(
    dataset, monkeypatch, tmp_path, sets, epochs_stored
):
    monkeypatch.setattr(training, "EmbeddingBank", RecordingBank)
    monkeypatch.setattr(RecordingBank, "counts", [])
    sets = ("encoder_stage.epochs=4", *sets, *ENCODER_ONLY)
    ngame.train(dataset, tiny.config(*sets), folder=tmp_path)
    assert RecordingBank.counts == [240 * epochs for epochs in epochs_stored]
    _, tensors = Checkpoint(tmp_path / "checkpoint", 0).load()
    assert not [name for name in tensors if name.startswith("bank.")]


def test_a_checkpoint_before_a_refresh_has_the_bank(dataset, monkeypatch):
    names = []
    monkeypatch.setattr(
        Checkpoint, "save", lambda self, meta, tensors: names.append((meta["epoch"], set(tensors)))
    )
    monkeypatch.setattr(Checkpoint, "due", lambda self: True)
    sets = ("encoder_stage.epochs=3", "encoder_stage.refresh_every=2", *ENCODER_ONLY)
    ngame.train(dataset, tiny.config(*sets))
    assert len(names) == 3 * 8  # one per batch: after the last one, at the end of the epoch
    for position, (_, saved) in enumerate(names, 1):
        # The last refresh is at the start of epoch 1, after the save that ends epoch 0.
        assert ("bank.vectors" in saved) is (position <= 8)


def test_cluster_sizes_are_those_asked_for(dataset, plans, log):
    _, refreshed = plans
    sets = ["encoder_stage.epochs=5", "encoder_stage.refresh_every=2"]
    ngame.train(
        dataset, tiny.config(*sets, "encoder_stage.schedule={1 = 3, 4 = 16}", *ENCODER_ONLY)
    )
    sizes = [(epoch, set(np.diff(clusters.offsets))) for epoch, clusters in refreshed]
    assert sizes == [(1, {3}), (3, {3}), (4, {16})]
    assert [entry["cluster_size"] for entry in log()] == [1, 3, 3, 3, 16]


def test_hard_negative_recall(dataset, monkeypatch):
    """Against a slow computation, in both stages and for both kinds of positives."""
    fast, compared = training._hard_negative_recall, []

    def both(stage, encoded, items, labels_of):
        value = fast(stage, encoded, items, labels_of)
        positives = getattr(stage.config, "positives", "all")
        if positives == "all":
            points = stage.run.points
            labels = points.truth.known.toarray() > 0
            vectors = fresh = encode(stage.run.encoder, points.tokens)
            if stage.name == "classifier":
                vectors = encoded.points.astype(np.float32)
                np.testing.assert_allclose(vectors, normalize(fresh), atol=5e-4)
            in_pool = []
            for rows in stage.sampler.plan():
                pool = set(np.flatnonzero(labels[rows].any(axis=0)))
                for row in rows:
                    order = np.argsort(-(vectors[row] @ items.T))
                    nearest = [label for label in order if not labels[row, label]][:10]
                    in_pool += [label in pool for label in nearest]
            assert value == pytest.approx(np.mean(in_pool), abs=1e-9)
        compared.append((stage.name, positives, value))
        return value

    monkeypatch.setattr(training, "_hard_negative_recall", both)
    small = ("encoder_stage.batch_size=8", "classifier_stage.batch_size=8")
    ngame.train(dataset, tiny.config(*small))
    ngame.train(dataset, tiny.config(*small, "encoder_stage.positives=one", *ENCODER_ONLY))
    values = {(name, positives): value for name, positives, value in compared}
    assert len(values) == 3
    assert values["encoder", "one"] < values["encoder", "all"]


@pytest.mark.parametrize(
    ("sets", "setting"),
    [
        (["encoder_stage.epochs=1"], "encoder_stage.start_epoch"),
        (["encoder_stage.schedule={0 = 1, 2 = 4}"], "encoder_stage.schedule"),
    ],
)
def test_clusters_that_are_never_reached(dataset, log, sets, setting):
    says = (
        r"^all batches of the encoder stage are random: it ends before epoch \d, the first with "
        rf"clusters \(counted from 0\)\. Set an earlier {re.escape(setting)}, or more epochs$"
    )
    with pytest.warns(UserWarning, match=says):
        ngame.train(dataset, tiny.config(*sets, *ENCODER_ONLY))
    assert {entry["cluster_size"] for entry in log()} == {1}


def test_a_long_epoch_says_where_it_is(dataset, monkeypatch, capfd):
    """Without a terminal: a line an epoch, and one about every minute within it."""
    ngame.train(dataset, tiny.config(*ENCODER_ONLY))
    short = capfd.readouterr().err.splitlines()
    assert len(short) == 2
    monkeypatch.setattr(stage_module, "LINE_SECONDS", 0.0)
    ngame.train(dataset, tiny.config(*ENCODER_ONLY))
    lines = capfd.readouterr().err.splitlines()
    said = [re.search(r"^encoder: epoch (\d)/2, loss \d\.\d+, batch (\d) of 8$", s) for s in lines]
    places = [tuple(map(int, one.groups())) for one in said if one]
    assert places == [(epoch, batch) for epoch in (1, 2) for batch in range(1, 8)]
    assert len(lines) == len(places) + 2


@tiny.few_held_out
def test_scoring_takes_a_twentieth_of_the_work(log, monkeypatch, capfd):
    """Many labels and few points: not every epoch is scored, but the last one of each stage."""
    dataset = tiny.dataset(40)
    none = sp.csr_matrix((40, 2976), dtype=np.float32)
    labels = sp.hstack([dataset.train_labels, none], format="csr")
    texts = [*dataset.label_texts, *(f"{tiny.word(row % 1000)} more" for row in range(2976))]
    wide = ngame.Dataset(dataset.train_texts, labels, texts)
    epochs = ("encoder_stage.epochs=5", "classifier_stage.epochs=3")

    def scored(*sets):
        ngame.train(wide, tiny.config(*epochs, *sets))
        assert all((x["P@1"] is None) == (x["hard_negative_recall"] is None) for x in log())
        return [(x["stage"], x["epoch"]) for x in log() if x["P@1"] is not None]

    monkeypatch.setattr(training, "_LITTLE_WORK", 100)
    last = [("encoder", 4), ("classifier", 2)]
    found = scored()
    assert found == last
    lines = [line for line in capfd.readouterr().err.splitlines() if ": epoch" in line]
    assert [line.split(",")[0] for line in lines if "held-out" in line] == [
        "encoder: epoch 5/5",
        "classifier: epoch 3/3",
    ]
    monkeypatch.setattr(training, "_SCORING_SHARE", 6)
    assert len(scored()) > 2
    every = [("encoder", epoch) for epoch in range(5)] + [("classifier", row) for row in range(3)]
    monkeypatch.setattr(training, "_SCORING_SHARE", 0.05)
    assert scored("keep='best'") == every
    monkeypatch.setattr(training, "_LITTLE_WORK", 50_000)
    assert scored() == every


@pytest.mark.parametrize("refresh_every", [1, 2])
def test_the_seconds_of_an_epoch_are_those_of_its_parts(
    dataset, log, monkeypatch, tmp_path, refresh_every
):
    """Refreshing, measuring and updates; NN10 of the clusters in use when points are scored."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def takes(seconds, owner, name):
        function = getattr(owner, name)

        def slow(*arguments, **others):
            nonlocal now
            now += seconds
            return function(*arguments, **others)

        monkeypatch.setattr(owner, name, slow)

    takes(3, ClusterBatchSampler, "refresh")
    takes(5, Clusters, "neighbour_share")
    takes(7, training, "_measure")
    takes(0.5, stage_module.Stage, "step")
    monkeypatch.setattr(training, "_score_every", lambda *_, **__: 2)
    epochs = ("encoder_stage.epochs=5", f"encoder_stage.refresh_every={refresh_every}")
    ngame.train(dataset, tiny.config(*ENCODER_ONLY, *epochs), folder=tmp_path / "run")
    # Refreshed before epochs 1, 2, 3, 4 or 1 and 3, scored after 0, 2, 4.
    refreshing = [0, 3, 3, 3, 3] if refresh_every == 1 else [0, 3, 0, 3, 0]
    measuring = [7, 0, 12, 0, 12] if refresh_every == 1 else [7, 5, 7, 5, 7]
    known = [2, 4] if refresh_every == 1 else [1, 2, 3, 4]
    updates = 0.5 * 8  # batches of an epoch
    seconds = [*map(sum, zip(refreshing, measuring, [updates] * 5, strict=True))]
    assert [x["seconds"] for x in log()] == seconds
    assert [x["measure_seconds"] for x in log()] == measuring
    shares = [x["refresh_share"] for x in log()]
    assert shares == [round(a / b, 4) for a, b in zip(refreshing, seconds, strict=True)]
    assert [x["epoch"] for x in log() if x["neighbour_share"] is not None] == known
    assert [x["epoch"] for x in log() if x["P@1"] is not None] == [0, 2, 4]
    told = RunReport(tmp_path / "run").seconds()
    assert told.pop("encoder: refreshes") == pytest.approx(sum(refreshing), abs=0.01)
    assert told.pop("encoder: measuring") == sum(measuring)
    assert told == {"encoder: updates": pytest.approx(5 * updates, abs=0.01)}


@st.composite
def batch_cases(draw):
    points, labels = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    y = rng.random((points, labels)) < 0.4
    y[np.arange(points), rng.integers(labels, size=points)] = True
    pairs = rng.integers((points, labels), size=(draw(st.integers(0, 8)), 2))
    return rng, y, pairs


@given(batch_cases())
def test_dropped_pairs_are_known_and_not_targets(case):
    _, y, pairs = case
    truth = Truth.of(sp.csr_matrix(y.astype(np.float32)), pairs)
    dropped = np.zeros(y.shape, bool)
    dropped[pairs[:, 0], pairs[:, 1]] = True
    np.testing.assert_array_equal(truth.targets.toarray() > 0, y & ~dropped)
    np.testing.assert_array_equal(truth.known.toarray() > 0, y | dropped)


@pytest.mark.parametrize("positives", ["one", "all"])
def test_random_labels_join_every_pool(dataset, monkeypatch, positives):
    """They are drawn anew each step; a known positive among them is masked."""
    labels_of, pools = training.batch_labels, []

    def keep(labels, rows, *, shared, **options):
        found = labels_of(labels, rows, shared=shared, **options)
        if shared is not None:
            pools.append((found.pool, shared))
            mask = np.zeros((len(rows), len(found.pool)), bool)
            mask[found.known.rows, found.known.columns] = True
            np.testing.assert_array_equal(mask, labels[rows][:, found.pool].toarray() > 0)
        return found

    monkeypatch.setattr(training, "batch_labels", keep)
    sets = ("encoder_stage.batch_size=4", f"encoder_stage.positives={positives}", *ENCODER_ONLY)
    ngame.train(dataset, tiny.config("encoder_stage.random_labels=5", *sets))
    assert len(pools) > 100
    assert all(np.isin(shared, pool).all() and len(shared) == 5 for pool, shared in pools)
    # Each draw is seen twice: in its step, and where hard-negative recall is measured.
    assert len({tuple(shared) for _, shared in pools}) > len(pools) / 4


# Updates


@functools.cache
def trained(*sets):
    """The weights after both stages, without what follows, of a few points."""
    config = tiny.config("encoder_stage.cluster_size=1", *sets)
    run = Run(tiny.dataset(60), config, None, False, None)
    with torch.random.fork_rng():
        training.train_encoder(run)
        classifier = training.train_classifier(run, EncodedTexts(run))
    weights = [*run.encoder.state_dict().values(), torch.as_tensor(classifier)]
    return torch.cat([weight.float().ravel() for weight in weights])


TRIPLET = "encoder_stage.loss='triplet'"
CLUSTERED = "encoder_stage.schedule={0 = 4}"


@pytest.mark.parametrize(
    ("base", "setting"),
    [
        *(
            ((), f"{stage}_stage.{setting}")
            for stage in ("encoder", "classifier")
            for setting in ("temperature=0.1", "clip=0.001", "warmup=0.9", "learning_rate=0.001")
        ),
        ((), "encoder.dropout=0.3"),
        ((), "encoder_stage.sparse_learning_rate=0.001"),
        ((), "encoder_stage.weight_decay=0.5"),
        ((), "encoder_stage.random_labels=5"),
        ((), "encoder_stage.positives='one'"),
        ((), "classifier_stage.dropout=0.0"),
        ((TRIPLET,), "encoder_stage.margin=0.1"),
        ((TRIPLET,), "encoder_stage.negatives=1"),
        ((CLUSTERED,), "encoder_stage.random_share=0.5"),
        ((CLUSTERED,), "encoder_stage.embeddings='fresh'"),
        ((), CLUSTERED),
        ((), TRIPLET),
    ],
)
def test_settings_of_a_stage_act(base, setting):
    """None is read and forgotten."""
    assert not torch.equal(trained(*base), trained(*base, setting))


def test_equal_settings_train_equal_weights():
    """Without this the test above could not fail."""
    assert torch.equal(trained(), trained.__wrapped__())


def test_gradients_of_several_batches_are_averaged(dataset, monkeypatch):
    """Eight batches in groups of three: the last update is the mean of two."""
    found = []

    def record(self):
        found.append([p.grad.to_dense().clone() for p in self._parameters])
        for optimizer in self._optimizers.values():
            optimizer.zero_grad()
        self.updates += 1

    monkeypatch.setattr(Optimizer, "step", record)
    gradients = {}
    for accumulate in (1, 3):
        found.clear()
        sets = (
            "encoder_stage.epochs=1",
            "encoder_stage.cluster_size=1",
            f"encoder_stage.accumulate={accumulate}",
        )
        ngame.train(dataset, tiny.config(*sets, *ENCODER_ONLY))
        gradients[accumulate] = list(found)
    assert len(gradients[1]) == 8
    groups = [gradients[1][:3], gradients[1][3:6], gradients[1][6:]]
    assert len(gradients[3]) == len(groups)
    for group, accumulated in zip(groups, gradients[3], strict=True):
        for parts, whole in zip(zip(*group, strict=True), accumulated, strict=True):
            torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-4, atol=1e-7)


def test_a_classifier_step_touches_only_the_labels_of_its_batch(dataset, monkeypatch):
    pools, changed = [], []
    labels_of, step = training.batch_labels, Optimizer.step

    def keep_pool(*arguments, **options):
        found = labels_of(*arguments, **options)
        pools.append(set(found.pool.tolist()))
        return found

    def compare(self):
        (weight,) = self._parameters
        before = weight.detach().clone()
        step(self)
        changed.append(set(torch.nonzero((weight != before).any(dim=1))[:, 0].tolist()))

    monkeypatch.setattr(training, "batch_labels", keep_pool)
    monkeypatch.setattr(Optimizer, "step", compare)
    sets = ("classifier_stage.batch_size=8", "classifier_stage.weight_decay=0.5")
    ngame.train(dataset, tiny.config(*sets, *CLASSIFIER_ONLY))
    assert len(changed) == 30
    for touched, pool in zip(changed, pools, strict=False):
        assert touched
        assert touched <= pool
        assert len(pool) < tiny.LABELS


@pytest.mark.parametrize("finetune", ["true", "false"])
def test_the_classifier_stage_trains_the_encoder_only_if_asked(dataset, finetune):
    encoder = BagEncoder.fit(dataset.train_texts, dim=16)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    sets = (f"classifier_stage.finetune={finetune}", *CLASSIFIER_ONLY)
    model = ngame.train(dataset, tiny.config(*sets), encoder=encoder)
    assert same(before, weights(model)) is (finetune == "false")
    # The classifier starts from the label embeddings and changes.
    start = ngame.train(dataset, tiny.config("encoder_stage.epochs=0", *ENCODER_ONLY))
    moved = np.abs(model.classifier - start.label_vectors).max(axis=1)
    assert (moved > 1e-3).all()
    assert (np.sum(model.classifier * model.label_vectors, axis=1) > 0.3).all()


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_texts_are_encoded_once_by_a_frozen_encoder(dataset, epochs):
    """For training, validation, recall, clusters, the fusion and the model together."""
    encoder = Words()
    model = ngame.train(
        dataset,
        tiny.config(
            "encoder_stage.epochs=0",
            f"classifier_stage.epochs={epochs}",
            "classifier_stage.cluster_size=4",
            "classifier_stage.start_epoch=0",
        ),
        encoder=encoder,
    )
    distinct = 300 + tiny.LABELS
    assert encoder.rows_evaluated == distinct + 60  # test points
    assert not encoder.trained_on
    # In the order of the data set, held-out points among the others.
    expected = model.encode(dataset.train_texts)
    np.testing.assert_allclose(model.point_vectors.astype(np.float32), expected, atol=5e-4)
    assert (model.point_labels != dataset.train_labels).nnz == 0


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_model_has_the_vectors_of_its_fine_tuned_encoder(dataset, keep):
    encoder = Words()
    sets = ("classifier_stage.finetune=true", "classifier_stage.epochs=3", f"keep={keep}")
    model = ngame.train(dataset, tiny.config(*sets), encoder=encoder)
    assert encoder.rows_evaluated > 3 * 300
    np.testing.assert_array_equal(model.encode(dataset.label_texts), model.label_vectors)
    expected = model.encode(dataset.train_texts)
    np.testing.assert_allclose(model.point_vectors.astype(np.float32), expected, atol=5e-4)


@pytest.mark.parametrize(("keep", "chosen"), [("best", 1), ("last", 2)])
def test_which_epoch_is_kept(dataset, monkeypatch, keep, chosen):
    seen, scripted = [], [0.5, 0.9, 0.7]

    def precision(run, *_):
        seen.append({name: v.clone() for name, v in run.encoder.state_dict().items()})
        return scripted[len(seen) - 1]

    monkeypatch.setattr(training, "_precision", precision)
    sets = ("encoder_stage.epochs=3", f"keep={keep}")
    model = ngame.train(dataset, tiny.config(*sets, *ENCODER_ONLY))
    assert not same(seen[1], seen[2])
    assert same(weights(model), seen[chosen])


# Held-out and test points


def numbered(points=60, labels=6, **more):
    """Every text is one unique word."""
    y = sp.csr_matrix(np.eye(labels, dtype=np.float32)[np.arange(points) % labels])
    return ngame.Dataset(
        [f"point{row}" for row in range(points)],
        y,
        [f"label{label}" for label in range(labels)],
        test_texts=["test0", "test1"],
        test_labels=y[:2],
        **more,
    )


def test_held_out_and_test_points_are_never_trained_on():
    dataset, encoder = numbered(), Words()
    config = tiny.config("classifier_stage.finetune=true")
    ngame.train(dataset, config, encoder=encoder)
    words = {number: word for word, number in encoder.vocabulary.items()}
    trained, held_out = split_held_out(Truth.of(dataset.train_labels, None), config)
    assert len(held_out) == 12
    assert sorted([*trained, *held_out]) == list(range(60))
    points = {f"point{row}" for row in trained}
    assert {words[number] for number in encoder.trained_on} == points | set(dataset.label_texts)


@tiny.few_held_out
def test_validation_points_are_held_out():
    """All training points are then trained on and vote; validation points do neither."""
    val = {"val_texts": ["val0", "val1", "val2"], "val_labels": np.eye(6)[[3, 4, 5]]}
    dataset, encoder = numbered(**val, drop_val=[(2, 5)]), Words()
    config = tiny.config("classifier_stage.finetune=true")
    model = ngame.train(dataset, config, encoder=encoder)
    words = {number: word for word, number in encoder.vocabulary.items()}
    trained = {words[number] for number in encoder.trained_on}
    assert trained == {*dataset.train_texts, *dataset.label_texts}
    assert len(model.point_vectors) == 60
    assert (model.point_labels != dataset.train_labels).nnz == 0
    none = numbered(val_texts=["val0"], val_labels=np.eye(6)[:1], drop_val=[(0, 0)])
    with pytest.raises(ValueError, match="no validation point has a label that is not dropped"):
        ngame.train(none, tiny.config())


@pytest.mark.parametrize(("points", "held_out"), [(300, 60), (1000, 100), (4000, 200)])
def test_how_many_points_are_held_out(points, held_out):
    """A twentieth, but a hundred at least, and a fifth at most."""
    truth = Truth.of(sp.csr_matrix(np.ones((points, 1), np.float32)), None)
    parts = split_held_out(truth, ngame.Config())
    assert [len(rows) for rows in parts] == [points - held_out, held_out]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(points))


def test_at_most_so_many_validation_points_are_held_out():
    y = np.eye(6)[np.arange(30) % 6]
    dataset = numbered(val_texts=[f"val{row}" for row in range(30)], val_labels=y)
    run = Run(dataset, tiny.config("max_validation=10"), None, False, Words())
    assert len(run.held_out.tokens) == len(set(run.held_out.rows)) == 10
    assert len(run.points.tokens) == 60


def test_test_points_change_nothing_but_the_metrics():
    models = [
        ngame.train(dataset, tiny.config())
        for dataset in (
            tiny.dataset(),
            tiny.dataset(test_texts=["ba ke li"] * 3, test_labels=np.eye(3, tiny.LABELS)),
        )
    ]
    assert same(*map(weights, models))
    assert np.array_equal(models[0].classifier, models[1].classifier)
    assert models[0].fusions == models[1].fusions
    assert models[0].metrics != models[1].metrics


@tiny.few_held_out
def test_dropped_pairs_are_neither_targets_nor_negatives(monkeypatch):
    """The targets and known positives that the loss gets, batch by batch."""
    y = np.zeros((30, 5), np.float32)
    y[:, 0] = 1
    y[np.arange(30), 1 + np.arange(30) % 4] = 1
    # Some pairs are labels of the point and some are not; one pair is given twice. Rows 4, 12, 20
    # and 28 keep label 1.
    drop = [(row, 1) for row in range(0, 30, 2) if row % 8 != 4] + [(0, 1)]
    texts = [f"point{row}" for row in range(30)]
    dataset = ngame.Dataset(texts, y, [f"label{n}" for n in range(5)], drop_train=drop)
    seen = []
    loss = stage_module.decoupled_softmax

    def keep(scores, known, targets, **options):
        seen.append((known, targets))
        return loss(scores, known, targets, **options)

    batches = []
    labels_of = training.batch_labels

    def keep_batch(labels, rows, **options):
        found = labels_of(labels, rows, **options)
        batches.append((rows, found.pool))
        return found

    monkeypatch.setattr(stage_module, "decoupled_softmax", keep)
    monkeypatch.setattr(training, "batch_labels", keep_batch)
    monkeypatch.setattr(training, "_hard_negative_recall", lambda *_: 0.0)
    config = tiny.config()
    ngame.train(dataset, config, encoder=Words())
    trained, _ = split_held_out(Truth.of(dataset.train_labels, dataset.drop_train), config)
    dropped = {tuple(pair) for pair in drop}
    met = 0
    assert len(seen) == len(batches)
    for (known, targets), (rows, pool) in zip(seen, batches, strict=True):
        ids = trained[rows]
        masked = set(zip(ids[known.rows], pool[known.columns], strict=True))
        pulled = set(zip(ids[targets.rows], pool[targets.columns], strict=True))
        assert not pulled & dropped
        for pair in dropped:
            if pair[0] in ids and pair[1] in pool:
                met += 1
                assert pair in masked
    assert met > 10


def test_the_fusion_is_fitted_without_dropped_pairs(monkeypatch):
    """They count neither as predictions nor as truth there."""
    whole = tiny.dataset()
    drop = np.argwhere(whole.train_labels[:, [0]].toarray() == 0)  # label 0 of all that lack it
    fitted, candidates = [], ngame.Model.candidates

    def keep(self, texts, vectors, *, drop, seen):
        found = candidates(self, texts, vectors, drop=drop, seen=seen)
        fitted.append(found[0])
        return found

    monkeypatch.setattr(ngame.Model, "candidates", keep)
    parts = whole.train_texts, whole.train_labels, whole.label_texts
    ngame.train(ngame.Dataset(*parts, drop_train=drop), tiny.config(*ENCODER_ONLY))
    _, held_out = split_held_out(Truth.of(whole.train_labels, drop), tiny.config())
    own = whole.train_labels[held_out][:, 0].toarray().ravel() > 0
    assert own.any()
    for found in fitted:
        assert found.nnz > own.size
        assert not found[np.flatnonzero(~own), 0].nnz
    assert len(fitted) == 2  # of all scorers, and of those for training points


@pytest.mark.parametrize("fuse_for", ["precision", "psp"])
def test_what_the_fusion_is_fitted_for(dataset, monkeypatch, fuse_for):
    gains, fit = [], training.Fusion.fit
    monkeypatch.setattr(
        training.Fusion, "fit", lambda *x, **given: gains.append(given["gains"]) or fit(*x, **given)
    )
    config = tiny.config(f"prediction.fuse_for={fuse_for}", *ENCODER_ONLY)
    ngame.train(dataset, config)
    trained, _ = split_held_out(Truth.of(dataset.train_labels, None), config)
    weights = ngame.metrics.inverse_propensity(dataset.train_labels[trained])
    for found in gains:
        if fuse_for == "psp":
            np.testing.assert_array_equal(np.unique(found), np.unique(weights))
        else:
            assert found is None
    assert gains


def test_dropped_test_pairs_count_as_neither(dataset):
    """Here positives: they are no truth in the scores of a run."""
    labels = dataset.test_labels
    firsts = labels.indices[labels.indptr[:-1]]
    several = np.flatnonzero(np.diff(labels.indptr) > 1)
    drop = np.stack([several, firsts[several]], axis=1)
    model = ngame.train(tiny.dataset(drop_test=drop), tiny.config(*ENCODER_ONLY))
    found = model.scores(dataset.test_texts, scorers=["encoder"])["encoder"]
    expected = ngame.metrics.evaluate(found, labels, ks=[1, 10], drop=drop)
    for name in ("P@1", "R@10"):
        assert model.metrics["encoder"][name] == pytest.approx(expected[name])
    assert ngame.metrics.evaluate(found, labels, ks=[10])["R@10"] != expected["R@10"]


@tiny.few_held_out
def test_points_without_a_label_are_dropped_and_counted():
    whole = tiny.dataset()
    y = whole.train_labels.tolil()
    y[[3, 50, 51]] = 0
    dataset = tiny.dataset(train_labels=y.tocsr())
    with pytest.warns(UserWarning, match="^3 of 300 training points have no label") as caught:
        model = ngame.train(dataset, tiny.config())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert len(model.point_vectors) == 297
    # Like a data set without them, except for the words that the tokenizer learnt.
    kept = np.setdiff1d(np.arange(300), [3, 50, 51])
    without = tiny.dataset(
        train_texts=[whole.train_texts[row] for row in kept], train_labels=whole.train_labels[kept]
    )
    encoders = [BagEncoder.fit(whole.train_texts, dim=16) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = ngame.train(dataset, tiny.config(*ENCODER_ONLY), encoder=encoders[0])
    second = ngame.train(without, tiny.config(*ENCODER_ONLY), encoder=encoders[1])
    assert first.metrics["fused"]["P@1"] == pytest.approx(second.metrics["fused"]["P@1"], abs=0.15)


def test_labels_without_a_point_do_no_harm():
    whole = tiny.dataset()
    wider = {
        f"{split}_labels": sp.csr_matrix(
            sp.hstack([getattr(whole, f"{split}_labels"), sp.csr_matrix((rows, 3))])
        )
        for split, rows in (("train", 300), ("test", 60))
    }
    texts = [*whole.label_texts, "no point", "has", "these"]
    dataset = ngame.Dataset(
        whole.train_texts, label_texts=texts, test_texts=whole.test_texts, **wider
    )
    model = ngame.train(dataset, tiny.config())
    assert model.metrics["fused"]["P@1"] > 0.6
    assert model.predict(["no point"], 1, scorer="encoder").indices.tolist() == [tiny.LABELS]


# Seeds


def test_results_depend_on_the_seed_alone(dataset):
    sets = ("encoder.dropout=0.2", "encoder_stage.positives=one", "classifier_stage.finetune=true")
    torch.manual_seed(1)
    first = ngame.train(dataset, tiny.config(*sets))
    torch.manual_seed(2)
    np.random.seed(3)  # noqa: NPY002 - global state, which must not matter
    second = ngame.train(dataset, tiny.config(*sets))
    assert first.metrics == second.metrics
    assert same(weights(first), weights(second))
    assert np.array_equal(first.classifier, second.classifier)
    assert first.fusions == second.fusions
    other = ngame.train(dataset, tiny.config(*sets, "seed=1"))
    assert not np.array_equal(first.classifier, other.classifier)
    assert first.metrics != other.metrics


def test_random_state_and_threads_of_the_caller_do_not_change(dataset):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    ngame.train(dataset, tiny.config("threads=3", "encoder.dropout=0.2"))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


# Small and invalid inputs


@tiny.few_held_out
@pytest.mark.parametrize("loss", ["triplet", "softmax"])
def test_one_label(loss):
    texts = [f"text {tiny.word(row)}" for row in range(20)]
    dataset = ngame.Dataset(
        texts, np.ones((20, 1)), ["all"], test_texts=["text"], test_labels=[[1]]
    )
    sets = (f"encoder_stage.loss={loss}", f"classifier_stage.loss={loss}")
    model = ngame.train(dataset, tiny.config(*sets))
    assert model.metrics["fused"]["P@1"] == 1
    assert np.isfinite(model.classifier).all()


@tiny.few_held_out
@pytest.mark.parametrize("points", [5, 20, 200])
def test_fused_is_not_below_its_best_part(points):
    """On test points, beyond noise; which part is best is known only there."""
    dataset = tiny.dataset(points=points, test=200)
    model = ngame.train(dataset, tiny.config("encoder.dim=32", "encoder_stage.epochs=15"))
    found = {name: values["P@1"] for name, values in model.metrics.items()}
    fused = found.pop("fused")
    best = max(found.values())
    assert fused >= best - 3 * np.sqrt(fused * (1 - fused) / 200)
    assert min(model.fusions["all"].weights.values()) >= 0


@tiny.few_held_out
def test_two_points():
    dataset = ngame.Dataset(
        ["red apple", "green pear"],
        np.eye(2),
        ["apple", "pear"],
        test_texts=["apple"],
        test_labels=[[1, 0]],
    )
    with pytest.warns(UserWarning, match="2 training points have a label: PSP and PSN, which need"):
        model = ngame.train(dataset, tiny.config())
    assert "P@1" in model.metrics["fused"]
    assert "PSP@1" not in model.metrics["fused"]
    assert len(model.point_vectors) == 2
    assert np.isfinite(model.predict(["apple"]).data).all()


@pytest.mark.filterwarnings("ignore:. of 3 training points")
@pytest.mark.parametrize("count", [0, 1])
def test_too_few_points_have_a_label(tmp_path, count):
    y = np.zeros((3, 2))
    y[:count] = 1
    dataset = ngame.Dataset(["a", "b", "c"], y, ["x", "y"])
    with pytest.raises(ValueError, match=f"{count} training points have a label, expected at le"):
        ngame.train(dataset, tiny.config(), folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_clusters_and_batches_larger_than_the_data(dataset):
    sets = ("encoder_stage.cluster_size=5000", "encoder_stage.batch_size=100000")
    model = ngame.train(dataset, tiny.config(*sets))
    assert model.metrics["fused"]["P@1"] > 0.1


def test_unusable_device(dataset, tmp_path):
    with pytest.raises(ValueError, match="device is 'gpu', which torch cannot use"):
        ngame.train(dataset, tiny.config("device=gpu"), folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


class Wrong(Words):
    def __init__(self, output, when):
        super().__init__()
        self.output, self.when = output, when

    def forward(self, tokens):
        vectors = super().forward(tokens)
        return self.output(vectors) if self.training is self.when else vectors


@pytest.mark.parametrize("training_mode", [True, False])
@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda x: x[:, :5], ValueError, r"encoder returned shape \(\d+, 5\), expected \(\d+, 8\)"),
        (lambda x: x[:-1], ValueError, r"encoder returned shape \(\d+, 8\), expected \(\d+, 8\)"),
        (lambda x: x[None], ValueError, r"encoder returned shape \(1, \d+, 8\)"),
        (lambda x: x * torch.nan, ValueError, "NaN or infinity"),
        (lambda x: x.detach().numpy(), TypeError, "encoder returned a ndarray, expected a tensor"),
    ],
)
def test_encoder_that_returns_something_else(dataset, output, error, message, training_mode):
    encoder = Wrong(output, training_mode)
    with pytest.raises(error, match=message):
        ngame.train(dataset, tiny.config(), encoder=encoder)


def test_zero_vectors_are_allowed(dataset):
    encoder = Words()
    with torch.no_grad():
        encoder.weights.weight.zero_()
    model = ngame.train(dataset, tiny.config("encoder_stage.start_epoch=0"), encoder=encoder)
    assert np.isfinite(model.predict(dataset.test_texts).data).all()
    assert F.normalize(encoder.weights.weight, dim=1).isfinite().all()


def test_what_is_no_dataset_or_config():
    with pytest.raises(
        TypeError, match=r"dataset is a str, expected an ngame.Dataset, such as nga"
    ):
        ngame.train("DATA")
    with pytest.raises(TypeError, match=r"config is a dict, expected an ngame.Config"):
        ngame.train(tiny.dataset(), {"seed": 1})

"""The masked losses for sentence-transformers: beside the library's own, its wrappers, sources."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("sentence_transformers")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    GISTEmbedLoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim

from ngame.adapters.sentence_transformers import (
    CachedMaskedMultipleNegativesRankingLoss,
    MaskedMultipleNegativesRankingLoss,
    SharedTexts,
)
from ngame.encoders.bank import EmbeddingBank
from ngame.negatives import Candidates, ContrastiveLoss, Guide, NegativeQueue, SelfGuide
from ngame.negatives import KnownPositives as Known

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:AdaptiveLayerLoss is not compatible"),
]

WORDS = ["red", "green", "blue", "cold", "warm", "old", "new", "small", "large", "round"]
TEXTS = [f"{word} {other}" for word, other in product(WORDS, WORDS)]
ROWS = 10
Masked = MaskedMultipleNegativesRankingLoss
Cached = CachedMaskedMultipleNegativesRankingLoss


@pytest.fixture
def model(tiny_model: Path) -> SentenceTransformer:
    """In training mode, but without dropout, so that passes can be compared."""
    loaded = SentenceTransformer(str(tiny_model), device="cpu")
    for module in loaded.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loaded[0].auto_model.config._attn_implementation = "eager"
    return loaded.train()


def features(model: Any, columns: int = 2, first: int = 0) -> list[dict[str, Any]]:
    begin = [first + 20 * column for column in range(columns)]
    return [dict(model.preprocess(TEXTS[place : place + ROWS])) for place in begin]


def pairs(*more: Any) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.arange(ROWS), np.arange(ROWS), *more], axis=1))


def outcome(loss: Any, given: Any, labels: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    loss.model.zero_grad()
    value = loss(given, labels)
    value.backward()
    gradients = [p.grad.clone() for p in loss.model.parameters() if p.grad is not None]
    assert sum(each.abs().sum() for each in gradients) > 0
    return value.detach(), gradients


def check_equal(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- Beside the library's own ----------------------------------------------------------------

BOTH = ("query_to_doc", "doc_to_query")
ALL = (*BOTH, "query_to_query", "doc_to_doc")


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("similarity_fct", [cos_sim, dot_score, euclidean_sim])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"directions": BOTH, "partition_mode": "per_direction"},
        {"directions": BOTH},
        {"directions": ALL},
        {"directions": ("query_to_doc", "doc_to_doc")},
        {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
        {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
        {"hardness_mode": "all_negatives", "hardness_strength": 5.0, "directions": ALL},
    ],
)
def test_all_options_as_there_where_nothing_is_known(
    columns: int, similarity_fct: Any, options: Any
) -> None:
    found = []
    for kind in (Masked, MultipleNegativesRankingLoss):
        rng = np.random.default_rng(0)
        x = [torch.from_numpy(v).requires_grad_() for v in rng.standard_normal((columns, 6, 4))]
        loss = kind(torch.nn.Identity(), similarity_fct=similarity_fct, scale=2.0, **options)
        value = loss.compute_loss_from_embeddings(x, torch.arange(6))
        found.append((value.double(), torch.autograd.grad(value, x)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_as_their_guided_loss(model: SentenceTransformer) -> None:
    """Its guide runs in training; ours are the same vectors, computed beforehand."""
    guide = SentenceTransformer(model[0].auto_model.config._name_or_path, device="cpu")
    for parameter in guide.parameters():
        parameter.data += 0.1 * torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(1)
        )
    columns = [TEXTS[:ROWS], TEXTS[20 : 20 + ROWS]]
    vectors = [guide.encode(texts, normalize_embeddings=True) for texts in columns]
    theirs = GISTEmbedLoss(model, guide, temperature=0.05)
    ours = Masked(
        model,
        filters=[Guide(*vectors)],
        directions=("query_to_doc", "query_to_query", "doc_to_doc"),
    )
    check_equal(outcome(ours, features(model), pairs()), outcome(theirs, features(model), pairs()))
    assert 0.1 < ours.masked_shares[0] < 0.9


@pytest.mark.parametrize("wrap", ["layers", "dimensions", "both"])
@pytest.mark.parametrize("columns", [2, 3])
def test_inside_their_wrappers(model: SentenceTransformer, wrap: str, columns: int) -> None:
    """They call the loss several times a batch, and hand layers on in the features."""

    def wrapped(loss: Any) -> Any:
        if wrap == "layers":
            return AdaptiveLayerLoss(model, loss, n_layers_per_step=-1)
        if wrap == "dimensions":
            return MatryoshkaLoss(model, loss, [16, 8])
        return Matryoshka2dLoss(model, loss, [16, 8], n_layers_per_step=-1, n_dims_per_step=-1)

    labels = torch.arange(ROWS)
    ours = outcome(wrapped(Masked(model)), features(model, columns), labels)
    theirs = wrapped(MultipleNegativesRankingLoss(model))
    check_equal(ours, outcome(theirs, features(model, columns), labels))


def test_several_calls_for_one_batch_draw_and_store_once(model: SentenceTransformer) -> None:
    queue = NegativeQueue(30, 16)
    bank = EmbeddingBank(ROWS, 16)
    shared = SharedTexts(TEXTS, 6)
    known = sp.csr_matrix(np.eye(ROWS, 100))
    inner = Masked(model, known, sources=[shared, queue], bank=bank)
    loss = Matryoshka2dLoss(model, inner, [16, 8], n_layers_per_step=-1, n_dims_per_step=-1)
    for step in range(3):
        assert len(queue) == max(0, step - 1) * ROWS
        given = features(model, first=step)
        value = loss(given, pairs())
        value.backward()
        assert inner.memory.step == step
        [(_, drawn, _)] = inner.memory.drawn
        np.testing.assert_array_equal(drawn.ids, shared.draw(step).ids)
    assert not len(bank.unseen)
    last = model.encode(TEXTS[22 : 22 + ROWS], convert_to_tensor=True, normalize_embeddings=True)
    inner.memory.state_dict()
    offered = queue.offer()
    assert len(queue) == 3 * ROWS
    torch.testing.assert_close(offered.vectors[-ROWS:], last, rtol=1e-4, atol=1e-4)


# ---- Encoding --------------------------------------------------------------------------------


def test_columns_of_like_width_are_one_forward_pass(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda x: passes.append(len(x["input_ids"])) or forward(x)
    )
    loss = Masked(model)
    loss(features(model, 3), torch.arange(ROWS))
    assert passes == [30]
    passes.clear()
    wide = [dict(model.preprocess([f"{text} " * 6 for text in TEXTS[:ROWS]])) for _ in range(2)]
    loss([*features(model, 1), *wide], torch.arange(ROWS))
    assert passes == [10, 20]


@pytest.mark.parametrize("size", [3, 4, 100])
def test_cached_gives_the_gradients_of_the_whole(model: SentenceTransformer, size: int) -> None:
    known = sp.csr_matrix(np.eye(ROWS, 100) + np.eye(ROWS, 100, k=1))
    guide = np.random.default_rng(0).standard_normal((2, 100, 4)).astype(np.float32)

    def made(kind: type, **more: Any) -> Any:
        queue = NegativeQueue(20, 16)
        queue.push(np.arange(5), torch.nn.functional.normalize(torch.ones(5, 16)))
        return kind(
            model,
            known,
            filters=[Guide(*guide), SelfGuide(0.2)],
            sources=[SharedTexts(TEXTS, 7, log_q=True), queue],
            directions=ALL,
            hardness_mode="all_negatives",
            hardness_strength=3.0,
            **more,
        )

    whole, cached = made(Masked), made(Cached, mini_batch_size=size)
    for step in range(2):
        given = features(model, 3, first=step)
        again = features(model, 3, first=step)
        check_equal(outcome(cached, again, pairs()), outcome(whole, given, pairs()))
        assert cached.masked_shares == pytest.approx(whole.masked_shares)
    with torch.no_grad():
        check_equal(cached(again, pairs()), whole(given, pairs()))
    assert cached.get_config_dict()["filters"] == ["KnownPositives", "Guide", "SelfGuide"]
    assert cached.get_config_dict()["mini_batch_size"] == size


def test_cached_inside_matryoshka(model: SentenceTransformer) -> None:
    found = [
        outcome(MatryoshkaLoss(model, loss, [16, 8]), features(model), torch.arange(ROWS) // 2)
        for loss in (
            Cached(model, mini_batch_size=3, sources=[SharedTexts(TEXTS, 5)]),
            Masked(model, sources=[SharedTexts(TEXTS, 5)]),
        )
    ]
    check_equal(*found)


# ---- Sources and filters ---------------------------------------------------------------------


def test_sources_and_filters_by_the_contrastive_loss(model: SentenceTransformer) -> None:
    known = sp.random(ROWS, 100, 0.2, "csr", random_state=np.random.default_rng(0))
    negatives = np.arange(50, 60)
    shared = SharedTexts(TEXTS, 12, log_q=True, seed=3)
    queue = NegativeQueue(4, 16)
    extra = torch.nn.functional.normalize(torch.arange(32.0).reshape(2, 16), dim=1)
    queue.push([3, 4], extra)
    loss = Masked(
        model,
        known,
        filters=[SelfGuide(0.05)],
        sources=[shared, queue, lambda step: Candidates([70 + step], extra[:1])],
    )
    found = loss(features(model, 3), pairs(negatives))
    x, *documents = (
        torch.nn.functional.normalize(model(each)["sentence_embedding"], dim=1)
        for each in features(model, 3)
    )
    ids, log_q = shared.draw(0)
    drawn = torch.nn.functional.normalize(
        model(model.preprocess([TEXTS[place] for place in ids]))["sentence_embedding"], dim=1
    )
    new = ~np.isin(ids, [*range(ROWS), *negatives])
    plain = ContrastiveLoss(temperature=0.05, filters=[Known(known), SelfGuide(0.05)])
    expected = plain(
        Candidates(np.arange(ROWS), x),
        Candidates([*range(ROWS), *negatives], torch.cat(documents)),
        sources=[
            Candidates(ids[new], drawn[new], shift=torch.from_numpy(-log_q[new])),
            Candidates([3, 4, 70], torch.cat([extra, extra[:1]])),
        ],
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert loss.masked_shares == pytest.approx(plain.masked_shares)
    assert not new.all()


def test_prompt_of_the_texts_drawn(model: SentenceTransformer) -> None:
    shared = SharedTexts(TEXTS, 3, prompt="label: ")
    ids = shared.features(model, shared.draw(0).ids)["input_ids"]
    bare = SharedTexts(TEXTS, 3).features(model, shared.draw(0).ids)["input_ids"]
    assert ids.shape[1] == bare.shape[1] + 2


def test_texts_drawn_take_the_route_of_the_positives(model: SentenceTransformer) -> None:
    shared = SharedTexts(TEXTS, 3)
    loss = Masked(model, sources=[shared])
    given = features(model)
    (bare,) = loss.begin(given)
    assert "task" not in bare
    given = [{**each, "task": task} for each, task in zip(given, ("query", "doc"), strict=True)]
    given[0]["input_ids"] = given[0]["input_ids"].clone()  # another batch
    (drawn,) = loss.begin(given)
    assert drawn["task"] == "doc"


def test_evaluation_draws_the_same_and_stores_nothing(model: SentenceTransformer) -> None:
    queue = NegativeQueue(30, 16)
    loss = Masked(model, sources=[SharedTexts(TEXTS, 6), queue])
    with torch.no_grad():  # before any training
        loss.eval()(features(model), torch.arange(ROWS))
    model.train()
    loss(features(model), torch.arange(ROWS))
    model.eval()
    with torch.no_grad():
        values = [loss(features(model), torch.arange(ROWS)).item() for _ in range(2)]
    assert values[0] == values[1]
    assert loss.memory.step == 1
    assert len(queue) == 0
    model.train()
    loss(features(model), torch.arange(ROWS))
    assert loss.memory.step == 1
    assert len(queue) == ROWS


def test_evaluation_leaves_the_bank_alone(model: SentenceTransformer) -> None:
    """Its ids may be those of other texts. Those of training say whose vectors are stored."""
    bank = EmbeddingBank(ROWS, 16)
    loss = Masked(model, sp.identity(ROWS, format="csr"), bank=bank)
    with torch.no_grad():
        loss.eval()(features(model), pairs())
    assert len(bank.unseen) == ROWS
    loss.train()(features(model), pairs().flip(0))
    assert len(bank.unseen) == 0
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(model(features(model)[0])["sentence_embedding"])
    np.testing.assert_allclose(bank.vectors[::-1], wanted, atol=2e-3)


class Cut(Masked):
    """The loss, called as MatryoshkaLoss does: for vectors cut to several widths."""

    widths: tuple[int, ...] = ()

    def forward(self, sentence_features: Any, labels: Any) -> torch.Tensor:
        given = [*sentence_features]
        self.begin(given)
        full = [self.model(each)["sentence_embedding"] for each in given]
        return torch.stack(
            [
                self.compute_loss_from_embeddings([each[:, :width] for each in full], labels)
                for width in self.widths
            ]
        ).sum()


def test_queue_gets_the_widest_of_a_batch(model: SentenceTransformer) -> None:
    queue = NegativeQueue(30, 16)
    loss = Cut(model, sources=[queue])
    loss.widths = 8, 16, 4
    for step in range(2):
        loss(features(model, first=step), torch.arange(ROWS))
    assert len(queue) == ROWS
    loss.widths = 8, 4
    loss(features(model, first=2), torch.arange(ROWS))
    message = "positives have 8 columns, the queue 16.*MatryoshkaLoss.*n_dims_per_step=-1"
    with pytest.raises(ValueError, match=message):
        loss(features(model, first=3), torch.arange(ROWS))


def test_queue_gets_the_positives_by_their_ids(model: SentenceTransformer) -> None:
    """Not those of the anchors, nor the mined negatives."""
    queue = NegativeQueue(30, 16)
    loss = Masked(model, sources=[queue])
    ids = np.arange(ROWS)
    given = features(model, 3)
    loss(given, torch.from_numpy(np.stack([ids, 20 + ids, 50 + ids], axis=1)))
    loss.memory.state_dict()  # nothing waits for the next batch any more
    offered = queue.offer()
    order = np.argsort(offered.ids)
    assert offered.ids[order].tolist() == (20 + ids).tolist()
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(model(features(model, 3)[1])["sentence_embedding"])
    check_equal(offered.vectors[torch.from_numpy(order)], wanted)
    assert not offered.vectors.requires_grad


def test_only_directions_of_what_is_offered_count(model: SentenceTransformer) -> None:
    """The similarity is the cosine, of vectors of any length."""
    vectors = torch.randn((5, 16), generator=torch.Generator().manual_seed(0))
    values = [
        Masked(model, sources=[lambda _, each=each: Candidates(np.arange(30, 35), each)])(
            features(model), torch.arange(ROWS)
        ).detach()
        for each in (vectors, vectors * torch.arange(1, 6)[:, None])
    ]
    check_equal(*values)


def test_memory_goes_on_from_its_state(model: SentenceTransformer) -> None:
    def run(steps: Any, state: Any = None) -> Any:
        loss = Masked(model, sources=[SharedTexts(TEXTS, 6), NegativeQueue(15, 16)])
        if state is not None:
            loss(features(model, first=9), torch.arange(ROWS))  # of which nothing is left
            loss.memory.load_state_dict(state)
        values = [loss(features(model, first=step), torch.arange(ROWS)).item() for step in steps]
        return values, loss.memory.state_dict()

    whole, _ = run(range(4))
    first, state = run(range(2))
    assert set(state) == {"step", "0.ids", "0.vectors", "0.pushed"}
    rest, _ = run(range(2, 4), state)
    assert first + rest == whole
    with pytest.raises(ValueError, match="state lacks ids"):
        Masked(model, sources=[NegativeQueue(15, 16)]).memory.load_state_dict({"step": 1})


def test_arguments_are_checked_when_the_loss_is_made(model: SentenceTransformer) -> None:
    for kind in (Masked, Cached):
        with pytest.raises(TypeError, match=r"sources is a SharedTexts, expected a list: \[...\]"):
            kind(model, sources=SharedTexts(TEXTS, 6))
        with pytest.raises(TypeError, match="filters is a SelfGuide, expected a list"):
            kind(model, filters=SelfGuide())
        with pytest.raises(
            ValueError, match="texts of SharedTexts has 100 entries, positives has 9"
        ):
            kind(model, sp.csr_matrix((5, 9)), sources=[SharedTexts(TEXTS, 6)])
    with pytest.raises(TypeError, match="texts is a str"):
        SharedTexts("red", 6)
    with pytest.raises(TypeError, match="positives is a csc matrix"):
        Masked(model, sp.csc_matrix((5, 9)))  # type: ignore[arg-type]


def test_of_one_anchor_twice_neither_positive_is_a_negative() -> None:
    x = torch.eye(4)
    loss = Masked(torch.nn.Identity(), sp.csr_matrix((3, 3)))  # type: ignore[arg-type]
    given = [x[:2], x[2:]]
    assert loss.compute_loss_from_embeddings(given, torch.tensor([[1, 0], [1, 2]])).item() == 0
    assert loss.compute_loss_from_embeddings(given, torch.tensor([[1, 0], [2, 2]])).item() > 0
    with pytest.raises(ValueError, match="has 1 columns of texts"):
        loss.compute_loss_from_embeddings([x], torch.arange(4))

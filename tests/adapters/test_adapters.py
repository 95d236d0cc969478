"""The batches inside the trainers of transformers and sentence-transformers."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from ngame.batches import ClusterBatchSampler, GroupBatchSampler, NeighbourBatchSampler
from ngame.encoders.bank import EmbeddingBank
from ngame.files import write_tensors
from ngame.negatives import NegativeQueue
from ngame.state import to_tensors, with_prefixes

pytest.importorskip("datasets")
pytest.importorskip("accelerate")
pytest.importorskip("sentence_transformers")

from datasets import Dataset, DatasetDict
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
)
from sentence_transformers.base.modules import Router
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import (
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.sparse_encoder.modules import SpladePooling
from transformers import Trainer, TrainerCallback, TrainingArguments

from ngame.adapters.sentence_transformers import (
    BatchSamplerFactory,
    LossMemory,
    MaskedMultipleNegativesRankingLoss,
    SharedTexts,
)
from ngame.adapters.sentence_transformers import RefreshCallback as TextRefreshCallback
from ngame.adapters.transformers import BatchSamplerMixin, RefreshCallback, SamplerCallback

# What the libraries themselves warn of, here or there.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:groups leave"),  # of toys
]

ROWS, BATCH, STEPS = 42, 8, 6  # the last batch of an epoch holds 2 rows
WORDS = ["red", "green", "blue", "cold", "warm", "old", "new", "small", "large", "round"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pairs(rows: int = ROWS, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, 5)) for _ in range(rows)]
    return Dataset.from_dict(
        {"anchor": texts, "positive": [text[::2] for text in texts], "label": list(range(rows))}
    )


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 3,
        "learning_rate": 0.01,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        **options,
    }


class Killed(TrainerCallback):
    """Stops the run in the middle of a step, as far as the trainer is concerned."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def planned(dataset_rows: int, vectors: list[Any]) -> list[list[int]]:
    """Batches of a sampler that was refreshed with `vectors` of each epoch but the first."""
    sampler = ClusterBatchSampler(dataset_rows, BATCH, cluster_size=4)
    batches = list(sampler)
    for epoch, x in enumerate(vectors, 1):
        sampler.set_epoch(epoch)
        sampler.refresh(x)
        batches += list(sampler)
    return batches


# ---- sentence-transformers -------------------------------------------------------------------


class Recording(MaskedMultipleNegativesRankingLoss):
    """The loss, with the batches of training by the ids of their positives."""

    def __init__(self, model: Any, *known: Any, **options: Any) -> None:
        super().__init__(model, *known, **options)
        self.batches: list[list[int]] = []

    def forward(self, sentence_features: Any, labels: Any) -> torch.Tensor:
        if self.model.training:
            self.batches.append(labels.reshape(len(labels), -1)[:, -1].tolist())
        return super().forward(sentence_features, labels)


class Vectors(TextRefreshCallback):
    """The callback, with the vectors that it should refresh with."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.vectors: list[Any] = []

    def refresh(self, sampler: Any, dataset: Any, model: Any, args: Any) -> None:
        training = model.training
        self.vectors.append(model.encode(list(dataset["anchor"])))
        model.train(training)
        super().refresh(sampler, dataset, model, args)


def text_run(folder: Path, tiny_model: Path, *more: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    model = SentenceTransformer(str(tiny_model), device="cpu")
    dataset = pairs()
    args = SentenceTransformerTrainingArguments(
        **arguments(folder, **options), batch_sampler=BatchSamplerFactory(dataset, cluster_size=4)
    )
    return SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=pairs(seed=1),
        loss=Recording(model),
        callbacks=[Vectors(), *more],
    )


def callback(trainer: Any, kind: type) -> Any:
    return next(one for one in trainer.callback_handler.callbacks if isinstance(one, kind))


def test_trainer_trains_on_the_batches_of_the_refreshed_sampler(
    tiny_model: Path, tmp_path: Path
) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 4, "dataloader_num_workers": 1}
    trainer = text_run(tmp_path, tiny_model, **options)
    trainer.train()
    vectors = callback(trainer, Vectors).vectors
    assert len(vectors) == 2
    assert trainer.loss.batches == planned(ROWS, vectors)
    assert trainer.get_train_dataloader().batch_sampler.n_rows == ROWS
    assert isinstance(trainer.get_eval_dataloader().batch_sampler, DefaultBatchSampler)


@pytest.mark.parametrize(("save_steps", "killed"), [(4, 10), (STEPS, 14)])
def test_trainer_killed_and_resumed_goes_on_with_the_same_batches(
    tiny_model: Path, tmp_path: Path, save_steps: int, killed: int
) -> None:
    options = {"save_strategy": "steps", "save_steps": save_steps}
    whole = text_run(tmp_path / "whole", tiny_model, **options)
    whole.train()
    first = text_run(tmp_path / "cut", tiny_model, Killed(killed), **options)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = text_run(tmp_path / "cut", tiny_model, **options)
    second.train(resume_from_checkpoint=True)
    saved = killed // save_steps * save_steps
    assert first.loss.batches[:saved] + second.loss.batches == whole.loss.batches
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


def test_resumed_with_the_same_draws_and_queue(tiny_model: Path, tmp_path: Path) -> None:
    def run(folder: str, *more: Any) -> Any:
        trainer = text_run(tmp_path / folder, tiny_model, *more, **options)
        texts = trainer.train_dataset["positive"]
        sources = [SharedTexts(texts, 6), NegativeQueue(20, 16)]
        trainer.loss = Recording(trainer.model, sources=sources)
        trainer.pop_callback(Vectors)
        trainer.add_callback(TextRefreshCallback(loss=trainer.loss))
        return trainer

    options = {"save_strategy": "steps", "save_steps": 4}
    whole = run("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        run("cut", Killed(10)).train()
    second = run("cut")
    second.train(resume_from_checkpoint=True)
    assert second.loss.memory.step == whole.loss.memory.step == 3 * STEPS - 1
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name


@pytest.mark.filterwarnings("ignore:all batches of this run are random")
def test_checkpoint_without_the_state_of_the_batches_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    options = {"save_strategy": "steps", "save_steps": STEPS, "num_train_epochs": 1}
    text_run(tmp_path, tiny_model, **options).train()
    (tmp_path / "checkpoint-6" / "ngame.safetensors").unlink()
    options["num_train_epochs"] = 2
    with pytest.raises(FileNotFoundError, match=r"there is no .*checkpoint-6/ngame\.safetensors"):
        text_run(tmp_path, tiny_model, **options).train(resume_from_checkpoint=True)


@pytest.mark.filterwarnings("ignore:all batches of this run are random")
def test_checkpoint_holds_no_array_of_the_data(tiny_model: Path, tmp_path: Path) -> None:
    trainer = text_run(tmp_path, tiny_model, save_strategy="epoch", num_train_epochs=1)
    trainer.args.batch_sampler._options["keys"] = np.zeros(100_000, np.int64)
    saved = pickle.dumps(trainer.args)
    assert len(saved) < 20_000
    with pytest.raises(ValueError, match="pickled copy, without its data set"):
        pickle.loads(saved).batch_sampler(pairs(), BATCH, False)


def test_factory_makes_batches_of_neighbourhoods_too(tiny_model: Path, tmp_path: Path) -> None:
    trainer = text_run(tmp_path, tiny_model)
    trainer.args.batch_sampler = BatchSamplerFactory(
        trainer.train_dataset, NeighbourBatchSampler, nearest=2, drawn=1, start_epoch=1
    )
    trainer.train()
    sampler = NeighbourBatchSampler(ROWS, BATCH, nearest=2, drawn=1, start_epoch=1)
    expected = list(sampler)
    for epoch, vectors in enumerate(callback(trainer, Vectors).vectors, 1):
        sampler.set_epoch(epoch)
        sampler.refresh(vectors)
        expected += list(sampler)
    assert trainer.loss.batches == expected


@pytest.mark.parametrize("given", ["the class", "a function"])
def test_factory_makes_batches_of_groups_too(given: str, tiny_model: Path, tmp_path: Path) -> None:
    groups = np.arange(ROWS) % 3
    trainer = text_run(tmp_path, tiny_model, save_strategy="epoch", num_train_epochs=2)
    data: Any = trainer.train_dataset
    trainer.args.batch_sampler = (
        BatchSamplerFactory(data, GroupBatchSampler, groups=groups)
        if given == "the class"
        else BatchSamplerFactory(data, lambda *_, drop_last: GroupBatchSampler(groups, BATCH))
    )
    trainer.pop_callback(Vectors)
    trainer.train()
    sampler = GroupBatchSampler(groups, BATCH)
    expected = [rows.tolist() for epoch in range(2) for rows in sampler.plan(epoch)]
    assert trainer.loss.batches == expected


def test_groups_must_be_those_of_the_data() -> None:
    with pytest.raises(TypeError, match="GroupBatchSampler needs groups, the group of every row"):
        BatchSamplerFactory(pairs(), GroupBatchSampler, per_group=4)
    parts = {"qa": pairs(), "title": pairs(20)}
    groups = {"groups": np.arange(ROWS) % 3}
    with pytest.raises(TypeError, match="GroupBatchSampler needs groups for title"):
        BatchSamplerFactory(parts, GroupBatchSampler, parts={"qa": groups})
    factory = BatchSamplerFactory(parts, GroupBatchSampler, **groups)
    assert len(factory(parts["qa"], BATCH, False)) == 3
    with pytest.raises(ValueError, match="data set title has 20 rows, its batch sampler 42"):
        factory(parts["title"], BATCH, False)


def test_factory_names_typos_at_once() -> None:
    with pytest.raises(
        TypeError, match="ClusterBatchSampler has no cluster_sizes, did you mean cluster_size"
    ):
        BatchSamplerFactory(pairs(), cluster_sizes=4)
    with pytest.raises(TypeError, match="ClusterBatchSampler has no key, did you mean keys"):
        BatchSamplerFactory({"qa": pairs()}, cluster_size=4, parts={"qa": {"key": [0]}})
    own: Any = lambda rows, size, **options: ClusterBatchSampler(rows, size, **options)  # noqa: E731
    BatchSamplerFactory(pairs(), own, anything=4)


def test_factory_refuses_labels_that_are_strings() -> None:
    data = pairs().remove_columns("label")
    for names in (data["anchor"][:], [[text, text] for text in data["anchor"]]):
        named = data.add_column("label", names)
        with pytest.raises(
            TypeError,
            match=r'dataset\["label"\] holds strings, .*: np.unique\(dataset\["label"\], return_in',
        ):
            BatchSamplerFactory(named, cluster_size=4)
        with pytest.raises(TypeError, match=r'dataset\["qa"\]\["label"\] holds strings'):
            BatchSamplerFactory({"qa": named}, cluster_size=4)
    BatchSamplerFactory(data, cluster_size=4)  # for a loss that takes none


def test_callback_wants_a_loss_with_a_state() -> None:
    with pytest.raises(TypeError, match="loss is a Identity, expected a MaskedMultipleNegatives"):
        TextRefreshCallback(loss=torch.nn.Identity())  # type: ignore[arg-type]


def test_factory_leaves_other_data_sets_to_the_default() -> None:
    own = pairs()
    factory = BatchSamplerFactory(own, cluster_size=4, seed=7)
    sampler = factory(own, BATCH, True)
    assert isinstance(sampler, ClusterBatchSampler)
    assert (sampler.n_rows, sampler.batch_size, sampler.drop_last) == (ROWS, BATCH, True)
    generator = torch.Generator().manual_seed(0)
    other = factory(pairs(), BATCH, False, ["label"], generator, 3)  # of the same length
    assert isinstance(other, DefaultBatchSampler)
    assert (other.batch_size, other.drop_last) == (BATCH, False)
    assert sorted(row for batch in other for row in batch) == list(range(ROWS))
    assert list(other) != list(other)


def test_factory_knows_its_part_of_a_dataset_dict(tiny_model: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_model), device="cpu")
    # A loss for each part makes the trainer add the name of the part to its rows.
    losses = {name: Recording(model) for name in ("first", "second")}
    parts = DatasetDict({"first": pairs(20, seed=1), "second": pairs()})
    args = SentenceTransformerTrainingArguments(
        **arguments(tmp_path, num_train_epochs=2),
        batch_sampler=BatchSamplerFactory(parts["second"], cluster_size=4),
        prompts={"second": {"anchor": "query: "}},
    )
    vectors = Vectors()
    trainer = SentenceTransformerTrainer(
        model=model, args=args, train_dataset=parts, loss=losses, callbacks=[vectors]
    )
    trainer.train()
    assert len(vectors.vectors) == 1
    assert len(losses["first"].batches) == 2 * 3
    epochs = losses["second"].batches[:STEPS], losses["second"].batches[STEPS:]
    assert epochs[0] == planned(ROWS, [])
    assert sorted(row for batch in epochs[1] for row in batch) == list(range(ROWS))
    # The prompt was part of what was clustered.
    sampler = ClusterBatchSampler(ROWS, BATCH, cluster_size=4)
    sampler.set_epoch(1)
    sampler.refresh(vectors.vectors[0])
    assert epochs[1] != list(sampler)


def test_factory_serves_several_parts(tiny_model: Path, tmp_path: Path) -> None:
    def run(*more: Any) -> tuple[dict[str, Recording], Any]:
        torch.manual_seed(1)
        model = SentenceTransformer(str(tiny_model), device="cpu")
        losses = {name: Recording(model) for name in ("first", "second", "third")}
        parts = DatasetDict(first=pairs(20, seed=1), second=pairs(), third=pairs(24, seed=2))
        own = {name: parts[name] for name in ("first", "second")}
        args = SentenceTransformerTrainingArguments(
            **arguments(tmp_path, num_train_epochs=2, save_strategy="steps", save_steps=16),
            batch_sampler=BatchSamplerFactory(
                DatasetDict(own), parts={"second": {"seed": 5}}, cluster_size=4
            ),
        )
        vectors = Vectors()
        callbacks = [vectors, *more]
        trainer = SentenceTransformerTrainer(
            model=model, args=args, train_dataset=parts, loss=losses, callbacks=callbacks
        )
        return losses, (trainer, vectors)

    losses, (trainer, vectors) = run()
    trainer.train()
    assert [len(x) for x in vectors.vectors] == [20, ROWS]
    for name, rows, seed, x in zip(
        ("first", "second"), (20, ROWS), (0, 5), vectors.vectors, strict=True
    ):
        sampler = ClusterBatchSampler(rows, BATCH, cluster_size=4, seed=seed)
        expected = list(sampler)
        sampler.set_epoch(1)
        sampler.refresh(x)
        assert losses[name].batches == expected + list(sampler)
    # Resumed within the second epoch, when both have their clusters from the checkpoint.
    again, (trainer, vectors) = run()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-16"))
    assert not vectors.vectors
    for name in ("first", "second"):
        rest = len(again[name].batches)
        assert again[name].batches == losses[name].batches[-rest:]


def test_factory_knows_the_names_of_its_parts() -> None:
    with pytest.raises(ValueError, match="parts has fourth, the data set first, third"):
        BatchSamplerFactory({"first": pairs(), "third": pairs()}, parts={"fourth": {}})


def test_run_that_ends_before_the_first_clusters(tiny_model: Path, tmp_path: Path) -> None:
    trainer = text_run(tmp_path, tiny_model, num_train_epochs=1)
    with pytest.warns(UserWarning, match="of this run are random: it ends before epoch 1"):
        trainer.train()


def test_trainer_with_another_data_set_is_told(tiny_model: Path, tmp_path: Path) -> None:
    trainer = text_run(tmp_path, tiny_model)
    trainer.train_dataset = pairs().shuffle(seed=0)
    with pytest.raises(ValueError, match="no batch sampler that can be refreshed"):
        trainer.train()


def test_column_that_is_not_there(tiny_model: Path, tmp_path: Path) -> None:
    trainer = text_run(tmp_path, tiny_model)
    callback(trainer, Vectors)._column = "label"
    with pytest.raises(ValueError, match="column is label, the data set has anchor, positive"):
        trainer.train()


def routed(tiny_model: Path) -> SentenceTransformer:
    """A model whose routes differ."""
    routes = {}
    for name in ("doc", "query"):
        encoder = Transformer(str(tiny_model))
        for weight in encoder.parameters():
            weight.data += 0.2 * torch.randn_like(weight)
        routes[name] = [encoder, Pooling(encoder.get_embedding_dimension())]
    return SentenceTransformer(modules=[Router(routes, default_route="doc")], device="cpu")


@pytest.mark.parametrize("nested", [False, True])
def test_anchors_are_encoded_by_their_route(tiny_model: Path, nested: bool) -> None:
    dataset, model = pairs(), routed(tiny_model)
    routes: Any = {"anchor": "query", "positive": "doc"}
    if nested:
        dataset = dataset.add_column("dataset_name", ["qa"] * ROWS)
        routes = {"qa": routes, "other": {"anchor": "doc"}}
    args = SentenceTransformerTrainingArguments(router_mapping=routes)
    found: list[Any] = []
    sampler = ClusterBatchSampler(ROWS, BATCH, cluster_size=4)
    sampler.refresh = found.append  # type: ignore[method-assign, assignment]
    TextRefreshCallback().refresh(sampler, dataset, model, args)
    expected = model.encode(list(dataset["anchor"]), task="query")
    assert np.allclose(found[0], expected, atol=1e-5)
    assert not np.allclose(found[0], model.encode(list(dataset["anchor"])), atol=1e-2)


def test_vectors_of_a_sparse_encoder_are_clustered(tiny_model: Path) -> None:
    dense = Transformer(str(tiny_model))

    class Logits(torch.nn.Module):
        def forward(self, features: Any) -> Any:
            return {**features, "token_embeddings": features["token_embeddings"] - 0.5}

    model = SparseEncoder(modules=[dense, Logits(), SpladePooling()], device="cpu")
    sampler = ClusterBatchSampler(ROWS, BATCH, cluster_size=4)
    TextRefreshCallback().refresh(
        sampler, pairs(), model, SentenceTransformerTrainingArguments(use_cpu=True)
    )
    assert sampler.refreshes == 1


def test_model_without_vectors_is_refused_when_training_begins(tiny_model: Path) -> None:
    model = CrossEncoder(str(tiny_model), num_labels=1, device="cpu")
    with pytest.raises(TypeError, match=r"the model is a CrossEncoder, .* no vector to cluster"):
        TextRefreshCallback().on_train_begin(None, None, None, model=model)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "the data set has anchor, positive"),
        ([*range(ROWS)], r"its label column has int64 of shape \(42,\)"),
        ([[0.5, 1.0]] * ROWS, r"its label column has float64 of shape \(42, 2\)"),
    ],
)
def test_bank_needs_a_column_of_ids(label: Any, message: str) -> None:
    dataset = pairs().remove_columns("label")
    if label is not None:
        dataset = dataset.add_column("label", label)
    callback = TextRefreshCallback(bank=EmbeddingBank(ROWS, 4))
    sampler = ClusterBatchSampler(ROWS, BATCH, cluster_size=4)
    with pytest.raises(
        ValueError, match=rf"column label of pairs.*; {message}.*or leave the bank out"
    ):
        callback.refresh(sampler, dataset, None, None)


def test_bank_of_another_width_than_the_vectors(tiny_model: Path, tmp_path: Path) -> None:
    trainer = bank_run(tmp_path, tiny_model)
    model = trainer.model
    width = model.get_embedding_dimension()
    trainer.loss = MatryoshkaLoss(model, trainer.loss, [width // 2])
    message = f"the anchors have {width // 2} columns, the bank {width}.*leave the bank out"
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_streams_have_no_rows_to_choose(tmp_path: Path) -> None:
    stream = pairs().to_iterable_dataset()
    with pytest.raises(TypeError, match=r"dataset is a IterableDataset, .* is not streamed"):
        BatchSamplerFactory(stream, cluster_size=4)
    trainer = table_run(tmp_path, max_steps=2)
    trainer.train_dataset = stream
    with pytest.raises(TypeError, match="train_dataset is a IterableDataset"):
        trainer.train()


class Taken(TextRefreshCallback):
    """The callback, with the vectors that it took from its bank."""

    def __init__(self, bank: EmbeddingBank) -> None:
        super().__init__(bank=bank)
        self.vectors: list[Any] = []

    def refresh(self, sampler: Any, dataset: Any, model: Any, args: Any) -> None:
        self.vectors.append(self.bank.vectors[np.arange(ROWS) // 2])
        super().refresh(sampler, dataset, model, args)


def bank_run(folder: Path, tiny_model: Path, *more: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    model = SentenceTransformer(str(tiny_model), device="cpu")
    points, labels = np.arange(ROWS) // 2, np.arange(ROWS)  # two pairs of each anchor
    ids = np.stack([points, labels], axis=1).tolist()
    dataset = pairs().remove_columns("label").add_column("label", ids)
    bank = EmbeddingBank(ROWS // 2, model.get_embedding_dimension())
    args = SentenceTransformerTrainingArguments(
        **arguments(folder, **options), batch_sampler=BatchSamplerFactory(dataset, cluster_size=4)
    )
    return SentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        loss=Recording(model, sp.csr_matrix((np.ones(ROWS), (points, labels))), bank=bank),
        callbacks=[Taken(bank), *more],
    )


def test_bank_that_the_loss_fills_is_what_is_clustered_and_survives_a_restart(
    tiny_model: Path, tmp_path: Path
) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}
    whole = bank_run(tmp_path / "whole", tiny_model, **options)
    whole.train()
    taken = callback(whole, Taken).vectors
    assert [np.linalg.norm(x.astype(float), axis=1).round(2).min() for x in taken] == [1, 1]
    assert not np.array_equal(*taken)
    assert whole.loss.batches == planned(ROWS, taken)
    first = bank_run(tmp_path / "cut", tiny_model, Killed(10), **options)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = bank_run(tmp_path / "cut", tiny_model, **options)
    second.train(resume_from_checkpoint=True)
    assert first.loss.batches[:8] + second.loss.batches == whole.loss.batches
    assert np.array_equal(second.loss.bank.vectors, whole.loss.bank.vectors)


def test_bank_needs_ids_of_the_anchors() -> None:
    with pytest.raises(ValueError, match="bank is given without positives"):
        MaskedMultipleNegativesRankingLoss(Given(), bank=EmbeddingBank(3, 3))  # type: ignore[arg-type]


# ---- The loss --------------------------------------------------------------------------------


class Given(torch.nn.Module):
    """Hands the features through as embeddings."""

    def forward(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sentence_embedding": features["x"]}


def embeddings(*columns: Any) -> list[dict[str, torch.Tensor]]:
    return [{"x": torch.as_tensor(column, dtype=torch.float32)} for column in columns]


def loss_of(columns: Any, labels: Any, positives: Any = None, scale: float = 20.0) -> float:
    loss = MaskedMultipleNegativesRankingLoss(Given(), positives, scale=scale)  # type: ignore[arg-type]
    return loss(embeddings(*columns), torch.as_tensor(labels)).item()


def test_loss_in_closed_form() -> None:
    # Cosines [[.5, .2], [.1, .6]].
    x = np.eye(3)[:2]
    y = [[0.5, 0.1, np.sqrt(0.74)], [0.2, 0.6, np.sqrt(0.6)]]
    assert loss_of([x, y], [0, 1]) == pytest.approx(0.001260542, rel=1e-4)
    assert loss_of([x, y], [5, 5]) == 0  # one positive, twice: there is no negative
    # Row 0 alone has the other's positive too.
    known = sp.csr_matrix([[1, 1], [0, 1]])
    expected = np.log1p(np.exp(-10)) / 2
    assert loss_of([x, y], [[0, 0], [1, 1]], known) == pytest.approx(expected, rel=1e-3)


def test_loss_is_their_loss_where_nothing_is_known(tiny_model: Path) -> None:
    model = SentenceTransformer(str(tiny_model), device="cpu").eval()
    features = [
        model.preprocess([f"{word} {other}" for word in WORDS]) for other in ("house", "car", "it")
    ]
    ours, theirs = (
        loss(model, scale=7.0)(features, torch.arange(len(WORDS)))
        for loss in (MaskedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss)
    )
    torch.testing.assert_close(ours, theirs)


def test_loss_by_the_slow_way() -> None:
    rng = np.random.default_rng(0)
    known = sp.random(6, 5, 0.5, "csr", random_state=rng)
    rows, columns = rng.integers(6, size=9), rng.integers(5, size=9)
    x, y, z = rng.standard_normal((3, 9, 4))
    a, *others = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (x, y, z))
    scores = 3.0 * a @ np.concatenate(others).T
    dense = known.toarray() != 0
    dense[rows, columns] = True  # a pair of the batch is a positive, whichever row has it
    expected = 0.0
    for i in range(9):
        negatives = [
            scores[i, j] for j in range(9) if j != i and not dense[rows[i], columns[j]]
        ] + scores[i, 9:].tolist()
        expected += np.log1p(np.exp(np.array(negatives) - scores[i, i]).sum()) / 9
    labels = np.stack([rows, columns], axis=1)
    assert loss_of([x, y, z], labels, known, scale=3.0) == pytest.approx(expected, rel=1e-5)


def test_loss_refuses_labels_of_another_form() -> None:
    x = np.eye(3)
    with pytest.raises(ValueError, match=r"of shape \(3, 4\), expected \(3,\) or \(3, 2\) in"):
        loss_of([x, x], np.zeros((3, 4), int))
    with pytest.raises(TypeError, match=r"of torch.float32, expected integers"):
        loss_of([x, x], [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match=r"of shape \(3,\), expected \(3, 2\)"):
        loss_of([x, x], [0, 1, 2], sp.csr_matrix(np.eye(3)))
    with pytest.raises(IndexError):
        loss_of([x, x], [[0, 3]] * 3, sp.csr_matrix(np.eye(3)))
    says = r"is missing, .* in this batch: ids of the positives, or \[anchor id, positive id\]"
    with pytest.raises(ValueError, match=f"label column {says}"):
        MaskedMultipleNegativesRankingLoss(Given())(embeddings(x, x), None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Scale must be a positive"):
        loss_of([x, x], [0, 1, 2], scale=0)


# ---- transformers ----------------------------------------------------------------------------


class Table(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(ROWS, 6)
        self.dropout = torch.nn.Dropout(0.5)
        self.batches: list[list[int]] = []

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            self.batches.append(rows.tolist())
        return {"loss": (self.dropout(self.table(rows)) ** 3).sum()}


class BatchTrainer(BatchSamplerMixin, Trainer):
    pass


def collate(rows: list[int]) -> dict[str, torch.Tensor]:
    return {"rows": torch.tensor(rows)}


def table_run(folder: Path, *more: Any, sampler: Any = None, **options: Any) -> Any:
    model = Table()
    refresh = RefreshCallback(lambda rows: model.table(torch.from_numpy(rows)), chunk_size=16)
    return BatchTrainer(
        model,
        TrainingArguments(**arguments(folder, **options)),
        collate,
        range(ROWS),
        range(ROWS // 2),
        callbacks=[refresh, *more],
        batch_sampler=sampler or ClusterBatchSampler(ROWS, BATCH, cluster_size=4),
    )


def test_plain_trainer_trains_on_the_batches(tmp_path: Path) -> None:
    options = {"eval_strategy": "epoch", "dataloader_num_workers": 1}
    trainer = table_run(tmp_path, **options)
    vectors: list[Any] = []
    callback(trainer, RefreshCallback).refresh = lambda sampler, dataset, model, args: (
        vectors.append(model.table.weight.detach().numpy().copy()),
        sampler.refresh(vectors[-1]),
    )
    trainer.train()
    assert len(vectors) == 2
    assert trainer.model.batches == planned(ROWS, vectors)
    assert sum("eval_runtime" in line for line in trainer.state.log_history) == 3


@pytest.mark.parametrize(("save_steps", "accumulated"), [(2, 4), (3, 1)])
def test_plain_trainer_killed_and_resumed(
    tmp_path: Path, save_steps: int, accumulated: int
) -> None:
    options = {
        "save_strategy": "steps",
        "save_steps": save_steps,
        "gradient_accumulation_steps": accumulated,
        "num_train_epochs": 4,
    }
    whole = table_run(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        table_run(tmp_path / "cut", Killed(5), **options).train()
    second = table_run(tmp_path / "cut", **options)
    second.train(resume_from_checkpoint=True)
    rest = len(second.model.batches)
    assert 0 < rest < len(whole.model.batches)
    assert second.model.batches == whole.model.batches[-rest:]
    assert torch.equal(second.model.table.weight, whole.model.table.weight)


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_second_training_begins_as_the_first(tmp_path: Path, start_epoch: int) -> None:
    """With the same trainer, and with another that has the same sampler."""
    options: Any = {"cluster_size": 4, "start_epoch": start_epoch, "refresh_every": 2}
    sampler = ClusterBatchSampler(ROWS, BATCH, **options)
    x, other = np.random.default_rng(0).standard_normal((2, ROWS, 4), dtype=np.float32)

    def made(sampler: ClusterBatchSampler) -> Any:
        trainer = table_run(tmp_path, sampler=sampler, num_train_epochs=start_epoch + 1)
        callback(trainer, RefreshCallback)._encode = lambda rows: x[rows]
        return trainer

    def trained(trainer: Any) -> list[list[int]]:
        trainer.model.batches.clear()
        trainer.train()
        return list(trainer.model.batches)

    trainer = made(sampler)
    callback(trainer, RefreshCallback)._encode = lambda rows: other[rows]
    trained(trainer)
    callback(trainer, RefreshCallback)._encode = lambda rows: x[rows]
    expected = trained(made(ClusterBatchSampler(ROWS, BATCH, **options)))
    assert trained(trainer) == expected
    assert trained(made(sampler)) == expected


def test_clusters_given_before_training_serve_every_training(tmp_path: Path) -> None:
    sampler = ClusterBatchSampler(ROWS, BATCH, cluster_size=4, start_epoch=0, refresh_every=9)
    sampler.refresh(np.random.default_rng(0).standard_normal((ROWS, 3), dtype=np.float32))
    clusters = sampler.clusters
    assert clusters is not None
    order = clusters.order.copy()
    for _ in range(2):
        table_run(tmp_path, sampler=sampler, num_train_epochs=1).train()
        assert np.array_equal(sampler.clusters.order, order)


def test_state_is_that_of_the_checkpoint_resumed_from(tmp_path: Path) -> None:
    def run(folder: str, seed: int = 0, **more: Any) -> Any:
        sampler = ClusterBatchSampler(ROWS, BATCH, cluster_size=4, seed=seed)
        options = {"save_strategy": "steps", "save_steps": 8, **more}
        return table_run(tmp_path / folder, sampler=sampler, **options)

    whole = run("first")
    whole.train()
    run("second", 1).train()  # has a checkpoint of the same number
    resumed = run("second")
    resumed.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-8"))
    assert resumed.model.batches == whole.model.batches[8:]


def test_checkpoints_of_one_memory_for_all_processes(tmp_path: Path) -> None:
    """Older versions wrote one: the step in it serves all, a queue does not."""

    class Callback(SamplerCallback):
        memory = LossMemory([])

        def refresh(self, sampler: Any, dataset: Any, model: Any, args: Any) -> None: ...

    trainer = table_run(tmp_path)
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    loader = trainer.get_train_dataloader()
    sampler = to_tensors(loader.batch_sampler.state_dict())
    memory: dict[str, Any] = {"step": torch.tensor(3)}
    args = SimpleNamespace(output_dir=tmp_path, process_index=1, world_size=1)
    args.gradient_accumulation_steps = 1
    state = SimpleNamespace(global_step=3, max_steps=12)
    write_tensors(folder / "ngame.safetensors", with_prefixes(**{"0": sampler, "memory": memory}))
    Callback().on_train_begin(args, state, None, train_dataloader=loader)
    assert Callback.memory.state_dict()["step"] == 3
    memory["0.ids"] = torch.zeros(1)
    write_tensors(folder / "ngame.safetensors", with_prefixes(**{"0": sampler, "memory": memory}))
    with pytest.raises(FileNotFoundError, match=r"no .*ngame\.rank1\.safetensors.*earlier version"):
        Callback().on_train_begin(args, state, None, train_dataloader=loader)


def test_trials_keep_their_states_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.hp_params", vars)  # knows optuna's trials only
    trainer = table_run(tmp_path, save_strategy="epoch", num_train_epochs=2)
    trainer.hp_search_backend = "optuna"
    trainer.hp_name = lambda trial: f"trial-{trial.number}"
    trainer._hp_search_setup = lambda trial: None
    for number in range(2):
        trainer._trial = SimpleNamespace(number=number)
        trainer.train(trial=trainer._trial)
    found = sorted(path.parent.relative_to(tmp_path) for path in tmp_path.rglob("ngame.*"))
    assert found == [Path(f"trial-{n}/checkpoint-{step}") for n in (0, 1) for step in (12, 6)]


def test_arguments_that_are_not_those_of_the_batches(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="reports batches of 16 rows, .* sampler have 8: set per_"):
        table_run(tmp_path, per_device_train_batch_size=16).get_train_dataloader()
    with pytest.warns(UserWarning, match="drop_last is True, but the last batch is kept"):
        table_run(tmp_path, dataloader_drop_last=True).get_train_dataloader()
    trainer = table_run(tmp_path, auto_find_batch_size=True)
    tried: list[int] = []

    def compute_loss(model: Any, inputs: Any, **_: Any) -> Any:
        tried.append(len(inputs["rows"]))
        raise RuntimeError("CUDA out of memory.")

    trainer.compute_loss = compute_loss
    with pytest.raises(ValueError, match=r"wants batches of \d rows, .* batch sampler have 8"):
        trainer.train()
    assert tried == [8]


def test_plain_trainer_needs_no_callback_for_groups(tmp_path: Path) -> None:
    sampler = GroupBatchSampler(np.arange(ROWS) % 3, BATCH, per_group=4)
    trainer = table_run(tmp_path, sampler=sampler)
    trainer.pop_callback(RefreshCallback)
    trainer.train()
    expected = [rows.tolist() for epoch in range(3) for rows in sampler.plan(epoch)]
    assert trainer.model.batches == expected


def test_plain_trainer_restores_its_bank(tmp_path: Path) -> None:
    def run(*more: Any) -> tuple[Any, EmbeddingBank]:
        bank = EmbeddingBank(ROWS, 6)
        trainer = table_run(tmp_path, *more, save_strategy="epoch")
        trainer.model.table.register_forward_hook(
            lambda _, inputs, vectors: bank.update(inputs[0], vectors.detach())
        )
        trainer.pop_callback(RefreshCallback)
        trainer.add_callback(RefreshCallback(lambda rows: bank.vectors[rows], bank=bank))
        return trainer, bank

    cut, bank = run(Killed(8))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    whole, whole_bank = run()
    whole.train()
    second, again = run()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert cut.model.batches[:6] + second.model.batches == whole.model.batches
    assert np.array_equal(again.vectors, whole_bank.vectors)
    assert not np.array_equal(bank.vectors, again.vectors)


def test_plain_trainer_refuses_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data set has 42 rows, the batch sampler 41"):
        table_run(tmp_path, sampler=ClusterBatchSampler(41, 8, cluster_size=4)).train()
    two = ClusterBatchSampler(ROWS, 8, cluster_size=4, world_size=2)
    with pytest.raises(ValueError, match="leave world_size out"):
        table_run(tmp_path, sampler=two).train()


# ---- Several processes -----------------------------------------------------------------------

TWO = """
import json, sys
import torch, torch.distributed as dist
from test_adapters import *

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
sampler = ClusterBatchSampler(ROWS, 4, cluster_size=4, drop_last=True)
options = {"num_train_epochs": 6, "ddp_backend": "gloo"}
trainer = table_run(folder, sampler=sampler, per_device_train_batch_size=4, **options)
trainer.train()
trained = trainer.model.batches
text_trainer = text_run(folder, sys.argv[2], dataloader_drop_last=True, **options)
text_trainer.train()
found = {"table": trained, "text": text_trainer.loss.batches}
(folder / f"{rank}.json").write_text(json.dumps(found))
with pytest.raises(ValueError, match="drop_last is False with 2 processes"):
    table_run(folder, **options).train()
def queued():  # every process has a queue of its own
    more = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3}
    trainer = text_run(
        folder / "queue", sys.argv[2], dataloader_drop_last=True, **options | more
    )
    trainer.loss = Recording(trainer.model, sources=[NegativeQueue(40, 16)])
    trainer.pop_callback(Vectors)
    trainer.add_callback(TextRefreshCallback(loss=trainer.loss))
    return trainer

whole, resumed = queued(), queued()
whole.train()
resumed.train(resume_from_checkpoint=str(folder / "queue" / "checkpoint-3"))
for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
    assert torch.equal(ours, theirs)
expected = whole.loss.memory.state_dict()
for name, value in resumed.loss.memory.state_dict().items():
    assert np.array_equal(value, expected[name]), name
trainer = table_run(folder, sampler=sampler, **options)
callback(trainer, RefreshCallback).bank = EmbeddingBank(ROWS, 6)
with pytest.raises(ValueError, match="a bank, and 2 processes"):
    trainer.train()
whole = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
labels = torch.tensor([0, 1, 2, 3, 1, 5, 6, 0])  # two of them on both ranks
every = "query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"
for options in ({}, {"directions": every}):
    own = whole[:, rank * 4 :][:, :4]
    gathering = MaskedMultipleNegativesRankingLoss(Given(), gather_across_devices=True, **options)
    loss = gathering.compute_loss_from_embeddings([*own], labels[rank * 4 :][:4])
    dist.all_reduce(loss)
    alone = MaskedMultipleNegativesRankingLoss(Given(), **options)
    expected = alone.compute_loss_from_embeddings([*whole], labels)
    torch.testing.assert_close(loss / 2, expected)
own = pairs()
with pytest.raises(ValueError, match="dataloader_drop_last is False with 2 processes"):
    BatchSamplerFactory(own, cluster_size=4)(own, BATCH, False)
dist.destroy_process_group()
"""


def test_two_processes_share_each_epoch(tiny_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # This file, what it imports, and ngame where it is not installed.
    here = Path(__file__).parent
    path = [str(here), str(here.parent), os.environ.get("PYTHONPATH")]
    subprocess.run(
        [*command, "--nproc-per-node", "2", str(script), str(tmp_path), str(tiny_model)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "OMP_NUM_THREADS": "1",
        },
        check=True,
        timeout=300,
        capture_output=True,
    )
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for name, size in (("table", 4), ("text", BATCH)):
        ours, theirs = ranks[0][name], ranks[1][name]
        steps = ROWS // size // 2
        assert len(ours) == len(theirs) == 6 * steps
        for epoch in range(6):
            both = [batches[epoch * steps :][:steps] for batches in (ours, theirs)]
            seen = [row for batches in both for batch in batches for row in batch]
            assert len(set(seen)) == len(seen) == 2 * steps * size

"""ClusterDataLoader and refresh_sampler: refreshes on time, resumption, several processes."""

import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ngame.adapters.torch import ClusterDataLoader, refresh_sampler
from ngame.batches import ClusterBatchSampler, GroupBatchSampler, NeighbourBatchSampler
from ngame.cluster import Clusters, balanced_clusters
from ngame.encoders.bank import EmbeddingBank

ROWS, BATCH = 50, 8


class Table(torch.nn.Module):
    """A vector a row, and dropout, which draws from the random state wherever it trains."""

    def __init__(self, rows: int = ROWS) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(rows, 6)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, rows: Any) -> torch.Tensor:
        return self.dropout(self.table(torch.as_tensor(rows)))


def a_loader(model: Table, *, refresh_every: int = 1, **options: Any) -> ClusterDataLoader:
    sampler = ClusterBatchSampler(ROWS, BATCH, cluster_size=4, refresh_every=refresh_every)
    refresh = partial(refresh_sampler, encode=model, model=model, chunk_size=16)
    return ClusterDataLoader(range(ROWS), sampler, refresh=refresh, collate_fn=np.array, **options)


class Run:
    """A training run that can be saved, and stopped, after any of its steps."""

    def __init__(self, **options: Any) -> None:
        self.model = Table()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.loader = a_loader(self.model, **options)
        self.seen: list[tuple[int, list[int]]] = []

    def train(self, epochs: int, stop_after: int | None = None) -> dict[str, Any] | None:
        for epoch in range(self.loader.epoch, epochs):
            self.loader.set_epoch(epoch)
            for rows in self.loader:
                self.seen.append((epoch, rows.tolist()))
                (self.model(rows) ** 3).sum().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                if len(self.seen) == stop_after:
                    return self.state()
        return None

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "loader": self.loader}
        state = {name: part.state_dict() for name, part in parts.items()}
        return {**state, "random": torch.get_rng_state()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["random"])


# ---- accelerate ------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_accelerate_rebuilds_is_refreshed_on_time(workers: int) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = Run()
    expected.train(4)
    run = Run(num_workers=workers)
    prepared = accelerate.Accelerator(cpu=True).prepare(run.loader)
    assert prepared is not run.loader
    refreshed = []
    for epoch in range(4):
        for rows in prepared:
            run.seen.append((epoch, rows.tolist()))
            (run.model(rows) ** 3).sum().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        refreshed.append(run.loader._batches.planner.refreshes)
    assert refreshed == [0, 1, 2, 3]
    assert run.seen == expected.seen


@pytest.mark.parametrize("refresh_every", [1, 2])
@pytest.mark.parametrize("taken", [9, 14])
def test_accelerate_resumes_with_the_sampler_registered(
    taken: int, refresh_every: int, tmp_path: Any
) -> None:
    """From a checkpoint in an epoch, and at the end of one."""
    accelerate = pytest.importorskip("accelerate")

    def train(resume: bool) -> Run:
        run = Run(refresh_every=refresh_every)
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer, loader = accelerator.prepare(run.model, run.optimizer, run.loader)
        accelerator.register_for_checkpointing(run.loader.batch_sampler.planner)
        first, skipped = 0, 0
        if resume:
            accelerator.load_state(tmp_path)
            first, skipped = divmod(taken, len(loader))
        for epoch in range(first, 5):
            loader.set_epoch(epoch)
            batches = accelerator.skip_first_batches(loader, skipped) if skipped else loader
            skipped = 0
            for rows in batches:
                run.seen.append((epoch, rows.tolist()))
                accelerator.backward((model(rows) ** 3).sum())
                optimizer.step()
                optimizer.zero_grad()
                if len(run.seen) == taken and not resume:
                    accelerator.save_state(tmp_path)
        return run

    whole = train(resume=False)
    second = train(resume=True)
    assert second.seen == whole.seen[taken:]
    assert torch.equal(second.model.table.weight, whole.model.table.weight)


@pytest.mark.parametrize("wrapped", [False, True])
def test_batches_are_dealt_to_processes_once(wrapped: bool) -> None:
    data_loader = pytest.importorskip("accelerate.data_loader")
    seen = []
    for rank in range(2):
        for own, theirs in ((2, 1), (1, 2), (2, 2)):
            sampler = ClusterBatchSampler(
                64, 8, cluster_size=2, world_size=own, rank=min(rank, own - 1)
            )
            loader: Any = torch.utils.data.DataLoader(range(64), batch_sampler=sampler)
            if wrapped:
                loader = ClusterDataLoader(range(64), sampler)
            prepared = data_loader.prepare_data_loader(
                loader, num_processes=theirs, process_index=min(rank, theirs - 1)
            )
            if own == theirs:
                with pytest.raises(ValueError, match=r"dealt out twice.*leave out world_size"):
                    list(prepared)
            else:
                seen += torch.cat(list(prepared)).tolist()
    assert sorted(seen) == sorted(2 * list(range(64)))


def test_batches_that_accelerate_dispatches_are_dealt_once() -> None:
    """With dispatch_batches=True, as for iterable data sets, one process reads all batches."""
    data_loader = pytest.importorskip("accelerate.data_loader")
    state = SimpleNamespace(num_processes=2, process_index=0, device=torch.device("cpu"))
    for sampler_processes in (1, 2):
        sampler = ClusterBatchSampler(64, 8, cluster_size=2, world_size=sampler_processes)
        prepared = data_loader.prepare_data_loader(
            ClusterDataLoader(range(64), sampler), dispatch_batches=True, put_on_device=True
        )
        assert type(prepared).__name__ == "DataLoaderDispatcher"
        if sampler_processes == 1:
            assert sorted(torch.cat(list(prepared)).tolist()) == list(range(64))
            continue
        prepared.state = state
        with pytest.raises(ValueError, match=r"dealt out twice.*leave out world_size"):
            next(iter(prepared))


# ---- Lightning -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("hook", [False, True])
def test_lightning_is_told_to_leave_the_batches_alone(wrapped: bool, hook: bool) -> None:
    """What its trainer does in several processes, to loaders made in a hook or handed over."""
    pytest.importorskip("lightning")
    from lightning.fabric.utilities.data import _replace_dunder_methods
    from lightning.pytorch.utilities.data import _update_dataloader

    def make() -> Any:
        sampler = ClusterBatchSampler(64, 8, cluster_size=2, world_size=2)
        if wrapped:
            return ClusterDataLoader(range(64), sampler)
        return torch.utils.data.DataLoader(range(64), batch_sampler=sampler)

    if hook:
        with _replace_dunder_methods(torch.utils.data.DataLoader, "dataset"):
            loader = make()
    else:
        loader = make()
    theirs = torch.utils.data.DistributedSampler(range(64), 2, 0)
    with pytest.raises(ValueError, match=r"as Lightning does.*use_distributed_sampler=False"):
        _update_dataloader(loader, theirs, mode=None)


@pytest.mark.filterwarnings("ignore")  # Lightning's own
@pytest.mark.parametrize("refresh_every", [1, 2])
def test_lightning_resumes_from_any_checkpoint(refresh_every: int, tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning")

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Table()
            self.seen: list[list[int]] = []

        def training_step(self, rows: Any) -> torch.Tensor:
            self.seen.append(rows.tolist())
            return (self.inner.table(torch.as_tensor(rows)) ** 3).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    class Batches(lightning.LightningDataModule):
        """As in docs/loops.md."""

        def __init__(self, loader: ClusterDataLoader) -> None:
            super().__init__()
            self.loader = loader

        def train_dataloader(self) -> ClusterDataLoader:
            return self.loader

        def state_dict(self) -> dict[str, torch.Tensor]:
            return self.loader.state_dict()

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            self.loader.load_state_dict(state)

    def fit(*callbacks: Any, checkpoint: Any = None) -> Model:
        model = Model()
        loader = a_loader(model.inner, refresh_every=refresh_every)
        lightning.Trainer(
            max_epochs=5,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
            callbacks=[*callbacks],
        ).fit(model, datamodule=Batches(loader), ckpt_path=checkpoint)
        return model

    kept = partial(lightning.pytorch.callbacks.ModelCheckpoint, tmp_path, save_top_k=-1)
    whole = fit(kept(filename="{epoch}"), kept(filename="{step}", every_n_train_steps=1))
    for name, taken in (
        ("epoch=0", 7),
        ("epoch=1", 14),
        ("epoch=2", 21),
        ("step=10", 10),
        ("step=14", 14),  # after the last batch, before the end of the epoch
    ):
        second = fit(checkpoint=tmp_path / f"{name}.ckpt")
        assert second.seen == whole.seen[taken:], name
        assert torch.equal(second.inner.table.weight, whole.inner.table.weight), name


def test_other_samplers_are_not_rebuilt_either() -> None:
    theirs = torch.utils.data.SequentialSampler(range(64))
    for kind in (GroupBatchSampler, NeighbourBatchSampler):
        with pytest.raises(ValueError, match="rebuilt around a SequentialSampler"):
            kind(theirs, batch_size=8, drop_last=False)


# ---- One process -----------------------------------------------------------------------------


def test_epochs_are_those_of_a_sampler_refreshed_by_hand() -> None:
    run = Run()
    run.train(3)
    assert [epoch for epoch, _ in run.seen] == [0] * 7 + [1] * 7 + [2] * 7
    for epoch in range(3):
        rows = [row for one, batch in run.seen for row in batch if one == epoch]
        assert sorted(rows) == list(range(ROWS))
    # Clusters of the vectors as they were between the two epochs, the dropout being off.
    again = Run()
    again.train(1)
    sampler = ClusterBatchSampler(ROWS, BATCH, cluster_size=4)
    sampler.set_epoch(1)
    sampler.refresh(again.model.table.weight.detach().numpy())
    assert [batch for epoch, batch in run.seen if epoch == 1] == list(sampler)


def test_refresh_leaves_no_trace_in_the_training_around_it() -> None:
    model = Table()
    loader = a_loader(model)
    loader.set_epoch(1)
    model.eval()
    model.dropout.train()
    before = torch.get_rng_state(), random.getstate()
    next(iter(loader))
    assert not model.training
    assert model.dropout.training
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.parametrize("stop_after", [1, 3, 7, 8, 13, 14, 20])
def test_a_run_that_is_resumed_ends_in_the_same_numbers(stop_after: int, tmp_path: Any) -> None:
    whole = Run()
    whole.train(3)

    first = Run()
    torch.save(first.train(3, stop_after), tmp_path / "state.pt")
    second = Run()
    torch.rand(5)
    second.load(torch.load(tmp_path / "state.pt", weights_only=True))
    second.train(3)
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.model.table.weight, whole.model.table.weight)


def test_vectors_may_come_from_a_bank(tmp_path: Any) -> None:
    class Banked(Run):
        def __init__(self) -> None:
            super().__init__()
            self.bank = EmbeddingBank(ROWS, 6)
            self.loader = ClusterDataLoader(
                range(ROWS),
                ClusterBatchSampler(ROWS, BATCH, cluster_size=4),
                refresh=lambda sampler: sampler.refresh(self.bank.vectors),
                collate_fn=np.array,
            )
            self.model.table.register_forward_hook(
                lambda _, rows, vectors: self.bank.update(rows[0], vectors)
            )

    whole = Banked()
    whole.train(3)
    first = Banked()
    state = first.train(3, 10)
    assert state is not None
    second = Banked()
    second.load(state)
    second.bank.load_state_dict(first.bank.state_dict())
    second.train(3)
    assert first.seen + second.seen == whole.seen
    again = Banked()
    again.train(1)
    sampler = ClusterBatchSampler(ROWS, BATCH, cluster_size=4)
    sampler.set_epoch(1)
    sampler.refresh(again.bank.vectors)
    assert [batch for epoch, batch in whole.seen if epoch == 1] == list(sampler)


@pytest.mark.parametrize("delivered", [0, 1, 2, 3])
def test_all_processes_go_on_from_what_one_saved(delivered: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((ROWS, 4)).astype(np.float32)

    def ranks() -> list[ClusterDataLoader]:
        return [
            ClusterDataLoader(
                range(ROWS),
                ClusterBatchSampler(ROWS, BATCH, cluster_size=4, world_size=2, rank=rank),
                collate_fn=list,
            )
            for rank in (0, 1)
        ]

    states, rests = [], []
    for loader in ranks():
        loader.set_epoch(1)
        loader.batch_sampler.planner.refresh(vectors)
        batches = iter(loader)
        for _ in range(delivered):
            next(batches)
        states.append(loader.state_dict())
        rests.append(list(batches))
    assert len(rests[0]) == len(rests[1]) == 3 - delivered
    for loader, rest in zip(ranks(), rests, strict=True):
        loader.load_state_dict(states[0])
        assert loader.epoch == 1
        assert list(loader) == rest


def test_workers_that_fetch_ahead_do_not_count() -> None:
    whole = Run()
    whole.train(2)
    first = Run(num_workers=1, prefetch_factor=4)
    state = first.train(2, stop_after=9)
    assert state is not None
    second = Run()
    second.load(state)
    second.train(2)
    assert first.seen + second.seen == whole.seen


def test_an_epoch_can_be_abandoned_and_begun_again() -> None:
    loader = a_loader(Table())
    iterator = iter(loader)
    first = [next(iterator).tolist() for _ in range(3)]
    whole = [rows.tolist() for rows in loader]
    assert whole[:3] == first
    assert len(whole) == len(loader) == 7


def left(state: dict[str, torch.Tensor]) -> tuple[int, list[list[int]]]:
    """The epoch that a new loader goes on with, and the batches it has left of it."""
    loader = a_loader(Table())
    loader.load_state_dict(state)
    loader.set_epoch(loader.epoch)  # as loops do
    return loader.epoch, [rows.tolist() for rows in loader]


@pytest.mark.parametrize("by_trainer", [False, True])
def test_a_state_is_of_the_moment_it_is_taken_at(by_trainer: bool) -> None:
    loader = a_loader(Table())
    setter = loader.batch_sampler.sampler if by_trainer else loader  # Lightning uses the first
    first = [rows.tolist() for rows in loader]
    finished = loader.state_dict()
    setter.set_epoch(0)
    again = loader.state_dict()
    setter.set_epoch(1)
    between = loader.state_dict()
    iterator = iter(loader)
    begun = loader.state_dict()
    second = [rows.tolist() for rows in iterator]
    assert len(first) == len(second) == 7
    assert left(finished) == left(again) == (0, [])
    assert left(between) == left(begun) == (1, second)

    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    setter.set_epoch(1)
    assert left(loader.state_dict()) == (1, second[3:])
    other = iter(loader)  # the first is abandoned
    assert left(loader.state_dict()) == (1, second)
    next(other)
    assert left(loader.state_dict()) == (1, second[1:])
    setter.set_epoch(2)
    next(other)  # a batch of the epoch before
    epoch, third = left(loader.state_dict())
    assert epoch == 2
    assert third == [rows.tolist() for rows in loader]
    assert len(third) == 7


def test_a_loaded_state_is_kept_until_it_is_used() -> None:
    first = a_loader(Table())
    next(iter(first))
    second = a_loader(Table())
    second.load_state_dict(first.state_dict())
    second.set_epoch(0)
    iter(second)  # Lightning calls it before it sets the epoch
    assert second.state_dict()["delivered"] == 1
    assert len(list(second)) == 6
    assert len(list(second)) == 7
    second.load_state_dict(first.state_dict())
    second.set_epoch(1)
    assert second.state_dict()["delivered"] == 0


def test_a_loaded_state_says_nothing_about_other_epochs() -> None:
    first = a_loader(Table())
    iterator = iter(first)
    next(iterator)
    second = a_loader(Table())
    second.load_state_dict(first.state_dict())
    second.set_epoch(1)
    assert len(list(second)) == 7
    second.set_epoch(0)
    assert len(list(second)) == 7


def test_second_loop_over_a_loader_is_the_first_again() -> None:
    x = np.random.default_rng(0).standard_normal((40, 4), dtype=np.float32)
    sampler = ClusterBatchSampler(40, 8, cluster_size=4, refresh_every=2)
    loader = ClusterDataLoader(range(40), sampler, refresh=lambda planner: planner.refresh(x))
    runs = []
    for _ in range(2):
        batches = []
        for epoch in range(3):
            loader.set_epoch(epoch)
            batches += [batch.tolist() for batch in loader]
        runs.append((batches, sampler.refreshes))
    assert runs[0] == runs[1]
    assert sampler.refreshes == 1


def test_without_refresh_the_caller_refreshes() -> None:
    sampler = ClusterBatchSampler(ROWS, BATCH, cluster_size=4, start_epoch=0)
    loader = ClusterDataLoader(range(ROWS), sampler, collate_fn=list)
    with pytest.warns(UserWarning, match="epoch 0 of this ClusterBatchSampler is random"):
        list(loader)
    assert sampler.refreshes == 0


def test_what_trainers_look_for() -> None:
    loader = a_loader(Table())
    assert loader.batch_sampler.batch_size == BATCH
    assert loader.batch_sampler.drop_last is False
    loader.batch_sampler.sampler.set_epoch(5)  # as Lightning does
    assert loader.epoch == 5


def test_lengths_choose_the_chunks() -> None:
    chunks: list[list[int]] = []
    table = Table(10)

    def encode(rows: Any) -> torch.Tensor:
        chunks.append(rows.tolist())
        return table(rows)

    sampler = ClusterBatchSampler(10, 4, cluster_size=2)
    refresh_sampler(sampler, encode, model=table, chunk_size=12, lengths=[3] * 5 + [6] * 5)
    assert chunks == [[5, 6], [7, 8], [9, 0], [1, 2, 3, 4]]


def test_bad_arguments() -> None:
    sampler = ClusterBatchSampler(ROWS, BATCH, cluster_size=4)
    with pytest.raises(ValueError, match="dataset has 49 items, the sampler 50 rows"):
        ClusterDataLoader(range(49), sampler)

    class Stream(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(50))

    with pytest.raises(TypeError, match=r"dataset is a Stream, .* need one with __len__ and"):
        ClusterDataLoader(Stream(), sampler)
    loader = a_loader(Table())
    with pytest.raises(ValueError, match="state lacks delivered"):
        loader.load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="state has n_rows 50, this sampler has 40"):
        ClusterDataLoader(
            range(40), ClusterBatchSampler(40, BATCH, cluster_size=4)
        ).load_state_dict(loader.state_dict())
    bad = np.ones((ROWS, 4), np.float32)
    bad[7] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity for row 7"):
        refresh_sampler(sampler, lambda rows: bad[rows], model=Table())
    assert sampler.refreshes == 0


# ---- Several processes -----------------------------------------------------------------------

# Two processes train 20 epochs and write their batches; what they encode differs slightly, as
# it does between devices, and differs with the rank's share.
TWO = textwrap.dedent("""
    import json, os, sys
    from functools import partial
    import numpy as np, torch, torch.distributed as dist
    from ngame.batches import ClusterBatchSampler, NeighbourBatchSampler
    from ngame.adapters.torch import ClusterDataLoader, refresh_sampler

    fails = sys.argv[2:] == ["fails"]
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
    rows, model = 203, torch.nn.Dropout()
    vectors = np.random.default_rng(rank).standard_normal((rows, 4)).astype(np.float32)

    def encode(chunk):
        if fails and rank:
            raise ValueError("out of order")
        return vectors[chunk]

    sampler = ClusterBatchSampler(rows, 8, cluster_size=4, world_size=2, rank=rank)
    loader = ClusterDataLoader(
        range(rows), sampler, collate_fn=list,
        refresh=partial(refresh_sampler, encode=encode, model=model),
    )
    for epoch in range(20):
        loader.set_epoch(epoch)
        seen = list(loader)
        print(json.dumps([epoch, seen]))
        dist.all_reduce(torch.ones(1))
    clusters = sampler.clusters
    other = NeighbourBatchSampler(rows, 8, start_epoch=0, world_size=2, rank=rank)
    refresh_sampler(other, encode, model=model)
    print(json.dumps([
        [clusters.order.tolist(), clusters.offsets.tolist()], other.neighbours.tolist()
    ]))
    dist.destroy_process_group()
""")


def two_processes(folder: Any, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
    command = [sys.executable, "-c", TWO, str(folder / "meeting"), *arguments]
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, "RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        return [
            subprocess.CompletedProcess(command, process.returncode, *output)
            for process in started
            for output in [process.communicate(timeout=120)]
        ]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_two_processes_share_each_epoch_without_waiting_for_ever(tmp_path: Any) -> None:
    done = two_processes(tmp_path)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    first, second = ([json.loads(line) for line in process.stdout.splitlines()] for process in done)
    left_out = []
    for epoch in range(20):
        ours, theirs = first[epoch][1], second[epoch][1]
        assert len(ours) == len(theirs) == 203 // 16
        assert {len(batch) for batch in ours + theirs} == {8}
        seen = sorted(row for batch in ours + theirs for row in batch)
        assert len(set(seen)) == len(seen) == 203 // 16 * 16
        left_out.append(set(range(203)) - set(seen))
    assert not set.intersection(*left_out)  # no row is lost for good
    # Both hold the clusters, or neighbours, of the vectors that they had half of each.
    assert first[20] == second[20]
    vectors = [
        np.random.default_rng(rank).standard_normal((203, 4)).astype(np.float32) for rank in (0, 1)
    ]
    whole = np.concatenate([vectors[0][:101], vectors[1][101:]])
    clusters = Clusters(*map(np.array, first[20][0]))
    assert clusters.coherence(whole) > 0.95 * balanced_clusters(whole, size=4).coherence(whole)
    sampler = NeighbourBatchSampler(203, 8, start_epoch=0, world_size=2)
    sampler.refresh(whole)
    assert sampler.neighbours is not None
    assert first[20][1] == sampler.neighbours.tolist()


def test_a_process_that_fails_ends_the_others(tmp_path: Any) -> None:
    done = two_processes(tmp_path, "fails")
    assert all(process.returncode for process in done)
    assert "ValueError: out of order" in done[1].stderr


def test_refresh_from_tensors_of_training() -> None:
    """With a gradient, in bfloat16, or ids."""
    x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    clusters = ClusterBatchSampler(ROWS, BATCH, cluster_size=4, start_epoch=0)
    clusters.refresh(x.float().numpy())
    expected = clusters.plan()
    clusters.refreshes = 0
    clusters.refresh(x.requires_grad_())
    assert [batch.tolist() for batch in clusters.plan()] == [batch.tolist() for batch in expected]
    neighbours = NeighbourBatchSampler(ROWS, BATCH, nearest=1, drawn=0)
    neighbours.refresh(torch.arange(ROWS).flip(0)[:, None])
    assert neighbours.neighbours[:, 0].tolist() == [*range(ROWS)][::-1]


# ---- States ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clusters", "neighbours", "groups"])
@pytest.mark.parametrize("refreshed", [False, True])
@pytest.mark.filterwarnings("ignore:epoch 3 of this")  # is random without a refresh
def test_plain_torch_load_reads_a_state(kind: str, refreshed: bool, tmp_path: Any) -> None:
    def make() -> Any:
        if kind == "clusters":
            return ClusterBatchSampler(ROWS, BATCH, cluster_size=4)
        if kind == "neighbours":
            return NeighbourBatchSampler(ROWS, BATCH, nearest=2, drawn=2)
        return GroupBatchSampler(np.arange(ROWS) % 3, BATCH)

    sampler = make()
    sampler.set_epoch(3)
    if refreshed and kind != "groups":
        sampler.refresh(np.random.default_rng(0).standard_normal((ROWS, 4), dtype=np.float32))
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    for state in (
        torch.load(tmp_path / "state.pt"),
        {name: np.asarray(value) for name, value in torch.load(tmp_path / "state.pt").items()},
    ):
        resumed = make()
        resumed.load_state_dict(state)
        assert list(resumed) == list(sampler)
        assert resumed.epoch == 3

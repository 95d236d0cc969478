"""What the training loops share: batches, updates, checkpoints and the log."""

import ctypes
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from ngame.batches import ClusterBatchSampler
from ngame.batches.timer import RefreshTimer
from ngame.config import StageConfig
from ngame.encoders.bank import EmbeddingBank
from ngame.encoders.vectors import Vectors
from ngame.files import reading
from ngame.loss import CooIndex, decoupled_softmax, triplet
from ngame.progress import LINE_SECONDS, no_bar, say
from ngame.state import from_tensors, take_prefix, to_tensors, with_prefixes
from ngame.training.optimizer import Optimizer, ParameterGroup
from ngame.training.run import Run
from ngame.training.shards import gathered, parts


class _Loss(Protocol):
    def __call__(
        self, scores: torch.Tensor, known: CooIndex, targets: CooIndex
    ) -> torch.Tensor: ...


class Stage:
    """One stage of training: its batches, updates, checkpoints and log entries.

    A loop over `epochs` and `batches` computes the losses. These two generators alone keep the
    position in the run, `epoch` and `batch`, and save checkpoints.

    Attributes
    ----------
    bank : the vectors to cluster, if they come from training; part of the checkpoint
    last_refresh : the last epoch that starts with a refresh of the batches; -1 if none does
    score_every : epochs from one scoring to the next; the last epoch is always scored
    neighbour_share : NN10 of the clusters in use (`Clusters.neighbour_share`), by the vectors they
        were made from; None if no epoch that uses them is scored
    """

    def __init__(
        self,
        run: Run,
        name: str,
        number: int,
        config: StageConfig,
        groups: Mapping[str, ParameterGroup],
    ) -> None:
        self.run, self.name, self.number, self.config = run, name, number, config
        self.modules = {key: group.module for key, group in groups.items()}
        # Of modules that the ranks share: their rows on all ranks.
        self._rows = {key: group.rows for key, group in groups.items() if group.rows}
        rows = len(run.points.tokens)
        self.sampler = ClusterBatchSampler(
            rows,
            min(config.batch_size, rows),
            schedule={epoch: min(size, rows) for epoch, size in config.sizes().items()},
            refresh_every=config.refresh_every,
            random_share=config.random_share,
            seed=int(self.seeds().generate_state(1)[0]),
            threads=run.config.threads,
        )
        per_epoch = math.ceil(len(self.sampler) / config.accumulate)
        updates = config.epochs * per_epoch
        self.optimizer = Optimizer(groups.values(), config, updates, run.ranks)
        self.loss: _Loss = (
            partial(decoupled_softmax, temperature=config.temperature)
            if config.loss == "softmax"
            else partial(triplet, margin=config.margin, negatives=config.negatives)
        )
        self.bank: EmbeddingBank | None = None
        self.last_refresh = self.sampler.last_refresh(config.epochs)
        self.neighbour_share: float | None = None
        self.score_every = 1
        self.epoch = self.batch = 0
        self.total_loss = torch.zeros((), dtype=torch.float64, device=run.device)
        self.best = -math.inf
        self.best_weights: dict[str, torch.Tensor] = {}
        self.timer = RefreshTimer()
        self._trained = self._said = self._measuring = 0.0

    def seeds(self, *batch: int) -> np.random.SeedSequence:
        """The seeds of a batch of the current epoch; without a batch, those of the stage."""
        position = (self.epoch, *batch) if batch else ()
        return np.random.SeedSequence(self.run.config.seed, spawn_key=(self.number, *position))

    def restore(self, saved: tuple[dict[str, Any], dict[str, torch.Tensor]] | None) -> None:
        """Continue from a checkpoint, if it belongs to this stage."""
        if saved is None or saved[0]["stage"] != self.name:
            return
        assert self.run.checkpoint.path is not None
        with reading(self.run.checkpoint.path):
            self._restore(*saved)

    def _restore(self, meta: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.epoch, self.batch, self.best = meta["epoch"], meta["batch"], meta["best"]
        self.neighbour_share = meta.get("neighbour_share")
        self.run.log = meta["log"]
        ranks = self.run.ranks
        if meta.get("ranks", 1) != ranks.size:
            warnings.warn(
                f"the run was stopped with {meta.get('ranks', 1)} processes and goes on with "
                f"{ranks.size}: the batches are the same, the last digits may differ",
                stacklevel=6,
            )
        for name, module in self.modules.items():
            module.load_state_dict(self._own(take_prefix(tensors, f"{name}."), name))
        self.optimizer.load(take_prefix(tensors, "optimizer."), meta["updates"])
        self.sampler.load_state_dict(from_tensors(take_prefix(tensors, "sampler.")))
        losses = tensors["total_loss"].reshape(-1).to(self.run.device)
        if len(losses) == ranks.size:
            self.total_loss = losses[ranks.rank].clone()
        else:
            self.total_loss = losses.sum() * (ranks.rank == 0)
        best = take_prefix(tensors, "best.")
        self.best_weights = with_prefixes(
            **{name: self._own(take_prefix(best, f"{name}."), name) for name in self.modules}
        )
        bank = take_prefix(tensors, "bank.")
        if self.bank is not None and bank:
            own = ranks.share(len(self.run.points.tokens))
            self.bank.load_state_dict({name: value[own] for name, value in bank.items()})

    def _own(self, tensors: Mapping[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
        """A module's state on this rank, from that on all."""
        if module not in self._rows:
            return parts(tensors, like=self.modules[module].state_dict())
        share = self.run.ranks.share(self._rows[module])
        return {name: value[share].clone() for name, value in tensors.items()}

    def _whole(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state on all ranks, from those of each; on rank 0."""
        ranks = self.run.ranks
        whole = gathered(tensors, ranks)
        for name, value in tensors.items():
            rows = self._rows.get(name.partition(".")[0])
            if rows is not None:
                whole[name] = ranks.gather(value, ranks.counts(rows))  # type: ignore[assignment]
        return whole

    def epochs(self) -> Iterator[int]:
        """The remaining epochs. At the end the modules get the weights to keep.

        The loop must call `end_epoch` in each.
        """
        if self.run.ranks.size > 1:
            self.run.stop.hold()  # a rank that stops to save needs the others
        self.run.stage = self
        total = self.config.epochs * len(self.sampler)
        shown = no_bar() if self.run.ranks.rank == 0 else True
        self._said = time.monotonic()
        with tqdm(total=total, desc=self.name, disable=shown, unit="batch") as self.bar:
            self.bar.update(self.epoch * len(self.sampler) + self.batch)
            while self.epoch < self.config.epochs:
                self.sampler.set_epoch(self.epoch)
                self.timer.start_epoch()
                self._measuring = 0.0
                yield self.epoch
                self.epoch, self.batch = self.epoch + 1, 0
                self.total_loss.zero_()
                self.run.stop.release()
                if self.epoch == self.config.epochs or self._save_is_due():
                    self.save()
        self.run.stop.end()
        self.run.stage = None
        if self.best_weights:
            for name, module in self.modules.items():
                module.load_state_dict(take_prefix(self.best_weights, f"{name}."))
        _give_back_memory()

    def refresh(self, embeddings: Callable[[], Vectors]) -> None:
        """Cluster the embeddings of the points if a refresh is due, and time it.

        Measuring the clusters may take as long as making them, so that is done, and timed apart,
        only if the held-out points are scored before the next refresh.
        """
        if not self.sampler.due(self.epoch):
            return
        with self.timer:
            vectors = embeddings()
            self.run.stop.hold()
            self.sampler.refresh(vectors, group=self.run.ranks.group)
        started = time.monotonic()
        epochs = range(self.epoch, self.config.epochs)
        using = takewhile(lambda epoch: not self.sampler.due(epoch), epochs)
        clusters, self.neighbour_share = self.sampler.clusters, None
        if clusters is not None and self.sampler.n_rows > 1 and any(map(self._scores, using)):
            self.neighbour_share = clusters.neighbour_share(
                vectors,
                seed=self.run.config.seed,
                threads=self.run.config.threads,
                group=self.run.ranks.group,
            )
        self._measuring = time.monotonic() - started
        self.run.stop.release()

    def batches(self) -> Iterator[npt.NDArray[np.int64]]:
        """The rows of each remaining batch of the epoch, the number of which is `batch`.

        Every rank gets all rows, and trains on its share of them. Each batch is seeded by its
        position in the run, so a resumed run draws the same numbers.
        The loop must call `step` for each.
        """
        plan = self.sampler.plan()
        while self.batch < len(plan):
            seeds = self.seeds(self.batch)
            rank = self.run.ranks.rank
            seed = int(seeds.generate_state(rank + 1, np.uint64)[rank] >> 1)
            if self.run.device.type == "cpu":
                # torch.manual_seed would take a millisecond to note it for GPUs, too.
                torch.default_generator.manual_seed(seed)
            else:
                torch.manual_seed(seed)
            self.run.stop.hold()
            yield plan[self.batch]
            self.batch += 1
            self._show_progress()
            # Only just after an update: a checkpoint holds no gradients. `epochs` saves at the end.
            if self.batch % self.config.accumulate == 0 and self.batch < len(plan):
                self.run.stop.release()
                if self._save_is_due():
                    self.save()
        self.run.stop.release()
        self._trained = time.monotonic()

    def _save_is_due(self) -> bool:
        """Whether to save a checkpoint, by the clock of rank 0."""
        ranks = self.run.ranks
        return ranks.most(ranks.rank == 0 and self.run.checkpoint.due()) > 0

    def step(self, loss: torch.Tensor, weight: float) -> None:
        """Add one batch's gradient; update after every `accumulate` batches and after the last.

        `weight` is the share of the batch's rows that the loss is of.
        """
        loss = loss * weight
        size, n_batches = self.config.accumulate, len(self.sampler)
        first = self.batch - self.batch % size  # of the batches that share an update
        last = min(first + size, n_batches) - 1
        (loss / (last - first + 1)).backward()  # type: ignore[no-untyped-call]
        self.total_loss += loss.detach()
        if self.batch == last:
            self.optimizer.step()

    def _show_progress(self) -> None:
        self.bar.update()
        if not self.bar.disable:
            if self.bar.n % 20 == 0:
                self.bar.set_postfix_str(self._status(self._loss_so_far(), self.run.log))
            return
        batches = len(self.sampler)  # after the last one comes the epoch's own line
        due = time.monotonic() - self._said >= LINE_SECONDS and self.batch < batches
        if due and self.run.ranks.rank == 0:
            self._said = time.monotonic()
            status = self._status(self._loss_so_far(), [])
            say(f"{self.name}: {status}, batch {self.batch} of {batches}")

    def _loss_so_far(self) -> float:
        return self.run.ranks.size * self.total_loss.item() / self.batch

    def _status(self, loss: float, log: Sequence[Mapping[str, Any]]) -> str:
        status = f"epoch {self.epoch + 1}/{self.config.epochs}, loss {loss:.4f}"
        entries = [entry for entry in log if entry["stage"] == self.name]
        if scored := [entry for entry in entries if entry["P@1"] is not None]:
            recall, best = scored[-1]["hard_negative_recall"], scored[-1]["P@1"]
            status += f", hard-negative recall {recall:.3f}, held-out P@1 {100 * best:.2f}"
        if entries:
            status += f", refresh {100 * entries[-1]['refresh_share']:.1f} % of the time"
        return status

    @property
    def scores_epoch(self) -> bool:
        """Whether the held-out points are scored at the end of this epoch."""
        return self._scores(self.epoch)

    def _scores(self, epoch: int) -> bool:
        return (self.config.epochs - 1 - epoch) % self.score_every == 0

    def end_epoch(self, measured: Mapping[str, float] | None) -> None:
        """Log the epoch, with what was measured, and keep its weights if they are the best so far.

        Where there is no terminal for the bar, as in a log file, say it in a line.
        """
        self.run.stop.hold()  # until `epochs` goes on to the next one
        cluster_size = self.sampler.cluster_size_at(self.epoch)
        measuring = self._measuring + time.monotonic() - self._trained
        self.run.log.append(
            {
                "stage": self.name,
                "epoch": self.epoch,
                "cluster_size": cluster_size,
                "loss": self.run.ranks.sum(self.total_loss.clone()).item() / len(self.sampler),
                **(measured or {"P@1": None, "hard_negative_recall": None}),
                "neighbour_share": self.neighbour_share if cluster_size > 1 else None,
                "refresh_share": round(self.timer.share, 4),
                "measure_seconds": round(measuring, 2),
                "seconds": round(self.timer.seconds, 2),
            }
        )
        self.run.write_log()
        if self.bar.disable and self.run.ranks.rank == 0:
            # What this epoch was scored at, if it was: the bar shows the last scores there are.
            status = self._status(self.run.log[-1]["loss"], self.run.log[-1:])
            took = f"{self.timer.seconds:.0f} s"
            say(f"{self.name}: {status}, {took}")
            self._said = time.monotonic()
        if self.run.config.keep == "best" and measured and measured["P@1"] > self.best:
            self.best = measured["P@1"]
            self.best_weights = {k: v.detach().clone() for k, v in self._weights().items()}

    def save(self) -> None:
        """Save a checkpoint for `restore`: rank 0 gathers what the ranks share, and writes it."""
        ranks = self.run.ranks
        meta = {
            "stage": self.name,
            "epoch": self.epoch,
            "batch": self.batch,
            "updates": self.optimizer.updates,
            "ranks": ranks.size,
            "best": self.best,
            "neighbour_share": self.neighbour_share,
            "log": self.run.log,
        }
        tensors = {
            # Also where the stage does not train it: a resumed run needs its weights.
            **self._whole(with_prefixes(encoder=self.run.encoder.state_dict()) | self._weights()),
            **with_prefixes(
                optimizer=self.optimizer.tensors(),
                sampler=to_tensors(self.sampler.state_dict()),
                best=self._whole(self.best_weights),
            ),
            "total_loss": ranks.all_rows(self.total_loss[None], [1] * ranks.size),
        }
        if self.bank is not None:
            rows = len(self.run.points.tokens)
            for name, value in self.bank.state_dict().items():
                whole = ranks.gather(torch.as_tensor(value), ranks.counts(rows))
                if whole is not None:
                    tensors[f"bank.{name}"] = whole
        if ranks.rank == 0:
            self.run.checkpoint.save(meta, tensors)

    def _weights(self) -> dict[str, torch.Tensor]:
        return with_prefixes(**{name: module.state_dict() for name, module in self.modules.items()})


def _give_back_memory() -> None:
    """Give the system what is free between blocks in use.

    Every step's tensors have other sizes. Over an epoch that leaves over a gigabyte in pieces,
    which glibc by itself keeps for later.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

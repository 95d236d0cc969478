"""What the loops of both stages share: the plan of the batches, updates, checkpoints, the log."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
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
from ngame.loss import CooIndex, decoupled_softmax, triplet
from ngame.state import from_tensors, take_prefix, to_tensors, with_prefixes
from ngame.training.optimizer import Optimizer, ParameterGroup
from ngame.training.run import Run


class _Loss(Protocol):
    def __call__(
        self, scores: torch.Tensor, known: CooIndex, targets: CooIndex
    ) -> torch.Tensor: ...


class Stage:
    """What both loops share: the plan of the batches, updates, checkpoints, the log."""

    def __init__(
        self,
        run: Run,
        name: str,
        number: int,
        config: StageConfig,
        modules: Mapping[str, "ParameterGroup"],
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
            seed=int(self.seeds().generate_state(1)[0]),
            threads=run.config.threads,
        )
        per_epoch = math.ceil(len(self.sampler) / config.accumulate)
        self.optimizer = Optimizer(modules.values(), config, config.epochs * per_epoch)
        self.loss: _Loss = (
            partial(decoupled_softmax, temperature=config.temperature)
            if config.loss == "softmax"
            else partial(triplet, margin=config.margin, negatives=config.negatives)
        )
        self.bank: EmbeddingBank | None = None
        self.epoch = self.batch = 0
        self.total_loss = torch.zeros((), dtype=torch.float64, device=run.device)
        self.best = -math.inf
        self.best_weights: dict[str, torch.Tensor] = {}
        self.timer = RefreshTimer()

    def seeds(self, *batch: int) -> np.random.SeedSequence:
        """Seeds of a batch of the current epoch; of the stage as a whole without one."""
        place = (self.epoch, *batch) if batch else ()
        return np.random.SeedSequence(self.run.config.seed, spawn_key=(self.number, *place))

    def restore(self, saved: tuple[dict[str, Any], dict[str, torch.Tensor]] | None) -> None:
        """Go on from a checkpoint, if it is one of this stage."""
        if saved is None or saved[0]["stage"] != self.name:
            return
        meta, tensors = saved
        self.epoch, self.batch, self.best = meta["epoch"], meta["batch"], meta["best"]
        self.run.log = meta["log"]
        for name, module in self.modules.items():
            module.load_state_dict(take_prefix(tensors, f"{name}."))
        self.optimizer.load(take_prefix(tensors, "optimizer."), meta["updates"])
        self.sampler.load_state_dict(from_tensors(take_prefix(tensors, "sampler.")))
        self.total_loss = tensors["total_loss"].to(self.run.device)
        self.best_weights = take_prefix(tensors, "best.")
        if self.bank is not None:
            self.bank.load_state_dict(take_prefix(tensors, "bank."))

    def epochs(self) -> Iterator[int]:
        """Epochs still to do; a bar over their batches is drawn on a terminal."""
        total = self.config.epochs * len(self.sampler)
        with tqdm(total=total, desc=self.name, disable=None, unit="batch") as self.bar:
            self.bar.update(self.epoch * len(self.sampler) + self.batch)
            while self.epoch < self.config.epochs:
                self.sampler.set_epoch(self.epoch)
                self.timer.start_epoch()
                yield self.epoch
        if self.best_weights:
            for name, module in self.modules.items():
                module.load_state_dict(take_prefix(self.best_weights, f"{name}."))

    def refresh(self, embeddings: Callable[[], Vectors]) -> None:
        """Cluster the embeddings of the points if that is due, and time it."""
        if self.sampler.due(self.epoch):
            with self.timer:
                self.sampler.refresh(embeddings())

    def batches(self) -> Iterator[tuple[npt.NDArray[np.int64], np.random.Generator]]:
        """Rows of each batch still to do, and the generator of its random choices.

        Every batch seeds its own choices from its place in the run: so nothing has to be known of
        the batches before it when a run goes on.
        """
        plan = self.sampler.plan()
        for batch in range(self.batch, len(plan)):
            seeds = self.seeds(batch)
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
            status += f", refresh {100 * log[-1]['refresh_share']:.1f} % of the time"
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
                "refresh_share": round(self.timer.share, 4),
                "seconds": round(self.timer.seconds, 2),
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
            **with_prefixes(encoder=self.run.encoder.state_dict()),
            **self._weights(),
            **with_prefixes(
                optimizer=self.optimizer.tensors(),
                sampler=to_tensors(self.sampler.state_dict()),
                best=self.best_weights,
            ),
            "total_loss": self.total_loss,
        }
        if self.bank is not None:
            bank = self.bank.state_dict()
            tensors |= {f"bank.{name}": torch.as_tensor(value) for name, value in bank.items()}
        self.run.checkpoint.save(meta, tensors)

    def _weights(self) -> dict[str, torch.Tensor]:
        return with_prefixes(**{name: module.state_dict() for name, module in self.modules.items()})

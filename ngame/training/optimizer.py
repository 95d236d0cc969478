"""The optimizer of a stage: dense and sparse parameters on one schedule."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ngame.config import StageConfig
from ngame.state import take_prefix, with_prefixes
from ngame.training.checkpoint import load_optimizer, optimizer_tensors


class ParameterGroup(NamedTuple):
    """A module to train, and the learning rates of its parameters."""

    module: torch.nn.Module
    dense: float
    sparse: float


class Optimizer:
    """AdamW, and SparseAdam where gradients are sparse, on one schedule."""

    def __init__(
        self,
        modules: Iterable[ParameterGroup],
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
            clip(self._parameters, self._clip)
        rise = (self.updates + 1) / self._warmup
        fall = (self._all_updates - self.updates) / max(1, self._all_updates - self._warmup)
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * min(1.0, rise, fall)
            optimizer.step()
            optimizer.zero_grad()
        self.updates += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        return with_prefixes(**{k: optimizer_tensors(o) for k, o in self._optimizers.items()})

    def load(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        for name, optimizer in self._optimizers.items():
            load_optimizer(optimizer, take_prefix(tensors, f"{name}."))
        self.updates = updates


def clip(parameters: Sequence[torch.nn.Parameter], limit: float) -> None:
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

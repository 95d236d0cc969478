"""The optimizer of a stage, for parameters with dense and with sparse gradients."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ngame.config import StageConfig
from ngame.state import take_prefix, with_prefixes
from ngame.training.checkpoint import load_optimizer, optimizer_tensors


class ParameterGroup(NamedTuple):
    """A module to train, and the learning rates of its parameters."""

    module: torch.nn.Module
    dense_rate: float
    """For parameters with dense gradients."""
    sparse_rate: float
    """For parameters with sparse gradients."""


class Optimizer:
    """AdamW for dense gradients and SparseAdam for sparse ones, with clipping and a schedule.

    Learning rates rise linearly over the warm-up, then fall linearly to 0.

    Parameters
    ----------
    groups : the modules to train
    config : weight decay, clipping and warm-up
    updates : number of updates in the whole stage
    """

    def __init__(self, groups: Iterable[ParameterGroup], config: StageConfig, updates: int) -> None:
        dense: list[dict[str, Any]] = []
        sparse: list[dict[str, Any]] = []
        self._parameters: list[torch.nn.Parameter] = []
        for module, dense_rate, sparse_rate in groups:
            sparse_ids = {
                id(part.weight) for part in module.modules() if getattr(part, "sparse", False)
            }
            trained = [p for p in module.parameters() if p.requires_grad]
            self._parameters += trained
            for groups_of_kind, is_sparse, rate in (
                (dense, False, dense_rate),
                (sparse, True, sparse_rate),
            ):
                chosen = [p for p in trained if (id(p) in sparse_ids) is is_sparse]
                if chosen:
                    groups_of_kind.append({"params": chosen, "lr": rate, "peak_lr": rate})
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        if dense:
            # On a GPU one launch for all parameters. Elsewhere as PyTorch chooses.
            fused = all(p.is_cuda for group in dense for p in group["params"]) or None
            self._optimizers["dense"] = torch.optim.AdamW(
                dense, weight_decay=config.weight_decay, fused=fused
            )
        if sparse:
            self._optimizers["sparse"] = torch.optim.SparseAdam(sparse)
        self._clip = config.clip
        self._warmup = max(1, round(config.warmup * updates))
        self._total_updates = max(1, updates)
        self.updates = 0

    @property
    def share(self) -> float:
        """The share of the highest learning rates that the next update has."""
        rise = (self.updates + 1) / self._warmup
        fall = (self._total_updates - self.updates) / max(1, self._total_updates - self._warmup)
        return min(1.0, rise, fall)

    def step(self) -> None:
        """Update the parameters from their gradients, and clear the gradients."""
        if self._clip:
            clip(self._parameters, self._clip)
        share = self.share
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
            optimizer.step()
            optimizer.zero_grad()
        self.updates += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state to save in a checkpoint, beside `updates`."""
        return with_prefixes(**{k: optimizer_tensors(o) for k, o in self._optimizers.items()})

    def load(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Restore the state that `tensors` returned after that many updates."""
        for name, optimizer in self._optimizers.items():
            load_optimizer(optimizer, take_prefix(tensors, f"{name}."))
        self.updates = updates


def clip(parameters: Sequence[torch.nn.Parameter], limit: float) -> None:
    """Scale all gradients, dense and sparse, so that their joint norm is at most `limit`."""
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
    # All at once: a launch for each parameter takes longer than its work.
    norm = torch.stack(torch._foreach_norm(values)).norm()
    torch._foreach_mul_(values, (limit / (norm + 1e-6)).clamp(max=1.0))

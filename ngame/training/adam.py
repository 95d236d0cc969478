"""Adam for dense and for sparse gradients, by PyTorch's functions and the core.

PyTorch's optimizer objects import its compiler, which takes two to three seconds, as long as small
data trains. The functions under them do not.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim._functional import sparse_adam
from torch.optim.adamw import adamw

from ngame import _core

FIRST, SECOND = 0.9, 0.999
EPS = 1e-8

Gradients = Mapping[torch.nn.Parameter, torch.Tensor]


class Adam(ABC):
    """The parameters, and the state of each from its first update.

    Parameters
    ----------
    groups : each has parameters, `params`, and their learning rate, `lr`, which may change
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.groups = groups
        self.parameters: list[torch.nn.Parameter] = [p for g in groups for p in g["params"]]
        self.state: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        for group in self.groups:
            gradients = {p: p.grad for p in group["params"] if p.grad is not None}
            for p in gradients:
                if p not in self.state:
                    zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": self._no_steps(p), **zeros}
            self._update(gradients, group["lr"])

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.parameters:
            p.grad = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state, by number of parameter and name."""
        return {
            f"{number}.{name}": value
            for number, p in enumerate(self.parameters)
            for name, value in self.state.get(p, {}).items()
        }

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the state that `tensors` returned."""
        self.state = {}
        for key, value in tensors.items():
            number, name = key.split(".", 1)
            p = self.parameters[int(number)]
            like = self._no_steps(p) if name == "step" else p
            # A copy, for the tensors may be those of a mapped file.
            self.state.setdefault(p, {})[name] = value.to(like.device, like.dtype, copy=True)

    @abstractmethod
    def _update(self, gradients: Gradients, rate: float) -> None:
        """Update these parameters, which all have a state."""

    def _no_steps(self, p: torch.nn.Parameter) -> torch.Tensor:
        """The number of updates of a parameter before the first one."""
        return torch.zeros(())


class AdamW(Adam):
    """For dense gradients, with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    def __init__(self, groups: Sequence[dict[str, Any]], weight_decay: float) -> None:
        super().__init__(groups)
        self._weight_decay = weight_decay
        # On a GPU one launch for all parameters. Elsewhere as PyTorch chooses.
        self._fused = all(p.is_cuda for p in self.parameters) or None

    def _update(self, gradients: Gradients, rate: float) -> None:
        states = [self.state[p] for p in gradients]
        adamw(
            list(gradients),
            list(gradients.values()),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=self._fused,
            amsgrad=False,
            beta1=FIRST,
            beta2=SECOND,
            lr=rate,
            weight_decay=self._weight_decay,
            eps=EPS,
            maximize=False,
        )

    def _no_steps(self, p: torch.nn.Parameter) -> torch.Tensor:
        # The fused kernel counts on the device.
        return torch.zeros((), device=p.device if self._fused else "cpu")


class SparseAdam(Adam):
    """For sparse gradients: only the rows of a batch, and their moments, change.

    A table of float32 rows on the CPU is updated in one pass in the core.
    """

    def _update(self, gradients: Gradients, rate: float) -> None:
        for p, gradient in gradients.items():
            state = self.state[p]
            state["step"] += 1
            n = int(state["step"])
            if not _in_core(p):
                sparse_adam(
                    [p],
                    [gradient],
                    [state["exp_avg"]],
                    [state["exp_avg_sq"]],
                    [n],
                    eps=EPS,
                    beta1=FIRST,
                    beta2=SECOND,
                    lr=rate,
                    maximize=False,
                )
                continue
            rows = gradient.coalesce()
            _core.adam_rows(
                p.numpy(),
                state["exp_avg"].numpy(),
                state["exp_avg_sq"].numpy(),
                rows.indices()[0].numpy(),
                rows.values().contiguous().numpy(),
                FIRST,
                SECOND,
                rate * math.sqrt(1 - SECOND**n) / (1 - FIRST**n),
                EPS,
                torch.get_num_threads(),
            )
            torch.autograd.graph.increment_version(p)


def _in_core(p: torch.nn.Parameter) -> bool:
    """Whether the core updates this parameter."""
    return (p.device.type, p.dtype, p.dim()) == ("cpu", torch.float32, 2) and p.is_contiguous()

"""The optimizer of a stage, for parameters with dense and with sparse gradients."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from ngame.config import StageConfig
from ngame.ranks import Ranks
from ngame.state import take_prefix, with_prefixes
from ngame.training.adam import Adam, AdamW, SparseAdam
from ngame.training.shards import gathered, is_sharded, parts


class ParameterGroup(NamedTuple):
    """A module to train, and the learning rates of its parameters."""

    module: torch.nn.Module
    dense_rate: float
    """For parameters with dense gradients."""
    sparse_rate: float
    """For parameters with sparse gradients."""
    rows: int = 0
    """Rows of its one parameter on all ranks, if each rank holds a share; 0 if it holds all."""


class Optimizer:
    """AdamW for dense gradients and SparseAdam for sparse ones, with clipping and a schedule.

    Learning rates rise linearly over the warm-up, then fall linearly to 0.

    Parameters
    ----------
    groups : the modules to train
    config : weight decay, clipping and warm-up
    updates : number of updates in the whole stage
    ranks : the processes that train together; each has the gradients of its part of the batches
    """

    def __init__(
        self,
        groups: Iterable[ParameterGroup],
        config: StageConfig,
        updates: int,
        ranks: Ranks | None = None,
    ) -> None:
        dense: list[dict[str, Any]] = []
        sparse: list[dict[str, Any]] = []
        self._parameters: list[torch.nn.Parameter] = []
        self._ranks = Ranks() if ranks is None else ranks
        # Of parameters that the ranks share: their rows on all ranks.
        self._rows: dict[int, int] = {}
        for module, dense_rate, sparse_rate, rows in groups:
            sparse_ids = {
                id(part.weight) for part in module.modules() if getattr(part, "sparse", False)
            }
            trained = [p for p in module.parameters() if p.requires_grad]
            self._parameters += trained
            if rows and self._ranks.size > 1:
                self._rows |= {id(p): rows for p in trained}
            for groups_of_kind, is_sparse, rate in (
                (dense, False, dense_rate),
                (sparse, True, sparse_rate),
            ):
                chosen = [p for p in trained if (id(p) in sparse_ids) is is_sparse]
                if chosen:
                    groups_of_kind.append({"params": chosen, "lr": rate, "peak_lr": rate})
        self._optimizers: dict[str, Adam] = {}
        if dense:
            self._optimizers["dense"] = AdamW(dense, config.weight_decay)
        if sparse:
            self._optimizers["sparse"] = SparseAdam(sparse)
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
        whole = self._parameters
        shared: list[torch.nn.Parameter] = []
        if self._ranks.size > 1:
            shared = [p for p in self._parameters if id(p) in self._rows or is_sharded(p)]
            for p in shared:
                if is_sharded(p) and p.grad is not None:
                    p.grad *= self._ranks.size  # of FSDP's mean the sum, as of the others
            of_shared = {id(p) for p in shared}
            whole = [p for p in self._parameters if id(p) not in of_shared]
            sum_gradients(whole, self._ranks)
        if self._clip:
            clip(whole, self._clip, shared, self._ranks)
        share = self.share
        for optimizer in self._optimizers.values():
            for group in optimizer.groups:
                group["lr"] = group["peak_lr"] * share
            optimizer.step()
            optimizer.zero_grad()
        self.updates += 1

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state to save in a checkpoint, beside `updates`: all of it on rank 0."""
        tensors = {k: gathered(o.tensors(), self._ranks) for k, o in self._optimizers.items()}
        for name, optimizer in self._optimizers.items():
            for key, rows in self._shared(optimizer, tensors[name]):
                whole = self._ranks.gather(tensors[name][key], self._ranks.counts(rows))
                if whole is not None:
                    tensors[name][key] = whole
        return with_prefixes(**tensors)

    def load(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Restore the state that `tensors` returned after that many updates."""
        for name, optimizer in self._optimizers.items():
            state = take_prefix(tensors, f"{name}.")
            for key, rows in self._shared(optimizer, state):
                state[key] = state[key][self._ranks.share(rows)].clone()
            like = {key: optimizer.parameters[int(key.partition(".")[0])] for key in state}
            optimizer.load(parts(state, like))
        self.updates = updates

    def _shared(
        self, optimizer: Adam, tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, int]]:
        """Names of those of an optimizer's tensors that the ranks share, and their rows on all."""
        for key, value in tensors.items():
            rows = self._rows.get(id(optimizer.parameters[int(key.partition(".")[0])]), 0)
            if rows and value.dim():
                yield key, rows


def clip(
    parameters: Sequence[torch.nn.Parameter],
    limit: float,
    shared: Sequence[torch.nn.Parameter] = (),
    ranks: Ranks | None = None,
) -> None:
    """Scale all gradients, dense and sparse, so that their joint norm is at most `limit`.

    Of `shared` parameters each of the ranks has rows of its own, which count as well.
    """
    values, others = _gradients(parameters), _gradients(shared)
    if not values and not shared:
        return
    # All at once: a launch for each parameter takes longer than its work.
    norm = torch.stack(torch._foreach_norm([*values, *others])).norm()
    if ranks is not None and shared:
        whole, own = (sum(float(x.norm()) ** 2 for x in part) for part in (values, others))
        square = ranks.sum(torch.tensor(own, dtype=torch.float64)) + whole
        norm = square.sqrt().to(norm)
    torch._foreach_mul_([*values, *others], (limit / (norm + 1e-6)).clamp(max=1.0))


def _gradients(parameters: Sequence[torch.nn.Parameter]) -> list[torch.Tensor]:
    """The values of the gradients, sparse ones with each row once."""
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad._values())
        elif is_sharded(parameter):
            values.append(cast(Any, parameter.grad).to_local())
        else:
            values.append(parameter.grad)
    return values


def sum_gradients(parameters: Sequence[torch.nn.Parameter], ranks: Ranks) -> None:
    """Give all ranks the sum of their gradients, the same bits on each.

    Of sparse gradients only the rows that some rank touched are sent. A parameter that no rank has
    a gradient of still has none.
    """
    # Of every gradient the ranks must know whether any has it, and how many rows it touches.
    about = torch.zeros(len(parameters), 2, dtype=torch.int64)
    for place, p in enumerate(parameters):
        if p.grad is None:
            continue
        about[place, 0] = 1
        if p.grad.is_sparse:
            p.grad = p.grad.coalesce()
            about[place] = torch.tensor([2, p.grad._nnz()])
    of_ranks = ranks.all_rows(about[None], [1] * ranks.size)
    kinds, touched = of_ranks[..., 0].amax(dim=0).tolist(), of_ranks[..., 1].T.tolist()
    dense = [p for p, kind in zip(parameters, kinds, strict=True) if kind == 1]
    if dense:
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in dense]
        flat = ranks.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        parts = torch.split(flat, [p.numel() for p in dense])
        for parameter, part in zip(dense, parts, strict=True):
            parameter.grad = part.view_as(parameter)
    for parameter, kind, counts in zip(parameters, kinds, touched, strict=True):
        if kind == 2:
            _sum_sparse(parameter, ranks, counts)


def _sum_sparse(parameter: torch.nn.Parameter, ranks: Ranks, counts: list[int]) -> None:
    """`sum_gradients` of a parameter with a sparse gradient, of `counts` rows on each rank."""
    rows = torch.zeros(0, dtype=torch.int64, device=parameter.device)
    values = parameter.new_zeros(0, *parameter.shape[1:])
    if parameter.grad is not None:
        rows, values = parameter.grad._indices()[0], parameter.grad._values()
    rows, values = ranks.all_rows(rows, counts), ranks.all_rows(values, counts)
    # One pass, which adds up each row's gradients rank by rank: the same bits on all of them.
    ascending, order = torch.sort(rows, stable=True)
    touched, times = torch.unique_consecutive(ascending, return_counts=True)
    bags = F.pad(times.cumsum(0), (1, 0))
    total = F.embedding_bag(order, values, bags, mode="sum", include_last_offset=True)
    parameter.grad = torch.sparse_coo_tensor(
        touched[None], total, parameter.shape, is_coalesced=True, check_invariants=False
    )

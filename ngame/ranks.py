"""Several processes, started by torchrun, and what they exchange through torch.distributed."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

# One rank may work alone while the others wait, for example when it writes a checkpoint. A rank
# that died is noticed at once, by its closed connection: this limit is for a machine that is gone.
_PATIENCE = timedelta(hours=1)


class Ranks:
    """This process among those of a group; or alone, as rank 0 of 1.

    Rows are dealt in contiguous shares, in the order of the ranks, whose sizes differ by at most
    one. All methods but `counts` and `share` exchange something, so every rank must call them, in
    the same order. Alone they return at once, with the argument itself where it is the result.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        Such as ``torch.distributed.group.WORLD``. It needs a backend for tensors on the host:
        ``init_process_group("gloo")``, or ``"cpu:gloo,cuda:nccl"``.

    Attributes
    ----------
    group : as given
    rank, size : number of this process, and of all

    Raises
    ------
    ValueError
        The group has no backend for tensors on the host, or this process is not in it. And by the
        methods ConnectionError, if another rank has ended or does not answer within an hour.
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank, self.size = 0, 1
        if group is None:
            return
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("this process is not in the group")
        if "cpu:" not in dist.get_backend_config(group):
            raise ValueError(
                "the group has no backend for tensors on the host: "
                'init_process_group("cpu:gloo,cuda:nccl") makes one'
            )

    @classmethod
    def all(cls) -> "Ranks":
        """All processes if torch.distributed is initialized, else this one alone."""
        together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls(dist.group.WORLD if together else None)

    def counts(self, n: int) -> list[int]:
        """Size of every rank's share of n rows."""
        bounds = [rank * n // self.size for rank in range(self.size + 1)]
        return [end - begin for begin, end in pairwise(bounds)]

    def share(self, n: int) -> slice:
        """This rank's rows among n."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place: the same bits on all."""
        if self.size > 1:
            with _connected():
                dist.all_reduce(x, group=self.group)
        return x

    def sum_counts(self, counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sum over the ranks."""
        return self.sum(torch.from_numpy(counts)).numpy()

    def most(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.size == 1:
            return value
        values = torch.tensor(value)
        with _connected():
            dist.all_reduce(values, dist.ReduceOp.MAX, self.group)
        return int(values)

    def mean(self, value: float, weight: float) -> float:
        """Weighted mean of the ranks' values."""
        if self.size == 1:
            return value
        weighted = value * weight if weight else 0.0
        total, weights = self.sum(torch.tensor([weighted, weight], dtype=torch.float64))
        return float(total / weights) if weights else 0.0

    @contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 runs the block, then the others do."""
        if self.rank:
            self.broadcast(None)
        yield
        if self.rank == 0:
            self.broadcast(None)

    def synchronize(self, module: torch.nn.Module) -> None:
        """Give the module rank 0's parameters and buffers."""
        if self.size > 1:
            first = self._global(0)
            for value in module.state_dict().values():
                with _connected():
                    dist.broadcast(value, first, self.group)

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, of any type that can be pickled."""
        if self.size == 1:
            return value
        values = [value]
        with _connected():
            first = self._global(0)
            dist.broadcast_object_list(values, first, self.group, torch.device("cpu"))
        return values[0]

    def concatenate(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """All ranks' rows, in the order of the ranks, with the gradient.

        Each rank's own rows get the sum of the gradients that they have on all ranks.

        Parameters
        ----------
        x : this rank's rows
        counts : the number of every rank's rows, which all ranks know
        """
        if self.size == 1:
            return x
        found: torch.Tensor = _Concatenate.apply(x, self, counts)  # type: ignore[no-untyped-call]
        return found

    def _global(self, rank: int) -> int:
        """Number among all processes of a rank of the group."""
        return dist.get_global_rank(self.group, rank)

    def all_rows(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """The same without a gradient."""
        if self.size == 1:
            return x
        counts = list(counts)
        if x.is_cuda:
            # Collectives need one shape on all ranks.
            padded = x.new_zeros(max(counts), *x.shape[1:])
            padded[: len(x)] = x
            theirs = [torch.empty_like(padded) for _ in counts]
            with _connected():
                dist.all_gather(theirs, padded, group=self.group)
            return torch.cat([part[:count] for part, count in zip(theirs, counts, strict=True)])
        x = x.detach().contiguous()
        whole = x.new_empty(sum(counts), *x.shape[1:])
        self._message([x] * self.size, torch.split(whole, counts))
        return whole

    def _message(self, sent: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> None:
        """Send a tensor to every rank, and fill those of `found` with what they send to this one.

        Of gloo it takes a quarter of the time of an all_gather, and half that of an all_reduce.
        """
        found[self.rank].copy_(sent[self.rank])
        under_way = []
        with _connected():
            for step in range(1, self.size):
                to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
                if sent[to].numel():
                    under_way.append(dist.isend(sent[to], self._global(to), self.group))
                if found[source].numel():
                    under_way.append(dist.irecv(found[source], self._global(source), self.group))
            for message in cast(list[dist.Work], under_way):
                message.wait()

    def gather(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor | None:
        """All ranks' rows on rank 0, None on the others; rows and `counts` as above."""
        if self.size == 1:
            return x
        first = self._global(0)
        with _connected():
            if self.rank:
                dist.send(x.contiguous(), first, self.group)
                return None
            # Received in place: no rank but this one ever holds more than its share.
            whole = x.new_empty(sum(counts), *x.shape[1:])
            whole[: len(x)] = x
            begin = len(x)
            for rank, count in enumerate(counts[1:], 1):
                source = self._global(rank)
                dist.recv(whole[begin : begin + count], source, self.group)
                begin += count
        return whole

    def exchange(self, parts: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
        """Send an array to every rank, and get one from each.

        Parameters
        ----------
        parts : one array for each rank, in their order
            All of one dtype; of one shape but for their first dimension, on all ranks.
        """
        if self.size == 1:
            return list(parts)
        sent = torch.tensor([len(part) for part in parts])
        received = torch.empty_like(sent)
        with _connected():
            dist.all_to_all_single(received, sent, group=self.group)
        first = parts[0]
        found = [np.empty((rows, *first.shape[1:]), first.dtype) for rows in received.tolist()]
        self.swap(parts, found)
        return found

    def swap(self, parts: Sequence[npt.NDArray[Any]], found: Sequence[npt.NDArray[Any]]) -> None:
        """Send an array to every rank; what they send fills those of `found`, contiguous ones.

        Float32 is sent as float16 if `found` is that.
        """
        if found[0].dtype == np.float16:  # NumPy takes ten times as long as torch
            parts = [torch.from_numpy(part).half().numpy() for part in parts]
        self._message([_bytes(part) for part in parts], [_bytes(room) for room in found])

    def redeal(
        self, x: torch.Tensor, ends: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
    ) -> torch.Tensor:
        """This rank's rows where all rows are dealt anew, in the same order.

        Parameters
        ----------
        x : this rank's rows, of a dtype that NumPy has
        ends, wanted : where each rank's rows end among those of all, as it is and as it will be
        """
        if self.size == 1:
            return x
        begin = int(ends[self.rank]) - len(x)
        cuts = np.clip(np.append(0, wanted) - begin, 0, len(x))
        parts = [x[first:last].cpu().numpy() for first, last in pairwise(cuts.tolist())]
        return torch.from_numpy(np.concatenate(self.exchange(parts))).to(x.device)

    def all_arrays(self, x: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Every rank's array; dtypes and shapes as in `exchange`."""
        if self.size == 1:
            return [x]
        lengths = self.all_rows(torch.tensor([len(x)]), [1] * self.size).tolist()
        row_bytes = x.dtype.itemsize * int(np.prod(x.shape[1:]))
        whole = self.all_rows(_bytes(x), [row_bytes * length for length in lengths]).numpy()
        return np.split(whole.view(x.dtype).reshape(-1, *x.shape[1:]), np.cumsum(lengths[:-1]))


def _bytes(x: npt.NDArray[Any]) -> torch.Tensor:
    """The memory of an array; of a copy, where torch could not use it."""
    return torch.from_numpy(np.require(x, requirements=["C", "W"]).reshape(-1).view(np.uint8))


class _Concatenate(torch.autograd.Function):
    """`Ranks.all_rows` with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, ranks: Ranks, counts: Sequence[int]) -> torch.Tensor:
        ctx.ranks, ctx.counts = ranks, counts
        return ranks.all_rows(x, counts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        whole, ranks, counts = gradients[0].contiguous(), ctx.ranks, list(ctx.counts)
        if whole.is_cuda:
            return torch.split(ranks.sum(whole), counts)[ranks.rank], None, None
        own = whole.new_empty(ranks.size, counts[ranks.rank], *whole.shape[1:])
        ranks._message(torch.split(whole, counts), own)
        return own.sum(dim=0), None, None


@contextmanager
def _connected() -> Iterator[None]:
    """Say plainly that a rank is lost: what torch says of it depends on the backend."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()
        raise ConnectionError(
            f"another rank has ended or does not answer: {reason[0] if reason else 'no reason'}"
        ) from error


@contextmanager
def started() -> Iterator[Ranks]:
    """Within the block, the processes that torchrun started are one group; else this one is alone.

    Each takes the GPU of its local rank, if there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Ranks.all()
    finally:
        dist.destroy_process_group()

"""The batches in a training loop: refreshes on time, several processes, resuming."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from ngame.arrays import refuse_class
from ngame.batches import ClusterBatchSampler
from ngame.batches.base import refuse_rebuild
from ngame.encoders.encode import encode_rows
from ngame.ranks import Ranks
from ngame.state import from_tensors, to_tensors


class RefreshableSampler(Protocol):
    """The batch sampler that the functions here take, such as `ngame.ClusterBatchSampler`."""

    n_rows: int
    batch_size: int
    drop_last: bool
    epoch: int

    @property
    def sampler(self) -> Any: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[list[int]]: ...
    def set_epoch(self, epoch: int) -> None: ...
    def due(self, epoch: int) -> bool: ...
    def refresh(self, source: Any) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def refresh_sampler(
    sampler: RefreshableSampler,
    encode: Callable[[npt.NDArray[np.int64]], Any],
    *,
    model: torch.nn.Module,
    chunk_size: int = 256,
    lengths: npt.ArrayLike | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Encode all rows with the current model, and refresh the sampler with the vectors.

    If torch.distributed is initialized, every rank must call this, and encodes its share of the
    rows. A `ClusterBatchSampler` then clusters them on all ranks together, and no rank has all
    vectors; for another sampler rank 0 gathers them and refreshes its own, and the others take over
    its state. So all ranks plan from identical clusters. The exchange goes through host memory.

    Parameters
    ----------
    sampler : ClusterBatchSampler, or another `RefreshableSampler`
    encode : callable
        ``encode(rows)`` gives the vectors of the rows, a tensor or array of shape [m, d], for an
        int64 array of m row ids. With several processes it must call the bare module, not the
        ``DistributedDataParallel`` around it, whose forward pass waits for all ranks.
    model : torch.nn.Module
        The module that `encode` runs; its mode and the random states are restored.
    chunk_size, lengths : as in `ngame.encode_rows`, `lengths` for all rows
    device : torch.device or str, optional
        Where a single process gathers the vectors: the host, by default, or a GPU if the sampler
        takes vectors there, as `ClusterBatchSampler` does if the GPU core is built.

    Raises
    ------
    ValueError
        As in `ngame.encode_rows` and the sampler's `refresh`.
    ConnectionError
        Another rank has ended, because of an error of its own, say.
    """
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    group = made = None
    if together:
        # Only host memory surely has room, and a backend for GPUs takes no CPU tensors.
        on_host = "cpu:gloo" in dist.get_backend_config()
        group = dist.group.WORLD if on_host else (made := dist.new_group(backend="gloo"))
    ranks = Ranks(group)
    try:
        own = ranks.share(sampler.n_rows)
        rows = np.arange(own.start, own.stop)
        vectors = encode_rows(
            lambda chunk: encode(rows[chunk]),
            len(rows),
            model=model,
            chunk_size=chunk_size,
            lengths=None if lengths is None else np.asarray(lengths)[rows],
            device=None if together else device,
        )
        if not together:
            sampler.refresh(vectors)
        elif isinstance(sampler, ClusterBatchSampler):
            sampler.refresh(vectors, group=group)
        else:
            whole = ranks.gather(torch.as_tensor(vectors), ranks.counts(sampler.n_rows))
            if whole is not None:
                sampler.refresh(whole)
            state = ranks.broadcast(None if whole is None else sampler.state_dict())
            if whole is None:
                sampler.load_state_dict(state)
    finally:
        if made is not None:
            dist.destroy_process_group(made)


def count_rows(dataset: Any, name: str) -> int:
    """The length of a data set whose rows a sampler can choose.

    Raises
    ------
    TypeError
        It is iterable only.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}, which gives its rows in an order of its own: "
            "batches of chosen rows need one with __len__ and __getitem__, such as a list of the "
            "rows or a datasets.Dataset that is not streamed"
        )
    return len(dataset)


class ClusterDataLoader(DataLoader[Any]):
    """A `torch.utils.data.DataLoader` that refreshes its batches when due, and can be resumed.

    For a loop of your own, Lightning, and accelerate. Call `set_epoch` before each epoch (Lightning
    and accelerate do); a refresh that is due comes with the first batch. A checkpoint holds
    `state_dict`, taken at any moment; a loader that loads it continues with the next batch. After
    a finished epoch no batch of it is left until another epoch is set, so loop over
    ``range(loader.epoch, epochs)``. With several processes, which are at the same batch, one saves
    and all load.

    Lightning loads the state only from a checkpoint within an epoch; docs/loops.md has the data
    module that loads it from any. ``Accelerator().prepare(loader)`` builds another loader around
    the same batches: refreshes come as here, but after a restart skipping batches is up to
    ``accelerator.skip_first_batches``, and the sampler's state to
    ``accelerator.register_for_checkpointing(sampler)``.

    Parameters
    ----------
    dataset : torch.utils.data.Dataset
        Has as many items as the sampler has rows.
    sampler : ClusterBatchSampler, or another `RefreshableSampler`
        With several processes, made with `world_size` and `rank`; Lightning then needs
        ``Trainer(use_distributed_sampler=False)``. For accelerate, which deals the batches to the
        processes itself, made without them.
    refresh : callable, optional
        ``refresh(sampler)`` refreshes it: see `refresh_sampler`; or, from an `EmbeddingBank` that
        the loop fills and saves, ``lambda sampler: sampler.refresh(bank.vectors)``. If not given,
        the caller refreshes the sampler.
    **options
        Options of `torch.utils.data.DataLoader` that do not choose rows: `num_workers`,
        `collate_fn`, ... The epoch seeds the workers.

    Attributes
    ----------
    epoch : int
        The epoch that the next iteration is of.

    Raises
    ------
    TypeError
        `dataset` is iterable only: its rows cannot be chosen.
    ValueError
        `dataset` and `sampler` differ in length; or, at the first batch, a sampler made with
        `world_size` is dealt out by accelerate once more; or Lightning rebuilds the batches.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: RefreshableSampler,
        *,
        refresh: Callable[[Any], None] | None = None,
        **options: Any,
    ) -> None:
        refuse_class(sampler, "sampler")
        rows = count_rows(dataset, "dataset")
        if rows != sampler.n_rows:
            raise ValueError(f"dataset has {rows} items, the sampler {sampler.n_rows} rows")
        self._batches = _Batches(sampler, refresh)
        self._place = (0, 0)  # an epoch, and how many of its batches were delivered
        self._resumed = False  # whether the next iteration goes on from there
        # A generator of its own: otherwise every iteration would draw from the global one, and a
        # resumed run would draw once more.
        super().__init__(
            dataset, batch_sampler=self._batches, generator=torch.Generator(), **options
        )

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration is of."""
        return self._batches.planner.epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration plans."""
        self._batches.planner.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches of the current epoch, planned when the first of them is asked for."""
        if not self._resumed:
            self._place = (self.epoch, 0)
        return self._deliver()

    def _deliver(self) -> Iterator[Any]:
        epoch, skipped = self.epoch, self._delivered if self._resumed else 0
        self._resumed = False
        self._batches.skipped = skipped
        self.generator.manual_seed(epoch)
        for delivered, batch in enumerate(super().__iter__(), skipped + 1):
            self._place = (epoch, delivered)
            yield batch

    @property
    def _delivered(self) -> int:
        """Batches of the current epoch that were delivered; trainers may have set it elsewhere."""
        epoch, delivered = self._place
        return delivered if epoch == self.epoch else 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The sampler's state and the number of this epoch's batches delivered.

        All values are tensors, so that a checkpoint needs no pickle.
        """
        state = {**self._batches.planner.state_dict(), "delivered": self._delivered}
        return to_tensors(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`.

        Raises
        ------
        ValueError
            As in the sampler's `load_state_dict`; or `state` lacks the number of batches.
        """
        if "delivered" not in state:
            raise ValueError("state lacks delivered, the number of batches")
        self._batches.planner.load_state_dict(from_tensors(state))
        self._place = (self.epoch, int(state["delivered"]))
        self._resumed = True


class _Batches:
    """The batch sampler of a `ClusterDataLoader`: refreshes on time, and skips what was delivered.

    accelerate builds a new loader around this object, so what every loader needs is done here.
    """

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        refuse_rebuild(arguments)
        return super().__new__(cls)

    def __init__(self, planner: RefreshableSampler, refresh: Callable[[Any], None] | None) -> None:
        self.planner = planner
        self.refresh = refresh
        self.skipped = 0
        self.batch_size = planner.batch_size
        self.drop_last = planner.drop_last

    @property
    def sampler(self) -> Any:
        return self.planner.sampler

    def __len__(self) -> int:
        return len(self.planner)

    def __iter__(self) -> Iterator[list[int]]:
        if self.refresh is not None and self.planner.due(self.planner.epoch):
            self.refresh(self.planner)
        return islice(iter(self.planner), self.skipped, None)

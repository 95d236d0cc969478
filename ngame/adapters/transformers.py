"""NGAME batches in the `Trainer` of transformers 5.23, with accelerate 1.15."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch.utils.data import ConcatDataset, DataLoader
from transformers import TrainerCallback

from ngame.adapters.torch import RefreshableSampler, refresh_sampler
from ngame.encoders.bank import EmbeddingBank
from ngame.files import write_tensors
from ngame.state import from_tensors, take_prefix, to_tensors, with_prefixes


class BatchSamplerMixin:
    """A `Trainer` that takes its training batches from a batch sampler.

    To be named before the trainer among the bases: ``class Mine(BatchSamplerMixin, Trainer)``.
    Batches for evaluation are the trainer's own. `per_device_train_batch_size` should be the
    sampler's batch size, since the trainer reports it.

    Parameters
    ----------
    batch_sampler : ClusterBatchSampler, or another `ngame.adapters.torch.RefreshableSampler`
        Or a `GroupBatchSampler`, which needs no callback, as nothing refreshes it. Made without
        `world_size` and `rank`: the trainer deals the batches to its processes
        itself. Several processes need its `drop_last`; the rows of a round that is not complete
        are left out too, others every epoch.
    *args, **kwargs
        Those of the trainer.

    Raises
    ------
    ValueError
        From `train`: the sampler does not fit the data set or the number of processes.
    """

    accelerator: Any
    args: Any

    def __init__(self, *args: Any, batch_sampler: RefreshableSampler, **kwargs: Any) -> None:
        self._batch_sampler = batch_sampler
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """The trainer's own data loader with the sampler's batches instead."""
        loader = super().get_train_dataloader()  # type: ignore[misc]
        sampler = self._batch_sampler
        if len(loader.dataset) != sampler.n_rows:
            raise ValueError(
                f"the data set has {len(loader.dataset)} rows, the batch sampler {sampler.n_rows}"
            )
        check_processes(sampler, self.accelerator.num_processes, "the batch sampler's drop_last")
        return self.accelerator.prepare(
            DataLoader(
                loader.dataset,
                batch_sampler=sampler,
                collate_fn=loader.collate_fn,
                num_workers=loader.num_workers,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context,
                persistent_workers=loader.persistent_workers,
                prefetch_factor=loader.prefetch_factor,
                pin_memory=loader.pin_memory,
            )
        )


class SamplerCallback(TrainerCallback, ABC):
    """What refreshes, saves and restores the batches; `refresh` is for a subclass to say.

    Of every batch sampler in the data loader for training that can be refreshed: it is refreshed
    at the beginning of each epoch it is due for, and its state is saved in every checkpoint as
    ``ngame.safetensors``, so that a run that is resumed goes on with the batches it would have had.

    Attributes
    ----------
    bank : EmbeddingBank or None
        Where `refresh` takes vectors from a bank: that bank, to be saved and restored too.

    Raises
    ------
    ValueError
        When training begins: its data loader has no batch sampler that can be refreshed; or there
        is a bank and several processes, each of which would fill its own.
    FileNotFoundError
        When training is resumed: the checkpoint in `output_dir` lacks its ``ngame.safetensors``.
    """

    bank: EmbeddingBank | None = None
    _epoch = 0

    @abstractmethod
    def refresh(
        self, sampler: RefreshableSampler, dataset: Any, model: torch.nn.Module, args: Any
    ) -> None:
        """Refresh one sampler with vectors of the rows of its data set."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the batches; take up their state where a run is resumed."""
        loader = kwargs["train_dataloader"]
        samplers = [sampler for sampler, _ in clustered(loader)]
        if not samplers:
            raise ValueError(
                "no batch sampler that can be refreshed is in the data loader for training: is "
                "the trainer's data set the very one that its batches were made for?"
            )
        if self.bank is not None and args.world_size > 1:
            raise ValueError(
                f"there is a bank, and {args.world_size} processes: each would fill its own, with "
                "its rows only. Leave the bank out"
            )
        # As the trainer counts, who tells callbacks no epoch that holds after an epoch cut short.
        steps = math.ceil(len(loader) / args.gradient_accumulation_steps)
        self._epoch = state.global_step // steps
        if state.global_step:
            path = _state_file(args, state)
            if not path.exists():
                raise FileNotFoundError(
                    f"there is no {path}: the checkpoint was not written to its end, or without "
                    "RefreshCallback, or the run is resumed from outside of output_dir"
                )
            tensors = load_file(path)
            for number, sampler in enumerate(samplers):
                sampler.load_state_dict(from_tensors(take_prefix(tensors, f"{number}.")))
            if self.bank is not None:
                self.bank.load_state_dict(from_tensors(take_prefix(tensors, "bank.")))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refresh what is due; the trainer asks for the epoch's first batch after this."""
        for sampler, dataset in clustered(kwargs["train_dataloader"]):
            sampler.set_epoch(self._epoch)
            if sampler.due(self._epoch):
                self.refresh(sampler, dataset, kwargs["model"], args)
        self._epoch += 1

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state of the batches beside the trainer's own."""
        if args.should_save:
            parts = {
                str(number): to_tensors(sampler.state_dict())
                for number, (sampler, _) in enumerate(clustered(kwargs["train_dataloader"]))
            }
            if self.bank is not None:
                parts["bank"] = to_tensors(self.bank.state_dict())
            write_tensors(_state_file(args, state), with_prefixes(**parts))


class RefreshCallback(SamplerCallback):
    """Refresh the training batches at the beginning of each epoch that they are due for.

    The state of the batches is saved in every checkpoint, as `SamplerCallback` says.

    Parameters
    ----------
    encode : callable
        ``encode(rows)`` gives the vectors of rows of the training set by the model as it is now,
        a tensor or array of shape [m, d], for an int64 array of m row ids. It must call the bare
        model, as `ngame.refresh_sampler` says.
    chunk_size, lengths : as `ngame.encode_rows` takes them
    bank : EmbeddingBank, optional
        The one that `encode` reads, if it does not encode but is ``lambda rows:
        bank.vectors[rows]``; the trainer's `compute_loss` fills it.
    """

    def __init__(
        self,
        encode: Callable[[npt.NDArray[np.int64]], Any],
        *,
        chunk_size: int = 256,
        lengths: npt.ArrayLike | None = None,
        bank: EmbeddingBank | None = None,
    ) -> None:
        self.bank = bank
        self._encode = encode
        self._chunk_size = chunk_size
        self._lengths = lengths

    def refresh(
        self, sampler: RefreshableSampler, dataset: Any, model: torch.nn.Module, args: Any
    ) -> None:
        """Refresh one sampler with what `encode` gives."""
        refresh_sampler(
            sampler, self._encode, model=model, chunk_size=self._chunk_size, lengths=self._lengths
        )


def clustered(loader: Any) -> Iterator[tuple[RefreshableSampler, Any]]:
    """The samplers in a trainer's data loader that can be refreshed, each with its data set."""
    batches = loader.batch_sampler
    batches = getattr(batches, "batch_sampler", batches)  # within that of one process of several
    several = isinstance(loader.dataset, ConcatDataset) and hasattr(batches, "batch_samplers")
    samplers = batches.batch_samplers if several else [batches]
    datasets = loader.dataset.datasets if several else [loader.dataset]
    for sampler, dataset in zip(samplers, datasets, strict=True):
        if hasattr(sampler, "refresh") and hasattr(sampler, "due"):
            yield sampler, dataset


def check_processes(sampler: RefreshableSampler, processes: int, option: str) -> None:
    """Refuse batches that accelerate cannot deal evenly; `option` is what to set to True."""
    if sampler.state_dict()["world_size"] != 1:
        raise ValueError(
            "the batch sampler was made with world_size, "
            "but the trainer deals its batches to the processes itself: leave world_size out"
        )
    if processes > 1 and not sampler.drop_last:
        raise ValueError(
            f"{option} is False with {processes} processes, which would then get unequal numbers "
            "of batches and wait for each other for ever: set it to True"
        )


def _state_file(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "ngame.safetensors"

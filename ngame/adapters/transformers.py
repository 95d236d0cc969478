"""NGAME batches in the `Trainer` of transformers 5.23, with accelerate 1.15."""

import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch.utils.data import ConcatDataset, DataLoader
from transformers import TrainerCallback

from ngame.adapters.torch import RefreshableSampler, count_rows, refresh_sampler
from ngame.arrays import refuse_class
from ngame.encoders.bank import EmbeddingBank
from ngame.files import write_tensors
from ngame.state import from_tensors, take_prefix, to_tensors, with_prefixes

_STARTS: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""The state that each sampler and `memory` of a callback had before its first training."""


class BatchSamplerMixin:
    """A `Trainer` that takes its training batches from a batch sampler.

    Name it before the trainer among the bases: ``class Mine(BatchSamplerMixin, Trainer)``. The
    trainer's own batches serve for evaluation. Set `per_device_train_batch_size` to the sampler's
    batch size, since the trainer reports it, and do not set `dataloader_drop_last`; a warning says
    if either differs. `auto_find_batch_size` cannot make the batches smaller.

    Parameters
    ----------
    batch_sampler : ClusterBatchSampler, or another `ngame.adapters.torch.RefreshableSampler`
        Or a `GroupBatchSampler`, which is never refreshed and needs no callback. Make it without
        `world_size` and `rank`: the trainer itself deals the batches to its processes. Several
        processes need its `drop_last`; each epoch leaves out other rows, those that do not fill a
        round of batches.
    *args, **kwargs
        Arguments of the trainer.

    Raises
    ------
    TypeError
        From `train`: the data set is iterable only.
    ValueError
        From `train`: the sampler does not fit the data set or the number of processes; or its
        batches do not fit into memory, and `auto_find_batch_size` is on.
    """

    accelerator: Any
    args: Any
    train_dataset: Any
    _train_batch_size: int

    def __init__(self, *args: Any, batch_sampler: RefreshableSampler, **kwargs: Any) -> None:
        refuse_class(batch_sampler, "batch_sampler")
        self._batch_sampler = batch_sampler
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """The trainer's own data loader with the sampler's batches instead."""
        count_rows(self.train_dataset, "train_dataset")
        loader = super().get_train_dataloader()  # type: ignore[misc]
        sampler = self._batch_sampler
        if len(loader.dataset) != sampler.n_rows:
            raise ValueError(
                f"the data set has {len(loader.dataset)} rows, the batch sampler {sampler.n_rows}"
            )
        check_processes(sampler, self.accelerator.num_processes, "the batch sampler's drop_last")
        self._check_arguments(sampler)
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

    def _check_arguments(self, sampler: RefreshableSampler) -> None:
        """Say where the trainer's arguments are not what its batches are."""
        differ = self._train_batch_size != sampler.batch_size
        if differ and self.args.auto_find_batch_size:
            raise ValueError(
                f"auto_find_batch_size wants batches of {self._train_batch_size} rows, those of "
                f"the batch sampler have {sampler.batch_size}, whatever fits into memory: set it "
                "to False, and make the sampler with a batch_size that fits"
            )
        if differ:
            warnings.warn(
                f"the trainer reports batches of {self._train_batch_size} rows, those of the batch "
                f"sampler have {sampler.batch_size}: set per_device_train_batch_size accordingly",
                stacklevel=3,
            )
        if self.args.dataloader_drop_last and not sampler.drop_last:
            warnings.warn(
                "dataloader_drop_last is True, but the last batch is kept: make the batch sampler "
                "with drop_last=True",
                stacklevel=3,
            )


class SamplerCallback(TrainerCallback, ABC):
    """Refreshes, saves and restores the batches; a subclass defines `refresh`.

    Every batch sampler in the training loader that can be refreshed is refreshed at the start of
    each epoch it is due for. Its state is saved in every checkpoint as ``ngame.safetensors``, so a
    resumed run has the same batches as an uninterrupted one. A further training that begins anew,
    with the same trainer or another, begins with the sampler and `memory` as they were before the
    first; a bank keeps its vectors.

    Attributes
    ----------
    bank : EmbeddingBank or None
        The bank that `refresh` takes vectors from, if any; it is saved and restored too.
    memory : object with `state_dict` and `load_state_dict`, or None
        What else is saved and restored. Of several processes each saves its own: those after the
        first in ``ngame.rank1.safetensors`` and so on.

    Raises
    ------
    ValueError
        When training begins: its data loader has no batch sampler that can be refreshed; or there
        are a bank and several processes, each of which would fill its own.
    FileNotFoundError
        When training is resumed: the checkpoint lacks its ``ngame.safetensors``, or that of this
        process.
    """

    bank: EmbeddingBank | None = None
    memory: Any = None
    _epoch = 0

    @abstractmethod
    def refresh(
        self, sampler: RefreshableSampler, dataset: Any, model: torch.nn.Module, args: Any
    ) -> None:
        """Refresh one sampler with vectors of the rows of its data set."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the batch samplers; restore their state if a run is resumed."""
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
        # Counted as the trainer does: the epoch it tells callbacks is wrong after an epoch that was
        # cut short.
        steps = math.ceil(len(loader) / args.gradient_accumulation_steps)
        self._epoch = state.global_step // steps
        epochs = math.ceil(state.max_steps / steps)
        for sampler in samplers:
            start = getattr(sampler, "start_epoch", None)
            if start is not None and start >= epochs:
                warnings.warn(
                    f"all batches of this run are random: it ends before epoch {start}, the first "
                    "with clusters or neighbours (counted from 0). Make the "
                    f"{type(sampler).__name__} with an earlier start_epoch",
                    stacklevel=2,
                )
        for part in [*samplers, *([] if self.memory is None else [self.memory])]:
            if part not in _STARTS:
                _STARTS[part] = part.state_dict()
            elif not state.global_step:
                part.load_state_dict(_STARTS[part])
        if state.global_step:
            folder = _resumed_folder(args, state)
            tensors = _read(folder / "ngame.safetensors")
            for number, sampler in enumerate(samplers):
                sampler.load_state_dict(from_tensors(take_prefix(tensors, f"{number}.")))
            if self.memory is not None and args.process_index and _has_own(tensors, folder):
                tensors |= _read(folder / _rank_file(args))
            for name, kept in self._kept():
                kept.load_state_dict(from_tensors(take_prefix(tensors, f"{name}.")))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refresh what is due, before the trainer asks for the epoch's first batch."""
        for sampler, dataset in clustered(kwargs["train_dataloader"]):
            sampler.set_epoch(self._epoch)
            if sampler.due(self._epoch):
                self.refresh(sampler, dataset, kwargs["model"], args)
        self._epoch += 1

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the state of the batches next to the trainer's."""
        folder = _saved_folder(args, state)
        if args.should_save:
            parts = {
                str(number): to_tensors(sampler.state_dict())
                for number, (sampler, _) in enumerate(clustered(kwargs["train_dataloader"]))
            }
            parts |= {name: to_tensors(kept.state_dict()) for name, kept in self._kept()}
            write_tensors(folder / "ngame.safetensors", with_prefixes(**parts))
        if self.memory is not None and args.process_index:
            memory = to_tensors(self.memory.state_dict())
            write_tensors(folder / _rank_file(args), with_prefixes(memory=memory))

    def _kept(self) -> Iterator[tuple[str, Any]]:
        """What is saved beside the batches, with its name in the file."""
        parts = {"bank": self.bank, "memory": self.memory}
        return ((name, kept) for name, kept in parts.items() if kept is not None)


class RefreshCallback(SamplerCallback):
    """Refresh the training batches at the start of each epoch for which a refresh is due.

    Every checkpoint holds the state of the batches, as `SamplerCallback` says.

    Parameters
    ----------
    encode : callable
        ``encode(rows)`` gives the current model's vectors of rows of the training set, a tensor or
        array of shape [m, d], for an int64 array of m row ids. It must call the bare model, as
        `ngame.refresh_sampler` says.
    chunk_size, lengths : as in `ngame.encode_rows`
    bank : EmbeddingBank, optional
        The bank that `encode` reads, if it is ``lambda rows: bank.vectors[rows]``; the trainer's
        `compute_loss` fills it.
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
        """Refresh one sampler with the vectors that `encode` gives."""
        refresh_sampler(
            sampler, self._encode, model=model, chunk_size=self._chunk_size, lengths=self._lengths
        )


def clustered(loader: Any) -> Iterator[tuple[RefreshableSampler, Any]]:
    """The samplers in a trainer's data loader that can be refreshed, with their data sets."""
    batches = loader.batch_sampler
    batches = getattr(batches, "batch_sampler", batches)  # inside accelerate's, if there is one
    several = isinstance(loader.dataset, ConcatDataset) and hasattr(batches, "batch_samplers")
    samplers = batches.batch_samplers if several else [batches]
    datasets = loader.dataset.datasets if several else [loader.dataset]
    for sampler, dataset in zip(samplers, datasets, strict=True):
        if hasattr(sampler, "refresh") and hasattr(sampler, "due"):
            yield sampler, dataset


def check_processes(sampler: RefreshableSampler, processes: int, option: str) -> None:
    """Reject batches that accelerate cannot deal evenly; `option` names what to set to True."""
    if sampler.state_dict()["world_size"] != 1:
        raise ValueError(
            "the batch sampler was made with world_size, "
            "but the trainer deals its batches to the processes itself: leave world_size out"
        )
    if processes > 1 and not sampler.drop_last:
        raise ValueError(
            f"{option} is False with {processes} processes, which would get unequal numbers of "
            "batches and wait for each other for ever: set it to True"
        )


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.exists():
        raise FileNotFoundError(
            f"there is no {path}: the checkpoint was not written to its end, or without "
            "RefreshCallback, or by fewer processes or an earlier version"
        )
    return load_file(path)


def _has_own(tensors: Mapping[str, torch.Tensor], folder: Path) -> bool:
    """Whether each process has a memory of its own: older versions wrote one for all.

    Where nothing but the step was in it, that serves all.
    """
    only_step = take_prefix(tensors, "memory.").keys() <= {"step"}
    return not only_step or any(folder.glob("ngame.rank*.safetensors"))


def _rank_file(args: Any) -> str:
    return f"ngame.rank{args.process_index}.safetensors"


def _saved_folder(args: Any, state: Any) -> Path:
    """The checkpoint that the trainer has just saved: of a hyperparameter search, in a trial's."""
    trainer, values = _calling_trainer()
    output = trainer._get_output_dir(values.get("trial")) if trainer else args.output_dir
    return Path(output) / f"checkpoint-{state.global_step}"


def _resumed_folder(args: Any, state: Any) -> Path:
    """The checkpoint that the trainer has just loaded, which may be anywhere."""
    given = _calling_trainer()[1].get("resume_from_checkpoint")
    return Path(given or Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _calling_trainer() -> tuple[Any, Mapping[str, Any]]:
    """The trainer that called a callback, and the local variables of its function; or None.

    A callback is told neither the trainer, nor the folder that it writes to or resumes from.
    """
    frame = sys._getframe(1).f_back
    while frame is not None:
        caller = frame.f_locals.get("self")
        if hasattr(type(caller), "_get_output_dir"):
            return caller, frame.f_locals
        frame = frame.f_back
    return None, {}

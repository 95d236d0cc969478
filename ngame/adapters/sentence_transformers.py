"""NGAME batches and the known-positive mask in the trainer of sentence-transformers 6.2."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.data_collator import DEFAULT_LABEL_COLUMNS
from sentence_transformers.base.sampler import DefaultBatchSampler
from torch.utils.data import RandomSampler

from ngame.adapters.torch import RefreshableSampler, refresh_sampler
from ngame.adapters.transformers import SamplerCallback, check_processes
from ngame.batches import ClusterBatchSampler
from ngame.encoders.bank import EmbeddingBank
from ngame.loss import CooIndex, decoupled_softmax
from ngame.positives import in_batch_positives

# Rows whose texts are in memory at once: enough for encoding to sort them by length.
_ROWS_AT_ONCE = 8192


class BatchSamplerFactory:
    """For the trainer's argument `batch_sampler`: makes the batches of one data set.

    The trainer asks for the batches of every data set, for training and evaluation, and of each
    part of a `DatasetDict`, without saying which it is. This factory recognizes its own, and gives
    all others the trainer's default batches. A `RefreshCallback` refreshes its batches.

    Parameters
    ----------
    dataset : datasets.Dataset
        The same object that the trainer gets as `train_dataset`, or as a part of it.
    sampler : callable
        `ngame.ClusterBatchSampler`, or whatever makes a sampler from a number of rows, a batch size
        and the keyword `drop_last`.
    **options
        More keywords for the sampler: `cluster_size`, `seed`, ... The trainer's seed is not used.
        Leave out `world_size`: the trainer itself deals the batches to several processes.

    Raises
    ------
    ValueError
        When the trainer calls: it runs several processes with ``dataloader_drop_last=False``; or
        this factory was unpickled, as from saved training arguments, which hold no data.

    Examples
    --------
    ``batch_sampler=BatchSamplerFactory(dataset, ClusterBatchSampler, cluster_size=8)``
    """

    def __init__(
        self, dataset: Any, sampler: Callable[..., Any] = ClusterBatchSampler, **options: Any
    ) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._options = options

    def __call__(
        self,
        dataset: Any,
        batch_size: int,
        drop_last: bool,
        valid_label_columns: list[str] | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
    ) -> Any:
        """Batches of a data set: clustered ones of its own, the trainer's default of others."""
        if self._dataset is None:
            raise ValueError(
                "this BatchSamplerFactory is a pickled copy, without its data set: make a new one"
            )
        if dataset is not self._dataset:
            return DefaultBatchSampler(
                RandomSampler(dataset, generator=generator),
                batch_size=batch_size,
                drop_last=drop_last,
                valid_label_columns=valid_label_columns,
                generator=generator,
                seed=seed,
            )
        sampler = self._sampler(len(dataset), batch_size, drop_last=drop_last, **self._options)
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        check_processes(sampler, processes, "dataloader_drop_last")
        return sampler

    def __getstate__(self) -> dict[str, Any]:
        # The trainer pickles its arguments into every checkpoint.
        return {"_dataset": None}


class RefreshCallback(SamplerCallback):
    """Refresh the training batches with embeddings by the model in training.

    At the start of each epoch for which a refresh is due, a column of the data set is encoded with
    the prompt it has in training; or, at no cost, the vectors come from a bank. Every checkpoint
    holds the state of the batches, as `ngame.adapters.transformers.SamplerCallback` says.

    Parameters
    ----------
    column : str, optional
        By default the first that is no label: the anchors.
    batch_size : int
        Texts encoded at once.
    bank : EmbeddingBank, optional
        The bank that `MaskedMultipleNegativesRankingLoss` fills: then nothing is encoded. The
        vector of an anchor that training has not visited yet is zero.
    """

    def __init__(
        self,
        *,
        column: str | None = None,
        batch_size: int = 64,
        bank: EmbeddingBank | None = None,
    ) -> None:
        self._column = column
        self._batch_size = batch_size
        self.bank = bank

    def refresh(self, sampler: RefreshableSampler, dataset: Any, model: Any, args: Any) -> None:
        """Refresh one sampler with the embeddings of a column of its data set."""
        if self.bank is not None:
            sampler.refresh(self.bank.vectors[np.array(dataset["label"])[:, 0]])
            return
        columns = [name for name in dataset.column_names if name not in DEFAULT_LABEL_COLUMNS]
        column = self._column or columns[0]
        if column not in columns:
            raise ValueError(f"column is {column}, the data set has {', '.join(columns)}")
        # The trainer adds a data set's name to its rows if prompts may depend on it.
        prompt = _prompt(args.prompts, dataset[0].get("dataset_name"), column)
        refresh_sampler(
            sampler,
            lambda rows: model.encode(
                dataset[rows.tolist()][column],
                prompt=prompt,
                batch_size=self._batch_size,
                show_progress_bar=False,
            ),
            model=model,
            chunk_size=_ROWS_AT_ONCE,
        )


def _prompt(prompts: Any, dataset_name: str | None, column: str) -> str:
    """The prompt of a column, for any form of the trainer's `prompts`."""
    if isinstance(prompts, Mapping) and dataset_name in prompts:
        prompts = prompts[dataset_name]
    if isinstance(prompts, Mapping):
        prompts = prompts.get(column)
    # Without one, "": None would mean the model's default prompt, which training does not use.
    return prompts or ""


class MaskedMultipleNegativesRankingLoss(torch.nn.Module):
    """`MultipleNegativesRankingLoss` in which no known positive serves as a negative.

    In batches of near rows, many positives are also positives of other rows. Let s_ij be the cosine
    of anchor i and positive j times `scale`. The loss of row i is
    ``log(1 + sum_j exp(s_ij - s_ii))`` over all j that are not known positives of row i; the mean
    over the rows is returned. If the others hold no known positives, this equals
    `MultipleNegativesRankingLoss` of sentence-transformers up to rounding.

    The data set has the columns anchor, positive, any number of negatives, and ``label``, which
    holds ids instead of texts: in each row either the id of its positive; or, where `positives` is
    given, the pair ``[id of its anchor, id of its positive]``. Negatives are never masked.

    Parameters
    ----------
    model : SentenceTransformer
    positives : CSR matrix of shape [anchors, positives], optional
        Its stored entries are the known positives. By default a row's known positives are the rows
        with its label.
    scale : float
        Multiplies the cosines, as there.
    bank : EmbeddingBank, optional
        Stores the vectors of the anchors by their ids during training; only with `positives`.
        `RefreshCallback` clusters these instead of encoding all anchors again.

    Raises
    ------
    ValueError
        The labels of a batch do not have the shape above; there is a bank but no `positives`.
    IndexError
        A label is out of range for `positives`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        positives: sp.csr_matrix | None = None,
        *,
        scale: float = 20.0,
        bank: EmbeddingBank | None = None,
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale is {scale}, expected more than 0")
        if bank is not None and positives is None:
            raise ValueError("bank is given without positives, whose rows are the ids of anchors")
        self.model = model
        self.positives = positives
        self.scale = scale
        self.bank = bank

    def forward(
        self, sentence_features: Iterable[dict[str, torch.Tensor]], labels: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss of a batch, from the features of its columns and its label column."""
        anchors, *others = (
            F.normalize(self.model(dict(features))["sentence_embedding"], dim=1)
            for features in sentence_features
        )
        rows = len(anchors)
        shape = (rows,) if self.positives is None else (rows, 2)
        if labels is None or labels.shape != shape:
            came = "missing" if labels is None else f"of shape {tuple(labels.shape)}"
            raise ValueError(f"the label column is {came}, expected {shape} in this batch")
        if self.positives is None:
            known = CooIndex(*torch.nonzero(labels[:, None] == labels, as_tuple=True))
        else:
            ids = labels.cpu().numpy()
            known = CooIndex.of(in_batch_positives(self.positives, *ids.T), anchors.device)
            if self.bank is not None and self.model.training:
                self.bank.update(ids[:, 0], anchors)
        own = torch.arange(rows, device=anchors.device)
        # A row's own pair is never its negative, even if `positives` lacks that pair.
        known = CooIndex(torch.cat([known.rows, own]), torch.cat([known.columns, own]))
        scores = anchors @ torch.cat(others).T
        return decoupled_softmax(scores, known, CooIndex(own, own), temperature=1 / self.scale)

    def get_config_dict(self) -> dict[str, float]:
        """Settings for the model card."""
        return {"scale": self.scale}

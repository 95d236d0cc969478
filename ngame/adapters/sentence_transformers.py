"""NGAME batches, known-positive masks and more negatives in sentence-transformers 6.2."""

import dataclasses
import difflib
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sentence_transformers import MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.base.data_collator import DEFAULT_LABEL_COLUMNS
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import (
    all_gather,
    all_gather_with_grad,
    batch_to_device,
    cos_sim,
    dot_score,
    get_rank,
)
from torch.utils.data import RandomSampler

from ngame.adapters.torch import RefreshableSampler, count_rows, refresh_sampler
from ngame.adapters.transformers import SamplerCallback, check_processes
from ngame.arrays import as_list, refuse_names, renamed
from ngame.batches import ClusterBatchSampler, GroupBatchSampler
from ngame.encoders.bank import EmbeddingBank
from ngame.loss import CooIndex
from ngame.negatives import (
    ANONYMOUS,
    EMPTY,
    Candidates,
    ContrastiveLoss,
    Drawn,
    Filter,
    KnownPositives,
    NegativeQueue,
    Number,
    SharedRandom,
)
from ngame.negatives.contrastive import Direction
from ngame.state import take_prefix

Ids = npt.NDArray[np.int64]

_DIRECTIONS: dict[str, Direction] = {
    "query_to_doc": "query_to_item",
    "query_to_query": "query_to_query",
    "doc_to_query": "item_to_query",
    "doc_to_doc": "item_to_item",
}

# Rows whose texts are in memory at once: enough for encoding to sort them by length.
_ROWS_AT_ONCE = 8192


class BatchSamplerFactory:
    """For the trainer's argument `batch_sampler`: makes the batches of the training data.

    The trainer asks for the batches of every data set, for training and evaluation, and of each
    part of a `DatasetDict`, without saying which it is. This factory recognizes its own, and gives
    all others the trainer's default batches. A `RefreshCallback` refreshes its batches.

    Parameters
    ----------
    dataset : datasets.Dataset, or datasets.DatasetDict
        The same object that the trainer gets as `train_dataset`, or as a part of it; or several of
        its parts, of which each gets a sampler.
    sampler : callable
        `ngame.ClusterBatchSampler`, or whatever makes a sampler from a number of rows, a batch size
        and the keyword `drop_last`; or `ngame.GroupBatchSampler`, with the keyword `groups`, which
        needs no `RefreshCallback`.
    parts : mapping, optional
        By the names of parts, keywords that differ from those for all: ``{"qa": {"keys": ids}}``.
    **options
        More keywords for the sampler: `cluster_size`, `seed`, ... The trainer's seed is not used.
        Leave out `world_size`: the trainer itself deals the batches to several processes.

    Raises
    ------
    TypeError
        `dataset` is iterable only, or has strings for labels; or the sampler has no such keyword,
        or lacks its `groups`.
    ValueError
        `parts` names a part that is not there. When the trainer calls: the sampler is of another
        number of rows than the data; or there are several processes, with
        ``dataloader_drop_last=False``; or this factory was unpickled, as from saved training
        arguments, which hold no data.

    Examples
    --------
    ``batch_sampler=BatchSamplerFactory(dataset, ClusterBatchSampler, cluster_size=8)``
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Callable[..., Any] = ClusterBatchSampler,
        *,
        parts: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self._datasets = dict(dataset) if isinstance(dataset, Mapping) else {"": dataset}
        for name, part in self._datasets.items():
            called = f'dataset["{name}"]' if name else "dataset"
            count_rows(part, called)
            _check_labels(part, called)
        self._sampler = sampler
        self._parts = dict(parts or {})
        self._options = options
        for given in (options, *self._parts.values()):
            _check_keywords(sampler, given)
        if unknown := self._parts.keys() - self._datasets.keys():
            raise ValueError(
                f"parts has {', '.join(sorted(unknown))}, the data set {', '.join(self._datasets)}"
            )
        if sampler is GroupBatchSampler:
            for name in self._datasets:
                if "groups" not in self._options_of(name):
                    part = f" for {name}" if name else ""
                    raise TypeError(f"GroupBatchSampler needs groups{part}, the group of every row")

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
        if not self._datasets:
            raise ValueError(
                "this BatchSamplerFactory is a pickled copy, without its data set: make a new one"
            )
        name = next((name for name, own in self._datasets.items() if own is dataset), None)
        if name is None:
            return DefaultBatchSampler(
                RandomSampler(dataset, generator=generator),
                batch_size=batch_size,
                drop_last=drop_last,
                valid_label_columns=valid_label_columns,
                generator=generator,
                seed=seed,
            )
        options = self._options_of(name)
        sampler: Any
        if self._sampler is GroupBatchSampler:  # which knows its rows, and has full batches alone
            sampler = GroupBatchSampler(batch_size=batch_size, **options)
        else:
            sampler = self._sampler(len(dataset), batch_size, drop_last=drop_last, **options)
        if sampler.n_rows != len(dataset):
            called = f" {name}" if name else ""
            raise ValueError(
                f"the data set{called} has {len(dataset)} rows, its batch sampler {sampler.n_rows}"
            )
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        check_processes(sampler, processes, "dataloader_drop_last")
        return sampler

    def _options_of(self, name: str) -> dict[str, Any]:
        """Keywords for the sampler of a part."""
        return {**self._options, **self._parts.get(name, {})}

    def __getstate__(self) -> dict[str, Any]:
        # The trainer pickles its arguments into every checkpoint.
        return {"_datasets": {}}


def _check_labels(dataset: Any, name: str) -> None:
    """TypeError for a label column of strings, of which the trainer cannot make a tensor."""
    there = getattr(dataset, "column_names", ())
    if label := next((column for column in DEFAULT_LABEL_COLUMNS if column in there), None):
        refuse_names(np.asarray(dataset[:1][label]), f'{name}["{label}"]')


def _check_keywords(sampler: Callable[..., Any], given: Iterable[str]) -> None:
    """TypeError at once for a keyword that the sampler lacks: the trainer calls it late."""
    known = inspect.signature(sampler).parameters
    if any(one.kind is one.VAR_KEYWORD for one in known.values()):
        return
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {near[0]}?" if near else ""
            raise TypeError(f"{getattr(sampler, '__name__', sampler)} has no {name}{hint}")


class RefreshCallback(SamplerCallback):
    """Refresh the training batches with embeddings by the model in training.

    At the start of each epoch for which a refresh is due, a column of the data set is encoded with
    the prompt and the route (`router_mapping`) it has in training; or, at no cost, the vectors come
    from a bank. Every checkpoint holds the state of the batches, as
    `ngame.adapters.transformers.SamplerCallback` says. The vectors of a `SparseEncoder` are dense
    here: as many numbers a row as its vocabulary has entries.

    Parameters
    ----------
    column : str, optional
        By default the first that is no label: the anchors.
    batch_size : int
        Texts encoded at once.
    bank : EmbeddingBank, optional
        The bank that `MaskedMultipleNegativesRankingLoss` fills: then nothing is encoded. The
        vector of an anchor that training has not visited yet is zero.
    loss : MaskedMultipleNegativesRankingLoss, or its cached form, optional
        One with sources, whose step and queues are to be saved and restored, too.

    Raises
    ------
    TypeError
        When training begins: the model gives a text no single vector, as a `CrossEncoder`.
    """

    def __init__(
        self,
        *,
        column: str | None = None,
        batch_size: int = 64,
        bank: EmbeddingBank | None = None,
        loss: "MaskedLoss | None" = None,
    ) -> None:
        self._column = column
        self._batch_size = batch_size
        self.bank = bank
        if loss is not None and not isinstance(loss, MaskedLoss):
            raise TypeError(
                f"loss is a {type(loss).__name__}, expected a MaskedMultipleNegativesRankingLoss "
                "or its cached form: only those have a state to save"
            )
        self.memory = None if loss is None else loss.memory

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the model can encode; then as `SamplerCallback` does."""
        model = kwargs["model"]
        encodes = hasattr(model, "encode") and not isinstance(model, MultiVectorEncoder)
        if self.bank is None and not encodes:
            raise TypeError(
                f"the model is a {type(model).__name__}, which gives a text no vector to cluster: "
                "let another model encode, by the RefreshCallback of ngame.adapters.transformers"
            )
        super().on_train_begin(args, state, control, **kwargs)

    def refresh(self, sampler: RefreshableSampler, dataset: Any, model: Any, args: Any) -> None:
        """Refresh one sampler with the embeddings of a column of its data set."""
        if self.bank is not None:
            sampler.refresh(self.bank.vectors[_anchors(dataset)])
            return
        columns = [name for name in dataset.column_names if name not in DEFAULT_LABEL_COLUMNS]
        column = self._column or columns[0]
        if column not in columns:
            raise ValueError(f"column is {column}, the data set has {', '.join(columns)}")
        # The trainer adds a data set's name to its rows if prompts or routes may depend on it.
        name = dataset[0].get("dataset_name")
        options: dict[str, Any] = {"prompt": _prompt(args.prompts, name, column)}
        if task := _task(args.router_mapping, name, column):
            options["task"] = task
        if isinstance(model, SparseEncoder):
            options["convert_to_sparse_tensor"] = False
        refresh_sampler(
            sampler,
            lambda rows: model.encode(
                dataset[rows.tolist()][column],
                batch_size=self._batch_size,
                show_progress_bar=False,
                **options,
            ),
            model=model,
            chunk_size=_ROWS_AT_ONCE,
        )


def _anchors(dataset: Any) -> npt.NDArray[np.int64]:
    """The ids of the anchors, by which a bank stores their vectors: first of the label column."""
    if "label" in dataset.column_names:
        ids = np.array(dataset["label"])
        if ids.ndim == 2 and ids.shape[1] == 2 and ids.dtype.kind in "iu":
            return ids[:, 0].astype(np.int64)
        came = f"its label column has {ids.dtype} of shape {ids.shape}"
    else:
        came = f"the data set has {', '.join(dataset.column_names)}"
    raise ValueError(
        f"a bank needs a column label of pairs [id of the anchor, id of the positive]; {came}. "
        "Add it, or leave the bank out: anchors are then encoded"
    )


def _prompt(prompts: Any, dataset_name: str | None, column: str) -> str:
    """The prompt of a column, for any form of the trainer's `prompts`."""
    if isinstance(prompts, Mapping) and dataset_name in prompts:
        prompts = prompts[dataset_name]
    if isinstance(prompts, Mapping):
        prompts = prompts.get(column)
    # Without one, "": None would mean the model's default prompt, which training does not use.
    return prompts or ""


def _task(routes: Any, dataset_name: str | None, column: str) -> Any:
    """The route of a column, for any form of the trainer's `router_mapping`; None without one."""
    routes = routes or {}
    if any(isinstance(each, Mapping) for each in routes.values()):
        routes = routes.get(dataset_name, {})
    return routes.get(column)


class SharedTexts:
    """Texts drawn at random each step as negatives of all rows, encoded with the gradient.

    A model with a `Router` encodes them by the route of the positives, which are the second column.

    Parameters
    ----------
    texts : sequence of str
        The text of every positive, by its id: as many as the loss's `positives` has columns.
    m : int or Schedule
        Texts a step.
    prompt : str, optional
        What the trainer puts before the positives, if anything.
    log_q : bool
        Correct the logits for how probable each text is in a draw (see
        `ngame.negatives.SharedRandom`).
    **options
        `weights`, `reuse` and `seed` of `ngame.negatives.SharedRandom`.
    """

    def __init__(
        self,
        texts: Sequence[str],
        m: Number,
        *,
        prompt: str | None = None,
        log_q: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(texts, str):
            raise TypeError("texts is a str, expected a sequence of them")
        self.draw = SharedRandom(len(texts), m, **options).draw
        self._texts, self._prompt, self._log_q = texts, prompt, log_q

    def check(self, positives: int) -> None:
        """Check that there is a text for each of so many positives."""
        if len(self._texts) != positives:
            raise ValueError(
                f"texts of SharedTexts has {len(self._texts)} entries, positives has {positives} "
                "columns: they are the texts of all positives, by id"
            )

    def features(self, model: Any, ids: Ids, task: str | None = None) -> dict[str, Any]:
        """Features of the texts with these ids, on the model's device; `task` is their route."""
        texts = [self._texts[number] for number in ids.tolist()]
        features = model.preprocess(texts, prompt=self._prompt, task=task)
        device = next(model.parameters()).device
        features = dict(batch_to_device(features, device))
        # As the trainer's collator does: the model finds the route there.
        return features if task is None else {**features, "task": task}

    def candidates(self, drawn: Drawn, vectors: torch.Tensor, batch: Ids) -> Candidates:
        """What all rows are offered; of what the batch has itself, nothing."""
        ids = np.where(np.isin(drawn.ids, batch), EMPTY, drawn.ids)
        shift = torch.from_numpy(-drawn.log_q).to(vectors.device) if self._log_q else None
        return Candidates(ids, vectors, shift=shift)


Source = SharedTexts | NegativeQueue | Callable[[int], Candidates]


class MaskedMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` in which no known positive serves as a negative.

    In batches of near rows, many positives are also positives of other rows. Let s_ij be the cosine
    of anchor i and positive j times `scale`. The loss of row i is
    ``log(1 + sum_j exp(s_ij - s_ii))`` over all j that are not known positives of row i; the mean
    over the rows is returned. If the others hold no known positives, this equals
    `MultipleNegativesRankingLoss` of sentence-transformers up to rounding, with all its options.

    The data set has the columns anchor, positive, any number of negatives, and ``label``, which
    holds ids instead of texts: in each row either the id of its positive; or the pair
    ``[id of its anchor, id of its positive]``, which `positives`, `filters` and `bank` need; or
    that and the ids of the row's negatives. Negatives without ids are masked by no filter that
    goes by ids. Ids are 0 or more.

    All columns are encoded in one forward pass, unless that would mean much padding.

    Parameters
    ----------
    model : SentenceTransformer
    positives : CSR matrix of shape [anchors, positives], optional
        Its stored entries are the known positives. By default a row's known positives are the rows
        with its label.
    filters : sequence of filters of `ngame.negatives`
        Leave out more: `Guide`, `NearCopies`, ... After a call, `masked_shares` has the share of
        the comparisons that each left out, the first that of `positives`, if there are any.
    sources : sequence of `SharedTexts`, `NegativeQueue`, or callables
        More negatives, for all rows. A queue gets the positives of each training batch when the
        next one begins, at the full width where a ``MatryoshkaLoss`` cuts them. A callable takes
        the step and gives `ngame.negatives.Candidates`.
    bank : EmbeddingBank, optional
        Stores the vectors of the anchors by their ids during training; only with `positives`.
        `RefreshCallback` clusters these instead of encoding all anchors again.
    **options
        `scale`, `similarity_fct`, `gather_across_devices`, `directions`, `partition_mode`,
        `hardness_mode` and `hardness_strength`, as there.

    Attributes
    ----------
    memory
        The training batches so far and the queues: hand it to `RefreshCallback`, which saves and
        restores it, so that a resumed run goes on with the same draws.

    Raises
    ------
    TypeError
        `filters` or `sources` is no sequence.
    ValueError
        `SharedTexts` has more or fewer texts than there are positives; the labels of a batch do not
        have the shape above; there is a bank but no `positives`; or the bank or a queue has another
        width than the vectors, as inside a ``MatryoshkaLoss`` without their full width.
    IndexError
        A label is out of range for `positives`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        positives: sp.csr_matrix | None = None,
        *,
        filters: Sequence[Filter] = (),
        sources: Sequence[Source] = (),
        bank: EmbeddingBank | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if bank is not None and positives is None:
            raise ValueError("bank is given without positives, whose rows are the ids of anchors")
        self.filters: list[Filter] = as_list(filters, "filters")
        if positives is not None:
            with renamed(labels="positives"):
                self.filters.insert(0, KnownPositives(positives))
        self.sources: list[Source] = as_list(sources, "sources")
        for source in self.sources:
            if isinstance(source, SharedTexts) and positives is not None:
                source.check(positives.shape[1])
        self.bank = bank
        queues = [each for each in self.sources if isinstance(each, NegativeQueue)]
        self.memory = LossMemory(queues)

    @property
    def masked_shares(self) -> list[float]:
        """For each filter, the share it left out of the last batch's comparisons."""
        loss = self.memory.loss
        return [] if loss is None else loss.masked_shares

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss of a batch, from the features of its columns and its label column."""
        features = [*sentence_features]
        drawn = self.begin(features)
        embeddings = embed_columns(self.model, features, separate_first=_pads_much(features))
        embeddings += [self.model(each)["sentence_embedding"] for each in drawn]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def begin(self, features: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Begin a batch, if these features are not still those of the last; the texts drawn for it.

        Losses that call this one several times a batch give it the same features each time, and
        find the same texts again.
        """
        memory = self.memory
        if memory.begin(features, self.model.training):
            task = next((each.get("task") for each in features[1:2]), None)  # of the positives
            for source in self.sources:
                if isinstance(source, SharedTexts):
                    drawn = source.draw(memory.step)
                    if len(drawn.ids):
                        texts = source.features(self.model, drawn.ids, task)
                        memory.drawn.append((source, drawn, texts))
        return [each for _, _, each in memory.drawn]

    def compute_loss_from_embeddings(
        self,
        embeddings: list[torch.Tensor],
        labels: torch.Tensor | None,
        *,
        rows_at_once: int | None = None,
    ) -> torch.Tensor:
        """The loss of the batch's columns, and of the texts drawn for it after these."""
        memory = self.memory
        cosine = self.similarity_fct is cos_sim
        if cosine:
            embeddings = [F.normalize(each, dim=1) for each in embeddings]
        count = len(embeddings) - len(memory.drawn)
        if count < 2:
            raise ValueError(f"the data set has {count} columns of texts, expected at least 2")
        (anchors, *documents), texts = embeddings[:count], embeddings[count:]
        rows, offset = len(anchors), 0
        ids = self._ids(labels, rows, len(documents))
        if self.bank is not None and self.model.training and memory.first:
            width = self.bank.vectors.shape[1]
            if anchors.shape[1] != width:
                raise ValueError(
                    f"the anchors have {anchors.shape[1]} columns, the bank {width}: make the bank "
                    "as wide as the model's vectors; or, where MatryoshkaLoss cuts them without "
                    "keeping the full width too, leave the bank out: anchors are then encoded"
                )
            self.bank.update(ids[:, 0], anchors)
        if self.gather_across_devices:
            anchors = all_gather_with_grad(anchors)
            documents = [all_gather_with_grad(each) for each in documents]
            ids = all_gather(torch.from_numpy(ids).to(anchors.device)).cpu().numpy()
            offset = get_rank() * rows
        memory.remember(ids[:, 1], documents[0])
        own = torch.arange(offset, offset + rows)
        mined = self.hardness_strength * (self.hardness_mode in ("hard_negatives", "all_negatives"))
        loss = memory.loss = ContrastiveLoss(
            temperature=1 / self.scale,
            hardness=self.hardness_strength
            * (self.hardness_mode in ("in_batch_negatives", "all_negatives")),
            mined_hardness=mined,
            directions=[_DIRECTIONS[name] for name in self.directions],
            joint=self.partition_mode == "joint",
            filters=self.filters,
            similarity=None if cosine or self.similarity_fct is dot_score else self.similarity_fct,
            rows_at_once=rows_at_once,
        )
        value: torch.Tensor = loss(
            Candidates(ids[:, 0], anchors),
            Candidates(
                ids[:, 1:].T.ravel(),
                torch.cat(documents),
                rows=np.tile(np.arange(len(anchors)), len(documents)),
            ),
            CooIndex(own, own),
            [self._fitted(each, anchors) for each in self._offered(texts, ids[:, 1:])],
            step=memory.step,
        )
        return value

    def _offered(self, texts: list[torch.Tensor], batch: Ids) -> Iterator[Candidates]:
        """What the sources offer; `texts` are the vectors of those drawn."""
        for (source, drawn, _), vectors in zip(self.memory.drawn, texts, strict=True):
            yield source.candidates(drawn, vectors, batch)
        for other in self.sources:
            if isinstance(other, NegativeQueue):
                yield other.offer()
            elif not isinstance(other, SharedTexts):
                yield other(self.memory.step)

    def _fitted(self, candidates: Candidates, anchors: torch.Tensor) -> Candidates:
        """Candidates on the device of the anchors, and of their width, which others may cut."""
        vectors = candidates.vectors.to(anchors)[..., : anchors.shape[1]]
        if self.similarity_fct is cos_sim:
            vectors = F.normalize(vectors, dim=-1)
        return dataclasses.replace(candidates, vectors=vectors)

    def _ids(self, labels: torch.Tensor | None, rows: int, documents: int) -> Ids:
        """Ids of the anchor and of every document in each row, int64 [rows, 1 + documents]."""
        shapes: list[tuple[int, ...]] = [(rows, 2), (rows, 1 + documents)]
        if not self.filters:
            shapes.insert(0, (rows,))
        if labels is None or tuple(labels.shape) not in shapes:
            came = "missing" if labels is None else f"of shape {tuple(labels.shape)}"
            expected = " or ".join(map(str, dict.fromkeys(shapes)))
            what = "[anchor id, positive id], and ids of the negatives, if any"
            if not self.filters:
                what = f"ids of the positives, or {what}"
            raise ValueError(
                f"the label column is {came}, expected {expected} in this batch: {what}"
            )
        if labels.is_floating_point():
            raise TypeError(f"the label column is of {labels.dtype}, expected integers")
        given = labels.cpu().numpy()
        if given.ndim == 1:  # which are the rows of one anchor makes no difference then
            given = np.stack([given, given], axis=1)
        ids = np.full((rows, 1 + documents), ANONYMOUS)
        ids[:, : given.shape[1]] = given
        return ids

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        config: dict[str, Any] = super().get_config_dict()
        for name in ("filters", "sources"):
            if getattr(self, name):
                config[name] = [type(each).__name__ for each in getattr(self, name)]
        return config


class CachedMaskedMultipleNegativesRankingLoss(CachedMultipleNegativesRankingLoss):
    """`MaskedMultipleNegativesRankingLoss` for batches larger than their gradients' memory.

    The batch is encoded in parts, twice (GradCache, as in `CachedMultipleNegativesRankingLoss`),
    and the scores of `mini_batch_size` anchors are in memory at once. Loss and gradients are those
    of the whole batch, to the rounding.

    Parameters
    ----------
    model, positives : as in `MaskedMultipleNegativesRankingLoss`
    mini_batch_size : int
        Texts encoded at once.
    mini_batch_num_tokens : int, optional
        Tokens encoded at once, instead.
    show_progress_bar : bool
    **options
        The other options of `MaskedMultipleNegativesRankingLoss`, which is the attribute `loss`.
    """

    loss: MaskedMultipleNegativesRankingLoss

    def __init__(
        self,
        model: SentenceTransformer,
        positives: sp.csr_matrix | None = None,
        *,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            show_progress_bar=show_progress_bar,
        )
        self.loss = MaskedMultipleNegativesRankingLoss(model, positives, **options)

    @property
    def memory(self) -> "LossMemory":
        """As in `MaskedMultipleNegativesRankingLoss`."""
        return self.loss.memory

    @property
    def masked_shares(self) -> list[float]:
        """As in `MaskedMultipleNegativesRankingLoss`."""
        return self.loss.masked_shares

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Any) -> torch.Tensor:
        """The loss of a batch, from the features of its columns and its label column."""
        features = [*sentence_features]
        return super().forward([*features, *self.loss.begin(features)], labels)

    def calculate_loss(
        self,
        reps: list[list[torch.Tensor]],
        labels: torch.Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> torch.Tensor:
        """The loss of the batch from the embeddings of its parts; `labels` are needed."""
        embeddings = [torch.cat(column) for column in reps]
        loss = self.loss.compute_loss_from_embeddings(
            embeddings, labels, rows_at_once=self.mini_batch_size
        )
        if with_backward:
            loss.backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {**super().get_config_dict(), **self.loss.get_config_dict()}


MaskedLoss = MaskedMultipleNegativesRankingLoss | CachedMaskedMultipleNegativesRankingLoss


class LossMemory:
    """What a loss knows of the training: the batch in progress, the steps so far, its queues."""

    def __init__(self, queues: list[NegativeQueue]) -> None:
        self._queues = queues
        self._begun = 0
        self._waiting: tuple[Ids, torch.Tensor] | None = None
        self._features: Callable[[], torch.Tensor | None] = lambda: None
        self._training = False
        self.step = 0
        self.first = True
        """Whether the loss of this batch was not computed yet."""
        self.drawn: list[tuple[SharedTexts, Drawn, dict[str, Any]]] = []
        self.loss: ContrastiveLoss | None = None

    def begin(self, features: list[dict[str, Any]], training: bool) -> bool:
        """Begin a batch; False if these are the features of the one in progress."""
        here = next(each for each in features[0].values() if isinstance(each, torch.Tensor))
        if self._features() is here:
            return False
        self._features = weakref.ref(here)
        self._training, self.first, self.drawn = training, True, []
        self.step = self._begun
        if training:
            self._push()
            self._begun += 1
        return True

    def remember(self, ids: Ids, positives: torch.Tensor) -> None:
        """Keep a training batch's positives for the queues: of several calls, the widest.

        Some of the calls for a batch may get vectors that MatryoshkaLoss has cut.
        """
        kept = -1 if self._waiting is None else self._waiting[1].shape[1]
        if self._training and self._queues and positives.shape[1] > kept:
            self._waiting = ids, positives.detach()
        self.first = False

    def _push(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            width = waiting[1].shape[1]
            for queue in self._queues:
                if width != queue.dim:
                    raise ValueError(
                        f"the positives have {width} columns, the queue {queue.dim}: make it "
                        "as wide as the model's vectors; or, where MatryoshkaLoss cuts them, give "
                        "it the full width too and n_dims_per_step=-1, or leave the queue out"
                    )
                queue.push(*waiting)

    def state_dict(self) -> dict[str, Any]:
        """What a restart needs: `step`, the training batches so far, and the queues' states."""
        self._push()
        queues = {
            f"{number}.{name}": value
            for number, queue in enumerate(self._queues)
            for name, value in queue.state_dict().items()
        }
        return {"step": self._begun, **queues}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises
        ------
        ValueError
            As in `NegativeQueue.load_state_dict`.
        """
        self._begun = int(state["step"])
        self._waiting = None
        for number, queue in enumerate(self._queues):
            queue.load_state_dict(take_prefix(state, f"{number}."))


def _pads_much(features: list[dict[str, Any]]) -> bool:
    """Whether one forward pass of all columns would be a quarter larger than one for each."""
    widths = [each["input_ids"].shape[-1] for each in features if "input_ids" in each]
    return bool(widths) and max(widths) * len(widths) > 1.25 * sum(widths)

"""Negative mining-aware mini-batches (NGAME) for retrieval and extreme classification."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    _core = import_module("ngame._core")
except ModuleNotFoundError as error:
    if error.name != "ngame._core":
        raise
    raise ImportError(
        "ngame's compiled part is missing: install it with `pip install .` in the source tree "
        "(a C++20 compiler is needed), or leave the source tree to import an installed ngame"
    ) from error

from ngame import metrics as metrics
from ngame.cluster import Clusters, balanced_clusters
from ngame.mining import mine_hard_negatives
from ngame.positives import in_batch_positives, label_pool
from ngame.shortlist import cluster_shortlist, drop_pairs, keep_topk, merge
from ngame.topk import topk, topk_arrays

if TYPE_CHECKING:
    from ngame.adapters.torch import ClusterDataLoader as ClusterDataLoader
    from ngame.adapters.torch import refresh_sampler as refresh_sampler
    from ngame.batches import ClusterBatchSampler as ClusterBatchSampler
    from ngame.batches import GroupBatchSampler as GroupBatchSampler
    from ngame.batches import NeighbourBatchSampler as NeighbourBatchSampler
    from ngame.batches.timer import RefreshTimer as RefreshTimer
    from ngame.data.dataset import Dataset as Dataset
    from ngame.data.dataset import load_dataset as load_dataset
    from ngame.encoders.bag import BagEncoder as BagEncoder
    from ngame.encoders.bank import EmbeddingBank as EmbeddingBank
    from ngame.encoders.base import Encoder as Encoder
    from ngame.encoders.encode import encode_rows as encode_rows
    from ngame.encoders.encode import evaluating as evaluating
    from ngame.encoders.transformer import TransformerEncoder as TransformerEncoder
    from ngame.neighbours import haversine_neighbours as haversine_neighbours
    from ngame.prediction.model import Model as Model
    from ngame.training.loops import train as train

__version__: str = _core.__version__

# Imported when first asked for, so that those who only cluster or evaluate wait for no torch.
_LAZY = {
    "BagEncoder": "ngame.encoders.bag",
    "ClusterBatchSampler": "ngame.batches",
    "ClusterDataLoader": "ngame.adapters.torch",
    "Dataset": "ngame.data.dataset",
    "EmbeddingBank": "ngame.encoders.bank",
    "Encoder": "ngame.encoders.base",
    "GroupBatchSampler": "ngame.batches",
    "Model": "ngame.prediction.model",
    "NeighbourBatchSampler": "ngame.batches",
    "RefreshTimer": "ngame.batches.timer",
    "TransformerEncoder": "ngame.encoders.transformer",
    "encode_rows": "ngame.encoders.encode",
    "evaluating": "ngame.encoders.encode",
    "haversine_neighbours": "ngame.neighbours",
    "load_dataset": "ngame.data.dataset",
    "refresh_sampler": "ngame.adapters.torch",
    "train": "ngame.training.loops",
}

__all__ = [
    "BagEncoder",
    "ClusterBatchSampler",
    "ClusterDataLoader",
    "Clusters",
    "Dataset",
    "EmbeddingBank",
    "Encoder",
    "GroupBatchSampler",
    "Model",
    "NeighbourBatchSampler",
    "RefreshTimer",
    "TransformerEncoder",
    "balanced_clusters",
    "cluster_shortlist",
    "drop_pairs",
    "encode_rows",
    "evaluating",
    "haversine_neighbours",
    "in_batch_positives",
    "keep_topk",
    "label_pool",
    "load_dataset",
    "merge",
    "metrics",
    "mine_hard_negatives",
    "refresh_sampler",
    "topk",
    "topk_arrays",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ngame' has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value

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
from ngame.shortlist import cluster_shortlist, drop_pairs, keep_topk, merge, topk, topk_arrays

if TYPE_CHECKING:
    from ngame.bag import BagEncoder as BagEncoder
    from ngame.batches import ClusterBatchSampler as ClusterBatchSampler
    from ngame.batches import GroupBatchSampler as GroupBatchSampler
    from ngame.batches import NeighbourBatchSampler as NeighbourBatchSampler
    from ngame.data import Dataset as Dataset
    from ngame.data import load_dataset as load_dataset
    from ngame.embeddings import EmbeddingBank as EmbeddingBank
    from ngame.embeddings import RefreshTimer as RefreshTimer
    from ngame.embeddings import encode_rows as encode_rows
    from ngame.embeddings import evaluating as evaluating
    from ngame.loader import ClusterDataLoader as ClusterDataLoader
    from ngame.loader import refresh_sampler as refresh_sampler
    from ngame.model import Model as Model
    from ngame.neighbours import haversine_neighbours as haversine_neighbours
    from ngame.training import train as train
    from ngame.transformer import TransformerEncoder as TransformerEncoder

__version__: str = _core.__version__

# Imported when first asked for, so that those who only cluster or evaluate wait for no torch.
_LAZY = {
    "BagEncoder": "ngame.bag",
    "ClusterBatchSampler": "ngame.batches",
    "ClusterDataLoader": "ngame.loader",
    "Dataset": "ngame.data",
    "EmbeddingBank": "ngame.embeddings",
    "GroupBatchSampler": "ngame.batches",
    "Model": "ngame.model",
    "NeighbourBatchSampler": "ngame.batches",
    "RefreshTimer": "ngame.embeddings",
    "TransformerEncoder": "ngame.transformer",
    "encode_rows": "ngame.embeddings",
    "evaluating": "ngame.embeddings",
    "haversine_neighbours": "ngame.neighbours",
    "load_dataset": "ngame.data",
    "refresh_sampler": "ngame.loader",
    "train": "ngame.training",
}

__all__ = [
    "BagEncoder",
    "ClusterBatchSampler",
    "ClusterDataLoader",
    "Clusters",
    "Dataset",
    "EmbeddingBank",
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

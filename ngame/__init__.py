"""Negative mining-aware mini-batches (NGAME) for retrieval and extreme classification."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    _compiled = import_module("ngame._core")
except ModuleNotFoundError as error:
    if error.name != "ngame._core":
        raise
    raise ImportError(
        "ngame's compiled part is missing: install it with `pip install .` in the source tree "
        "(a C++20 compiler is needed), or leave the source tree to import an installed ngame"
    ) from error

# For type checkers; `_HOMES` says the same to Python.
if TYPE_CHECKING:
    from ngame import loss as loss
    from ngame import metrics as metrics
    from ngame import negatives as negatives
    from ngame.adapters.torch import ClusterDataLoader as ClusterDataLoader
    from ngame.adapters.torch import refresh_sampler as refresh_sampler
    from ngame.batches import ClusterBatchSampler as ClusterBatchSampler
    from ngame.batches import GroupBatchSampler as GroupBatchSampler
    from ngame.batches import NeighbourBatchSampler as NeighbourBatchSampler
    from ngame.batches.timer import RefreshTimer as RefreshTimer
    from ngame.cluster import Clusters as Clusters
    from ngame.cluster import balanced_clusters as balanced_clusters
    from ngame.config import Config as Config
    from ngame.data.dataset import Dataset as Dataset
    from ngame.data.formats import load_dataset as load_dataset
    from ngame.encoders.bag import BagEncoder as BagEncoder
    from ngame.encoders.bank import EmbeddingBank as EmbeddingBank
    from ngame.encoders.base import Encoder as Encoder
    from ngame.encoders.encode import encode_rows as encode_rows
    from ngame.encoders.encode import evaluating as evaluating
    from ngame.encoders.transformer import TransformerEncoder as TransformerEncoder
    from ngame.linear import linear_classifiers as linear_classifiers
    from ngame.mining import mine_hard_negatives as mine_hard_negatives
    from ngame.neighbours import haversine_neighbours as haversine_neighbours
    from ngame.positives import in_batch_positives as in_batch_positives
    from ngame.positives import label_pool as label_pool
    from ngame.prediction.model import Model as Model
    from ngame.shortlist import cluster_shortlist as cluster_shortlist
    from ngame.shortlist import drop_pairs as drop_pairs
    from ngame.shortlist import keep_topk as keep_topk
    from ngame.shortlist import merge as merge
    from ngame.sparse_topk import SparseIndex as SparseIndex
    from ngame.sparse_topk import sparse_topk as sparse_topk
    from ngame.topk import ExactIndex as ExactIndex
    from ngame.topk import topk as topk
    from ngame.topk import topk_arrays as topk_arrays
    from ngame.training.loops import train as train

__version__: str = _compiled.__version__

# The module of every public name, which is imported when the name is first asked for: those who
# only cluster or evaluate do not wait for torch.
_HOMES = {
    "BagEncoder": "ngame.encoders.bag",
    "ClusterBatchSampler": "ngame.batches",
    "ClusterDataLoader": "ngame.adapters.torch",
    "Clusters": "ngame.cluster",
    "Config": "ngame.config",
    "Dataset": "ngame.data.dataset",
    "EmbeddingBank": "ngame.encoders.bank",
    "Encoder": "ngame.encoders.base",
    "ExactIndex": "ngame.topk",
    "GroupBatchSampler": "ngame.batches",
    "Model": "ngame.prediction.model",
    "NeighbourBatchSampler": "ngame.batches",
    "RefreshTimer": "ngame.batches.timer",
    "SparseIndex": "ngame.sparse_topk",
    "TransformerEncoder": "ngame.encoders.transformer",
    "balanced_clusters": "ngame.cluster",
    "cluster_shortlist": "ngame.shortlist",
    "drop_pairs": "ngame.shortlist",
    "encode_rows": "ngame.encoders.encode",
    "evaluating": "ngame.encoders.encode",
    "haversine_neighbours": "ngame.neighbours",
    "in_batch_positives": "ngame.positives",
    "keep_topk": "ngame.shortlist",
    "label_pool": "ngame.positives",
    "linear_classifiers": "ngame.linear",
    "load_dataset": "ngame.data.formats",
    "loss": "ngame",
    "merge": "ngame.shortlist",
    "metrics": "ngame",
    "mine_hard_negatives": "ngame.mining",
    "negatives": "ngame",
    "refresh_sampler": "ngame.adapters.torch",
    "sparse_topk": "ngame.sparse_topk",
    "topk": "ngame.topk",
    "topk_arrays": "ngame.topk",
    "train": "ngame.training.loops",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ngame' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    value = import_module(f"ngame.{name}") if home.__name__ == "ngame" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    ours = (name for name, value in globals().items() if _is_public(name, value))
    return sorted({*ours, *__all__})


def _is_public(name: str, value: Any) -> bool:
    """Whether a global is a name of Python's, or a module of the package that is loaded."""
    is_module = getattr(value, "__name__", "") == f"{__name__}.{name}"
    return name.startswith("__") or (is_module and not name.startswith("_"))


# Files' names too: importing `ngame.topk` would put the module in the function's place.
__getattr__("topk")
__getattr__("sparse_topk")

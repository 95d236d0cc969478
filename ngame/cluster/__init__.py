"""Balanced clusters of embeddings."""

from ngame.cluster.balanced import balanced_clusters
from ngame.cluster.clusters import Clusters
from ngame.cluster.order import as_seed, balanced_order

__all__ = ["Clusters", "as_seed", "balanced_clusters", "balanced_order"]

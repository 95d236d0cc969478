"""Batch samplers: batches of whole clusters (NGAME), of neighbourhoods, or of groups."""

from ngame.batches.clusters import ClusterBatchSampler
from ngame.batches.groups import GroupBatchSampler
from ngame.batches.neighbours import NeighbourBatchSampler

__all__ = ["ClusterBatchSampler", "GroupBatchSampler", "NeighbourBatchSampler"]

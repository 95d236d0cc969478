"""What the batches of an epoch are: whole clusters (NGAME), neighbourhoods, or groups."""

from ngame.batches.clusters import ClusterBatchSampler
from ngame.batches.groups import GroupBatchSampler
from ngame.batches.neighbours import NeighbourBatchSampler

__all__ = ["ClusterBatchSampler", "GroupBatchSampler", "NeighbourBatchSampler"]

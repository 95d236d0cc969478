"""Balanced clusters: exact sizes, from rows in memory, in a file, or over several processes."""

import math

import numpy as np
import numpy.typing as npt

from ngame.arrays import ProcessGroup, as_count, as_matrix, on_gpu
from ngame.cluster.clusters import Clusters
from ngame.cluster.order import as_seed, balanced_order, first_not_finite
from ngame.cluster.parts import parted_order, parts_within
from ngame.cluster.shared import shared_order
from ngame.dispatch import dispatched


def balanced_clusters(
    x: npt.ArrayLike,
    *,
    size: int | None = None,
    n_clusters: int | None = None,
    seed: int = 0,
    max_iter: int = 20,
    refine: int = 5,
    threads: int = 0,
    memory: int | None = None,
    group: ProcessGroup | None = None,
) -> Clusters:
    """Divide rows into clusters of exact sizes: a tree of balanced 2-means, then refinement.

    The tree is the clustering of NGAME (Dahiya et al., WSDM 2023) with sizes that are exact: a
    node of k clusters is split into floor(k / 2) and ceil(k / 2) of them, with the rows that these
    will hold. Within a split, rows are assigned by their product with the difference of the two
    centres; each side takes as many of them as it must, ties by lower id. Large nodes are divided
    several levels in one pass over `x`, along directions learnt on a sample of their rows; small
    ones on a bfloat16 copy of theirs.

    A cut never looks back, so the tree leaves many near neighbours apart. Each round of refinement
    takes, for every row, the 64 clusters whose means are nearest to the mean of its own, and
    scores them by the cosine of the row and the mean; its own cluster's mean is taken without the
    row. Rows and clusters are then matched stably (Gale and Shapley, 1962): a row asks its 8 best
    clusters from the best down; a cluster keeps the best of the rows that ask, as many as it has
    places. A row that all 8 refuse gets a place that is left, near its old cluster in the order.

    Beside `x` the call takes some 80 bytes a row, 4 bytes a cluster and column, and 4 to
    40 megabytes a thread, as the rows are wide.

    Parameters
    ----------
    x : float32 or float16 array of shape [n, d]
        Anything `numpy.asarray` understands without a copy (np.memmap, CPU tensors). The geometry
        is the cosine; rows are scaled on the fly and `x` is not changed. Zero rows are allowed.
        A mapped file may be larger than memory: then it is read from end to end for each few
        levels and twice for each round, and its rows one by one where they are copied, with many
        requests at a time. Float16 is read as such. An array is copied only where its rows are
        not contiguous. A CUDA tensor, bfloat16 too, is clustered on its device; only the ids come
        to the host. The tree's clusters differ from those of the CPU, and so do the refined.
    size : int
        Every cluster has exactly `size` rows, but for the last, which takes the remainder.
    n_clusters : int
        Number of clusters; their sizes differ by at most one. Give either this or `size`.
    seed : int
        Any integer; the same seed gives the same clusters for any number of threads.
    max_iter : int
        Most rounds of each 2-means; it stops before when no row changes sides.
    refine : int
        Most rounds of refinement; 0 gives the tree alone. They end before when a round adds less
        than half a percent to the coherence. Five rounds take about three times as long as the
        tree and double the share of near neighbours in one cluster on trained embeddings
        (`Clusters.neighbour_share`); further rounds gain less and less. With `memory` or `group`
        it is up to half as many each time that rows are dealt to parts.
    threads : int
        0 means the CPUs this process may use.
    memory : int, optional
        Bytes that the call may take, counting all rows, mapped or not, and some tens of megabytes
        less than the process has. If the rows and what is said above do not fit, they are clustered
        in parts, and the clusters are others than those of one piece: each row goes to a part
        by cuts learnt on a sample; the parts are written to temporary files, then clustered and
        refined one by one. Then the clusters are dealt to parts again, along other cuts, and
        refined again, once to five times: as long as that makes them 1.5 % tighter. `x` is
        read from end to end for the sample and each time, and temporary files as large as `x` are
        written and read. They are in the folder that the environment variable TMPDIR names,
        which must be on a disk. 8 bytes a row stay in memory throughout.
    group : torch.distributed.ProcessGroup, optional
        Every rank calls with a share of the rows, whose ids go on where those of the rank before
        end. The upper cuts, into some parts a rank, are made together: along directions learnt on a
        sample of all rows, with sides of exact size. Each rank gets the rows of its parts of the
        clusters, one part at a time, as float16, and divides and refines them by itself. Then the
        clusters are dealt to the parts again, along other directions, and refined again, once to
        five times: rows near a cut meet their neighbours beyond it. All ranks get the clusters of
        all rows, which differ from those of one process. A rank holds its share of the rows, and an
        eighth of its bytes more. `size` and `n_clusters` are of all rows. Arrays on the host only.

    Returns
    -------
    Clusters
        Ids ascend within each cluster; clusters that are near in the tree are near in the order.

    Raises
    ------
    TypeError
        `x` is neither float32 nor float16.
    ValueError
        `x` has no rows, or has NaN or infinity (the first such row is named); `size` or
        `n_clusters` is not in 1 .. n, or not exactly one of them is given; `memory` does
        not suffice, or is given with a `group`; the ranks differ in what they ask for.
    ConnectionError
        Another rank of `group` has ended, because of an error of its own, say.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1, 0], [0, 1], [1, 0.1], [0.1, 1]], np.float32)
    >>> sorted(ids.tolist() for ids in balanced_clusters(x, size=2))
    [[0, 2], [1, 3]]
    """
    x = dispatched(as_matrix)(x, "x")
    rounds, max_iter = as_count(refine, "refine", 0), as_count(max_iter, "max_iter")
    rows, ranks = len(x), None
    if memory is not None:
        memory = as_count(memory, "memory", most=math.inf)
        if group is not None:
            raise ValueError("memory is given with a group: each rank holds its share in memory")
        if on_gpu(x):
            raise TypeError("x is on a CUDA device, expected an array on the host with memory")
    if group is not None:
        from ngame.ranks import Ranks

        if on_gpu(x):
            raise TypeError("x is on a CUDA device, expected an array on the host with a group")
        ranks = Ranks(group)
        bad = first_not_finite(x)
        asked = [x.shape[1], size or 0, n_clusters or 0, as_seed(seed) >> 1, max_iter, rounds]
        own = [rows, -1 if bad is None else bad, *asked]
        about = np.stack(ranks.all_arrays(np.array([own])))[:, 0]
        names = ("columns", "size", "n_clusters", "seed", "max_iter", "refine")
        for name, values in zip(names, about.T[2:], strict=True):
            if (values != values[0]).any():
                raise ValueError(f"the ranks differ in {name}: {values.tolist()}")
        firsts = np.cumsum(about[:, 0]) - about[:, 0]
        for first, row in zip(firsts.tolist(), about[:, 1].tolist(), strict=True):
            if row >= 0:
                raise ValueError(f"x has NaN or infinity in row {first + row}")
        rows = int(about[:, 0].sum())
    if rows == 0:
        raise ValueError("x has no rows")
    if rows > np.iinfo(np.int32).max:
        raise ValueError(f"x has {rows} rows, at most 2**31 - 1 are possible")
    if (size is None) == (n_clusters is None):
        raise ValueError("exactly one of size and n_clusters must be given")
    name = "n_clusters" if size is None else "size"
    count = as_count(n_clusters if size is None else size, name)
    if count > rows:
        raise ValueError(f"{name} is {count}, x has only {rows} rows")
    if size is None:
        offsets = np.arange(count + 1, dtype=np.int64) * rows // count
    else:
        offsets = np.append(np.arange(0, rows, count, dtype=np.int64), rows)
    if memory is not None:
        parts = parts_within(memory, x, len(offsets) - 1)
        if parts > 1:
            order = parted_order(x, offsets, parts, as_seed(seed), max_iter, rounds, threads)
            return Clusters(order, offsets)
    if ranks is None:
        order = balanced_order(x, offsets, as_seed(seed), max_iter, refine=rounds, threads=threads)
        return Clusters(order, offsets)
    first = int(firsts[ranks.rank])
    order = shared_order(x, first, offsets, ranks, as_seed(seed), max_iter, rounds, threads)
    return Clusters(order, offsets)

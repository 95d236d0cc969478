"""Balanced clusters by repeated halving."""

import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ngame.arrays import as_csr, as_ids, as_threads
from ngame.cluster import as_seed, balanced_clusters
from ngame.compat.xclib.utils.sparse import normalize

Ids = npt.NDArray[Any]
Splitter = Callable[..., list[Ids]]

# Most rounds of the sparse 2-means, the same as the core's.
_ROUNDS = 20


def cluster_balance(
    X: Any,
    clusters: Sequence[Any],
    num_clusters: float,
    splitter: Splitter,
    num_threads: int = 5,
    verbose: bool = True,
    use_sth_till: int = -1,
    *,
    seed: int | None = None,
) -> tuple[list[Ids], npt.NDArray[np.int64]]:
    """Halve all clusters repeatedly until there are as many as asked for.

    With `b_kmeans_dense` this is one call of `ngame.balanced_clusters` for each given cluster.

    Parameters
    ----------
    X : array or CSR matrix of shape [n, d]
        What the splitter takes.
    clusters : sequence of int arrays
        Row ids of the first clusters: ``[np.arange(n)]``.
    num_clusters : number
        Rounded up to a power of two.
    splitter : callable
        `b_kmeans_dense`, `b_kmeans_sparse`, or any function of rows and their ids that gives a
        list of id arrays, and may be called by several threads at once.
    num_threads : int
        At most this many, and never more than the CPUs this process may use, which 0 or less means.
    verbose, use_sth_till
        No effect.
    seed : int, optional
        Of `b_kmeans_dense` and `b_kmeans_sparse`; by default drawn once from NumPy's global
        generator, as in pyxclib: other clusters at every call, the same after ``np.random.seed``.
        A splitter of your own has its own randomness.

    Returns
    -------
    clusters : list of int arrays, from the left of the tree to its right
        From one cluster of n rows, each of k clusters has floor(n / k) or ceil(n / k). Their dtype
        is that of the given cluster.
    mapping : int64 array of shape [n]
        The cluster of every row: -1 if it is in none, the last one if it is in several.

    Raises
    ------
    TypeError, ValueError
        X is not what the splitter takes; a row of `b_kmeans_dense` has NaN or infinity (the first
        is named); there are fewer rows than clusters asked for.
    IndexError
        An id in `clusters` is out of range.

    Notes
    -----
    pyxclib draws from the generator in several threads, so that no two runs agree; does not end
    where there are fewer rows than clusters; makes twice as many clusters as asked for at some
    powers of two from 2**29 on; and maps a row of no cluster to cluster 0.
    """
    rows = X.shape[0]
    leaves: list[Ids] = []
    for number, ids in enumerate(clusters):
        name = f"clusters[{number}]"
        checked = as_ids(ids, name)
        outside = checked[(checked < 0) | (checked >= rows)]
        if len(outside):
            raise IndexError(f"{name} has id {outside[0]}, out of range for {rows} rows")
        leaves.append(np.asarray(ids) if len(checked) else checked)
    if not leaves:
        raise ValueError("clusters is empty")
    if not 0 < num_clusters < math.inf:
        raise ValueError(f"num_clusters is {num_clusters}, expected a positive number")
    wanted = 1 << (math.ceil(num_clusters) - 1).bit_length()
    threads = as_threads(0)
    threads = threads if num_threads <= 0 else min(num_threads, threads)
    seed = drawn_seed(seed)
    if _is_dense(splitter):
        leaves = _dense_leaves(X, leaves, wanted, seed, threads)
    else:
        leaves = _leaves(X, leaves, wanted, splitter, seed, threads)
    mapping = np.full(rows, -1, np.int64)
    # Of uint64 and another type together NumPy would make floats.
    places = np.concatenate(leaves, dtype=np.int64, casting="same_kind")
    mapping[places] = np.repeat(np.arange(len(leaves)), [*map(len, leaves)])
    return leaves, mapping


def b_kmeans_dense(
    X: Any, index: Any, metric: str = "cosine", tol: float = 1e-4, *, seed: int | None = None
) -> list[Ids]:
    """Split rows into two clusters of equal size, by balanced 2-means on the unit sphere.

    Parameters
    ----------
    X : float array of shape [n, d]
        float64 is narrowed to float32.
    index : array of shape [n]
        The caller's ids of the rows.
    metric : "cosine"
    tol : no effect
        It ends when no row changes sides, or after 20 rounds.
    seed : int, optional
        By default drawn from NumPy's global generator, as in pyxclib.

    Returns
    -------
    list of one array (n is 1) or two
        Ids, in the order of `index`; the first has one more where n is odd.

    Raises
    ------
    TypeError
        X has no floats.
    ValueError
        X has no rows, NaN or infinity; `index` has another length; `metric` is another.

    Notes
    -----
    pyxclib has no bound on its rounds, and takes no float16.
    """
    X, index = _float32(X), _index(X, index, metric)
    if len(index) == 1:
        return [index]
    halves = balanced_clusters(X, size=max(1, (len(index) + 1) // 2), seed=drawn_seed(seed))
    return [index[ids] for ids in np.split(halves.order, halves.offsets[1:-1])]


def b_kmeans_sparse(
    X: Any,
    index: Any,
    metric: str = "cosine",
    tol: float = 1e-4,
    leakage: float | None = None,
    *,
    seed: int | None = None,
) -> list[Ids]:
    """Split rows of a sparse matrix into two clusters of equal size, by balanced 2-means.

    It starts from two random rows and ends when the mean cosine of the rows to their centre grows
    by less than `tol`, or after 20 rounds.

    Parameters
    ----------
    X : CSR matrix of shape [n, d]
    index : array of shape [n]
        The caller's ids of the rows.
    metric : "cosine"
    tol : float
    leakage : float, optional
        A row also joins the other cluster if its distance (1 minus the cosine) to that centre is at
        most 1 + `leakage` times that of the farthest row of that cluster.
    seed : int

    Returns
    -------
    list of one array (n is 1) or two
        Ids, in the order of `index`; the first has one more if n is odd. Rows that leak in come
        last.

    Raises
    ------
    TypeError
        X is no CSR matrix.
    ValueError
        X has no rows, NaN or infinity; `index` has another length; `metric` is another.

    Notes
    -----
    pyxclib makes the matrix dense in every round, with no bound on their number, and compares `tol`
    with a sum over the rows rather than their mean.
    """
    X = as_csr(X, "X")
    index = _index(X, index, metric)
    if len(index) == 0:
        raise ValueError("X has no rows")
    if not np.isfinite(X.data).all():
        raise ValueError("X has NaN or infinity")
    if len(index) == 1:
        return [index]
    X = normalize(X, copy=True)
    half = (len(index) + 1) // 2
    rng = np.random.default_rng(as_seed(drawn_seed(seed)))
    centres = X[rng.choice(len(index), 2, replace=False)].toarray()
    before = -math.inf
    for _ in range(_ROUNDS):
        cosines = X @ centres.T
        order = np.argsort(cosines[:, 1] - cosines[:, 0], kind="stable")
        halves = np.sort(order[:half]), np.sort(order[half:])
        centres = normalize(np.vstack([np.asarray(X[rows].sum(axis=0)) for rows in halves]))
        cosines = X @ centres.T
        mean = sum(cosines[rows, side].sum() for side, rows in enumerate(halves)) / len(index)
        if mean - before < tol:
            break
        before = mean
    if leakage is None:
        return [index[rows] for rows in halves]
    result = []
    for side, (own, other) in enumerate((halves, halves[::-1])):
        distance = 1 - cosines[:, side]
        near = other[distance[other] <= (1 + leakage) * distance[own].max()]
        result.append(index[np.concatenate([own, near])])
    return result


def drawn_seed(seed: int | None = None) -> int:
    """A seed; if none is given, one from the global generator, which pyxclib's callers seed."""
    return int(np.random.randint(2**63)) if seed is None else seed  # noqa: NPY002


def _is_dense(splitter: Splitter) -> bool:
    """Whether it is `b_kmeans_dense`, or that in a `functools.partial` without arguments."""
    if isinstance(splitter, functools.partial) and not splitter.args and not splitter.keywords:
        splitter = splitter.func
    return splitter is b_kmeans_dense


def _takes_seed(splitter: Splitter) -> bool:
    """Whether it is one of the splitters here, with a seed that is still to be chosen."""
    if isinstance(splitter, functools.partial):
        return "seed" not in splitter.keywords and _takes_seed(splitter.func)
    return splitter in (b_kmeans_dense, b_kmeans_sparse)


def _dense_leaves(X: Any, leaves: list[Ids], wanted: int, seed: int, threads: int) -> list[Ids]:
    each = 1
    while each * len(leaves) < wanted:
        each *= 2
    result: list[Ids] = []
    for number, ids in enumerate(leaves):
        if len(ids) < each:
            raise ValueError(
                f"num_clusters, rounded up, is {wanted}: clusters[{number}] would make {each} of "
                f"its {len(ids)} rows"
            )
        whole = len(ids) == len(X) and bool((np.diff(ids) == 1).all())
        rows = _float32(X if whole else X[ids])
        found = balanced_clusters(rows, n_clusters=each, seed=seed, threads=threads)
        result += np.split(ids[found.order], found.offsets[1:-1])
    return result


def _leaves(
    X: Any, leaves: list[Ids], wanted: int, splitter: Splitter, seed: int, threads: int
) -> list[Ids]:
    rng = np.random.default_rng(as_seed(seed))
    with ThreadPoolExecutor(threads) as pool:
        while len(leaves) < wanted:
            # Seeds are drawn before the threads share the work, in the order of the clusters.
            options: list[dict[str, int]] = [{}] * len(leaves)
            if _takes_seed(splitter):
                options = [{"seed": one} for one in rng.integers(2**63, size=len(leaves)).tolist()]
            split = [
                part
                for parts in pool.map(
                    lambda ids, option: splitter(X[ids], ids, **option), leaves, options
                )
                for part in parts
            ]
            if len(split) <= len(leaves):
                raise ValueError(
                    f"num_clusters, rounded up, is {wanted}: the splitter makes no more of "
                    f"{len(leaves)} clusters"
                )
            leaves = split
    return leaves


def _float32(X: Any) -> Any:
    array = np.asarray(X)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _index(X: Any, given: Any, metric: str) -> Ids:
    if metric != "cosine":
        raise ValueError(f'metric is {metric!r}, expected "cosine"')
    index: Ids = np.asarray(given)
    if index.shape != X.shape[:1]:
        raise ValueError(f"index has shape {index.shape}, X has {X.shape[0]} rows")
    return index

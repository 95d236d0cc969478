"""Balanced clusters: beside PECOS, faiss and scikit-learn, and how the cost grows.

    pytest bench/bench_cluster.py --peers PYTHON --embeddings FILE

`bytes` is the input read once, the least that any clustering needs. The number of operations
depends on the data, so it is not counted.
"""

import resource
import time

import inputs
import numpy as np
import pytest

import ngame
from ngame import _core

SIZE = 32


def cluster(benchmark, x, *, rounds=3, **options):
    """Time ours on `x`, check the sizes, record the rest."""
    found = benchmark.pedantic(
        ngame.balanced_clusters, (x,), options, rounds=rounds, warmup_rounds=1
    )
    sizes = np.diff(found.offsets)
    if "size" in options:
        assert (sizes[:-1] == options["size"]).all()
    else:
        assert sizes.max() - sizes.min() <= 1
    tell(benchmark, x, found)
    return found


def tell(benchmark, x, clusters):
    """Record what was clustered and how tightly."""
    benchmark.extra_info["size"] = f"{len(x):,} x {x.shape[1]} {x.dtype}, {len(clusters):,}"
    benchmark.extra_info["bytes"] = x.nbytes
    benchmark.extra_info["coherence"] = clusters.coherence(x)
    benchmark.extra_info["NN10"] = clusters.neighbour_share(x)
    sizes = np.diff(clusters.offsets)
    benchmark.extra_info["largest_to_mean"] = sizes.max() / sizes.mean()


def beside(benchmark, peer, who, x):
    """Time ours or a peer at the number of clusters that PECOS makes: a power of two."""
    n_clusters = 2 ** int(np.ceil(np.log2(len(x) / SIZE)))
    if who == "ours":
        cluster(benchmark, x, n_clusters=n_clusters, threads=2)
        return
    found = peer("pecos_clusters", threads=2, x=x, leaf=SIZE)
    benchmark.pedantic(found, rounds=1)
    result = found.result()
    clusters = ngame.Clusters(result["order"], result["offsets"])
    sizes = np.diff(clusters.offsets)
    assert len(clusters) == n_clusters
    assert sizes.max() - sizes.min() <= 1
    tell(benchmark, x, clusters)


@pytest.mark.parametrize("who", ["ours", "pecos"])
def test_mixture(benchmark, peer, quick, who):
    """The input of the project's bar: topics under parent topics."""
    beside(benchmark, peer, who, inputs.mixture(20_000, 64) if quick else inputs.mixture())


@pytest.mark.parametrize("who", ["ours", "pecos"])
def test_embeddings(benchmark, peer, quick, embeddings, who):
    """Real embeddings."""
    x = np.ascontiguousarray(embeddings[:20_000] if quick else embeddings)
    beside(benchmark, peer, who, x)


@pytest.mark.parametrize("who", ["ours", "sklearn"])
def test_few_large_clusters(benchmark, peer, quick, who):
    """Few clusters, which scikit-learn can do in reasonable time. Its sizes are not balanced."""
    x = inputs.mixture(5000 if quick else 50_000, 64)
    if who == "ours":
        cluster(benchmark, x, n_clusters=64, threads=2)
        return
    found = peer("sklearn_clusters", threads=2, x=x, n_clusters=64)
    benchmark.pedantic(found, rounds=1)
    result = found.result()
    tell(benchmark, x, ngame.Clusters(result["order"], result["offsets"]))


def of_assignment(assignment):
    """Clusters of any size but 0."""
    counts = np.bincount(assignment)
    ends = np.cumsum(counts[counts > 0])
    return ngame.Clusters(np.argsort(assignment, kind="stable"), np.append(0, ends))


@pytest.mark.parametrize("who", ["tree", "refined", "Kmeans", "SuperKmeans"])
def test_beside_k_means(benchmark, peer, quick, who):
    """Clusters of exact size beside those of k-means, which may have any."""
    x, n_clusters = (inputs.mixture(5000, 64), 50) if quick else (inputs.mixture(), 1000)
    if who in ("tree", "refined"):
        options = {"refine": 0} if who == "tree" else {}
        cluster(benchmark, x, n_clusters=n_clusters, threads=2, **options)
        return
    found = peer("faiss_clusters", threads=2, x=x, n_clusters=n_clusters, kind=who)
    benchmark.pedantic(found, rounds=1)
    centres = found.result()["centres"]
    # faiss compares distances.
    half = (centres**2).sum(axis=1) / 2
    parts = np.array_split(x, max(1, len(x) // 4096))
    nearest = np.concatenate([(part @ centres.T - half).argmax(axis=1) for part in parts])
    tell(benchmark, x, of_assignment(nearest))


def greedy(x, clusters):
    """Every row to the nearest mean of `clusters` that has room, best (row, cluster) pair first."""
    sums = np.add.reduceat(x[clusters.order], clusters.offsets[:-1], axis=0)
    scores = x @ (sums / np.linalg.norm(sums, axis=1, keepdims=True)).T
    room = np.diff(clusters.offsets)
    assignment = np.full(len(x), -1)
    for pair in np.argsort(-scores, axis=None):
        row, cluster_id = divmod(int(pair), len(room))
        if assignment[row] < 0 and room[cluster_id] > 0:
            assignment[row] = cluster_id
            room[cluster_id] -= 1
    return of_assignment(assignment)


@pytest.mark.parametrize("rounds", [0, 1, 3, 5, 8, "greedy"])
def test_rounds(benchmark, quick, embeddings, rounds):
    """What refinement costs and gives on real embeddings; beside a greedy pass after the tree."""
    x = np.ascontiguousarray(embeddings[: 2000 if quick else None], np.float32)
    if rounds != "greedy":
        cluster(benchmark, x, size=SIZE, threads=2, refine=rounds)
        return
    if len(x) > 20_000:
        pytest.skip("all pairs of rows and clusters are sorted")
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    tree = ngame.balanced_clusters(x, size=SIZE, refine=0)
    tell(benchmark, x, benchmark.pedantic(greedy, (x, tree), rounds=1))


@pytest.mark.parametrize("n", [10_000, 50_000, 200_000, 1_000_000, 2_000_000])
def test_points(benchmark, quick, n):
    """Growth with the number of points, in float16; the cost of a point, and the peak memory."""
    x = inputs.mixture(n // 100 if quick else n, 128, np.float16)
    # The peak of the whole process only rises, so the sizes ascend.
    cluster(benchmark, x, size=SIZE, threads=2)
    benchmark.extra_info["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["us_a_point"] = 1e6 * seconds / len(x)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("compared", [1 << 40, 4096], ids=["all", "near"])
@pytest.mark.parametrize("n", [250_000, 500_000, 1_000_000, 2_000_000])
def test_many_small_clusters(benchmark, quick, n, compared):
    """A round, all groups of clusters compared or those of near groups of groups; then five."""
    rng = np.random.default_rng(0)
    n = n // 100 if quick else n
    topics = rng.standard_normal((n // 30, 32), dtype=np.float32)
    x = topics[rng.integers(len(topics), size=n)]
    x += 0.4 * rng.standard_normal(x.shape, dtype=np.float32)
    offsets = np.append(np.arange(0, n, 4), n)
    tree = _core.balanced_clusters(x, offsets, 0, 20, 0, 1)
    given = x, tree, offsets
    benchmark.pedantic(_core.refine_clusters, (*given, 1, 1, compared), rounds=3)
    started = time.process_time()
    _core.refine_clusters(*given, 0, 1)
    seconds = benchmark.stats.stats.median - (time.process_time() - started)
    benchmark.extra_info["us_a_row"] = 1e6 * seconds / n
    tell(benchmark, x, ngame.Clusters(_core.refine_clusters(*given, 5, 1, compared), offsets))


@pytest.mark.parametrize("dim", [64, 128, 256, 512, 1024])
def test_dimensions(benchmark, quick, dim):
    """Growth with the dimension."""
    cluster(benchmark, inputs.mixture(2000 if quick else 50_000, dim), size=SIZE, threads=2)


@pytest.mark.parametrize("size", [8, 32, 128, 512, 1024])
def test_sizes(benchmark, quick, size):
    """Growth with the size of the clusters: fewer levels."""
    cluster(benchmark, inputs.mixture(5000 if quick else 100_000, 128), size=size, threads=2)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(benchmark, quick, threads):
    """One thread and two."""
    x = inputs.mixture(5000 if quick else 100_000, 256)
    cluster(benchmark, x, size=SIZE, threads=threads)


@pytest.mark.parametrize("level", _core.simd_levels())
def test_simd(benchmark, quick, level):
    """Each SIMD level."""
    before = _core.simd_level()
    _core.set_simd_level(level)
    try:
        x = inputs.mixture(5000 if quick else 100_000, 256)
        cluster(benchmark, x, size=SIZE, threads=2)
    finally:
        _core.set_simd_level(before)

"""The same bits for any number of threads, and calls that run beside others or are stopped."""

import multiprocessing
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse as sp

import ngame
from ngame import _core, metrics


@pytest.fixture(scope="module")
def case(mixture):
    """Enough rows that threads share nodes, take nodes of their own, and then whole sub-trees."""
    rng = np.random.default_rng(3)
    x = mixture(40_000, 8)
    y = sp.random(40_000, 300, density=0.01, format="csr", dtype=np.float32, random_state=rng)
    other = sp.random(40_000, 300, density=0.01, format="csr", dtype=np.float32, random_state=rng)
    return x, y, other


def everything(case, threads):
    """Bytes of the result of every function that takes threads."""
    x, y, other = case
    clusters = ngame.balanced_clusters(x, size=9, threads=threads)
    few = ngame.balanced_clusters(x[:9001], size=9, threads=threads)
    sparse = [
        ngame.topk(x[:700], x[:3000], 9, threads=threads),
        ngame.cluster_shortlist(y, clusters, limit=5, threads=threads),
        ngame.cluster_shortlist(y, clusters, threads=threads),
        ngame.keep_topk(y, 2, threads=threads),
        ngame.sparse_topk(y[:2000], other, 9, threads=threads),
        ngame.merge([y, other], "sum", threads=threads),
        ngame.merge([y, other], threads=threads),
        ngame.drop_pairs(y, other, threads=threads),
    ]
    weights = metrics.inverse_propensity(y)
    measures = [
        metrics.evaluate(other, y, inverse_propensity=weights, drop=drop, threads=threads)
        for drop in (None, [[0, 1], [7, 3]])
    ]
    batch = np.arange(0, len(x), 9)
    pool, positives = ngame.label_pool(y, batch)
    sparse += [positives, ngame.in_batch_positives(y, batch, pool)]
    return [
        clusters.order.tobytes(),
        few.order.tobytes(),
        clusters.coherence(x, threads=threads),
        measures,
        *(array.tobytes() for m in sparse for array in (m.data, m.indices, m.indptr)),
    ]


def test_same_bits_for_any_number_of_threads(case):
    expected = everything(case, 1)
    for threads in (2, 7):
        assert everything(case, threads) == expected
    # And from two threads of Python at once.
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda threads: everything(case, threads), (2, 0)):
            assert found == expected


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_after_fork(mixture):
    x = mixture(9000, 8)
    expected = ngame.balanced_clusters(x, size=9, threads=2)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child():
        sender.send(ngame.balanced_clusters(x, size=9, threads=2).order)

    process = context.Process(target=child)
    process.start()
    assert receiver.poll(30)
    assert (receiver.recv() == expected.order).all()
    process.join(30)
    assert process.exitcode == 0


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_first_error_is_the_one_told(threads):
    matrix = sp.csr_matrix(np.ones((20_000, 2), np.float32))
    matrix.data[2 * 4321 + 1 :] = np.nan
    for _ in range(5):
        with pytest.raises(ValueError, match=r"matrix has NaN in row 4321$"):
            ngame.keep_topk(matrix, 1, threads=threads)


@pytest.mark.parametrize("threads", [64, 1024])
def test_no_more_threads_than_are_of_use(threads, mixture):
    x = mixture(3000, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = ngame.balanced_clusters(x, size=9, threads=1)
    assert ngame.balanced_clusters(x, size=9, threads=threads) == expected
    assert expected.coherence(x, threads=threads) == expected.coherence(x, threads=1)
    ngame.topk(x[:500], x, 9, threads=threads)
    ngame.keep_topk(sp.csr_matrix(np.ones((3, 2), np.float32)), 1, threads=threads)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


@pytest.fixture
def groups(tmp_path):
    """A root folder with control groups: mounts, the groups of this process, files of limits."""

    def make(mounts, own, files):
        folder = tmp_path / "proc" / "self"
        folder.mkdir(parents=True)
        lines = [f"{30 + i} 22 0:28 {line}" for i, line in enumerate(mounts)]
        (folder / "mountinfo").write_text("\n".join(lines) + "\n")
        (folder / "cgroup").write_text("\n".join(own) + "\n")
        for name, content in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        return _core.quota_cpus(str(tmp_path))

    return make


UNIFIED = "/ /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
CPU = "/ /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
MEMORY = "/ /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory"


@pytest.mark.parametrize(
    ("limit", "cpus"),
    [
        ("200000 100000", 2),
        ("250000 100000", 3),
        ("1000 100000", 1),
        ("100000 100000", 1),
        ("50000 1000000", 1),
        ("max 100000", 0),
        ("9223372036854775807 1", 0),
        ("", 0),
        ("-1 100000", 0),
        ("100000 0", 0),
        ("nonsense", 0),
    ],
)
def test_quota_of_a_container(groups, limit, cpus):
    assert groups([UNIFIED], ["0::/"], {"sys/fs/cgroup/cpu.max": limit + "\n"}) == cpus


@pytest.mark.parametrize("least", ["", "/a", "/a/b", "/a/b/c"])
def test_the_least_quota_of_all_groups_above_counts(groups, least):
    files = {f"sys/fs/cgroup{part}/cpu.max": "900000 100000" for part in ("", "/a", "/a/b", "/x")}
    files["sys/fs/cgroup/x/cpu.max"] = "100000 100000"  # of others
    files[f"sys/fs/cgroup{least}/cpu.max"] = "300000 100000"
    assert groups([UNIFIED], ["0::/a/b/c"], files) == 3


@pytest.mark.parametrize(
    ("mounted", "own", "folder"),
    [
        ("/", "/docker/1", "/docker/1"),
        # A container that sees the names of its host.
        ("/docker", "/docker/1", "/1"),
        ("/docker/1", "/docker/1", ""),
        ("/docker/1", "/docker/1/a", "/a"),
        ("/docker/1", "/docker/12", "/docker/12"),
    ],
)
def test_quota_of_the_first_version(groups, mounted, own, folder):
    mount = "sys/fs/cgroup/cpu,cpuacct"
    files = {
        f"{mount}/cpu.cfs_quota_us": "-1\n",
        f"{mount}/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/cpu.cfs_quota_us": "1\n",
        "sys/fs/cgroup/memory/cpu.cfs_period_us": "1\n",
        f"{mount}{folder}/cpu.cfs_quota_us": "150000\n",
        f"{mount}{folder}/cpu.cfs_period_us": "100000\n",
    }
    groups_of_process = ["5:memory:/", f"4:cpu,cpuacct:{own}", "0::/u"]
    assert groups([MEMORY, CPU.replace("/", mounted, 1)], groups_of_process, files) == 2


def test_both_versions_at_once(groups):
    unified = UNIFIED.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    files = {
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "500000",
        "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/unified/b/cpu.max": "400000 100000",
    }
    assert groups([CPU, unified], ["3:cpu,cpuacct:/a", "0::/b"], files) == 4


def test_without_control_groups(tmp_path):
    assert _core.quota_cpus(str(tmp_path)) == 0
    assert _core.usable_cpus() >= 1


class Stopped(Exception):
    pass


def test_a_signal_stops_work_within_one_large_cluster(rng):
    def stop(number, frame):
        raise Stopped

    y = sp.random(60_000, 60_000, density=1e-4, format="csr", dtype=np.float32, random_state=rng)
    clusters = ngame.Clusters(np.arange(60_000), np.array([0, 60_000]))
    before = signal.signal(signal.SIGALRM, stop)
    try:
        start = time.process_time()  # a busy machine may keep it waiting
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(Stopped):
            ngame.cluster_shortlist(y, clusters, limit=5, threads=2)
        assert time.process_time() - start < 2 * (0.3 + 0.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_signal_stops_an_evaluation_within_a_block_of_long_rows(rng):
    def stop(number, frame):
        raise Stopped

    rows, cols = 500, 20_000
    y = sp.random(rows, cols, density=0.01, format="csr", dtype=np.float32, random_state=rng)
    ends = np.arange(0, rows * cols + 1, cols, dtype=np.int32)
    ids = np.tile(np.arange(cols, dtype=np.int32), rows)
    scores = rng.random(rows * cols, dtype=np.float32)
    dense = sp.csr_matrix((scores, ids, ends), shape=y.shape)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        start = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Stopped):
            metrics.evaluate(dense, y, ks=[cols], threads=1)  # above a second if not stopped
        assert time.process_time() - start < 0.2 + 0.5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


LONG_CALLS = {
    "topk": lambda x, threads: ngame.topk_arrays(x, x, 10, threads=threads),
    "cluster": lambda x, threads: ngame.balanced_clusters(x, size=2, threads=threads),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("call", LONG_CALLS)
def test_a_signal_stops_a_long_call(rng, threads, call):
    def stop(number, frame):
        raise Stopped

    # Seconds of work at the least.
    x = rng.integers(-100, 100, (200_000, 256), dtype=np.int8).astype(np.float16)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        start = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Stopped):
            LONG_CALLS[call](x, threads)
        assert time.process_time() - start < threads * (0.2 + 0.5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

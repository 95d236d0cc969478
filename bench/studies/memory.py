"""Cluster a mapped file that is larger than memory, and check that the clusters are the same.

    python bench/studies/memory.py --rows 5600000 --dim 384 --limit-mb 1200

writes a float16 file into `--folder` (removed at the end), then runs `balanced_clusters` on it
twice: first with limited memory, page cache included, then without a limit. Each run has a process
of its own, and finds nothing of the file in memory. The limit is a control group, version 1, below
this process's own group; that needs root.

    bench/studies/memory.py --rows 20000000 --dim 128 --size 64 --limit-mb 1000 --memory-mb 700

clusters in parts that take so much, once, under the limit. Temporary files are in `--folder`.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

import ngame

sys.path.append(str(Path(__file__).resolve().parent.parent))
import inputs

MB = 1 << 20


def main() -> None:
    """Write the file, run both, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=5_600_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--size", type=int, default=32, help="rows a cluster")
    parser.add_argument("--limit-mb", type=int, default=1200)
    parser.add_argument("--memory-mb", type=int, help="the argument `memory`; one piece without")
    parser.add_argument(
        "--folder", type=Path, help="where the file goes; default: the temporary one"
    )
    options = parser.parse_args()
    parent = own_group()
    if parent is None or not os.access(parent, os.W_OK):
        sys.exit("memory cannot be limited here: no memory control group that may be written to")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "x.npy"
        x = np.lib.format.open_memmap(path, "w+", np.float16, (options.rows, options.dim))
        inputs.fill_mixture(x)
        x.flush()
        print(f"{options.rows:,} x {options.dim} float16, {x.nbytes / 1e9:.1f} GB; 2 threads\n")
        del x
        print(
            "| memory | seconds | CPU seconds | read, GB | written, GB | peak, MB | its own, MB |"
        )
        print("|---|---:|---:|---:|---:|---:|---:|")
        memory = options.memory_mb and options.memory_mb * MB
        limits = (options.limit_mb * MB, None) if memory is None else (options.limit_mb * MB,)
        digests = {measure(path, parent, limit, options.size, memory) for limit in limits}
    if len(digests) != 1:
        sys.exit("the clusters differ")


def own_group() -> Path | None:
    """The folder of this process's memory control group, if there are groups of version 1."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf8").splitlines():
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / group.lstrip("/")
    return None


def measure(path: Path, parent: Path, limit: int | None, size: int, memory: int | None) -> str:
    """Print a row of the table, and return the digest of the clusters."""
    group = parent / f"ngame-{os.getpid()}"
    group.mkdir()
    try:
        if limit is not None:
            (group / "memory.limit_in_bytes").write_text(str(limit))
        forget(path)
        code = f"import memory; memory.cluster({str(path)!r}, {str(group)!r}, {size}, {memory})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path[1:]]),
                "TMPDIR": str(path.parent),
            },
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        peak = int((group / "memory.max_usage_in_bytes").read_text())
    finally:
        group.rmdir()
    found = json.loads(done.stdout)
    print(
        f"| {'all' if limit is None else f'{limit // MB} MB'} | {found['seconds']:.0f} "
        f"| {found['cpu']:.0f} | {found['read'] / 1e9:.1f} | {found['written'] / 1e9:.1f} "
        f"| {peak // MB} | {found['own'] // MB} |",
        flush=True,
    )
    return str(found["digest"])


def forget(path: Path) -> None:
    """Take a file out of the page cache, so that no run uses pages that another run read."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def cluster(path: str, group: str, size: int, memory: int | None) -> None:
    """Enter a control group, cluster, print time and bytes moved as JSON."""
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
    x = np.load(path, mmap_mode="r")
    own = [0]
    threading.Thread(target=watch, args=(own,), daemon=True).start()
    cpu, start = cpu_seconds(), time.perf_counter()
    clusters = ngame.balanced_clusters(x, size=size, memory=memory, threads=2)
    sizes = np.diff(clusters.offsets)
    if (sizes[:-1] != size).any() or sizes.sum() != len(x):
        sys.exit("the sizes are not exact")
    found = {
        "seconds": time.perf_counter() - start,
        "cpu": cpu_seconds() - cpu,
        "read": bytes_moved("read_bytes"),
        "written": bytes_moved("write_bytes"),
        "own": max(own),
        "digest": hashlib.sha256(clusters.order.tobytes()).hexdigest(),
    }
    print(json.dumps(found))


def watch(found: list[int]) -> None:
    """Keep the most memory that this process has had, without that of files."""
    while True:
        for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf8").splitlines():
            if line.startswith("Anonymous:"):
                found[0] = max(found[0], int(line.split()[1]) << 10)
        time.sleep(0.2)


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def bytes_moved(name: str) -> int:
    """What this process had read from disks, or written to them, so far."""
    for line in Path("/proc/self/io").read_text(encoding="utf8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/io has no {name}")


if __name__ == "__main__":
    main()

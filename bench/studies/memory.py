"""Cluster a mapped file that is larger than memory, and check that the clusters are the same.

    python bench/studies/memory.py --rows 5600000 --dim 384 --limit-mb 1200

writes a float16 file into `--folder` (removed at the end), then runs `balanced_clusters` on it
twice: first with limited memory, page cache included, then without a limit. Each run has a process
of its own, and finds nothing of the file in memory. The limit is a control group, version 1, below
this process's own group; that needs root.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
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
    parser.add_argument("--limit-mb", type=int, default=1200)
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
        print("| memory | seconds | CPU seconds | read, GB | peak, MB |")
        print("|---|---:|---:|---:|---:|")
        digests = {measure(path, parent, limit) for limit in (options.limit_mb * MB, None)}
    if len(digests) != 1:
        sys.exit("the clusters differ")


def own_group() -> Path | None:
    """The folder of this process's memory control group, if there are groups of version 1."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf8").splitlines():
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / group.lstrip("/")
    return None


def measure(path: Path, parent: Path, limit: int | None) -> str:
    """Print a row of the table, and return the digest of the clusters."""
    group = parent / f"ngame-{os.getpid()}"
    group.mkdir()
    try:
        if limit is not None:
            (group / "memory.limit_in_bytes").write_text(str(limit))
        forget(path)
        code = f"import memory; memory.cluster({str(path)!r}, {str(group)!r})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            check=True,
            capture_output=True,
            text=True,
        )
        peak = int((group / "memory.max_usage_in_bytes").read_text())
    finally:
        group.rmdir()
    found = json.loads(done.stdout)
    print(
        f"| {'all' if limit is None else f'{limit // MB} MB'} | {found['seconds']:.0f} "
        f"| {found['cpu']:.0f} | {found['read'] / 1e9:.1f} | {peak // MB} |",
        flush=True,
    )
    return str(found["digest"])


def forget(path: Path) -> None:
    """Take a file out of the page cache, so that no run uses pages that another run read."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def cluster(path: str, group: str) -> None:
    """Enter a control group, cluster, print time and bytes read as JSON."""
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
    x = np.load(path, mmap_mode="r")
    cpu, start = cpu_seconds(), time.perf_counter()
    clusters = ngame.balanced_clusters(x, size=32, threads=2)
    found = {
        "seconds": time.perf_counter() - start,
        "cpu": cpu_seconds() - cpu,
        "read": bytes_read(),
        "digest": hashlib.sha256(clusters.order.tobytes()).hexdigest(),
    }
    print(json.dumps(found))


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def bytes_read() -> int:
    """What this process had read from disks so far."""
    for line in Path("/proc/self/io").read_text(encoding="utf8").splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise ValueError("/proc/self/io has no read_bytes")


if __name__ == "__main__":
    main()

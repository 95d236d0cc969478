"""Time of every kernel: of each launch of a clustering in turn, of a search by kernel.

PYTHONPATH=bench python -m gpu.kernels          # in the repository's root
PYTHONPATH=bench python -m gpu.kernels --small  # once each, not profiled: for another profiler
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import gpu
import ngame

KERNELS = (
    *("invert_norms", "score_rows", "learn", "split"),
    *("spread_sample", "spread_project", "spread_weigh", "spread_add", "spread_turn"),
    *("find_means", "score_lists", "fill_queue", "ask", "answer"),
    *("collect", "merge", "round_rows", "finish", "start"),
)


def main() -> None:
    """Profile, or only run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="one small call each, not profiled")
    small = parser.parse_args().small
    clusterings = ((294_805, 384, "float32"), (2_250_000, 768, "bfloat16"))
    for rows, dim, scalar in clusterings[: 1 if small else None]:
        x = gpu.mixture(rows, dim, scalar, "cuda")
        clustering(x, small)
        del x
    queries, items, dim = (4096, 200_000, 768) if small else (16_384, 1_305_265, 768)
    search(gpu.mixture(queries + items, dim, "float32", "cuda"), queries, small)


def clustering(x: torch.Tensor, small: bool) -> None:
    """Milliseconds of each level of a tree, kernel by kernel."""
    times = launches(lambda: ngame.balanced_clusters(x, size=32, refine=0), small)
    if not times:
        return
    print(
        f"{tuple(x.shape)} {x.dtype}: peak {peak():.1f} GiB; ms by level: learn (where one kernel "
        "does it), score_rows, split"
    )
    one_kernel = [0.0] * (len(times["split"]) - len(times["learn"])) + times["learn"]
    levels = zip(one_kernel, times["score_rows"], times["split"], strict=True)
    for level, each in enumerate(levels):
        print(f"{level:2d} " + " ".join(f"{ms:8.3f}" for ms in each))
    print_sums(times)
    print("refined, launches and ms:")
    print_sums(launches(lambda: ngame.balanced_clusters(x, size=32), small))


def search(x: torch.Tensor, queries: int, small: bool) -> None:
    """Launches and milliseconds of each kernel of a search."""
    times = launches(lambda: ngame.topk_arrays(x[:queries], x[queries:], 100), small)
    if not times:
        return
    print(f"top-100 of {queries} x {len(x) - queries} x {x.shape[1]}: peak {peak():.1f} GiB")
    print_sums(times)


def print_sums(times: dict[str, list[float]]) -> None:
    """Launches and milliseconds of each kernel, the longest first."""
    sums = {kernel: (len(each), round(sum(each), 2)) for kernel, each in times.items()}
    print(dict(sorted(sums.items(), key=lambda item: -item[1][1])))


def launches(work: Callable[[], Any], small: bool) -> dict[str, list[float]]:
    """Milliseconds of each launch in turn, by kernel; nothing if `small`."""
    work()
    torch.cuda.synchronize()
    if small:
        return {}
    torch.cuda.reset_peak_memory_stats()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as taken:
        work()
        torch.cuda.synchronize()
    times = defaultdict(list)
    kernels = [e for e in taken.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    for event in sorted(kernels, key=lambda event: event.time_range.start):
        known = [kernel for kernel in KERNELS if f"::{kernel}" in event.name]
        times[known[0] if known else event.name[:50]].append(event.time_range.elapsed_us() / 1e3)
    return times


def peak() -> float:
    """GiB."""
    return torch.cuda.max_memory_allocated() / 2**30


if __name__ == "__main__":
    main()

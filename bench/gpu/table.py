"""Time the GPU core beside the limits of the card: one table, each row checked.

    PYTHONPATH=bench python -m gpu -o rows.jsonl    # in the repository's root

Times are of CUDA events, medians after a warm-up. The floors beside them are the bytes that must
move, at the rate of a copy that is measured first, or the bfloat16 matrix product alone. The exit
status is 2 if the machine lacks something, which one line says, and 1 if an answer is wrong.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from run import seconds

ROUNDS = 7
SEEDS = 4
QUALITY = 0.998  # least share of the CPU's coherence, by the means of SEEDS seeds
CLUSTER = 32
REFINED = 5  # rounds, the default
MANY_ROWS = 1_000_000  # of which the CPU refines one seed alone
NEAREST = 100
CHECKED_QUERIES = 32


@dataclass(frozen=True)
class Sizes:
    """The sizes of everything that is timed."""

    clusterings: tuple[tuple[int, int, str, str], ...] = (
        (294_805, 384, "float32", "40 ms"),
        (2_250_000, 768, "bfloat16", "0.5 s"),
    )
    """Rows, columns, type, and the time that is allowed."""
    search: tuple[int, int, int] = (100_000, 1_305_265, 768)
    """Queries, items, columns."""
    queries_at_once: int = 4096
    """Of the matrix product: as many as leave room for all their scores."""
    copied: int = 1 << 32
    """Bytes."""
    side: int = 8192
    """Of the square matrices whose product is the limit."""


@dataclass
class Row:
    """A line of the table."""

    what: str
    size: str = ""
    times: list[float] = field(default_factory=list)
    floor: float = 0.0
    bar: str = ""
    checked: str = ""
    passed: bool = True

    def cells(self) -> list[str]:
        """The cells of a row, as text."""
        median = statistics.median(self.times) if self.times else 0.0
        return [
            self.what,
            self.size,
            seconds(median) if self.times else "",
            seconds(min(self.times)) if self.times else "",
            seconds(self.floor) if self.floor else "",
            f"{median / self.floor:.1f}" if self.floor and self.times else "",
            self.bar,
            self.checked if self.passed else f"**{self.checked or 'failed'}**",
        ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Time all there is, or say what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON lines, a row each, written at once")
    options = parser.parse_args(arguments)
    import torch

    from ngame import cuda

    lacking = "a GPU that torch sees"
    if torch.cuda.is_available():
        lacking = cuda.why_not(torch.device("cuda"))
    if lacking:
        print(f"gpu: this machine lacks what is timed: {lacking}", file=sys.stderr)
        return 2
    return report(timings("cuda", Sizes()), options.output)


def report(rows: Iterator[Row], output: Path | None) -> int:
    """Write each row at once, print the table at the end; return 1 if a row failed."""
    kept = []
    for row in rows:
        say(" | ".join(row.cells()))
        kept.append(row)
        if output is not None:
            with output.open("a", encoding="utf8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    print("\n".join(table(kept)))
    return 0 if all(row.passed for row in kept) else 1


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown."""
    return [
        "| what | size | median | lowest | floor | / floor | bar | checked |",
        "|---|---|---:|---:|---:|---:|---|---|",
        *(f"| {' | '.join(row.cells())} |" for row in rows),
    ]


def say(text: str) -> None:
    """Print progress."""
    print(text, file=sys.stderr, flush=True)


def timings(device: str, sizes: Sizes) -> Iterator[Row]:
    """The machine's limits, then every clustering and the search."""
    copied, multiplied = limits(device, sizes)
    yield copied
    yield multiplied
    bandwidth = 2 * sizes.copied / statistics.median(copied.times)
    for rows, dim, scalar, bar in sizes.clusterings:
        yield from clusterings(device, rows, dim, scalar, bar, bandwidth)
    yield from search(device, sizes)


def limits(device: str, sizes: Sizes) -> tuple[Row, Row]:
    """A copy of memory, and a bfloat16 matrix product, of random numbers."""
    copied, multiplied = copy_times(device, sizes.copied), product_times(device, sizes.side)
    moved = 2 * sizes.copied / statistics.median(copied)
    done = 2 * sizes.side**3 / statistics.median(multiplied)
    return (
        Row("limit: copy", f"{sizes.copied:,} bytes", copied, checked=f"{moved / 1e12:.2f} TB/s"),
        Row(
            "limit: bfloat16 product",
            " x ".join([str(sizes.side)] * 3),
            multiplied,
            checked=f"{done / 1e12:.0f} TFLOP/s",
        ),
    )


def copy_times(device: str, size: int) -> list[float]:
    """Times of copies; each byte is read and written."""
    import torch

    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return timed(lambda: target.copy_(source), device)[0]


def product_times(device: str, side: int) -> list[float]:
    """Times of products of two square matrices."""
    import torch

    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    return timed(lambda: torch.mm(left, right, out=product), device)[0]


def clusterings(
    device: str, rows: int, dim: int, scalar: str, bar: str, bandwidth: float
) -> Iterator[Row]:
    """Clusters of 32, of the tree and refined: sizes exact, as tight as the CPU's of the same."""
    import numpy as np
    import torch

    import ngame

    x = mixture(rows, dim, scalar, device)
    # NumPy has no bfloat16. float16 rounds differently, which hardly changes the clusters.
    host = (x if x.dtype == torch.float32 else x.half()).cpu().numpy()
    # At least every element is read once, and one id a row is written.
    floor = (x.numel() * x.element_size() + 4 * rows) / bandwidth
    for refine in (0, REFINED):
        cluster = partial(ngame.balanced_clusters, size=CLUSTER, refine=refine)
        times, found = timed(partial(cluster, x), device)
        ours, theirs, exact = [], [], True
        for seed in range(SEEDS if rows < MANY_ROWS or not refine else 1):
            # The result that was timed is one of those checked.
            tree = cluster(x, seed=seed) if seed else found
            expected = cluster(host, seed=seed)
            exact = exact and np.array_equal(tree.offsets, expected.offsets)
            exact = exact and np.array_equal(np.sort(tree.order), np.arange(rows))
            ours.append(tree.coherence(host))
            theirs.append(expected.coherence(host))
        quality = sum(ours) / sum(theirs)
        yield Row(
            f"clusters of {CLUSTER}" + (f", {refine} rounds of refinement" if refine else ""),
            f"{rows:,} x {dim} {scalar}",
            times,
            floor,
            f"quality at least {QUALITY}" + ("" if refine else f", under {bar}"),
            f"{'sizes exact' if exact else 'sizes wrong'}, coherence {quality:.4f} of the CPU's",
            exact and quality >= QUALITY,
        )


def search(device: str, sizes: Sizes) -> Iterator[Row]:
    """The exact search beside the matrix product alone."""
    import torch
    import torch.nn.functional as F

    import ngame

    queries_count, items_count, dim = sizes.search
    x = mixture(queries_count + items_count, dim, "float32", device)
    queries, items = x[:queries_count], x[queries_count:]
    k = min(NEAREST, items_count)
    alone = block_times(queries, items, sizes.queries_at_once, device)
    size = f"{queries_count:,} x {items_count:,} x {dim}"
    yield Row("bfloat16 product alone", size, alone)
    times, (scores, ids) = timed(lambda: ngame.topk_arrays(queries, items, k), device)
    # Of the result that was timed, queries from first to last.
    some = torch.linspace(0, queries_count - 1, min(CHECKED_QUERIES, queries_count)).long()
    some = some.to(queries.device)
    scores, ids = scores[some], ids[some]
    cosines = F.normalize(queries[some].double()) @ F.normalize(items.double()).T
    best = cosines.topk(k).values
    found = cosines.gather(1, ids.long())
    # Compared in float64, to rounding: each rank is as good, and each score belongs to its id.
    wrong = ((found - best).abs() > 1e-7) | ((scores.double() - found).abs() > 1e-6)
    distinct = all(len(row.unique()) == k for row in ids)
    exact = distinct and not bool(wrong.any())
    floor = statistics.median(alone)
    yield Row(
        f"exact top-{k}",
        f"{size} float32",
        times,
        floor,
        "within 1.5 of the product",
        f"{len(some)} queries {'equal to' if exact else 'differ from'} float64",
        exact,
    )


def block_times(queries: Any, items: Any, at_once: int, device: str) -> list[float]:
    """Times of the bfloat16 product of all queries and items, a block of queries at once."""
    import torch

    # Rows of whole 16 bytes: with an odd number of items the library is six times as slow.
    padded = torch.nn.functional.pad(items.bfloat16(), (0, 0, 0, -len(items) % 8))
    left, right = queries.bfloat16(), padded.T
    product = torch.empty(at_once, len(padded), dtype=left.dtype, device=device)

    def multiply() -> None:
        for part in left.split(at_once):
            torch.mm(part, right, out=product[: len(part)])

    return timed(multiply, device)[0]


def timed(work: Callable[[], Any], device: str) -> tuple[list[float], Any]:
    """Seconds of each round, after one to warm up, and the result of the last."""
    import torch

    result = work()
    times = []
    for _ in range(ROUNDS):
        if device == "cpu":  # the emulation, in tests
            start = time.perf_counter()
            result = work()
            times.append(time.perf_counter() - start)
            continue
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        result = work()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) / 1e3)
    return times, result


def mixture(n: int, dim: int, scalar: str, device: str, seed: int = 0) -> Any:
    """The points of `inputs.mixture`, by the same recipe, drawn on a device."""
    import inputs
    import torch
    import torch.nn.functional as F

    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int) -> Any:
        return torch.randn(rows, dim, generator=generator, device=device)

    def choose(among: Any, rows: int) -> Any:
        drawn = torch.randint(len(among), (rows,), generator=generator, device=device)
        return among[drawn]

    topics = max(16, n // 50)
    parents = normal(round(topics**0.5))
    centres = choose(parents, topics) + 0.7 * normal(topics)
    x = torch.empty(n, dim, dtype=getattr(torch, scalar), device=device)
    for start in range(0, n, inputs.BLOCK):
        part = x[start : start + inputs.BLOCK]
        part.copy_(F.normalize(choose(centres, len(part)) + normal(len(part)), dim=1))
    return x

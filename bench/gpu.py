"""Build the GPU core, check it against the reference, then time it: one call, one table.

    python bench/gpu.py                             # needs a CUDA GPU, nvcc and torch
    python bench/gpu.py --train DATA --model MODEL  # and a training with that transformer
    python bench/gpu.py -o rows.jsonl               # also writes each row at once

The core is built for this GPU into a temporary folder; ``--installed`` uses the installed one.
Times are of CUDA events, medians after a warm-up. The floors beside them are the bytes that must
move, at the rate of a copy that is measured first, or the bfloat16 matrix product alone. If the
machine lacks something, one line says what, and the exit status is 2. If an answer is wrong or a
test fails, it is 1.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from run import seconds

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/test_cuda.py"]
# What is imported here or in the tests, and what builds the core.
MODULES = ("torch", "numpy", "scipy", "pytest", "hypothesis")
BUILDERS = ("scikit_build_core", "pybind11")

ROUNDS = 7
QUALITY = 0.998  # least share of the CPU's coherence
CLUSTER = 32
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
    """Build, then test and time in a process that imports what was built."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", metavar="DATA", help="data set to train on")
    parser.add_argument("--model", help="transformer to train: a folder or a name")
    parser.add_argument("-o", "--output", type=Path, help="JSON lines, a row each")
    parser.add_argument("--installed", action="store_true", help="build nothing")
    options = parser.parse_args(arguments)
    if (options.train is None) != (options.model is None):
        parser.error("--train and --model go together")
    lacking = missing(options.installed)
    if lacking:
        print(f"gpu.py: this machine lacks {', '.join(lacking)}", file=sys.stderr)
        return 2
    if options.installed:
        return report(measured(options), options.output)
    with tempfile.TemporaryDirectory() as folder:
        site = build(Path(folder))
        own = list(sys.argv[1:] if arguments is None else arguments)
        again = [sys.executable, str(Path(__file__).resolve()), *own, "--installed"]
        return subprocess.run(again, env={**os.environ, "PYTHONPATH": str(site)}).returncode


def missing(installed: bool) -> list[str]:
    """What the machine lacks, in words."""
    modules = MODULES if installed else MODULES + BUILDERS
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    if not installed and shutil.which("nvcc") is None:
        lacking.append("nvcc")
    if not installed and "_editable_skbc_ngame" in sys.modules:
        lacking.append("a place for a build, which the editable ngame hides (see --installed)")
    if "torch" not in lacking:
        import torch

        if not torch.cuda.is_available():
            lacking.append("a GPU that torch sees")
        elif installed:
            from ngame import cuda

            reason = cuda.why_not(torch.device("cuda"))
            if reason:
                lacking.append(f"a GPU core that can be used ({reason})")
    return lacking


def build(folder: Path) -> Path:
    """Install the package with both cores into a folder, and return where."""
    import torch

    site = folder / "site"
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    # A build folder of its own, so that the cache of the usual one does not change.
    command += ["--no-build-isolation", f"-Cbuild-dir={folder / 'build'}"]
    command += ["-Ccmake.define.NGAME_CUDA=ON"]
    command += [f"-Ccmake.define.CMAKE_CUDA_ARCHITECTURES={major}{minor}", ROOT]
    say("building")
    if subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit("gpu.py: the build failed")
    return site


def measured(options: argparse.Namespace) -> Iterator[Row]:
    """All rows. The tests run first: wrong code is not timed."""
    tests = tested("25 random shapes of each function", [])
    yield tests
    if not tests.passed:
        return
    yield from timings("cuda", Sizes())
    if options.train:
        yield from trained(options.train, options.model)
    for tool in ("memcheck", "racecheck"):
        what = f"compute-sanitizer {tool}"
        if shutil.which("compute-sanitizer") is None:
            yield Row(what, checked="not run: the tool is not there")
        else:
            yield tested(what, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"])


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


def tested(what: str, before: Sequence[str]) -> Row:
    """Run the tests that need a GPU, with the given runner."""
    say(what)
    start = time.perf_counter()
    done = subprocess.run(
        [*before, sys.executable, *TESTS],
        cwd=ROOT,
        # Without PyTorch's cache each tensor is its own allocation, so its bounds are checked.
        env={**os.environ, "PYTHONSAFEPATH": "1"}
        | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if before else {}),
        capture_output=True,
        text=True,
    )
    took = time.perf_counter() - start
    if done.returncode:
        say(done.stdout + done.stderr)
    summary = re.findall(r"\d+ (?:passed|failed|skipped|error)\w*", done.stdout)
    # A skipped test is a failure: these tests have all they need here.
    passed = done.returncode == 0 and not any("skipped" in part for part in summary)
    return Row(what, times=[took], checked=", ".join(summary) or "failed", passed=passed)


# Timings


def timings(device: str, sizes: Sizes) -> Iterator[Row]:
    """The machine's limits, then every clustering and the search."""
    copied, multiplied = limits(device, sizes)
    yield copied
    yield multiplied
    bandwidth = 2 * sizes.copied / statistics.median(copied.times)
    for rows, dim, scalar, bar in sizes.clusterings:
        yield clustering(device, rows, dim, scalar, bar, bandwidth)
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
    return timed(lambda: target.copy_(source), device)


def product_times(device: str, side: int) -> list[float]:
    """Times of products of two square matrices."""
    import torch

    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    return timed(lambda: torch.mm(left, right, out=product), device)


def clustering(device: str, rows: int, dim: int, scalar: str, bar: str, bandwidth: float) -> Row:
    """Clusters of 32: sizes exact, and as tight as the CPU's of the same points."""
    import numpy as np
    import torch

    import ngame

    x = mixture(rows, dim, scalar, device)
    times = timed(lambda: ngame.balanced_clusters(x, size=CLUSTER), device)
    found = ngame.balanced_clusters(x, size=CLUSTER)
    # NumPy has no bfloat16. float16 rounds differently, which hardly changes the clusters.
    host = (x if x.dtype == torch.float32 else x.half()).cpu().numpy()
    expected = ngame.balanced_clusters(host, size=CLUSTER, refine=0)  # the GPU core does not refine
    quality = found.coherence(host) / expected.coherence(host)
    exact = np.array_equal(found.offsets, expected.offsets)
    exact = exact and np.array_equal(np.sort(found.order), np.arange(rows))
    # At least every element is read once, and one id a row is written.
    floor = (x.numel() * x.element_size() + 4 * rows) / bandwidth
    return Row(
        f"clusters of {CLUSTER}",
        f"{rows:,} x {dim} {scalar}",
        times,
        floor,
        f"under {bar}, quality at least {QUALITY}",
        f"{'sizes exact' if exact else 'sizes wrong'}, coherence {quality:.4f} of the CPU's",
        exact and quality >= QUALITY,
    )


def search(device: str, sizes: Sizes) -> Iterator[Row]:
    """The exact search beside the matrix product alone."""
    import torch.nn.functional as F

    import ngame

    queries_count, items_count, dim = sizes.search
    x = mixture(queries_count + items_count, dim, "float32", device)
    queries, items = x[:queries_count], x[queries_count:]
    k = min(NEAREST, items_count)
    alone = block_times(queries, items, sizes.queries_at_once, device)
    size = f"{queries_count:,} x {items_count:,} x {dim}"
    yield Row("bfloat16 product alone", size, alone)
    times = timed(lambda: ngame.topk_arrays(queries, items, k), device)
    scores, ids = ngame.topk_arrays(queries[:CHECKED_QUERIES], items, k)
    cosines = F.normalize(queries[:CHECKED_QUERIES].double()) @ F.normalize(items.double()).T
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
        f"{CHECKED_QUERIES} queries {'equal to' if exact else 'differ from'} float64",
        exact,
    )


def block_times(queries: Any, items: Any, at_once: int, device: str) -> list[float]:
    """Times of the bfloat16 product of all queries and items, a block of queries at once."""
    import torch

    left, right = queries.bfloat16(), items.bfloat16().T
    product = torch.empty(at_once, len(items), dtype=left.dtype, device=device)

    def multiply() -> None:
        for part in left.split(at_once):
            torch.mm(part, right, out=product[: len(part)])

    return timed(multiply, device)


def timed(work: Callable[[], Any], device: str) -> list[float]:
    """Seconds of each round, after one to warm up."""
    import torch

    work()
    times = []
    for _ in range(ROUNDS):
        if device == "cpu":  # the emulation, in tests
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
            continue
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        work()
        events[1].record()
        torch.cuda.synchronize()
        times.append(events[0].elapsed_time(events[1]) / 1e3)
    return times


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


# Training


def trained(data: str, model: str) -> Iterator[Row]:
    """Epochs of a training with a transformer, and what its scorers reach."""
    say("training")
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = ["encoder.kind=transformer", f"encoder.model={model}", "device=cuda"]
        command = [sys.executable, "-m", "ngame.cli", "train", data, "-o", str(run)]
        command += [part for setting in settings for part in ("--set", setting)]
        # The child's output is progress.
        if subprocess.run(command, stdout=sys.stderr).returncode:
            yield Row("train", data, checked="failed", passed=False)
            return
        lines = (run / "log.jsonl").read_text(encoding="utf8").splitlines()
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf8"))
    yield from training_rows(Path(data).name, [json.loads(line) for line in lines], metrics)


def training_rows(
    name: str, log: Sequence[dict[str, Any]], metrics: dict[str, dict[str, float]]
) -> Iterator[Row]:
    """A row for each stage, whose times are epochs, and one for each scorer."""
    for stage in dict.fromkeys(entry["stage"] for entry in log):
        epochs = [entry for entry in log if entry["stage"] == stage]
        share = max(entry["refresh_share"] for entry in epochs)
        yield Row(
            f"train: an epoch of the {stage} stage",
            name,
            [entry["seconds"] for entry in epochs],
            bar="refresh under 1 %",
            checked=f"refresh {100 * share:.2f} % of an epoch at most",
        )
    for scorer, scored in metrics.items():
        values = ", ".join(f"{key} {100 * value:.2f}" for key, value in scored.items())
        yield Row(f"train: {scorer}", name, checked=values)


if __name__ == "__main__":
    sys.exit(main())

"""Run the benchmarks and write what they measured into bench/results/NOUN.md, losses too.

    python bench/run.py --peers PYTHON                  # all, for the record
    python bench/run.py bench/bench_topk.py             # one file: rewrites results/topk.md alone
    python bench/run.py --quick                         # small sizes, printed and not kept

Each file runs several times. In each pass ours and the peers take turns, so that other work on the
machine slows all of them; medians are over all rounds. The limit beside our seconds is the longer
of two times: for its bytes and for its operations, at the rates of this machine (limits.py). It is
there where a benchmark states its bytes or operations.

Only the table between the two markers of a results file is rewritten. The words around it stay, and
so does RESULTS.md: change its claims by hand when a number has changed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
BEGIN, END = "<!-- bench/run.py: begin -->\n", "<!-- bench/run.py: end -->\n"
OURS = "ours"
# Distributions whose versions are listed, where the peers' interpreter has them.
PEERS = (
    "libpecos",
    "faiss-cpu",
    "hnswlib",
    "napkinxc",
    "scikit-learn",
    "sparse-dot-topn",
    "torch",
    "numpy",
    "scipy",
)
# Keys of extra_info that have columns of their own.
COLUMNS = ("size", "bytes", "operations")

Benchmark = dict[str, Any]
Limits = dict[int, dict[str, float]]  # rates per second, by number of threads


def main() -> None:
    """Measure the machine, run each file, write or print its section."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: bench/bench_*.py")
    parser.add_argument("--quick", action="store_true", help="small sizes; print, do not keep")
    parser.add_argument(
        "--peers", default=sys.executable, metavar="PYTHON", help="interpreter that has the peers"
    )
    parser.add_argument("--embeddings", metavar="FILE", help="real embeddings, float32 .npy")
    parser.add_argument("--texts", metavar="FOLDER", help="a data set with test points")
    parser.add_argument("--passes", type=int, default=3, help="times that each file is run")
    options = parser.parse_args()
    arguments = ["--peers", options.peers]
    if options.embeddings:
        arguments += ["--embeddings", options.embeddings]
    if options.texts:
        arguments += ["--texts", str(Path(options.texts).resolve())]
    if options.quick:
        arguments.append("--quick")
    versions = peer_versions(options.peers)
    for file in options.files or sorted(HERE.glob("bench_*.py")):
        before = measured_limits()
        passes = [run(file, arguments) for _ in range(1 if options.quick else options.passes)]
        limits = better(before, measured_limits())
        text = section(file, passes, limits, versions)
        if options.quick:
            print(text)
        else:
            page = RESULTS / f"{noun(file)}.md"
            old = page.read_text(encoding="utf8") if page.exists() else f"# {noun(file)}\n"
            page.write_text(replaced(old, text), encoding="utf8")


def measured_limits() -> Limits:
    """The output of limits.py, by the number of threads."""
    done = subprocess.run(
        [sys.executable, HERE / "limits.py"],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    return {int(threads): rates for threads, rates in json.loads(done.stdout).items()}


def better(first: Limits, second: Limits) -> Limits:
    """The higher of each pair of rates: other work can only lower them."""
    return {
        threads: {name: max(rate, second[threads][name]) for name, rate in rates.items()}
        for threads, rates in first.items()
    }


def peer_versions(python: str) -> dict[str, str]:
    """Versions of the peers that an interpreter has."""
    code = (
        "import json, sys\n"
        "from importlib.metadata import distributions\n"
        "found = {d.metadata['Name'].lower(): d.version for d in distributions()}\n"
        "print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))"
    )
    done = subprocess.run([python, "-c", code, *PEERS], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


def run(file: Path, arguments: list[str]) -> dict[str, Any]:
    """Run one file once and return pytest-benchmark's report. A failure ends the program."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pytest", "-q", str(file), *arguments]
        done = subprocess.run([*command, f"--benchmark-json={report}"], stdout=sys.stderr)
        if done.returncode:
            sys.exit(f"{file} failed: nothing is written of it")
        return dict(json.loads(report.read_text(encoding="utf8")))


def section(
    file: Path,
    passes: list[dict[str, Any]],
    limits: Limits,
    versions: dict[str, str],
) -> str:
    """The Markdown of one file."""
    machine, commit = passes[0]["machine_info"], passes[0]["commit_info"]
    rates = "; ".join(
        f"{threads} thread{'s' * (threads > 1)}: copy {rate['copy'] / 1e9:.1f} GB/s, "
        f"read {rate['read'] / 1e9:.1f} GB/s, float32 product {rate['product'] / 1e9:.0f} GFLOP/s"
        for threads, rate in limits.items()
    )
    peers = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "## Speed",
        "",
        f"- Command: `python bench/run.py bench/{file.name}`, "
        f"{len(passes)} pass{'es' * (len(passes) > 1)}",
        f"- Date: {date.today()}, commit {commit['id'][:10]}"
        f"{' with changes' if commit['dirty'] else ''}",
        f"- Machine: {machine['cpu']}, {machine['cpus']} CPUs, {machine['memory_gb']} GB, "
        f"SIMD {machine['simd']}",
        f"- System: {machine['system']}",
        f"- Versions: Python {machine['python']}, NumPy {machine['numpy']}, "
        f"SciPy {machine['scipy']}",
        f"- Peers: {peers}",
        f"- Limits of the machine, the better of before and after: {rates}",
        "",
        *table(merged(passes), limits),
    ]
    return "\n".join(lines)


def merged(passes: list[dict[str, Any]]) -> list[Benchmark]:
    """The benchmarks of all passes, each with the seconds of every round."""
    found: dict[str, Benchmark] = {}
    for one in passes:
        for benchmark in one["benchmarks"]:
            known = found.setdefault(benchmark["fullname"], {**benchmark, "seconds": []})
            known["seconds"] += benchmark["stats"]["data"]
    return list(found.values())


def table(benchmarks: list[Benchmark], limits: Limits) -> list[str]:
    """A row for ours and for each peer at the same work, then the list of losses."""
    lines = [
        "| what | size | who | median | lowest | / ours | quality | limit | / limit |",
        "|---|---|---|---:|---:|---:|---|---:|---:|",
    ]
    same: dict[str, dict[str, Benchmark]] = defaultdict(dict)
    for benchmark in benchmarks:
        parameters = dict(benchmark["params"] or {})
        who = str(parameters.pop("who", OURS))
        name = benchmark["name"].partition("[")[0].removeprefix("test_").replace("_", " ")
        values = [f"{key} {value}" for key, value in parameters.items()]
        same[", ".join([name, *values])][who] = benchmark
    losses = []
    for what, everyone in same.items():
        ours = everyone.get(OURS)
        for who, benchmark in sorted(everyone.items(), key=lambda item: item[0] != OURS):
            extra = benchmark["extra_info"]
            median = statistics.median(benchmark["seconds"])
            ratio, floor, distance = "", "", ""
            if who != OURS and ours is not None:
                times = median / statistics.median(ours["seconds"])
                ratio = f"{times:.2f}"
                if times < 1:
                    losses.append(f"{what}: {who}")
            if who == OURS and (least := limit(benchmark, limits)):
                floor, distance = seconds(least), f"{median / least:.1f}"
            quality = ", ".join(
                f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
                for key, value in extra.items()
                if key not in COLUMNS
            )
            cells = [
                what,
                extra.get("size", ""),
                who,
                seconds(median),
                seconds(min(benchmark["seconds"])),
                ratio,
                quality,
                floor,
                distance,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lost = "; ".join(losses) if losses else "nowhere"
    return [*lines, "", f"Faster than ours: {lost}.", ""]


def limit(benchmark: Benchmark, limits: Limits) -> float:
    """Least seconds for the bytes and operations that a benchmark states; 0 where it states none.

    For the number of threads in its parameter `threads`, else for the most that were measured.
    """
    threads = (benchmark["params"] or {}).get("threads", max(limits))
    rates = limits.get(threads, limits[max(limits)])
    extra: dict[str, float] = benchmark["extra_info"]
    return max(
        extra.get("bytes", 0) / max(rates["copy"], rates["read"]),
        extra.get("operations", 0) / rates["product"],
    )


def seconds(value: float) -> str:
    """About three digits and a unit."""
    unit, scale = next(
        (pair for pair in (("s", 1.0), ("ms", 1e-3)) if value >= pair[1]), ("µs", 1e-6)
    )
    scaled = value / scale
    return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f} {unit}"


def noun(file: Path) -> str:
    """What a file is about: cluster of bench_cluster.py."""
    return file.stem.removeprefix("bench_")


def replaced(page: str, text: str) -> str:
    """A results page with the part between the markers replaced, or added at the end."""
    block = f"{BEGIN}{text}{END}"
    before, found, rest = page.partition(BEGIN)
    if not found:
        return f"{page.rstrip()}\n\n{block}"
    return before + block + rest.partition(END)[2]


if __name__ == "__main__":
    main()

"""What the GPU core costs by count, without a GPU: registers, and a predicted time of each target.

    PYTHONPATH=bench python -m gpu.counts FOLDER    # in the repository's root; in minutes

Needs nvcc, c++ and nvdisasm (a part of the toolkit, also `pip install nvidia-cuda-nvdisasm`).
FOLDER keeps what is compiled. Warnings are errors. Launches, copies and waits are those of the
compiled host code, linked with `launches.cpp` instead of the CUDA runtime. Issue slots are counted
in the machine code for sm_90a: the length of a loop, found by a line of its source, times its
trips. Bytes and trips are worked out here.
"""

import argparse
import math
import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

SOURCES = Path(__file__).parent.parent.parent / "csrc" / "cuda"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-lineinfo", "-c", "-Xptxas=-v")
STRICT = ("-Xcompiler=-Wall,-Wextra,-Werror,-fPIC", "-Werror=all-warnings")

# An H100 SXM. The first two were measured: a copy, and products of bfloat16 rows of 768, as long as
# the search's; of rows of 8,192 it is 776e12.
BANDWIDTH = 3.0e12  # bytes/s
PRODUCTS = 605e12  # operations/s
CLOCK, PROCESSORS, ISSUES = 1.755e9, 132, 4  # instructions of a warp that begin in a cycle
SLOTS = CLOCK * PROCESSORS * ISSUES
CACHE, CACHE_BANDWIDTH = 50e6, 5.5e12  # the second level, bytes and bytes/s
FAR, NEAR = 0.7e-6, 0.3e-6  # seconds until a load is there: from memory, from the cache
LAUNCH = 2.5e-6  # seconds from one launch to the next at least: the host's time
GAP = 1e-6  # seconds between two kernels that follow each other at once

# What depends on the data, by the mixture of the benchmarks.
# Rounds of 2-means until no row moves: means of 60,000 points, by nodes of so many rows at most.
ROUNDS = {64: 3, 128: 5, 256: 7, 512: 10, 1152: 12}
LARGE_ROUNDS = 8  # of larger nodes
ALL_ROUNDS = 20  # are launched where blocks share a node: from its last one on they do nothing
# Of the rows of a node, those that move in all rounds of 2-means.
MOVED = 0.6
# Candidates of a query that `merge` looks through, and those that it scores exactly at the end:
# means of 24 queries among 300,000 points.
LOOKED_THROUGH, SCORED = 5000, 224
# Passes over the digits of keys until one is found.
DIGITS = 3


@dataclass(frozen=True)
class Target:
    """What is counted, and where its launches have come to."""

    rows: int
    cols: int
    size: int = 4
    """Bytes of an element."""
    queries: int = 0
    level: int = 0
    """Of the tree."""
    met: tuple[int, int] = (0, 0)
    """Queries and items of the last product."""

    @property
    def steps(self) -> int:
        """Of a warp along a row, 16 bytes a lane."""
        return math.ceil(self.cols * self.size / 512)

    @property
    def row(self) -> int:
        """Bytes."""
        return self.cols * self.size

    @property
    def node(self) -> int:
        """Rows of a node of this level."""
        return math.ceil(self.rows / 2**self.level)

    @property
    def learned(self) -> int:
        """Rows of a node that its direction is learned from."""
        return min(self.node, 8192)


@dataclass(frozen=True)
class Work:
    """Of a launch."""

    bytes: float = 0
    near_bytes: float = 0
    """Read from the cache."""
    slots: float = 0
    chain: float = 0
    """Seconds of loads that wait for each other."""

    @property
    def times(self) -> dict[str, float]:
        """Seconds, by what limits them."""
        return {
            "bytes": self.bytes / BANDWIDTH,
            "cache": self.near_bytes / CACHE_BANDWIDTH,
            "slots": self.slots / SLOTS,
            "waits": self.chain,
        }


@dataclass(frozen=True)
class Op:
    """An instruction and the line of source that it comes from."""

    text: str
    file: str
    line: int


@dataclass
class Code:
    """The machine code of a kernel: instructions, and the labels before them."""

    name: str
    ops: list[Op]
    labels: dict[str, int]

    @cached_property
    def loops(self) -> list[tuple[int, int]]:
        """First and last instruction of each."""
        found = []
        for place, op in enumerate(self.ops):
            jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", op.text)
            if jump and self.labels.get(jump[1], place) < place:
                found.append((self.labels[jump[1]], place))
        return found

    def own(self, first: int, last: int) -> int:
        """Instructions of a loop outside of those within it."""
        within: set[int] = set()
        for other, end in self.loops:
            if first <= other and end <= last and (other, end) != (first, last):
                within.update(range(other, end + 1))
        return last - first + 1 - len(within)

    @property
    def once(self) -> int:
        """Instructions in no loop; seldom are all of them run."""
        return self.own(-1, len(self.ops)) - 2

    def places(self, file: str, source: str, kind: str = "LDG") -> list[int]:
        """The instructions of a kind that come from the line that has this text."""
        lines = (SOURCES / file).read_text(encoding="utf8").splitlines()
        (line,) = (number for number, text in enumerate(lines, 1) if source in text)
        return [
            place
            for place, op in enumerate(self.ops)
            if (op.file, op.line) == (file, line) and kind in op.text
        ]

    def trip(self, file: str, source: str, loads: int = 1) -> float:
        """Slots of a trip of the loop that does the load of a line so many times a trip.

        Where the compiler has made several of one, or unrolled it, those of the shortest trip.
        """
        places = self.places(file, source)
        trips = []
        for first, last in self.loops:
            count = sum(first <= place <= last for place in places)
            inner = any(
                first <= other and end <= last and (other, end) != (first, last)
                for other, end in self.loops
                if any(other <= place <= end for place in places)
            )
            if count and not inner:
                trips.append(self.own(first, last) * loads / count)
        if not trips:
            raise LookupError(f"{self.name} has no loop that loads what {file} has in {source!r}")
        return min(trips)


@dataclass(frozen=True)
class Launch:
    """A kernel's launch."""

    kernel: str
    blocks: int
    threads: int
    shared: int
    code: Code
    target: Target
    resident: int
    """Blocks that run at once."""

    @property
    def warps(self) -> int:
        """Of all blocks."""
        return self.blocks * self.threads // 32

    @property
    def waves(self) -> int:
        """How often all processors are filled."""
        return math.ceil(self.blocks / self.resident)


def rounds(node: int) -> int:
    """Of 2-means on a node."""
    return next((n for most, n in ROUNDS.items() if node <= most), LARGE_ROUNDS)


PROJECT = ("rows.h", "packs[row] = ")
PROJECT_ROW = ("rows.h", "scales[row] = inverse[id];")
ADD = ("cluster.cu", "id * x.stride + column);")
KEY = ("cluster.cu", "descending(-scores[position])")


def invert_norms(launch: Launch) -> Work:
    """A warp reads a row, an element a lane at a time."""
    t, code = launch.target, launch.code
    halves = "scalar.h", "static_cast<uint32_t>(value.bits) << 16"  # in a function of their own
    trip = code.trip(*(halves if t.size == 2 else ("cluster.cu", "= to_float(from[column]);")))
    return Work(t.rows * (t.row + 8), 0, launch.warps * (code.once + t.cols / 32 * trip))


def score_rows(launch: Launch) -> Work:
    """A warp finds the node of a row and reads the row."""
    t, code = launch.target, launch.code
    search = code.trip("cluster.cu", "first + half].begin <= position")
    slots = code.once + t.level * search + t.steps * code.trip(*PROJECT)
    chain = launch.waves * (t.level * NEAR / 2 + NEAR + 2 * FAR) / 8  # warps of a block come and go
    return Work(t.rows * (t.row + 12), 0, launch.warps * slots, chain)


def project(launch: Launch, rows: int, code: Code) -> float:
    """Slots of the products of so many rows with a direction, by warps of four at once."""
    t = launch.target
    return rows / 4 * (t.steps * code.trip(*PROJECT, 4) + code.trip(*PROJECT_ROW, 4))


def learn(launch: Launch) -> Work:
    """A block learns the direction of a node: its rows are read again and again."""
    t, code = launch.target, launch.code
    n, r = t.learned, rounds(t.node)
    products, sums = 2 + r, 3 + r
    all_sums = 3 + MOVED
    trips = math.ceil(n / 64)
    slots = products * project(launch, n, code) + n / 4 * t.steps * sums * code.trip(*ADD, 4)
    slots += (r * DIGITS + 2) * n / 32 * code.trip(*KEY)
    # Blocks that run at once share the cache.
    fits = min(launch.blocks, launch.resident) * n * t.row <= CACHE
    read = launch.blocks * n * t.row
    again = read * (products + all_sums - 1)
    wait = NEAR if fits else FAR
    chain = products * trips * (2 * NEAR + t.steps * wait) + t.steps * trips * (
        all_sums * 2 * NEAR + all_sums * wait + (sums - all_sums) * NEAR
    )
    chain += r * (DIGITS * (math.ceil(n / 512) + 4) + 4) * NEAR
    return Work(
        read + (0 if fits else again),
        again if fits else 0,
        launch.blocks * slots,
        launch.waves * chain,
    )


def spread_rows(launch: Launch, passes: float) -> tuple[int, float, float, float]:
    """Of a launch of which all those of a level make so many passes over the rows.

    Rows of a block, seconds until one of them is there, bytes from memory and from the cache.
    """
    t = launch.target
    nodes = 2**t.level
    read = nodes * t.learned * t.row
    share = passes / (2 + ALL_ROUNDS)
    fits = read <= CACHE
    own = math.ceil(nodes * t.learned / launch.blocks)
    return own, NEAR if fits else FAR, 0 if fits else share * read, share * read if fits else 0


def spread_project(launch: Launch) -> Work:
    """All blocks share the rows of all nodes."""
    own, wait, far, near = spread_rows(launch, 2 + LARGE_ROUNDS)
    slots = launch.blocks * project(launch, own, launch.code)
    chain = math.ceil(own / 64) * (2 * NEAR + launch.target.steps * wait)
    return Work(far, near, slots, chain)


def spread_add(launch: Launch) -> Work:
    """The same rows as a sum; in rounds of 2-means those that have not moved are not read."""
    own, wait, far, near = spread_rows(launch, 3 + MOVED)
    steps = launch.target.steps
    slots = launch.blocks * own / 4 * steps * launch.code.trip(*ADD, 4)
    share = (3 + MOVED) / (3 + ALL_ROUNDS)
    chain = steps * (math.ceil(own / 64) * (2 * NEAR + share * wait) + 2 * NEAR)
    return Work(far, near, slots, chain)


def spread_weigh(launch: Launch) -> Work:
    """A block finds the middle of a node's scores."""
    n, code = launch.target.learned, launch.code
    passes = DIGITS + 1
    slots = launch.blocks * passes * n / 32 * code.trip(*KEY)
    return Work(0, 0, slots, passes * (math.ceil(n / 512) + 4) * NEAR)


def spread_turn(launch: Launch) -> Work:
    """A block adds up the sums of a node's blocks, four loads at once."""
    parts = 264 // launch.blocks
    sums = math.ceil(launch.target.cols / 512) * math.ceil(parts / 4)
    near = launch.blocks * parts * launch.target.cols * 4
    return Work(0, near, 0, (sums + 12) * NEAR)


def split(launch: Launch) -> Work:
    """A block orders the rows of a node."""
    t, code = launch.target, launch.code
    trips = math.ceil(t.node / 512)
    digits = DIGITS
    slots = launch.blocks * digits * t.node / 32 * code.trip(*KEY)
    chain = (digits * (trips + 4) + 2 * trips + trips / 4) * NEAR
    return Work(t.rows * 4 * 4, t.rows * 4 * (digits + 1), slots, launch.waves * chain)


def round_rows(launch: Launch) -> Work:
    """A warp reads a row twice, the second time from the nearest cache, and writes it rounded."""
    t, code = launch.target, launch.code
    rows = launch.warps
    trips = code.trip("topk.cu", "= to_float(from[column]);")
    trips += code.trip("topk.cu", "to_float(from[column]) * scale;")
    slots = rows * (code.once + t.cols / 32 * trips)
    return Work(rows * (t.row + 2 * t.cols + 16), 0, slots)


def collect(launch: Launch) -> Work:
    """A warp reads 2,048 scores, 256 at once, and looks closely at few."""
    queries, items = launch.target.met
    # Of the loop as far as it goes where no score passes.
    load = launch.code.places("topk.cu", "(column < size ? column : 0) / 8];")[-1]
    first, last = next(loop for loop in launch.code.loops if loop[0] <= load <= loop[1])
    vote = next(i for i in range(load, last) if "VOTE" in launch.code.ops[i].text)
    trips = queries * items / 256
    slots = trips * (vote - first + 8) + launch.warps * 150
    return Work(queries * items * 2, 0, slots, launch.waves * FAR / 5)


def merge(launch: Launch) -> Work:
    """A block looks at how many candidates a query has: most often they can wait."""
    return Work(0, 0, launch.blocks * 8 * 30, launch.waves * 2 * NEAR)


def finish(launch: Launch) -> Work:
    """A block sorts 128 keys in 28 steps."""
    return Work(launch.blocks * 128 * 8 * 2, 0, 0, launch.waves * 30 * NEAR)


def little(launch: Launch) -> Work:
    """A few loads a thread."""
    return Work(0, 0, launch.warps * launch.code.once, 2 * FAR)


WORK: dict[str, Callable[[Launch], Work]] = {
    "invert_norms": invert_norms,
    "score_rows": score_rows,
    "learn": learn,
    "spread_sample": little,
    "spread_project": spread_project,
    "spread_weigh": spread_weigh,
    "spread_add": spread_add,
    "spread_turn": spread_turn,
    "split": split,
    "round_rows": round_rows,
    "collect": collect,
    "merge": merge,
    "start": little,
    "finish": finish,
}


def candidates(target: Target) -> Work:
    """What `merge` does with all candidates, in its few launches that do not wait."""
    # A pass reads the candidate, 8 bytes, and 32 bytes around its item's margin.
    passes = DIGITS + 2
    return Work(
        target.queries * SCORED * target.row, target.queries * LOOKED_THROUGH * passes * 40, 0, 0
    )


@dataclass(frozen=True)
class Resources:
    """What the compiler says of a kernel."""

    registers: int
    spilled: int
    """Bytes stored and loaded."""
    shared: int
    """Bytes, besides what a launch asks for."""


@dataclass
class Built:
    """All that is compiled."""

    resources: dict[str, dict[str, Resources]]
    """By architecture and kernel."""
    codes: dict[str, Code]
    program: Path
    """The host code, linked with `launches.cpp`."""


def run(*command: object) -> str:
    """What a command says on both streams; its words if it fails."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def build(folder: Path) -> Built:
    """Compile every file for sm_80, sm_90a and the newest architecture that nvcc knows."""
    newest = max(run("nvcc", "--list-gpu-arch").split(), key=lambda name: int(name[8:]))
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ("80", "90a")]
    targets.append(f"-gencode=arch={newest},code={newest}")

    def compile(source: Path) -> str:
        kept = folder / source.stem
        kept.mkdir(parents=True, exist_ok=True)
        target = ("-o", folder / f"{source.stem}.o", "--keep", "--keep-dir", kept)
        return run("nvcc", *FLAGS, *STRICT, *targets, *target, source)

    sources = sorted(SOURCES.glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = list(pool.map(compile, sources))
    print(f"{len(sources)} files, no warning: sm_80, sm_90a, {newest}")
    resources: dict[str, dict[str, Resources]] = defaultdict(dict)
    for kernel, architecture, text in re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'\n((?:(?!.*Compiling entry).*\n)*)",
        "".join(said),
    ):
        spilled = [int(count) for count in re.findall(r"(\d+) bytes spill", text)]
        shared = re.search(r"(\d+) bytes smem", text)
        registers = re.search(r"Used (\d+) registers", text)
        assert registers
        resources[architecture][kernel] = Resources(
            int(registers[1]), sum(spilled), int(shared[1]) if shared else 0
        )
    codes: dict[str, Code] = {}
    for source in sources:
        (machine,) = (folder / source.stem).glob("*90a.cubin")
        codes |= {code.name: code for code in disassembled(run("nvdisasm", "-g", "-c", machine))}
    program = folder / "launches"
    objects = [folder / f"{name}.o" for name in ("cluster", "metrics", "refine", "topk")]
    stub = Path(__file__).with_name("launches.cpp")
    run("nvcc", "-std=c++17", "-cudart=none", "-o", program, stub, *objects)
    return Built(resources, codes, program)


def disassembled(text: str) -> Iterator[Code]:
    """The kernels of a listing of `nvdisasm -g -c`."""
    code, file, line = None, "", 0
    for row in text.splitlines():
        if start := re.match(r"\.text\.(\S+):$", row):
            if code is not None:
                yield code
            code = Code(start[1], [], {})
        elif source := re.match(r'\s*//## File "(.*?)", line (\d+)', row):
            file, line = Path(source[1]).name, int(source[2])
        elif code is not None and (label := re.match(r"(\.L_x_\d+):", row)):
            code.labels[label[1]] = len(code.ops)
        elif code is not None and (op := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?) ?;", row)):
            code.ops.append(Op(op[1], file, line))
    if code is not None:
        yield code


def short(kernel: str) -> str:
    """The name of a kernel as the source has it, without its namespaces and types."""
    rest, name = kernel.removeprefix("_ZN"), ""
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    return name


def launches(built: Built, target: Target, *words: object) -> Iterator[Launch | str]:
    """What the host asks for, in order: launches, and the first words of other lines."""
    level, met = 0, (0, 0)
    for line in run(built.program, *words).splitlines():
        what, *given = line.split()
        if what == "product":
            met = (int(given[0]), int(given[1]))
        if what != "launch":
            yield line
            continue
        kernel = given[0]
        blocks, threads, shared = map(int, given[1:])
        registers = -(-built.resources["sm_90a"][kernel].registers // 8) * 8
        each = min(
            2048 // threads, 65536 // (registers * threads), (227 << 10) // (shared + 1024), 32
        )
        yield Launch(
            kernel, blocks, threads, shared, built.codes[kernel],
            replace(target, level=level, met=met), each * PROCESSORS,
        )  # fmt: skip
        level += short(kernel) == "split"


def resource_table(built: Built, shared: dict[str, int]) -> Iterator[str]:
    """Markdown: registers, spills and shared memory, by name; the most of all types."""
    yield "| kernel | types | registers, sm_80 | sm_90a | bytes spilled | shared memory, bytes |"
    yield "|---|---:|---:|---:|---:|---:|"
    kinds = defaultdict(list)
    for kernel in built.resources["sm_90a"]:
        if kernel.startswith("_ZN5ngame"):  # not the sorting library's
            kinds[short(kernel)].append(kernel)
    for name, kernels in sorted(kinds.items()):
        old = [used for k, used in built.resources["sm_80"].items() if short(k) == name]
        new = [built.resources["sm_90a"][kernel] for kernel in kernels]
        spilled = sum(used.spilled for used in (*old, *new))
        most = max(shared.get(name, 0), *(used.shared for used in (*old, *new)))
        cells = (
            name,
            len(kernels),
            max((u.registers for u in old), default=""),
            max(u.registers for u in new),
        )
        yield f"| {' | '.join(map(str, (*cells, spilled, most or '')))} |"


@dataclass
class Sum:
    """Of all launches of a kernel, or of some."""

    launches: int = 0
    bytes: float = 0
    slots: float = 0
    seconds: float = 0
    limits: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, work: Work, seconds: float, limit: str) -> None:
        """Count what takes so many seconds, for what limits it."""
        self.launches += 1
        self.bytes += work.bytes + work.near_bytes
        self.slots += work.slots
        self.seconds += seconds
        self.limits[limit] += seconds


def work_table(built: Built, target: Target, *words: object) -> Iterator[str]:
    """Markdown: what a target asks of the device, and what that takes at least."""
    sums: dict[str, Sum] = defaultdict(Sum)
    others: Counter[str] = Counter()
    for event in launches(built, target, *words):
        if isinstance(event, str):
            what, *sizes = event.split()
            others[what] += 1
            if what == "product":
                queries, items = map(int, sizes)
                work = Work(2 * (queries * items + (queries + items) * target.cols))
                seconds = 2 * queries * items * target.cols / PRODUCTS
                sums["the library's product"].add(work, seconds, "operations")
                continue
        else:
            name = short(event.kernel)
            work = WORK[name](event)
            limit = max(work.times, key=lambda name: work.times[name])
            seconds = GAP + work.times[limit]
            sums[name].add(work, max(LAUNCH, seconds), "launches" if seconds < LAUNCH else limit)
    if target.queries:
        work = candidates(target)
        parts = work.times["bytes"], work.times["cache"]
        # Of the launches above.
        sums["merge, where it does not wait"].add(work, sum(parts), "bytes, cache")
        sums["merge, where it does not wait"].launches = 0
    yield "| kernel | launches | GB | billion slots | predicted, ms | limit |"
    yield "|---|---:|---:|---:|---:|---|"
    total = Sum()
    for name, each in sorted(sums.items(), key=lambda item: -item[1].seconds):
        limit = max(each.limits, key=lambda name: each.limits[name])
        yield row(name, each, limit)
        total.launches += each.launches
        total.bytes += each.bytes
        total.slots += each.slots
        total.seconds += each.seconds
    yield row(
        "**all**", total, f"{others['wait']} waits, {others['copy']} copies, {others['fill']} fills"
    )


def row(name: str, each: Sum, limit: str) -> str:
    """A line of the table."""
    counts = f"{each.launches or ''} | {each.bytes / 1e9:.1f} | {each.slots / 1e9:.2f}"
    return f"| {name} | {counts} | {1e3 * each.seconds:.1f} | {limit} |"


def main() -> None:
    """Compile, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="for what is compiled")
    folder = parser.parse_args().folder
    missing = [tool for tool in ("nvcc", "nvdisasm") if shutil.which(tool) is None]
    if missing:
        raise SystemExit(f"gpu.counts: not on the path: {', '.join(missing)}")
    built = build(folder)
    targets = {
        "294,805 x 384 float32 into 32": (Target(294_805, 384), ("tree", 294_805, 384, "f32", 32)),
        "2,250,000 x 768 bfloat16 into 32": (
            Target(2_250_000, 768, 2), ("tree", 2_250_000, 768, "bf16", 32),
        ),
        "top-100, 100,000 x 1,305,265 x 768 float32": (
            Target(1_305_265, 768, queries=100_000), ("topk", 100_000, 1_305_265, 768, 100),
        ),
    }  # fmt: skip
    shared: dict[str, int] = {}
    kinds = [words for _, words in targets.values()] + [("rest",)]
    for words in kinds:
        for event in launches(built, Target(1, 1), *words):
            if isinstance(event, Launch):
                shared[short(event.kernel)] = event.shared
    print("\n".join(resource_table(built, shared)))
    for title, (target, words) in targets.items():
        print(f"\n{title}\n")
        print("\n".join(work_table(built, target, *words)))


if __name__ == "__main__":
    main()

"""The cost of clustering, by a model whose constants are measured: predicted beside measured.

    python bench/studies/scale.py

measures the constants on the first two sizes, on one process and on two, then prints a Markdown
table for the others: CPU seconds of a process, bytes it holds beyond the interpreter's, bytes it
gets from others, but for the sums of counts, 40 kB a cut. Last come sizes that do not fit here.
docs/scale.md says what the terms are.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SIZE, ROUNDS, DIM = 32, 5, 128
# Times that processes deal the rows, two to six: where they have not been counted.
DEALS = 4
# As in ngame/cluster: rows sampled for each eight parts, parts that a tree of cuts makes; and
# portions of a rank, an eighth of its bytes or so many.
SAMPLED, SAMPLED_A_DIMENSION, PARTS_A_TREE = 6144, 12, 16
PORTIONS, LEAST_PORTION = 8, 1 << 22
# What takes as long as so many products: a value that is sent, with its row gathered, scaled and
# rounded before; and a value that meets the cuts.
SENT, CUT = 40, 30
MB = 1e6


@dataclass
class Cost:
    """Of one process."""

    products: float  # multiplications, each with an addition
    held: float  # bytes
    received: float  # bytes


def model(n: float, dim: int, size: int, item: int, processes: int, deals: float = DEALS) -> Cost:
    """What a process does, holds and gets: its share of n rows of `dim` columns, `item` bytes each.

    Products: some nine for each level of the tree and column; of each round the 64 clusters listed
    and two passes over the row, and for each cluster the search for them among 32 for each of its
    rows, and of its group, of 16, among all groups, or of more than 4,096 among 2,048, which are
    found by groups of four.
    """

    def of_groups(groups: float) -> float:
        return groups if groups <= 4096 else of_groups(groups / 4) / 4 + 2048

    share = n / processes
    row = dim * item
    # Rows travel as float16.
    room = max(share * row // PORTIONS, LEAST_PORTION)
    portions = 1 if processes == 1 else max(math.ceil(share * 2 * dim / room), 1)
    portion = share / portions
    levels = math.log2(n / size)
    searched = min(max(32 * size, 256), 1024, n / size) + of_groups(portion / size / 16) / 16
    of_round = 66 + searched / size
    rounds = ROUNDS if processes == 1 else deals * -(-ROUNDS // 2)
    products = share * dim * (9 * levels + rounds * of_round)
    held = share * row + 4 * dim * share / size
    if processes == 1:
        return Cost(products, held + 84 * n, 0)
    others = (processes - 1) / processes
    held += portion * (2 * dim + 84) + 12 * share + 20 * n
    # Rows are dealt to the parts, then clusters are: by trees of cuts, each learnt on a sample.
    parts = processes * portions
    of_tree = min(parts, PARTS_A_TREE)
    trees = math.ceil((parts - 1) / (PARTS_A_TREE - 1))
    drawn = max(SAMPLED, SAMPLED_A_DIMENSION * dim) * math.ceil(of_tree / 8)
    sampled = trees * (drawn + (deals - 1) * min(drawn, n / size / trees))
    products += sampled * dim * 9 * math.log2(of_tree) + share * dim * (CUT + deals * SENT)
    received = (
        deals * others * (share * (2 * dim + 4) + 4 * n) + (deals - 1) * others * 4 * n / size
    )
    received += sampled * 4 * dim * others
    return Cost(products, held, received)


def main() -> None:
    """Measure the constants, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[200_000, 400_000, 300_000, 600_000, 800_000]
    )
    options = parser.parse_args()
    pairs = " | predicted | ".join(("CPU s", "held, MB", "got, MB"))
    print(f"| rows | processes | dealt | {pairs} | predicted |\n{'|---:' * 9}|")
    rates = {}
    for processes in (1, 2):
        costs, measured = [], []
        for rows in options.rows:
            # A second or less, on a machine with other work: the median of three.
            runs = [measure(rows, processes) for _ in range(3)]
            measured.append(
                {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            )
            costs.append(model(rows, DIM, SIZE, 4, processes, measured[-1]["dealt"]))
        # The constants: seconds a product, and seconds and bytes of every call.
        more = costs[1].products - costs[0].products
        rate = (measured[1]["cpu"] - measured[0]["cpu"]) / more
        start = measured[0]["cpu"] - rate * costs[0].products
        base = measured[0]["held"] - costs[0].held
        rates[processes] = rate
        for rows, found, cost in list(zip(options.rows, measured, costs, strict=True))[2:]:
            cpu = start + rate * cost.products
            print(
                f"| {rows:,} | {processes} | {found['dealt']} | {found['cpu']:.2f} | {cpu:.2f} "
                f"| {found['held'] / MB:.0f} | {(base + cost.held) / MB:.0f} "
                f"| {found['received'] / MB:.1f} | {cost.received / MB:.1f} |",
                flush=True,
            )
        print(
            f"{processes}: {1 / rate:.3g} products a second, {start:.2f} s and {base / MB:.0f} MB",
            file=sys.stderr,
        )
    print("\n| rows | processes | CPU hours | held, GB | got, GB |\n|---:|---:|---:|---:|---:|")
    for n, processes in ((1e8, 1), (1e8, 8), (2.1e9, 1000), (1e10, 1000)):
        cost = model(n, DIM, 64, 2, processes)
        hours = rates[min(processes, 2)] * cost.products / 3600
        print(
            f"| {n:.3g} | {processes} | {hours:.2f} | {cost.held / 1e9:.1f} "
            f"| {cost.received / 1e9:.1f} |"
        )


def measure(rows: int, processes: int) -> dict[str, float]:
    """The largest of what the processes say of themselves."""
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"import scale; scale.work({rows}, {rank}, {processes}, {folder!r})",
                ],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path[1:]]),
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                },
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        found = [json.loads(process.communicate()[0]) for process in started]
    return {name: max(one[name] for one in found) for name in found[0]}


def work(rows: int, rank: int, processes: int, folder: str) -> None:
    """Make a share of the rows, cluster, print the cost as JSON."""
    import torch.distributed as dist

    import ngame
    from ngame import ranks
    from ngame.cluster import shared

    group, received, dealt = None, [0], [0]
    if processes > 1:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
        group = dist.group.WORLD
        count(ranks.Ranks, received)
        homes = shared._homes

        def counted(*arguments: Any) -> Any:
            dealt[0] += 1
            return homes(*arguments)

        shared._homes = counted
    # Everything is loaded once before it counts.
    ngame.balanced_clusters(np.eye(4, dtype=np.float32), size=2, group=group)
    before, received[0], dealt[0] = status("VmRSS"), 0, 0
    share = rows * (rank + 1) // processes - rows * rank // processes
    x = np.empty((share, DIM), np.float32)
    random = np.random.default_rng(rank)
    centres = np.random.default_rng(99).standard_normal((2000, DIM), np.float32)
    for begin in range(0, share, 4096):
        part = x[begin : begin + 4096]
        part[:] = centres[random.integers(len(centres), size=len(part))]
        part += random.standard_normal(part.shape, np.float32)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    cpu = seconds()
    ngame.balanced_clusters(x, size=SIZE, threads=1, group=group)
    cpu = seconds() - cpu
    held = status("VmHWM") - before
    print(json.dumps({"cpu": cpu, "held": held, "received": received[0], "dealt": dealt[0]}))
    if group is not None:
        dist.destroy_process_group()


def count(ranks: type, received: list[int]) -> None:
    """Add up what processes get of each other."""
    message = ranks._message

    def counted(self, sent, found) -> None:
        received[0] += sum(x.nbytes for rank, x in enumerate(found) if rank != self.rank)
        message(self, sent, found)

    ranks._message = counted


def status(name: str) -> int:
    """Bytes of this process's memory, by the name that the system has for it."""
    for line in Path("/proc/self/status").read_text(encoding="utf8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/self/status has no {name}")


def seconds() -> float:
    """CPU time of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()

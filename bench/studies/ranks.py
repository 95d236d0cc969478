"""A step of the encoder stage in several processes beside one: wall clock and processor time.

    torchrun --nproc-per-node 2 bench/studies/ranks.py DATA

trains by the defaults, one thread a process. Blocks of steps by all take turns with blocks
by the first process alone, so what else runs on the machine slows both alike. What is printed are
the medians over the blocks of each block's median step, in milliseconds, of every process.
"""

import argparse
import statistics
import time
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

import ngame
from ngame.config import Config
from ngame.encoders.bank import EmbeddingBank
from ngame.ranks import Ranks, started
from ngame.training import loops
from ngame.training.optimizer import ParameterGroup
from ngame.training.run import ENCODER, Run
from ngame.training.stage import Stage

STEPS, WARM = 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--blocks", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with started() as ranks:
        measure(arguments.data, arguments.blocks, ranks)


def measure(data: str, blocks: int, ranks: Ranks) -> None:
    dataset = ngame.load_dataset(data)
    points, labels = dataset.train_labels.shape
    run = Run(
        dataset, Config.load(None, ["threads=1"], points=points, labels=labels), None, False, None
    )
    config = run.config.encoder_stage
    group = ParameterGroup(run.encoder, config.learning_rate, config.sparse_learning_rate)
    stage = Stage(run, "encoder", ENCODER, config, {"encoder": group})
    stage.bar = tqdm(disable=True)
    banks = [
        EmbeddingBank(len(tokens), run.encoder.dim)
        for tokens in (run.points.tokens, run.own(run.points.tokens))
    ]
    together = run.ranks.group, run.ranks.rank, run.ranks.size
    times: dict[int, list[tuple[float, float]]] = {1: [], ranks.size: []}
    for _ in range(blocks):
        dist.barrier()
        times[ranks.size].append(block(stage, banks[1]))
        dist.barrier()
        if ranks.rank == 0:
            # What the run, the stage and the optimizer hold is this one object.
            run.ranks.group, run.ranks.rank, run.ranks.size = None, 0, 1
            times[1].append(block(stage, banks[0]))
            run.ranks.group, run.ranks.rank, run.ranks.size = together
    for rank in range(ranks.size):
        dist.barrier()
        if rank == ranks.rank:
            for size, of in times.items():
                if of:
                    wall, cpu = (statistics.median(column) for column in zip(*of, strict=True))
                    print(
                        f"rank {rank} of {size}: {wall:.1f} ms, processor {cpu:.1f} ms", flush=True
                    )


def block(stage: Stage, bank: EmbeddingBank) -> tuple[float, float]:
    """Median wall clock and processor time of a step, milliseconds, after some to warm up."""
    run, ranks, config = stage.run, stage.run.ranks, stage.run.config.encoder_stage
    run.encoder.train()
    labels_of = partial(
        loops._batch_labels, stage, gather=config.gather, random_labels=config.random_labels
    )
    wall, cpu = [], []
    stage.batch = 0
    for rows in stage.batches():
        at = time.perf_counter(), time.process_time()
        pool, known, targets = labels_of(stage.batch, rows)
        own = run.points.tokens.take(rows[ranks.share(len(rows))])
        part = run.labels.take(pool[ranks.share(len(pool))])
        x, z = loops._embed_both(run.encoder, own, part, run.device)
        z = ranks.concatenate(z, ranks.counts(len(pool)))
        loops._store(run, bank, rows, x)
        stage.step(stage.loss(x @ z.T, known, targets), len(x) / len(rows))
        wall.append(1e3 * (time.perf_counter() - at[0]))
        cpu.append(1e3 * (time.process_time() - at[1]))
        if len(wall) == STEPS:
            break
    return statistics.median(wall[WARM:]), statistics.median(cpu[WARM:])


if __name__ == "__main__":
    main()

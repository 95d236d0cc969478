"""What a step of training a transformer costs: time, the GPU's share of it, launches, waits.

    PYTHONPATH=bench python -m gpu.training DATA MODEL            # in the repository's root
    PYTHONPATH=bench python -m gpu.training DATA MODEL --count    # without a GPU

For each batch size: milliseconds a step, the median without a profiler; the share of that in which
the GPU works, by the times of its kernels; launches a step; how often a step waits for the GPU, and
where; and the operators that take most of the host's time. Then how long all labels take to encode.

With --count the same steps go on the CPU, by the path of a GPU: their operators are the launches,
and what they read and write the bytes.
"""

import argparse
import itertools
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gpu.counts import BANDWIDTH, CACHE, CACHE_BANDWIDTH, PRODUCTS
from ngame.config import Config
from ngame.data.dataset import Dataset
from ngame.data.formats import load_dataset
from ngame.encoders.encode import encode
from ngame.encoders.transformer import TransformerEncoder
from ngame.training import loops
from ngame.training.adam import AdamW
from ngame.training.run import Run
from ngame.training.stage import Stage


@dataclass(frozen=True)
class Steps:
    """How many steps of a batch size go into each measurement."""

    batch_size: int
    warm: int
    timed: int
    profiled: int
    by_operator: int
    watched: int


# Warm is when most shapes of a batch have had their CUDA graphs.
STEPS = (Steps(64, 100, 100, 10, 8, 10), Steps(1024, 36, 24, 3, 2, 4))
OPERATORS = 25


class Enough(Exception):
    """All steps that are measured are done."""


def main() -> None:
    """Measure every batch size, then encoding."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder of a data set")
    parser.add_argument("model", type=Path, help="folder of a transformer")
    parser.add_argument("--count", action="store_true", help="on the CPU: launches and bytes")
    options = parser.parse_args()
    if options.count:
        dataset = load_dataset(options.data)
        for batch_size, steps in ((64, 6), (256, 1)):
            count(dataset, str(options.model), batch_size, steps, "encoder.precision=bf16")
        return
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}", flush=True)
    dataset = load_dataset(options.data)
    for steps in STEPS:
        encoding(measure(part(dataset, steps), str(options.model), steps, "cuda"))
    print("\nwith encoder.graphs=true", flush=True)
    for steps in STEPS:
        measure(part(dataset, steps), str(options.model), steps, "cuda", "encoder.graphs=true")


def part(dataset: Dataset, steps: Steps) -> Dataset:
    """As many points of a data set as the steps read, with all labels."""
    batches = steps.warm + steps.timed + steps.profiled + steps.by_operator + steps.watched
    points = (batches + 2) * steps.batch_size * 5 // 4  # up to a fifth is held out
    return Dataset(
        train_texts=dataset.train_texts[:points],
        train_labels=dataset.train_labels[:points],
        label_texts=dataset.label_texts,
    )


def measure(dataset: Dataset, model: str, steps: Steps, device: str, *sets: str) -> Run:
    """Train with steps of the encoder stage and say what they cost."""
    config = Config.load(
        None,
        [
            f"device={device}",
            "encoder.kind=transformer",
            f"encoder.model={model}",
            f"encoder_stage.batch_size={steps.batch_size}",
            *sets,
        ],
    )
    run = Run(dataset, config, None, False, None)
    batches = Stage.batches

    def measured(stage: Stage) -> Iterator[Any]:
        plan = batches(stage)

        def some(count: int) -> Iterator[Any]:
            for _ in range(count):
                yield next(plan)

        yield from some(steps.warm)
        shapes = recorded(run)
        clock = Clock(device)
        for batch in some(steps.timed):
            clock.mark()
            yield batch
        clock.mark()
        each = clock.intervals()
        # The median: steps that record a graph take much longer, and a long training has few.
        seconds = statistics.median(each) / 1e3
        print(
            f"batch {steps.batch_size}: {1e3 * seconds:.2f} ms a step, the median; the mean is "
            f"{statistics.mean(each):.2f}, {recorded(run) - shapes} graphs were recorded meanwhile",
            flush=True,
        )
        kinds = [ProfilerActivity.CUDA] if device == "cuda" else [ProfilerActivity.CPU]
        with profile(activities=kinds) as taken:
            yield from some(steps.profiled)
            wait(device)
        say_kernels(taken, seconds, steps.profiled)
        with profile(activities=[*{*kinds, ProfilerActivity.CPU}]) as taken:
            yield from some(steps.by_operator)
            wait(device)
        averages = taken.key_averages()
        print(
            averages.table(
                sort_by="self_cpu_time_total", row_limit=OPERATORS, max_name_column_width=45
            ),
            flush=True,
        )
        yield from watched(lambda: some(steps.watched), steps.watched, device)
        raise Enough

    Stage.batches = measured  # type: ignore[method-assign]
    try:
        loops.train_encoder(run)
    except Enough:
        pass
    finally:
        Stage.batches = batches  # type: ignore[method-assign]
        run.close()
    return run


class Clock:
    """Marks in the GPU's row of work, so that nobody waits for it; without one, of the host."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Now, or when the GPU gets here."""
        if self._device == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def intervals(self) -> list[float]:
        """Milliseconds from each mark to the next."""
        wait(self._device)
        pairs = itertools.pairwise(self._marks)
        if self._device == "cuda":
            return [start.elapsed_time(end) for start, end in pairs]
        return [1e3 * (end - start) for start, end in pairs]


def recorded(run: Run) -> int:
    """How many graphs the encoder has."""
    graphs = run.encoder._graphs
    return graphs.shapes if graphs else 0


def say_kernels(taken: profile, seconds: float, steps: int) -> None:
    """Share of a step in which the GPU works, launches a step, and the longest kernels."""
    spent: Counter[str] = Counter()
    launches = 0
    for event in taken.events():
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu and not getattr(event, "is_user_annotation", False):
            launches += 1
            spent[event.name[:70]] += event.time_range.elapsed_us() / 1e3 / steps
    busy = sum(spent.values())
    print(
        f"GPU busy {busy:.2f} ms a step, {busy / 1e3 / seconds:.0%} of the time, "
        f"{launches / steps:.0f} launches a step"
    )
    for name, ms in spent.most_common(15):
        print(f"  {ms:7.3f} ms  {name}", flush=True)


def watched(batches: Callable[[], Iterator[Any]], steps: int, device: str) -> Iterator[Any]:
    """Yield the batches; then say how often a step waited for the GPU, and where."""
    waits: Counter[str] = Counter()

    def note(message: Any, category: type[Warning], file: str, line: int, *_: Any) -> None:
        if "called a synchronizing" not in str(message):
            return
        # The call of ours that led there, beside the line itself.
        frames = traceback.extract_stack()[:-1]
        ours = [frame for frame in frames if "ngame" in Path(frame.filename).parts]
        by = f", from {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        waits[f"{'/'.join(Path(file).parts[-3:])}:{line}{by}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # `catch_warnings` puts the old one back
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield from batches()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    print(f"waits a step: {sum(waits.values()) / steps:.1f}")
    for place, count in waits.most_common(20):
        print(f"  {count / steps:5.1f}  {place}", flush=True)


def encoding(run: Run) -> None:
    """Time of encoding all labels: a second time, when everything is warm."""
    for _ in range(2):
        started = time.perf_counter()
        encode(run.encoder, run.labels, device=run.core_device)
        seconds = time.perf_counter() - started
        print(
            f"{len(run.labels)} labels encoded in {seconds:.2f} s, "
            f"{len(run.labels.ids) / seconds / 1e6:.2f} M tokens/s",
            flush=True,
        )


# Seconds of a kernel that does next to nothing, in a row of such.
SHORTEST = 3e-6


class Operators(TorchDispatchMode):
    """Counts what would be asked of a GPU: each operator that computes something is a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = self.operations = 0
        self.seconds = 0.0

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        """Run an operator and count it."""
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__
        if function.is_view or name.startswith(("empty", "new_empty", "_unsafe_view", "detach")):
            return result
        leaves = tree_leaves((arguments, options, result))
        # Of what is expanded, what there is of it.
        size = sum(
            min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
            for x in leaves
            if isinstance(x, torch.Tensor) and x.layout == torch.strided
        )
        operations = 0
        if function.overloadpacket in flop_registry:
            counted = flop_registry[function.overloadpacket]
            operations = counted(*arguments, **(options or {}), out_val=result)
        self.launches += 1
        self.bytes += size
        self.operations += operations
        # What fits is still in the cache where the last operator has put it.
        rate = CACHE_BANDWIDTH if size <= CACHE else BANDWIDTH
        self.seconds += max(SHORTEST, size / rate, operations / PRODUCTS)
        return result


def count(dataset: Dataset, model: str, batch_size: int, steps: int, *sets: str) -> None:
    """Say what a step of the encoder stage asks of a GPU: the mean of some, after the first."""
    sizes = Steps(batch_size, warm=1, timed=steps, profiled=0, by_operator=0, watched=0)
    settings = [
        *("device=cpu", "encoder.kind=transformer", f"encoder.model={model}"),
        *(f"encoder_stage.batch_size={batch_size}", "encoder_stage.start_epoch=1", *sets),
    ]
    run = Run(part(dataset, sizes), Config.load(None, settings), None, False, None)
    operators = Operators()
    batches, both, init = Stage.batches, loops._embed_both, AdamW.__init__

    def counted(stage: Stage) -> Iterator[Any]:
        plan = batches(stage)
        yield next(plan)  # the first one makes the optimizer's state
        with operators:
            for _ in range(steps):
                yield next(plan)
        raise Enough

    def fused(adamw: AdamW, *given: Any) -> None:
        init(adamw, *given)
        adamw._fused = True

    as_on_a_gpu = (
        mock.patch.object(Stage, "batches", counted),
        mock.patch.object(loops, "_embed_both", lambda *a: both(*a[:3], torch.device("cuda"))),
        mock.patch.object(TransformerEncoder, "forward", TransformerEncoder._by_length),
        mock.patch.object(AdamW, "__init__", fused),
    )
    with ExitStack() as stack:
        for patch in as_on_a_gpu:
            stack.enter_context(patch)
        with suppress(Enough):
            loops.train_encoder(run)
    run.close()
    print(
        f"batch {batch_size}: {operators.launches / steps:.0f} launches, "
        f"{operators.bytes / steps / 1e9:.2f} GB, {operators.operations / steps / 1e12:.2f} Tflop; "
        f"GPU busy {1e3 * operators.seconds / steps:.1f} ms"
    )


def wait(device: str) -> None:
    """Until the GPU has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

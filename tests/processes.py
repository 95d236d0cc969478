"""Run a piece of Python in several processes of one group."""

import gc
import multiprocessing
import os
import shutil
import sys
import tempfile
import textwrap
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

# Libraries that take seconds to import are imported once, by a process of which all others are
# forks. Not ngame, which is tried as each process imports it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch.distributed.tensor", "transformers.models.llama.modeling_llama", "peft"]
)


def run(code, *arguments, size=2, timeout=300):
    """Run the code on every rank, and give what each wrote to its standard output.

    The code finds `rank`, `size`, `np`, `torch` and `dist`, and its arguments from ``sys.argv[2]``
    on.
    """
    ended = finish(start(code, *arguments, size=size), timeout)
    for rank, process in enumerate(ended):
        assert process.returncode == 0, f"rank {rank}: {process.stderr}"
    return [process.stdout for process in ended]


def start(code, *arguments, size=2):
    """Start the code on every rank."""
    meeting = Path(tempfile.mkdtemp()) / "meeting"
    alone = {"OMP_NUM_THREADS": "1"}  # also of the libraries that are imported once
    started = []
    for rank in range(size):
        environment = {**os.environ, **alone, "RANK": str(rank), "WORLD_SIZE": str(size)}
        files = [meeting.with_name(f"{rank}.{name}") for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        given = textwrap.dedent(code), [str(one) for one in (meeting, *arguments)]
        process = FORKS.Process(target=_be_rank, args=(*given, environment, files))
        with mock.patch.dict(os.environ, alone):
            process.start()
        started.append((process, files))
    return started


def finish(started: list[tuple[BaseProcess, list[Path]]], timeout=300):
    """Wait for processes, and give what they wrote and returned."""
    try:
        for rank, (process, files) in enumerate(started):
            process.join(timeout)
            if process.is_alive():
                raise TimeoutError(f"rank {rank} runs after {timeout} s: {files[1].read_text()}")
        return [
            CompletedProcess(process.name, process.exitcode, *(file.read_text() for file in files))
            for process, files in started
        ]
    finally:
        for process, files in started:
            process.kill()
            shutil.rmtree(files[0].parent, ignore_errors=True)


def _be_rank(code, arguments, environment, files):
    """What each process does."""
    for file, descriptor in zip(files, (1, 2), strict=True):
        os.dup2(os.open(file, os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    import numpy as np
    import torch
    import torch.distributed as dist

    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{arguments[0]}", rank=rank, world_size=size,
        timeout=timedelta(seconds=100),
    )  # fmt: skip
    modules = {"os": os, "sys": sys, "np": np, "torch": torch, "dist": dist}
    names = {**modules, "rank": rank, "size": size}
    try:
        exec(compile(code, "code", "exec"), names)
    finally:
        # The group's threads end with its last reference. A thread that lets go of a tensor later,
        # when the interpreter ends, aborts the process.
        names.clear()
        gc.collect()
        dist.destroy_process_group()

"""Run a piece of Python in several processes of one group."""

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

START = """
import gc, os, sys
from datetime import timedelta
import numpy as np
import torch
import torch.distributed as dist
dist.init_process_group(
    "gloo", init_method="file://" + sys.argv[1], rank=int(os.environ["RANK"]),
    world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=100),
)
names = dict(globals(), rank=dist.get_rank(), size=dist.get_world_size())
try:
    exec(compile(os.environ["CODE"], "code", "exec"), names)
finally:
    # The group's threads end with its last reference. A thread that lets go of a tensor later,
    # when the interpreter ends, aborts the process.
    names.clear()
    gc.collect()
    dist.destroy_process_group()
"""


def run(code, *arguments, size=2, timeout=300):
    """Run the code on every rank, and give what each wrote to its standard output.

    The code finds `rank`, `size`, `np`, `torch` and `dist`, and its arguments from ``sys.argv[2]``
    on.
    """
    done = finish(start(code, *arguments, size=size), timeout)
    for rank, process in enumerate(done):
        assert process.returncode == 0, f"rank {rank}: {process.stderr}"
    return [process.stdout for process in done]


def start(code, *arguments, size=2):
    """Start the code on every rank."""
    meeting = Path(tempfile.mkdtemp()) / "meeting"
    command = [sys.executable, "-c", START, meeting, *arguments]
    environment = {
        **os.environ,
        "CODE": textwrap.dedent(code),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes, timeout=300):
    """Wait for processes, and give what they wrote and returned."""
    done = []
    try:
        for process in processes:
            out, errors = process.communicate(timeout=timeout)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, errors))
    finally:
        for process in processes:
            process.kill()
    return done

"""What the benchmarks share: options, and peers that run in a process of their own."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from ngame import _core

PEERS = Path(__file__).with_name("peers.py")
# The benchmarks import their neighbours, such as inputs.py; pytest's importlib mode adds no folder.
sys.path.append(str(PEERS.parent))
# OpenBLAS, OpenMP and MKL read them when they are loaded.
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# OpenMP threads that wait by spinning become several times slower on a busy machine. That would
# make ours look better than it is.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--quick", action="store_true", help="small sizes: does it all still run?")
    group.addoption(
        "--peers", default=sys.executable, metavar="PYTHON", help="interpreter that has the peers"
    )
    group.addoption(
        "--embeddings", metavar="FILE", help="real embeddings, a float32 .npy file [n, dim]"
    )
    group.addoption("--texts", metavar="FOLDER", help="a data set, for searches among texts")


def pytest_benchmark_generate_machine_info() -> dict[str, Any]:
    """The machine, as the results describe it; replaces the plugin's own description."""
    return {
        "cpu": _cpu(),
        "cpus": _core.usable_cpus(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.platform(),
        "simd": _core.simd_level(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("numpy", "scipy")},
    }


def _cpu() -> str:
    """The model's name as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether small sizes are wanted."""
    return bool(request.config.getoption("quick"))


@pytest.fixture(scope="session")
def embeddings(request: pytest.FixtureRequest) -> Any:
    """Real embeddings, float32 [n, dim]; without them the benchmark is skipped."""
    path = request.config.getoption("embeddings")
    if path is None:
        pytest.skip("no --embeddings FILE")
    return np.load(path)


class Peer:
    """A function of peers.py with its arguments loaded, in a process of its own.

    A call runs it once and waits for it. Arguments and results are sent before and after, so the
    call can be timed like one of ours.
    """

    def __init__(
        self, python: str, folder: Path, name: str, threads: int, arguments: dict[str, Any]
    ) -> None:
        options: dict[str, Any] = {"threads": threads}
        for key, value in arguments.items():
            if sp.issparse(value):
                sp.save_npz(folder / f"{key}.npz", value, compressed=False)
            elif isinstance(value, np.ndarray):
                np.save(folder / f"{key}.npy", value)
            else:
                options[key] = value
        (folder / "options.json").write_text(json.dumps(options), encoding="utf8")
        self._folder = folder
        self._process = subprocess.Popen(
            [python, PEERS, name, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **dict.fromkeys(THREADS, str(threads)), **PASSIVE},
        )

    def load(self) -> None:
        """Wait until library and arguments are loaded; skip if the library is missing."""
        self._wait()

    def __call__(self) -> None:
        """Run the function once."""
        self._ask("run")

    def result(self) -> dict[str, Any]:
        """The arrays that the last run gave, by name."""
        self._ask("save")
        with np.load(self._folder / "result.npz") as found:
            return dict(found)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, what: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        self._wait()

    def _wait(self) -> None:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        if answer.startswith("missing "):
            pytest.skip(answer.removeprefix("missing "))
        if answer != "done":
            pytest.fail(f"the peer's process ended with {self._process.wait()}")


@pytest.fixture
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Peer]]:
    """Start ``peer(name, threads=1, **arguments)``; skipped where its library is missing."""
    started = []

    def start(name: str, *, threads: int = 1, **arguments: Any) -> Peer:
        folder = tmp_path / name
        folder.mkdir()
        found = Peer(request.config.getoption("peers"), folder, name, threads, arguments)
        started.append(found)
        found.load()
        return found

    yield start
    for one in started:
        one.close()

"""The tasks of a working day; `nox --list` names them.

They run in the environment that nox is in, the editable install of CONTRIBUTING.md; only `core`,
which needs no torch and builds the core in several ways, makes some of its own in .nox/: `nox -s
"core(asan)"`. What stands after `--` is handed on: `nox -s test -- tests/core -x`.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
# pip reads it in isolated builds as well.
os.environ.setdefault("PIP_CONSTRAINT", str(ROOT / "constraints.txt"))

# What a sanitizer needs: its library, loaded before a Python that knows nothing of it.
SANITIZERS = {"asan": "libasan.so", "tsan": "libtsan.so"}

nox.needs_version = ">=2024.10"
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "test"]


def python(session: nox.Session, *arguments: str) -> None:
    """Run Python of the environment that nox is in, on the installed package."""
    session.run(sys.executable, *arguments, env={"PYTHONSAFEPATH": "1"}, external=True)


@nox.session(venv_backend="none")
def test(session: nox.Session) -> None:
    """All tests."""
    python(session, "-m", "pytest", *session.posargs)


@nox.session
@nox.parametrize("preset", [nox.param(name, id=name) for name in ("default", "clang", *SANITIZERS)])
def core(session: nox.Session, preset: str) -> None:
    """The core's tests without torch, on a build of CMakePresets.json.

    Each has an environment of its own, so that several can run side by side.
    """
    session.install(*PROJECT["build-system"]["requires"], "cmake", "ninja")
    session.install(*nox.project.dependency_groups(PROJECT, "core"))
    # A build folder each, kept: the next time only what has changed is compiled.
    session.install(
        "--no-build-isolation",
        "--no-deps",
        "--force-reinstall",
        f"-Cbuild-dir=build/{preset}",
        f"-Ccmake.args=--preset={preset}",
        f"-Ccmake.build-type={'RelWithDebInfo' if preset in SANITIZERS else 'Release'}",
        ".",
    )
    command, env = ["pytest", "-q", "tests/core"], {"PYTHONSAFEPATH": "1"}
    if preset in SANITIZERS:
        command, env = sanitized(preset, command), env | SANITIZER_ENV
    session.run(*command, *session.posargs, env=env, external=True)


# Python frees little of its own at exit; a report of another kind ends the run. A child of a fork
# may start threads though a progress bar had one before. NumPy's BLAS has threads that meet in ways
# which a sanitizer does not see. With plain malloc each object is a block of its own, whose bounds
# are watched. Reports that are no faults of ours are named in tests/tsan.txt.
SANITIZER_ENV = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": f"halt_on_error=1 die_after_fork=0 suppressions={ROOT / 'tests/tsan.txt'}",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONMALLOC": "malloc",
}


def sanitized(preset: str, command: list[str]) -> list[str]:
    """A pytest command under the sanitizer that a preset builds with."""
    # The C++ library goes along, since the sanitizer intercepts its exceptions. Addresses at random
    # can fall where the one for threads keeps its shadow. Reports come on file descriptor 2 just
    # before the process ends: it must not be captured.
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in (SANITIZERS[preset], "libstdc++.so")
    ]
    preload = f"LD_PRELOAD={' '.join(libraries)}"
    capture = ["--capture=sys", "--durations=5"]
    return ["setarch", "--addr-no-randomize", "env", preload, *command, *capture]


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """What .pre-commit-config.yaml lists, on all files."""
    # The hooks call their tools by name: those beside this Python.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    python(session, "-m", "pre_commit", "run", "--all-files", *session.posargs)


@nox.session(venv_backend="none")
def types(session: nox.Session) -> None:
    """Type hints, and stubs against the compiled modules that are there."""
    python(session, "-m", "mypy", "--strict", "ngame")
    stubtest = ["-m", "mypy.stubtest", "--mypy-config-file=pyproject.toml"]
    modules = ["ngame._core", "ngame._cuda"]
    python(session, *stubtest, *filter(find_spec, modules))


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Benchmarks: see `nox -s bench -- --help`."""
    session.run(sys.executable, "bench/run.py", *session.posargs, external=True)


@nox.session(venv_backend="none")
def docs(session: nox.Session) -> None:
    """Draw docs/house.md anew; test code, commands and links of all documents."""
    session.run(sys.executable, "docs/house.py", external=True)
    python(session, "-m", "pytest", "tests/test_docs.py", *session.posargs)

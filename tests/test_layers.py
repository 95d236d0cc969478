"""Who may import whom, and what `import ngame` may load."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ngame"

# Rooms from the ground up, each with the rooms it imports, wherever in its files.
# None imports a room below its own line, so there is no circle. A file at the top of `ngame/` is a
# room of its own; a folder is one.
ROOMS: dict[str, set[str]] = {
    # the ground
    "_core": set(),
    "arrays": {"_core"},
    "cuda": {"arrays"},
    "dispatch": {"arrays", "cuda"},
    "files": set(),
    "progress": set(),
    "state": set(),
    "transfer": set(),
    "loss": {"transfer"},
    "ranks": set(),
    "config": {"arrays", "files"},
    # the doors to C++
    "topk": {"_core", "arrays", "dispatch", "files", "ranks"},
    "sparse_topk": {"_core", "arrays"},
    "cluster": {"_core", "arrays", "dispatch", "files", "ranks", "topk"},
    "linear": {"_core", "arrays", "cluster"},
    "shortlist": {"_core", "arrays", "cluster"},
    "positives": {"_core", "arrays", "dispatch"},
    "metrics": {"_core", "arrays", "dispatch"},
    "neighbours": {"arrays", "dispatch", "shortlist", "topk"},
    "mining": {"arrays", "cluster", "topk"},
    "negatives": {"arrays", "loss", "positives", "transfer"},
    # the way of the data
    "data": {"_core", "arrays", "files", "progress"},
    "encoders": {"arrays", "cuda", "data", "files", "progress", "transfer"},
    "batches": {"_core", "arrays", "cluster", "dispatch", "neighbours"},
    "prediction": {
        "arrays",
        "config",
        "encoders",
        "files",
        "linear",
        "metrics",
        "progress",
        "shortlist",
        "sparse_topk",
        "topk",
    },
    "training": {
        "ranks",
        "_core",
        "arrays",
        "batches",
        "config",
        "data",
        "encoders",
        "files",
        "loss",
        "metrics",
        "negatives",
        "prediction",
        "progress",
        "state",
        "topk",
        "transfer",
    },
    # those who use it all
    "adapters": {
        "ranks",
        "arrays",
        "batches",
        "config",
        "data",
        "encoders",
        "files",
        "loss",
        "negatives",
        "prediction",
        "state",
        "training",
    },
    "compat": {
        "arrays",
        "cluster",
        "data",
        "files",
        "metrics",
        "prediction",
        "shortlist",
        "topk",
    },
    "demo": {"data"},
    "report": {
        "arrays",
        "batches",
        "config",
        "data",
        "encoders",
        "files",
        "metrics",
        "prediction",
        "topk",
        "training",
    },
}
# The faces of the package, which name what the rooms hold.
FACES = {"__init__", "__main__", "cli"}
# Files that may load torch: those of these rooms, and these of the others.
TORCH = {
    "adapters",
    "cli",
    "cuda",
    "encoders",
    "loss",
    "negatives",
    "prediction",
    "ranks",
    "report",
    "state",
    "training",
    "transfer",
}
FOREIGN = {
    "accelerate",
    "datasets",
    "lightning",
    "sentence_transformers",
    "sklearn",
    "transformers",
}
MODULES = sorted(
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in PACKAGE.rglob("*.py")
)


def imports(module):
    """Names of all that a module imports, wherever in the file, but for types alone."""
    path = (PACKAGE / module.replace(".", "/")).with_suffix(".py")
    nodes = [ast.parse(path.read_text(encoding="utf8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(module):
    """The modules of ngame that a module imports."""
    for name in imports(module):
        name, dot, inner = name.partition(".")
        while dot and inner and inner not in (*MODULES, "_core"):
            if f"{inner}.__init__" in MODULES:
                inner += ".__init__"
            else:
                inner = inner.rpartition(".")[0]
        if name == "ngame" and inner:
            yield inner


def room(module):
    """The room of a module."""
    return module.partition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_arrows(module):
    others = {name.split(".")[0] for name in imports(module)}
    assert room(module) in TORCH or "torch" not in others
    assert room(module) == "adapters" or not FOREIGN & others
    if room(module) in FACES:
        return
    assert room(module) in ROOMS, f"say in ROOMS what {room(module)} may import"
    assert {room(other) for other in ours(module)} - {room(module)} <= ROOMS[room(module)]


def test_no_arrow_runs_back_up():
    below = set()
    for name, wanted in ROOMS.items():
        assert wanted <= below, f"{name} imports {wanted - below}, which stand above it"
        below.add(name)


def test_every_arrow_of_the_table_is_there():
    drawn = {name: set() for name in ROOMS}
    for module in MODULES:
        if room(module) not in FACES:
            drawn[room(module)] |= {room(other) for other in ours(module)} - {room(module)}
    assert drawn == ROOMS


def test_no_circle_among_files():
    left = {module: set(ours(module)) for module in MODULES if room(module) not in FACES}
    while left:
        free = {module for module, wanted in left.items() if not wanted & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {module: wanted for module, wanted in left.items() if module not in free}


def test_core_tests_need_no_torch():
    """They run under the sanitizers and on wheels, where torch is not installed."""
    for file in (Path(__file__).parent / "core").rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf8")).body:
            names = [alias.name for alias in getattr(node, "names", [])]
            names.append(getattr(node, "module", None) or "")
            assert not any(name.split(".")[0] == "torch" for name in names), file.name


def check_that_import_loads_nothing_of(unwanted, module):
    code = (
        f"import sys, {module}; unwanted = {unwanted}; "
        "assert unwanted.isdisjoint(sys.modules), unwanted & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_loads_no_torch():
    unwanted = {"torch", "tokenizers", "safetensors", "tqdm", "ngame.compat"}
    check_that_import_loads_nothing_of(unwanted, "ngame")


def test_batches_load_no_scipy_spatial():
    """It takes a tenth of a second, and `haversine_neighbours` alone needs it."""
    check_that_import_loads_nothing_of({"scipy.spatial"}, "ngame.batches")


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        ("ngame.batches", set()),
        ("ngame.adapters.torch", set()),
        ("ngame.adapters", set()),
        ("ngame.adapters.onnx", set()),
        ("ngame.adapters.sklearn", {"sklearn"}),
        ("ngame.adapters.transformers", {"accelerate", "transformers"}),
    ],
)
def test_a_library_is_loaded_by_its_adapter_alone(module, wanted):
    for name in wanted:
        pytest.importorskip(name)
    check_that_import_loads_nothing_of(FOREIGN - wanted, module)


@pytest.mark.parametrize(
    "module",
    [
        "batches.clusters",
        "batches.groups",
        "batches.neighbours",
        "cluster.balanced",
        "data.dataset",
        "metrics",
        "mining",
        "negatives",
        "negatives.cache",
        "negatives.pool",
        "negatives.schedule",
        "negatives.sources",
        "neighbours",
        "positives",
        "sparse_topk",
        "topk",
    ],
)
def test_examples_in_docstrings(module):
    found = doctest.testmod(importlib.import_module(f"ngame.{module}"))
    assert found.attempted > 0
    assert found.failed == 0


def test_only_the_bindings_know_python():
    sources = PACKAGE.parent / "csrc"
    for file in filter(Path.is_file, sources.rglob("*")):
        text = file.read_text(encoding="utf8")
        assert file.name == "bindings.cpp" or not ("pybind11" in text or "Python.h" in text)


def test_kernels_show_the_linker_nothing_inline():
    """What a wide kernel file includes could become the copy that every CPU runs."""
    text = (PACKAGE.parent / "csrc" / "kernels-inl.h").read_text(encoding="utf8")
    included = {line.split()[1] for line in text.splitlines() if line.startswith("#include")}
    assert included == {
        *("<cstddef>", "<cstdint>", '"kernels.h"'),
        *("<immintrin.h>", "<arm_neon.h>"),  # whose functions are always inlined
    }

"""Who may import whom, and what `import ngame` may load."""

import ast
import doctest
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ngame"

# A room may import the rooms named, at its top or inside a function. Data flows from left to right:
# data -> encoder -> cluster -> batches -> loss -> classifier -> shortlist -> metrics.
CORE = {"_core", "arrays"}
MAY_IMPORT = {
    "files": set(),
    "sparse_text": CORE | {"files"},
    "loss": set(),
    "arrays": {"_core"},
    "cluster": CORE | {"cuda", "files"},
    "cuda": {"arrays"},
    "positives": CORE | {"cuda"},
    "shortlist": CORE | {"cluster", "cuda"},
    "metrics": CORE | {"cuda"},
    "mining": CORE | {"cluster", "positives", "shortlist"},
    "neighbours": {"arrays", "shortlist"},
    "batches.__init__": {"batches.clusters", "batches.groups", "batches.neighbours"},
    "batches.clusters": CORE | {"batches.sampler", "cluster"},
    "batches.groups": CORE | {"batches.sampler"},
    "batches.neighbours": CORE | {"batches.sampler", "neighbours"},
    "batches.sampler": CORE | {"cluster"},
    "loader": {"checkpoint", "embeddings"},
    "adapters.transformers": {"checkpoint", "embeddings", "files", "loader"},
    "adapters.sentence_transformers": {
        "adapters.transformers",
        "batches",
        "embeddings",
        "loader",
        "loss",
        "positives",
    },
    "tokens": {"files"},
    "config": {"files"},
    "data": {"files", "sparse_text"},
    "docstrings": {"data"},
    "vectors": {"cuda"},
    "embeddings": {"arrays", "vectors"},
    "encoder": {"embeddings", "tokens", "vectors"},
    "bag": {"encoder", "files", "tokens"},
    "transformer": {"encoder", "files", "tokens"},
    "checkpoint": {"files"},
    "fusion": {"files"},
    "tfidf": {"shortlist"},
    "index": {"files", "shortlist"},
    "model": {
        "bag",
        "config",
        "encoder",
        "files",
        "fusion",
        "index",
        "metrics",
        "shortlist",
        "tokens",
        "transformer",
        "vectors",
    },
    "run": {
        "bag",
        "checkpoint",
        "config",
        "data",
        "files",
        "index",
        "model",
        "tokens",
        "transformer",
        "vectors",
    },
    "optimizer": {"checkpoint", "config"},
    "stage": {
        "batches",
        "checkpoint",
        "config",
        "embeddings",
        "files",
        "loss",
        "optimizer",
        "run",
        "vectors",
    },
    "training": {
        "checkpoint",
        "config",
        "data",
        "embeddings",
        "encoder",
        "fusion",
        "loss",
        "metrics",
        "model",
        "optimizer",
        "positives",
        "run",
        "shortlist",
        "stage",
        "tokens",
        "vectors",
    },
}
XCLIB = "compat.xclib"
MAY_IMPORT |= {
    f"{XCLIB}.data.data_utils": {"data", "sparse_text", f"{XCLIB}.utils.sparse"},
    f"{XCLIB}.evaluation.xc_metrics": {
        "arrays",
        "metrics",
        f"{XCLIB}.utils.dense",
        f"{XCLIB}.utils.sparse",
    },
    f"{XCLIB}.utils.clustering": {"arrays", "cluster", f"{XCLIB}.utils.sparse"},
    f"{XCLIB}.utils.dense": {f"{XCLIB}.utils.sparse"},
    f"{XCLIB}.utils.matrix": {"arrays", f"{XCLIB}.utils.dense", f"{XCLIB}.utils.sparse"},
    f"{XCLIB}.utils.shortlist": {
        "arrays",
        "files",
        "index",
        "shortlist",
        f"{XCLIB}.utils.sparse",
    },
    f"{XCLIB}.utils.sparse": {"arrays", "shortlist"},
}
# What makes these folders packages holds a docstring only.
MAY_IMPORT |= {
    f"{package}.__init__": set()
    for package in (
        "adapters",
        "compat",
        XCLIB,
        f"{XCLIB}.data",
        f"{XCLIB}.evaluation",
        f"{XCLIB}.utils",
    )
}
ANYTHING = {"__init__", "__main__", "cli", "demo"}
TORCH = {
    "adapters.sentence_transformers",
    "adapters.transformers",
    "bag",
    "checkpoint",
    "cli",
    "cuda",
    "demo",
    "embeddings",
    "encoder",
    "fusion",
    "loader",
    "loss",
    "model",
    "optimizer",
    "run",
    "stage",
    "training",
    "transformer",
    "vectors",
}
FOREIGN = {"accelerate", "datasets", "lightning", "sentence_transformers", "transformers"}
ROOMS = sorted(
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts) for file in PACKAGE.rglob("*.py")
)


def imports(room):
    """Names of all modules that a room imports, wherever in the file, but for types alone."""
    path = (PACKAGE / room.replace(".", "/")).with_suffix(".py")
    nodes = [ast.parse(path.read_text(encoding="utf8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{room} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name):
    """The room of a module, or of what a module holds."""
    name = name.removeprefix("ngame.")
    while name not in ROOMS and name not in CORE and "." in name:
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("room", ROOMS)
def test_imports_follow_the_arrows(room):
    names = set(imports(room))
    ours = {room_of(name) for name in names if name.startswith("ngame.")}
    if room not in ANYTHING:
        assert room in MAY_IMPORT, f"say in MAY_IMPORT what {room} may import"
        assert ours <= MAY_IMPORT[room]
    others = {name.split(".")[0] for name in names}
    assert room in TORCH or "torch" not in others
    assert room.startswith("adapters.") or not FOREIGN & others


def check_that_import_loads_nothing_of(unwanted, module):
    code = (
        f"import sys, {module}; unwanted = {unwanted}; "
        "assert unwanted.isdisjoint(sys.modules), unwanted & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_loads_no_torch():
    unwanted = {"torch", "tokenizers", "safetensors", "tqdm", "ngame.compat"}
    check_that_import_loads_nothing_of(unwanted, "ngame")


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        ("ngame.batches", set()),
        ("ngame.loader", set()),
        ("ngame.adapters", set()),
        ("ngame.adapters.transformers", {"accelerate", "transformers"}),
    ],
)
def test_a_library_is_loaded_by_its_adapter_alone(module, wanted):
    for name in wanted:
        pytest.importorskip(name)
    check_that_import_loads_nothing_of(FOREIGN - wanted, module)


@pytest.mark.parametrize(
    "room",
    [
        "batches.clusters",
        "batches.groups",
        "batches.neighbours",
        "cluster",
        "metrics",
        "mining",
        "neighbours",
        "positives",
        "shortlist",
    ],
)
def test_examples_in_docstrings(room):
    found = doctest.testmod(importlib.import_module(f"ngame.{room}"))
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
    assert included == {"<cstddef>", "<cstdint>", "<immintrin.h>", '"kernels.h"'}

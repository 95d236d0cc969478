"""What `import ngame` costs those who only cluster or evaluate, and the names that it gives."""

import ast
import inspect
import subprocess
import sys
import typing
from importlib import import_module
from pathlib import Path

import pytest

import ngame

MEASURE = """
import time
import numpy, scipy.sparse
start = time.process_time()
import ngame
print(time.process_time() - start)
"""


def test_import_costs_little_beyond_numpy_and_scipy():
    # Processor time, the least of a few processes, so that other work on the machine hardly tells.
    seconds = [
        float(subprocess.check_output([sys.executable, "-c", MEASURE], text=True)) for _ in range(3)
    ]
    assert min(seconds) <= 0.05, seconds


def test_type_checkers_see_the_same_names():
    (checked,) = (
        node
        for node in ast.parse(Path(ngame.__file__).read_text(encoding="utf8")).body
        if isinstance(node, ast.If)
    )
    seen = {}
    for statement in checked.body:
        (alias,) = statement.names
        assert alias.asname == alias.name, "without `as` it is not exported"
        seen[alias.name] = statement.module
    assert seen == ngame._HOMES


@pytest.mark.parametrize("name", ngame.__all__)
def test_every_name_is_there(name):
    assert name in dir(ngame)
    value = getattr(ngame, name)
    assert value is getattr(import_module(ngame._HOMES[name]), name)
    assert value.__doc__


def public_functions():
    """Every function behind a public name, methods included."""
    for name in ngame.__all__:
        value = getattr(ngame, name)
        if inspect.isclass(value) or inspect.ismodule(value):
            for inner, member in vars(value).items():
                function = inspect.unwrap(getattr(member, "__func__", member))
                home = value.__name__ if inspect.ismodule(value) else value.__module__
                ours = inspect.isfunction(function) and function.__module__ == home
                if ours and (inner == "__init__" or not inner.startswith("_")):
                    yield f"{name}.{inner}", function
        else:
            yield name, inspect.unwrap(value)


def test_public_parameters_have_types():
    checked, untyped = 0, []
    for name, function in public_functions():
        hints = typing.get_type_hints(function)
        for one in inspect.signature(function).parameters.values():
            open_ended = one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
            if one.name not in ("self", "cls") and not open_ended:
                checked += 1
                if hints.get(one.name, typing.Any) is typing.Any:
                    untyped.append(f"{name}({one.name})")
    assert checked > 200
    assert untyped == []


def test_dir_lists_what_is_public():
    listed = [name for name in dir(ngame) if not name.startswith("__")]
    assert not {"Any", "TYPE_CHECKING", "import_module"} & {*listed}
    for name in set(listed) - {*ngame.__all__}:
        assert inspect.ismodule(getattr(ngame, name)), name


def test_dir_lists_what_is_loaded_when_asked_for():
    code = "import ngame.negatives as n; print(*dir(n)); assert {*n.__all__} <= {*dir(n)}"
    listed = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert {"Candidates", "ContrastiveLoss", "EmaEncoder", "NegativeQueue", "Guide"} <= {*listed}
    assert not {"Any", "TYPE_CHECKING", "import_module"} & {*listed}
    told = import_module("ngame.negatives").__doc__
    assert [name for name in import_module("ngame.negatives").__all__ if name not in told] == []


def test_unknown_names_are_told():
    with pytest.raises(AttributeError, match="module 'ngame' has no attribute 'balanced_cluster'"):
        _ = ngame.balanced_cluster


@pytest.mark.parametrize("first", ["ngame.topk", "ngame.metrics", "ngame.mining"])
def test_functions_go_before_files_of_their_name(first):
    code = f"import {first}, ngame; assert callable(ngame.topk); ngame.metrics.evaluate"
    subprocess.run([sys.executable, "-c", code], check=True)

"""What `import ngame` costs those who only cluster or evaluate, and the names that it gives."""

import ast
import subprocess
import sys
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


def test_unknown_names_are_told():
    with pytest.raises(AttributeError, match="module 'ngame' has no attribute 'balanced_cluster'"):
        _ = ngame.balanced_cluster


@pytest.mark.parametrize("first", ["ngame.topk", "ngame.metrics", "ngame.mining"])
def test_functions_go_before_files_of_their_name(first):
    code = f"import {first}, ngame; assert callable(ngame.topk); ngame.metrics.evaluate"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Stubs have the functions of the compiled modules and their arguments, which stubtest skips."""

import ast
from pathlib import Path

import pytest

import ngame


def arguments(function):
    return [argument.arg for argument in function.args.args]


@pytest.mark.parametrize("name", ["_core", "_cuda", "_cuda_emulated"])
def test_functions_and_arguments(name):
    module = pytest.importorskip(f"ngame.{name}")
    stub = Path(ngame.__file__).with_name(f"{name.removesuffix('_emulated')}.pyi")
    stubs = [node for node in ast.parse(stub.read_text()).body if isinstance(node, ast.FunctionDef)]
    expected = {function.name: arguments(function) for function in stubs}
    found = {}
    for function in vars(module).values():
        if callable(function) and not isinstance(function, type):
            signature = function.__doc__.partition("\n")[0]  # as pybind11 writes it
            (definition,) = ast.parse(f"def {signature}: ...").body
            found[definition.name] = arguments(definition)
    if name == "_cuda_emulated":
        del found["set_backward"], expected["devices"]
    assert found == expected

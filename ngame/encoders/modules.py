"""The layout of sentence-transformers: a folder of modules, applied one after another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ngame.files import write_json, write_tensors


class Module(NamedTuple):
    """A module of sentence-transformers: the name of its class, its settings and its weights."""

    kind: str
    settings: Mapping[str, Any] = {}
    weights: Mapping[str, torch.Tensor] = {}


def write_modules(folder: Path, modules: Sequence[Module]) -> None:
    """Write ``modules.json``, and a folder with settings and weights for each module.

    The first module's files lie in `folder` itself and are left to the caller. All classes are the
    library's own: since version 6 it imports others only with ``trust_remote_code=True``.
    """
    paths = ["", *(f"{place}_{module.kind}" for place, module in enumerate(modules) if place)]
    for path, module in zip(paths, modules, strict=True):
        if path:
            write_json(folder / path / "config.json", dict(module.settings))
            if module.weights:
                write_tensors(folder / path / "model.safetensors", dict(module.weights))
    write_json(
        folder / "modules.json",
        [
            {
                "idx": place,
                "name": str(place),
                "path": path,
                # A name that every version of sentence-transformers knows.
                "type": f"sentence_transformers.models.{module.kind}",
            }
            for place, (path, module) in enumerate(zip(paths, modules, strict=True))
        ],
    )

"""The layout of sentence-transformers: a folder of modules, applied one after another."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ngame.files import write_json, write_tensors

POOLINGS = {"mean": "mean_tokens", "last": "lasttoken", "cls": "cls_token"}
"""How vectors of tokens become one, and the names of that in a pooling module's settings."""


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


def pooling_module(pooling: str, dim: int) -> Module:
    """The pooling module, in fields that every version of sentence-transformers reads."""
    modes = {f"pooling_mode_{name}": which == pooling for which, name in POOLINGS.items()}
    return Module("Pooling", {"word_embedding_dimension": dim, **modes})


def pooling_of(settings: Mapping[str, Any]) -> str:
    """What the settings of a pooling module say: a key of `POOLINGS`.

    Raises
    ------
    ValueError
        They say something else, or several things.
    """
    modes = settings.get("pooling_mode")
    if modes is None:  # before version 6: one field a mode, true for the mean if it is not there
        fields = {"pooling_mode_mean_tokens": True, **settings}
        prefix = "pooling_mode_"
        modes = [key.removeprefix(prefix) for key, on in fields.items() if on and prefix in key]
    modes = [modes] if isinstance(modes, str) else modes
    # The division by the root of the length changes the length of a vector, but no cosine.
    same = {"mean_sqrt_len_tokens": "mean", "mean": "mean", "cls": "cls"}
    same |= {name: pooling for pooling, name in POOLINGS.items()}
    found = {same.get(mode, "") for mode in modes}
    if len(found) != 1 or "" in found:
        raise ValueError(f"pooling is {' and '.join(modes)}, expected one of {', '.join(POOLINGS)}")
    return found.pop()

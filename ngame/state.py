"""States of samplers, banks and modules as tensors, the form that checkpoints hold."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def take_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose name begins with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def with_prefixes(**parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of all parts, each name with its part and a dot before it."""
    return {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}


def to_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A state of ints, arrays and tensors as tensors; a tensor stays where it is."""
    return {
        name: value.clone()
        if isinstance(value, torch.Tensor)
        else torch.from_numpy(np.array(value))
        for name, value in state.items()
    }


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What `to_tensors` gave, ints as ints again."""
    return {k: v.numpy() if v.dim() else v.item() for k, v in tensors.items()}

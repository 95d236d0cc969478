"""Converts states of samplers, banks and modules to tensors, which checkpoints store."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def take_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, with the prefix removed."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def with_prefixes(**parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of all parts, named ``part.name``."""
    return {f"{part}.{k}": v for part, tensors in parts.items() for k, v in tensors.items()}


def to_tensors(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Convert a state of ints, arrays and tensors to tensors; tensors stay on their device."""
    return {
        name: value.clone()
        if isinstance(value, torch.Tensor)
        else torch.from_numpy(np.array(value))
        for name, value in state.items()
    }


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Convert back what `to_tensors` gave."""
    return {k: v.numpy() if v.dim() else v.item() for k, v in tensors.items()}

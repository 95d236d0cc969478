"""Vectors where the core works on them: NumPy arrays on the host, tensors on a GPU."""

import warnings
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Vectors = npt.NDArray[Any] | torch.Tensor
"""Of shape [n, dim], float32 or float16. They stay where they are: what is computed of them lies
there too, and to the host come ids and scores, a few of them a row."""

# Pairs whose vectors are gathered at once to be scored: a few tens of megabytes.
_PAIRS_AT_ONCE = 32_768


def torch_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU if there is one.

    Raises
    ------
    ValueError
        torch cannot use it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which torch cannot use: {error}") from None


def core_device(device: torch.device, search: str) -> torch.device | None:
    """Where vectors that are made on a device are clustered and searched; None is the host.

    That is the GPU they are made on, if the GPU core is there, and searches are exact: the
    approximate index lies on the host.
    """
    if device.type != "cuda" or search != "exact":
        return None
    from ngame import cuda

    reason = cuda.why_not(device)
    if reason:
        warnings.warn(
            "vectors are copied to the CPU, to be clustered and searched there, since the GPU "
            f"core cannot be used: {reason}",
            stacklevel=4,
        )
        return None
    return device


def to_device(x: torch.Tensor, device: torch.device | None) -> Vectors:
    """A tensor without its gradient, on a device; where that is None, as an array on the host."""
    x = x.detach()
    return x.cpu().numpy() if device is None else x.to(device)


def to_numpy(values: Any) -> npt.NDArray[Any]:
    """Ids or scores that a search gave, or what is to be written to a file, as an array."""
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def unit(x: Vectors) -> Vectors:
    """Rows scaled to length 1; zero rows stay."""
    if isinstance(x, torch.Tensor):
        return F.normalize(x, dim=1, eps=1e-30)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return cast(npt.NDArray[Any], x / np.maximum(norms, np.float32(1e-30)))


def to_float16(x: Vectors) -> Vectors:
    """The same rounded to float16."""
    return x.half() if isinstance(x, torch.Tensor) else x.astype(np.float16)


def first_not_finite(x: Vectors) -> int | None:
    """The first row that has NaN or infinity, if there is one."""
    finite: Any
    if isinstance(x, torch.Tensor):
        low, high = x.aminmax(dim=1)  # NaN wins in both; `isfinite` would copy all of x
        finite = to_numpy(low.isfinite() & high.isfinite())
    else:
        finite = np.isfinite(x).all(axis=1)
    return None if finite.all() else int(np.argmin(finite))


def pair_products(
    x: Vectors, items: Vectors, rows: npt.NDArray[Any], columns: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """Dot products of rows of `x` and rows of `items`, pair by pair: float32, on the host."""
    einsum: Any = np.einsum
    if isinstance(items, torch.Tensor):
        einsum, x = torch.einsum, torch.as_tensor(x, device=items.device)
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(scores), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        scores[part] = to_numpy(einsum("ij,ij->i", x[rows[part]], items[columns[part]]))
    return scores


def as_floats(value: Any, what: str, device: torch.device | None) -> Vectors:
    """A float tensor or array `placed` where it is wanted; `what` begins the error for others."""
    if isinstance(value, torch.Tensor):
        floats = value.is_floating_point()
    elif isinstance(value, np.ndarray):
        floats = value.dtype.kind == "f"
    else:
        raise TypeError(f"{what} a {type(value).__name__}, expected a float tensor or array")
    if not floats:
        dtype = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{what} of dtype {dtype}, expected floats")
    if isinstance(value, torch.Tensor):
        return to_device(value.float(), device)  # NumPy knows no bfloat16
    return value if device is None else torch.tensor(value, dtype=torch.float32, device=device)

"""Functions on vectors that are NumPy arrays on the host or tensors on a GPU."""

import warnings
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Vectors = npt.NDArray[Any] | torch.Tensor
"""Vectors of shape [n, dim], float32 or float16: an array on the host or a tensor on a GPU.

Results computed from them stay on the same device. Only ids and scores go to the host."""

# Pairs scored per chunk: their gathered vectors take a few tens of megabytes.
_PAIRS_PER_CHUNK = 32_768
# Rows looked at together for NaN: what is said of each number stays in the cache.
_ROWS_PER_CHECK = 1024


def torch_device(name: str) -> torch.device:
    """The device called `name`; "auto" means a GPU if there is one, else the CPU.

    Raises
    ------
    ValueError
        torch cannot use this device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which torch cannot use: {error}") from None


def core_device(device: torch.device, search: str) -> torch.device | None:
    """Where to cluster and search the vectors of an encoder on `device`; None means the host.

    On a GPU it is that GPU, if the GPU core supports it and `search` is exact. The approximate
    index works on the host.
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
    """The detached tensor on `device`, or as an array on the host if that is None."""
    x = x.detach()
    return x.cpu().numpy() if device is None else x.to(device)


def to_numpy(values: Any) -> npt.NDArray[Any]:
    """An array or tensor as an array on the host."""
    return values.cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def normalize(x: Vectors) -> Vectors:
    """Scale rows to length 1; zero rows stay zero, and those with infinity become NaN."""
    if isinstance(x, torch.Tensor):
        return F.normalize(x, dim=1, eps=1e-30)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return cast(npt.NDArray[Any], x / np.maximum(norms, np.float32(1e-30)))


def to_float16(x: Vectors) -> Vectors:
    """Round to float16."""
    if isinstance(x, torch.Tensor):
        return x.half()
    # By torch: NumPy takes ten times as long.
    return torch.from_numpy(x).half().numpy()


def first_not_finite(x: Vectors) -> int | None:
    """The first row with NaN or infinity; None if all values are finite."""
    finite: Any
    if isinstance(x, torch.Tensor):
        low, high = x.aminmax(dim=1)  # NaN propagates to both; `isfinite` on x would copy it
        finite = to_numpy(low.isfinite() & high.isfinite())
        return None if finite.all() else int(np.argmin(finite))
    for start in range(0, len(x), _ROWS_PER_CHECK):
        finite = np.isfinite(x[start : start + _ROWS_PER_CHECK]).all(axis=1)
        if not finite.all():
            return start + int(np.argmin(finite))
    return None


def pair_products(
    x: Vectors, items: Vectors, rows: npt.NDArray[Any], columns: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """Dot product of each pair ``x[rows[i]], items[columns[i]]``, float32 [pairs] on the host."""
    einsum: Any = np.einsum
    if isinstance(items, torch.Tensor):
        einsum, x = torch.einsum, torch.as_tensor(x, device=items.device)
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(scores), _PAIRS_PER_CHUNK):
        part = slice(start, start + _PAIRS_PER_CHUNK)
        scores[part] = to_numpy(einsum("ij,ij->i", x[rows[part]], items[columns[part]]))
    return scores


def as_floats(value: Any, what: str, device: torch.device | None) -> Vectors:
    """Check for a float tensor or array and move it to `device`; `what` begins the error."""
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

"""The embedding bank: the vectors that training leaves."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ngame.arrays import as_count, as_ids
from ngame.encoders.vectors import Vectors, as_floats, to_device

# Divides the rows of a bank on a device: far below any float32, so that of them only zero stays.
_LEAST_NORM = 1e-300


class EmbeddingBank:
    """The vectors that the forward passes of a running trainer leave: a refresh costs nothing.

    Every row holds the direction it had when it was last stored, so that the vectors of an epoch
    come from a model that was changing; the method clusters such vectors by default (NGAME, Dahiya
    et al., WSDM 2023). Where several processes train, each stores its own rows only.

    Parameters
    ----------
    n_rows : int
        Number of training rows.
    dim : int
        Width of the vectors.
    device : torch.device or str, optional
        Where the bank lies; the host if not given. From a model on one GPU to a bank on it no
        vector leaves the GPU, and `update` does not wait for it.

    Attributes
    ----------
    vectors : float16 array of shape [n_rows, dim]; where `device` is given, a tensor on it
        Of unit length; zero where nothing, or a zero vector, was stored.

    Examples
    --------
    >>> bank = EmbeddingBank(3, 2)
    >>> bank.update([2, 0], torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    >>> bank.vectors.astype(float).round(1).tolist()
    [[0.0, -1.0], [0.0, 0.0], [0.6, 0.8]]
    >>> bank.unseen.tolist()
    [1]
    """

    def __init__(self, n_rows: int, dim: int, *, device: torch.device | str | None = None) -> None:
        shape = as_count(n_rows, "n_rows"), as_count(dim, "dim")
        self._device = None if device is None else torch.device(device)
        self.vectors: Any = to_device(
            torch.zeros(shape, dtype=torch.float16, device=device), self._device
        )
        self._seen = np.zeros(n_rows, np.bool_)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.vectors)

    @property
    def unseen(self) -> npt.NDArray[np.int64]:
        """Ids of the rows that nothing was stored for, ascending."""
        return np.flatnonzero(~self._seen)

    def update(self, rows: Any, vectors: Any) -> None:
        """Store vectors of rows.

        Parameters
        ----------
        rows : integer array or tensor of shape [m]
            Of a row that repeats, the last vector stays.
        vectors : float tensor (on any device) or array of shape [m, dim]
            Taken without their gradients, and brought to unit length.

        Raises
        ------
        TypeError
            `rows` are no integers, or `vectors` no floats.
        ValueError
            The shapes do not agree, or `vectors` has NaN or infinity. Nothing is stored. On a
            device, which would have to be waited for, NaN and infinity are stored as NaN: whoever
            clusters the rows then refuses them, and names the first.
        IndexError
            A row is out of range.
        """
        ids = as_ids(rows.cpu().numpy() if isinstance(rows, torch.Tensor) else rows, "rows")
        values = as_floats(vectors, "vectors is", self._device)
        expected = (len(ids), self.vectors.shape[1])
        if values.shape != expected:
            raise ValueError(f"vectors has shape {tuple(values.shape)}, expected {expected}")
        bad = (ids < 0) | (ids >= len(self))
        if bad.any():
            raise IndexError(f"rows has {ids[np.argmax(bad)]}, out of range for {len(self)}")
        if isinstance(values, torch.Tensor):
            # Which of the vectors of a row that repeats would stay is a matter of chance there.
            _, last = np.unique(ids[::-1], return_index=True)
            last = len(ids) - 1 - last
            directions = F.normalize(values[last].double(), dim=1, eps=_LEAST_NORM)
            self.vectors[ids[last]] = directions.half()
        else:
            norms = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
            if not np.isfinite(norms).all():
                at = int(np.argmin(np.isfinite(norms)))
                raise ValueError(f"vectors[{at}], of row {ids[at]}, has NaN or infinity")
            self.vectors[ids] = values / np.where(norms > 0, norms, 1)
        self._seen[ids] = True

    def state_dict(self) -> dict[str, Vectors]:
        """What a restart needs: `vectors`, and `seen`, a bool array [n_rows]."""
        return {"vectors": self.vectors, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises
        ------
        ValueError
            A key is missing, or the state is that of another number of rows or another width.
        """
        for name, here in self.state_dict().items():
            if name not in state:
                raise ValueError(f"state lacks {name}")
            if np.shape(state[name]) != here.shape:
                raise ValueError(
                    f"state has {name} of shape {np.shape(state[name])}, this bank {here.shape}"
                )
        self.vectors[:] = to_device(torch.as_tensor(state["vectors"]), self._device)
        self._seen[:] = state["seen"]

"""The embedding bank: the last training vector of every row."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from ngame.arrays import as_count, as_ids
from ngame.encoders.vectors import as_floats, to_device, to_numpy
from ngame.transfer import sent

# Smallest norm to divide by. It is far below every float32 norm, so it only affects zero vectors.
_MIN_NORM = 1e-300


class EmbeddingBank:
    """Vectors of all training rows, stored during the forward passes of training.

    Clustering the bank needs no extra encoding pass. Its vectors are up to one epoch old, because
    each row keeps the vector of its last visit while the model goes on changing. NGAME clusters
    such vectors by default (Dahiya et al., WSDM 2023). When several processes train, each bank
    holds the rows of its own process only.

    Parameters
    ----------
    n_rows : int
        Number of training rows.
    dim : int
        Width of the vectors.
    device : torch.device or str, optional
        Where to keep the bank; the host if not given. With model and bank on the same GPU, no
        vector leaves the GPU and `update` does not wait for it.

    Attributes
    ----------
    vectors : float16 array of shape [n_rows, dim]; a tensor if `device` is given
        Unit length; zero for rows that were never stored or stored as a zero vector.

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
        """Ids of the rows that were never stored, ascending."""
        return np.flatnonzero(~self._seen)

    def update(self, rows: npt.ArrayLike, vectors: npt.ArrayLike) -> None:
        """Store the vectors of some rows.

        Parameters
        ----------
        rows : integer array or tensor of shape [m]
            If a row repeats, its last vector is stored.
        vectors : float tensor (on any device) or array of shape [m, dim]
            Detached, then scaled to unit length.

        Raises
        ------
        TypeError
            `rows` are not integers, or `vectors` are not floats.
        ValueError
            The shapes differ, or `vectors` has NaN or infinity; nothing is stored. A bank on a
            device does not check for these, because it would have to wait for the device. It
            stores NaN, and clustering then raises an error that names the first such row.
        IndexError
            A row is out of range.
        """
        ids = as_ids(rows.cpu().numpy() if isinstance(rows, torch.Tensor) else rows, "rows")
        values = as_floats(vectors, "vectors is", self._device)
        expected = (len(ids), self.vectors.shape[1])
        if values.shape != expected:
            raise ValueError(f"vectors has shape {tuple(values.shape)}, expected {expected}")
        outside = (ids < 0) | (ids >= len(self))
        if outside.any():
            raise IndexError(f"rows has {ids[np.argmax(outside)]}, out of range for {len(self)}")
        if isinstance(values, torch.Tensor):
            # A GPU would store an arbitrary one of repeated rows. Indices are sent to it, since to
            # index by an array of NumPy waits for it.
            stored, last = np.unique(ids[::-1], return_index=True)
            last_of = sent(torch.from_numpy(len(ids) - 1 - last), values.device)
            values = values.index_select(0, last_of)
            directions = F.normalize(values.double(), dim=1, eps=_MIN_NORM)
            places = sent(torch.from_numpy(stored), values.device)
            self.vectors.index_copy_(0, places, directions.half())
        else:
            norms = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
            if not np.isfinite(norms).all():
                bad_row = int(np.argmin(np.isfinite(norms)))
                raise ValueError(f"vectors[{bad_row}], of row {ids[bad_row]}, has NaN or infinity")
            self.vectors[ids] = values / np.where(norms > 0, norms, 1)
        self._seen[ids] = True

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint needs: `vectors`, and `seen`, bool [n_rows], the rows ever stored.

        They are tensors, so that plain ``torch.load`` reads them, and the bank's own, not copies:
        write them before more is stored.
        """
        return {"vectors": torch.as_tensor(self.vectors), "seen": torch.from_numpy(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, as tensors or arrays.

        Raises
        ------
        ValueError
            A key is missing, or the state has another number of rows or another width.
        """
        for name, ours in self.state_dict().items():
            if name not in state:
                raise ValueError(f"state lacks {name}")
            if np.shape(state[name]) != ours.shape:
                raise ValueError(
                    f"state has {name} of shape {tuple(np.shape(state[name]))}, "
                    f"this bank {tuple(ours.shape)}"
                )
        self.vectors[:] = to_device(torch.as_tensor(state["vectors"]), self._device)
        self._seen[:] = to_numpy(state["seen"])

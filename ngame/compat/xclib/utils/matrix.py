"""Predictions of a fixed number a row, filled block after block."""

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame.arrays import as_count
from ngame.compat.xclib.utils.dense import topk
from ngame.compat.xclib.utils.sparse import csr_from_arrays


class SMatrix:
    """A sparse matrix as two arrays of `nnz` ids and values a row.

    Parameters
    ----------
    n_rows, n_cols : int
    nnz : int
        Entries a row, 1 or more.
    pad_val : float
        Value where a row has no entry; the id there is `n_cols`.
    fname : str, optional
        Keep the arrays in the files ``fname.ind`` and ``fname.val``, which are overwritten, and
        map them into memory.

    Attributes
    ----------
    indices : int64 array of shape [n_rows, nnz]
    values : float32 array of shape [n_rows, nnz]

    Notes
    -----
    In pyxclib ids of a row are not sorted in what `data` gives, and entries of one place are kept
    apart; `update_block` fails on fewer than `nnz` values a row, and takes its `nnz` best in
    arbitrary order.
    """

    def __init__(
        self,
        n_rows: int,
        n_cols: int,
        nnz: int,
        pad_val: float = -1e5,
        fname: str | None = None,
    ) -> None:
        self.n_rows = as_count(n_rows, "n_rows", 0)
        self.n_cols = as_count(n_cols, "n_cols", 0)
        self.nnz = as_count(nnz, "nnz")
        self.pad_ind, self.pad_val = self.n_cols, pad_val
        self.indices = self._array(fname and fname + ".ind", np.int64, self.pad_ind)
        self.values = self._array(fname and fname + ".val", np.float32, self.pad_val)

    def _array(self, fname: str | None, dtype: npt.DTypeLike, fill: float) -> npt.NDArray[Any]:
        shape = (self.n_rows, self.nnz)
        if fname is None:
            return np.full(shape, fill, dtype)
        array = np.memmap(fname, dtype, mode="w+", shape=shape)
        array[:] = fill
        return array

    def data(self, format: str = "sparse") -> Any:
        """Give what is stored.

        Parameters
        ----------
        format : str
            "sparse": a float32 csr_matrix [n_rows, n_cols] without the padding, indices sorted.
            Anything else: the arrays `indices` and `values` themselves.
        """
        self.flush()
        if format != "sparse":
            return self.indices, self.values
        kept = self.indices != self.pad_ind
        if kept.all():
            return csr_from_arrays(self.indices, self.values, self.shape)
        padded = csr_from_arrays(
            self.indices, np.where(kept, self.values, 0), (self.n_rows, self.n_cols + 1)
        )
        return sp.csr_matrix(padded[:, :-1])

    def update(self, ind: Any, val: Any) -> None:
        """Replace all ids and values, both of shape [n_rows, nnz]."""
        for name, given in (("ind", ind), ("val", val)):
            if np.shape(given) != self.indices.shape:
                raise ValueError(
                    f"{name} has shape {np.shape(given)}, expected {self.indices.shape}"
                )
        self.indices[:], self.values[:] = ind, val
        self.flush()

    def update_block(self, start_idx: int, ind: Any, val: Any) -> None:
        """Put in the best of some rows, from row `start_idx` on.

        Parameters
        ----------
        start_idx : int
        ind : int array of shape [b, m], or None
            The id of each value; None where column j is id j.
        val : float array of shape [b, m]
            Its `nnz` largest of every row are kept, best first. Where m is less, the rest is
            padding.

        Raises
        ------
        ValueError
            The shapes differ, or a row has NaN.
        IndexError
            The rows go beyond `n_rows`.
        """
        top_ind, top_val = self.topk(ind, val)
        rows, taken = np.shape(top_val)
        end = start_idx + rows
        if start_idx < 0 or end > self.n_rows:
            raise IndexError(f"rows {start_idx} .. {end} are out of range for {self.n_rows} rows")
        self.indices[start_idx:end, :taken] = top_ind
        self.values[start_idx:end, :taken] = top_val
        self.indices[start_idx:end, taken:] = self.pad_ind
        self.values[start_idx:end, taken:] = self.pad_val

    def topk(self, ind: Any, val: Any) -> Any:
        """Ids and values that `update_block` keeps, at most `nnz` a row: to be overridden."""
        val = np.asarray(val)
        return topk(val, ind, k=min(self.nnz, val.shape[1])) if val.ndim == 2 else topk(val, ind)

    @property
    def in_memory(self) -> bool:
        """Whether the arrays are in memory rather than in files."""
        return not isinstance(self.indices, np.memmap)

    def flush(self) -> None:
        """Write what is in files through to the disk."""
        for array in (self.indices, self.values):
            if isinstance(array, np.memmap):
                array.flush()

    def __getitem__(self, index: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        return self.indices[index], self.values[index]

    def __len__(self) -> int:
        return self.n_rows

    @property
    def shape(self) -> tuple[int, int]:
        """(n_rows, n_cols)"""
        return self.n_rows, self.n_cols

"""Labels of points, from a file or a matrix: `LabelsBase` and its dense and sparse kinds."""

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame.compat.xclib.data.data_utils import read_gen_sparse
from ngame.compat.xclib.data.features import path_of
from ngame.compat.xclib.utils import sparse

Ids = npt.NDArray[np.int64]


class LabelsBase:
    """Labels of points, rows of a sparse matrix `Y`.

    Where there are neither a file nor Y, there are no labels: `Y` and all results are None, and
    counts are -1.

    Parameters
    ----------
    data_dir : str
    fname : str or None
        A file in `data_dir`, read by `read_gen_sparse` where Y is not given.
    Y : sparse matrix or array of shape [n, l], optional
    _format : "csr", "csc", ...
        SciPy's format of `Y`.

    Raises
    ------
    ValueError
        `axis` of a method is not 0 or 1.
    """

    def __init__(
        self, data_dir: str, fname: str | None, Y: Any = None, _format: str = "csr"
    ) -> None:
        self._format = _format
        self.data = self.load(data_dir, fname, Y)

    def load(self, data_dir: str, fname: str | None, Y: Any) -> Any:
        """Give Y itself, what the file holds, or None."""
        if Y is None and fname is not None:
            return read_gen_sparse(path_of(data_dir, fname, "Y"))
        return Y

    @property
    def _valid(self) -> bool:
        return self.Y is not None

    @property
    def data(self) -> Any:
        """Y; assigning converts it to the format of this object."""
        return self.Y

    @data.setter
    def data(self, Y: Any) -> None:
        if Y is not None:
            # Rows of SciPy's sparse arrays have one dimension.
            Y = (Y if sp.isspmatrix(Y) else sp.csr_matrix(Y)).asformat(self._format)
        self.Y = Y

    def frequency(self, axis: int = 0) -> Ids | None:
        """Count the nonzero values of every label (`axis` 0) or point (1)."""
        _check(axis)
        if not self._valid:
            return None
        return np.asarray((self.Y != 0).sum(axis=axis), np.int64).ravel()

    def get_invalid_indices(self, axis: int = 0) -> Ids | None:
        """Ids of the labels without points (`axis` 0), or the points without labels (1)."""
        counts = self.frequency(axis)
        return None if counts is None else np.flatnonzero(counts == 0)

    def get_valid_indices(self, axis: int = 0) -> Ids | None:
        """Ids of the labels with points (`axis` 0), or the points with labels (1)."""
        counts = self.frequency(axis)
        return None if counts is None else np.flatnonzero(counts)

    def remove_invalid(self, axis: int = 0) -> Ids | None:
        """Drop the labels without points (`axis` 0) or the points without labels (1).

        Returns
        -------
        ids of those that are kept
        """
        indices = self.get_valid_indices(axis)
        self._index_select(indices, axis=1 - axis)
        return indices

    def instance_select(self, indices: Any) -> Any:
        """Rows of Y."""
        return self.Y[indices] if self._valid else None

    def label_select(self, indices: Any) -> Any:
        """Columns of Y."""
        return self.Y[:, indices] if self._valid else None

    def index_select(self, indices: Any, axis: int = 1) -> Any:
        """Rows (`axis` 0) or columns (1) of Y."""
        _check(axis)
        return self.label_select(indices) if axis else self.instance_select(indices)

    def _index_select(self, indices: Any, axis: int = 0) -> None:
        """Keep only these rows (`axis` 0) or columns (1)."""
        self.Y = self.index_select(indices, axis)

    def normalize(self, norm: str = "max", copy: bool = False) -> None:
        """Scale the rows, as `ngame.compat.xclib.utils.sparse.normalize` does."""
        if self._valid:
            self.data = sparse.normalize(self.Y, norm=norm, copy=copy)

    def binarize(self) -> None:
        """Set every stored value to 1."""
        if self._valid:
            self.Y = sparse.binarize(self.Y)

    def transpose(self) -> Any:
        """Points of the labels: the transpose of Y."""
        return self.Y.transpose() if self._valid else None

    @property
    def num_instances(self) -> int:
        """Number of points."""
        return int(self.Y.shape[0]) if self._valid else -1

    @property
    def num_labels(self) -> int:
        """Number of labels."""
        return int(self.Y.shape[1]) if self._valid else -1

    @property
    def shape(self) -> tuple[int, int]:
        """(points, labels)"""
        return self.num_instances, self.num_labels

    def __getitem__(self, index: Any) -> Any:
        return self.Y[index] if self._valid else None


class _Normalized(LabelsBase):
    def __init__(
        self, data_dir: str, fname: str | None, Y: Any = None, normalize: bool = False
    ) -> None:
        super().__init__(data_dir, fname, Y)
        if normalize:
            self.normalize()


class DenseLabels(_Normalized):
    """Labels whose rows are given as float32 arrays of shape [l].

    Parameters
    ----------
    data_dir, fname, Y
        As for `LabelsBase`.
    normalize : bool
        Divide every row by its largest magnitude.
    """

    def __getitem__(self, index: Any) -> Any:
        rows = super().__getitem__(index)
        return None if rows is None else rows.toarray().ravel().astype(np.float32)


class SparseLabels(_Normalized):
    """Labels whose rows are given as two arrays: ids and values.

    Parameters
    ----------
    data_dir, fname, Y
        As for `LabelsBase`.
    normalize : bool
        Divide every row by its largest magnitude.
    """

    def __getitem__(self, index: Any) -> Any:
        rows = super().__getitem__(index)
        return None if rows is None else (rows.indices, rows.data)


def _check(axis: int) -> None:
    if axis not in (0, 1):
        raise ValueError(f"axis is {axis}, expected 0 or 1")

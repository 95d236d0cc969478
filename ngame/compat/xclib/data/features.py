"""Features of points, from a file or a matrix: `FeaturesBase` and its dense and sparse kinds."""

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from ngame.compat.xclib.data.data_utils import read_gen_dense, read_gen_sparse
from ngame.compat.xclib.utils import sparse

Ids = npt.NDArray[np.int64]


class FeaturesBase:
    """Features of points, rows of an array or matrix `X`.

    Parameters
    ----------
    data_dir : str
    fname : str
        A file in `data_dir`, read where X is not given.
    X : array or sparse matrix of shape [n, d], optional

    Raises
    ------
    ValueError
        There is neither a file nor X, or `axis` of a method is not 0 or 1.

    Notes
    -----
    In pyxclib `frequency` of this base adds up values, so a feature that is negative as often as
    positive counts as missing; here, as in its subclasses, it counts nonzero values.
    """

    def __init__(self, data_dir: str, fname: str | None, X: Any = None) -> None:
        self.X = self.load(data_dir, fname, X)

    def load(self, data_dir: str, fname: str | None, X: Any) -> Any:
        """Give X itself, or what the file holds; the base class reads no file."""
        if X is None:
            raise ValueError(f"X is None, and {type(self).__name__} reads no files")
        return X

    def frequency(self, axis: int = 0) -> Ids:
        """Count the nonzero values of every column (`axis` 0) or row (1)."""
        nonzero = self.X != 0
        return np.asarray(nonzero.sum(axis=_axis(axis)), np.int64).ravel()

    def get_invalid_indices(self, axis: int = 0) -> Ids:
        """Ids of the columns (`axis` 0) or rows (1) without a nonzero value."""
        return np.flatnonzero(self.frequency(axis) == 0)

    def get_valid_indices(self, axis: int = 0) -> Ids:
        """Ids of the columns (`axis` 0) or rows (1) with a nonzero value."""
        return np.flatnonzero(self.frequency(axis))

    def remove_invalid(self, axis: int = 0) -> Ids:
        """Drop the columns (`axis` 0) or rows (1) without a nonzero value; give ids of the rest."""
        indices = self.get_valid_indices(axis)
        self._index_select(indices, axis=1 - axis)
        return indices

    def instance_select(self, indices: Any) -> Any:
        """Rows of X."""
        return self.X[indices]

    def feature_select(self, indices: Any) -> Any:
        """Columns of X."""
        return self.X[:, indices]

    def index_select(self, indices: Any, axis: int = 1) -> Any:
        """Rows (`axis` 0) or columns (1) of X."""
        return self.feature_select(indices) if _axis(axis) else self.instance_select(indices)

    def _index_select(self, indices: Any, axis: int = 1) -> None:
        """Keep only these rows (`axis` 0) or columns (1)."""
        self.X = self.index_select(indices, axis)

    def normalize(self, norm: str = "l2", copy: bool = False) -> None:
        """Scale the rows, as `ngame.compat.xclib.utils.sparse.normalize` does."""
        self.X = sparse.normalize(self.X, norm=norm, copy=copy)

    @property
    def num_instances(self) -> int:
        """Number of rows."""
        return int(self.X.shape[0])

    @property
    def num_features(self) -> int:
        """Number of columns."""
        return int(self.X.shape[1])

    @property
    def data(self) -> Any:
        """X."""
        return self.X

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        return self.num_instances, self.num_features

    def __getitem__(self, index: Any) -> Any:
        return self.X[index]


class DenseFeatures(FeaturesBase):
    """Features in an array, or in a file that `read_gen_dense` reads.

    Parameters
    ----------
    data_dir, fname, X
        As for `FeaturesBase`.
    normalize : bool
        Scale the rows to length 1, an array of the caller's in place.
    """

    def __init__(
        self, data_dir: str, fname: str | None, X: Any = None, normalize: bool = False
    ) -> None:
        super().__init__(data_dir, fname, X)
        if normalize:
            self.normalize()

    def load(self, data_dir: str, fname: str | None, X: Any) -> Any:
        """Give X itself, or the array of the file."""
        return read_gen_dense(path_of(data_dir, fname, "X")) if X is None else X


class SparseFeatures(FeaturesBase):
    """Features in a sparse matrix, or in a file that `read_gen_sparse` reads.

    Indexing gives ids and values of a row: two arrays.

    Parameters
    ----------
    data_dir, fname, X
        As for `FeaturesBase`.
    normalize : bool
        Scale the rows to length 1, a CSR matrix of floats of the caller's in place.
    """

    def __init__(
        self, data_dir: str, fname: str | None, X: Any = None, normalize: bool = False
    ) -> None:
        super().__init__(data_dir, fname, X)
        if normalize:
            self.normalize()

    def load(self, data_dir: str, fname: str | None, X: Any) -> Any:
        """Give X itself, as CSR, or the matrix of the file."""
        return read_gen_sparse(path_of(data_dir, fname, "X")) if X is None else sp.csr_matrix(X)

    def __getitem__(self, index: Any) -> Any:
        row = self.X[index]
        return row.indices, row.data


def path_of(data_dir: str, fname: str | None, name: str) -> str:
    """The path of a file, which must be given where the argument `name` is not."""
    if fname is None:
        raise ValueError(f"fname and {name} are None, expected one of them")
    return os.path.join(data_dir, fname)


def _axis(axis: int) -> int:
    if axis not in (0, 1):
        raise ValueError(f"axis is {axis}, expected 0 or 1")
    return axis

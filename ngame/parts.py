"""Rows of a matrix larger than memory, dealt to parts that are files on the disk."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


class Parts:
    """Rows and their ids, appended to the files of their parts, read and removed part by part.

    Parameters
    ----------
    folder : where the files go; they have names of their own
    dim : columns of the rows
    dtype : of the rows
    """

    def __init__(self, folder: str | os.PathLike[str], dim: int, dtype: npt.DTypeLike) -> None:
        self._folder, self._dim, self._dtype = Path(folder), dim, np.dtype(dtype)

    def append(
        self,
        homes: npt.NDArray[np.integer],
        ids: npt.NDArray[np.int32],
        rows: npt.NDArray[Any],
    ) -> None:
        """Add each row, with its id, to the part that is its home."""
        order = np.argsort(homes, kind="stable")
        parts, starts = np.unique(homes[order], return_index=True)
        ends = np.append(starts, len(order))[1:]
        for part, start, end in zip(parts.tolist(), starts, ends, strict=True):
            chosen = order[start:end]
            for path, values in zip(self._paths(part), (ids, rows), strict=True):
                with open(path, "ab") as file:
                    values[chosen].tofile(file)

    def take(self, part: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
        """Ids and rows of a part, in the order in which they came. Its files are removed."""
        paths = self._paths(part)
        if not paths[0].exists():
            return np.empty(0, np.int32), np.empty((0, self._dim), self._dtype)
        ids, values = (
            np.fromfile(path, dtype)
            for path, dtype in zip(paths, (np.dtype(np.int32), self._dtype), strict=True)
        )
        for path in paths:
            path.unlink()
        return ids, values.reshape(-1, self._dim)

    def _paths(self, part: int) -> tuple[Path, Path]:
        return self._folder / f"{part}.ids", self._folder / f"{part}.rows"

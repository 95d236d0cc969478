"""A division of rows into clusters: what it holds, how tight it is, its files."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ngame import _core
from ngame.arrays import ProcessGroup, as_array, as_count, as_matrix, as_threads, contiguous
from ngame.cluster.order import as_seed
from ngame.dispatch import dispatched, on_host
from ngame.files import atomic_write, reading
from ngame.topk import topk_arrays

# Rows whose neighbours `Clusters.neighbour_share` looks at.
_ASKED_ROWS = 2000


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """A division of n rows into k clusters.

    Attributes
    ----------
    order : int32 array of shape [n]
        The row ids, cluster after cluster.
    offsets : int64 array of shape [k + 1]
        Cluster c is ``order[offsets[c]:offsets[c + 1]]``.

    Raises
    ------
    TypeError
        They are no integers.
    ValueError
        `order` is not a permutation of 0 .. n - 1, or `offsets` does not ascend from 0 to n.
    """

    order: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        order, offsets = as_array(self.order, "order"), as_array(self.offsets, "offsets")
        if order.ndim != 1 or offsets.ndim != 1:
            raise ValueError(
                f"order and offsets have shapes {order.shape} and {offsets.shape}, "
                "expected one dimension each"
            )
        for name, ids in (("order", order), ("offsets", offsets)):
            if ids.dtype.kind not in "iu" and len(ids):
                raise TypeError(f"{name} has dtype {ids.dtype}, expected integers")
        offsets = contiguous(offsets, np.int64)
        ends = offsets[:1].tolist() + offsets[-1:].tolist()
        if ends != [0, len(order)] or (np.diff(offsets) < 0).any():
            raise ValueError(f"offsets does not ascend from 0 to the {len(order)} rows of order")
        seen = np.zeros(len(order), np.bool_)
        inside = order[(order >= 0) & (order < len(order))]  # before a cast, which wraps around
        seen[inside.astype(np.int64, copy=False)] = True
        if not seen.all():
            raise ValueError(f"order has not every row once: row {int(np.argmin(seen))} is missing")
        object.__setattr__(self, "order", contiguous(order, np.int32))
        object.__setattr__(self, "offsets", offsets)

    def __repr__(self) -> str:
        sizes = np.diff(self.offsets)
        of = f" of {sizes.min()}" if len(sizes) else ""
        if len(sizes) and sizes.max() > sizes.min():
            of += f" to {sizes.max()}"
        return f"Clusters({len(self.order)} rows, {len(self)} clusters{of})"

    def __len__(self) -> int:
        """Number of clusters."""
        return len(self.offsets) - 1

    def __getitem__(self, cluster: int) -> npt.NDArray[np.int32]:
        """The row ids of one cluster."""
        if not -len(self) <= cluster < len(self):
            raise IndexError(f"cluster {cluster} is out of range for {len(self)} clusters")
        cluster %= len(self)
        return self.order[self.offsets[cluster] : self.offsets[cluster + 1]]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Clusters):
            return NotImplemented
        return np.array_equal(self.order, other.order) and np.array_equal(
            self.offsets, other.offsets
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def assignment(self) -> npt.NDArray[np.int32]:
        """The cluster of every row, int32 [n]."""
        assignment = np.empty(len(self.order), np.int32)
        assignment[self.order] = np.repeat(
            np.arange(len(self), dtype=np.int32), np.diff(self.offsets)
        )
        return assignment

    def coherence(self, x: npt.ArrayLike, *, threads: int = 0) -> float:
        """How tight the clusters are: the mean squared norm of the means of their unit vectors.

        Parameters
        ----------
        x : float32 or float16 array of shape [n, d]
            What was clustered. Rows are scaled to unit length here; zero rows stay zero.
        threads : int
            0 means the CPUs this process may use.

        Returns
        -------
        float
            1 where all the rows of each cluster point one way, near 0 where they point anywhere.
        """
        rows: npt.NDArray[Any] = self._as_many(as_matrix(x, "x"))
        return _core.coherence(rows, self.order, self.offsets, as_threads(threads))

    def neighbour_share(
        self,
        x: npt.ArrayLike,
        k: int = 10,
        *,
        seed: int = 0,
        threads: int = 0,
        group: ProcessGroup | None = None,
    ) -> float:
        """NN10 where k is 10: how many of a row's k nearest rows lie in its own cluster.

        What batches of whole clusters are made for: near rows that share a batch are each other's
        hard negatives. A row in a cluster of c rows has c - 1 others, so the share is at most
        (c - 1) / k there.

        Parameters
        ----------
        x : float32 or float16 array of shape [n, d]
            What was clustered, n of 2 or more; or a CUDA tensor, searched there. Nearest is by the
            cosine, found by exact search.
        k : int
            Neighbours a row; all others where there are fewer.
        seed : int
            Draws the 2,000 rows that are looked at; all of them where there are no more.
        threads : int
            0 means the CPUs this process may use.
        group : torch.distributed.ProcessGroup, optional
            Every rank calls with a share of x, as in `balanced_clusters`.

        Returns
        -------
        float
            The mean over these rows, from 0 to 1. Drawn rows leave it within about 0.02.

        Raises
        ------
        ValueError
            `x` has another number of rows than the clusters, or one row only.
        """
        rows, first = len(self.order), 0
        own_rows: Any  # an array, or a tensor on a GPU
        if group is None:
            own_rows = self._as_many(dispatched(as_matrix)(x, "x"))
        else:
            from ngame.ranks import Ranks

            ranks, own_rows = Ranks(group), as_matrix(x, "x")
            counts = np.concatenate(ranks.all_arrays(np.array([len(own_rows)])))
            if counts.sum() != rows:
                raise ValueError(f"x has {counts.sum()} rows, the clusters have {rows}")
            first = int(counts[: ranks.rank].sum())
        if rows < 2:
            raise ValueError(f"x has {rows} rows, expected 2 or more")
        k = min(as_count(k, "k"), rows - 1)
        asked = np.arange(rows)
        if rows > _ASKED_ROWS:
            random = np.random.default_rng(as_seed(seed))
            asked = np.sort(random.choice(rows, _ASKED_ROWS, replace=False))
        own = asked[(asked >= first) & (asked < first + len(own_rows))]
        itself = np.stack([np.arange(len(own)), own], axis=1)
        _, found = topk_arrays(
            own_rows[own - first], own_rows, k, drop=itself, threads=threads, group=group
        )
        near = np.asarray(on_host(found))
        assignment = self.assignment
        shared = assignment[near] == assignment[own, None]
        if group is not None:
            shared = np.concatenate(ranks.all_arrays(shared))
        return float(shared.mean())

    def _as_many(self, x: Any) -> Any:
        if len(x) != len(self.order):
            raise ValueError(f"x has {len(x)} rows, the clusters have {len(self.order)}")
        return x

    def save(self, path: str | os.PathLike[str], part: int = 0, parts: int = 1) -> None:
        """Write an ``.npz`` file, aside and then in place of `path`.

        With `parts`, such as one for each of several processes, only that part of the clusters:
        FILE.npz is then FILE-00000-of-00002.npz and so on, and `load` reads all of them.
        """
        first, end = part * len(self) // parts, (part + 1) * len(self) // parts
        offsets = self.offsets[first : end + 1]
        order = self.order[offsets[0] : offsets[-1]]
        if parts > 1:
            path = Path(path)
            path = path.with_name(f"{path.stem}-{part:05}-of-{parts:05}{path.suffix}")
        with atomic_write(path) as aside, open(aside, "wb") as file:
            np.savez(file, order=order, offsets=offsets)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Clusters":
        """Read what `save` wrote, in one file or in parts.

        Raises
        ------
        ValueError
            The file is no such file; or there are parts of several divisions.
        FileNotFoundError
            There is no such file, and no part of it; or a part is missing.
        """
        path = Path(path)
        paths = [path]
        if not path.exists():
            found = path.parent.glob(f"{glob.escape(path.stem)}-*-of-*{path.suffix}")
            # Not those of FILE-other.npz.
            part_of = re.compile(rf"{re.escape(path.stem)}-\d{{5,}}-of-(\d{{5,}})")
            counts = {match[1] for file in found if (match := part_of.fullmatch(file.stem))}
            if len(counts) > 1:
                raise ValueError(f"there are parts of {path} of {sorted(counts)} files")
            for count in counts:
                names = [f"{path.stem}-{part:05}-of-{count}" for part in range(int(count))]
                paths = [path.with_name(name + path.suffix) for name in names]
        orders, offsets = [], [np.zeros(1, np.int64)]
        for path in paths:
            with (
                reading(path, "does not hold clusters"),
                open(path, "rb") as file,
                np.load(file, allow_pickle=False) as arrays,
            ):
                orders.append(arrays["order"])
                offsets.append(arrays["offsets"][1:])
        with reading(path, "does not hold clusters"):
            return cls(np.concatenate(orders), np.concatenate(offsets))

"""Tokenized texts: one flat array of ids, and the offset of each text."""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ngame.files import atomic_write, reading


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Token ids of n texts, without padding.

    Attributes
    ----------
    ids : int32 array of shape [total]
        The ids of all texts, concatenated.
    offsets : int64 array of shape [n + 1]
        Text i has the ids ``ids[offsets[i]:offsets[i + 1]]``.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def from_lists(cls, rows: Iterable[Iterable[int]]) -> "Tokens":
        """Make from one sequence of ids per text."""
        arrays = [np.fromiter(row, np.int32) for row in rows]
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(row) for row in arrays], out=offsets[1:])
        return cls(np.concatenate(arrays) if arrays else np.empty(0, np.int32), offsets)

    @classmethod
    def concatenate(cls, parts: Iterable["Tokens"]) -> "Tokens":
        """Concatenate several sets of texts."""
        parts = list(parts)
        if not parts:
            return cls.from_lists([])
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(np.concatenate([part.ids for part in parts]), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each text, int64 [n]."""
        return np.diff(self.offsets)

    def take(self, rows: npt.NDArray[np.integer]) -> "Tokens":
        """The texts `rows`, in that order; rows may repeat."""
        starts = self.offsets[rows]
        lengths = self.offsets[np.asarray(rows) + 1] - starts
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        # Position of every gathered id: the start of its text plus its position in the text.
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Tokens(self.ids[positions], offsets)

    def part(self, rows: slice) -> "Tokens":
        """The texts from `rows.start` to `rows.stop`, whose ids are not copied."""
        offsets = self.offsets[rows.start : rows.stop + 1]
        return Tokens(self.ids[offsets[0] : offsets[-1]], offsets - offsets[0])

    def save(self, stem: str | os.PathLike[str]) -> None:
        """Write ``STEM.ids.npy`` and ``STEM.offsets.npy``."""
        for name in ("ids", "offsets"):
            with atomic_write(f"{stem}.{name}.npy") as aside:
                np.save(aside, getattr(self, name))

    @classmethod
    def load(cls, stem: str | os.PathLike[str]) -> "Tokens":
        """Open the files that `save` wrote; the ids are memory-mapped."""
        ids, offsets = f"{os.fspath(stem)}.ids.npy", f"{os.fspath(stem)}.offsets.npy"
        with reading(offsets):
            found = np.load(offsets)
        with reading(ids):
            tokens = cls(np.load(ids, mmap_mode="r"), found)
            if len(tokens.ids) != found[-1]:
                raise ValueError(f"it has {len(tokens.ids)} ids, expected {found[-1]}")
        return tokens

"""The checkpoint of a run: one file, replaced atomically."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch

from ngame.files import reading, write_tensors


class Checkpoint:
    """Saves and loads the state of a run, and says when to save.

    Parameters
    ----------
    folder : the folder to write to; if None, nothing is saved
    minutes : minimum time between two checkpoints
    """

    def __init__(self, folder: Path | None, minutes: float) -> None:
        self.path = folder / "state.safetensors" if folder is not None else None
        self._seconds = minutes * 60
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether enough time has passed since the last save."""
        return self.path is not None and time.monotonic() - self._last >= self._seconds

    def save(self, meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace the checkpoint by `meta` (JSON values) and `tensors`."""
        if self.path is None:
            return
        write_tensors(self.path, tensors, {"meta": json.dumps(meta)})
        self._last = time.monotonic()

    def load(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """The last `meta` and `tensors` saved; None if there are none.

        Raises
        ------
        DamagedFileError
            The file is damaged; the message names it.
        """
        if self.path is None or not self.path.exists():
            return None
        with reading(self.path), safetensors.safe_open(self.path, "pt") as file:
            meta = json.loads(file.metadata()["meta"])
            return meta, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

"""Writing files so that a reader, or a killed process, only ever sees a whole one."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_ASIDE = ".partial-"
# The names of what a killed process leaves behind: ours, and those of safetensors' own writing.
_LEFTOVERS = (f"{_ASIDE}*", ".tmp??????")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write aside; on success it takes the place of `path`, on error it goes.

    The name that is given keeps the suffix of `path` and lies in the same folder, so that the final
    rename stays on one file system. The content is flushed to the disk before the rename.

    Raises
    ------
    OSError
        The file cannot be written, say because the disk is full; the message names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for a folder: it is filled aside and then takes the place of `path`.

    A folder cannot replace a full one in a single step, so an old one is moved away first: a
    process killed in between leaves no folder, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = _aside(path), _aside(path)
    aside.mkdir()
    try:
        yield aside
        if path.exists():
            os.replace(path, old)
        try:
            os.replace(aside, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing anywhere in `folder` and did not finish."""
    for name in _LEFTOVERS:
        for path in list(folder.rglob(name)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON in one step."""
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def write_tensors(
    path: str | os.PathLike[str],
    tensors: "Mapping[str, torch.Tensor]",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write contiguous tensors, on any device and free to share memory, in safetensors format."""
    # Here, since those who write no tensors need not wait for the import.
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    alone: dict[str, torch.Tensor] = {}
    memory = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        # The format refuses two names of one memory, as the tied weights of a module have.
        place = tensor.untyped_storage().data_ptr()
        tensor = tensor.contiguous()
        alone[name] = tensor.clone() if place in memory else tensor
        memory.add(place)
    path = Path(path)
    with atomic_write(path) as aside:
        try:
            save_file(alone, aside, None if metadata is None else dict(metadata))
        except SafetensorError as error:  # which a full disk raises too
            raise OSError(str(error)) from error
        # The library makes files that nobody but the owner reads; this one is like its folder.
        aside.chmod(path.parent.stat().st_mode & 0o666)


def _aside(path: Path) -> Path:
    return path.with_name(f"{_ASIDE}{uuid.uuid4().hex[:8]}-{path.name}")

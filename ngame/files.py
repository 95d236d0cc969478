"""Writing files whole: a reader sees the old file or the new one, even after a crash."""

import errno
import json
import os
import platform
import shutil
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

_ASIDE = ".partial-"
# Names of temporary files: ours, and those of safetensors.
_LEFTOVERS = (f"{_ASIDE}*", ".tmp??????")


class DamagedFileError(ValueError):
    """The content of a file cannot be understood: it is damaged, or something else."""


@contextmanager
def reading(path: str | os.PathLike[str], what: str = "is damaged") -> Iterator[None]:
    """Name the file in whatever goes wrong with its content within the block.

    Parameters
    ----------
    path : of the file
    what : what the message says of the file

    Raises
    ------
    DamagedFileError
        The content is not what it should be. Errors of the disk, of the memory and of imports stay
        what they are.
    """
    try:
        yield
    except (MemoryError, ImportError, Warning, DamagedFileError):
        raise
    # Any other: safetensors, tokenizers and zlib raise classes of their own, and plain Exception;
    # zipfile a RuntimeError where a flipped byte asks for a compression that nobody has.
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be loaded here
            raise
        # EINVAL: the damaged directory of an archive may name a place before the file's beginning.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        message = str(error) or type(error).__name__
        raise DamagedFileError(f"{os.fspath(path)} {what}: {message}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; DamagedFileError if it is none."""
    with reading(path):
        return json.loads(Path(path).read_text(encoding="utf8"))


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to. On success it replaces `path`, on error it is removed.

    The temporary file is in the folder of `path`, so that the final rename stays on one file
    system, and has its suffix. It is flushed to the disk before the rename.

    Raises
    ------
    OSError
        The file cannot be written, for example on a full disk; the message names `path`.
    """
    path = Path(path)
    aside = _aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, path)
    except OSError as error:
        reason = error.strerror or _reason(aside) or error
        with suppress(OSError):
            aside.unlink()
        raise OSError(f"{path} cannot be written: {reason}") from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _reason(path: Path) -> str | None:
    """Why a file cannot be written, if an error does not say: NumPy and safetensors lose it."""
    try:
        with open(path, "ab") as file:
            file.write(bytes(1 << 16))  # more than what is left of a last block
    except OSError as error:
        return error.strerror
    return None


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for a folder: it is filled under a temporary name and then replaces `path`.

    A folder cannot replace a full one in one step, so an old one is moved away first. A process
    that is killed in between leaves no folder, never half of one.
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


@contextmanager
def atomic_files(folder: str | os.PathLike[str], names: Sequence[str]) -> Iterator[Path]:
    """Give a temporary folder to fill; on success what is in it replaces `names` in `folder`.

    Files and folders of these names that were not written are removed. The last name is removed
    before all others and comes after them: a folder that has it has all others, of one writing,
    even after a crash.
    """
    folder = Path(folder)
    aside = _aside(folder / "files")
    aside.mkdir(parents=True)
    try:
        try:
            yield aside
        except OSError as error:
            # It shall name the file as it would have been.
            if error.errno is None and str(aside) in str(error):
                raise OSError(str(error).replace(str(aside), str(folder))) from error
            if isinstance(error.filename, str):
                error.filename = error.filename.replace(str(aside), str(folder))
            raise
        old = aside / "old"
        old.mkdir()
        for name in (names[-1], *names[:-1]):
            if os.path.lexists(folder / name):
                os.replace(folder / name, old / name)
        for name in names:
            if (aside / name).exists():
                os.replace(aside / name, folder / name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def exit_by_signal(number: int, _: FrameType | None) -> NoReturn:
    """A handler: raise SystemExit, so that what is only there for now is removed on the way out."""
    raise SystemExit(128 + number)


@contextmanager
def removed_on_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise SystemExit, and end no process on the spot.

    Handlers that the program has set are left as they are, and so is all of it outside the main
    thread, where Python cannot set handlers.
    """
    ours = []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, exit_by_signal)
                ours.append(number)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files and folders that killed processes left anywhere in `folder`."""
    for name in _LEFTOVERS:
        for path in list(folder.rglob(name)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def is_leftover(path: Path) -> bool:
    """Whether `remove_leftovers` would remove the file or folder."""
    return any(path.match(name) for name in _LEFTOVERS)


def lock_file(path: str | os.PathLike[str]) -> IO[str]:
    """Lock a file, made if it is not there, until the result is closed or the process ends.

    The lock is the operating system's (flock; on NFS Linux keeps it at the server), so a process
    that was killed leaves none. The file holds the owner's process id and host, and stays.
    Where the file system or the platform has no such locks, a warning says so.

    Raises
    ------
    BlockingIOError
        Another process holds the lock; the message names it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="utf8")  # noqa: SIM115
    try:
        # Not on Windows.
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError) as error:
        if getattr(error, "errno", None) in (errno.EWOULDBLOCK, errno.EACCES):
            owner = _owner(file)
            file.close()
            raise BlockingIOError(f"{path.parent} is in use by {owner}") from None
        warnings.warn(f"{path} cannot be locked, so nothing keeps others away", stacklevel=2)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def _owner(file: IO[str]) -> str:
    """Who holds a lock; one who has just taken it may not have written that yet."""
    for _ in range(20):
        file.seek(0)
        if owner := file.read().strip():
            return owner
        time.sleep(0.05)
    return "another process"


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON in one step."""
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def write_tensors(
    path: str | os.PathLike[str],
    tensors: "Mapping[str, torch.Tensor]",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors in safetensors format; they may be on any device and share memory."""
    # Imported here: those who write no tensors do not wait for it.
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    separate: dict[str, torch.Tensor] = {}
    memory = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        # The format refuses tensors that share memory, such as the tied weights of a module.
        address = tensor.untyped_storage().data_ptr()
        tensor = tensor.contiguous()
        separate[name] = tensor.clone() if address in memory else tensor
        memory.add(address)
    path = Path(path)
    with atomic_write(path) as aside:
        try:
            save_file(separate, aside, None if metadata is None else dict(metadata))
        except SafetensorError as error:  # raised on a full disk too
            raise OSError(str(error)) from error
        # The library makes files that only the owner can read; give it its folder's permissions.
        aside.chmod(path.parent.stat().st_mode & 0o666)


# Types of arrays, by the names that safetensors has for them.
_DTYPES = {"U8": "<u1", "U32": "<u4", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
_ALIGNMENT = 64
_BLOCK_BYTES = 1 << 26


def write_arrays(
    path: str | os.PathLike[str],
    arrays: "Mapping[str, npt.NDArray[Any]]",
    metadata: Mapping[str, str],
) -> None:
    """Write arrays in safetensors format, in their order and without a copy in memory.

    That library's own function for NumPy copies all arrays first. The first one begins at a
    multiple of 64 bytes.
    """
    import numpy as np

    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        shape = list(array.shape)
        header[name] = {"dtype": names[array.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with atomic_write(path) as aside, open(aside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            rows = max(1, _BLOCK_BYTES // max(1, array[:1].nbytes))
            for first in range(0, len(array), rows):
                file.write(np.ascontiguousarray(array[first : first + rows]).data)


def map_arrays(
    path: str | os.PathLike[str],
) -> "tuple[dict[str, npt.NDArray[Any]], dict[str, str]]":
    """Map the arrays of a file in safetensors format into memory, and read its metadata.

    Raises
    ------
    ValueError
        The file is no such file, or cut short; the message names it.
    """
    import numpy as np

    try:
        if os.path.getsize(path) < 8:
            raise ValueError("it is too short")
        content = np.memmap(path, np.uint8, "r")
        begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
        if begin > len(content):
            raise ValueError("its header is longer than the file")
        header = json.loads(content[8:begin].tobytes())
        metadata = header.pop("__metadata__", {})
        arrays, last = {}, 0
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= len(content) - begin:
                raise ValueError(f"{name} reaches beyond the end of the file")
            part = content[begin + first : begin + last].view(np.ndarray)
            arrays[name] = part.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if begin + last != len(content):
            raise ValueError("there is more behind its arrays")
        return arrays, {str(key): str(value) for key, value in metadata.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        message = f"{os.fspath(path)} is not a whole file in safetensors format: {error}"
        raise ValueError(message) from error


def _aside(path: Path) -> Path:
    return path.with_name(f"{_ASIDE}{uuid.uuid4().hex[:8]}-{path.name}")

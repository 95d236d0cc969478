"""Atomic writes: a reader sees the old file or the new one, and errors leave nothing behind."""

import errno
import json
import os
import resource
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ngame.files import atomic_folder, atomic_write, remove_leftovers, write_json, write_tensors


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_write(path) as aside:
        aside.write_text("whole")
        assert not path.exists()
        assert aside.suffix == ".txt"
    assert path.read_text() == "whole"
    assert names(path.parent) == ["file.txt"]


def test_error_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def stopped():
        with atomic_write(path) as aside:
            aside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_full_disk_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", disk_full)
    with (
        pytest.raises(OSError, match=r"file\.txt cannot be written: No space left"),
        atomic_write(path) as aside,
    ):
        aside.write_text("new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with atomic_folder(path) as aside:
            (aside / content).write_text(content)
        assert names(path) == [content]
    assert names(tmp_path) == ["folder"]


def test_error_keeps_the_old_folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()

    def fails():
        with atomic_folder(path) as aside:
            (aside / "new").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_folder_that_cannot_be_put_in_place(tmp_path, monkeypatch):
    """If the second of the two renames fails, the first is undone."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").touch()
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            disk_full()
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="No space"), atomic_folder(path) as aside:
        (aside / "new").touch()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["folder"]


def test_leftovers_of_a_killed_process_go(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    kept = [tmp_path / "file.txt", tmp_path / ".gitignore", inner / "tmp"]
    for path in kept:
        path.touch()
    writing, filling = atomic_write(inner / "a.npy"), atomic_folder(tmp_path / "b")
    writing.__enter__().touch()
    (filling.__enter__() / "half").touch()
    (inner / ".tmpA1b2C3").touch()
    remove_leftovers(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def test_json_comes_back(tmp_path):
    value = {"Öl": [1, 0.1, None]}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf8")
    assert json.loads(text) == value
    assert "Öl" in text


def test_tensors_come_back(tmp_path):
    tied = torch.randn(4, 3)
    tensors = {
        "a": tied,
        "same memory": tied,
        "not contiguous": tied.T,
        "empty": torch.empty(0, 5),
        "with gradient": torch.nn.Parameter(torch.ones(2)),
    }
    write_tensors(tmp_path / "a.safetensors", tensors)
    back = load_file(tmp_path / "a.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_tensors_are_as_readable_as_their_folder(tmp_path):
    tmp_path.chmod(0o750)
    write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


def test_tensors_that_cannot_be_written(tmp_path):
    """safetensors raises its own error on a full disk; ours is an OSError."""
    (tmp_path / "a.safetensors").mkdir()
    (tmp_path / "a.safetensors" / "in the way").touch()
    with pytest.raises(OSError, match=r"a\.safetensors cannot be written"):
        write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    assert names(tmp_path) == ["a.safetensors"]


def test_what_numpy_loses_is_found_again(tmp_path):
    """Why an array cannot be written: `tofile` counts, and does not say."""
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write():
        with atomic_write(tmp_path / "x.npy") as aside, open(aside, "wb") as file:
            np.ones(100_000).tofile(file)

    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        with pytest.raises(OSError, match=r"x\.npy cannot be written: File too large$"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert names(tmp_path) == []

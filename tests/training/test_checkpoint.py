"""Checkpoints restore every bit, and a failed write keeps the previous one."""

import errno
import os

import numpy as np
import pytest
import torch

from ngame.state import from_tensors, take_prefix, to_tensors, with_prefixes
from ngame.training.adam import AdamW, SparseAdam
from ngame.training.checkpoint import Checkpoint


def test_state_is_restored(tmp_path):
    checkpoint = Checkpoint(tmp_path / "checkpoint", 0)
    assert checkpoint.load() is None
    meta = {"epoch": 3, "best": float("-inf"), "log": [{"Öl": 0.1}]}
    weight = torch.randn(3, 4)
    tensors = {"a": weight, "b.c": torch.zeros(0, dtype=torch.int32), "tied": weight}
    checkpoint.save(meta, tensors)
    checkpoint.save(meta | {"epoch": 4}, tensors)
    found, loaded = Checkpoint(tmp_path / "checkpoint", 0).load()
    assert found == meta | {"epoch": 4}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["state.safetensors"]


def test_loaded_state_outlives_the_file(tmp_path):
    """The loaded tensors may map the file: the next save must not change them."""
    checkpoint = Checkpoint(tmp_path, 0)
    checkpoint.save({}, {"a": torch.ones(1000)})
    _, loaded = checkpoint.load()
    loaded["a"] += 1
    checkpoint.save({}, {"a": torch.full((1000,), 7.0)})
    assert (loaded["a"] == 2).all()
    assert (checkpoint.load()[1]["a"] == 7).all()


def test_without_a_folder_nothing_is_saved():
    checkpoint = Checkpoint(None, 0)
    checkpoint.save({}, {"a": torch.ones(1)})
    assert checkpoint.load() is None
    assert not checkpoint.due()


def test_due(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    checkpoint = Checkpoint(tmp_path, 2)
    now[0] += 119
    assert not checkpoint.due()
    now[0] += 1
    assert checkpoint.due()
    checkpoint.save({}, {})
    assert not checkpoint.due()
    assert Checkpoint(tmp_path, 0).due()


def test_full_disk_keeps_the_old_state(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path, 0)
    checkpoint.save({"epoch": 1}, {"a": torch.ones(2)})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save({"epoch": 2}, {"a": torch.zeros(2)})
    meta, tensors = checkpoint.load()
    assert meta == {"epoch": 1}
    assert tensors["a"].tolist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_prefixes():
    tensors = with_prefixes(a={"x.y": torch.ones(1)}, ab={"z": torch.zeros(1)}, none={})
    assert tensors.keys() == {"a.x.y", "ab.z"}
    assert take_prefix(tensors, "a.").keys() == {"x.y"}
    assert take_prefix(tensors, "ab.").keys() == {"z"}


def test_sampler_state():
    state = {"epoch": 3, "order": np.arange(4, dtype=np.int32), "offsets": np.empty(0, np.int64)}
    back = from_tensors(to_tensors(state))
    assert back["epoch"] == 3
    assert type(back["epoch"]) is int
    for name in ("order", "offsets"):
        assert back[name].dtype == state[name].dtype
        np.testing.assert_array_equal(back[name], state[name])


@pytest.mark.parametrize("sparse", [False, True])
def test_optimizer_is_restored(tmp_path, sparse):
    """Saving and loading after one of three steps changes no bit of the result."""

    def module():
        torch.manual_seed(0)
        embedding = torch.nn.Embedding(5, 3, sparse=sparse)
        groups = [{"params": list(embedding.parameters()), "lr": 0.1}]
        return embedding, SparseAdam(groups) if sparse else AdamW(groups, 0.01)

    def step(embedding, optimizer, number):
        embedding(torch.tensor([number, number + 1])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    whole, optimizer = module()
    for number in range(3):
        step(whole, optimizer, number)

    parted, optimizer = module()
    step(parted, optimizer, 0)
    checkpoint = Checkpoint(tmp_path, 0)
    checkpoint.save({}, with_prefixes(w=parted.state_dict(), o=optimizer.tensors()))
    _, tensors = checkpoint.load()
    parted, optimizer = module()
    parted.load_state_dict(take_prefix(tensors, "w."))
    loaded = take_prefix(tensors, "o.")
    optimizer.load(loaded)
    of_file = {tensor.data_ptr() for tensor in loaded.values()}
    assert not of_file & {tensor.data_ptr() for tensor in optimizer.tensors().values()}
    for number in (1, 2):
        step(parted, optimizer, number)
    assert torch.equal(parted.weight, whole.weight)


def test_optimizer_before_its_first_step():
    optimizer = AdamW([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.1}], 0.01)
    assert optimizer.tensors() == {}
    optimizer.load({})

"""Copies to a GPU, by a stand-in for what a GPU would be asked."""

import pytest
import torch

from ngame.loss import CooIndex
from ngame.transfer import sent


@pytest.fixture
def copies(monkeypatch):
    """What is pinned and copied, which nothing here can be."""
    done = []

    def pin(tensor):
        assert tensor.device.type == "cpu", "cannot pin: only dense CPU tensors can be pinned"
        done.append(("pinned", tensor.is_contiguous()))
        return tensor

    def to(tensor, device, non_blocking=False):
        done.append((device, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    return done


def test_numbers_that_lie_apart_are_pinned_side_by_side(copies):
    """As the two columns that `np.nonzero` gives, which lie in one array."""
    for host in (torch.arange(6), torch.arange(6).reshape(3, 2)[:, 1]):
        copies.clear()
        assert torch.equal(sent(host, "cuda"), host)
        assert copies == [("pinned", True), ("cuda", True)]


def test_what_is_on_a_device_already_is_not_pinned(copies):
    index = CooIndex(*torch.zeros(2, 3, dtype=torch.int64, device="meta"), (4, 4))
    assert index.to("cuda").shape == (4, 4)
    assert copies == [("cuda", False)] * 2

"""Copies from the host to a GPU that do not wait for it."""

import torch


def sent(host: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor, as a rule of the host, on `device`.

    A copy from pageable memory waits until the GPU has done all that was asked of it before, and
    meanwhile the host asks for nothing more. So it goes through pinned memory, which PyTorch keeps
    until the copy is done. Where the host never waits, it is ahead of the GPU by itself: to prepare
    batches in a thread would gain nothing, and would hold the interpreter up.

    A tensor that is on a GPU already cannot be pinned: it is moved as PyTorch does it.
    """
    if torch.device(device).type != "cuda" or host.device.type != "cpu" or not host.numel():
        return host.to(device)
    # Numbers that lie apart would be copied once more on the way, into memory that is not pinned.
    return host.contiguous().pin_memory().to(device, non_blocking=True)

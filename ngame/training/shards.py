"""An encoder whose weights, gradients and optimizer state the ranks share (PyTorch's FSDP2)."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch

from ngame.encoders.base import Encoder
from ngame.encoders.transformer import TransformerEncoder
from ngame.ranks import Ranks


def shard(encoder: TransformerEncoder, ranks: Ranks) -> TransformerEncoder:
    """Keep of every weight only this rank's share, from now on and in place.

    The weights of a layer are gathered while it computes. So all ranks must call the encoder
    together, for gradients as often as each other, or within `whole`. Gradients are means over the
    ranks.

    Returns
    -------
    TransformerEncoder
        The same without weights: what `unshard` fills.

    Raises
    ------
    ImportError
        PyTorch is older than 2.6.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    weights = {id(p): torch.nn.Parameter(p.detach().to("meta")) for p in encoder.parameters()}
    empty = copy.deepcopy(encoder, cast(Any, weights))
    device = next(encoder.parameters()).device.type
    mesh = DeviceMesh.from_group(ranks.group, device)
    lists = [part for part in encoder.modules() if isinstance(part, torch.nn.ModuleList)]
    layers = [layer for part in lists for layer in part]
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    for layer in layers:
        if id(layer) not in inner:
            fully_shard(layer, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
    encoder.in_one_call = True
    return empty


def unshard(encoder: torch.nn.Module, empty: TransformerEncoder, ranks: Ranks) -> Encoder:
    """A plain encoder with all weights on rank 0; on the others without."""
    # Not the state: with LoRA it has not all of them.
    weights = gathered(dict(encoder.named_parameters(remove_duplicate=False)), ranks)
    if ranks.rank == 0:
        empty.load_state_dict(weights, strict=False, assign=True)
        empty.to(next(encoder.parameters()).device)
    return empty


def is_sharded(x: torch.Tensor | torch.nn.Module) -> bool:
    """Whether the ranks share this tensor, or this module."""
    return hasattr(x, "full_tensor" if isinstance(x, torch.Tensor) else "unshard")


@contextmanager
def whole(encoder: torch.nn.Module) -> Iterator[None]:
    """Within the block each rank has all weights, and calls the encoder as often as it likes."""
    if not is_sharded(encoder):
        yield
        return
    parts: list[Any] = [part for part in encoder.modules() if is_sharded(part)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            # As before: the backward pass begins with what the whole encoder owns itself.
            part.set_reshard_after_forward(part is not encoder, recurse=False)


def gathered(tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> dict[str, torch.Tensor]:
    """All of the tensors that the ranks share, on the host of rank 0; the others as they are.

    One after the other, so that no other rank has more than one.
    """
    found = dict(tensors)
    for name, value in tensors.items():
        if is_sharded(value):
            full = cast(Any, value.detach()).full_tensor()
            found[name] = full.cpu() if ranks.rank == 0 else full.new_empty(0)
    return found


def parts(
    tensors: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """This rank's shares of the tensors, where those of the same name in `like` are shared."""
    found = dict(tensors)
    for name, value in tensors.items():
        model: Any = like.get(name)
        if model is not None and is_sharded(model) and value.dim():
            from torch.distributed.tensor import distribute_tensor

            mesh, placements = model.device_mesh, model.placements
            found[name] = distribute_tensor(
                value.to(model.device), mesh, placements, src_data_rank=None
            )
    return found

"""Reading a saved encoder, whichever kind it is."""

from pathlib import Path

import torch

from ngame.encoders.bag import BagEncoder
from ngame.encoders.base import Encoder
from ngame.encoders.ensemble import Ensemble
from ngame.encoders.transformer import LENGTH_FILE, TransformerEncoder, takes_bf16
from ngame.files import reading


def load_encoder(folder: Path, device: torch.device | None = None) -> Encoder:
    """Read an encoder that one of ours wrote, by `save`, to a device.

    Raises
    ------
    ValueError
        The folder holds none, or a damaged one.
    """
    device = torch.device("cpu") if device is None else device
    if (folder / LENGTH_FILE).exists():
        with reading(folder):
            adapter = (folder / "adapter_config.json").exists()
            bf16 = True if adapter and takes_bf16(device) else None  # of the frozen weights, too
            return TransformerEncoder.load(folder, bf16=bf16).to(device)
    if (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists():
        return BagEncoder.load(folder).to(device)
    if (folder / "0" / "model.safetensors").exists():
        return Ensemble.load(folder).to(device)
    raise ValueError(f"{folder} holds no encoder that ngame saved: pass your own as encoder=")

"""Reading a saved encoder, whichever kind it is."""

from pathlib import Path

from ngame.encoders.bag import BagEncoder
from ngame.encoders.base import Encoder
from ngame.encoders.transformer import LENGTH_FILE, TransformerEncoder
from ngame.files import reading


def load_encoder(folder: Path) -> Encoder:
    """Read an encoder that `BagEncoder.save` or `TransformerEncoder.save` wrote.

    Raises
    ------
    ValueError
        The folder holds neither, or a damaged one.
    """
    if (folder / LENGTH_FILE).exists():
        with reading(folder):
            return TransformerEncoder.load(folder)
    if (folder / "model.safetensors").exists() and (folder / "tokenizer.json").exists():
        return BagEncoder.load(folder)
    raise ValueError(f"{folder} holds no encoder that ngame saved: pass your own as encoder=")

"""An encoder in ONNX format, for runtimes without torch."""

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F

from ngame.encoders.bag import BagEncoder
from ngame.encoders.encode import evaluating
from ngame.encoders.ensemble import Ensemble
from ngame.encoders.transformer import TransformerEncoder
from ngame.files import atomic_write

_MOST_BYTES = 2**31
"""What a protocol buffer can hold."""


def export(encoder: torch.nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write an encoder as ``encoder.onnx``, and its ``tokenizer.json``.

    The model takes ``input_ids`` and ``attention_mask``, int64 [n, longest], and gives
    ``sentence_embedding``, float32 [n, dim] of unit length: the vectors of `ngame.Model.encode`.
    The tokenizer truncates and pads, so that what its ``encode_batch`` returns fits the model.

    Parameters
    ----------
    encoder : a `BagEncoder`, an `Ensemble` of them, or a `TransformerEncoder`
    folder : is made if it is not there

    Raises
    ------
    ModuleNotFoundError
        onnx or onnxscript is not installed.
    TypeError
        The encoder is of another kind.
    ValueError
        Its weights have 2 GiB or more, which one file in this format cannot hold.
    """
    missing = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
    if missing:
        raise ModuleNotFoundError(
            f'ONNX needs {" and ".join(missing)}: pip install "ngame[onnx]"', name=missing[0]
        )
    tokenizer = _tokenizer(encoder)
    size = sum(weight.nbytes for weight in encoder.parameters())
    if size >= _MOST_BYTES:
        raise ValueError(f"encoder has {size} bytes of weights, a file in ONNX format holds 2 GiB")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    batch = tokenizer.encode_batch(["two texts", "of unequal length, in a batch"])
    inputs = [
        torch.tensor([getattr(text, name) for text in batch]) for name in ("ids", "attention_mask")
    ]
    sizes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("longest")}
    device = next(encoder.parameters()).device
    with evaluating(encoder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        program: Any = torch.onnx.export(
            _UnitVectors(encoder),
            tuple(value.to(device) for value in inputs),
            input_names=["input_ids", "attention_mask"],
            output_names=["sentence_embedding"],
            dynamic_shapes=(sizes, sizes),
            dynamo=True,
            verbose=False,
        )
    with atomic_write(folder / "encoder.onnx") as aside:
        program.save(str(aside), external_data=False)
    with atomic_write(folder / "tokenizer.json") as aside:
        tokenizer.save(str(aside))


class _UnitVectors(torch.nn.Module):
    """An encoder of padded texts whose vectors have unit length."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.encoder.padded(input_ids, attention_mask != 0), dim=1)


def _tokenizer(encoder: torch.nn.Module) -> tokenizers.Tokenizer:
    """A copy of the encoder's tokenizer that truncates and pads."""
    if isinstance(encoder, BagEncoder | Ensemble):
        tokenizer = tokenizers.Tokenizer.from_str(encoder.tokenizer.to_str())
        tokenizer.enable_padding()
    elif isinstance(encoder, TransformerEncoder):
        theirs = encoder.tokenizer
        tokenizer = tokenizers.Tokenizer.from_str(theirs.backend_tokenizer.to_str())
        tokenizer.enable_truncation(encoder.max_length)
        tokenizer.enable_padding(
            pad_id=theirs.pad_token_id or 0, pad_token=theirs.pad_token or "[PAD]"
        )
    else:
        kind = type(encoder).__name__
        raise TypeError(f"encoder is a {kind}, expected a BagEncoder or a TransformerEncoder")
    return tokenizer

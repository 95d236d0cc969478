"""LoRA, pooling and checkpointing, on small encoders and decoders with random weights."""

import json
import os
import sys
from contextlib import nullcontext

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may download

import numpy as np
import pytest
import tiny
import torch

from ngame.encoders.encode import encode
from ngame.encoders.load import load_encoder
from ngame.encoders.transformer import TransformerEncoder

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

DATA = tiny.dataset(points=20)
TEXTS = [" ".join(DATA.train_texts), *DATA.train_texts[:3], DATA.train_texts[0].split()[0]]


@pytest.fixture(scope="module", params=["Bert", "Llama", "Qwen3"])
def model(request, tmp_path_factory):
    return tiny.transformer(DATA, tmp_path_factory.mktemp(request.param), request.param)


def trained(model, **options):
    """An encoder with LoRA whose matrices are all random, as after training."""
    encoder = TransformerEncoder(model, max_length=16, lora_rank=4, **options)
    torch.manual_seed(1)
    for name, weight in encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return encoder


def vectors(encoder):
    return encode(encoder, encoder.tokenize(TEXTS))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_begins_as_the_model(model):
    encoder = TransformerEncoder(model, max_length=16, lora_rank=4)
    assert encoder.lora_rank == 4
    assert np.array_equal(vectors(encoder), vectors(TransformerEncoder(model, max_length=16)))


def test_adds_twice_the_product_to_every_linear_layer(model):
    encoder = trained(model)
    plain = TransformerEncoder(model, max_length=16)
    linear = {
        name: module
        for name, module in plain.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "pooler" not in name
    }
    adapters = dict(encoder.model.named_parameters())
    for name, module in linear.items():
        a, b = (adapters.pop(f"{name}.lora_{which}.default.weight") for which in "AB")
        assert a.shape[0] == b.shape[1] == 4
        module.weight.data += 2 * b.data @ a.data
    assert not [name for name in adapters if "lora" in name]
    np.testing.assert_allclose(vectors(encoder), vectors(plain), rtol=1e-4, atol=1e-5)


def test_only_the_adapter_is_trained_and_in_the_state(model):
    encoder = trained(model)
    encoder(encoder.tokenize(TEXTS)).square().sum().backward()
    for name, weight in encoder.named_parameters():
        assert weight.requires_grad is ("lora_" in name), name
        assert (weight.grad is not None and bool(weight.grad.any())) is ("lora_" in name), name
    names = {name for name, weight in encoder.named_parameters() if weight.requires_grad}
    state = encoder.state_dict()
    assert state.keys() == names
    other = TransformerEncoder(model, max_length=16, lora_rank=4)
    other.load_state_dict(state)
    assert np.array_equal(vectors(other), vectors(encoder))
    state.popitem()
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        other.load_state_dict({**encoder.state_dict(), "other": torch.zeros(1)})


def test_within_another_module(model):
    encoder = trained(model)
    outer = torch.nn.ModuleDict({"a": encoder, "b": torch.nn.Linear(2, 2)})
    state = outer.state_dict()
    assert {"b.weight", "b.bias"} < state.keys()
    assert state.keys() == {*(f"a.{name}" for name in encoder.state_dict()), "b.weight", "b.bias"}
    outer.load_state_dict(state)
    del state["b.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*b\.bias"):
        outer.load_state_dict(state)


def test_the_seed_decides_the_first_values(model):
    def first(seed):
        before = torch.get_rng_state()
        state = TransformerEncoder(model, max_length=16, lora_rank=2, seed=seed).state_dict()
        assert torch.equal(before, torch.get_rng_state())
        return torch.cat([weight.flatten() for weight in state.values()])

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_saved_folder_opens_here_and_in_both_libraries(model, pooling, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    encoder = trained(model, pooling=pooling)
    expected = vectors(encoder)
    encoder.save(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "model.safetensors").exists()
    again = load_encoder(tmp_path)
    assert (again.pooling, again.lora_rank, again.max_length) == (pooling, 4, 16)
    assert np.array_equal(vectors(again), expected)
    assert again.state_dict().keys() == encoder.state_dict().keys()
    assert all(weight.requires_grad is ("lora_" in n) for n, weight in again.named_parameters())
    theirs = library.SentenceTransformer(str(tmp_path), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), unit(expected), atol=1e-5)
    base = transformers.AutoModel.from_pretrained(model)
    # peft asks transformers, by an old name, whether activations are computed again.
    with (
        pytest.warns(FutureWarning)
        if hasattr(base, "is_activation_checkpointing")
        else nullcontext()
    ):
        opened = peft.PeftModel.from_pretrained(base, tmp_path)
    opened.eval()
    tokens = encoder.tokenize(TEXTS[:1])
    ids = torch.from_numpy(tokens.ids.astype(np.int64))[None]
    with torch.no_grad():
        hidden = opened(input_ids=ids).last_hidden_state[0].numpy()
    place = {"mean": hidden.mean(0), "last": hidden[-1], "cls": hidden[0]}
    np.testing.assert_allclose(place[pooling], expected[0], rtol=1e-4, atol=1e-5)


def test_the_files_are_the_same_every_time(model, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        trained(model).save(tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name
    modules = json.loads((tmp_path / "one/adapter_config.json").read_text())["target_modules"]
    assert modules == sorted(modules)


def test_bf16_keeps_frozen_weights_in_half_the_memory(model):
    half, exact = trained(model, bf16=True), trained(model)
    whole = trained(model)
    whole._bf16 = True  # float32 weights, which autocast rounds at every call
    for name, weight in half.named_parameters():
        linear = "lora_" not in name and weight.dim() == 2 and "embed" not in name
        assert linear is (weight.dtype == torch.bfloat16) or name.endswith("bias"), name
        assert weight.dtype == torch.float32 or not weight.requires_grad, name
    assert np.array_equal(vectors(half), vectors(whole))
    cosine = (unit(vectors(half)) * unit(vectors(exact))).sum(1)
    assert 0.999 < cosine.min() < 1
    half.train()
    half(half.tokenize(TEXTS)).square().sum().backward()
    for name, weight in half.named_parameters():
        if weight.requires_grad:
            assert weight.grad.dtype == torch.float32
            assert torch.isfinite(weight.grad).all(), name


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("bf16", [False, True])
def test_checkpointing_gives_the_same_gradients(model, rank, bf16):
    found, calls = [], []
    for checkpointing in (False, True):
        encoder = TransformerEncoder(
            model, max_length=16, lora_rank=rank, checkpointing=checkpointing, bf16=bf16
        )
        encoder.train()
        counted = []
        for layer in encoder.model.modules():
            if type(layer).__name__.endswith("Attention"):
                layer.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        torch.manual_seed(3)  # of dropout
        x = encoder(encoder.tokenize(TEXTS))
        x.square().sum().backward()
        weights = {n: w.grad for n, w in encoder.named_parameters() if w.grad is not None}
        found.append((x.detach(), weights))
        calls.append(len(counted))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert calls[1] == 2 * calls[0]


def test_checkpointing_of_a_model_without(model, monkeypatch):
    monkeypatch.setattr(
        transformers.PreTrainedModel, "supports_gradient_checkpointing", False, raising=True
    )
    kind = type(transformers.AutoModel.from_pretrained(model))
    monkeypatch.setattr(kind, "supports_gradient_checkpointing", False)
    with pytest.raises(ValueError, match="not support"):
        TransformerEncoder(model, max_length=16, checkpointing=True)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_padding_changes_no_vector(model, pooling):
    encoder = TransformerEncoder(model, max_length=16, pooling=pooling)
    tokens = encoder.tokenize(TEXTS)
    together = vectors(encoder)
    assert tokens.lengths.tolist() == [16, *map(len, map(str.split, TEXTS[1:]))]  # the first is cut
    with torch.no_grad():
        torch.testing.assert_close(encoder._by_length(tokens), torch.from_numpy(together))
    for row in range(len(TEXTS)):
        ids = torch.from_numpy(tokens.take(np.array([row])).ids.astype(np.int64))[None]
        with torch.no_grad():
            hidden = encoder.model(ids).last_hidden_state[0].numpy()
        place = {"mean": hidden.mean(0), "last": hidden[-1], "cls": hidden[0]}
        np.testing.assert_allclose(together[row], place[pooling], atol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_left_padding(kind, pooling, tmp_path):
    """Positions are relative in these, so that a text's vector does not depend on where it is."""
    encoder = TransformerEncoder(
        tiny.transformer(DATA, tmp_path, kind), max_length=16, pooling=pooling
    )
    tokens = encoder.tokenize(TEXTS)
    ids, mask = (torch.from_numpy(part) for part in encoder._pad(tokens, 16))
    order = torch.argsort(mask.int(), dim=1, stable=True)  # the padding first
    with torch.no_grad():
        left = encoder.padded(ids.gather(1, order), mask.gather(1, order))
    np.testing.assert_allclose(left.numpy(), vectors(encoder), rtol=1e-4, atol=1e-5)


def test_no_tokens_at_all(model):
    encoder = TransformerEncoder(model, max_length=16, pooling="last", lora_rank=2)
    found = encode(encoder, encoder.tokenize(["", TEXTS[1]]))
    assert np.isfinite(found).all()
    assert encoder(encoder.tokenize([])).shape == (0, 32)


@pytest.mark.parametrize(
    ("settings", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"word_embedding_dimension": 32}, "mean"),
        ({"pooling_mode": "lasttoken", "include_prompt": True}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
        ({"pooling_mode": "mean_sqrt_len_tokens"}, "mean"),
        ({"pooling_mode": ["cls", "max"]}, None),
        ({"pooling_mode_max_tokens": True}, None),
    ],
)
def test_pooling_of_a_sentence_transformers_model(settings, pooling, tmp_path):
    model = tiny.transformer(DATA, tmp_path / "model")
    TransformerEncoder(model, max_length=16).save(tmp_path)
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps(settings))
    if pooling is None:
        with pytest.raises(ValueError, match=r"model .*: pooling is .*max.*, expected one of mean"):
            TransformerEncoder(tmp_path, max_length=16)
    else:
        assert TransformerEncoder(tmp_path, max_length=16).pooling == pooling
        # An adapter of it keeps that, too.
        adapted = TransformerEncoder(tmp_path, max_length=16, lora_rank=1)
        (tmp_path / "adapter").mkdir()
        adapted.save(tmp_path / "adapter")
        assert load_encoder(tmp_path / "adapter").pooling == pooling
    assert TransformerEncoder(tmp_path, max_length=16, pooling="cls").pooling == "cls"


def test_adapter_of_another_tool(model, tmp_path):
    """With neither a tokenizer nor a pooling beside it."""
    base = transformers.AutoModel.from_pretrained(model)
    base.add_adapter(peft.LoraConfig(r=3, target_modules=["q_proj", "query"]))
    base.save_pretrained(tmp_path)
    encoder = TransformerEncoder(tmp_path, max_length=16, lora_rank=3)
    assert (encoder.lora_rank, encoder.pooling) == (3, "mean")
    plain = TransformerEncoder(model, max_length=16)
    assert np.array_equal(vectors(encoder), vectors(plain))
    with pytest.raises(ValueError, match=r"lora_rank is 4, the adapter .* has 3"):
        TransformerEncoder(tmp_path, max_length=16, lora_rank=4)


def test_errors(tmp_path, monkeypatch):
    model = tiny.transformer(DATA, tmp_path / "model")
    with pytest.raises(ValueError, match="lora_rank is -1"):
        TransformerEncoder(model, lora_rank=-1)
    with pytest.raises(ValueError, match="pooling is 'max', expected one of mean, last, cls"):
        TransformerEncoder(model, max_length=16, pooling="max")
    (tmp_path / "saved").mkdir()
    trained(model).save(tmp_path / "saved")
    model.rename(tmp_path / "moved")
    with pytest.raises(
        OSError, match=r"model .*model, to which the adapter .*saved belongs, cannot"
    ):
        load_encoder(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "peft", None)
    for adapted in (tmp_path / "saved", tmp_path / "moved"):
        with pytest.raises(ImportError, match=r'pip install "ngame\[lora\]"'):
            TransformerEncoder(adapted, max_length=16, lora_rank=4)
    TransformerEncoder(tmp_path / "moved", max_length=16)

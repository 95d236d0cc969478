"""CUDA graphs of a transformer: recorded on a GPU, and without one by a stand-in that runs again
what would be recorded."""

import copy
import gc
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import tiny
import torch

from ngame.config import Config
from ngame.encoders import graphs, transformer
from ngame.encoders.transformer import TransformerEncoder
from ngame.negatives import grad_cache

pytest.importorskip("transformers")

TEXTS = ["mount a disk", "list files in a folder by size", "", "kill", "disk usage of a file"]
OTHERS = ["show the users of a machine", "move a file"]


class Again:
    """In place of a recorder, whose graphs share memory: each forward pass overwrites the last."""

    def __init__(self, device):
        assert device.type == "cpu"
        self.held = None

    def record(self, forward, backward):
        @torch.enable_grad()
        def run_forward():
            self.held = forward
            forward()

        @torch.enable_grad()
        def run_backward():
            assert self.held == forward
            backward()

        return [SimpleNamespace(replay=run) for run in (run_forward, run_backward)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.transformer(tiny.dataset(points=30), tmp_path_factory.mktemp("model"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that PyTorch sees")
    if request.param == "cpu":
        monkeypatch.setattr(graphs, "_Recorder", Again)
        monkeypatch.setattr(TransformerEncoder, "forward", TransformerEncoder._by_length)
    return request.param


@pytest.fixture
def make(model, device):
    def encoder(graphs, dropout=False, bf16=False, **settings):
        made = TransformerEncoder(
            model, max_length=16, bf16=bf16, graphs=graphs, **settings
        ).to(device)  # fmt: skip
        for module in made.modules():
            if isinstance(module, torch.nn.Dropout) and not dropout:
                module.p = 0.0
        return made.train()

    return encoder


def gradients(encoder, *batches):
    """Of all batches together, by weight."""
    encoder.zero_grad()
    for texts in batches:
        vectors = encoder(encoder.tokenize(texts))
        (
            vectors * torch.arange(vectors.numel(), device=vectors.device).view_as(vectors)
        ).sum().backward()
    return {n: w.grad.clone() for n, w in encoder.named_parameters() if w.grad is not None}


def assert_same(found, expected):
    assert {*found} == {*expected}
    # The gradient of a key's bias is zero but for rounding: no weight's own size says what is near.
    near = 1e-5 * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=near, msg=name)


def test_garbage_is_not_collected_while_a_pass_is_recorded(monkeypatch):
    """An old encoder's graph, if freed then, ends the recording with an error."""
    monkeypatch.setattr(graphs, "torch", MagicMock())
    collects = []
    graphs._Recorder("cuda").record(lambda: collects.append(gc.isenabled()))
    assert collects == [True] * graphs._WARM + [False]
    assert gc.isenabled()


@pytest.mark.parametrize("settings", [{}, {"pooling": "last"}, {"lora_rank": 2}])
def test_the_same_vectors_and_gradients(make, settings):
    if settings.get("lora_rank"):
        pytest.importorskip("peft")
    plain, recorded = make(False, **settings), make(True, **settings)
    for texts in (TEXTS, OTHERS, TEXTS, TEXTS + OTHERS * 5):
        tokens = plain.tokenize(texts)
        torch.testing.assert_close(recorded(tokens), plain(tokens), rtol=1e-4, atol=1e-5)
        # Again and again: gradients add up, and none is a graph's own memory.
        assert_same(
            gradients(recorded, texts, OTHERS, texts), gradients(plain, texts, OTHERS, texts)
        )
    assert recorded._graphs.shapes >= 2


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_several_batches_at_once(make, monkeypatch, at_once):
    """Each in a place of its own, as far as there are any."""
    monkeypatch.setattr(graphs, "_MOST_AT_ONCE", at_once)
    plain, recorded = make(False), make(True)

    def together(encoder):
        encoder.zero_grad()
        batches = TEXTS, OTHERS, TEXTS + OTHERS
        first, second, third = (encoder(encoder.tokenize(texts)) for texts in batches)
        (first.sum(0) * second.sum(0) * third.sum(0)).sum().backward()
        return {n: w.grad for n, w in encoder.named_parameters() if w.grad is not None}

    assert_same(together(recorded), together(plain))
    assert recorded._graphs.shapes == min(at_once, 3)
    # A batch that is given up makes room for the next one.
    recorded(recorded.tokenize(TEXTS))
    assert_same(gradients(recorded, TEXTS), gradients(plain, TEXTS))
    assert recorded._graphs.shapes == min(at_once, 3)


def test_each_part_of_a_batch_that_is_cut_by_length(make, monkeypatch):
    monkeypatch.setattr(transformer, "_TOKENS_PER_CALL", 0)
    texts = [" ".join(["disk"] * count) for count in (16, 1, 9, 1, 16, 2)] + TEXTS
    plain, recorded = make(False), make(True)
    for batch in (texts, TEXTS, texts):
        tokens = plain.tokenize(batch)
        torch.testing.assert_close(recorded(tokens), plain(tokens), rtol=1e-4, atol=1e-5)
        assert_same(gradients(recorded, batch), gradients(plain, batch))
    # Two lengths, of which the second batch has the shorter one: in the place of the longer.
    assert [len(place.graphs) for place in recorded._graphs._places] == [2, 1]


def test_gradients_a_second_time(make):
    encoder = make(True)
    vectors = encoder(encoder.tokenize(TEXTS))
    vectors.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="expected once: with graphs=False"):
        vectors.sum().backward()


def test_weights_elsewhere(make):
    plain, recorded = make(False), make(True)
    gradients(recorded, TEXTS)
    for encoder in (plain, recorded):
        encoder.double().float()
        with torch.no_grad():
            for weight in encoder.parameters():
                weight.mul_(1.5)
    assert_same(gradients(recorded, TEXTS), gradients(plain, TEXTS))


def test_weights_that_change_are_converted_anew(make, monkeypatch):
    """To bfloat16, in each pass, beside parts of the batch that have no graph."""
    monkeypatch.setattr(transformer, "_TOKENS_PER_CALL", 0)
    monkeypatch.setattr(graphs, "_MOST_AT_ONCE", 1)
    plain, recorded = make(False, bf16=True), make(True, bf16=True)
    tokens = plain.tokenize([*TEXTS, "disk " * 16])
    for _ in range(3):
        found, expected = recorded(tokens), plain(tokens)
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()
        (found.sum() + expected.sum()).backward()
        with torch.no_grad():
            for weight in (*plain.parameters(), *recorded.parameters()):
                weight.mul_(1.5)
    assert recorded._graphs.shapes == 1


def test_frozen_later(make):
    plain, recorded = make(False, dropout=True), make(True, dropout=True)
    gradients(recorded, TEXTS)
    for encoder in (plain, recorded):
        encoder.model.eval().embeddings.requires_grad_(False)
    assert_same(gradients(recorded, TEXTS), gradients(plain, TEXTS))
    for encoder in (plain, recorded):
        encoder.requires_grad_(False)
    tokens = plain.tokenize(TEXTS)
    torch.testing.assert_close(recorded(tokens), plain(tokens), rtol=1e-4, atol=1e-5)


def test_too_many_shapes(make, monkeypatch):
    monkeypatch.setattr(graphs, "_MOST_SHAPES", 1)
    plain, recorded = make(False), make(True)
    for texts in (TEXTS, TEXTS * 9):
        assert_same(gradients(recorded, texts), gradients(plain, texts))
    assert recorded._graphs.shapes == 1


def test_a_copy_has_none(make):
    encoder = make(True)
    gradients(encoder, TEXTS)
    copied = copy.deepcopy(encoder)
    assert copied._graphs is None
    assert_same(gradients(copied, TEXTS), gradients(encoder, TEXTS))


def test_only_where_it_would_do_the_same(make, device):
    encoder = make(True)
    tokens = encoder.tokenize(TEXTS)
    with torch.inference_mode():
        encoder(tokens)
    with torch.autocast(device, torch.bfloat16):
        encoder(tokens)
    encoder.eval()(tokens)
    assert not encoder._graphs.shapes


def test_random_numbers(make, device):
    """Each batch has its own dropout, which follows from the seed, whenever graphs are made."""

    def draws(encoder):
        torch.manual_seed(3)
        return [encoder(encoder.tokenize(TEXTS)).detach().clone() for _ in range(2)]

    encoder = make(True, dropout=True)
    # The first call of all tries out which masks the model takes.
    encoder.eval()(encoder.tokenize(TEXTS))
    encoder.train()
    first, second = draws(encoder)
    assert not torch.equal(first, second)
    again = draws(encoder)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])


@pytest.mark.parametrize("call", [10**9, 0], ids=["whole", "cut by length"])
def test_both_passes_of_grad_cache_draw_the_same_dropout(make, monkeypatch, call):
    """The first one, without gradients, of texts that are padded to the same shapes."""
    monkeypatch.setattr(transformer, "_TOKENS_PER_CALL", call)
    encoder = make(True, dropout=True)
    encoder.eval()(encoder.tokenize(TEXTS))
    encoder.train()
    chunks = [encoder.tokenize(texts) for texts in (["disk " * 16, *TEXTS], OTHERS)]
    found = []
    for cached in (False, True):
        encoder.zero_grad()
        torch.manual_seed(5)
        if cached:
            encodes = [lambda part=part: encoder(part) for part in chunks]
            found.append(grad_cache(lambda x: x.square().sum(), encodes))
        else:
            loss = torch.cat([encoder(part) for part in chunks]).square().sum()
            loss.backward()
            found.append(loss.detach())
        found.append(
            {n: w.grad.clone() for n, w in encoder.named_parameters() if w.grad is not None}
        )
    torch.testing.assert_close(found[2], found[0])
    assert_same(found[3], found[1])


def test_settings_that_exclude_each_other(model):
    with pytest.raises(ValueError, match="graphs and checkpointing are both true"):
        TransformerEncoder(model, max_length=16, graphs=True, checkpointing=True)
    for other in ("checkpointing", "shard"):
        with pytest.raises(ValueError, match=f"graphs and {other} are both true"):
            Config.load(sets=["encoder.model=m", "encoder.graphs=true", f"encoder.{other}=true"])

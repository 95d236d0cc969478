"""How often a step of training waits for the GPU: on one, and by its operators on the CPU."""

import itertools
import warnings
from collections import Counter

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ngame.encoders.transformer import TransformerEncoder
from ngame.training import loops
from ngame.training.adam import AdamW
from ngame.training.run import Run
from ngame.training.stage import Stage

pytest.importorskip("peft")

WARM, STEPS = 3, 10
MOST = 2
"""Waits a step on a GPU, where operators may wait that the watch does not know."""


class Enough(Exception):
    """All steps that are counted are done."""


@pytest.fixture(scope="module")
def dataset():
    return tiny.dataset(points=(WARM + STEPS + 1) * 20)


@pytest.fixture(scope="module")
def model(dataset, tmp_path_factory):
    return tiny.transformer(dataset, tmp_path_factory.mktemp("model"))


@pytest.fixture
def train(dataset, model, monkeypatch):
    """Train the encoder on a device; within a context that is made for `STEPS` steps."""

    def run(device, context, *sets):
        batches = Stage.batches

        def some(stage):
            plan = batches(stage)
            yield from itertools.islice(plan, WARM)
            with context:
                yield from itertools.islice(plan, STEPS)
            raise Enough

        monkeypatch.setattr(Stage, "batches", some)
        config = tiny.config(
            f"device={device}", "encoder.kind=transformer", f"encoder.model={model}",
            "encoder.max_length=32", "encoder_stage.batch_size=16", *sets,
        )  # fmt: skip
        started = Run(dataset, config, None, False, None)
        try:
            with pytest.raises(Enough):
                loops.train_encoder(started)
        finally:
            started.close()

    return run


class Watch(TorchDispatchMode):
    """Counts what would wait for a GPU, whose result the host needs in order to go on."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name in {
            *("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero"),
            *("bincount", "masked_select", "_unique2", "unique_dim", "_coalesce"),
        }:
            self.waits[name] += 1
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            places = [place for place in arguments[1] if place is not None]
            self.waits["a mask as index"] += any(place.dtype == torch.bool for place in places)
        return function(*arguments, **(options or {}))


CASES = pytest.mark.parametrize(
    "sets",
    [
        ("encoder_stage.loss=triplet", "encoder_stage.positives=one"),
        ("encoder_stage.loss=softmax", "encoder_stage.positives=all"),
        ("encoder_stage.random_labels=5",),
        ("encoder_stage.embeddings=bank", "encoder_stage.clip=1"),
        ("encoder.lora_rank=4", "encoder.pooling=last"),
    ],
)


@CASES
def test_operators_that_wait(train, monkeypatch, sets):
    """The path of a GPU, on the CPU."""
    both = loops._embed_both
    monkeypatch.setattr(
        loops, "_embed_both", lambda *arguments: both(*arguments[:3], torch.device("cuda"))
    )
    monkeypatch.setattr(TransformerEncoder, "forward", TransformerEncoder._by_length)
    init = AdamW.__init__

    def as_on_a_gpu(self, *given):
        init(self, *given)
        self._fused = True

    monkeypatch.setattr(AdamW, "__init__", as_on_a_gpu)
    watch = Watch()
    train("cpu", watch, *sets)
    assert not watch.waits.total(), watch.waits


def test_the_watch_sees():
    with Watch() as watch:
        x = torch.arange(3.0)
        bool(x.sum() > 1)
        x[x > 1]
        torch.bincount(x.long())
    assert {*watch.waits} >= {"a mask as index", "bincount"}
    assert watch.waits.total() >= 3


@pytest.mark.gpu
@CASES
def test_waits_of_a_gpu(train, sets):
    if not torch.cuda.is_available():
        pytest.skip("no GPU that PyTorch sees")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train("cuda", _Debugged(), *sets)
    waits = Counter(
        f"{warning.filename}:{warning.lineno}"
        for warning in caught
        if "called a synchronizing" in str(warning.message)
    )
    assert sum(waits.values()) <= MOST * STEPS, waits


class _Debugged:
    """PyTorch warns of every wait within the block."""

    def __enter__(self):
        torch.cuda.set_sync_debug_mode("warn")

    def __exit__(self, *_):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_gpu_gives_the_vectors_of_the_cpu(model, dataset):
    if not torch.cuda.is_available():
        pytest.skip("no GPU that PyTorch sees")
    encoder = TransformerEncoder(model, max_length=32, bf16=False)
    tokens = encoder.tokenize([*dataset.train_texts[:50], "", *dataset.label_texts])
    with torch.no_grad():
        expected = encoder(tokens)
        found = encoder.cuda()(tokens).cpu()
        half = TransformerEncoder(model, max_length=32, bf16=True).cuda()(tokens).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert torch.nn.functional.cosine_similarity(half, expected).min() > 0.99

"""Vectors as arrays and as tensors, and training whose vectors never leave their device.

The device is the emulated GPU core (see `test_cuda.py`): CPU tensors stand for CUDA tensors. The
tests fail if any vectors become an array.
"""

import warnings

import numpy as np
import pytest
import tiny
import torch
from torch.overrides import TorchFunctionMode

import ngame
from ngame import cuda, dispatch
from ngame.encoders import vectors
from ngame.encoders.bank import EmbeddingBank
from ngame.encoders.encode import encode_rows
from ngame.encoders.vectors import (
    core_device,
    first_not_finite,
    normalize,
    pair_products,
    to_float16,
    torch_device,
)
from ngame.prediction import model as model_module
from ngame.prediction.model import Model
from ngame.state import from_tensors, to_tensors
from ngame.training import adam
from ngame.training import loops as training
from ngame.training import run as run_module
from ngame.training import stage as stage_module

try:
    from ngame import _cuda_emulated as emulated
except ImportError:
    emulated = None

DIM = 24
"""Width of the vectors in this file; nothing else has this size."""

HOST = torch.device("cpu")
both = pytest.mark.parametrize("kind", [np.array, torch.tensor], ids=["array", "tensor"])


@both
def test_normalize_and_to_float16(kind):
    x = kind(np.array([[3, 4], [0, 0], [1e-10, 0]], np.float32))
    assert normalize(x).dtype == x.dtype
    np.testing.assert_allclose(normalize(x), [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)
    assert type(normalize(x)) is type(to_float16(x)) is type(x)
    assert str(to_float16(x).dtype).endswith("float16")
    np.testing.assert_array_equal(to_float16(x), np.asarray(x).astype(np.float16))


@both
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_first_not_finite(kind, value, monkeypatch):
    monkeypatch.setattr(vectors, "_ROWS_PER_CHECK", 2)
    x = np.full((5, 3), 3e38, np.float32)  # the sum overflows
    assert first_not_finite(kind(x)) is None
    x[2, 1] = x[4, 0] = value
    assert first_not_finite(kind(x)) == 2
    assert first_not_finite(kind(x[3:])) == 1


@both
def test_pair_scores(kind, rng, monkeypatch):
    monkeypatch.setattr(vectors, "_PAIRS_PER_CHUNK", 7)
    x, items = (rng.standard_normal((n, 5)).astype(np.float32) for n in (4, 6))
    rows, columns = rng.integers(4, size=30), rng.integers(6, size=30).astype(np.int32)
    scores = pair_products(x, kind(items), rows, columns)
    assert isinstance(scores, np.ndarray)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, (x @ items.T)[rows, columns], rtol=1e-5, atol=1e-6)
    assert pair_products(kind(x), kind(items), rows[:0], columns[:0]).shape == (0,)


def test_core_device(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(cuda, "why_not", lambda device: "")
    assert core_device(gpu, "exact") == gpu
    assert core_device(gpu, "hnsw") is None
    assert core_device(HOST, "exact") is None
    monkeypatch.setattr(cuda, "why_not", lambda device: "not built")
    with pytest.warns(UserWarning, match="vectors are copied to the CPU, .* used: not built"):
        assert core_device(gpu, "exact") is None


class _Module:
    """The part of the CUDA extension that `ngame.cuda` queries before calling it."""

    architectures = "80-real 90"

    def __init__(self, count=1):
        self.count = count

    def devices(self):
        return self.count, "" if self.count else "no driver"


def test_why_the_gpu_core_is_not_used(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(cuda, "_cuda", None)
    assert cuda.why_not(gpu).startswith("not built")
    monkeypatch.setattr(cuda, "_cuda", _Module(0))
    assert cuda.why_not(gpu) == "no driver; built for 80-real 90"
    monkeypatch.setattr(cuda, "_cuda", _Module())
    assert cuda.why_not(gpu) == "1 devices; built for 80-real 90, the device is 75"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert cuda.why_not(gpu) == ""


def test_names_of_devices():
    assert torch_device("cpu") == HOST
    assert torch_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="device is 'gpu', which torch cannot use"):
        torch_device("gpu")


# On a device


def test_rows_encoded_onto_a_device():
    table = torch.nn.Embedding(10, 4)
    expected = encode_rows(lambda rows: table(torch.from_numpy(rows)), 10, model=table)
    for encode in (
        lambda rows: table(torch.from_numpy(rows)).double(),
        lambda rows: table(torch.from_numpy(rows)).numpy(),
    ):
        found = encode_rows(encode, 10, model=table, chunk_size=3, device="cpu")
        assert isinstance(found, torch.Tensor)
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.from_numpy(expected))
    with pytest.raises(ValueError, match="encode returned NaN or infinity for row 0"):
        encode_rows(lambda rows: table.weight[rows] * torch.nan, 10, model=table, device="cpu")
    with pytest.raises(ValueError, match=r"returned shape \(2, 4\), expected \(3, 4\)"):
        encode_rows(lambda rows: table.weight[:2], 10, model=table, chunk_size=3, device="cpu")
    with pytest.raises(TypeError, match="encode returned of dtype int64, expected floats"):
        encode_rows(lambda rows: rows[:, None], 10, model=table, device="cpu")


def test_a_sampler_is_refreshed_from_a_device():
    table, taken = torch.nn.Embedding(12, 4), []
    sampler = ngame.ClusterBatchSampler(12, 4, cluster_size=2)
    sampler.refresh = taken.append
    for device in (None, "cpu"):
        ngame.refresh_sampler(sampler, lambda x: table.weight[x], model=table, device=device)
    assert isinstance(taken[0], np.ndarray)
    assert torch.equal(taken[1], table.weight)


@pytest.mark.parametrize("scale", [1e-30, 1, 1e30])
def test_bank_on_a_device(rng, scale):
    """Like the bank on the host, except that NaN is stored and reported by clustering."""
    x = torch.from_numpy(scale * rng.standard_normal((8, 5), dtype=np.float32))
    x[3] = 0
    there, here = EmbeddingBank(10, 5, device="cpu"), EmbeddingBank(10, 5)
    assert isinstance(there.vectors, torch.Tensor)
    for bank in (there, here):
        bank.update(torch.arange(8), x.requires_grad_())
        bank.update([8, 0, 8, 8], x[[0, 1, 5, 2]].detach().numpy())
        bank.update([], np.empty((0, 5), np.float32))
    # float64 is rounded to float16 in two steps by torch, in one by NumPy
    np.testing.assert_allclose(there.vectors, here.vectors, rtol=1e-3, atol=1e-7)
    assert torch.equal(there.vectors[8], there.vectors[2])
    assert there.unseen.tolist() == [9]
    again = EmbeddingBank(10, 5, device="cpu")
    again.load_state_dict(from_tensors(to_tensors(there.state_dict())))
    assert torch.equal(again.vectors, there.vectors)
    assert again.unseen.tolist() == [9]
    with pytest.raises(IndexError, match="rows has 10, out of range for 10"):
        there.update([10], x[:1])
    with pytest.raises(ValueError, match=r"vectors has shape \(1, 4\), expected \(1, 5\)"):
        there.update([0], x[:1, :4])
    there.update([4], torch.full((1, 5), torch.nan))
    assert first_not_finite(there.vectors) == 4


def test_no_operation_mixes_devices(monkeypatch):
    """On the meta device, which like CUDA rejects CPU operands other than indices."""
    meta = torch.device("meta")
    x, items = torch.empty(3, 4, device=meta), torch.empty(6, 4, device=meta)
    with pytest.raises(RuntimeError):
        x + torch.ones(3, 4)
    monkeypatch.setattr(vectors, "to_numpy", lambda x: np.ones(len(x)) * (x.device == meta))
    monkeypatch.setattr("ngame.encoders.encode.first_not_finite", lambda x: None)
    assert first_not_finite(x) is None
    assert pair_products(x, items, np.array([0, 2]), np.array([5, 0], np.int32)).tolist() == [1, 1]
    assert pair_products(np.ones((3, 4), np.float32), items, np.arange(2), np.arange(2)).all()
    assert to_float16(normalize(x))[np.array([1, 2])].device == meta
    bank = EmbeddingBank(10, 4, device=meta)
    bank.update([1, 2, 1], x)
    bank.update(torch.tensor([4, 2, 0]), torch.ones(3, 4))
    bank.load_state_dict({"vectors": torch.ones(10, 4).half(), "seen": np.ones(10, bool)})
    assert bank.vectors.device == to_tensors(bank.state_dict())["vectors"].device == meta
    model = torch.nn.Identity()
    found = encode_rows(lambda rows: items[rows], 6, model=model, chunk_size=4, device=meta)
    assert found.device == meta


class Stay(TorchFunctionMode):
    """Fails if vectors become an array."""

    LEAVING = ("numpy", "__array__", "tolist", "__dlpack__", "data")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.LEAVING:
            assert not (args[0].ndim == 2 and args[0].shape[1] == DIM), "vectors leave the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def device(monkeypatch):
    """The emulated GPU core, used for CPU tensors as if they were CUDA tensors."""
    monkeypatch.setattr(cuda, "_cuda", emulated)
    monkeypatch.setattr(cuda, "why_not", lambda _: "")
    monkeypatch.setattr(dispatch, "on_gpu", lambda value: isinstance(value, torch.Tensor))
    # An emulated search takes a millisecond a query.
    monkeypatch.setattr(training, "_MEASURED_POINTS", 24)
    monkeypatch.setattr(adam, "_in_core", lambda _: False)  # as of a CUDA tensor
    for module in (model_module, run_module):
        monkeypatch.setattr(module, "core_device", lambda *_: HOST)
    # After the patches: a name that is gone fails on every build.
    if emulated is None:
        pytest.skip("no emulated GPU core: built with -Ccmake.define.NGAME_CUDA_EMULATE=ON")
    emulated.set_backward(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support")
        yield HOST


@pytest.fixture(scope="module")
def dataset():
    return tiny.dataset(120, 24, drop_train=[(0, 0), (5, 3)], drop_test=[(1, 2)])


def config(*sets):
    return tiny.config(
        f"encoder.dim={DIM}",
        "prediction.k=8",
        "prediction.neighbours=9",
        "classifier_stage.cluster_size=4",
        *sets,
    )


@pytest.mark.parametrize("embeddings", ["bank", "fresh"])
def test_vectors_stay_on_their_device(dataset, device, logs, embeddings, monkeypatch):
    sets = [f"encoder_stage.embeddings={embeddings}"]
    if embeddings == "fresh":
        sets.append("classifier_stage.finetune=true")
    with Stay():
        there = ngame.train(dataset, config(*sets))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "core_device", lambda *_: None)
        here = ngame.train(dataset, config(*sets))
        with Stay(), pytest.raises(AssertionError, match="vectors leave the device"):
            ngame.train(dataset, config(*sets))
    for model, kind in ((there, torch.Tensor), (here, np.ndarray)):
        assert isinstance(model.point_vectors, kind)
        assert isinstance(model.label_vectors, kind)
        assert isinstance(model.classifier, kind)
    ours, theirs, _ = logs()
    # The first epoch has random batches, so it is the same up to rounding.
    for name, value in theirs[0].items():
        assert name in ("seconds", "measure_seconds", "refresh_share") or ours[0][
            name
        ] == pytest.approx(value), name
    # The clusters differ, since the GPU core does not refine, and so do all results after them.
    # They must be about as good.
    assert [entry["cluster_size"] for entry in ours] == [1, 4, 1, 4]
    for one, other in zip(ours, theirs, strict=True):
        assert one["P@1"] == pytest.approx(other["P@1"], abs=0.15)
        assert one["hard_negative_recall"] == pytest.approx(other["hard_negative_recall"], abs=0.15)
    for scorer, scored in here.metrics.items():
        for name, value in scored.items():
            assert there.metrics[scorer][name] == pytest.approx(value, abs=0.2), (scorer, name)


def test_predictions_on_device_and_host_are_the_same(dataset, device, monkeypatch, tmp_path):
    """The run is also written and read on the device."""
    with Stay(), monkeypatch.context() as patch:
        patch.setattr(Stay, "LEAVING", ())  # a file is written from the host
        ngame.train(dataset, config(), folder=tmp_path)
    there = Model.load(tmp_path)
    monkeypatch.setattr(model_module, "core_device", lambda *_: None)
    here = Model.load(tmp_path)
    with Stay():
        queries = there.encode(dataset.test_texts)
        found = there.scores(dataset.test_texts, vectors=queries, drop=dataset.drop_test)
    expected = here.scores(dataset.test_texts, drop=dataset.drop_test)
    assert found.keys() == expected.keys()
    for scorer, matrix in expected.items():
        assert (found[scorer].indptr == matrix.indptr).all()
        assert (found[scorer].indices == matrix.indices).all()
        np.testing.assert_allclose(found[scorer].data, matrix.data, rtol=1e-4, atol=1e-6)
    asked = here.encode(dataset.test_texts)
    np.testing.assert_allclose(queries, asked, atol=1e-6)
    # Queries may be an array too.
    again = there.scores(dataset.test_texts, vectors=asked, drop=dataset.drop_test)["fused"]
    np.testing.assert_allclose(again.data, expected["fused"].data, rtol=1e-4, atol=1e-6)


def test_a_run_on_a_device_resumes(dataset, device, monkeypatch, tmp_path):
    """Stopped before the refresh that reads the bank: the checkpoint restores it."""
    sets = config("checkpoint_minutes=0", "classifier_stage.epochs=0")
    whole = ngame.train(dataset, sets)
    step, done = stage_module.Optimizer.step, 0

    def killed(self):
        nonlocal done
        done += 1
        if done == 5:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(stage_module.Optimizer, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            ngame.train(dataset, sets, folder=tmp_path / "run")
    resumed = ngame.train(dataset, sets, folder=tmp_path / "run", resume=True)
    assert resumed.metrics == whole.metrics
    assert torch.equal(resumed.point_vectors, whole.point_vectors)


def test_clustering_rejects_nan_in_a_bank_on_a_device(device):
    bank = EmbeddingBank(40, DIM, device=device)
    x = torch.ones(40, DIM)
    x[7, 3] = x[31, 2] = torch.nan
    bank.update(range(40), x)
    sampler = ngame.ClusterBatchSampler(40, 8, cluster_size=4)
    with pytest.raises(ValueError, match="source has NaN or infinity in row 7"):
        sampler.refresh(bank.vectors)
    assert sampler.clusters is None

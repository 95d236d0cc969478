"""A run that was killed, or ran out of disk, resumes and ends with the same numbers."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

import ngame
from ngame.data.dataset import Dataset
from ngame.data.formats import save_dataset
from ngame.data.tokens import Tokens
from ngame.files import lock_file
from ngame.training import loops
from ngame.training.checkpoint import Checkpoint
from ngame.training.optimizer import Optimizer
from ngame.training.run import Truth, digest, is_digest_of
from ngame.training.stage import Stage

# All state that one batch, epoch or stage hands to the next: a bank, clusters that last several
# epochs, moments of both optimizers, gradients of several batches, the best epoch's weights.
BANK = (
    "keep='best'",
    "encoder.dropout=0.1",
    "encoder_stage.epochs=3",
    "encoder_stage.refresh_every=2",
    "encoder_stage.accumulate=2",
    "encoder_stage.positives='one'",
    "encoder_stage.random_labels=5",
    "classifier_stage.accumulate=2",
    "classifier_stage.cluster_size=4",
)
# Imports once, then forks one run after the other. The first run finishes. The next ones are killed
# by SIGKILL just before they put their first, second, third ... file or folder in its place. The
# following ones are killed at their fifth or sixth, and so a batch or two further each time, and
# those after them while they write the model. The last finishes. What is written aside, to be put
# in place with its folder, does not count.
DRIVER = """
import os, pathlib, signal, sys
import ngame.cli, ngame.prediction.model, ngame.training.loops
from ngame.training.checkpoint import Checkpoint
import torch._dynamo  # every optimizer imports it, and that takes long

def run(folder, renames):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    replace, count = os.replace, 0
    def counted(source, target):
        nonlocal count
        count += ".partial-" not in str(target)
        if count == renames and ".partial-" not in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = counted
    sys.stdout = open(os.devnull, "w")
    arguments = ["train", data, "-o", folder, "--config", config, "--resume"]
    os._exit(ngame.cli.main(arguments))

data, config, whole, killed = sys.argv[1:]
print(run(whole, 0), 1, 9, 0, flush=True)
for renames in [*range(1, 8), *([5, 6] * 5), 6, 8, 10, 8, 10, 12, 1000]:
    status = run(killed, renames)
    state = Checkpoint(pathlib.Path(killed, "checkpoint"), 0).load()
    position = (0, 0, 0)
    if state is not None:
        position = int(state[0]["stage"] == "classifier"), state[0]["epoch"], state[0]["batch"]
    print(status, *position, flush=True)
    if status != -signal.SIGKILL:
        break
"""


def log(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        assert entry.pop("seconds") >= entry.pop("measure_seconds") >= 0
        assert 0 <= entry.pop("refresh_share") <= 1
    return entries


def assert_same_run(a, b):
    for name in tiny.RESULTS:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert log(a) == log(b)


def test_a_checkpoint_of_another_run(tmp_path, monkeypatch):
    """Of another width: the file is named."""
    data = tiny.dataset()
    monkeypatch.setattr(Stage, "end_epoch", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    for name, dim in (("one", 16), ("two", 8)):
        config = tiny.config(f"encoder.dim={dim}")
        with pytest.raises(SystemExit):
            ngame.train(data, config, folder=tmp_path / name)
    shutil.copy(*(tmp_path / name / "checkpoint" / "state.safetensors" for name in ("two", "one")))
    with pytest.raises(ValueError, match=r"one/checkpoint/state\.safetensors is damaged: .*"):
        ngame.train(data, tiny.config(), folder=tmp_path / "one", resume=True)


def test_a_second_signal_within_an_update(tmp_path, monkeypatch):
    """It stops at once, when weights are new and the batch is not counted: that is not saved."""
    dataset, config = tiny.dataset(), tiny.config("checkpoint_minutes=0")
    ngame.train(dataset, config, folder=tmp_path / "whole")
    step, updates = Optimizer.step, 0

    def signalled(self):
        nonlocal updates
        step(self)
        updates += 1
        if updates == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Optimizer, "step", signalled)
    with pytest.raises(SystemExit):
        ngame.train(dataset, config, folder=tmp_path / "stopped")
    meta, _ = Checkpoint(tmp_path / "stopped" / "checkpoint", 0).load()
    assert (meta["updates"], meta["batch"]) == (2, 2)
    ngame.train(dataset, config, folder=tmp_path / "stopped", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("sets", [BANK, tiny.FINETUNED], ids=["bank", "fine-tuned"])
def test_killed_again_and_again(tmp_path, sets):
    data, config = tmp_path / "data", tmp_path / "config.toml"
    save_dataset(tiny.dataset(points=200), data)
    tiny.config("checkpoint_minutes=0", *sets).save(config)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, data, config, whole, killed],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [[*map(int, line.split())] for line in done.stdout.splitlines()]
    statuses, positions = [line[0] for line in lines], [tuple(line[1:]) for line in lines[1:]]
    assert (statuses[0], statuses[-1]) == (0, 0), done.stderr
    assert len(statuses) > 20
    assert set(statuses[1:-1]) == {-signal.SIGKILL}
    # They went on from within both stages.
    assert positions == sorted(positions)
    assert len({place for place in positions if place[0] == 0}) > 3
    assert len({place for place in positions if place[0] == 1}) > 2
    assert_same_run(whole, killed)
    # The killed runs left no partial files.
    assert files(killed) == files(whole)
    assert {Path(name).suffix for name in files(whole)} == {
        ".json",
        ".jsonl",
        ".lock",
        ".npy",
        ".safetensors",
        ".toml",
    }
    for path in whole.rglob("*.npy"):
        assert np.load(path, allow_pickle=False).ndim == 1


def config(*sets):
    one_epoch = "encoder_stage.epochs=1", "encoder_stage.cluster_size=1"
    return tiny.config("checkpoint_minutes=0", *one_epoch, *sets)


@pytest.fixture(scope="module")
def dataset():
    return tiny.dataset(points=120)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    ngame.train(dataset, config(), folder=folder)
    return folder


def test_writing_a_run_changes_nothing(dataset, finished):
    """The metrics do not depend on the folder or on the time between checkpoints."""
    assert ngame.train(dataset, config()).metrics == ngame.Model.load(finished).metrics
    rare = config("checkpoint_minutes=1000")
    assert ngame.train(dataset, rare).metrics == ngame.Model.load(finished).metrics


def test_full_disk(dataset, finished, tmp_path, monkeypatch):
    """The disk is full from the third checkpoint on."""
    folder = tmp_path / "run"
    fsync, count = os.fsync, 0

    def full(descriptor):
        nonlocal count
        if "state" in os.readlink(f"/proc/self/fd/{descriptor}"):
            count += 1
        if count >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"state\.safetensors cannot be written: No space left"):
            ngame.train(dataset, config(), folder=folder)
    meta, _ = Checkpoint(folder / "checkpoint", 0).load()
    assert (meta["stage"], meta["updates"]) == ("encoder", 2)
    assert not [name for name in files(folder) if Path(name).name.startswith(".")]
    ngame.train(dataset, config(), folder=folder, resume=True)
    assert_same_run(folder, finished)


def test_a_finished_run_can_be_resumed(dataset, finished):
    names = (*tiny.RESULTS, "log.jsonl")
    before = {name: (finished / name).read_bytes() for name in names}
    (finished / "log.jsonl").write_bytes(before["log.jsonl"][:40])
    ngame.train(dataset, config(), folder=finished, resume=True)
    assert {name: (finished / name).read_bytes() for name in names} == before


def test_time_between_checkpoints_may_change(dataset, finished):
    longer = config("checkpoint_minutes=7")
    assert ngame.train(dataset, longer, folder=finished, resume=True).metrics


@pytest.mark.parametrize("refresh_every", [1, 2])
def test_what_is_known_of_clusters_outlives_a_stop(dataset, tmp_path, monkeypatch, refresh_every):
    """Clusters are measured only for epochs that are scored, here 0, 2 and 4."""
    monkeypatch.setattr(loops, "_score_every", lambda *_, **__: 2)
    sets = ("encoder_stage.epochs=5", f"encoder_stage.refresh_every={refresh_every}")
    own = tiny.config("classifier_stage.epochs=0", *sets)
    ngame.train(dataset, own, folder=tmp_path / "whole")
    step, steps = Stage.step, 0

    def stopped(stage, *arguments):
        nonlocal steps
        steps += 1
        if steps % 3 == 0:
            signal.raise_signal(signal.SIGTERM)
        step(stage, *arguments)

    monkeypatch.setattr(Stage, "step", stopped)
    stops = 0
    while True:
        try:
            ngame.train(dataset, own, folder=tmp_path / "stopped", resume=True)
            break
        except SystemExit:
            stops += 1
    assert stops > 4
    for name in ("vectors.safetensors", "metrics.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()
    entries = log(tmp_path / "whole")
    assert log(tmp_path / "stopped") == entries
    known = [entry["epoch"] for entry in entries if entry["neighbour_share"] is not None]
    assert known == ([2, 4] if refresh_every == 1 else [1, 2, 3, 4])


def test_folder_with_another_run(dataset, finished):
    before = files(finished)
    with pytest.raises(FileExistsError, match="already holds a run: resume it, or choose another"):
        ngame.train(dataset, config(), folder=finished)
    with pytest.raises(ValueError, match=r"config\.toml has other settings than those given"):
        ngame.train(dataset, config("seed=5"), folder=finished, resume=True)
    assert files(finished) == before


@pytest.mark.parametrize(
    "changed",
    [
        {"points": 121},
        {"test": 59},
        {"seed": 1},
        {"drop_train": [(0, 0)]},
        {"drop_test": [(0, 0)]},
        {"test_texts": ["ba"] * 60},
        {"label_titles": [text.split()[0] for text in tiny.dataset(points=1).label_texts]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_resume_on_other_data(finished, changed):
    other = tiny.dataset(**{"points": 120} | changed)
    with pytest.raises(ValueError, match="was started on other data"):
        ngame.train(other, config(), folder=finished, resume=True)


def test_titles_have_a_digest_of_their_own():
    """Which earlier versions did not write: their runs go on."""
    data = {"train_texts": ["a"], "train_labels": [[1, 0]], "label_texts": ["x", "y z"]}
    before = {"points": 1, "labels": 2, "digest": "0e3eddc4711fb8bd"}
    assert digest(Dataset(**data)) == before | {"titles": None}
    one, two = (Dataset(**data, label_titles=titles) for titles in (["x", "y"], ["", "y"]))
    assert is_digest_of(before, one)
    assert is_digest_of(digest(one), one)
    assert not is_digest_of(digest(one), two)
    assert not is_digest_of(digest(one), Dataset(**data))
    assert not is_digest_of(digest(Dataset(**data)), one)
    for damaged in ({}, [], None, {"points": 1, "labels": 2}):
        assert not is_digest_of(damaged, one)


def test_without_its_state_a_run_still_knows_its_data(dataset, finished, tmp_path):
    """Else it would train on the tokens of other texts."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "checkpoint")
    with pytest.raises(ValueError, match="was started on other data"):
        ngame.train(tiny.dataset(points=120, seed=1), config(), folder=folder, resume=True)
    ngame.train(dataset, config(), folder=folder, resume=True)
    assert_same_run(folder, finished)


def test_a_run_of_another_version_is_said_at_the_call(dataset, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | {"ngame": "0.0"}))
    with pytest.warns(UserWarning, match="was written by ngame 0.0") as found:
        ngame.train(dataset, config(), folder=folder, resume=True)
    assert found[0].filename == __file__


@pytest.mark.parametrize(
    ("owner", "name"), [(Checkpoint, "__init__"), (Truth, "take"), (Tokens, "take")]
)
def test_an_early_error_lets_others_use_the_folder(dataset, tmp_path, monkeypatch, owner, name):
    def fails(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(MemoryError) as error:
            ngame.train(dataset, config(), folder=tmp_path)
    lock_file(tmp_path / "run.lock").close()
    assert error.tb is not None  # until here it has kept the run alive
    assert ngame.train(dataset, config(), folder=tmp_path, resume=True).metrics


@pytest.mark.parametrize("resume", [False, True])
def test_folder_with_something_else(dataset, tmp_path, resume):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="is not empty and is not a run"):
        ngame.train(dataset, config(), folder=tmp_path, resume=resume)
    assert files(tmp_path) == {"thesis.tex"}


@pytest.mark.parametrize("resume", [False, True])
def test_folder_with_a_saved_model(dataset, finished, tmp_path, resume):
    """It has the settings of its run: to train anew over it would lose the model."""
    ngame.Model.load(finished).save(tmp_path)
    saved = {name: (tmp_path / name).read_bytes() for name in ("config.toml", "fusion.json")}
    with pytest.raises(FileExistsError, match="holds a saved model and no run: choose another"):
        ngame.train(dataset, config(), folder=tmp_path, resume=resume)
    assert {name: (tmp_path / name).read_bytes() for name in saved} == saved


def test_resume_starts_a_run_if_there_is_none(dataset, finished, tmp_path):
    ngame.train(dataset, config(), folder=tmp_path / "new" / "run", resume=True)
    assert_same_run(tmp_path / "new" / "run", finished)

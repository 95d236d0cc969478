"""Every command as a person would call it: what it prints, what it writes, its errors."""

import errno
import fcntl
import io
import json
import os
import platform
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import tiny

import ngame
from ngame.cli import main
from ngame.data.formats import hash_bucket, save_dataset
from ngame.data.sparse_text import write_sparse_text
from ngame.files import lock_file
from ngame.report.measures import RunReport
from ngame.training.checkpoint import Checkpoint

# The command shows warnings itself.
pytestmark = pytest.mark.filterwarnings("default")

FAMILIES = ("P", "N", "R", "MRR", "MAP", "HR", "PSP", "PSN")
TRAINING = Path(__file__).parent.parent / "docs" / "training.md"
SETS = [
    f"--set={setting}"
    for setting in (*tiny.SETTINGS, "classifier_stage.epochs=1", "prediction.k=20")
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    save_dataset(tiny.dataset(drop_test=[(0, 0), (1, 1)]), folder)
    return str(folder)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("run") / "run")
    assert main(["train", data, "-o", folder, *SETS]) == 0
    return folder


@pytest.fixture
def call(capsys):
    """Run a command and return its exit status, standard output and standard error."""

    def run_command(*arguments):
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run_command


@pytest.fixture
def mistake(call, tmp_path):
    """Run a command that fails and return its message. It must not leave a file."""

    def run_command(*arguments, status=2):
        before = sorted(tmp_path.rglob("*"))
        found, _, err = call(*arguments)
        assert found == status
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        return err

    return run_command


# Commands


def test_train(call, data, tmp_path):
    status, out, err = call("train", data, "-o", tmp_path / "run", *SETS)
    assert status == 0
    # A line an epoch where there is no terminal for the bars.
    entries = [
        json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    ]
    epochs = {"encoder": 2, "classifier": 1}
    for line, entry in zip(err.splitlines(), entries, strict=True):
        stage, epoch = entry["stage"], entry["epoch"] + 1
        start = f"{stage}: epoch {epoch}/{epochs[stage]}, loss {entry['loss']:.4f}, "
        assert line.startswith(start)
        assert f"held-out P@1 {100 * entry['P@1']:.2f}" in line
    lines = out.splitlines()
    sizes = "300 training points, 60 test points, 24 labels"
    assert lines[0] == f"<Dataset tiny: {sizes}, pairs left out: 2 test>"
    assert re.fullmatch(rf"trained in \d+ s, the run is in {tmp_path}/run", lines[1])
    assert lines[2].split() == ["P@1", "P@3", "P@5", "N@5", "PSP@1", "PSP@5", "R@10", "R@100"]
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for line in lines[3:]:
        name, first, *_ = line.split()
        assert float(first) == pytest.approx(100 * written[name]["P@1"], abs=0.005)
    assert [line.split()[0] for line in lines[3:]] == list(written)


def test_train_and_resume(call, mistake, data, run, tmp_path):
    table = call("evaluate", run, data)[1]
    for again in ([], SETS):
        status, out, _ = call("train", data, "-o", run, "--resume", *again)
        assert status == 0
        assert "fused" in out
    assert call("evaluate", run, data)[1] == table
    assert "already holds a run: resume it" in mistake("train", data, "-o", run, *SETS)
    err = mistake("train", data, "-o", run, "--resume", *SETS, "--set=seed=9")
    assert "config.toml has other settings than those given: seed is 0, not 9; resume" in err
    # What is not given is the run's own, and how a run is computed may change.
    err = mistake("train", data, "-o", run, "--resume", "--set=seed=9")
    assert "config.toml has other settings than those given: seed is 0, not 9; resume" in err
    free = ("--set=threads=2", "--set=checkpoint_minutes=3", "--set=device=cpu")
    assert call("train", data, "-o", run, "--resume", *free)[0] == 0
    config = tmp_path / "some.toml"
    config.write_text("threads = 1\nseed = 9\n[encoder_stage]\nschedule = {0 = 4}\n")
    err = mistake("train", data, "-o", run, "--resume", "--config", config)
    assert "seed is 0, not 9, encoder_stage.schedule is {}, not {0 = 4}; resume" in err
    config.write_text("threads = 1\n[encoder]\ndim = 16\n")
    assert call("train", data, "-o", run, "--resume", "--config", config)[0] == 0
    assert ngame.Config.load(Path(run) / "config.toml").threads == 1


def test_train_with_a_file_of_settings(call, data, tmp_path):
    config = tmp_path / "mine.toml"
    tiny.config("classifier_stage.epochs=0").save(config)
    folder = tmp_path / "run"
    assert call("train", data, "-o", folder, "--config", config, "--set=seed=5")[0] == 0
    saved = ngame.config.Config.load(folder / "config.toml")
    assert (saved.seed, saved.encoder.dim, saved.classifier_stage.epochs) == (5, 16, 0)


def test_train_on_texts_with_tags(call, tmp_path):
    whole = tiny.dataset()
    path = tmp_path / "mine.jsonl"
    with open(path, "w") as file:
        for row, text in enumerate(whole.train_texts):
            tags = [whole.label_texts[label] for label in whole.train_labels[row].indices]
            print(json.dumps({"text": text, "labels": tags}), file=file)
    status, out, _ = call("train", path, "-o", tmp_path / "run", *SETS)
    assert status == 0
    assert "24 labels" in out
    out = call("predict", tmp_path / "run", "--text", whole.train_texts[0], "-k", 3)[1]
    labels = [line.split(maxsplit=1)[1] for line in out.splitlines()[1:4]]
    assert set(labels) <= set(whole.label_texts)
    # The test points of its own file are scored, wherever that is now.
    moved = path.rename(tmp_path / "elsewhere.jsonl")
    _, out, err = call("evaluate", tmp_path / "run", moved, "-k", 1)
    scored = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert err == ""
    assert float(out.splitlines()[-1].split()[1]) == round(100 * scored["fused"]["P@1"], 2)


def test_points_that_are_labels(call, tmp_path):
    texts = [f"{tiny.word(number)} {tiny.word(number // 5 + 500)}" for number in range(100)]
    links = np.kron(np.eye(20), np.ones((5, 5))) - np.eye(100)
    parts = {"test_texts": texts[70:], "test_labels": links[70:]}
    save_dataset(ngame.Dataset(texts[:70], links[:70], texts, **parts), tmp_path / "data")
    line = "100 points are labels: their own label is left out"
    told = f"{line}; --self-pairs keep counts it\n"
    line += "\n"
    own = {(row, row + 70) for row in range(30)}
    for name, sets, expected in (("drop", [], line), ("keep", ["--set=self_pairs=keep"], "")):
        run, found = tmp_path / name, tmp_path / f"{name}.npz"
        said = call("train", tmp_path / "data", "-o", run, *SETS, *sets)[2]
        assert said.startswith(expected or "encoder: epoch 1")
        assert call("evaluate", run, tmp_path / "data")[2] == (told if expected else "")
        arguments = "--data", tmp_path / "data", "-o", found
        assert call("predict", run, *arguments, "--scorer", "encoder")[2] == expected
        rows, labels = sp.load_npz(found).nonzero()
        pairs = set(zip(rows.tolist(), labels.tolist(), strict=True))
        assert bool(pairs & own) == (name == "keep")
        # A report takes the data for those of the run.
        assert RunReport(run, ngame.load_dataset(tmp_path / "data")).test is not None
        # As the run did, or as is asked for: of a file and of a run alike.
        ks = "-k", 1, 5, "--self-pairs"
        assert call("evaluate", found, tmp_path / "data")[2].startswith(told)
        tables = []
        for pairs, said in (("drop", told), ("keep", "")):
            _, out, err = call("evaluate", run, tmp_path / "data", *ks, pairs)
            assert err == said
            tables.append([row.split()[1:] for row in out.splitlines() if "encoder" in row])
            _, out, err = call("evaluate", found, tmp_path / "data", *ks, pairs)
            assert err == said
            if pairs == name:
                assert [row.split()[1:] for row in out.splitlines() if name in row] == tables[-1]
        assert tables[0] != tables[1]


def test_another_file_is_scored_by_the_names_of_labels(call, mistake, run, data, tmp_path):
    """All rows but those that were trained on; what the run does not know counts as missed."""
    old, new = tiny.dataset(), tiny.dataset(seed=1)
    rows = [(text, new.test_labels[row].indices[:1]) for row, text in enumerate(new.test_texts)]
    path, more = tmp_path / "new.jsonl", [["unknown"]] * 3 + [[]] * 57
    lines = [{"text": text, "labels": ["other"]} for text in old.train_texts[:7]]
    for (text, ids), extra in zip(rows, more, strict=True):
        names = [new.label_texts[label] for label in ids if label < 20]
        lines.append({"text": text, "labels": [*names, *extra]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len({name for line in lines for name in line["labels"]}) < 24

    status, out, err = call("evaluate", run, path, "-k", 1, 10)
    assert status == 0
    unlabelled = sum(not line["labels"] for line in lines)
    assert err.splitlines() == [
        "ngame: warning: the run was trained on 7 of 67 rows of new: they are left out",
        "ngame: warning: the run does not know 2 labels of new (3 pairs), and cannot predict them",
        f"ngame: warning: {unlabelled} of 60 test points have no label and count as wrong",
    ]
    model = ngame.Model.load(run)
    found = model.predict(new.test_texts, 10)
    truth = [
        [*ids[ids < 20], *[24] * len(extra)] for (_, ids), extra in zip(rows, more, strict=True)
    ]
    best = [row.indices[np.argsort(-row.data, kind="stable")].tolist() for row in found]
    hits = [len({*truth[row]} & {*best[row]}) / max(1, len(truth[row])) for row in range(60)]
    table = dict(zip(out.splitlines()[0].split(), out.splitlines()[8].split()[1:], strict=True))
    assert out.splitlines()[8].startswith("fused")
    assert float(table["R@10"]) == pytest.approx(100 * np.mean(hits), abs=0.005)

    output = tmp_path / "found.jsonl"
    assert call("predict", run, "--data", path, "-k", 10, "-o", output)[0] == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["text"] for line in lines] == new.test_texts
    assert [line["ids"] for line in lines] == best
    err = mistake("evaluate", output, path, status=3)
    assert "new.jsonl are a part of its rows: `ngame evaluate RUN` scores a run on all" in err
    (tmp_path / "broken.tsv").write_text("row\tid\n0\tx\n")
    err = mistake("evaluate", tmp_path / "broken.tsv", path, status=3)
    assert err.endswith("broken.tsv:2: invalid literal for int() with base 10: 'x'\n")

    # A model with that label knows it.
    grown = tmp_path / "grown"
    shutil.copytree(run, grown)
    model.with_labels(["unknown", "other"]).save(grown)
    assert "does not know" not in call("evaluate", grown, path)[2]
    assert call("evaluate", grown, data)[0] == 0
    assert call("report", grown, "--data", data)[0] == 0

    path.write_text('{"text": "ba", "labels": ["nobody\'s"]}\n')
    assert "no label of new is one of the run's" in mistake("evaluate", run, path, status=3)
    line = {"text": old.train_texts[0], "labels": old.label_texts[:1]}
    path.write_text(json.dumps(line) + "\n")
    err = mistake("evaluate", run, path, status=3)
    assert "the run was trained on all 1 rows of new" in err
    shutil.copytree(run, tmp_path / "small", ignore=shutil.ignore_patterns("tokens"))
    status, _, err = call("evaluate", tmp_path / "small", path)
    assert status == 0
    assert "small/tokens is gone: if the run was trained on rows of new, they are scored" in err


def test_warnings_are_one_line(call, tmp_path):
    whole = tiny.dataset()
    y = whole.train_labels.tolil()
    y[7] = 0
    save_dataset(tiny.dataset(train_labels=y.tocsr()), tmp_path / "data")
    status, _, err = call("train", tmp_path / "data", "-o", tmp_path / "run", *SETS)
    assert status == 0
    warned = [line for line in err.splitlines() if not line.startswith(("encoder:", "classifier:"))]
    assert warned == ["ngame: warning: 1 of 300 training points have no label and are dropped"]
    # Nor does it count for propensities, of a run or of a file.
    data, found = tmp_path / "data", tmp_path / "found.npz"
    call("predict", tmp_path / "run", "--data", data, "-o", found)
    tables = []
    for more in ([], ["--propensity", 0.6, 2.6]):
        rows = [
            call("evaluate", what, data, "-k", 1, *more)[1].splitlines()[-1].split()[1:]
            for what in (tmp_path / "run", found)
        ]
        assert rows[0] == rows[1]
        tables.append(rows[0])
    assert tables[0][:6] == tables[1][:6]
    weights = ngame.metrics.inverse_propensity(y[[*range(7), *range(8, 300)]].tocsr(), 0.6, 2.6)
    psp = ngame.metrics.evaluate(
        sp.load_npz(found), whole.test_labels, ks=[1], inverse_propensity=weights
    )["PSP@1"]
    assert float(tables[1][6]) == round(100 * psp, 2)
    assert tables[0][6:] != tables[1][6:]


def test_predict_texts(call, run, data, tmp_path):
    texts = tiny.dataset().test_texts[:2]
    status, out, err = call("predict", run, "--text", texts[0], "--text", texts[1], "-k", 4)
    assert (status, err) == (0, "")
    first, second, rest = out.split("\n\n")
    assert rest == ""
    model = ngame.Model.load(run)
    for text, block, row in zip(texts, (first, second), model.predict(texts, 4), strict=True):
        lines = block.splitlines()
        assert lines[0] == text
        best = np.argsort(-row.data, kind="stable")
        assert [line.split(maxsplit=1)[1] for line in lines[1:]] == [
            model.label_texts[label] for label in row.indices[best]
        ]
        scores = [float(line.split()[0]) for line in lines[1:]]
        assert scores == sorted(scores, reverse=True)

    listed = tmp_path / "texts.txt"
    listed.write_bytes("\r\n".join(texts).encode())
    assert call("predict", run, "--texts", listed, "-k", 4)[1] == out
    assert out.count("\n") == 2 * (1 + 4 + 1)
    assert call("predict", run, "--text", texts[0])[1].count("\n") == 1 + 10 + 1


def test_predict_what_is_likely(call, mistake, run):
    texts = [f"--text={text}" for text in tiny.dataset().test_texts[:9]]
    command = "predict", run, *texts, "--probabilities", "-o", "-"
    every = [json.loads(line) for line in call(*command, "-k", 20)[1].splitlines()]
    chosen = sorted(score for line in every for score in line["scores"])[-30]
    status, out, _ = call(*command, "--threshold", chosen)
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert sum(len(line["ids"]) for line in lines) == 30
    for line, all_of_it in zip(lines, every, strict=True):
        assert line["scores"] == [score for score in all_of_it["scores"] if score >= chosen]
        assert line["ids"] == all_of_it["ids"][: len(line["ids"])]
    err = mistake("predict", run, "--text=ba", "--threshold=0.5")
    assert "--threshold is a probability: it needs --probabilities" in err
    for value in ("2", "nan", "x"):
        assert "argument --threshold: " in mistake("predict", run, "--text=a", "--threshold", value)


def test_only_line_feeds_end_lines(call, run, tmp_path, monkeypatch):
    """Other characters at which Python splits lines are part of a text."""
    raw = "ba\u2028ke\x0bli\x85mo\nra se\n".encode()
    (tmp_path / "texts.txt").write_bytes(raw)
    out = call("encode", run, tmp_path / "texts.txt", "-o", tmp_path / "a.npy")[1]
    assert out.startswith("2 vectors of width 16")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert call("encode", run, "-", "-o", tmp_path / "b.npy")[0] == 0
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_blank_lines_get_empty_results(call, run, tmp_path, monkeypatch):
    one, two = tiny.dataset().test_texts[:2]
    alone = [call("predict", run, "--text", text, "-k", 3)[1] for text in (one, two)]
    raw = f"\n{one}\n \n{two}\n\n".encode()
    for source in ("-", tmp_path / "texts.txt"):
        (tmp_path / "texts.txt").write_bytes(raw)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        status, out, err = call("predict", run, "--texts", source, "-k", 3)
        assert (status, err) == (0, "")
        assert out == f"\n\n{alone[0]}\n\n{alone[1]}\n\n"
    found = tmp_path / "found.npz"
    assert call("predict", run, "--texts", tmp_path / "texts.txt", "-k", 3, "-o", found)[0] == 0
    assert np.diff(sp.load_npz(found).indptr).tolist() == [0, 3, 0, 3, 0]
    assert call("encode", run, tmp_path / "texts.txt", "-o", tmp_path / "x.npy")[0] == 0
    x = np.load(tmp_path / "x.npy")
    assert x.dtype == np.float32
    assert x.any(axis=1).tolist() == [False, True, False, True, False]
    np.testing.assert_array_equal(x[[1, 3]], ngame.Model.load(run).encode([one, two]))


def test_no_lines_at_all(call, run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert call("predict", run, "--texts", "-") == (0, "", "")
    assert call("encode", run, "-", "-o", tmp_path / "x.npy")[0] == 0
    assert np.load(tmp_path / "x.npy").shape == (0, 16)


@pytest.mark.parametrize("scorer", ["encoder", "classifier", "neighbours", "fused"])
def test_predict_into_a_file_and_evaluate(call, run, data, tmp_path, scorer):
    path = tmp_path / "found.npz"
    out = call("predict", run, "--data", data, "-o", path, "--scorer", scorer)[1]
    found = sp.load_npz(path)
    assert out == f"60 rows, {found.nnz} predictions: {path}\n"
    dataset = ngame.load_dataset(data)
    model = ngame.Model.load(run)
    expected = model.predict(dataset.test_texts, scorer=scorer, drop=dataset.drop_test)
    assert (found != expected).nnz == 0
    assert found.nnz <= 60 * 20
    lines = call("evaluate", path, data, "-k", 1, 10)[1].splitlines()
    headers = [word for line in lines for word in line.split() if "@" in word]
    assert headers == [f"{name}@{k}" for name in FAMILIES for k in (1, 10)]
    name, precision, *_ = lines[1].split()
    assert name == "found.npz"
    assert float(precision) == pytest.approx(100 * model.metrics[scorer]["P@1"], abs=0.005)
    table = call("evaluate", run, data, "-k", 1, 10)[1].splitlines()
    line = next(line for line in table if line.startswith(scorer))
    assert line.split()[1] == precision


def test_what_the_terminal_cannot_show_is_replaced(run, tmp_path):
    """For people. Programs get UTF-8."""
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}

    def output(*arguments):
        command = [sys.executable, "-m", "ngame", *arguments]
        return subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout

    text = "ba \N{FIRE} " + "ke " * 40
    predict = "predict", run, "--text", text, "-k", "1"
    shown = output(*predict)
    assert shown.startswith(b"ba ? ke ke ke ke")
    assert b" ke ?\n" in shown  # an ellipsis
    assert json.loads(output(*predict, "-o", "-"))["text"] == text
    # A name of bytes that are not UTF-8.
    (tmp_path / "texts.txt").write_text("ba\n")
    path = os.fsencode(tmp_path) + b"/\xff.npy"
    env["PYTHONIOENCODING"] = "utf8"
    said = output("encode", run, str(tmp_path / "texts.txt"), "-o", path)
    assert said.endswith(b"/?.npy\n")
    assert os.path.exists(path)


def test_predictions_by_suffix(call, mistake, run, tmp_path):
    """Best first, with the labels' texts; the same predictions in every format."""
    texts = [*tiny.dataset().test_texts[:2], "", "two\twords"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    arguments = "predict", run, "--texts", tmp_path / "texts.txt", "-k", 4, "-o"
    model = ngame.Model.load(run)
    for name in ("found.jsonl", "found.tsv", "found.npz"):
        assert call(*arguments, tmp_path / name)[1] == (
            f"4 rows, 12 predictions: {tmp_path / name}\n"
        )
    lines = (tmp_path / "found.jsonl").read_text()
    assert call(*arguments, "-") == (0, lines, "")
    found = sp.load_npz(tmp_path / "found.npz")
    table = ["row\trank\tid\tscore\tlabel\ttext"]
    for row, line in enumerate(map(json.loads, lines.splitlines())):
        assert line["text"] == texts[row]
        best = np.argsort(-found[row].data, kind="stable")
        assert line["ids"] == found[row].indices[best].tolist()
        np.testing.assert_array_equal(np.float32(line["scores"]), found[row].data[best])
        assert line["labels"] == [model.label_texts[label] for label in line["ids"]]
        for rank, label in enumerate(line["ids"], 1):
            score, text = line["scores"][rank - 1], texts[row].replace("\t", " ")
            table.append(f"{row}\t{rank}\t{label}\t{score:.6g}\t{model.label_texts[label]}\t{text}")
    assert (tmp_path / "found.tsv").read_text().splitlines() == table
    assert [len(json.loads(line)["ids"]) for line in lines.splitlines()] == [4, 4, 0, 4]
    # Without -k: 10 labels for people, as many as the run keeps for programs.
    assert len(json.loads(call("predict", run, "--text", texts[0], "-o", "-")[1])["ids"]) == 10
    err = mistake("predict", run, "--text", "a", "-o", tmp_path / "found.csv")
    assert "found.csv ends in none of .jsonl, .tsv, .npz" in err
    err = mistake("encode", run, tmp_path / "texts.txt", "-o", tmp_path / "found.csv")
    assert "found.csv does not end in .npy" in err
    err = mistake("cluster", "vectors.npy", "--size", 2, "-o", tmp_path / "found.npy")
    assert "found.npy does not end in .npz" in err


def test_evaluate_reads_what_predict_writes(call, mistake, run, data, tmp_path):
    tables = []
    for name in ("found.npz", "found.jsonl", "found.tsv", "arrays.npz"):
        path = tmp_path / name
        if name == "arrays.npz":
            lines = (tmp_path / "found.jsonl").read_text().splitlines()
            best = [json.loads(line) for line in lines]
            np.savez(path, **{key: [one[key] for one in best] for key in ("ids", "scores")})
        else:
            assert call("predict", run, "--data", data, "-k", 10, "-o", path)[0] == 0
        status, out, err = call("evaluate", path, data, "-k", 1, 5)
        assert (status, err) == (0, "")
        tables.append(out.replace(name, "").split())
    assert tables[0] == tables[1] == tables[2] == tables[3]
    # Predictions of other texts are refused.
    (tmp_path / "texts.txt").write_text("\n".join(tiny.dataset().train_texts[:60]))
    call("predict", run, "--texts", tmp_path / "texts.txt", "-o", tmp_path / "other.jsonl")
    err = mistake("evaluate", tmp_path / "other.jsonl", data, status=3)
    assert re.search(r"other.jsonl:1: the text is '.*', that of test point 0 '", err)


def test_evaluate_beyond_what_was_predicted(call, run, data, tmp_path):
    path = tmp_path / "found.npz"
    call("predict", run, "--data", data, "-k", 5, "-o", path)
    assert call("evaluate", path, data, "-k", 1, 5)[2] == ""
    assert call("evaluate", path, data, "-k", 5, 20, 10)[2] == (
        "ngame: warning: no row of found.npz has more than 5 predictions: "
        "scores at 10, 20 count the missing ones as wrong\n"
    )
    # Every label was predicted: no warning.
    call("predict", run, "--data", data, "-k", 24, "--scorer", "encoder", "-o", path)
    assert call("evaluate", path, data, "-k", 24, 100)[2] == ""


def test_evaluate_without_texts(call, run, data, tmp_path):
    """Sparse text alone: predictions, labels and pairs to leave out."""
    whole = ngame.load_dataset(data)
    bare, found = tmp_path / "bare", tmp_path / "found.npz"
    bare.mkdir()
    write_sparse_text(bare / "trn_X_Y.txt", whole.train_labels)
    write_sparse_text(bare / "tst_X_Y.txt", whole.test_labels)
    np.savetxt(bare / "filter_labels_test.txt", whole.drop_test, fmt="%d")
    call("predict", run, "--data", data, "-o", found)
    write_sparse_text(tmp_path / "found.txt", sp.load_npz(found))
    tables = [
        call("evaluate", tmp_path / name, folder, "-k", 1, 5)[1].replace(name, "").split()
        for name in ("found.npz", "found.txt")
        for folder in (data, bare)
    ]
    assert tables[0] == tables[1] == tables[2] == tables[3]
    # Too few points to tell propensities from.
    write_sparse_text(bare / "trn_X_Y.txt", whole.train_labels[:1])
    _, out, err = call("evaluate", found, bare, "-k", 1)
    assert err == (
        "ngame: warning: 1 training points have a label: PSP and PSN, which need at least 3, are "
        "left out\n"
    )
    assert "P@1" in out
    assert "PSP" not in out


def test_tables_fit_100_columns(call, run, data, tmp_path):
    path = tmp_path / ("a name that is much longer than tables have room for " * 2 + ".npz")
    call("predict", run, "--data", data, "-o", path)
    for what in (run, path):
        for ks in ([1, 3, 5, 10, 100], [1], range(1, 20)):
            out = call("evaluate", what, data, "-k", *ks)[1]
            assert max(map(len, out.splitlines())) <= 100
            headers = " ".join(line for line in out.splitlines() if "@" in line)
            assert headers.split() == [f"{name}@{k}" for name in FAMILIES for k in ks]
    # A table holds whole families, such as P at every k.
    headers = [line.split() for line in call("evaluate", run, data)[1].splitlines() if "@" in line]
    assert [len(header) for header in headers] == [10, 10, 10, 10]


def test_encode(call, run, data, tmp_path, monkeypatch):
    texts = tiny.dataset().test_texts
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    assert call("encode", run, tmp_path / "texts.txt", "-o", tmp_path / "x.npy")[0] == 0
    x = np.load(tmp_path / "x.npy", allow_pickle=False)
    np.testing.assert_array_equal(x, ngame.Model.load(run).encode(texts))
    # Written a few at a time, as float16.
    monkeypatch.setattr("ngame.cli._TEXTS_AT_ONCE", 3)
    arguments = "encode", run, tmp_path / "texts.txt", "-o", tmp_path / "x.npy"
    assert call(*arguments, "--dtype", "float16")[0] == 0
    halves = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert halves.dtype == np.float16
    np.testing.assert_allclose(halves, x, atol=1e-3)


def test_cluster(call, tmp_path, rng):
    x = rng.standard_normal((103, 8), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    path = tmp_path / "clusters.npz"
    for option, sizes in (("--size", [10] * 10 + [3]), ("--clusters", [10] * 7 + [11] * 3)):
        status, out, _ = call("cluster", tmp_path / "x.npy", option, 10, "--seed", 4, "-o", path)
        assert status == 0
        clusters = ngame.Clusters.load(path)
        named = {"--size": "size", "--clusters": "n_clusters"}[option]
        assert clusters == ngame.balanced_clusters(x, seed=4, **{named: 10})
        assert sorted(np.diff(clusters.offsets)) == sorted(sizes)
        assert f"103 rows in {len(sizes)} clusters of {min(sizes)} to {max(sizes)}" in out


def test_cluster_in_parts(call, tmp_path, rng):
    x = rng.standard_normal((1000, 8), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    path = tmp_path / "clusters.npz"
    arguments = "cluster", tmp_path / "x.npy", "--size", 10, "-o", path, "--memory"
    status, out, _ = call(*arguments, "50K")
    assert status == 0
    assert "1000 rows in 100 clusters of 10 to 10, " in out
    assert ngame.Clusters.load(path) == ngame.balanced_clusters(x, size=10, memory=50_000)
    status, _, err = call(*arguments, "much")
    assert status == 2
    assert "much is no number of bytes, such as 3500M" in err


def test_a_signal_leaves_no_temporary_files(run, tmp_path, rng):
    """Neither those of clusters in parts nor an output that is half written."""
    (tmp_path / "parts").mkdir()
    np.save(tmp_path / "x.npy", rng.standard_normal((400_000, 16), dtype=np.float32))
    (tmp_path / "texts.txt").write_text("ba ke li mo\n" * 1_000_000)
    clusters = "cluster", tmp_path / "x.npy", "--size", "16", "--memory", "20M", "-o", "c.npz"
    vectors = "encode", run, tmp_path / "texts.txt", "-o", "v.npy"
    for number, status, arguments in (
        (signal.SIGTERM, 143, clusters),
        (signal.SIGHUP, 129, vectors),
    ):
        child = subprocess.Popen(
            ["env", "--default-signal", sys.executable, "-m", "ngame", *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"TMPDIR": str(tmp_path / "parts")},
            stderr=subprocess.PIPE,
        )
        while not [*(tmp_path / "parts").rglob("*.rows"), *tmp_path.glob(".partial-*")]:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(number)
        assert child.communicate()[1] == b"ngame: stopped\n"
        assert child.returncode == status
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["parts", "texts.txt", "x.npy"]


def test_scorers_that_know_training_points_alone(call, data, tmp_path):
    """No fusion serves training points then; the run is whole without one."""
    scorers = "--set=prediction.scorers=['tfidf_neighbours','tfidf_classifier']"
    assert call("train", data, "-o", tmp_path / "run", *SETS, scorers)[0] == 0
    status, out, _ = call("predict", tmp_path / "run", "--data", data)
    assert status == 0
    assert out
    with pytest.raises(ValueError, match="no scorer is on that serves training points"):
        ngame.Model.load(tmp_path / "run").predict(["ba"], seen=True)


def test_printed_in_blocks(call, data, run, monkeypatch):
    def predicted():
        status, out, err = call("predict", run, "--data", data, "-o", "-")
        assert (status, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]

    whole = predicted()
    monkeypatch.setattr("ngame.cli._PRINTED_AT_ONCE", 7)
    blocks = predicted()
    assert [line["text"] for line in blocks] == tiny.dataset().test_texts
    for one, other in zip(whole, blocks, strict=True):
        assert one["ids"] == other["ids"]
        # The last digits of a vector depend on how many are encoded together.
        np.testing.assert_allclose(one["scores"], other["scores"], rtol=1e-4, atol=1e-4)


def test_cluster_in_processes(tmp_path, rng):
    np.save(tmp_path / "x.npy", rng.standard_normal((203, 8), dtype=np.float32))
    path = tmp_path / "found.npz"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("-m", "ngame", "cluster", tmp_path / "x.npy", "--size=10", "-o", path),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("203 rows in 21 clusters of 3 to 10") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "found-00000-of-00002.npz",
        "found-00001-of-00002.npz",
        "x.npy",
    ]
    found = ngame.Clusters.load(path)
    assert np.diff(found.offsets).tolist() == [10] * 20 + [3]


def test_info(call):
    status, out, _ = call("info")
    assert status == 0
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["ngame"] == ngame.__version__
    assert rows["threads"] == str(len(os.sched_getaffinity(0)))
    assert {"SIMD", "torch", "CUDA", "numpy", "python"} <= rows.keys()


@pytest.mark.parametrize(
    ("chosen", "policy", "shown"),
    [
        ({}, "PASSIVE", "OMP_WAIT_POLICY=passive"),
        ({"OMP_WAIT_POLICY": "active"}, "ACTIVE", "OMP_WAIT_POLICY=active"),
        ({"GOMP_SPINCOUNT": "1000"}, None, "GOMP_SPINCOUNT=1000"),
    ],
)
def test_idle_openmp_threads_sleep_unless_the_user_chose(chosen, policy, shown):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"OMP_DISPLAY_ENV": "true", **chosen}  # OpenMP then prints its settings
    done = subprocess.run(
        [sys.executable, "-m", "ngame", "info"], env=env, capture_output=True, text=True, check=True
    )
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert rows["OpenMP"] == shown
    if policy and "OMP_WAIT_POLICY" in done.stderr:
        assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


def test_version_and_help(call):
    assert call("--version")[:2] == (0, f"ngame {ngame.__version__}\n")
    status, out, _ = call("--help")
    assert status == 0
    assert re.findall(r"\n  (\d+) ", out) == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "5",
        "129",
        "130",
        "141",
        "143",
    ]
    for command in (
        "train",
        "predict",
        "evaluate",
        "encode",
        "cluster",
        "report",
        "config",
        "demo",
        "info",
    ):
        assert f"\n    {command} " in out
        assert call(command, "--help")[0] == 0
    out = call("train", "--help")[1]
    (example,) = [line for line in out.splitlines() if line.startswith("  ngame train DATA")]
    settings = re.findall(r"--set (\S+)", example)
    assert ngame.Config.load(None, settings).encoder.dim == 512
    assert "ngame config" in out


def test_exit_statuses_are_documented(call):
    for code, meaning in re.findall(r"\n  (\d+) +(.+)", call("--help")[1]):
        assert f"| {code} | {meaning} |" in TRAINING.read_text(encoding="utf8")


def test_config(call, tmp_path):
    status, out, err = call("config")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 120
    (tmp_path / "mine.toml").write_text(out.replace("#dim = 256", "dim = 64"))
    config = ngame.Config.load(tmp_path / "mine.toml")
    assert config == ngame.Config(encoder=ngame.config.EncoderConfig(dim=64))


def test_run_as_a_module():
    command = [sys.executable, "-m", "ngame", "--version"]
    assert subprocess.check_output(command, text=True) == f"ngame {ngame.__version__}\n"


def test_a_reader_that_goes_away_ends_it_quietly():
    """Like `ngame config | head -n 1`, with a pipe that is closed from the start."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ngame", "config"]
    child = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (child.returncode, child.stderr) == (141, "")


def test_demo(call, tmp_path):
    quick = [
        "--set=threads=1",
        "--set=encoder.dim=32",
        "--set=encoder_stage.epochs=1",
        "--set=classifier_stage.epochs=1",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        status, out, err = call("demo", *quick)
        again = call("demo", *quick)
    assert status == 0
    assert len(err.splitlines()) == 2  # a line an epoch
    for name in ("encoder", "classifier", "neighbours", "tfidf", "tfidf_neighbours", "fused"):
        (line,) = [line for line in out.splitlines() if re.match(rf"{re.escape(name)} +\d", line)]
        assert len(line.removeprefix(name).split()) == 8
    assert re.search(r"^  \* +-?\d+\.\d{3}  \S", out, re.MULTILINE)  # a right answer
    # Called again, a finished demo prints the same.
    assert again[0] == 0
    assert re.sub(r"in \d+ s", "", again[1]) == re.sub(r"in \d+ s", "", out)
    out = call("predict", tmp_path / "ngame-demo", "--text", "solve a linear system", "-k", 2)[1]
    assert out.startswith("solve a linear system\n")


# Mistakes


def test_wrong_arguments(mistake, run, data):
    assert "required" in mistake()
    assert "invalid choice: 'fly'" in mistake("fly")
    assert "-o/--output" in mistake("train", data)
    assert "--text --texts --data is required" in mistake("predict", run)
    assert "not allowed with argument" in mistake("predict", run, "--text", "a", "--data", data)
    assert "invalid choice: 'bm25'" in mistake("predict", run, "--text", "a", "--scorer", "bm25")


def test_wrong_settings(mistake, data, tmp_path):
    output = tmp_path / "run"
    err = mistake("train", data, "-o", output, "--set", "encoder.dims=5")
    assert err == ("ngame: error: there is no setting encoder.dims, did you mean encoder.dim?\n")
    assert "expected key=value" in mistake("train", data, "-o", output, "--set", "seed")
    err = mistake("train", data, "-o", output, "--config", tmp_path / "no.toml", status=3)
    assert "no.toml" in err
    assert "device is 'gpu'" in mistake("train", data, "-o", output, "--set", "device=gpu")
    assert "no setting seeds" in mistake("demo", "-o", output, "--set", "seeds=1")


def test_settings_that_fail_once_the_encoder_is_made(
    call, mistake, data, tiny_model, tmp_path, monkeypatch
):
    """Nothing is trained, so no folder is left to be in the way of the corrected command."""
    for name in ("empty", "cut"):
        (tmp_path / name).mkdir()
    for path in tiny_model.glob("*.*"):
        shutil.copy(path, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 1000)
    run = tmp_path / "deep" / "run"
    run.parent.mkdir()
    train = "train", data, "-o", run, *SETS

    def failed(*sets):
        err = mistake(*train, *(f"--set={item}" for item in sets))
        assert "to go on" not in err
        return err

    for model, what in (
        ("./none", "there is no such folder, and the Hugging Face hub gives none of that name"),
        ("no-such-owner/no-such-model", "We couldn't connect to"),
        (tmp_path / "empty", "Unrecognized model in"),
        (tmp_path / "cut", "Error while deserializing header"),
    ):
        err = failed(f"encoder.model={model}")
        assert err.startswith(f"ngame: error: encoder.model is '{model}': ")
        assert what in err
    ours = f"encoder.model={tiny_model}"
    assert "max_length is 9999" in failed(ours, "encoder.max_length=9999")
    assert "there are none of these" in failed("prediction.scorers=['co_occurrence']")
    for name, extra, *sets in (("peft", "lora", "encoder.lora_rank=2"), ("transformers", "hf")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            assert f'pip install "ngame[{extra}]"' in failed(ours, *sets)
    run.mkdir()  # a folder that was there stays
    failed("encoder.model=./none")
    assert call(*train)[0] == 0
    # Nor is a run touched that was there.
    (run / "checkpoint").rename(tmp_path / "elsewhere")
    before = sorted(run.rglob("*"))
    err = mistake(*train, "--resume", "--set=encoder.model=./none")
    assert "has other settings than those given" in err
    assert sorted(run.rglob("*")) == before


def test_wrong_data(mistake, run, tmp_path):
    missing = tmp_path / "missing"
    for arguments in (
        ("train", missing, "-o", tmp_path / "run"),
        ("predict", run, "--data", missing),
        ("evaluate", run, missing),
    ):
        assert f"{missing}: no such file or folder" in mistake(*arguments, status=3)
    (tmp_path / "a.jsonl").write_text('{"text": "a", "labels": ["b"]}\n{"text": \n')
    assert "a.jsonl:2: malformed JSON" in mistake(
        "train", tmp_path / "a.jsonl", "-o", tmp_path / "run", status=3
    )
    whole = tiny.dataset()
    bare = ngame.Dataset(whole.train_texts, whole.train_labels, whole.label_texts)
    save_dataset(bare, tmp_path / "bare")
    for arguments in (("evaluate", run), ("predict", run, "--data")):
        err = mistake(*arguments, tmp_path / "bare", status=3)
        assert "bare has no test points: a folder has them in tst" in err
    (tmp_path / "few.jsonl").write_text('{"text": "a", "labels": ["b"]}\n')
    (tmp_path / "found.jsonl").write_text("{}\n")
    err = mistake("evaluate", tmp_path / "found.jsonl", tmp_path / "few.jsonl", status=3)
    assert "few has no test points: of a file, about one line in ten is one" in err


def test_run_of_a_file_without_test_points(call, mistake, tmp_path):
    """Of a run's own file only test points are scored: it is said that there are none."""
    texts = [text for row in range(9) if hash_bucket(text := f"ba {row}", 10)]
    lines = ({"text": text, "labels": ["ke", "li"][len(text) % 2 :]} for text in texts)
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data, run = tmp_path / "few.jsonl", tmp_path / "run"
    assert call("train", data, "-o", run, *SETS)[0] == 0
    err = mistake("evaluate", run, data, status=3)
    assert "few has no test points: of a file, about one line in ten is one" in err


def test_wrong_texts(mistake, run, tmp_path):
    path, output = tmp_path / "texts.txt", tmp_path / "x.npy"
    path.write_bytes(b"one\nt\xff\n")
    for arguments in (("encode", run, path, "-o", output), ("predict", run, "--texts", path)):
        assert "texts.txt:2: not UTF-8 at byte 2" in mistake(*arguments, status=3)
    assert "--text is empty" in mistake("predict", run, "--text", "a", "--text", " ")
    # How Python gives an argument whose bytes are not UTF-8.
    err = mistake("predict", run, "--text", os.fsdecode(b"\xe9t\xe9"))
    assert err == "ngame: error: --text '\\udce9t\\udce9' is not UTF-8\n"
    path.write_text('\n{"text": "ba", "labels": ["ke"]}\n')
    for arguments in (("encode", run, path, "-o", output), ("predict", run, "--texts", path)):
        err = mistake(*arguments, status=3)
        assert "texts.txt has JSON lines (of text, labels), expected plain text, one a line" in err
    for name in ("texts.csv", "texts.TSV"):
        path.with_name(name).write_text("title,tags\nba,ke\n")
        for arguments in (("encode", run), ("predict", run, "--texts")):
            more = ("-o", output) if arguments[0] == "encode" else ()
            err = mistake(*arguments, path.with_name(name), *more, status=3)
            assert f"{name} is a table, expected plain text, one a line: write its column" in err
    err = mistake("encode", run, tmp_path / "nothing.txt", "-o", output, status=3)
    assert err == f"ngame: error: {tmp_path}/nothing.txt: no such file or directory\n"


def test_wrong_numbers(mistake, run):
    for k, message in ((0, "k is 0"), (-1, "k is -1")):
        assert message in mistake("predict", run, "--text", "ba", "-k", k)
    assert "invalid int value: 'x'" in mistake("predict", run, "--text", "ba", "-k", "x")
    assert "argument -k: 0 is less than 1" in mistake("evaluate", run, "data", "-k", 1, 0)
    for option, value, message in (
        ("--size", 0, "0 is less than 1"),
        ("--clusters", 0, "0 is less than 1"),
        ("--size", "x", "invalid int value: 'x'"),
        ("--memory", -5, "-5 is no number of bytes"),
        ("--memory", "inf", "inf is no number of bytes"),
        ("--memory", "nan", "nan is no number of bytes"),
        ("--memory", "1e400G", "1e400G is no number of bytes"),
        ("--memory", "0.3", "0.3 is no number of bytes"),
    ):
        more = ["--size=2"] if option == "--memory" else []
        err = mistake("cluster", "x.npy", "-o", "c.npz", option, value, *more)
        assert f"argument {option}: {message}" in err


def test_not_a_run(mistake, data, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments in (
        ("predict", tmp_path / "empty", "--text", "a"),
        ("evaluate", tmp_path / "empty", data),
        ("encode", tmp_path / "nowhere", "texts.txt", "-o", tmp_path / "x.npy"),
    ):
        assert "holds no finished run" in mistake(*arguments, status=3)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short", b"\x93NUMPY\x01\x00"])
def test_damaged_arrays(mistake, data, tmp_path, content):
    path = tmp_path / "damaged.npz"
    path.write_bytes(content)
    output = tmp_path / "c.npz"
    for arguments in (("evaluate", path, data), ("cluster", path, "--size", 2, "-o", output)):
        assert f"{path} cannot be read" in mistake(*arguments, status=3)


def test_wrong_arrays(mistake, data, tmp_path):
    sp.save_npz(tmp_path / "p.npz", sp.csr_matrix(np.ones((60, 5), np.float32)))
    err = mistake("evaluate", tmp_path / "p.npz", data, status=3)
    assert "p.npz has 60 rows and 5 labels, the data have 60 test points and 24 labels" in err
    output = tmp_path / "c.npz"
    x = np.ones((5, 2), np.float32)
    x[3, 1] = np.nan
    for array, message in (
        (x, "row 3"),
        (x.astype(np.float64), "float64, expected float32 or float16"),
        (x[:, 0], "expected two dimensions"),
        (np.array([{}]), "cannot be read"),
    ):
        np.save(tmp_path / "x.npy", array, allow_pickle=True)
        arguments = "cluster", tmp_path / "x.npy", "--size", 2, "-o", output
        assert message in mistake(*arguments, status=3)
    np.save(tmp_path / "x.npy", np.ones((5, 2), np.float32))
    assert "size is 6, x has only 5 rows" in mistake(
        "cluster", tmp_path / "x.npy", "--size", 6, "-o", output, status=3
    )
    err = mistake("cluster", tmp_path / "x.npy", "--size=2", "--threads=5000", "-o", output)
    assert "threads is 5000, expected at most 1024" in err


def cut(raw):
    """The first half."""
    return raw[: len(raw) // 2]


def cut_at_a_line(raw):
    """The same, of whole lines where there are some."""
    half = len(raw) // 2
    return raw[: raw.find(b"\n", half, -1) + 1 or half]


@pytest.mark.parametrize("damage", [cut, cut_at_a_line, lambda _: b"\xff{]" * 40])
def test_damaged_run(call, run, data, tmp_path, damage):
    """The error names the file, whichever it is."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    checked = 0
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name in ("run.lock", "log.jsonl", "tokens/labels.ids.npy"):
            continue
        if re.search(r"/\d_\w+/|modules.json", name):  # for sentence-transformers alone
            continue
        raw = path.read_bytes()
        path.write_bytes(damage(raw))
        resumed = name.startswith(("checkpoint", "tokens", "data.json", "run.json"))
        status, _, err = (
            call("train", data, "-o", folder, "--resume")
            if resumed
            else call("predict", folder, "--text", "a")
        )
        path.write_bytes(raw)
        assert "Traceback" not in err
        message = err.splitlines()[-1]
        assert message.startswith(f"ngame: error: {path}"), (name, err)
        assert status == 3, (name, err)
        checked += 1
    assert checked == 19


def test_output_that_cannot_be_written(mistake, run, tmp_path):
    (tmp_path / "texts.txt").write_text("ba\n")
    (tmp_path / "x.npy").mkdir()
    err = mistake("encode", run, tmp_path / "texts.txt", "-o", tmp_path / "x.npy", status=4)
    assert "x.npy cannot be written" in err
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "x.npy"
    assert "file" in mistake("encode", run, tmp_path / "texts.txt", "-o", output, status=4)


def test_stopped_by_hand(call, data, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ngame, "load_dataset", interrupt)
    status, _, err = call("train", data, "-o", tmp_path / "run")
    assert (status, err) == (130, "ngame: stopped\n")


LONG = [*SETS, "--set=encoder_stage.epochs=60", "--set=checkpoint_minutes=100"]


@pytest.fixture(scope="module")
def long_run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("long") / "run"
    assert main(["train", data, "-o", str(folder), *LONG]) == 0
    return folder


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_stopped_while_it_trains(data, long_run, tmp_path, number, status):
    """The log shows each epoch at once; the run goes on from its last update, to the same end."""
    stopped = tmp_path / "stopped"
    command = [sys.executable, "-m", "ngame", "train", data, "-o"]
    child = subprocess.Popen(
        # Under nohup, or in the background of a shell, the signal would be ignored.
        ["env", "--default-signal", *command, stopped, *LONG],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    # The other lines do not fit into the pipe, so it is not done when it is stopped.
    fcntl.fcntl(child.stderr, fcntl.F_SETPIPE_SZ, 4096)
    assert child.stderr.readline().startswith(b"encoder: epoch 1/60, loss ")
    child.send_signal(number)
    err = child.communicate()[1].decode()
    assert child.returncode == status
    assert err.endswith(
        f"ngame: to go on: ngame train {data} -o {stopped} --resume\nngame: stopped\n"
    )
    meta, _ = Checkpoint(stopped / "checkpoint", 0).load()
    assert 0 < meta["updates"] < 60 * 8
    assert main([*command[3:], str(stopped), "--resume"]) == 0
    assert (long_run / "metrics.json").read_text() == (stopped / "metrics.json").read_text()
    assert (long_run / "encoder" / "model.safetensors").read_bytes() == (
        stopped / "encoder" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("stderr", ["/dev/full", "closed"])
def test_what_cannot_be_said_ends_nothing(data, tmp_path, stderr):
    """Progress and warnings go where they can."""
    command = [sys.executable, "-m", "ngame", "train", data, "-o", tmp_path / "run", *SETS]
    if stderr == "closed":
        command = ["sh", "-c", f"{shlex.join(map(str, command))} 2>&-"]
    with open("/dev/full" if stderr == "/dev/full" else os.devnull, "w") as full:
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, check=False)
    assert ended.returncode == 0
    assert ended.stdout.startswith(b"<Dataset")
    assert b"encoder: epoch" not in ended.stdout
    assert (tmp_path / "run" / "fusion.json").exists()


def test_streams_that_are_closed(run, data, tmp_path):
    """Work is done and files are written; only what is to be read or written there fails."""

    def shell(line):
        command = [sys.executable, "-m", "ngame"]
        return subprocess.run(
            ["sh", "-c", f"{shlex.join(command)} {line}"], capture_output=True, text=True
        )

    found, trained = tmp_path / "found.tsv", tmp_path / "run"
    for line in (
        f"predict {run} --text ba",
        f"predict {run} --data {data} -o {found}",
        f"train {data} -o {trained} {shlex.join(SETS)}",
        "--version",
    ):
        ended = shell(f"{line} >&-")
        assert ended.returncode == 0, ended.stderr
        assert "Traceback" not in ended.stderr
    assert found.exists()
    assert (trained / "fusion.json").exists()
    ended = shell(f"predict {run} --text ba -o - >&-")
    assert ended.stderr.endswith("argument -o/--output: standard output is closed\n")
    assert ended.returncode == 2
    for line in (f"predict {run} --texts -", f"encode {run} - -o {tmp_path}/x.npy"):
        ended = shell(f"{line} <&-")
        assert ended.stderr == "ngame: error: standard input is closed\n"
        assert (ended.returncode, ended.stdout) == (3, "")


def test_a_full_disk_under_the_output(run):
    command = [sys.executable, "-m", "ngame", "predict", run, "--text", "ba"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert ended.returncode == 4
    assert ended.stderr == b"ngame: error: no space left on device\n"


def test_resuming_what_is_not_there_is_said(call, data, tmp_path):
    status, _, err = call("train", data, "-o", tmp_path / "run", "--resume", *SETS)
    assert status == 0
    assert err.startswith(f"ngame: {tmp_path}/run holds no run yet: training begins anew\n")


def test_more_labels_than_there_are(call, run):
    command = "predict", run, "--text", "ba", "--scorer", "encoder", "-k", 1000, "-o", "-"
    status, out, _ = call(*command)
    assert status == 0
    assert sorted(json.loads(out)["ids"]) == list(range(24))


def test_unlabelled_test_points_are_counted(call, run, tmp_path):
    whole = tiny.dataset()
    labels = whole.test_labels.toarray()
    labels[:3] = 0
    dataset = tiny.dataset(test_labels=labels, drop_test=[(3, label) for label in range(24)])
    save_dataset(dataset, tmp_path / "data")
    warning = "ngame: warning: 4 of 60 test points have no label and count as wrong\n"
    assert call("evaluate", run, tmp_path / "data")[2] == warning
    found = tmp_path / "found.npz"
    assert call("predict", run, "--data", tmp_path / "data", "-o", found)[2] == ""
    assert call("evaluate", found, tmp_path / "data", "-k", 1)[2] == warning


def test_a_run_in_use(mistake, run, data):
    """The lock ends with its holder, so a killed process leaves none."""
    with lock_file(Path(run) / "run.lock"):
        err = mistake("train", data, "-o", run, "--resume")
    assert err.endswith(f"{run} is in use by process {os.getpid()} on {platform.node()}\n")
    assert main(["train", data, "-o", run, "--resume"]) == 0


def test_the_first_moment_of_two_that_start_together(mistake, run, data):
    """That a run is in use is said before that it must be resumed, and its user once known."""
    path = Path(run) / "run.lock"
    with lock_file(path):
        written = path.read_text()
        path.write_text("")  # locked, its owner not yet written
        late = threading.Timer(0.3, path.write_text, [written])
        late.start()
        err = mistake("train", data, "-o", run, *SETS)
        late.join()
    assert err.endswith(f"{run} is in use by process {os.getpid()} on {platform.node()}\n")


def test_an_output_that_is_a_file(mistake, data, tmp_path):
    """It is said before the data are read, and nothing can be resumed there."""
    (tmp_path / "tickets.csv").touch()
    for resume in ([], ["--resume"]):
        err = mistake("train", "no-data", "-o", tmp_path / "tickets.csv", *resume)
        assert err == (
            f"ngame: error: {tmp_path}/tickets.csv is a file, expected a folder or a name that is "
            "free\n"
        )
    err = mistake("train", data, "-o", tmp_path / "tickets.csv" / "run", status=4)
    assert err == f"ngame: error: {tmp_path}/tickets.csv/run: not a directory\n"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    err = mistake("train", "no-data", "-o", tmp_path / "notes")
    assert "notes is not empty and is not a run: choose another folder" in err


def test_an_output_without_a_name(mistake, data, run):
    for command in (["train", data, "-o", ""], ["demo", "-o", " "], ["export", run, ""]):
        assert "the name of the folder is empty" in mistake(*command)
    with pytest.raises(ValueError, match="folder is empty, expected the name of one, or None"):
        ngame.train(ngame.load_dataset(data), folder="")


def test_a_run_that_ended_before_its_model(call, mistake, data, tmp_path, monkeypatch):
    """Killed, or out of memory, while the fusion was fitted: it is said how to go on."""

    def fit(*_, **__):
        raise MemoryError

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("ngame.prediction.fusion.Fusion.fit", fit)
        status, _, err = call("train", data, "-o", folder, *SETS)
    assert status == 4
    again = f"ngame: to go on: ngame train {data} -o {folder} --resume\n"
    assert err.endswith(f"{again}ngame: error: MemoryError\n")
    for command in (["predict", folder, "--text", "ba"], ["evaluate", folder, data]):
        err = mistake(*command, status=3)
        assert err.endswith("no fusion.json; `ngame train DATA -o RUN --resume` finishes it\n")
    assert call("train", data, "-o", folder, "--resume")[0] == 0
    # Where nothing was begun, there is nothing to resume.
    assert "to go on" not in call("train", data, "-o", folder, *SETS)[2]


def test_a_run_that_never_began_is_not_resumed(call, data, tmp_path, monkeypatch):
    """It would have the default settings instead of those given."""

    def save(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ngame.config.Config.save", save)
    status, _, err = call("train", data, "-o", tmp_path / "run", *SETS)
    assert (status, err) == (4, "ngame: error: no space left on device\n")


def test_warning_settings_are_restored(call):
    before = warnings.showwarning
    call("info")
    assert warnings.showwarning is before


def test_bars_on_a_terminal(data, tmp_path):
    """Stage, epoch, loss, recall and time left, on a pseudo-terminal."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 200))
    command = [sys.executable, "-m", "ngame.cli", "train", data, "-o", str(tmp_path / "run"), *SETS]
    child = subprocess.Popen(
        [*command, "--set=encoder_stage.batch_size=6", "--set=encoder_stage.epochs=3"],
        stdout=subprocess.DEVNULL,
        stderr=follower,
        cwd=Path(__file__).parent,
        env={**os.environ, "TQDM_MININTERVAL": "0"},
    )
    os.close(follower)
    shown = b""
    while child.poll() is None or select.select([leader], [], [], 0)[0]:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                shown += os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
    os.close(leader)
    assert child.wait() == 0
    text = shown.decode()
    for wanted in (
        r"encoder: +\d+%\|",
        r"classifier: +\d+%\|",
        r"epoch [23]/3, loss \d\.\d{4}, hard-negative recall 0\.\d{3}, held-out P@1 \d+\.\d\d",
        r"\d\d:\d\d<\d\d:\d\d",
    ):
        assert re.search(wanted, text), (wanted, text[-2000:])


def test_other_labels_are_not_scored(mistake, run, tmp_path):
    """Ids are compared, so their texts must be the run's."""
    whole = tiny.dataset()
    for texts, message in (
        ([*whole.label_texts[1:], whole.label_texts[0]], "label 0 of other is"),
        ([*whole.label_texts, "more"], "other has 25 labels, the run 24"),
    ):
        more = len(texts) - len(whole.label_texts)
        labels = [
            sp.hstack([y, sp.csr_matrix((y.shape[0], more))], format="csr")
            for y in (whole.train_labels, whole.test_labels)
        ]
        other = ngame.Dataset(
            whole.train_texts, labels[0], texts, test_texts=whole.test_texts, test_labels=labels[1]
        )
        folder = tmp_path / str(more) / "other"
        folder.parent.mkdir()
        save_dataset(other, folder)
        for arguments in (("evaluate", run), ("predict", run, "--data")):
            err = mistake(*arguments, folder, status=3)
            assert message in err
            assert "give the points as one .jsonl of texts and label names" in err


def test_predictions_of_another_kind(mistake, data, tmp_path):
    (tmp_path / "found.jsonl").write_text("{}")
    (tmp_path / "text.npz").write_text("{}")
    np.savez(tmp_path / "clusters.npz", order=np.arange(3), offsets=np.array([0, 3]))
    np.save(tmp_path / "vectors.npy", np.ones((4, 2), np.float32))
    sp.save_npz(tmp_path / "found.npz", sp.csr_matrix(np.eye(3)))
    wanted = (
        "a .npz file of predictions: a CSR matrix, as `ngame predict -o FILE.npz` writes, or the "
        "arrays ids and scores"
    )
    err = mistake("evaluate", tmp_path / "text.npz", data, status=3)
    assert f"text.npz cannot be read: it is not {wanted}" in err
    err = mistake("evaluate", tmp_path / "vectors.npy", data, status=3)
    assert "vectors.npy cannot be read: it ends in none of .jsonl, .tsv, .npz, .txt, as" in err
    err = mistake("evaluate", tmp_path / "clusters.npz", data, status=3)
    assert f"clusters.npz cannot be read as {wanted}: its arrays are order, offsets" in err
    err = mistake("evaluate", tmp_path / "found.jsonl", data, status=3)
    assert 'found.jsonl:1: neither "ids" nor "labels" is among its fields' in err
    for name in ("found.jsonl", "found.npz"):
        err = mistake("cluster", tmp_path / name, "--size=2", "-o", tmp_path / "out.npz", status=3)
        assert f"{name} cannot be read: it is not a .npy file of vectors, such as" in err

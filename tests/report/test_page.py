"""The page of a report: whole without a network, complete, and honest about what is missing."""

import base64
import json
import re
import shutil
from xml.etree import ElementTree

import pytest
import tiny

import ngame
from ngame.cli import main
from ngame.data.formats import save_dataset
from ngame.files import DamagedFileError

pytest.importorskip("matplotlib")
page = pytest.importorskip("ngame.report.page")

SECTIONS = [
    "Scores",
    "Learning curves",
    "Frequent and rare labels",
    "Probabilities",
    "Labels",
    "Missing positives",
    "Batches",
    "Time",
]


@pytest.fixture(scope="module")
def dataset():
    made = tiny.dataset()
    made.label_texts[0] += " <b>&"
    return made


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "first"
    ngame.train(dataset, tiny.config(), folder=folder)
    return folder


def written(folders, tmp_path, dataset=None):
    page.write_report(folders, tmp_path / "report.html", dataset)
    return (tmp_path / "report.html").read_text(encoding="utf8")


def headings(text):
    return re.findall(r"<h2>(.*?)</h2>", text)


def drawings(text):
    found = re.findall(r'<img alt="(.*?)" src="data:image/svg\+xml;base64,(.*?)"', text)
    return {title: base64.b64decode(svg).decode() for title, svg in found}


def test_report_of_a_run(dataset, run, tmp_path):
    text = written([run], tmp_path, dataset)
    assert headings(text) == SECTIONS
    assert '<meta name="viewport"' in text
    # Nothing is loaded from anywhere.
    assert not re.findall(r"<(?:script|link|iframe)|href=|url\(|src=\"(?!data:)", text)
    charts = drawings(text)
    assert len(charts) == text.count("<img") == 11
    for svg in charts.values():
        ElementTree.fromstring(svg)
        assert "<text" in svg or "<image" in svg  # text is text, not outlines
    # Labels are text, not markup.
    assert " &lt;b&gt;&amp;" in text
    assert " <b>&" not in text
    for scorer, scores in ngame.Model.load(run).metrics.items():
        assert re.search(rf"<td>{scorer}</td><td class=.number.>{100 * scores['P@1']:.2f} ± ", text)
    assert len(text) < 1_000_000
    assert written([run], tmp_path, dataset) == text  # the same bytes again


def test_long_labels_are_named_by_their_titles_or_cut(tmp_path):
    """A cell with a whole description makes a table that nobody can read."""
    data, folder = tiny.dataset(), tmp_path / "run"
    titles = [text if label % 2 else "" for label, text in enumerate(data.label_texts)]
    texts = [f"{text} {'description ' * 60}".strip() for text in data.label_texts]
    data.label_texts, data.label_titles = texts, titles
    ngame.train(data, tiny.config(), folder=folder)
    report = page.RunReport(folder, data)
    assert report.label_names[1] == titles[1]
    assert report.label_names[0] == texts[0]
    report.model.label_texts.append("new")  # as of labels that came after training
    assert page.RunReport.label_names.func(report)[-1] == "new"
    text = written([folder], tmp_path, data)
    assert f"<td>{titles[1]}</td>" in text
    assert texts[0][:89] + "…" in text
    assert max(map(len, re.findall(r"<td[^>]*>(.*?)</td>", text))) <= 140


def test_estimates_begin_with_what_they_are_worth(run, tmp_path):
    text = written([run], tmp_path).partition("Missing positives")[2]
    assert text.index("can only be guessed") < text.index(" %. ")


def test_without_the_data(run, tmp_path):
    """The log, the model and the recorded scores still speak."""
    text = written([run], tmp_path)
    assert headings(text) == [
        "Scores",
        "Learning curves",
        "Missing positives",
        "Batches",
        "Time",
    ]
    assert "The data were not found" in text
    assert "±" not in text


def test_a_run_that_is_not_finished_or_of_an_earlier_version(run, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(run, folder)
    for name in ("fusion.json", "metrics.json", "run.json"):
        (folder / name).unlink()
    lines = (folder / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        for name in ("measure_seconds", "neighbour_share"):
            del entry[name]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    text = written([folder], tmp_path)
    assert headings(text) == ["Learning curves", "Time"]
    (folder / "log.jsonl").unlink()
    assert headings(written([folder], tmp_path)) == []


def test_comparison(dataset, run, tmp_path):
    other = tmp_path / "second"
    ngame.train(dataset, tiny.config("classifier_stage.epochs=0", "seed=3"), folder=other)
    text = written([run, other], tmp_path, dataset)
    assert "<td>seed</td><td>0</td><td>3</td>" in text
    assert "<td>classifier_stage.epochs</td><td>2</td><td>0</td>" in text
    assert re.search(r"Fused P@1 of second less that of first, point by point: [+-]\d", text)
    for name in ("Labels", "Missing positives", "Batches"):
        assert {f"{name}: first", f"{name}: second"} <= set(headings(text))
    loss = drawings(text)["Loss"]
    for line in ("first, encoder", "first, classifier", "second, encoder"):
        assert line in loss


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("batch", [1, 16])
def test_clusters_that_are_shown_fit_the_batch(dataset, run, tmp_path, batch):
    """Nobody chose clusters of 32 here; larger than batches, they would be cut."""
    folder = tmp_path / "small"
    shutil.copytree(run, folder)
    sets = "encoder_stage.cluster_size=1", f"encoder_stage.batch_size={batch}"
    tiny.config(*sets).save(folder / "config.toml")
    text = written([folder], tmp_path, dataset)
    assert f"Clustered batch, clusters of {batch}<" in text


def test_wrong_data_and_folders(dataset, run, tmp_path):
    with pytest.raises(ValueError, match="is not the data of"):
        written([run], tmp_path, tiny.dataset(points=200))
    with pytest.raises(FileNotFoundError, match="holds no run"):
        written([tmp_path], tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.jsonl", "{}", "line 1 has no stage"),
        ("log.jsonl", '{"stage": "encoder", "epoch": 0, "second": 1}', "line 1 has no seconds"),
        ("log.jsonl", '{"stage": "encoder", "seconds": 1}', "line 1 has no epoch"),
        (
            "log.jsonl",
            '{"stage": "a", "epoch": 0, "seconds": 1, "loss": "x"}',
            "line 1 has a value",
        ),
        ("log.jsonl", "[]", "line 1 is no object"),
        ("log.jsonl", "{", "Expecting property name"),
        ("run.json", "[]", "it is no object"),
        ("run.json", "null", "it is no object"),
        ("run.json", "7", "it is no object"),
        ("run.json", '{"data": {}}', "data has no name and path"),
        ("run.json", '{"data": null}', "data has no name and path"),
        ("run.json", '{"ngame": 1}', "ngame is no version"),
        ("run.json", '{"seconds": {"fusion": "x"}}', "seconds are no numbers"),
        ("metrics.json", "[]", "it is no object"),
        ("metrics.json", '{"fused": {"P@3": 1}}', "fused has no scores"),
    ],
)
def test_damaged_files_are_named(run, tmp_path, capsys, name, content, message):
    folder = tmp_path / "damaged"
    shutil.copytree(run, folder)
    (folder / name).write_text(content)
    with pytest.raises(DamagedFileError, match=rf"{name} is damaged: {message}"):
        written([folder], tmp_path)
    assert main(["report", str(folder)]) == 3
    assert f"{folder / name} is damaged: {message}" in capsys.readouterr().err


def test_matplotlib_is_missing(run, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .ngame\[report\]"):
        written([run], tmp_path)


def test_command(tmp_path, capsys):
    save_dataset(tiny.dataset(), tmp_path / "data")
    sets = [f"--set={one}" for one in (*tiny.SETTINGS, "classifier_stage.epochs=0")]
    run = tmp_path / "run"
    assert main(["train", str(tmp_path / "data"), "-o", str(run), *sets]) == 0
    capsys.readouterr()
    # It finds the data where the run read them.
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    text = (run / "report.html").read_text(encoding="utf8")
    assert headings(text) == SECTIONS
    assert main(["train", str(tmp_path / "data"), "-o", str(run), "--resume"]) == 0
    shutil.rmtree(tmp_path / "data")
    assert main(["report", str(run), "-o", str(tmp_path / "a.html")]) == 0
    assert "The data were not found" in (tmp_path / "a.html").read_text(encoding="utf8")
    capsys.readouterr()
    assert main(["report", str(tmp_path)]) == 3
    assert "holds no run" in capsys.readouterr().err
    assert main(["report", str(run), "--data", str(tmp_path / "none")]) == 3

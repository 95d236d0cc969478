"""What `ngame export` writes, and the recipes of docs/export.md that read it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny

import ngame
from ngame import cli

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
RECIPES = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf8"), re.M | re.S)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "RUN"
    ngame.train(tiny.dataset(), tiny.config(), folder=folder)
    return folder


def recipe(library):
    """The code on the page that imports a library."""
    pytest.importorskip(library)
    (code,) = (code for code in RECIPES if re.search(rf"^import.*\b{library}\b", code, re.M))
    return code


def test_vectors(run, tmp_path, capsys):
    assert cli.main(["export", str(run), str(tmp_path / "a" / "OUT")]) == 0
    out = tmp_path / "a" / "OUT"
    assert f"{tiny.LABELS} labels, vectors of width 16" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"labels.npy", "classifier.npy", "labels.jsonl"}
    model = ngame.Model.load(run)
    np.testing.assert_array_equal(np.load(out / "labels.npy"), model.label_vectors)
    np.testing.assert_array_equal(np.load(out / "classifier.npy"), model.classifier)
    lines = (out / "labels.jsonl").read_text(encoding="utf8").splitlines()
    assert [json.loads(line)["title"] for line in lines] == model.label_texts
    # A model without a classifier leaves none of another's.
    model.classifier = None
    model.export(out)
    assert {path.name for path in out.iterdir()} == {"labels.npy", "labels.jsonl"}


@pytest.mark.parametrize("library", ["faiss", "hnswlib"])
def test_recipes_of_indexes(library, run, tmp_path, monkeypatch):
    model = ngame.Model.load(run)
    model.export(tmp_path / "OUT")
    monkeypatch.chdir(tmp_path)
    texts = tiny.dataset().test_texts
    names = {"vectors": model.encode(texts)}
    exec(recipe(library), names)
    _, expected = ngame.topk_arrays(names["vectors"], model.label_vectors, 10, metric="dot")
    np.testing.assert_array_equal(names["ids"], expected)


def test_recipe_of_onnx(run, tmp_path, monkeypatch):
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library)
    code = recipe("onnxruntime")
    assert cli.main(["export", str(run), str(tmp_path / "OUT"), "--onnx"]) == 0
    monkeypatch.chdir(tmp_path)
    for texts in (tiny.dataset().test_texts, ["", ""]):  # of the latter no text has a token
        names = {"texts": texts}
        exec(code, names)
        expected = ngame.Model.load(run).encode(texts)
        np.testing.assert_allclose(names["vectors"], expected, atol=1e-5)


def test_sentence_transformers_opens_a_run(run):
    library = pytest.importorskip("sentence_transformers")
    texts = [*tiny.dataset().test_texts, ""]
    theirs = library.SentenceTransformer(str(run / "encoder"), device="cpu")
    np.testing.assert_allclose(theirs.encode(texts), ngame.Model.load(run).encode(texts), atol=1e-6)


def test_no_run(tmp_path, capsys):
    assert cli.main(["export", str(tmp_path), str(tmp_path / "OUT")]) == 3
    assert "holds no finished run" in capsys.readouterr().err

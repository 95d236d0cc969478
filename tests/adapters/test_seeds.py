"""Every recipe in examples/seeds runs on made-up data, and its parts do what they say."""

import gzip
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import ngame
from ngame.data.formats import save_dataset

FOLDER = Path(__file__).parents[2] / "examples" / "seeds"


@pytest.fixture
def recipe(monkeypatch):
    """Import a recipe by its name, with its numbers made small."""

    def load(name, **changed):
        monkeypatch.syspath_prepend(str(FOLDER))
        for each in (name, "common"):
            monkeypatch.delitem(sys.modules, each, raising=False)
        module = importlib.import_module(name)
        for key, value in changed.items():
            assert hasattr(module, key)
            monkeypatch.setattr(module, key, value)
        return module

    return load


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "tiny"
    save_dataset(tiny.dataset(), folder)
    return folder


def rows(printed):
    """The numbers of each row of a table."""
    found = {}
    for line in printed.splitlines():
        if line.startswith("| ") and not line.startswith("| |"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            found[name] = [float(cell.split(" ")[0]) for cell in cells]
    assert found
    assert np.isfinite(list(found.values())).all()
    return found


def test_table(recipe):
    common = recipe("common")
    scores = iter([0.5, 0.25, 0.6, 0.25])
    found = common.compare(["a", "b"], lambda arm, seed: {"P@1": next(scores)}, seeds=2)
    lines = [line.rsplit("|", 2)[0] for line in common.table(found).splitlines()]
    assert lines == ["| | P@1 ", "|---|---:", "| a | 55.00 ± 7.07 ", "| b | 25.00 ± 0.00 "]


def test_updates_reach_sparse_and_dense_and_fall_to_nothing(recipe):
    modules = [torch.nn.Embedding(3, 2, sparse=True), torch.nn.Linear(2, 1)]
    before = [p.detach().clone() for module in modules for p in module.parameters()]
    updates = recipe("common").Updates(modules, 2)
    for _ in range(2):
        modules[1](modules[0](torch.tensor([0, 2]))).sum().backward()
        updates.step()
    after = [p for module in modules for p in module.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert torch.equal(before[0][1], after[0][1])
    rates = [group["lr"] for each in updates.optimizers for group in each.param_groups]
    assert np.allclose(rates, [0.01 * 2e-3, 0.01 * 5e-3])


@pytest.fixture
def graph_folder(tmp_path):
    """A ring of twelve entities: each is next to its neighbour, both ways."""
    entities = [f"e{number}" for number in range(12)]

    def write(stem, lines):
        with gzip.open(tmp_path / f"{stem}.json.gz", "wt", encoding="utf8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def questions(numbers):
        for number in numbers:
            after = (number + 1) % 12
            yield point(number, "next", after)
            yield point(after, "inverse next", number)

    def point(head, relation, tail):
        text = f"{tiny.word(head)} {relation}"
        uid = f"{entities[head]}|{relation}"
        return {"uid": uid, "title": text, "content": "", "target_ind": [tail]}

    write("lbl", [{"uid": e, "title": tiny.word(n), "content": ""} for n, e in enumerate(entities)])
    write("trn", questions(range(9)))
    write("tst", questions(range(9, 12)))
    return tmp_path


def test_kgc(recipe, graph_folder, capsys):
    kgc = recipe("kgc", BATCH=8, EPOCHS=2, SHARED=4)
    kgc.main(graph_folder, 1)
    found = rows(capsys.readouterr().out)
    assert list(found) == kgc.ARMS
    assert all(0 < value <= 100 for values in found.values() for value in values[3:4])


def test_kgc_anchors_leave_out_the_fact_that_is_asked_for(recipe, graph_folder):
    graph = recipe("kgc").Graph(graph_folder, ngame.load_dataset(graph_folder))
    of_next = graph.train[:, 1] == graph.train[0, 1]
    assert of_next.sum() == 9
    question = graph.train[of_next & (graph.train[:, 0] == 3)]
    _, edges, entities = graph.around(question)
    assert sorted(entities.tolist()) == [2, 4]
    _, edges, entities = graph.around(question, np.array([4]))
    assert entities.tolist() == [2]
    assert graph.inverse[edges.numpy()].all()


def test_kgc_ranks_are_filtered(recipe, graph_folder):
    """A model that knows the answers finds each first, whatever else is true."""
    kgc = recipe("kgc")
    data = ngame.load_dataset(graph_folder)
    graph = kgc.Graph(graph_folder, data)

    class Oracle(torch.nn.Module):
        text = ngame.BagEncoder.fit(data.label_texts)

        def questions(self, tokens, questions):
            # The head itself is better still, but never asked for.
            heads = torch.eye(12)[torch.from_numpy(questions[:, 0])]
            return torch.from_numpy(data.test_labels.toarray()) + 2 * heads

        def entities(self, tokens, ids):
            return torch.eye(12)

    assert kgc.evaluate(data, graph, Oracle())["MRR"] == 1


def test_gistembed(recipe, tagged, tiny_model, capsys):
    recipe("gistembed", PAIRS=100, BATCH=16, EPOCHS=1).main(tagged, 1, tiny_model)
    found = rows(capsys.readouterr().out)
    assert found["the truth"][2:4] == [100, 100]
    assert found["no filter"][2:4] == [0, 0]


def test_gistembed_injects_near_copies(recipe):
    gistembed = recipe("gistembed", PAIRS=50)
    pairs = gistembed.Pairs(tiny.dataset(), np.random.default_rng(0))
    assert len(pairs.queries) == 60
    known, unknown = pairs.known.toarray(), pairs.unknown.toarray()
    assert not (known * unknown).any()
    for copy in range(50, 60):
        [(original, answer)] = [
            (row, pairs.answers[row])
            for row in range(50)
            if len(pairs.queries[row].split()) == len(pairs.queries[copy].split()) + 1
            and gistembed.altered(pairs.queries[row], Picks(pairs.queries, row, copy))
            == pairs.queries[copy]
        ]
        assert unknown[copy, answer]
        assert unknown[original, pairs.answers[copy]]
    assert gistembed.altered("ab", np.random.default_rng(0)) == "ba"


class Picks:
    """In place of a generator: the place whose word is missing in the copy."""

    def __init__(self, texts, row, copy):
        self.words, self.copy = texts[row].split(), texts[copy].split()

    def integers(self, count):
        for place in range(count):
            if self.words[:place] + self.words[place + 1 :] == self.copy:
                return place
        return 0


def places_folder(folder):
    data = tiny.dataset()
    save_dataset(data, folder)
    rng = np.random.default_rng(0)
    np.save(folder / "coordinates.npy", rng.uniform(-80, 80, (tiny.LABELS, 2)).astype(np.float32))
    np.save(folder / "test_labels.npy", np.arange(0, tiny.LABELS, 2))
    return data


def test_sample4geo(recipe, tmp_path, capsys):
    sample4geo = recipe("sample4geo", BATCH=16, EPOCHS=3)
    data = places_folder(tmp_path / "data")
    sample4geo.main(tmp_path / "data", 1)
    assert list(rows(capsys.readouterr().out)) == sample4geo.ARMS
    coordinates = np.load(tmp_path / "data" / "coordinates.npy")
    places = sample4geo.Places(data, coordinates)
    x, z = data.train_labels.toarray() + 0.1, np.eye(tiny.LABELS, dtype=np.float32)
    found = places.by_model(x, z, np.random.default_rng(0))
    for row in range(20):
        own = data.train_labels[row].indices
        assert not np.isin(places.of_row[found[row][found[row] >= 0]], own).any()


def test_mochi(recipe, tagged, capsys):
    mochi = recipe("mochi", BATCH=32, EPOCHS=2, QUEUE=40)
    mochi.main(tagged, 1)
    found = rows(capsys.readouterr().out)
    assert list(found) == mochi.ARMS
    assert len({tuple(values[:4]) for values in found.values()}) > 2


def test_peg(recipe, tagged, capsys):
    peg = recipe("peg", CHUNK=64, EPOCHS=4)
    peg.main(tagged, 1, 32, 128, 1024)
    found = rows(capsys.readouterr().out)
    assert list(found) == [f"{size}, {part}" for size in (32, 128) for part in peg.PARTS]
    assert found["32, batch"][:4] != found["32, mined"][:4] != found["32, mined, progressive"][:4]


def test_discopatch(recipe, tmp_path, capsys):
    rng = np.random.default_rng(0)
    parts = {name: rng.integers(0, 256, (32, 64, 64, 3), np.uint8) for name in ("train", "test")}
    parts["dark"] = parts["test"] // 8
    np.savez(tmp_path / "images64.npz", **parts, train_class=np.zeros(32, np.int32))
    discopatch = recipe("discopatch", EPOCHS=1)
    discopatch.main(tmp_path, 1)
    found = rows(capsys.readouterr().out)
    assert list(found) == discopatch.ARMS
    blur, noise, dark = found["plain statistics"][:3]
    assert blur == dark == 100
    assert noise > 50


def test_discopatch_norm_and_area(recipe):
    discopatch = recipe("discopatch")
    x = torch.randn(32, 3, 4, 4)
    whole = torch.nn.BatchNorm2d(3)
    each = torch.cat([whole(x[:16]), whole(x[16:])])
    assert torch.allclose(discopatch.PatchNorm(3)(x), each, atol=1e-5)
    assert discopatch.auroc(np.array([0.0, 1.0]), np.array([0.5, 2.0])) == 0.75
    images = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(1, 64, 64, 3)
    cut = (discopatch.patches(images) * 255).round().to(torch.uint8).numpy()
    assert (cut[5] == images[0, 16:32, 16:32].transpose(2, 0, 1)).all()


SOURCES = {
    "a.py": 'def add(a, b):\n    """Add two numbers of a kind.\n\n    More."""\n'
    "    total = a + b\n    return total\n",
    "b.pyx": "cdef int one(int a):\n    return a\n\ncdef int two(int a) nogil:\n"
    '    """Give twice the number back."""\n    return 2 * a\n\nx = 1\n',
    "include/c.h": "/// Compares two \\p values by\n/// their size.\nbool less(int a, int b) {\n"
    "  return a < b;\n}\n\nint other();\n",
}


def test_cocosoda_finds_functions_and_their_comments(recipe, tmp_path):
    cocosoda = recipe("cocosoda")
    found = {}
    for (name, source), language in zip(SOURCES.items(), cocosoda.LANGUAGES, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
        [(doc, code)] = cocosoda.documented(tmp_path / name, language)
        found[name] = " ".join(doc.split()), " ".join(code.split())
    assert found == {
        "a.py": ("Add two numbers of a kind. More.", "def add(a, b): total = a + b return total"),
        "b.pyx": (
            "Give twice the number back.",
            "cdef int two(int a) nogil: return 2 * a",
        ),
        "include/c.h": (
            "Compares two values by their size.",
            "bool less(int a, int b) { return a < b; }",
        ),
    }


def test_cocosoda(recipe, tmp_path, capsys):
    for package in range(12):
        (tmp_path / f"p{package}").mkdir()
        code = [
            f'def {tiny.word(n)}_{tiny.word(n + 1)}(x):\n    """The {tiny.word(n)} and the '
            f'{tiny.word(n + 1)}."""\n    return x.{tiny.word(n)}({n}) + 1\n'
            for n in range(60 * package, 60 * package + 60, 2)
        ]
        (tmp_path / f"p{package}" / "m.py").write_text("\n".join(code))
    cocosoda = recipe("cocosoda", BATCH=16, EPOCHS=2, QUEUE=40)
    cocosoda.main(tmp_path, 1)
    printed = capsys.readouterr().out
    found = rows(printed)
    assert list(found) == cocosoda.ARMS
    assert found["TF-IDF"][0] > 50
    train, test = map(int, re.search(r"Python: (\d+) .* (\d+) in", printed).groups())
    assert train + test == 360
    assert test % 30 == 0


def test_cocosoda_hides_a_type_or_tokens(recipe):
    cocosoda = recipe("cocosoda")
    assert cocosoda.by_type('return fooBar_baz + 12 + "x"') == [
        '12 "x"',
        "return",
        "foo Bar baz",
        "+ +",
    ]
    codes = ['return foo(1, "two")'] * 3
    streams = cocosoda.Streams(ngame.BagEncoder.fit(codes), ["a b c d"] * 3, codes)
    whole = streams.take("code", np.arange(3))
    assert len(set(whole.lengths.tolist())) == 1
    rng = np.random.default_rng(0)
    lengths = {tuple(streams.take("code", np.arange(3), rng).lengths) for _ in range(40)}
    assert len(lengths) > 4
    assert max(max(each) for each in lengths) <= whole.lengths[0]


def test_recipes_use_no_private_names():
    """The recipes need nothing but what a user would import."""
    for path in FOLDER.glob("*.py"):
        text = path.read_text(encoding="utf8")
        assert not re.search(r"ngame\._|import _|from ngame\.training", text), path.name
        assert len(text.splitlines()) < 260, path.name

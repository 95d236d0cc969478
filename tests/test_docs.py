"""The documents: their code runs, their commands and links exist, their drawings are up to date."""

import re
import runpy
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest

import ngame
from ngame import cli
from ngame.config import Config

ROOT = Path(__file__).parent.parent
if not (ROOT / "docs").exists() or not (ROOT / "bench").exists():
    pytest.skip("the documents are not here", allow_module_level=True)

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "bench").rglob("*.md")),
]
TEXTS = {page: page.read_text(encoding="utf8") for page in PAGES}


def blocks(language):
    """The code blocks of a language: page, number, code."""
    for page, text in TEXTS.items():
        found = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for number, code in enumerate(found, 1):
            yield pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")


def commands():
    """Every shell command of the pages: those of code blocks, and those in inline code."""
    for page, text in TEXTS.items():
        shell = "\n".join(re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
        plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", plain)]
        lines = [part for line in shell.splitlines() for part in line.split("&&")]
        for line in [*lines, *(code for code in inline if " " in code)]:
            yield page, line.strip().replace(".venv/bin/", "")


@pytest.mark.parametrize("code", list(blocks("python")))
@pytest.mark.filterwarnings("ignore:.*pin_memory", "ignore:held-out points with a label")
def test_python_runs(code, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    if "sentence_transformers" in code:
        # Its model is too slow for a test: a tiny one opens in its place.
        library = pytest.importorskip("sentence_transformers")
        tiny, model = request.getfixturevalue("tiny_model"), library.SentenceTransformer
        monkeypatch.setattr(
            library, "SentenceTransformer", lambda _: model(str(tiny), device="cpu")
        )
    exec(compile(code, "page", "exec"), {"__name__": "__main__"})
    if saved := re.search(r"model.save\(\"(.*)\"\)", code):
        model(str(tmp_path / saved[1]), device="cpu")


def test_commands_of_ngame_parse():
    parsed = 0
    for page, line in commands():
        name, *words = shlex.split(line, comments=True) or [""]
        if name != "ngame":
            continue
        mentioned = len(words) == 1  # by its name alone, in a sentence
        with pytest.raises(SystemExit) if mentioned else nullcontext() as stopped:
            options = cli._parser().parse_args([*words, "--help"] if mentioned else words)
        if mentioned:
            assert stopped.value.code == 0, f"{page.name}: {line}"
        else:
            given = getattr(options, "set", [])
            Config.load(sets=[item for item in given if item != "KEY=VALUE"])
        parsed += 1
    assert parsed > 10


def test_settings_exist():
    named = [
        item
        for text in TEXTS.values()
        for item in re.findall(r"--set\s+'?([\w.]+=[^\s`']+)", text)
        if item != "KEY=VALUE"
    ]
    assert len(named) > 5
    for item in named:
        given = ["encoder.model=x"] if "=transformer" in item else []
        Config.load(sets=[item, *given])


def test_scripts_and_their_options_exist():
    for page, text in TEXTS.items():
        for name in re.findall(r"\b(?:bench|docs|tests|examples|csrc|ngame)/[\w/]+\.\w+", text):
            assert (ROOT / name).exists() or "NOUN" in name, f"{page.name}: {name}"
    for page, line in commands():
        words = line.split() or [""]
        if words[0] == "python" and len(words) > 1 and words[1].endswith(".py"):
            source = (ROOT / words[1]).read_text(encoding="utf8")
            for option in re.findall(r"(?<!\S)--[\w-]+", line):
                assert f'"{option}"' in source, f"{page.name}: {line}"


def anchors(page):
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", TEXTS[page], re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    for page, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_front_page():
    text = TEXTS[ROOT / "README.md"]
    assert len(text.split()) < 1200
    # .ci/run takes this line from it.
    assert re.search(r"^python3 -m venv .*pytest$", text, re.MULTILINE)
    (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert (ROOT / picture).stat().st_size < 150_000
    parts = text.partition("## The parts")[2].partition("\n\n##")[0]
    names = re.findall(r"^\|[^|]*\|(.*)\|$", parts, re.MULTILINE)
    for name in re.findall(r"`([\w.]+)`", " ".join(names)):
        if not name.startswith("compat"):
            room, _, inner = name.partition(".")
            assert hasattr(getattr(ngame, room), inner) if inner else hasattr(ngame, room), name


def test_house_is_drawn_as_it_stands():
    house = runpy.run_path(str(ROOT / "docs" / "house.py"))
    drawn = TEXTS[house["PAGE"]]
    assert house["page"](drawn) == drawn, "out of date: run python docs/house.py"


def test_drawing_implies_the_table():
    house = runpy.run_path(str(ROOT / "docs" / "house.py"))
    rooms = runpy.run_path(str(ROOT / "tests" / "test_layers.py"))["ROOMS"]
    drawn = {name: set() for name in rooms}
    for name, other in re.findall(r"^    (\w+) --> (\w+)$", TEXTS[house["PAGE"]], re.MULTILINE):
        drawn[name].add(other)

    def reached(name, arrows):
        return arrows[name].union(*(reached(other, arrows) for other in arrows[name]))

    for name in rooms:
        assert drawn[name] <= rooms[name]
        assert reached(name, drawn) == reached(name, rooms)


def test_results_keep_their_words(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import run

    page = run.replaced("# topk\n\nwords\n", "old\n") + "\nmore words\n"
    assert run.replaced(page, "new\n") == page.replace("old\n", "new\n")
    for file in (ROOT / "bench").glob("bench_*.py"):
        text = TEXTS[ROOT / "bench" / "results" / f"{run.noun(file)}.md"]
        assert text.count(run.BEGIN) == text.count(run.END) == 1

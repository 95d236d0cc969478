"""Draw the rooms of the package and list its files, in `docs/house.md`.

    python docs/house.py

The rooms and their arrows are the table in `tests/test_layers.py`; the purpose of a file is the
first sentence of its docstring or comment. `tests/test_docs.py` fails where the page is out of
date.
"""

import ast
import re
import runpy
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "house.md"
BEGIN, END = "<!-- docs/house.py: begin -->\n", "<!-- docs/house.py: end -->\n"


def page(old: str) -> str:
    """The page with the part between the markers made anew."""
    before, _, rest = old.partition(BEGIN)
    return before + BEGIN + generated() + END + rest.partition(END)[2]


def generated() -> str:
    """The drawing of the rooms, their table, and the list of files."""
    rooms = runpy.run_path(str(ROOT / "tests" / "test_layers.py"))["ROOMS"]
    arrows = reduced(rooms)
    alone = rooms.keys() - {name for arrow in arrows for name in arrow}
    return "\n".join(
        [
            "```mermaid",
            "flowchart TB",
            *[f"    {name} --> {other}" for name, other in arrows],
            *[f"    {name}" for name in sorted(alone)],
            "```",
            "",
            "| room | imports |",
            "|---|---|",
            *[f"| {name} | {', '.join(sorted(rooms[name])) or '-'} |" for name in rooms],
            "",
            "## Files",
            *files("csrc", ("*.h", "*.cpp"), comment),
            *files("csrc/cuda", ("*.h", "*.cu", "*.cpp"), comment),
            *files("ngame", ("**/*.py",), docstring),
            *files("bench", ("**/*.py",), docstring),
            *files("docs", ("*.py",), docstring),
            *files("examples", ("**/*.py",), docstring),
            "",
        ]
    )


def reduced(rooms: dict[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that no chain of others implies."""
    above: dict[str, set[str]] = {}  # all that a room reaches
    for name, wanted in rooms.items():  # from the ground up
        above[name] = set(wanted).union(*(above[other] for other in wanted))
    return [
        (name, other)
        for name, wanted in rooms.items()
        for other in sorted(wanted)
        if not any(other in above[between] for between in wanted)
    ]


def files(folder: str, patterns: tuple[str, ...], purpose: Callable[[Path], str]) -> list[str]:
    """A table with a row for each noun of a folder."""
    found: dict[str, list[Path]] = {}
    for path in sorted(path for pattern in patterns for path in (ROOT / folder).glob(pattern)):
        if path.name != "__init__.py":
            found.setdefault(str(path.relative_to(ROOT / folder).with_suffix("")), []).append(path)
    lines = ["", f"| `{folder}/` | |", "|---|---|"]
    for name, paths in found.items():
        endings = ", ".join(path.suffix for path in paths)
        about = next(filter(None, map(purpose, paths)), "")
        lines.append(f"| `{name}{endings}` | {about.replace('|', '/')} |")
    return lines


def docstring(path: Path) -> str:
    """The first sentence of a module's docstring."""
    return sentence(ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))) or "")


def comment(path: Path) -> str:
    """The first sentence of the comment that a C++ file begins with."""
    found = re.match(r"(?://.*\n)+", path.read_text(encoding="utf8"))
    return sentence(found[0].replace("//", "")) if found else ""


def sentence(text: str) -> str:
    """A text up to its first full stop."""
    words = " ".join(text.partition("\n\n")[0].split())
    return re.split(r"(?<=[^.]\.)\s", words)[0].removesuffix(".").replace("`", "")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf8")), encoding="utf8")

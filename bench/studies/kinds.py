"""Make data sets of many kinds from what a Debian machine has: packages, manuals, docstrings.

Eight folders that `ngame.load_dataset` reads, of a hundred to tens of thousands of points, with
short and long texts and few and many labels a point; in two of them the points are labels::

    python bench/studies/kinds.py OUT [NAME ...]

Rules about sizes are chosen on all of them together. One point in five is a test point, by a hash
of its name, so the same machine gives the same files.
"""

import ast
import email
import gzip
import json
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from ngame.data.formats import hash_bucket

# Name, title, content and labels of a point.
Point = tuple[str, str, str, list[str]]
# A data set: its points, and title and content of a label by its name.
Kind = tuple[list[Point], dict[str, tuple[str, str]]]

# A label of a tagging set has at least so many points.
_LEAST = 2


def main(out: str, *names: str) -> None:
    """Write the sets, or those that are named."""
    for kind in (
        *(python_classifiers, licences, installed_sections, manual_see_also),
        *(docstring_modules, changelog_authors, package_tags, package_depends),
    ):
        name = kind.__name__.replace("_", "-")
        if not names or name in names:
            write(Path(out) / name, *kind())


def write(folder: Path, points: list[Point], labels: dict[str, tuple[str, str]]) -> None:
    """Write a data set. Labels that are none of `labels` are left out, then empty points."""
    folder.mkdir(parents=True, exist_ok=True)
    number = {name: row for row, name in enumerate(labels)}
    kept = [(point, sorted({number[x] for x in point[3] if x in number})) for point in points]
    kept = [(point, targets) for point, targets in kept if targets]
    splits: dict[str, list[str]] = {"trn": [], "tst": []}
    for (name, title, content, _), targets in kept:
        row = {"uid": name, "title": title, "content": content, "target_ind": targets}
        splits["tst" if hash_bucket(name, 5) == 0 else "trn"].append(json.dumps(row))
    rows = [
        json.dumps({"uid": name, "title": title, "content": content})
        for name, (title, content) in labels.items()
    ]
    for stem, lines in {**splits, "lbl": rows}.items():
        with gzip.open(folder / f"{stem}.json.gz", "wt", encoding="utf8") as file:
            file.write("\n".join(lines) + "\n")
    pairs = sum(len(targets) for _, targets in kept) / len(kept)
    words = sum(len(f"{p[1]} {p[2]}".split()) for p, _ in kept) / len(kept)
    print(
        f"{folder.name}: {len(splits['trn'])} + {len(splits['tst'])} points, {len(labels)} labels, "
        f"{pairs:.1f} labels and {words:.0f} words a point"
    )


def tags(points: list[Point]) -> dict[str, tuple[str, str]]:
    """Labels that are words: those that several points have."""
    counts = Counter(label for point in points for label in set(point[3]))
    return {
        label: (re.sub(r"[:_./-]+", " ", label), "")
        for label in sorted(counts)
        if counts[label] >= _LEAST
    }


def python_classifiers() -> Kind:
    """From the long description of an installed Python package to its classifiers."""
    points: dict[str, Point] = {}
    for one in distributions():
        data = one.metadata
        labels = data.get_all("Classifier") or []
        name = data["Name"]
        points[name] = name, f"{name} {data['Summary'] or ''}", data.get_payload() or "", labels
    rows = [points[name] for name in sorted(points)]
    return rows, tags(rows)


def licences() -> Kind:
    """From a package's copyright file, without the names of the licences, to these names."""
    points: list[Point] = []
    for file in sorted(Path("/usr/share/doc").glob("*/copyright")):
        text = file.read_text(encoding="utf8", errors="replace")
        named = re.findall(r"^License: *(\S.*)$", text, re.M)
        labels = [part for line in named for part in re.split(r" (?:and|or) |[,;] *", line)]
        text = re.sub(r"^License:.*$", "", text, flags=re.M)
        points.append((file.parent.name, file.parent.name, " ".join(text.split()), labels))
    return points, tags(points)


def installed_sections() -> Kind:
    """From the long description of an installed Debian package to its section."""
    points: list[Point] = []
    for package in paragraphs(Path("/var/lib/dpkg/status").read_text(encoding="utf8")):
        title, _, content = package["Description"].partition("\n")
        row = package["Package"], f"{package['Package']} {title}", " ".join(content.split())
        points.append((*row, [package["Section"]] if "Section" in package else []))
    return points, tags(points)


def package_tags() -> Kind:
    """From a Debian package's name and short description to its tags; every third package."""
    points = [
        (package["Package"], package["Package"], package.get("Description", ""), labels)
        for package in available()
        if (labels := re.split(r",\s*", package.get("Tag", "").strip()))
        and hash_bucket(f"tags {package['Package']}", 3) == 0
    ]
    return points, tags(points)


def package_depends() -> Kind:
    """From a Debian package to the packages it depends on: the points are labels.

    Only packages in some sections, so that it stays small.
    """
    sections = {"python", "games", "science", "utils", "net"}
    points: list[Point] = []
    for package in available():
        if package["Section"] in sections:
            wanted = re.split(r"[,|]", package.get("Depends", ""))
            names = [part.split()[0].partition(":")[0] for part in wanted if part.strip()]
            points.append((package["Package"], package["Package"], package["Description"], names))
    return points, {name: (title, content) for name, title, content, _ in points}


def manual_see_also() -> Kind:
    """From a manual page to those it refers to in SEE ALSO: the points are labels."""
    points: list[Point] = []
    for file in sorted(Path("/usr/share/man").glob("man*/*.gz")):
        if file.is_symlink() or file.stat().st_size < 200 or not file.exists():
            continue
        source = gzip.decompress(file.read_bytes()).decode("utf8", "replace")
        source = re.sub(r"\\f.|\\[-&e|^/,]", lambda m: "-" if m[0] == r"\-" else "", source)
        body, *rest = re.split(r'\.SH +"?SEE ALSO"?', source, maxsplit=1, flags=re.I)
        words = re.sub(r'^[.\'](\\".*|[A-Za-z]+)|"', " ", body, flags=re.M)
        name, section = re.match(r"(.+?)\.(\d)", file.name).groups()
        after = "".join(rest).partition("\n.SH")[0].replace('"', "")
        labels = [
            f"{page}({number})"
            for page, number in re.findall(r"([\w.+:-]+)\s*\(\s*(\d)[a-z]*\s*\)", after)
        ]
        points.append((f"{name}({section})", name, " ".join(words.split()), labels))
    linked = {name for point in points for name in (point[0], *point[3]) if point[3]}
    return points, {name: (title, text) for name, title, text, _ in points if name in linked}


def docstring_modules() -> Kind:
    """From a docstring of Python's standard library to its module; tests are left out."""
    points: list[Point] = []
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & {*parts}:
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (
                text := ast.get_docstring(node)
            ):
                module = ".".join(parts).removesuffix(".__init__")
                row = f"{module}:{node.lineno}", node.name.replace("_", " "), " ".join(text.split())
                points.append((*row, [module]))
    return points, tags(points)


def changelog_authors() -> Kind:
    """From an entry of an installed package's changelog to the person who wrote it."""
    points: list[Point] = []
    seen = set()
    for file in sorted(Path("/usr/share/doc").glob("*/changelog.Debian.gz")):
        text = gzip.decompress(file.read_bytes()).decode("utf8", "replace")
        for entry in re.finditer(r"^(\S+) \((\S+)\).*\n((?:\n|  .*\n)+) -- ([^<]+) <", text, re.M):
            name = f"{entry[1]} {entry[2]}"
            if name not in seen and hash_bucket(name, 2) == 0:
                seen.add(name)
                points.append((name, entry[1], " ".join(entry[3].split()), [entry[4].strip()]))
    return points, tags(points)


def available() -> list[dict[str, str]]:
    """The packages that apt knows."""
    text = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, check=True).stdout
    packages = {package["Package"]: package for package in paragraphs(text.decode())}
    return [packages[name] for name in sorted(packages)]


def paragraphs(text: str) -> Iterator[dict[str, str]]:
    """The fields of each paragraph of a Debian control file."""
    for paragraph in text.split("\n\n"):
        if paragraph.strip():
            yield dict(email.message_from_string(paragraph))


if __name__ == "__main__":
    main(*sys.argv[1:])

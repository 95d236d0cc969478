"""A real data set without a download: the "See Also" sections of numpy's and scipy's docstrings."""

import inspect
import re
import textwrap
import warnings
from collections import deque
from collections.abc import Iterator
from itertools import dropwhile
from types import GenericAlias, ModuleType
from typing import Any

import numpy as np
import scipy
from scipy import sparse

from ngame.data.dataset import Dataset
from ngame.data.formats import hash_bucket

NAME = "see-also"
"""Name of the data set."""

_MAX_CHARACTERS = 600
_UNDERLINE = re.compile(r"[-=]{3,}\s*")
# A directive and the indented block under it: version notes, formulas, warnings.
_DIRECTIVE = re.compile(r"^\.\. .*\n(?:[ \t]+.*\n|\s*\n(?=[ \t]))*", re.MULTILINE)
_SIGNATURE = re.compile(r"(?:[\w, ]+ = )?[\w.]+\(.*\)", re.DOTALL)
_REFERENCE = re.compile(r"(?::[\w:]+:)?`?~?([A-Za-z_][\w.]*)(?:\(\))?`?")


def see_also_dataset() -> Dataset:
    """Build the see-also task from the docstrings of the installed numpy and scipy.

    A point is a public function, class or method whose docstring has a "See Also" section in
    numpydoc format; its labels are the objects named there. The text of a point is its name,
    summary and extended description, cut to 600 characters. It excludes the sections of the
    docstring, and with them the answer. The labels are all points and all objects they name; the
    text of a label is its name and summary. Deprecated objects are left out.

    Aliases of an object count as one point, and so do objects that share a docstring and the last
    part of their name. A function is never its own label: `drop_train` and `drop_test` have that
    pair. A function is a test point if ``hash_bucket(name, 5) == 0``, so the same versions of numpy
    and scipy always give the same data.

    Returns
    -------
    Dataset
        About 1,470 training points, 340 test points and 2,100 labels (numpy 2.4, scipy 1.17).
    """
    aliases = _public_names()
    canonical = {alias: name for alias, (name, _) in aliases.items()}
    sections = {name: _sections(docstring) for name, docstring in aliases.values()}
    current = {
        name
        for name, parts in sections.items()
        if not any(line.startswith(".. deprecated::") for line in parts[""])
    }
    links = {}
    for name in sorted(current):
        references = _references(sections[name].get("see also", []))
        found = {_resolve(reference, name, canonical) for reference in references}
        if named := sorted(current.intersection(found) - {name}):
            links[name] = named
    paragraphs = {name: _paragraphs(parts[""]) for name, parts in sections.items()}

    labels = sorted({*links, *(other for named in links.values() for other in named)})
    label_ids = {name: label for label, name in enumerate(labels)}
    arguments: dict[str, Any] = {}
    for split in ("train", "test"):
        points = [name for name in links if (hash_bucket(name, 5) == 0) == (split == "test")]
        rows = [row for row, name in enumerate(points) for _ in links[name]]
        columns = [label_ids[other] for name in points for other in links[name]]
        arguments[f"{split}_texts"] = [_describe(name, paragraphs[name]) for name in points]
        arguments[f"{split}_labels"] = sparse.csr_matrix(
            (np.ones(len(rows), np.float32), (rows, columns)), shape=(len(points), len(labels))
        )
        arguments[f"drop_{split}"] = [(row, label_ids[name]) for row, name in enumerate(points)]
    label_texts = [_describe(name, paragraphs[name][:1]) for name in labels]
    return Dataset(label_texts=label_texts, name=NAME, **arguments)


# Public names


def _public_names() -> dict[str, tuple[str, str]]:
    """Map every public name of numpy and scipy to its canonical name and docstring.

    The canonical name of an object is, among its names, one that is not inherited, then one with
    the fewest dots, then the first in alphabetical order.
    """
    names: dict[tuple[str, str], list[tuple[bool, int, str]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated names warn on access
        for name, inherited, value in _walk():
            docstring = getattr(value, "__doc__", None)
            if isinstance(docstring, str) and docstring.strip():
                key = (name.rpartition(".")[2], inspect.cleandoc(docstring))
                names.setdefault(key, []).append((inherited, name.count("."), name))
    return {
        name: (min(same)[2], docstring)
        for (_, docstring), same in names.items()
        for *_, name in same
    }


def _walk() -> Iterator[tuple[str, bool, Any]]:
    """Name, whether it is inherited, and value of every function, class and class member."""
    modules = deque([(np.__name__, np), (scipy.__name__, scipy)])
    seen = {getattr(np, "core", None)}  # kept in numpy for old code only
    while modules:  # breadth first, so that a module gets its shortest name
        prefix, module = modules.popleft()
        if module in seen:
            continue
        seen.add(module)
        for attribute in sorted(set(getattr(module, "__all__", dir(module)))):
            value = getattr(module, attribute, None)
            name = f"{prefix}.{attribute}"
            if attribute.startswith("_") or not _in_numpy_or_scipy(value):
                continue
            if isinstance(value, ModuleType):
                modules.append((name, value))
            elif inspect.isclass(value):
                yield name, False, value
                yield from _members(name, value)
            elif callable(value) and not isinstance(value, GenericAlias):
                yield name, False, value


def _members(prefix: str, owner: type) -> Iterator[tuple[str, bool, Any]]:
    seen: set[str] = set()
    for base in filter(_in_numpy_or_scipy, owner.__mro__):
        for attribute, value in vars(base).items():
            if attribute.startswith("_") or attribute in seen:
                continue
            seen.add(attribute)
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__
            if callable(value) or inspect.isdatadescriptor(value):
                yield f"{prefix}.{attribute}", base is not owner, value


def _in_numpy_or_scipy(value: Any) -> bool:
    home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    # Ufuncs and C functions may have no module.
    return not isinstance(home, str) or home.split(".")[0] in (np.__name__, scipy.__name__)


# Parsing docstrings


def _sections(docstring: str) -> dict[str, list[str]]:
    """Lines of each section by lower-case title; "" is the text before the first section."""
    lines = docstring.splitlines()
    sections: dict[str, list[str]] = {"": []}
    current = sections[""]
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line and not line[0].isspace() and _UNDERLINE.fullmatch(below):
            current = sections.setdefault(line.strip().lower(), [])
        elif not _UNDERLINE.fullmatch(line):
            current.append(line)
    return sections


def _references(lines: list[str]) -> list[str]:
    """Names in a "See Also" section, whose lines are ``a, b : description`` or indented text."""
    names = []
    for line in lines:
        entries, *_ = re.split(r"(?<!^):(?=\s|$)", line, maxsplit=1)
        matches = [_REFERENCE.fullmatch(entry.strip()) for entry in entries.split(",")]
        if not line[:1].isspace():
            names += [match[1] for match in matches if match]
    return names


def _resolve(reference: str, name: str, canonical: dict[str, str]) -> str | None:
    """Resolve a reference in the docstring of `name`, from the innermost scope outwards."""
    reference = re.sub(r"^np\.", "numpy.", reference)
    scope = name
    while scope:
        scope = scope.rpartition(".")[0]
        found = canonical.get(f"{scope}.{reference}" if scope else reference)
        if found:
            return found
    return None


def _paragraphs(lines: list[str]) -> list[str]:
    """Summary and extended description, without directives and signatures of C functions."""
    text = _DIRECTIVE.sub("", "\n".join(lines) + "\n").strip()
    return list(dropwhile(_SIGNATURE.fullmatch, re.split(r"\n\s*\n", text)))


def _describe(name: str, paragraphs: list[str]) -> str:
    """One line: the name, the name split into words if that differs, and the description."""
    last = name.rpartition(".")[2]
    words = (
        re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", last)
        .replace("_", " ")
        .strip()
        .lower()
    )
    title = name if words == last.lower() else f"{name} ({words})"
    return textwrap.shorten(f"{title}: {' '.join(paragraphs)}", _MAX_CHARACTERS, placeholder="")

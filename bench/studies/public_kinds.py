"""Make data sets from public repositories: films, attack techniques, lists of packages, emoji.

Seven folders that `ngame.load_dataset` reads. No default was chosen on them: they show what to
expect of data that nobody tuned anything on. CLONES has the repositories named below, cloned or
mirrored, each under the last part of its name::

    python bench/studies/public_kinds.py CLONES OUT [NAME ...]

As in `kinds.py`, one point in five is a test point, by a hash of its name.
"""

import io
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kinds import Kind, Point, tags, write

# github.com/prust/wikipedia-movie-data, mitre/cti, avelino/awesome-go, public-apis/public-apis,
# github/gemoji
FILMS, ATTACK = "wikipedia-movie-data", "cti"
GO, APIS, EMOJI = "awesome-go", "public-apis", "gemoji"


def main(clones: str, out: str, *names: str) -> None:
    """Write the sets, or those that are named."""
    for kind in (
        *(emoji_tags, attack_software, public_apis, go_packages),
        *(attack_techniques, film_genres, film_cast),
    ):
        name = kind.__name__.replace("_", "-")
        if not names or name in names:
            write(Path(out) / name, *kind(Path(clones)))


def files(clone: Path, pattern: str) -> Iterator[str]:
    """The files of the last commit whose whole paths match."""
    git = ["git", "-C", str(clone)]
    listing = subprocess.run(
        [*git, "ls-tree", "-r", "--name-only", "HEAD"], check=True, capture_output=True, text=True
    )
    paths = [path for path in listing.stdout.splitlines() if re.fullmatch(pattern, path)]
    wanted = "".join(f"HEAD:{path}\n" for path in paths).encode()
    found = io.BytesIO(
        subprocess.run(
            [*git, "cat-file", "--batch"], check=True, capture_output=True, input=wanted
        ).stdout
    )
    for _ in paths:
        size = int(found.readline().split()[2])
        yield found.read(size).decode("utf8")
        found.read(1)


def emoji_tags(clones: Path) -> Kind:
    """From the description of an emoji to its tags and other names."""
    (text,) = files(clones / EMOJI, "db/emoji.json")
    points: list[Point] = [
        (one["emoji"], one["description"], one.get("category", ""), [*one["tags"], *one["aliases"]])
        for one in json.loads(text)
    ]
    return points, tags(points)


def listed(text: str, heading: str, entry: str) -> list[Point]:
    """From the name and description of an entry of a list to the heading that it is under."""
    points, under = [], ""
    for line in text.splitlines():
        if found := re.match(heading, line):
            under = found[1].strip()
        elif (found := re.match(entry, line)) and under:
            points.append((f"{under} {found[1]}", found[1], found[2].strip(), [under]))
    return points


def go_packages(clones: Path) -> Kind:
    """From the description of a Go package to its section in a list."""
    (text,) = files(clones / GO, "README.md")
    points = listed(text, r"##+ (.*)", r"- *\[([^]]+)\]\([^)]*\) - (.*)")
    return points, tags(points)


def public_apis(clones: Path) -> Kind:
    """From the description of a web service to its section in a list."""
    (text,) = files(clones / APIS, "README.md")
    points = listed(text, r"### (.*)", r"\| *\[([^]]+)\]\([^)]*\) *\| *([^|]*)\|")
    return points, tags(points)


def objects(clones: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The objects of a kind of ATT&CK that are in force."""
    for text in files(clones / ATTACK, f"enterprise-attack/{kind}/.*json"):
        for one in json.loads(text)["objects"]:
            if not one.get("revoked") and not one.get("x_mitre_deprecated"):
                yield one


def plain(text: str) -> str:
    """Text without links, citations and markup."""
    text = re.sub(r"\(Citation:[^)]*\)", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"<[^>]*>|`", " ", text).split())


def techniques(clones: Path) -> dict[str, tuple[str, str]]:
    """Name and description of each technique, by its id."""
    return {
        one["id"]: (one["name"], plain(one["description"]))
        for one in objects(clones, "attack-pattern")
    }


def uses(clones: Path) -> Iterator[tuple[str, str, str]]:
    """Who uses which technique, and how."""
    for one in objects(clones, "relationship"):
        if one["relationship_type"] == "uses":
            yield one["source_ref"], one["target_ref"], plain(one.get("description", ""))


def attack_techniques(clones: Path) -> Kind:
    """From what a program or group was seen doing to the technique; one sentence may show two."""
    seen: dict[str, list[str]] = defaultdict(list)
    for _, technique, how in uses(clones):
        if how:
            seen[how].append(technique)
    points: list[Point] = [(how, "", how, labels) for how, labels in sorted(seen.items())]
    return points, techniques(clones)


def attack_software(clones: Path) -> Kind:
    """From the description of a program or a group to the techniques that it uses."""
    used: dict[str, list[str]] = defaultdict(list)
    for who, technique, _ in uses(clones):
        used[who].append(technique)
    points: list[Point] = [
        (one["id"], one["name"], plain(one.get("description", "")), used[one["id"]])
        for kind in ("malware", "tool", "intrusion-set", "campaign")
        for one in objects(clones, kind)
    ]
    return points, techniques(clones)


def films(clones: Path) -> list[dict[str, Any]]:
    """Films that an encyclopedia has a summary of, each once."""
    found: dict[str, dict[str, Any]] = {}
    for text in files(clones / FILMS, r"movies-\d+s\.json"):
        for one in json.loads(text):
            if one.get("extract") and one.get("href"):
                found[one["href"]] = one
    return [found[name] for name in sorted(found)]


def film_genres(clones: Path) -> Kind:
    """From the title and summary of a film to its genres."""
    points: list[Point] = [
        (x["href"], x["title"], x["extract"], x["genres"]) for x in films(clones)
    ]
    return points, tags(points)


def film_cast(clones: Path) -> Kind:
    """From the title and summary of a film to its cast."""
    points: list[Point] = [(x["href"], x["title"], x["extract"], x["cast"]) for x in films(clones)]
    return points, tags(points)


if __name__ == "__main__":
    main(*sys.argv[1:])

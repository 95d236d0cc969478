"""Copy a knowledge graph's data folder, and add each point's head entity to its filter pairs.

The text of a (head, relation) point contains the whole text of its head. So the head is its nearest
label, though never the right one. A point's uid is ``HEAD|RELATION``, a label's is its entity::

    python bench/studies/head_entities.py DATA OUT
"""

import gzip
import json
import shutil
import sys
from pathlib import Path


def uids(path: Path) -> list[str]:
    """The uid of every line."""
    with gzip.open(path, "rt", encoding="utf8") as lines:
        return [json.loads(line)["uid"] for line in lines]


def main(data: str, out: str) -> None:
    """Copy the three splits; write both filter files with the heads in them."""
    source, target = Path(data), Path(out)
    target.mkdir()
    for name in ("trn", "tst", "lbl"):
        shutil.copy(source / f"{name}.json.gz", target)
    label = {uid: number for number, uid in enumerate(uids(source / "lbl.json.gz"))}
    for split, name in (("trn", "train"), ("tst", "test")):
        pairs = {
            (row, label[uid.partition("|")[0]])
            for row, uid in enumerate(uids(source / f"{split}.json.gz"))
        }
        given = source / f"filter_labels_{name}.txt"
        if given.exists():
            with open(given, encoding="utf8") as lines:
                for line in lines:
                    row, column = map(int, line.split())
                    pairs.add((row, column))
        text = "".join(f"{row} {column}\n" for row, column in sorted(pairs))
        (target / given.name).write_text(text, encoding="utf8")


if __name__ == "__main__":
    main(*sys.argv[1:])

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

import ngame


def uids(path: Path) -> list[str]:
    """The uid of every line."""
    with gzip.open(path, "rt", encoding="utf8") as lines:
        return [json.loads(line)["uid"] for line in lines]


def main(data: str, out: str) -> None:
    """Copy all splits; write their filter files with the heads in them."""
    source, target = Path(data), Path(out)
    dataset = ngame.load_dataset(source)
    target.mkdir()
    shutil.copy(source / "lbl.json.gz", target)
    label = {uid: number for number, uid in enumerate(uids(source / "lbl.json.gz"))}
    for split, name in (("trn", "train"), ("tst", "test"), ("val", "val")):
        if getattr(dataset, f"{name}_texts") is None:
            continue
        shutil.copy(source / f"{split}.json.gz", target)
        heads = enumerate(uids(source / f"{split}.json.gz"))
        pairs = {(row, label[uid.partition("|")[0]]) for row, uid in heads}
        given = getattr(dataset, f"drop_{name}")
        if given is not None:
            pairs.update(map(tuple, given.tolist()))
        text = "".join(f"{row} {column}\n" for row, column in sorted(pairs))
        (target / f"filter_labels_{name}.txt").write_text(text, encoding="utf8")


if __name__ == "__main__":
    main(*sys.argv[1:])

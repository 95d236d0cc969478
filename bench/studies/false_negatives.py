"""How many injected false negatives filters catch, and what they cost.

    python bench/studies/false_negatives.py DATA MODEL

takes pairs of a label, the query, and a point that has it, the positive; and replaces a fifth of
them by near copies of other pairs: each text without one of its words, or, of single words, with
two letters swapped. Original and copy meet in one batch of 64, as clusters make them meet; so each
has a false negative there. The guide is MODEL, a sentence-transformers model, whose vectors are
computed beforehand and kept in float16. Prints precision and recall over all comparisons of all
batches, and the processor time of each filter as a share of a training step of the same model,
with one thread.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

import ngame
from ngame.adapters.sentence_transformers import MaskedMultipleNegativesRankingLoss
from ngame.negatives import Comparison, Guide, NearCopies

BATCH, SHARE = 64, 0.2


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--max-length", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    columns, copied = inject(*pairs(options.data, options.pairs, rng), rng)
    model = SentenceTransformer(options.model, device="cpu")
    model.max_seq_length = options.max_length
    guide = [
        model.encode(texts, normalize_embeddings=True, show_progress_bar=False).astype(np.float16)
        for texts in columns
    ]
    batches = together(copied, len(columns[0]), rng)
    filters = {
        "`Guide`": Guide(*guide),
        "`Guide`, 95 % of the positive": Guide(*guide, margin=0.05, mode="relative"),
        **{
            f"`NearCopies`, above {threshold}": NearCopies(guide[1], threshold)
            for threshold in (0.7, 0.75, 0.8, 0.9)
        },
    }
    step = min(steps(model, columns, batches[: options.steps]))
    print(
        f"{options.data.name}: {len(columns[0])} pairs, {len(copied)} near copies, {len(batches)} "
        f"batches of {BATCH}; a step takes {step:.2f} s of one processor\n"
    )
    print("| filter | precision | recall | ms a batch | of a step |")
    print("|---|---:|---:|---:|---:|")
    for name, each in filters.items():
        precision, recall = quality(each, batches, copied)
        seconds = min(clock(lambda each=each: each(comparison(batches[0]))) for _ in range(20))
        print(
            f"| {name} | {100 * precision:.1f} % | {100 * recall:.1f} % | {1000 * seconds:.2f} | "
            f"{100 * seconds / step:.2f} % |"
        )


def pairs(folder: Path, count: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Texts of labels, and of a point each that has it; no text twice."""
    data = ngame.load_dataset(folder)
    found: dict[str, str] = {}
    points = set()
    for row in rng.permutation(len(data.train_texts)).tolist():
        begin, end = data.train_labels.indptr[row : row + 2].tolist()
        point = data.train_texts[row]
        if begin < end and len(found) < count and point not in points:
            label = data.label_texts[data.train_labels.indices[begin]]
            if label not in found:
                found[label] = point
                points.add(point)
    return list(found), list(found.values())


def inject(
    queries: list[str], positives: list[str], rng: np.random.Generator
) -> tuple[list[list[str]], np.ndarray[Any, Any]]:
    """Replace a share of the pairs by near copies of others; which of which, [copies, 2]."""
    count = int(SHARE * len(queries))
    copied = rng.permutation(len(queries))[: 2 * count].reshape(count, 2)
    columns = [[*queries], [*positives]]
    for copy, original in copied.tolist():
        for column in columns:
            column[copy] = altered(column[original], rng)
    return columns, copied


def altered(text: str, rng: np.random.Generator) -> str:
    """The text without one of its words; of a single word two neighbouring letters swapped."""
    words = text.split()
    if len(words) > 1:
        del words[rng.integers(len(words))]
        return " ".join(words)
    place = int(rng.integers(max(1, len(text) - 1)))
    return text[:place] + text[place : place + 2][::-1] + text[place + 2 :]


def together(
    copied: np.ndarray[Any, Any], rows: int, rng: np.random.Generator
) -> list[np.ndarray[Any, Any]]:
    """Batches of all rows in which every copy meets its original."""
    per_batch = int(SHARE * BATCH)
    others = rng.permutation(np.setdiff1d(np.arange(rows), copied))
    found = []
    for number in range(len(copied) // per_batch):
        here = copied[number * per_batch :][:per_batch].ravel()
        rest = BATCH - len(here)
        found.append(rng.permutation(np.append(here, others[number * rest :][:rest])))
    return [batch for batch in found if len(batch) == BATCH]


def comparison(batch: np.ndarray[Any, Any]) -> Comparison:
    """Each row of a batch against the positives of all."""
    return Comparison(
        anchor="query",
        candidate="item",
        queries=batch,
        positives=batch,
        owners=np.arange(len(batch)),
        ids=batch,
        scores=torch.zeros(len(batch), len(batch)),
        positive_scores=torch.zeros(len(batch)),
    )


def quality(
    each: Callable[[Comparison], torch.Tensor],
    batches: list[np.ndarray[Any, Any]],
    copied: np.ndarray[Any, Any],
) -> tuple[float, float]:
    """Precision and recall; a row's own positive does not count."""
    partner = dict(np.concatenate([copied, copied[:, ::-1]]).tolist())
    caught = claimed = there = 0
    for batch in batches:
        mask = each(comparison(batch)).numpy().copy()
        np.fill_diagonal(mask, False)
        truth = batch == np.array([partner.get(row, -1) for row in batch.tolist()])[:, None]
        caught += int((mask & truth).sum())
        claimed += int(mask.sum())
        there += int(truth.sum())
    return caught / max(1, claimed), caught / max(1, there)


def steps(
    model: SentenceTransformer, columns: list[list[str]], batches: list[np.ndarray[Any, Any]]
) -> list[float]:
    """Processor seconds of training steps, tokenizing included."""
    loss = MaskedMultipleNegativesRankingLoss(model)
    update = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step(batch: np.ndarray[Any, Any]) -> None:
        features = [model.preprocess([column[row] for row in batch]) for column in columns]
        loss(features, torch.from_numpy(batch)).backward()
        update.step()
        update.zero_grad()

    model.train()
    return [clock(lambda batch=batch: step(batch)) for batch in batches]


def clock(work: Callable[[], Any]) -> float:
    """Processor seconds that this takes."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


if __name__ == "__main__":
    main()

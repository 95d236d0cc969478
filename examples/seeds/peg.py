"""In the spirit of PEG (arXiv 2311.11691): large batches, mined negatives, progressive weights.

    python examples/seeds/peg.py DATA [SEEDS [SIZE ...]]

PEG compares a query with up to 80,000 others and with five mined negatives, and pays growing
attention to hard samples. Its formula is not public; the weights here are those of
`ngame.negatives.Progressive`. Every size sees the same number of points, so large batches make few
steps; their learning rate grows with the square root of the size. Batches of more than 1,024 are
encoded in chunks, twice (`grad_cache`), and compared in chunks (`rows_at_once`).

DATA: any data set for `ngame.load_dataset`. The table of the documents is that of NL2Bash, English
and shell commands (the repository TellinaTool/nl2bash). Sizes beyond the data are left out.
"""

import sys
from functools import partial

import numpy as np
import torch
from common import Updates, bag, compare, table
from torch.nn.functional import normalize

import ngame
from ngame.negatives import (
    Candidates,
    ContrastiveLoss,
    KnownPositives,
    Progressive,
    Schedule,
    batch_labels,
    grad_cache,
)

EPOCHS, CHUNK, MINED = 8, 1024, 5
SIZES = [64, 512, 4096, 16_384, 80_000]
PARTS = ["batch", "mined", "mined, progressive"]


def vectors(encoder, tokens):
    return ngame.encode_rows(lambda rows: encoder(tokens.take(rows)), len(tokens), model=encoder)


def chunked(encoder, tokens, ids):
    """Callables that encode a chunk of the ids each, to unit length."""
    return [
        lambda rows=rows: normalize(encoder(tokens.take(rows)), dim=1)
        for rows in np.split(ids, range(CHUNK, len(ids), CHUNK))
    ]


def compared(loss, rows, pool, targets, lists, encoded, step, x, z):
    """The loss of a batch: x are the vectors of its rows, z those of the labels `encoded`."""
    own, listed = (torch.from_numpy(np.searchsorted(encoded, ids)) for ids in (pool, lists))
    sources = [Candidates(lists, z[listed])] if lists.size else []
    return loss(Candidates(rows, x), Candidates(pool, z[own]), targets, sources=sources, step=step)


def train(data, size, part, seed):
    torch.manual_seed(seed)
    encoder, points, labels = bag(data, seed, dim=128)
    batches = ngame.ClusterBatchSampler(len(points), size, cluster_size=1, seed=seed)
    steps = EPOCHS * len(batches)
    ramp = Schedule({0: 0.0, steps: 1.0}, "linear")
    loss = ContrastiveLoss(
        temperature=0.05,
        filters=[KnownPositives(data.train_labels)],
        progressive=Progressive(ramp) if "progressive" in part else None,
        rows_at_once=CHUNK,
    )
    factor = (size / 256) ** 0.5
    updates = Updates([encoder], steps, rate=2e-3 * factor, sparse_rate=5e-3 * factor)
    step, mined = 0, None
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        if part != "batch" and epoch and epoch % 2 == 0:
            x, z = vectors(encoder, points), vectors(encoder, labels)
            _, mined = ngame.mine_hard_negatives(
                x, z, data.train_labels, MINED, ranks=(10, 100), sampling="random", seed=epoch
            )
        for rows in map(np.array, batches):
            rng = np.random.default_rng([seed, step])
            pool, _, targets = batch_labels(data.train_labels, rows, rng=rng)
            lists = np.empty((len(rows), 0), int) if mined is None else mined[rows]
            encoded = np.union1d(pool, lists[lists >= 0])  # each label once, whoever wants it
            scored = partial(compared, loss, rows, pool, targets, lists, encoded, step)
            columns = chunked(encoder, points, rows), chunked(encoder, labels, encoded)
            if size > CHUNK:
                grad_cache(scored, *columns)
            else:
                scored(*(torch.cat([each() for each in column]) for column in columns)).backward()
            updates.step()
            step += 1
    return encoder


def evaluate(data, encoder):
    x, z = (vectors(encoder, encoder.tokenize(t)) for t in (data.test_texts, data.label_texts))
    found = ngame.topk(x, z, min(100, len(z)), drop=data.drop_test)
    scored = ngame.metrics.evaluate(found, data.test_labels, ks=[1, 10, 100], drop=data.drop_test)
    return {name: scored[name] for name in ("P@1", "N@10", "R@10", "R@100")}


def main(folder, seeds=3, *sizes):
    data = ngame.load_dataset(folder)
    arms = {
        f"{size:,}, {part}": (size, part)
        for size in sizes or SIZES
        if size <= len(data.train_texts)
        for part in PARTS
    }
    print(
        table(compare(arms, lambda arm, seed: evaluate(data, train(data, *arms[arm], seed)), seeds))
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

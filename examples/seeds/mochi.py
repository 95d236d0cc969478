"""MoCHi (NeurIPS 2020): a queue of negatives, and hard ones mixed from it.

    python examples/seeds/mochi.py DATA [SEEDS]

The queue has the labels of the last steps, encoded by a copy of the encoder that follows slowly. Of
each point's 64 hardest negatives, in the batch or in the queue, 32 are mixed by twos; and, in the
second half of the training, 16 with the point itself. Beside them: the batch alone, the queue
without mixing, and labels drawn at random, as many as the queue has, encoded with a gradient.

DATA: any data set for `ngame.load_dataset`. The table of the documents is that of cooking, question
titles and tags of Stack Exchange (archive.org has its dumps), and of NL2Bash, English and shell
commands (the repository TellinaTool/nl2bash).
"""

import sys

import numpy as np
import torch
from common import Updates, bag, compare, table
from torch.nn.functional import normalize

import ngame
from ngame.negatives import (
    Candidates,
    ContrastiveLoss,
    EmaEncoder,
    HardMixer,
    KnownPositives,
    NegativeQueue,
    SharedRandom,
    batch_labels,
)

BATCH, EPOCHS, QUEUE = 64, 4, 512
ARMS = ["batch", "queue", "queue, by twos", "queue, both kinds later", "shared random"]


def train(data, arm, seed):
    torch.manual_seed(seed)
    encoder, points, labels = bag(data, seed, dim=128)
    batches = ngame.ClusterBatchSampler(len(points), BATCH, cluster_size=1, seed=seed)
    steps = EPOCHS * len(batches)
    mixer = None
    if "by twos" in arm:
        mixer = HardMixer(64, 32, 0, seed=seed)
    elif "both kinds" in arm:
        mixer = HardMixer(64, 32, 16, start=(steps // 2, steps // 2), seed=seed)
    filters = [KnownPositives(data.train_labels)]
    loss = ContrastiveLoss(temperature=0.05, filters=filters, mixer=mixer)
    follower, queue = EmaEncoder(encoder, 0.99), NegativeQueue(QUEUE, encoder.dim)
    drawn = SharedRandom(len(labels), QUEUE if arm == "shared random" else 0, seed=seed)
    updates = Updates([encoder], steps)
    step = 0
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        for rows in map(np.array, batches):
            rng = np.random.default_rng([seed, step])
            shared = drawn.draw(step).ids
            pool, _, targets = batch_labels(data.train_labels, rows, shared=shared, rng=rng)
            x = normalize(encoder(points.take(rows)), dim=1)
            z = normalize(encoder(labels.take(pool)), dim=1)
            sources = [queue.offer()] if "queue" in arm else []
            offered = Candidates(rows, x), Candidates(pool, z)
            loss(*offered, targets, sources=sources, step=step).backward()
            updates.step()
            if "queue" in arm:
                follower.update(encoder)
                queue.push(pool, normalize(follower(labels.take(pool)), dim=1))
            step += 1
    return encoder


def evaluate(data, encoder):
    x, z = (
        ngame.encode_rows(lambda rows, t=tokens: encoder(t.take(rows)), len(tokens), model=encoder)
        for tokens in map(encoder.tokenize, (data.test_texts, data.label_texts))
    )
    found = ngame.topk(x, z, min(100, len(z)), drop=data.drop_test)
    scored = ngame.metrics.evaluate(
        found, data.test_labels, ks=[1, 5, 10, 100], drop=data.drop_test
    )
    return {name: scored[name] for name in ("P@1", "P@5", "R@10", "R@100")}


def main(folder, seeds=3, arms=ARMS):
    data = ngame.load_dataset(folder)
    print(table(compare(arms, lambda *run: evaluate(data, train(data, *run)), seeds)))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

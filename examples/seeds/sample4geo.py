"""Sample4Geo (ICCV 2023): batches of geographic neighbours first, then of the model's own.

    python examples/seeds/sample4geo.py DATA [SEEDS]

A place's name in one of 25 scripts finds its English name: two views of a place, with coordinates,
as there are street and satellite views in the original. A batch has one view of a place at most.
The loss is symmetric InfoNCE, label smoothing .1, a learned temperature. The neighbours of a row
are the places nearest on the globe, or those that the model finds nearest to the row, mined again
every second epoch. Beside them: random batches, and NGAME's clusters of the rows' vectors.

DATA: for `ngame.load_dataset`, with `coordinates.npy`, float [labels, 2], degrees, and
`test_labels.npy`, the ids of the places that no training row has. GeoNames (geonames.org, CC BY)
has names, coordinates and names in other scripts of the cities of the world.
"""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from common import Updates, compare, table
from torch.nn.functional import normalize

import ngame
from ngame.data.tokens import Tokens
from ngame.negatives import Candidates, ContrastiveLoss, KnownPositives, batch_labels

BATCH, EPOCHS, DIM, EVERY = 128, 5, 128, 3
ARMS = ["random", "NGAME", "geography", "geography, then model", "random, then model"]
NEIGHBOURS = {"nearest": 32, "drawn": 32, "neighbour_range": 64}


def n_grams(text):
    """The text's letters, and runs of two and three of them: names are short."""
    words = [f"_{word}_" for word in text.lower().split()]
    return [w[i : i + n] for w in words for n in (1, 2, 3) for i in range(len(w) - n + 1)]


class NGrams(torch.nn.Module):
    """Sum of the vectors of a text's n-grams."""

    def __init__(self, count):
        super().__init__()
        self.vectors = torch.nn.EmbeddingBag(
            count, DIM, mode="sum", sparse=True, include_last_offset=True
        )
        torch.nn.init.normal_(self.vectors.weight, std=DIM**-0.5)

    def forward(self, tokens):
        return self.vectors(torch.from_numpy(tokens.ids).long(), torch.from_numpy(tokens.offsets))


class Places:
    """The places of the training rows, all texts by their n-grams, and every row's neighbours."""

    def __init__(self, data, coordinates):
        self.data = data
        self.of_row = data.train_labels.indices[data.train_labels.indptr[:-1]]
        self.geographic = ngame.haversine_neighbours(*coordinates[self.of_row].T, 64)
        columns = data.train_texts, data.label_texts, data.test_texts
        columns = [[n_grams(text) for text in column] for column in columns]
        counts = Counter(gram for column in columns[:2] for text in column for gram in set(text))
        known = [gram for gram, count in counts.items() if count > 1]
        self.n_grams, place = len(known), {gram: number for number, gram in enumerate(known)}
        self.rows, self.names, self.test = (
            Tokens.from_lists([place[gram] for gram in text if gram in place] for text in column)
            for column in columns
        )

    def by_model(self, x, z, rng):
        """For every row, a row each of the places whose names are nearest to it."""
        order = rng.permutation(len(self.of_row))
        places, row_of = np.unique(self.of_row[order], return_index=True)
        own = self.data.train_labels[:, places].tocsr()
        found = ngame.topk_arrays(x, z[places], min(64, len(places)), drop=own)[1]
        return np.where(found < 0, -1, order[row_of][found])


def vectors(encoder, tokens):
    return ngame.encode_rows(lambda rows: encoder(tokens.take(rows)), len(tokens), model=encoder)


def sampler(arm, places, seed):
    rows, keys = len(places.of_row), places.of_row
    if arm == "NGAME":
        return ngame.ClusterBatchSampler(rows, BATCH, cluster_size=16, keys=keys, seed=seed)
    start = {"random": EPOCHS, "random, then model": 1}.get(arm, 0)
    return ngame.NeighbourBatchSampler(
        rows, BATCH, start_epoch=start, refresh_every=2, keys=keys, seed=seed, **NEIGHBOURS
    )


def train(data, places, arm, seed):
    torch.manual_seed(seed)
    encoder = NGrams(places.n_grams)
    loss = ContrastiveLoss(
        temperature=0.07,
        learned=True,
        label_smoothing=0.1,
        directions=("query_to_item", "item_to_query"),
        filters=[KnownPositives(data.train_labels)],
    )
    batches = sampler(arm, places, seed)
    updates = Updates([encoder, loss], EPOCHS * len(batches))
    rng = np.random.default_rng(seed)
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        if arm == "geography" or (arm == "geography, then model" and epoch == 0):
            batches.refresh(places.geographic)
        elif batches.due(epoch):
            x = vectors(encoder, places.rows)
            neighbours = arm != "NGAME"
            batches.refresh(
                places.by_model(x, vectors(encoder, places.names), rng) if neighbours else x
            )
        for rows in map(np.array, batches):
            pool, _, targets = batch_labels(data.train_labels, rows, rng=rng)
            x = normalize(encoder(places.rows.take(rows)), dim=1)
            z = normalize(encoder(places.names.take(pool)), dim=1)
            loss(Candidates(rows, x), Candidates(pool, z), targets).backward()
            updates.step()
    return encoder


def evaluate(data, places, new_places, encoder):
    x, z = (vectors(encoder, tokens) for tokens in (places.test, places.names))
    every = ngame.metrics.evaluate(ngame.topk(x, z, 10), data.test_labels, ks=[1, 10])
    truth = data.test_labels[:, new_places].tocsr()
    within = ngame.metrics.evaluate(ngame.topk(x, z[new_places], 10), truth, ks=[1])
    return {"R@1": every["R@1"], "R@10": every["R@10"], "R@1 of new places": within["R@1"]}


def main(folder, seeds=3, arms=ARMS):
    data = ngame.load_dataset(folder)
    data = ngame.Dataset(  # a part of the rows, so that it takes minutes
        data.train_texts[::EVERY],
        data.train_labels[::EVERY],
        data.label_texts,
        test_texts=data.test_texts,
        test_labels=data.test_labels,
    )
    coordinates, new_places = (
        np.load(Path(folder) / name) for name in ("coordinates.npy", "test_labels.npy")
    )
    places = Places(data, coordinates)
    print(
        table(
            compare(
                arms,
                lambda *run: evaluate(data, places, new_places, train(data, places, *run)),
                seeds,
            )
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

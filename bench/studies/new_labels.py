"""Keep some labels from training, add them by `Model.with_labels`, and look for them.

python bench/studies/new_labels.py DATA [--labels 40] [--seeds 2]

The labels are drawn from those of at least three test points. Training points that have no other
label are left out. Printed are the recall of the added labels at 5 and 10 among all labels, on the
test points that have one: by the encoder, by the fused scores as if points had been silent (what a
label without points got), and by the fused scores as they are; then P@1 and P@5 of all labels on
all test points, the added ones left out and with them. All in percent.
"""

import argparse
from dataclasses import replace

import numpy as np
import scipy.sparse as sp

import ngame
from ngame.config import Config


def measure(data: ngame.Dataset, count: int, seed: int) -> list[float]:
    """One row of the table."""
    rng = np.random.default_rng(seed)
    often = np.flatnonzero(data.test_labels.getnnz(axis=0) >= 3)
    hidden = np.sort(rng.choice(often, count, replace=False))
    seen = np.setdiff1d(np.arange(data.test_labels.shape[1]), hidden)
    labels = data.train_labels.tocsr()[:, seen]
    rows = np.flatnonzero(labels.getnnz(axis=1))
    names = [[data.label_texts[label] for label in part] for part in (seen, hidden)]
    part = ngame.Dataset([data.train_texts[row] for row in rows], labels[rows], names[0])
    config = Config.load(sets=[f"seed={seed}"], points=len(rows), labels=len(seen))
    before = ngame.train(part, config)
    after = before.with_labels(names[1])
    silent = {name: replace(fusion, of_new=None) for name, fusion in after.fusions.items()}

    truth = sp.csr_matrix(data.test_labels.tocsr()[:, np.concatenate([seen, hidden])])
    added = truth.copy()
    added.data[added.indices < len(seen)] = 0
    added.eliminate_zeros()
    rows = np.flatnonzero(added.getnnz(axis=1))
    texts = [data.test_texts[row] for row in rows]
    found = [after.predict(texts, 10, scorer=name) for name in ("encoder", "fused")]
    found.insert(1, replace(after, fusions=silent).predict(texts, 10))
    recall = [ngame.metrics.evaluate(matrix, added[rows], ks=[5, 10]) for matrix in found]
    without = before.predict(data.test_texts, 5)
    without.resize(truth.shape)
    whole = [
        ngame.metrics.evaluate(matrix, truth, ks=[1, 5])
        for matrix in (without, after.predict(data.test_texts, 5))
    ]
    values = [one[f"R@{k}"] for one in recall for k in (5, 10)]
    return values + [one[f"P@{k}"] for one in whole for k in (1, 5)]


def main() -> None:
    """Print a row for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", metavar="DATA", help="a folder that ngame train reads")
    parser.add_argument("--labels", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    data = ngame.load_dataset(arguments.data)
    for seed in range(arguments.seeds):
        values = measure(data, arguments.labels, seed)
        print(f"seed {seed}:", " ".join(f"{100 * value:.2f}" for value in values), flush=True)


if __name__ == "__main__":
    main()

"""How right probabilities are: what was said against what was true, on test points.

python bench/studies/probabilities.py DATA... [--seeds 3]

Each DATA, a folder that `ngame train` reads, is trained on with its defaults. The ten best labels
of every test point count. Printed are their mean loss (of the logarithm), the mean distance of
what was said from what was true over ten bins of probability, and that of each bin, in percent:
above 0 where too much was said. Bins of fewer than 50 labels are left out.
"""

import argparse

import numpy as np

import ngame
from ngame.config import Config
from ngame.data.self_pairs import drop_self_pairs


def measure(data: ngame.Dataset, seed: int) -> str:
    """One line."""
    size = {"points": len(data.train_texts), "labels": len(data.label_texts)}
    model = ngame.train(data, Config.load(sets=[f"seed={seed}"], **size))
    found = model.predict(data.test_texts, 10, drop=data.drop_test, probabilities=True)
    rows = np.repeat(np.arange(found.shape[0]), np.diff(found.indptr))
    right = np.asarray(data.test_labels.tocsr()[rows, found.indices]).ravel() != 0
    said = np.clip(found.data.astype(float), 1e-6, 1 - 1e-6)
    loss = -np.log(np.where(right, said, 1 - said)).mean()
    bins = np.minimum((10 * said).astype(int), 9)
    counts = np.bincount(bins, minlength=10)
    off = np.bincount(bins, said - right, minlength=10)
    each = [f"{100 * o / n:+.1f}" if n >= 50 else "-" for o, n in zip(off, counts, strict=True)]
    mean = 100 * np.abs(off).sum() / len(said)
    return f"loss {loss:.4f}, off by {mean:.2f}: {' '.join(each)}"


def main() -> None:
    """Print a line for each data set and seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="+", metavar="DATA")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    for folder in arguments.data:
        data, _ = drop_self_pairs(ngame.load_dataset(folder))
        for seed in range(arguments.seeds):
            print(f"{data.name}, seed {seed}: {measure(data, seed)}", flush=True)


if __name__ == "__main__":
    main()

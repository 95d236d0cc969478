"""Train on few points of several data sets: P@1 of each scorer and of all fused.

python bench/studies/small_data.py DATA... [--points 10 20 50 200] [--seeds 3]

DATA are folders that `ngame train` reads, such as those of `kinds.py`, in which no point is a
label. Test points are those that
have a label of the training points. The last column is how far the fused scores are below the best
scorer of each run, on average.
"""

import argparse
import warnings
from collections import defaultdict

import numpy as np

import ngame


def some(data: ngame.Dataset, points: int, seed: int) -> ngame.Dataset | None:
    """Some training points, their labels, and at most 300 test points that have one of these."""
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(data.train_texts))[:points])
    used = np.flatnonzero(data.train_labels[rows].getnnz(axis=0))
    truth = data.test_labels[:, used].tocsr()
    test = rng.permutation(np.flatnonzero(np.diff(truth.indptr)))[:300]
    if len(used) < 2 or len(test) < 20:
        return None
    return ngame.Dataset(
        [data.train_texts[row] for row in rows],
        data.train_labels[rows][:, used],
        [data.label_texts[label] for label in used],
        test_texts=[data.test_texts[row] for row in test],
        test_labels=truth[test],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="+")
    parser.add_argument("--points", type=int, nargs="+", default=[10, 20, 50, 200])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = defaultdict(list)
    for path in options.data:
        whole = ngame.load_dataset(path)
        for points in options.points:
            for seed in range(options.seeds):
                if (data := some(whole, points, seed)) is not None:
                    model = ngame.train(data)
                    found[points].append({k: v["P@1"] for k, v in model.metrics.items()})
    for points, runs in found.items():
        means = {name: np.mean([run[name] for run in runs]) for name in runs[0]}
        below = [max(run.values()) - run["fused"] for run in runs]
        text = ", ".join(f"{name} {100 * value:.1f}" for name, value in means.items())
        print(f"{points} points, {len(runs)} runs: {text}; below {100 * np.mean(below):.1f}")


if __name__ == "__main__":
    main()

"""Train on few points of several data sets: P@1 of each scorer and of all fused.

python bench/studies/small_data.py DATA... [--points 10 20 50 200] [--seeds 3]
python bench/studies/small_data.py --points 5 20 --seeds 20

DATA are folders that `ngame train` reads, such as those of `kinds.py`, in which no point is a
label. Test points are those that have a label of the training points. Without DATA the sets are
made up, of five kinds. The last columns are how far the fused scores are below the best scorer of
each run: on average, at worst, and in how many runs.
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


def made_up(kind: str, points: int, seed: int) -> ngame.Dataset:
    """A few texts of made-up words, 200 of the same kind to test on.

    named: a text names its two labels. topics: four words of its label's eight, four of all texts.
    partly: two and three such words, and the label's name in half of the texts. multi: three such
    words of each of up to three labels, the name in three texts of ten. stems: the name with an
    ending, and one word of the label's.
    """
    rng = np.random.default_rng([seed, points, *kind.encode()])
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ar", "en")]
    words = ["".join(parts) for parts in rng.permuted(np.tile(syllables, (999, 1)), axis=1)[:, :3]]
    words = sorted({*words}, key=lambda word: rng.random())
    labels = 3 + round(points**0.5) - (points < 20)
    names, own, common = words[:labels], words[labels : 9 * labels], words[-40:]
    texts, rows = [], []
    for number in range(points + 200):
        many = {"named": 2, "multi": int(rng.integers(1, 4))}.get(kind, 1)
        mine = rng.choice(labels, many, replace=False)
        if number < labels and kind != "named":
            mine[0] = number
        text = list(rng.choice(common, {"named": 1, "partly": 3, "multi": 3}.get(kind, 4)))
        for label in mine:
            name, of_label = names[label], own[8 * label : 8 * label + 8]
            count = {"named": 0, "topics": 4, "partly": 2, "multi": 3, "stems": 1}[kind]
            text += list(rng.choice(of_label, count))
            if kind == "stems":
                text.append(name + rng.choice(["s", "ing", "er", "ly"]))
            elif rng.random() < {"named": 1, "partly": 0.5, "multi": 0.3}.get(kind, 0):
                text.append(name)
        texts.append(" ".join(rng.permutation(text)))
        rows.append(np.isin(np.arange(labels), mine))
    y = np.array(rows, np.float32)
    tests = {"test_texts": texts[points:], "test_labels": y[points:]}
    return ngame.Dataset(texts[:points], y[:points], names, **tests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="*")
    parser.add_argument("--points", type=int, nargs="+", default=[10, 20, 50, 200])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = defaultdict(list)
    kinds = [] if options.data else ["named", "topics", "partly", "multi", "stems"]
    wholes = {path: ngame.load_dataset(path) for path in options.data}
    for points in options.points:
        for name in [*kinds, *wholes]:
            for seed in range(options.seeds):
                data = (
                    some(wholes[name], points, seed)
                    if name in wholes
                    else made_up(name, points, seed)
                )
                if data is not None:
                    model = ngame.train(data)
                    found[points].append({k: v["P@1"] for k, v in model.metrics.items()})
    for points, runs in found.items():
        means = {name: np.mean([run[name] for run in runs]) for name in runs[0]}
        below = 100 * np.array([max(run.values()) - run["fused"] for run in runs])
        text = ", ".join(f"{name} {100 * value:.1f}" for name, value in means.items())
        print(
            f"{points} points, {len(runs)} runs: {text}; below {below.mean():.1f}, at worst "
            f"{below.max():.1f}, in {(below > 0).sum()}"
        )


if __name__ == "__main__":
    main()

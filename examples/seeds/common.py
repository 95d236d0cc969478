"""What the recipes share: an encoder, its updates, and a table over seeds."""

import copy
import statistics
import sys
import time
from functools import lru_cache

import torch

import ngame


def bag(data, seed, **options):
    """An untrained bag of sub-words, and the tokens of the training points and of the labels."""
    encoder, *tokens = _bag(data, seed, **options)
    return copy.deepcopy(encoder), *tokens


@lru_cache(1)  # every arm of a seed starts from the same
def _bag(data, seed, **options):
    texts = data.train_texts, data.label_texts
    encoder = ngame.BagEncoder.fit(texts[0] + texts[1], seed=seed, **options)
    return encoder, *map(encoder.tokenize, texts)


class Updates:
    """Adam for dense and for sparse gradients; the learning rates fall to 0 over the steps."""

    def __init__(self, modules, steps, rate=2e-3, sparse_rate=5e-3):
        sparse = [
            child.weight
            for module in modules
            for child in module.modules()
            if getattr(child, "sparse", False)
        ]
        known = {id(weight) for weight in sparse}
        dense = [p for module in modules for p in module.parameters() if id(p) not in known]
        self.optimizers = []
        if dense:
            self.optimizers.append(torch.optim.AdamW(dense, rate))
        if sparse:
            self.optimizers.append(torch.optim.SparseAdam(sparse, sparse_rate))
        self.schedules = [
            torch.optim.lr_scheduler.LinearLR(each, 1.0, 0.01, steps) for each in self.optimizers
        ]

    def step(self):
        """Take the gradients that are there."""
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def compare(arms, run, seeds=3):
    """Run every arm with every seed; each run gives a dict of fractions."""
    results = {arm: [] for arm in arms}
    for seed in range(seeds):
        for arm in arms:
            started = time.process_time()
            scores = run(arm, seed)
            scores["seconds"] = (time.process_time() - started) / 100  # shown times 100
            results[arm].append(scores)
            print(arm, seed, {k: round(100 * v, 2) for k, v in scores.items()}, file=sys.stderr)
    return results


def table(results):
    """Means and standard deviations over the seeds, in percent, as Markdown."""
    names = list(next(iter(results.values()))[0])
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for arm, runs in results.items():
        cells = []
        for name in names:
            values = [100 * run[name] for run in runs]
            cell = f"{statistics.mean(values):.0f}" if name == "seconds" else spread(values)
            cells.append(cell)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values):
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean

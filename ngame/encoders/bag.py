"""The embedded encoder: a weighted bag of sub-word embeddings, fast on a few CPU cores."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ngame.data.tokens import Tokens
from ngame.files import atomic_write, write_json, write_tensors

_UNKNOWN, _WITHIN = "[UNK]", "##"
_TEXTS_AT_ONCE = 8192
# More texts than this teach the vocabulary nothing new but cost memory: a regular sample is taken.
_TEXTS_TO_FIT = 1_000_000
# So many words of text are there for each sub-word, where their number is not given; and the
# fewest and the most that it comes to. Less text for each, and rare words are learnt by heart.
_WORDS_PER_SUBWORD, _FEWEST, _MOST = 64, 1500, 30_000


class BagEncoder(torch.nn.Module):
    """Sum of token embeddings, length-normalised, then residual layers.

    The tokens of a text are its sub-words (byte-pair encoding, learnt on the training texts). The
    size of a token's embedding is its weight in the sum: it starts from the inverse document
    frequency and is learnt.

    Make one with `fit`, or from a folder with `load`.

    Attributes
    ----------
    dim : int
        Width of the vectors.
    embedding : torch.nn.EmbeddingBag
        One row a token; its gradients are sparse.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        dim: int,
        layers: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.dropout = dropout
        self.tokenizer = tokenizer
        self.embedding = torch.nn.EmbeddingBag(
            tokenizer.get_vocab_size(),
            dim,
            mode="sum",
            sparse=True,
            include_last_offset=True,
        )
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.Linear(dim, 2 * dim), torch.nn.GELU(), torch.nn.Linear(2 * dim, dim)
            )
            for _ in range(layers)
        )

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        *,
        dim: int = 256,
        layers: int = 1,
        dropout: float = 0.0,
        vocab_size: int = 0,
        seed: int = 0,
    ) -> "BagEncoder":
        """Train the tokenizer on `texts`; weights start at random.

        Parameters
        ----------
        texts : the texts of the training points and of the labels
        dim : width of the vectors
        layers : number of residual layers
        dropout : share of a text's tokens that are left out in training mode
        vocab_size : number of sub-words at most; 0 chooses it by the amount of text
        seed : of the initial weights

        Raises
        ------
        ValueError
            There is no text.
        """
        if len(texts) == 0:
            raise ValueError("texts is empty, expected at least one text")
        texts = texts[:: -(-len(texts) // _TEXTS_TO_FIT)]
        if vocab_size == 0:
            words = sum(len(text.split()) for text in texts)
            vocab_size = min(max(words // _WORDS_PER_SUBWORD, _FEWEST), _MOST)
        tokenizer = _train_tokenizer(texts, vocab_size)
        encoder = cls(tokenizer, dim=dim, layers=layers, dropout=dropout)
        encoder._initialise(texts, seed)
        return encoder

    @torch.no_grad()
    def _initialise(self, texts: Sequence[str], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = self.embedding.num_embeddings
        tokens = self.tokenize(texts)
        document = np.repeat(np.arange(len(tokens)), tokens.lengths)
        # Number of texts that hold each token, a text counted once: pairs (text, token) are unique.
        pairs = np.unique(document * rows + tokens.ids)
        frequency = np.bincount(pairs % rows, minlength=rows)
        # Never quite 0, so that a text of nothing but the commonest tokens is no zero vector.
        idf = torch.from_numpy(np.log((2 + len(texts)) / (1 + frequency))).float()
        self.embedding.weight.normal_(0, 1 / math.sqrt(self.dim), generator=generator)
        self.embedding.weight.mul_((idf / idf.mean())[:, None])
        for layer in self.layers:
            inner, _, outer = cast(Any, layer)
            inner.weight.normal_(0, 1 / math.sqrt(self.dim), generator=generator)
            inner.bias.zero_()
            # A layer begins as the identity.
            outer.weight.zero_()
            outer.bias.zero_()

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Texts to the ids of their sub-words.

        Raises
        ------
        TypeError
            `texts` is a single string, or one of them is no string.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a str, expected a sequence of them")
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {row} is a {type(text).__name__}, expected a str")
        return Tokens.concatenate(
            Tokens.from_lists(
                encoding.ids
                for encoding in self.tokenizer.encode_batch_fast(
                    texts[start : start + _TEXTS_AT_ONCE]
                )
            )
            for start in tqdm(
                range(0, len(texts), _TEXTS_AT_ONCE),
                "tokenizing",
                disable=None,
                delay=2,
                leave=False,
            )
        )

    def forward(self, tokens: Tokens) -> torch.Tensor:
        """Tokens of n texts to vectors of shape [n, dim]."""
        device = self.embedding.weight.device
        if self.training and self.dropout > 0:
            tokens = _thinned(tokens, self.dropout)
        offsets = torch.from_numpy(tokens.offsets).to(device)
        if self.training:
            # Each row that occurs is gathered once, so that its gradient comes out summed already:
            # a sparse optimizer then need not sort and add up one gradient a token.
            unique, inverse = np.unique(tokens.ids, return_inverse=True)
            rows = F.embedding(
                torch.from_numpy(unique).to(device), self.embedding.weight, sparse=True
            )
            ids = torch.from_numpy(inverse).to(device)
            x = F.embedding_bag(ids, rows, offsets, mode="sum", include_last_offset=True)
        else:
            x = self.embedding(torch.from_numpy(np.asarray(tokens.ids)).to(device).long(), offsets)
        x = F.normalize(x, dim=1) * (math.sqrt(self.dim) / 2)
        for layer in self.layers:
            x = x + layer(x)
        return x

    def save(self, folder: Path) -> None:
        """Write config.json, tokenizer.json and model.safetensors into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "tokenizer.json") as aside:
            self.tokenizer.save(str(aside))
        tensors = dict(self.state_dict())
        write_tensors(folder / "model.safetensors", tensors)
        write_json(
            folder / "config.json",
            {"dim": self.dim, "layers": len(self.layers), "dropout": self.dropout},
        )

    @classmethod
    def load(cls, folder: Path) -> "BagEncoder":
        """Read what `save` wrote."""
        settings = json.loads((folder / "config.json").read_text(encoding="utf8"))
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        with torch.device("meta"):
            encoder = cls(tokenizer, **settings)
        encoder.load_state_dict(tensors, assign=True)
        return encoder


def _thinned(tokens: Tokens, dropout: float) -> Tokens:
    """Leave out a share of the tokens; a text that would lose all of them keeps them all."""
    keep = torch.rand(len(tokens.ids)).numpy() >= dropout
    before = np.concatenate([[0], np.cumsum(keep)])
    lost = before[tokens.offsets[1:]] == before[tokens.offsets[:-1]]
    keep |= np.repeat(lost, tokens.lengths)
    before = np.concatenate([[0], np.cumsum(keep)])
    return Tokens(tokens.ids[keep], before[tokens.offsets])


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    # The trainer numbers the letters within words in the order of a hash table, another one in
    # every process, and breaks ties by number. So a first pass collects these letters, and the
    # second one is told their numbers.
    letters = _trained(texts, 0, []).get_vocab()
    within = sorted(letter for letter in letters if letter.startswith(_WITHIN))
    model = json.loads(_trained(texts, vocab_size, within).to_str())["model"]
    # Made anew, since those letters would else be special tokens that no text is split within.
    return _untrained(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        continuing_subword_prefix=_WITHIN,
    )


def _untrained(**model: Any) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=_UNKNOWN, **model))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def _trained(
    texts: Sequence[str], vocab_size: int, first_tokens: Sequence[str]
) -> tokenizers.Tokenizer:
    tokenizer = _untrained()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[_UNKNOWN, *first_tokens],
        continuing_subword_prefix=_WITHIN,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

"""The built-in encoder: a weighted bag of sub-word embeddings, fast on a few CPU cores."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F

from ngame.data.tokens import Tokens
from ngame.encoders.base import Encoder
from ngame.encoders.modules import Module, write_modules
from ngame.files import atomic_write, read_json, reading, write_json, write_tensors
from ngame.progress import Progress
from ngame.transfer import sent

_UNKNOWN, _CONTINUATION = "[UNK]", "##"
# The tokenizer's results take a hundred bytes a token until they are plain numbers.
_TEXTS_PER_CHUNK = 1024
# Before it is tokenized, a text is cut after so many characters for each token that is read: three
# times the length of a usual token with its space, so that as good as always enough is left.
_CHARACTERS_PER_TOKEN = 16
# More texts than this cost memory and do not improve the vocabulary: every n-th text is used then.
_MAX_TEXTS_TO_FIT = 1_000_000
# The default vocabulary has one sub-word per 64 words of text, within these limits. A larger one
# memorises rare words.
_WORDS_PER_SUBWORD, _MIN_VOCABULARY, _MAX_VOCABULARY = 64, 1500, 30_000


class BagEncoder(Encoder):
    """Sum of token embeddings, scaled to a fixed length, then residual layers.

    The tokens of a text are its sub-words (byte-pair encoding, learnt on the training texts). The
    length of a token's embedding is its weight in the sum: it starts from the inverse document
    frequency and is learnt.

    Create one with `fit`, or read one from a folder with `load`.

    Attributes
    ----------
    dim : int
        Width of the vectors.
    max_length : int
        Number of tokens of a text that are read.
    embedding : torch.nn.EmbeddingBag
        One row per token, with sparse gradients.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        dim: int,
        layers: int,
        dropout: float = 0.0,
        max_length: int = 512,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.dropout = dropout
        self.max_length = max_length
        self.tokenizer = tokenizer
        tokenizer.enable_truncation(max_length)
        self.embedding = torch.nn.EmbeddingBag(
            tokenizer.get_vocab_size(),
            dim,
            mode="sum",
            sparse=True,
            include_last_offset=True,
            # `fit` draws all weights and `load` reads them. For weights of its own on the meta
            # device PyTorch would import its compiler, which takes seconds.
            _weight=torch.empty(tokenizer.get_vocab_size(), dim),
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
        max_length: int = 512,
        seed: int = 0,
    ) -> "BagEncoder":
        """Train the tokenizer on `texts` and draw the initial weights.

        Parameters
        ----------
        texts : texts of the training points and of the labels
        dim : width of the vectors
        layers : number of residual layers
        dropout : share of a text's tokens that training mode drops at random
        vocab_size : maximum number of sub-words; 0 derives it from the amount of text
        max_length : number of tokens of a text that are read, from its start
        seed : seed of the initial weights

        Raises
        ------
        ValueError
            `texts` is empty.
        """
        if len(texts) == 0:
            raise ValueError("texts is empty, expected at least one text")
        texts = texts[:: -(-len(texts) // _MAX_TEXTS_TO_FIT)]
        texts = [text[: max_length * _CHARACTERS_PER_TOKEN] for text in texts]
        if vocab_size == 0:
            words = sum(len(text.split()) for text in texts)
            vocab_size = min(max(words // _WORDS_PER_SUBWORD, _MIN_VOCABULARY), _MAX_VOCABULARY)
        tokenizer = _train_tokenizer(texts, vocab_size)
        encoder = cls(tokenizer, dim=dim, layers=layers, dropout=dropout, max_length=max_length)
        encoder.initialize(encoder.tokenize(texts), seed)
        return encoder

    @torch.no_grad()
    def initialize(self, tokens: Tokens, seed: int) -> None:
        """Draw the initial weights, scaled by the inverse document frequencies of some texts."""
        generator = torch.Generator().manual_seed(seed)
        rows = self.embedding.num_embeddings
        document = np.repeat(np.arange(len(tokens)), tokens.lengths)
        # Document frequency: each (text, token) pair counts once.
        pairs = np.unique(document * rows + tokens.ids)
        frequency = np.bincount(pairs % rows, minlength=rows)
        # Always above 0: a text that has only the commonest tokens must not become a zero vector.
        idf = torch.from_numpy(np.log((2 + len(tokens)) / (1 + frequency))).float()
        self.embedding.weight.normal_(0, 1 / math.sqrt(self.dim), generator=generator)
        self.embedding.weight.mul_((idf / idf.mean())[:, None])
        for layer in self.layers:
            inner, _, outer = cast(Any, layer)
            inner.weight.normal_(0, 1 / math.sqrt(self.dim), generator=generator)
            inner.bias.zero_()
            # Zero output weights: with its residual connection the layer starts as the identity.
            outer.weight.zero_()
            outer.bias.zero_()

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Texts to the ids of their first `max_length` sub-words.

        Raises
        ------
        TypeError
            `texts` is a single string, or holds something other than strings.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a str, expected a sequence of them")
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {row} is a {type(text).__name__}, expected a str")
        characters = self.max_length * _CHARACTERS_PER_TOKEN
        starts = range(0, len(texts), _TEXTS_PER_CHUNK)
        return Tokens.concatenate(
            Tokens.from_lists(
                encoding.ids
                for encoding in self.tokenizer.encode_batch_fast(
                    [text[:characters] for text in texts[start : start + _TEXTS_PER_CHUNK]]
                )
            )
            for start in Progress("tokenizing", len(starts), "chunk").over(starts)
        )

    def forward(self, tokens: Tokens) -> torch.Tensor:
        """Tokens of n texts to vectors of shape [n, dim]."""
        device = self.embedding.weight.device
        if self.training and self.dropout > 0:
            tokens = _drop_tokens(tokens, self.dropout)
        offsets = sent(torch.from_numpy(tokens.offsets), device)
        if self.training:
            # Each embedding is gathered once, so autograd sums its gradients. The sparse optimizer
            # would otherwise have to sort and sum one gradient per token.
            unique, inverse = np.unique(tokens.ids, return_inverse=True)
            used = sent(torch.from_numpy(unique), device)
            rows = F.embedding(used, self.embedding.weight, sparse=True)
            ids = sent(torch.from_numpy(inverse), device)
            x = F.embedding_bag(ids, rows, offsets, mode="sum", include_last_offset=True)
        else:
            ids = sent(torch.from_numpy(np.asarray(tokens.ids)), device)
            x = self.embedding(ids.long(), offsets)
        return self._through_layers(x)

    def padded(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The vectors of `forward`, for padded texts.

        Parameters
        ----------
        ids : int64 [n, longest]
        mask : bool [n, longest]
            False where a text is over.
        """
        return self._through_layers(
            (F.embedding(ids, self.embedding.weight) * mask[..., None]).sum(1)
        )

    def _through_layers(self, x: torch.Tensor) -> torch.Tensor:
        x = F.normalize(x, dim=1) * self._length
        for layer in self.layers:
            x = x + layer(x)
        return x

    def save(self, folder: Path) -> None:
        """Write config.json, tokenizer.json and model.safetensors, in sentence-transformers layout.

        ``SentenceTransformer(folder)`` loads it and computes the same vectors, scaled to length 1.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / "tokenizer.json") as aside:
            self.tokenizer.save(str(aside))
        tensors = dict(self.state_dict())
        write_tensors(folder / "model.safetensors", tensors)
        write_json(
            folder / "config.json",
            {
                "dim": self.dim,
                "layers": len(self.layers),
                "dropout": self.dropout,
                "max_length": self.max_length,
            },
        )
        # StaticEmbedding reads the tokenizer and the embedding above. It takes the mean, which
        # Normalize makes the same as the sum.
        layers = [
            module
            for place, layer in enumerate(self.layers)
            for module in _as_dense(layer, scale=1 if place else self._length)
        ]
        modules = [Module("StaticEmbedding"), Module("Normalize"), *layers]
        write_modules(folder, [*modules, Module("Normalize")] if layers else modules)

    @property
    def _length(self) -> float:
        """Length of a vector before the layers."""
        return math.sqrt(self.dim) / 2

    @classmethod
    def load(cls, folder: Path) -> "BagEncoder":
        """Read what `save` wrote."""
        settings = read_json(folder / "config.json")
        with reading(folder / "tokenizer.json"):
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        with reading(folder / "config.json"), torch.device("meta"):
            encoder = cls(tokenizer, **settings)
        with reading(folder / "model.safetensors"):
            tensors = safetensors.torch.load_file(folder / "model.safetensors")
            encoder.load_state_dict(tensors, assign=True)
        return encoder


@torch.no_grad()
def _as_dense(layer: torch.nn.Module, scale: float) -> tuple[Module, Module]:
    """The layer with its residual connection, ``z + layer(z)`` of ``z = scale * x``, as two Dense.

    The first passes on z and -z beside the inner units, the second adds them up: the exact GELU has
    GELU(z) - GELU(-z) = z.
    """
    inner, _, outer = cast(Any, layer)
    inner_weight, outer_weight = inner.weight.cpu(), outer.weight.cpu()
    dim = len(outer_weight)
    one, none = torch.eye(dim), torch.zeros(2 * dim)
    first = {
        "linear.weight": scale * torch.cat([inner_weight, one, -one]),
        "linear.bias": torch.cat([inner.bias.cpu(), none]),
    }
    second = {
        "linear.weight": torch.cat([outer_weight, one, -one], dim=1),
        "linear.bias": outer.bias.cpu(),
    }
    return _dense(first, "activation.GELU"), _dense(second, "linear.Identity")


def _dense(weights: dict[str, torch.Tensor], activation: str) -> Module:
    outputs, inputs = weights["linear.weight"].shape
    settings = {
        "in_features": inputs,
        "out_features": outputs,
        "bias": True,
        "activation_function": f"torch.nn.modules.{activation}",
    }
    return Module("Dense", settings, weights)


def _drop_tokens(tokens: Tokens, dropout: float) -> Tokens:
    """Drop tokens at random; a text that would lose all its tokens keeps all of them."""
    keep = torch.rand(len(tokens.ids)).numpy() >= dropout
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    emptied = kept_before[tokens.offsets[1:]] == kept_before[tokens.offsets[:-1]]
    keep |= np.repeat(emptied, tokens.lengths)
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    return Tokens(tokens.ids[keep], kept_before[tokens.offsets])


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    # The trainer numbers continuation letters in hash-table order, which differs from process to
    # process, and breaks ties by number. So a first pass collects these letters, of each word once,
    # and the second gets them in a fixed order.
    words = {word for text in texts for word in text.split()}
    alphabet = _fit_bpe(words, 0, []).get_vocab()
    letters = sorted(letter for letter in alphabet if letter.startswith(_CONTINUATION))
    model = json.loads(_fit_bpe(texts, vocab_size, letters).to_str())["model"]
    # In the trained tokenizer these letters are special tokens, which are never split. Build a
    # tokenizer without special tokens from the same model.
    return _new_tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        continuing_subword_prefix=_CONTINUATION,
    )


def _new_tokenizer(**model: Any) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=_UNKNOWN, **model))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def _fit_bpe(
    texts: Iterable[str], vocab_size: int, first_tokens: Sequence[str]
) -> tokenizers.Tokenizer:
    tokenizer = _new_tokenizer()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[_UNKNOWN, *first_tokens],
        continuing_subword_prefix=_CONTINUATION,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

"""The embedded encoder: a bag of sub-word and word n-gram embeddings, fast on a few CPU cores."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F

from ngame.files import replacing, write_json
from ngame.tokens import Tokens

_UNKNOWN = "[UNK]"
_TEXTS_AT_ONCE = 8192
# More texts than this teach the vocabulary nothing new but cost memory: a regular sample is taken.
_TEXTS_TO_FIT = 1_000_000
_SEPARATE = np.uint64(0x9E3779B97F4A7C15)


class BagEncoder(torch.nn.Module):
    """Sum of token embeddings, length-normalised, then residual layers.

    The tokens of a text are its sub-words (byte-pair encoding), its words that are more than one
    sub-word, and its pairs of adjacent words, as far as the training texts hold them often
    enough. The size of a token's embedding is its weight in the sum: it starts from the inverse
    document frequency and is learnt.

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
        ngrams: npt.NDArray[np.uint64],
        *,
        dim: int,
        layers: int,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.tokenizer = tokenizer
        self._ngrams = ngrams
        self.embedding = torch.nn.EmbeddingBag(
            tokenizer.get_vocab_size() + len(ngrams),
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
        vocab_size: int = 30_000,
        ngram_min_count: int = 3,
        max_ngrams: int = 500_000,
        seed: int = 0,
    ) -> "BagEncoder":
        """Train the tokenizer and collect the word n-grams of `texts`; weights start at random.

        Parameters
        ----------
        texts : the texts of the training points and of the labels
        dim : width of the vectors
        layers : number of residual layers
        vocab_size : number of sub-words at most
        ngram_min_count : how often a word or a pair of words must occur to get an embedding
        max_ngrams : number of them at most; the most frequent stay
        seed : of the initial weights

        Raises
        ------
        ValueError
            There is no text.
        """
        if len(texts) == 0:
            raise ValueError("texts is empty, expected at least one text")
        texts = texts[:: -(-len(texts) // _TEXTS_TO_FIT)]
        tokenizer = _train_tokenizer(texts, vocab_size)
        found = [hashes for _, _, hashes, _ in _analyse(tokenizer, texts)]
        hashes, counts = np.unique(np.concatenate(found), return_counts=True)
        often = np.flatnonzero(counts >= ngram_min_count)
        if len(often) > max_ngrams:
            often = np.sort(often[np.argsort(-counts[often], kind="stable")[:max_ngrams]])
        encoder = cls(tokenizer, hashes[often], dim=dim, layers=layers)
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
        idf = torch.from_numpy(np.log((1 + len(texts)) / (1 + frequency))).float()
        self.embedding.weight.normal_(0, 1 / math.sqrt(self.dim), generator=generator)
        self.embedding.weight.mul_((idf / idf.mean())[:, None])
        for layer in self.layers:
            inner, _, outer = layer
            inner.weight.normal_(0, 1 / math.sqrt(self.dim), generator=generator)
            inner.bias.zero_()
            # A layer begins as the identity.
            outer.weight.zero_()
            outer.bias.zero_()

    def tokenize(
        self, texts: Sequence[str], progress: Callable[[int], None] | None = None
    ) -> Tokens:
        """Texts to ids of sub-words and known word n-grams; `progress` hears of texts done."""
        first_ngram = self.tokenizer.get_vocab_size()
        parts = []
        for ids, lengths, hashes, hash_texts in _analyse(self.tokenizer, texts):
            places = np.searchsorted(self._ngrams, hashes)
            known = np.zeros(len(hashes), bool)
            inside = places < len(self._ngrams)
            known[inside] = self._ngrams[places[inside]] == hashes[inside]
            text = np.concatenate([np.repeat(np.arange(len(lengths)), lengths), hash_texts[known]])
            ids = np.concatenate([ids, (places[known] + first_ngram).astype(np.int32)])
            offsets = np.zeros(len(lengths) + 1, np.int64)
            np.cumsum(np.bincount(text, minlength=len(lengths)), out=offsets[1:])
            parts.append(Tokens(ids[np.argsort(text, kind="stable")], offsets))
            if progress is not None:
                progress(len(lengths))
        return Tokens.concatenate(parts)

    def forward(self, tokens: Tokens) -> torch.Tensor:
        """Tokens of n texts to vectors of shape [n, dim]."""
        device = self.embedding.weight.device
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
        with replacing(folder / "tokenizer.json") as aside:
            self.tokenizer.save(str(aside))
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        # As int64: the format's unsigned types are not known to every reader of it.
        tensors["ngrams"] = torch.from_numpy(self._ngrams.view(np.int64))
        with replacing(folder / "model.safetensors") as aside:
            safetensors.torch.save_file(tensors, aside)
        write_json(folder / "config.json", {"dim": self.dim, "layers": len(self.layers)})

    @classmethod
    def load(cls, folder: Path) -> "BagEncoder":
        """Read what `save` wrote."""
        shape = json.loads((folder / "config.json").read_text(encoding="utf8"))
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        ngrams = tensors.pop("ngrams").numpy().view(np.uint64)
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        with torch.device("meta"):
            encoder = cls(tokenizer, ngrams, dim=shape["dim"], layers=shape["layers"])
        encoder.load_state_dict(tensors, assign=True)
        return encoder


def _train_tokenizer(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=_UNKNOWN))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[_UNKNOWN],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Spread the bits of 64-bit integers (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _analyse(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str]
) -> Iterator[
    tuple[
        npt.NDArray[np.int32],
        npt.NDArray[np.int64],
        npt.NDArray[np.uint64],
        npt.NDArray[np.int64],
    ]
]:
    """Chunk by chunk: sub-word ids, their number in each text, n-gram hashes, the text of each.

    The n-grams of a text are its words of more than one sub-word and its pairs of adjacent words,
    each known by a 64-bit hash of sub-word ids.
    """
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        encodings = tokenizer.encode_batch(texts[start : start + _TEXTS_AT_ONCE])
        lengths = np.fromiter((len(e) for e in encodings), np.int64, len(encodings))
        total = int(lengths.sum())
        ids = np.fromiter(itertools.chain.from_iterable(e.ids for e in encodings), np.int32, total)
        word = np.fromiter(
            itertools.chain.from_iterable(e.word_ids for e in encodings), np.int64, total
        )
        if total == 0:
            yield ids, lengths, np.empty(0, np.uint64), np.empty(0, np.int64)
            continue
        text = np.repeat(np.arange(len(lengths)), lengths)
        begins = np.ones(total, bool)
        begins[1:] = (word[1:] != word[:-1]) | (text[1:] != text[:-1])
        first = np.flatnonzero(begins)
        sub_words = np.diff(first, append=total)
        place = np.arange(total) - np.repeat(first, sub_words)
        with np.errstate(over="ignore"):
            mixed = _mixed((ids.astype(np.uint64) + np.uint64(1)) * _SEPARATE + place.view(np.uint64))
            words = _mixed(np.add.reduceat(mixed, first))
            pairs = _mixed(words[:-1] * np.uint64(3) + words[1:])
        word_text = text[first]
        long = sub_words > 1
        adjacent = word_text[1:] == word_text[:-1]
        yield (
            ids,
            lengths,
            np.concatenate([words[long], pairs[adjacent]]),
            np.concatenate([word_text[long], word_text[1:][adjacent]]),
        )

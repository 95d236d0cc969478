"""A Hugging Face transformer as an encoder, saved in sentence-transformers layout."""

import importlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ngame.data.tokens import Tokens
from ngame.encoders.base import Encoder
from ngame.encoders.encode import evaluating
from ngame.encoders.modules import Module, write_modules
from ngame.files import write_json
from ngame.transfer import sent

# Texts tokenized per call: enough to keep the tokenizer's threads busy, few enough that the Python
# lists of ids take little memory.
_TEXTS_PER_CHUNK = 4096

LENGTH_FILE = "sentence_bert_config.json"

# On a GPU texts are padded to a multiple of this, which its kernels like best.
_LENGTH_STEP = 8
# A further call of the model there costs the host as much time as so many tokens of width 1 cost
# the GPU, whose work grows with the square of the width: 16,384 tokens at a width of 384.
_TOKENS_PER_CALL = 16_384 * 384**2
# Without cuDNN's attention, which PyTorch prefers on an H100: cuDNN makes a new plan for every new
# pair of batch size and length, and no two batches of texts are alike. A step of MiniLM on 64 texts
# took 208 ms that way, 10 of which the GPU worked.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class TransformerEncoder(Encoder):
    """Mean of the last hidden states of a pretrained transformer; an `Encoder`.

    The vector of a text is the mean over its tokens, special ones included. Other pooling, prompts
    and further layers of a sentence-transformers model are ignored. A new encoder is in evaluation
    mode, like a model of transformers: call ``train()`` before training.

    Parameters
    ----------
    model : str or path
        A transformers or sentence-transformers model with a fast tokenizer: its name on the
        Hugging Face hub, or a local folder. Encoder-decoder models are not supported.
    max_length : int
        Texts are truncated to this many tokens, special ones included.
    bf16 : bool, optional
        Run the transformer in bfloat16 autocast; weights, pooling and result stay float32. The
        default is true on CUDA devices with bfloat16, else false.

    Attributes
    ----------
    dim : int
        Width of the vectors.
    max_length : int
        As given.

    Raises
    ------
    ImportError
        The package transformers is not installed.
    OSError
        There is no such model, or its configuration cannot be read.
    ValueError
        The model is an encoder-decoder or has no fast tokenizer; or `max_length` is too small for
        one token beside the special ones, or longer than the model supports.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        max_length: int = 128,
        bf16: bool | None = None,
    ) -> None:
        super().__init__()
        transformers = _transformers()
        name = os.fspath(model)
        try:
            config = transformers.AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:  # their messages may not name the model
            raise OSError(f"model {name} cannot be read: {error}") from error
        if config.is_encoder_decoder:
            raise ValueError(f"model {name} is an encoder-decoder, expected an encoder-only model")
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name)
        if not self.tokenizer.is_fast:
            raise ValueError(f"model {name} has no fast tokenizer")
        shortest = self.tokenizer.num_special_tokens_to_add() + 1
        longest = self.tokenizer.model_max_length
        longest = min(longest, getattr(config, "max_position_embeddings", None) or longest)
        with _progress_bars(sys.stderr.isatty()):
            # Half-precision checkpoints are trained in float32 too: weights in half precision
            # would round small updates away.
            self.model: Any = transformers.AutoModel.from_pretrained(name).float()
        longest = min(longest, _positions(self.model))
        if not shortest <= max_length <= longest:
            raise ValueError(
                f"max_length is {max_length}, model {name} takes {shortest} to {longest} tokens"
            )
        self.dim = int(config.hidden_size)
        self.max_length = max_length
        self._longest = longest
        self._adds_masks: bool | None = None
        self._bf16 = bf16
        self.eval()

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Texts to token ids, special tokens included, truncated to `max_length`.

        Raises
        ------
        TypeError
            `texts` is a single string, or holds something other than strings.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a str, expected a sequence of them")
        return Tokens.concatenate(
            self._tokenize(list(texts[start : start + _TEXTS_PER_CHUNK]), start)
            for start in range(0, len(texts), _TEXTS_PER_CHUNK)
        )

    def _tokenize(self, texts: list[str], start: int) -> Tokens:
        for row, text in enumerate(texts, start):
            if not isinstance(text, str):
                raise TypeError(f"text {row} is a {type(text).__name__}, expected a str")
        encoded = self.tokenizer(
            texts,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return Tokens.from_lists(encoded["input_ids"])

    def forward(self, tokens: Tokens) -> torch.Tensor:
        """Tokens of n texts to vectors, float32 [n, dim], on the device of the parameters."""
        device = self.model.device
        if not len(tokens):
            return torch.zeros(0, self.dim, device=device)
        if device.type == "cuda":
            return self._by_length(tokens)
        ids, mask = self._pad(tokens, max(1, tokens.lengths.max()))
        return self.padded(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))

    def _by_length(self, tokens: Tokens) -> torch.Tensor:
        """The vectors of `forward`, from as many calls of the model as save time on a GPU."""
        device = self.model.device
        # A text without tokens counts as one padding token: the mean over none would be NaN.
        lengths = np.maximum(tokens.lengths, 1)
        padded = -(-lengths // _LENGTH_STEP) * _LENGTH_STEP
        padded = np.maximum(np.minimum(padded, self._longest).astype(np.int64), lengths)
        order = np.argsort(-padded, kind="stable")
        if self._adds_masks is None:
            self._adds_masks = self._takes_added_masks()
        vectors = []
        # One context for all: autocast then converts each weight once.
        with self._precision(device):
            for group in groups(padded[order], _TOKENS_PER_CALL // self.dim**2):
                rows = np.sort(order[group])
                order[group] = rows
                ids, mask = self._pad(tokens.take(rows), padded[rows].max())
                there = sent(torch.from_numpy(mask), device)
                attended = None if mask.all() else self._attended(there)
                vectors.append(self._means(sent(torch.from_numpy(ids), device), there, attended))
        if len(vectors) == 1:
            return vectors[0]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return torch.cat(vectors).index_select(0, sent(torch.from_numpy(place), device))

    def _pad(
        self, tokens: Tokens, longest: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Ids and mask of padded texts, [n, longest]."""
        lengths = tokens.lengths
        positions = np.arange(longest)
        ids = np.full((len(tokens), longest), self.tokenizer.pad_token_id or 0)
        ids[positions < lengths[:, np.newaxis]] = tokens.ids
        # A text without tokens counts as one padding token: the mean over none would be NaN.
        return ids, positions < np.maximum(lengths, 1)[:, np.newaxis]

    def padded(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The vectors of `forward`, for padded texts.

        Parameters
        ----------
        ids : int64 [n, longest]
        mask : bool [n, longest]
            False where a text is over; true at least once a text.
        """
        return self._means(ids, mask, mask.long())

    def _means(
        self, ids: torch.Tensor, mask: torch.Tensor, attended: torch.Tensor | None
    ) -> torch.Tensor:
        """Means over the tokens of padded texts; `attended` is the model's attention mask."""
        on_gpu = ids.device.type == "cuda"
        attention = sdpa_kernel(_ATTENTION) if on_gpu else nullcontext()
        with self._precision(ids.device), attention:
            hidden = self.model(input_ids=ids, attention_mask=attended).last_hidden_state
        sums: torch.Tensor = (hidden.float() * mask.unsqueeze(-1)).sum(1)
        return sums / mask.sum(1, keepdim=True)

    def _attended(self, mask: torch.Tensor) -> torch.Tensor:
        """The attention mask of padded texts for the model, made without waiting for the GPU.

        Given a mask [n, longest], transformers waits to learn whether anything is masked, and each
        layer makes scores of it. Most models take the scores as well.
        """
        return self._added(mask) if self._adds_masks else mask.long()

    def _added(self, mask: torch.Tensor) -> torch.Tensor:
        """What is added to the scores of attention, [n, 1, longest, longest]: -inf where masked."""
        bf16 = self._in_bf16(mask.device)
        added = torch.zeros_like(mask, dtype=torch.bfloat16 if bf16 else self.model.dtype)
        added.masked_fill_(~mask, -math.inf)
        return added[:, None, None, :].expand(-1, 1, mask.shape[1], -1)

    def _takes_added_masks(self) -> bool:
        """Whether the model gives the same vectors for what `_added` makes of a mask: tried out.

        At full length, since a model whose tokens see only their neighbours would see all.
        """
        device, length = self.model.device, self.max_length
        known = self.model.get_input_embeddings().weight.shape[0]
        ids = (torch.arange(2 * length, device=device) % known).reshape(2, length)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[1, length // 2 :] = False
        with evaluating(self.model):
            expected = self._means(ids, mask, mask.long())
            try:
                found = self._means(ids, mask, self._added(mask))
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                found = torch.full_like(expected, torch.nan)  # equal to nothing
            unmasked = self._means(ids, mask, None)
        # An autocast around all this would go on with weights converted without gradients.
        torch.clear_autocast_cache()
        error, without = (float((each - expected).abs().max()) for each in (found, unmasked))
        return without > 0 and error <= min(1e-3, without / 10)

    def _precision(self, device: torch.device) -> Any:
        # A disabled autocast would override an autocast of the caller; no context does not.
        if not self._in_bf16(device):
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def _in_bf16(self, device: torch.device) -> bool:
        if self._bf16 is None:
            return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return self._bf16

    def save(self, folder: Path) -> None:
        """Write the model in sentence-transformers layout.

        ``SentenceTransformer(folder)`` loads it and computes the same vectors, scaled to length 1.
        """
        with _progress_bars(False):
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / LENGTH_FILE, {"max_seq_length": self.max_length})
        # Fields that every version of sentence-transformers reads.
        pooling = {"word_embedding_dimension": self.dim, "pooling_mode_mean_tokens": True}
        write_modules(
            folder, [Module("Transformer"), Module("Pooling", pooling), Module("Normalize")]
        )

    @classmethod
    def load(cls, folder: Path, *, bf16: bool | None = None) -> Self:
        """Read what `save` wrote, with the saved `max_length`."""
        length = json.loads((folder / LENGTH_FILE).read_text(encoding="utf8"))["max_seq_length"]
        return cls(folder, max_length=length, bf16=bf16)


def groups(lengths: npt.NDArray[np.int64], call: int) -> list[slice]:
    """Cut texts, longest first, where it saves more padding than a call costs, in tokens."""
    found = []
    left = [slice(0, len(lengths))]
    while left:
        part = left.pop()
        own = lengths[part]
        # Tokens where the first n texts are padded apart from the others, by n - 1.
        first = np.arange(1, len(own))
        apart = first * own[0] + (len(own) - first) * own[1:]
        cut = int(apart.argmin()) + 1 if len(apart) else 0
        if cut and len(own) * own[0] - apart[cut - 1] > call:
            middle = part.start + cut
            left += [slice(middle, part.stop), slice(part.start, middle)]
        else:
            found.append(part)
    return found


def _positions(model: Any) -> float:
    """How many tokens a model has learnt positions for; infinity if it has no such table.

    In RoBERTa and its like positions begin behind the padding id, whose row of the table they keep
    as `padding_idx`, so that 514 rows serve 512 tokens.
    """
    embeddings = getattr(model, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if not isinstance(table, torch.nn.Embedding):
        return math.inf
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            'TransformerEncoder needs the package transformers: pip install "ngame[hf]"'
        ) from error


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    """Show or hide the progress bars of transformers, which appear in log files too."""
    logging = _transformers().utils.logging
    hide = not shown and logging.is_progress_bar_enabled()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()

"""A Hugging Face transformer as an encoder, saved in sentence-transformers layout."""

import importlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ngame.arrays import as_count
from ngame.data.tokens import Tokens
from ngame.encoders import lora
from ngame.encoders.base import Encoder
from ngame.encoders.encode import evaluating
from ngame.encoders.graphs import Graphs
from ngame.encoders.modules import POOLINGS, Module, pooling_module, pooling_of, write_modules
from ngame.files import read_json, write_json
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
    """The pooled last hidden states of a pretrained transformer; an `Encoder`.

    Encoders such as BERT and decoders such as Llama alike. Prompts and further layers of a
    sentence-transformers model are ignored. A new encoder is in evaluation mode, like a model of
    transformers: call ``train()`` before training.

    Parameters
    ----------
    model : str or path
        A transformers or sentence-transformers model with a fast tokenizer, or a LoRA adapter of
        one: its name on the Hugging Face hub, or a local folder. Encoder-decoder models are not
        supported.
    max_length : int
        Texts are truncated to this many tokens, special ones included.
    bf16 : bool, optional
        Run the transformer in bfloat16 autocast; the weights that are trained, pooling and result
        stay float32. With LoRA, true keeps the frozen weights of linear layers in bfloat16, which
        changes no vector. The default is autocast on CUDA devices with bfloat16, else float32.
    pooling : "mean", "last" or "cls", optional
        The vector of a text: the mean over its tokens, special ones included; or the vector of its
        last token, as usual for decoders; or that of its first. The default is what a
        sentence-transformers model says, else the mean.
    lora_rank : int
        If not 0, all weights are frozen, and each linear layer gets matrices of this rank to train
        (LoRA, arXiv 2106.09685), scaled by two. `state_dict` and `save` have these alone, and the
        model must stay where it is. An adapter that `model` names has its own rank.
    checkpointing : bool
        In training, compute the activations of each layer again in the backward pass, instead of
        keeping them: the same gradients, in less memory and more time.
    graphs : bool
        In training on a GPU, run a batch, or each part of one that is cut by length, as two CUDA
        graphs instead of kernel by kernel: the same gradients, in less time where the processor was
        what held the GPU up. A shape of texts takes longer when it is first met.
    seed : int
        Of the first values of the LoRA matrices.

    Attributes
    ----------
    dim : int
        Width of the vectors.
    max_length, pooling, lora_rank
        As given, or as found in `model`.
    in_one_call : bool
        Pad all texts of a call to the longest of them, on a GPU too, where texts of similar length
        otherwise are put together.

    Raises
    ------
    ImportError
        The package transformers is not installed, or with LoRA the package peft.
    OSError
        There is no such model, or its configuration cannot be read.
    ValueError
        The model is the bag encoder of a run or an encoder-decoder, has no fast tokenizer, pools in
        another way, or cannot compute activations again; `graphs` and `checkpointing` are both
        true; `max_length` is too small for one token beside the special ones, or longer than the
        model supports; or the adapter has another rank.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        max_length: int = 128,
        bf16: bool | None = None,
        pooling: str | None = None,
        lora_rank: int = 0,
        checkpointing: bool = False,
        graphs: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if graphs and checkpointing:
            raise ValueError("graphs and checkpointing are both true, expected at most one of them")
        transformers = _transformers()
        name = os.fspath(model)
        if os.path.isdir(name):
            name = os.path.abspath(name)  # an adapter keeps the name of its model
        if lora_rank:
            as_count(lora_rank, "lora_rank")
        base = name
        try:
            adapter = transformers.utils.find_adapter_config_file(name)
            if adapter is not None or lora_rank:
                lora.require_peft()
            if adapter is not None:
                base = lora.base_of(adapter)
            config = transformers.AutoConfig.from_pretrained(base)
        except (OSError, ValueError) as error:  # their messages may not name the model
            if _is_bag(name):
                raise ValueError(
                    f"{name} holds the bag encoder of a run, from which no other run can go on: "
                    "expected a transformer"
                ) from error
            of = "" if base == name else f", to which the adapter {name} belongs,"
            raise OSError(f"model {base}{of} cannot be read: {_absent(base)}{error}") from error
        if config.is_encoder_decoder:
            raise ValueError(f"model {base} is an encoder-decoder, expected one or the other")
        if pooling is None:
            pooling = _pooling(name) or _pooling(base) or "mean"
        if pooling not in POOLINGS:
            raise ValueError(f"pooling is {pooling!r}, expected one of {', '.join(POOLINGS)}")
        self.pooling = pooling
        beside = adapter is not None and _file(name, "tokenizer_config.json") is None
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base if beside else name)
        if not self.tokenizer.is_fast:
            raise ValueError(f"model {name} has no fast tokenizer")
        # As here, so for those who open what `save` writes. Decoders may have no token for it.
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            token = self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(0)
            self.tokenizer.add_special_tokens({"pad_token": token})
        shortest = self.tokenizer.num_special_tokens_to_add() + 1
        longest = self.tokenizer.model_max_length
        longest = min(longest, getattr(config, "max_position_embeddings", None) or longest)
        with _progress_bars(sys.stderr.isatty()):
            self.model: Any = transformers.AutoModel.from_pretrained(base)
            if adapter is not None:
                rank = lora.load(self.model, name)
                if lora_rank not in (0, rank):
                    raise ValueError(f"lora_rank is {lora_rank}, the adapter {name} has {rank}")
                lora_rank = rank
            elif lora_rank:
                lora.add(self.model, lora_rank, seed)
        self.lora_rank = lora_rank
        self.register_load_state_dict_post_hook(_without_frozen)  # type: ignore[no-untyped-call]
        if lora_rank and bf16:
            lora.in_half(self.model)
        else:
            # Half-precision checkpoints are trained in float32 too: weights in half precision
            # would round small updates away.
            self.model.float()
        # Of decoders: keys and values for tokens to come, of which there are none.
        self.model.config.use_cache = False
        longest = min(longest, _positions(self.model))
        if not shortest <= max_length <= longest:
            raise ValueError(
                f"max_length is {max_length}, model {name} takes {shortest} to {longest} tokens"
            )
        if checkpointing:
            self._enable_checkpointing()
        self.dim = int(config.hidden_size)
        self.max_length = max_length
        self._longest = longest
        self.in_one_call = False
        self._adds_masks: bool | None = None
        self._graphs = Graphs(_Padded(self), self.dim) if graphs else None
        self._bf16 = bf16
        self.eval()

    def _enable_checkpointing(self) -> None:
        model = self.model
        # The name since transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        # The second of the contexts is that of the second computation.
        enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), self._attention())})

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; with LoRA without the weights that are frozen."""
        state = super().state_dict(*args, **kwargs)
        for name in self._frozen():
            state.pop(kwargs.get("prefix", "") + name, None)
        return state

    def _frozen(self) -> list[str]:
        """Names of the parameters that LoRA froze."""
        names = [name for name, _ in self.named_parameters()] if self.lora_rank else []
        return [name for name in names if not lora.is_trained(name)]

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
        if device.type == "cuda" and not self.in_one_call:
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
        cuts = groups(padded[order], _TOKENS_PER_CALL // self.dim**2)
        rows = [np.sort(order[cut]) for cut in cuts]
        parts = [self._pad(tokens.take(own), padded[own].max()) for own in rows]
        replayed: list[torch.Tensor | None] = [None] * len(parts)
        # Before the precision below, in which a graph would not convert the weights anew.
        if self._graphs is not None and self._can_record(device):
            replayed = self._graphs(parts, self._longest)
        vectors = []
        # One context for all: autocast then converts each weight once.
        with self._precision(device):
            for (ids, mask), found in zip(parts, replayed, strict=True):
                if found is None:
                    there = sent(torch.from_numpy(mask), device)
                    attended = None if mask.all() else self._attended(there)
                    found = self._pooled(sent(torch.from_numpy(ids), device), there, attended)
                vectors.append(found)
        if len(vectors) == 1:
            return vectors[0]
        place = np.empty_like(order)
        place[np.concatenate(rows)] = np.arange(len(order))
        return torch.cat(vectors).index_select(0, sent(torch.from_numpy(place), device))

    def _can_record(self, device: torch.device) -> bool:
        """Whether a graph would do what the kernels one by one do."""
        in_training = self.training and not torch.is_inference_mode_enabled()
        # An autocast of the caller would not be recorded.
        return bool(in_training and self._adds_masks) and not torch.is_autocast_enabled(device.type)

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
        return self._pooled(ids, mask, mask.long())

    def _pooled(
        self, ids: torch.Tensor, mask: torch.Tensor, attended: torch.Tensor | None
    ) -> torch.Tensor:
        """The vectors of padded texts; `attended` is the model's attention mask."""
        with self._precision(ids.device), self._attention():
            hidden = self.model(input_ids=ids, attention_mask=attended).last_hidden_state
        if self.pooling == "mean":
            sums: torch.Tensor = (hidden.float() * mask.unsqueeze(-1)).sum(1)
            return sums / mask.sum(1, keepdim=True)
        # On whichever side a text is padded. `argmax` gives the first of several.
        places = mask.int()
        if self.pooling == "last":
            places = places * torch.arange(mask.shape[1], device=mask.device, dtype=torch.int32)
        rows = torch.arange(len(mask), device=mask.device)
        chosen: torch.Tensor = hidden[rows, places.argmax(1)]
        return chosen.float()

    def _attention(self) -> Any:
        on_gpu = self.model.device.type == "cuda"
        return sdpa_kernel(_ATTENTION) if on_gpu else nullcontext()

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
            expected = self._pooled(ids, mask, mask.long())
            try:
                found = self._pooled(ids, mask, self._added(mask))
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                found = torch.full_like(expected, torch.nan)  # equal to nothing
            unmasked = self._pooled(ids, mask, None)
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
        return takes_bf16(device) if self._bf16 is None else self._bf16

    def save(self, folder: Path) -> None:
        """Write the model in sentence-transformers layout; with LoRA, the adapter in peft's.

        ``SentenceTransformer(folder)`` loads it and computes the same vectors, scaled to length 1.
        """
        with _progress_bars(False):
            self.model.save_pretrained(folder)
        # Whether or not it has tokenized texts.
        self.tokenizer.backend_tokenizer.no_truncation()
        self.tokenizer.backend_tokenizer.no_padding()
        self.tokenizer.save_pretrained(folder)
        write_json(folder / LENGTH_FILE, {"max_seq_length": self.max_length})
        pooling = pooling_module(self.pooling, self.dim)
        write_modules(folder, [Module("Transformer"), pooling, Module("Normalize")])

    @classmethod
    def load(cls, folder: Path, *, bf16: bool | None = None) -> Self:
        """Read what `save` wrote, with the saved `max_length` and pooling."""
        length = json.loads((folder / LENGTH_FILE).read_text(encoding="utf8"))["max_seq_length"]
        return cls(folder, max_length=length, bf16=bf16)


class _Padded(torch.nn.Module):
    """An encoder of padded texts, which never waits for the GPU."""

    def __init__(self, encoder: TransformerEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """As `TransformerEncoder.padded`."""
        return self.encoder._pooled(ids, mask, self.encoder._added(mask))


def _without_frozen(encoder: TransformerEncoder, keys: Any) -> None:
    """Miss nothing that `TransformerEncoder.state_dict` leaves out."""
    frozen = tuple(encoder._frozen())
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(frozen)]


def takes_bf16(device: torch.device) -> bool:
    """Whether a transformer runs in bfloat16 there unless something else is asked for."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


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


def _pooling(name: str) -> str | None:
    """The pooling of a sentence-transformers model, a key of `POOLINGS`; None for another model."""
    modules = _file(name, "modules.json")
    if modules is None:
        return None
    for module in json.loads(modules.read_text("utf8")):
        if module["type"].rpartition(".")[2] == "Pooling":
            settings = _file(name, f"{module['path']}/config.json")
            if settings is not None:
                try:
                    return pooling_of(json.loads(settings.read_text("utf8")))
                except ValueError as error:
                    raise ValueError(f"model {name}: {error}: choose one") from None
    return None


def _absent(name: str) -> str:
    """That a model is in no folder; messages of transformers speak of the hub alone."""
    if os.path.isdir(name):
        return ""
    return "there is no such folder, and the Hugging Face hub gives none of that name: "


def _is_bag(name: str) -> bool:
    """Whether it is a folder of `BagEncoder.save` or of `Ensemble.save`."""
    for path in (Path(name, "config.json"), Path(name, "0", "config.json")):
        with suppress(OSError, ValueError):
            settings = read_json(path)
            return isinstance(settings, dict) and {"dim", "layers", "dropout"} <= settings.keys()
    return False


def _file(name: str, path: str) -> Path | None:
    """A file of a model on the Hugging Face hub or in a folder; None if it has no such file."""
    try:
        found = _transformers().utils.cached_file(name, path)
    except OSError:
        return None
    return None if found is None else Path(found)


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

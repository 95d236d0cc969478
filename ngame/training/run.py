"""A run: its folder, its encoder, and its data, split and tokenized."""

import hashlib
import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from ngame import _core
from ngame.arrays import as_pairs
from ngame.config import Config, EncoderConfig, differences
from ngame.data.dataset import Dataset
from ngame.data.self_pairs import drop_self_pairs
from ngame.data.tokens import Tokens
from ngame.encoders.bag import BagEncoder
from ngame.encoders.base import Encoder, as_encoder
from ngame.encoders.encode import encode
from ngame.encoders.ensemble import Ensemble
from ngame.encoders.load import load_encoder
from ngame.encoders.transformer import TransformerEncoder, takes_bf16
from ngame.encoders.vectors import Vectors, core_device, to_device, torch_device
from ngame.files import (
    atomic_folder,
    atomic_write,
    is_leftover,
    lock_file,
    read_json,
    reading,
    remove_leftovers,
    write_json,
)
from ngame.prediction.hnsw import require_hnswlib
from ngame.ranks import Ranks
from ngame.training.checkpoint import Checkpoint
from ngame.training.shards import shard, unshard, whole
from ngame.training.stop import Stop

if TYPE_CHECKING:
    from ngame.training.stage import Stage

# First word of each spawn key: gives every part of a run a random stream of its own.
HELD_OUT, ENCODER, CLASSIFIER = range(3)
# Tokens of a text that are read by default. A bag reads more than a transformer, whose work and
# memory a token costs; the rest of a long text costs a bag memory and adds little.
_BAG_LENGTH, _TRANSFORMER_LENGTH = 512, 128

_LOCK = "run.lock"
_FREE = ("checkpoint_minutes", "threads", "device")
"""Settings that a run may be resumed with others of: they say how it is computed, not what."""


@dataclass(frozen=True, slots=True)
class Truth:
    """The labels of n points, two CSR matrices [n, L]."""

    targets: sp.csr_matrix
    """Positives to train on."""
    known: sp.csr_matrix
    """Labels that are never negatives: the targets and the dropped pairs."""

    @classmethod
    def of(cls, labels: sp.csr_matrix, drop: npt.NDArray[np.int64] | None) -> "Truth":
        """Labels without the (point, label) pairs to drop, int64 [pairs, 2]."""
        if drop is None or len(drop) == 0:
            return cls(labels, labels)
        pairs = as_pairs(drop, "drop_train", labels.shape).astype(np.float32)
        targets = sp.csr_matrix(labels - labels.multiply(pairs))
        targets.eliminate_zeros()
        known = sp.csr_matrix(targets + pairs)
        for matrix in (targets, known):
            matrix.sort_indices()
            matrix.data[:] = 1
        return cls(targets, known)

    def take(self, rows: npt.NDArray[np.int64]) -> "Truth":
        """The labels of some points."""
        targets = self.targets[rows]
        return Truth(targets, targets if self.known is self.targets else self.known[rows])

    @property
    def dropped(self) -> sp.csr_matrix:
        """The dropped pairs."""
        pairs = sp.csr_matrix(self.known - self.targets)
        pairs.eliminate_zeros()
        return pairs


@dataclass(frozen=True, slots=True)
class Points:
    """Some points of the data set: their rows among its training points (or, if they are held out
    and it has its own, among its validation points), texts and labels."""

    rows: npt.NDArray[np.int64]
    tokens: Tokens
    truth: Truth


class Run:
    """What both stages share: data, encoder, checkpoint and log.

    Attributes
    ----------
    ranks : the processes that train together; only rank 0 writes into `folder`
    dataset : the data, with the pairs to leave out that `Config.self_pairs` asks for
    device : where the encoder and the classifier are trained
    core_device : where vectors are clustered and searched; None is the host, as always where
        several processes train
    labels : tokens of the label texts
    points, held_out : the points to train on, and those to validate and fit the fusion on: the
        data set's validation points if it has any, else some of its training points
    rows : rows of the training points among both, ascending
    all_truth : the labels of `rows`
    log : one dictionary per epoch
    about : versions, name and path of the data, and seconds of the parts of the run outside its
        epochs; written as ``run.json``
    stop : lets signals end the run between two updates
    stage : the stage in progress, whose state is worth saving
    """

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        folder: Path | None,
        resume: bool,
        encoder: torch.nn.Module | None,
    ) -> None:
        if config.self_pairs == "drop":
            dataset, _ = drop_self_pairs(dataset)
        self.ranks = Ranks.all()
        self.dataset = dataset
        self.config = config
        if self.ranks.size > 1 and config.threads == 0:
            # The processes of a machine share its CPUs.
            local = int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks.size))
            self.config = replace(config, threads=max(1, _core.usable_cpus() // local))
        self.device = torch_device(config.device)
        self.core_device = None
        if self.ranks.size == 1:
            self.core_device = core_device(self.device, config.prediction.search)
        if config.prediction.search == "hnsw":
            require_hnswlib()
        checked = None if encoder is None else as_encoder(encoder)
        truth = Truth.of(dataset.train_labels, dataset.drop_train)
        val = None
        if dataset.val_texts is not None:
            val = Truth.of(dataset.val_labels, dataset.drop_val)
        trained, held_out = split_held_out(truth, config, val)
        # Last of the checks: an error in settings or data must leave no folder behind.
        self._lock: IO[str] | None = None
        self.folder = folder if self.ranks.rank == 0 else None
        there, begun = folder is not None and folder.exists(), True
        if self.folder is not None:
            self._lock, begun = _prepare_folder(self.folder, config, dataset, resume)
        try:
            self.stop = Stop(self.ranks)
            self.stage: Stage | None = None
            self.log: list[dict[str, Any]] = []
            self.checkpoint = Checkpoint(
                folder / "checkpoint" if folder is not None else None, config.checkpoint_minutes
            )
            self.about = _about(dataset, self.folder)
            texts, own = self._read_texts(checked, folder)
            self._share_encoder(made=checked is None)
            self.rows = trained
            if val is None:
                self.rows = np.sort(np.concatenate([trained, held_out]))
            self.all_truth = truth.take(self.rows)
            self.points = Points(trained, texts.take(trained), truth.take(trained))
            self.held_out = Points(held_out, own.take(held_out), (val or truth).take(held_out))
        except BaseException as error:
            # An error that resuming cannot mend must leave no folder behind either.
            passing = not isinstance(error, Exception) or isinstance(error, OSError | MemoryError)
            if self.folder is not None and not begun and not passing:
                _abandon(self.folder, keep=there)
            self.close()
            raise

    def _read_texts(self, encoder: Encoder | None, folder: Path | None) -> tuple[Tokens, Tokens]:
        """Make the encoder if none is given; tokenize the labels, the training points and those
        that some are held out from, and return these two."""
        dataset = self.dataset
        # The others read what rank 0 wrote.
        with self.ranks.first(), self.timed("tokenizing"):
            if encoder is None:
                encoder = _make_encoder(dataset, self.config, folder, self.device)
            self.encoder = encoder
            self.encoder.to(self.device)
            texts = _tokenize(self.encoder, dataset.train_texts, folder, "points")
            self.labels = _tokenize(self.encoder, dataset.label_texts, folder, "labels")
            if dataset.val_texts is None:
                return texts, texts
            return texts, _tokenize(self.encoder, dataset.val_texts, folder, "validation")

    def _share_encoder(self, *, made: bool) -> None:
        """Give all ranks the same encoder, or a share of its weights each if it was made here."""
        self.ranks.synchronize(self.encoder)
        self._empty: TransformerEncoder | None = None
        shared = made and self.config.encoder.shard and self.ranks.size > 1
        if shared and isinstance(self.encoder, TransformerEncoder):
            self._empty = shard(self.encoder, self.ranks)

    def close(self) -> None:
        """Let other processes use the folder."""
        if self._lock is not None:
            self._lock.close()

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of the block to those of a part of the run, and write ``run.json``."""
        started = time.monotonic()
        yield
        spent = self.about["seconds"]
        spent[part] = round(spent.get(part, 0) + time.monotonic() - started, 2)
        if self.folder is not None:
            write_json(self.folder / "run.json", self.about)

    def unshard_encoder(self) -> None:
        """Give rank 0 an encoder with all weights, if the ranks share them; the others are done."""
        if self._empty is not None:
            self.encoder = unshard(self.encoder, self._empty, self.ranks)

    def encode(
        self, tokens: Tokens, *, unit: bool = False, dtype: torch.dtype = torch.float32
    ) -> Vectors:
        """Vectors of texts by the encoder as it is now. All ranks must call it together."""
        with whole(self.encoder):
            return encode(self.encoder, tokens, device=self.core_device, unit=unit, dtype=dtype)

    def own(self, tokens: Tokens) -> Tokens:
        """This rank's share of some texts."""
        return tokens if self.ranks.size == 1 else tokens.part(self.ranks.share(len(tokens)))

    def gather(self, vectors: Vectors, rows: int) -> Any:
        """All ranks' vectors on rank 0, None on the others; `rows` are those of all."""
        if self.ranks.size == 1:
            return vectors
        whole = self.ranks.gather(torch.as_tensor(vectors), self.ranks.counts(rows))
        return None if whole is None else to_device(whole, self.core_device)

    def held_out_texts(self) -> list[str]:
        """Texts of the held-out points."""
        own = self.dataset.val_texts
        texts = self.dataset.train_texts if own is None else own
        return [texts[row] for row in self.held_out.rows]

    def write_log(self) -> None:
        """Write ``log.jsonl``, one epoch a line."""
        if self.folder is not None:
            with atomic_write(self.folder / "log.jsonl") as aside:
                lines = (json.dumps(entry) + "\n" for entry in self.log)
                aside.write_text("".join(lines), encoding="utf8")


def split_held_out(
    truth: Truth, config: Config, val: Truth | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows to train on and rows held out, both sorted: of the points that have a label.

    The latter are rows of the validation points, if their labels `val` are given.
    """
    labelled = np.flatnonzero(np.diff(truth.targets.indptr))
    missing = truth.targets.shape[0] - len(labelled)
    if missing:
        warnings.warn(
            f"{missing} of {truth.targets.shape[0]} training points have no label and are dropped",
            stacklevel=4,
        )
    if len(labelled) < 2:
        raise ValueError(f"{len(labelled)} training points have a label, expected at least 2")
    seeds = np.random.SeedSequence(config.seed, spawn_key=(HELD_OUT,))
    rng = np.random.default_rng(seeds)
    if val is not None:
        shuffled = rng.permutation(np.flatnonzero(np.diff(val.targets.indptr)))
        if not len(shuffled):
            raise ValueError("no validation point has a label that is not dropped")
        return labelled, np.sort(shuffled[: config.max_validation])
    # At least 100, because a fusion fitted on a few points is worse than none.
    count = min(config.max_validation, max(100, round(config.validation * len(labelled))))
    count = max(1, min(count, len(labelled) // 5))
    shuffled = rng.permutation(labelled)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])


def _make_encoder(
    dataset: Dataset, config: Config, folder: Path | None, device: torch.device
) -> Encoder:
    """The untrained encoder of the config; saved with the run, so that a resumed run reads it."""
    start = folder / "checkpoint" / "encoder" if folder is not None else None
    settings = config.encoder
    if start is not None and start.exists():
        if settings.kind == "bag":
            return load_encoder(start)
        with reading(start):  # of how it is computed, only the settings tell
            return _transformer(replace(settings, model=str(start)), config.seed, device)
    encoder: Encoder
    if settings.kind == "bag":
        texts = [*dataset.train_texts, *dataset.label_texts]
        bag = BagEncoder.fit(
            texts,
            dim=settings.dim,
            layers=settings.layers,
            dropout=settings.dropout,
            vocab_size=settings.vocab_size,
            max_length=settings.max_length or _BAG_LENGTH,
            seed=config.seed,
        )
        many = settings.members > 1
        encoder = Ensemble.of(bag, texts, settings.members, config.seed) if many else bag
    else:
        try:
            encoder = _transformer(settings, config.seed, device)
        except (ImportError, MemoryError):
            raise
        # Any other: safetensors and tokenizers raise classes of their own, and plain Exception.
        except Exception as error:
            raise ValueError(f"encoder.model is {settings.model!r}: {error}") from error
    if start is not None:
        with atomic_folder(start) as aside:
            encoder.save(aside)
    return encoder


def _transformer(settings: EncoderConfig, seed: int, device: torch.device) -> Encoder:
    bf16 = {"auto": None, "float32": False, "bf16": True}[settings.precision]
    if settings.lora_rank and bf16 is None and takes_bf16(device):
        bf16 = True  # of the frozen weights, too
    return TransformerEncoder(
        settings.model,
        max_length=settings.max_length or _TRANSFORMER_LENGTH,
        bf16=bf16,
        pooling=None if settings.pooling == "auto" else settings.pooling,
        lora_rank=settings.lora_rank,
        checkpointing=settings.checkpointing,
        graphs=settings.graphs,
        seed=seed,
    )


def _tokenize(encoder: Encoder, texts: Sequence[str], folder: Path | None, name: str) -> Tokens:
    """Tokens of the texts, read from the run's folder if they are there, else written to it."""
    if folder is None:
        return encoder.tokenize(texts)
    stem = folder / "tokens" / name
    # The offsets are written last: if they exist, the ids are complete.
    if not stem.with_name(f"{name}.offsets.npy").exists():
        encoder.tokenize(texts).save(stem)
    tokens = Tokens.load(stem)
    with reading(f"{stem}.offsets.npy"):
        if len(tokens) != len(texts):
            raise ValueError(f"it is of {len(tokens)} texts, expected {len(texts)}")
    return tokens


def _prepare_folder(
    folder: Path, config: Config, dataset: Dataset, resume: bool
) -> tuple[IO[str], bool]:
    """Lock a folder that is free or holds this run; write the config and the data's digest.

    Returns the lock, and whether the folder held the run.
    """
    if not (folder / _LOCK).exists():
        _check_folder(folder, resume)  # before the lock, which leaves a file
    # Before the check where there is one: a run in use cannot be resumed yet, so that comes first.
    lock = lock_file(folder / _LOCK)
    try:
        _check_folder(folder, resume)  # another process may have started a run in between
        remove_leftovers(folder)
        data = digest(dataset)
        config_file = folder / "config.toml"
        digest_file = folder / "data.json"
        begun = config_file.exists()
        if begun:
            own = Config.load(config_file, whole=True)
            own = replace(own, **{name: getattr(config, name) for name in _FREE})
            if different := differences(own, config):
                raise ValueError(
                    f"{config_file} has other settings than those given: {different}; resume with "
                    "its own, by --resume alone"
                )
            if digest_file.exists():
                before = read_json(digest_file)
                if not is_digest_of(before, dataset):
                    raise ValueError(f"{folder} was started on other data: {before}, now {data}")
        # The config first: a folder with any file of a run in it must be recognized as a run.
        config.save(config_file)
        write_json(digest_file, data)
    except BaseException:
        lock.close()
        raise
    return lock, begun


def _abandon(folder: Path, *, keep: bool) -> None:
    """Remove what was written into a folder that was free; and the folder, unless `keep`."""
    for path in list(folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if not keep:
        with suppress(OSError):
            folder.rmdir()


def check_folder(folder: Path, resume: bool) -> None:
    """Raise what would keep a run from starting in a folder, or from resuming in it.

    Raises
    ------
    FileExistsError
        It holds another run, a saved model or what is no run, or is a file.
    BlockingIOError
        Another process trains in it.
    """
    if (folder / _LOCK).exists():
        lock_file(folder / _LOCK).close()
    _check_folder(folder, resume)


def _check_folder(folder: Path, resume: bool) -> None:
    """FileExistsError unless a run may start in the folder, or resume in it."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a folder or a name that is free")
    if (folder / "config.toml").exists():
        # A run writes data.json right after its settings, and its model last.
        if (folder / "fusion.json").exists() and not (folder / "data.json").exists():
            raise FileExistsError(f"{folder} holds a saved model and no run: choose another folder")
        if not resume:
            raise FileExistsError(
                f"{folder} already holds a run: resume it, or choose another folder"
            )
    elif folder.exists():
        others = [path for path in folder.iterdir() if path.name != _LOCK and not is_leftover(path)]
        if others:
            raise FileExistsError(f"{folder} is not empty and is not a run: choose another folder")


def _about(dataset: Dataset, folder: Path | None) -> dict[str, Any]:
    """What ``run.json`` says: of a run that is resumed, with the seconds so far."""
    about: dict[str, Any] = {
        "ngame": _core.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "data": {"name": dataset.name, "path": dataset.path},
        "seconds": {},
    }
    if folder is not None and (folder / "run.json").exists():
        before = read_json(folder / "run.json")
        with reading(folder / "run.json"):
            about["seconds"], version = dict(before["seconds"]), before["ngame"]
        if version != about["ngame"]:
            warnings.warn(
                f"{folder} was written by ngame {version}, this is {about['ngame']}: it "
                "may end in other numbers than a run that was not stopped",
                stacklevel=4,
            )
    return about


def digest(dataset: Dataset) -> dict[str, Any]:
    """Sizes and a hash of the data set: a resumed run must have the same."""
    hashed = hashlib.blake2b(digest_size=8)
    for labels in (dataset.train_labels, dataset.test_labels, dataset.val_labels):
        if labels is not None:
            hashed.update(labels.indptr.astype(np.int64).tobytes())
            hashed.update(labels.indices.astype(np.int32).tobytes())
    for pairs in (dataset.drop_train, dataset.drop_test, dataset.drop_val):
        hashed.update(b"" if pairs is None else pairs.tobytes())
        hashed.update(b"|")
    all_texts = (dataset.train_texts, dataset.label_texts, dataset.test_texts, dataset.val_texts)
    for texts in filter(None, all_texts):
        for text in texts:
            hashed.update(text.encode("utf8") + b"\0")
    points, labels = dataset.train_labels.shape
    titles = None
    if dataset.label_titles is not None:
        joined = "\0".join(dataset.label_titles).encode("utf8")
        titles = hashlib.blake2b(joined, digest_size=8).hexdigest()
    return {"points": points, "labels": labels, "digest": hashed.hexdigest(), "titles": titles}


def is_digest_of(before: Any, dataset: Dataset) -> bool:
    """Whether a run was started on these data, by its ``data.json``."""
    now = digest(dataset)
    # Earlier versions wrote no digest of titles.
    return isinstance(before, dict) and {"titles": now["titles"]} | before == now

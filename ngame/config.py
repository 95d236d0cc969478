"""The settings of a run: one frozen dataclass a section of the TOML file."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

from ngame.files import atomic_write


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """The encoder. Of the fields below `kind`, each kind reads its own."""

    kind: Literal["bag", "transformer"] = "bag"
    dim: int = 256
    """bag: width of the vectors."""
    layers: int = 1
    """bag: residual layers after the sum."""
    dropout: float = 0.0
    """bag: share of a text's tokens that training leaves out, others at every visit."""
    vocab_size: int = 0
    """bag: sub-words at most; 0 chooses it by the amount of text."""
    model: str = ""
    """transformer: a Hugging Face or sentence-transformers model, by name or folder."""
    max_length: int = 128
    """transformer: tokens of a text that are read."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """transformer: of its forward pass; "auto" is bf16 on a GPU that has it, else float32."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "dim", "max_length")
        _at_least(self, 0, "layers", "vocab_size")
        _below_one(self, "dropout")
        if self.kind == "transformer" and not self.model:
            raise ValueError('model is empty, expected a model when kind is "transformer"')


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """What the two training stages have in common."""

    epochs: int = 5
    batch_size: int = 1024
    accumulate: int = 1
    """Batches whose gradients are averaged for one update."""
    warmup: float = 0.05
    """Share of the updates over which the learning rate rises from 0; then it falls to 0."""
    weight_decay: float = 0.01
    """AdamW's; SparseAdam has none."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    loss: Literal["triplet", "softmax"] = "softmax"
    temperature: float = 0.05
    """softmax: divides the scores."""
    margin: float = 0.3
    """triplet: by how much a positive must beat a negative."""
    negatives: int = 10
    """triplet: hardest negatives that a point meets."""
    cluster_size: int = 1
    """Points a cluster from `start_epoch` on; 1 means random batches throughout."""
    schedule: dict[int, int] = field(default_factory=dict)
    """Cluster size by first epoch, instead of `cluster_size` and `start_epoch`."""
    start_epoch: int = 1
    """First epoch whose batches are clustered; the first epoch of all is 0."""
    refresh_every: int = 1
    """Epochs from one clustering to the next."""
    random_share: float = 0.0
    """Share of the points that are batched at random all the same."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "epochs", "clip", "weight_decay", "start_epoch", "margin")
        _at_least(self, 1, "batch_size", "accumulate", "negatives", "cluster_size", "refresh_every")
        _above_zero(self, "temperature")
        _share(self, "warmup", "random_share")
        for epoch, size in self.schedule.items():
            if epoch < 0 or size < 1:
                raise ValueError(
                    f"schedule has size {size} from epoch {epoch} on, expected sizes from 1 "
                    "and epochs from 0"
                )

    def sizes(self) -> dict[int, int]:
        """Cluster size by first epoch, whichever way it was given."""
        return dict(self.schedule) or {self.start_epoch: self.cluster_size}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderStageConfig(StageConfig):
    """The encoder stage."""

    learning_rate: float = 2e-3
    """AdamW's."""
    sparse_learning_rate: float = 5e-3
    """SparseAdam's, which has the parameters with sparse gradients: their rows are seldom met."""
    positives: Literal["one", "all"] = "all"
    """Positives of a point that a visit trains on: one drawn uniformly (as NGAME does), or all.
    All of them make the label pool larger: worth it where encoding a label is cheap."""
    embeddings: Literal["fresh", "bank"] = "bank"
    """What is clustered: the vectors of an encoding pass, or those that training last saw."""

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is a new class, which the zero-argument form misses.
        StageConfig.__post_init__(self)
        _above_zero(self, "learning_rate", "sparse_learning_rate")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierStageConfig(StageConfig):
    """The classifier stage."""

    learning_rate: float = 5e-3
    """Of the labels' vectors."""
    dropout: float = 0.5
    """Of the points' vectors."""
    finetune: bool = False
    """Train the encoder on, with `encoder_learning_rate`, instead of freezing it."""
    encoder_learning_rate: float = 2e-4
    """Of all its parameters."""

    def __post_init__(self) -> None:
        StageConfig.__post_init__(self)  # see EncoderStageConfig
        _above_zero(self, "learning_rate", "encoder_learning_rate")
        _below_one(self, "dropout")


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionConfig:
    """Prediction: three scorers and their fusion."""

    k: int = 100
    """Labels kept a text."""
    neighbours: int = 100
    """Training points that vote."""
    vote_temperature: float = 0.05
    """Of the softmax over their similarities."""
    search: Literal["exact", "hnsw"] = "exact"
    """How labels and training points are searched: all of them, or by an approximate index (of
    hnswlib, which the extra `ann` installs), kept with the run: for millions of them."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "k", "neighbours")
        _above_zero(self, "vote_temperature")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of a run."""

    seed: int = 0
    threads: int = 0
    """0 means the CPUs this process may use."""
    device: str = "auto"
    """A torch device; "auto" takes a GPU if there is one."""
    validation: float = 0.05
    """Share of the training points held out, to choose weights by and to fit the fusion on; but
    100 of them at least, and a fifth of all at most."""
    max_validation: int = 5_000
    """Points held out at most."""
    keep: Literal["best", "last"] = "last"
    """Which epoch's weights a stage ends with: the best P@1 on the held-out points, or the last."""
    checkpoint_minutes: float = 2.0
    """Time between two checkpoints."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    encoder_stage: EncoderStageConfig = field(default_factory=EncoderStageConfig)
    classifier_stage: ClassifierStageConfig = field(default_factory=ClassifierStageConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)

    def __post_init__(self) -> None:
        _at_least(self, 0, "seed", "threads", "checkpoint_minutes")
        _at_least(self, 1, "max_validation")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation is {self.validation}, expected a share between 0 and 1")

    @classmethod
    def load(
        cls,
        path: str | PathLike[str] | None = None,
        sets: Sequence[str] = (),
        *,
        points: int | None = None,
        labels: int | None = None,
    ) -> Self:
        """Read a TOML file, then apply ``key=value`` settings, the keys dotted.

        Parameters
        ----------
        path : the file; none if not given
        sets : the settings, which go before the file's
        points, labels : how many the data have. They and the kind of encoder then decide the
            settings that neither names (see `defaults_for`); else these have their plain defaults.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            A line is no TOML; a key does not exist (the nearest that does is named); a value is
            not of its type or out of its range.
        """
        table: dict[str, Any] = {}
        if path is not None:
            try:
                table = tomllib.loads(Path(path).read_text(encoding="utf8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}: {error}") from None
        for item in sets:
            key, separator, text = item.partition("=")
            if not separator:
                raise ValueError(f"--set {item}: expected key=value")
            try:
                value = tomllib.loads(f"value = {text}")["value"]
            except tomllib.TOMLDecodeError:
                value = text
            *sections, last = key.strip().split(".")
            inner = table
            for section in sections:
                inner = inner.setdefault(section, {})
                if not isinstance(inner, dict):
                    raise ValueError(f"--set {item}: {section} is no section")
            inner[last] = value
        if points is not None and labels is not None:
            encoder = table.get("encoder", {})
            kind = encoder.get("kind", "bag") if isinstance(encoder, Mapping) else "bag"
            table = _over(defaults_for(points, labels, kind), table)
        config: Self = _build(cls, table, "")
        return config

    def save(self, path: str | PathLike[str]) -> None:
        """Write every setting as TOML, in one step."""
        with atomic_write(path) as aside:
            aside.write_text(_toml(dataclasses.asdict(self)), encoding="utf8")


def defaults_for(points: int, labels: int, kind: str = "bag") -> dict[str, Any]:
    """The settings that go best with data of that size, as nested tables; see bench/RESULTS.md.

    - Few points are visited more often, and their texts thinned for it.
    - Where a batch's labels are about all there are, the triplet loss ranks the first place
      better, and so does an encoder that the classifier stage trains on; where they are a
      sample, the softmax, and an encoder left alone.
    - A transformer makes small batches of one positive a point, clustered; and small steps.
    """
    epochs = min(max(round(2500 / math.sqrt(max(points, 1))), 3), 60)
    encoder: dict[str, Any] = {"dropout": round(max(0.0, 0.4 * (1 - 5 / epochs)), 2)}
    stage: dict[str, Any] = {"epochs": epochs}
    classifier: dict[str, Any] = {}
    if kind == "transformer":
        return {
            "encoder_stage": {
                "epochs": 5,
                "batch_size": 64,
                "learning_rate": 5e-5,
                "positives": "one",
                "cluster_size": 32,
            }
        }
    if labels <= StageConfig().batch_size:
        stage |= {"loss": "triplet", "margin": 0.2, "learning_rate": 5e-3}
        classifier |= {"loss": "triplet", "epochs": 10}
        classifier |= {"finetune": True, "encoder_learning_rate": 1e-3}
    return {"encoder": encoder, "encoder_stage": stage, "classifier_stage": classifier}


def _over(base: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """`table`, and what `base` has beside it, section by section."""
    merged = dict(base)
    for key, value in table.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _over(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _build(kind: type[Any], table: Mapping[str, Any], prefix: str) -> Any:
    """Make a dataclass of a table, sections included; its errors name the dotted key."""
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise ValueError(f"there is no setting {prefix}{key}{_hint(key, hints, prefix)}")
        hint_type = hints[key]
        if dataclasses.is_dataclass(hint_type):
            if not isinstance(value, Mapping):
                raise ValueError(f"{prefix}{key} is {value!r}, expected a section")
            values[key] = _build(typing.cast(type[Any], hint_type), value, f"{prefix}{key}.")
        else:
            values[key] = _convert(value, hint_type, f"{prefix}{key}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _hint(key: str, siblings: Iterable[str], prefix: str) -> str:
    """The setting most like `key`: of its own section, or else of any."""
    everywhere: dict[str, str] = {}
    for name, kind in typing.get_type_hints(Config).items():
        everywhere.setdefault(name, name)
        if dataclasses.is_dataclass(kind):
            for part in dataclasses.fields(kind):
                everywhere.setdefault(part.name, f"{name}.{part.name}")
    for names in ({name: prefix + name for name in siblings}, everywhere):
        if near := difflib.get_close_matches(key, names, n=1):
            return f", did you mean {names[near[0]]}?"
    return ""


def _convert(value: Any, kind: Any, key: str) -> Any:
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"{key} is {value!r}, expected one of {', '.join(map(repr, choices))}")
        return value
    if isinstance(kind, types.GenericAlias):  # dict[int, int]: the keys of a TOML table are text
        try:
            return {int(epoch): _convert(size, int, key) for epoch, size in value.items()}
        except (AttributeError, TypeError, ValueError):
            raise ValueError(f"{key} is {value!r}, expected {{epoch = cluster size}}") from None
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{key} is {value!r}, expected {kind.__name__}")
    return value


def _toml(table: Mapping[str, Any], name: str = "") -> str:
    lines = [f"[{name}]"] if name else []
    lines += [f"{k} = {_literal(v)}" for k, v in table.items() if not isinstance(v, Mapping)]
    text = "\n".join(lines) + "\n"
    for key, value in table.items():
        if isinstance(value, Mapping):
            text += "\n" + _toml(value, f"{name}.{key}" if name else key)
    return text


def _literal(value: str | bool | int | float) -> str:
    """A value as TOML has it: like JSON, but for infinity and the escapes of odd characters."""
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _at_least(config: Any, minimum: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= minimum:
            raise ValueError(f"{name} is {getattr(config, name)}, expected at least {minimum}")


def _above_zero(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} is {getattr(config, name)}, expected more than 0")


def _share(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)}, expected a share from 0 to 1")


def _below_one(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}, expected from 0 to less than 1")


__all__ = [
    "ClassifierStageConfig",
    "Config",
    "EncoderConfig",
    "EncoderStageConfig",
    "PredictionConfig",
    "StageConfig",
    "defaults_for",
]

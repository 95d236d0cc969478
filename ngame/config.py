"""The settings of a run: one frozen dataclass a section of the TOML file."""

import dataclasses
import difflib
import json
import math
import operator
import textwrap
import tomllib
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

from ngame.arrays import MAX_THREADS
from ngame.files import DamagedFileError, atomic_write

_LAST_LINE = "# the end"
"""Of a file that `Config.save` writes: without it the file was cut."""

# Bounds of a number: their words in a message, and their test.
_BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "least": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "most": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


PRESETS = {"quality": ("encoder.members=2",)}
"""Settings by the name of what they are for (bench/results/training.md)."""


def setting(default: Any, meaning: str, **bounds: float) -> Any:
    """A field of a section: its default, its meaning and its bounds (see `_BOUNDS`)."""
    return field(default=default, metadata={"meaning": meaning, "bounds": bounds})


@dataclass(frozen=True, kw_only=True)
class _Section:
    """Settings whose types and bounds are checked when they are made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for one in dataclasses.fields(self):
            value = _convert(getattr(self, one.name), hints[one.name], one.name)
            bounds = one.metadata.get("bounds", {})
            if not all(_BOUNDS[kind][1](value, bound) for kind, bound in bounds.items()):
                raise ValueError(f"{one.name} is {value!r}, expected {_in_words(bounds)}")
            object.__setattr__(self, one.name, value)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(_Section):
    """The encoder. Below `kind`, each kind reads only its own settings."""

    kind: Literal["bag", "transformer"] = setting(
        "bag",
        "A bag of sub-words, trained from the data alone, or a pretrained transformer; a file or "
        "`--set` that names a `model` means the latter.",
    )
    dim: int = setting(256, "bag: width of the vectors.", least=1)
    layers: int = setting(1, "bag: residual layers after the sum.", least=0)
    members: int = setting(
        1,
        "bag: encoders trained side by side, each by its own loss, whose cosines are averaged: "
        "more recall, and as many times the work.",
        least=1,
    )
    dropout: float = setting(
        0.0,
        "bag: share of a text's tokens that training leaves out, others at every visit.",
        least=0,
        below=1,
    )
    vocab_size: int = setting(
        0, "bag: most sub-words; 0 chooses a number by the amount of text.", least=0, most=2**31 - 1
    )
    model: str = setting(
        "", "transformer: a Hugging Face or sentence-transformers model, by name or folder."
    )
    max_length: int = setting(
        0,
        "Tokens of a text that are read; 0 is 512 for a bag and 128 for a transformer.",
        least=0,
        most=2**31 - 1,
    )
    precision: Literal["auto", "float32", "bf16"] = setting(
        "auto",
        'transformer: precision of the forward pass; "auto" is bf16 on a GPU that has it, else '
        "float32.",
    )
    pooling: Literal["auto", "mean", "last", "cls"] = setting(
        "auto",
        "transformer: the vector of a text is the mean over its tokens, or that of the last one, "
        'as usual for decoders, or of the first; "auto" is what a sentence-transformers model '
        "says, else the mean.",
    )
    lora_rank: int = setting(
        0,
        "transformer: rank of LoRA adapters of all linear layers (extra `lora`), which are trained "
        "in place of the weights; 0 trains all weights.",
        least=0,
    )
    checkpointing: bool = setting(
        False,
        "transformer: compute activations again in the backward pass instead of keeping them: less "
        "memory, more time.",
    )
    graphs: bool = setting(
        False,
        "transformer: on a GPU, train by CUDA graphs: nearly twice as fast where the processor "
        "holds the GPU up, as with small batches.",
    )
    shard: bool = setting(
        False,
        "transformer: with several processes, each keeps a share of the weights, their gradients "
        "and the optimizer's state (FSDP) instead of all: less memory, and more is sent.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "transformer" and not self.model:
            raise ValueError('model is empty, expected a model when kind is "transformer"')
        if self.kind == "transformer" and self.members > 1:
            raise ValueError(f'members is {self.members}, expected 1 when kind is "transformer"')
        if self.graphs and (self.checkpointing or self.shard):
            other = "checkpointing" if self.checkpointing else "shard"
            raise ValueError(f"graphs and {other} are both true, expected at most one of them")


@dataclass(frozen=True, kw_only=True)
class StageConfig(_Section):
    """What the two training stages have in common."""

    epochs: int = setting(5, "Visits of every training point.", least=0)
    batch_size: int = setting(1024, "Training points a batch.", least=1)
    accumulate: int = setting(1, "Batches whose gradients are averaged for one update.", least=1)
    warmup: float = setting(
        0.05,
        "Share of the updates over which the learning rate rises from 0; then it falls to 0.",
        least=0,
        most=1,
    )
    weight_decay: float = setting(0.01, "Weight decay of AdamW; SparseAdam has none.", least=0)
    clip: float = setting(1.0, "Largest norm of the gradient; 0 leaves it as it is.", least=0)
    loss: Literal["triplet", "softmax"] = setting(
        "softmax",
        "Triplet margin over the hardest negatives, or softmax of each positive against the "
        "negatives.",
    )
    temperature: float = setting(0.05, "softmax: temperature, which divides the scores.", above=0)
    margin: float = setting(0.3, "triplet: by how much a positive must beat a negative.", least=0)
    negatives: int = setting(10, "triplet: hardest negatives of each point.", least=1)
    cluster_size: int = setting(
        1,
        "Points a cluster from `start_epoch` on; 1 means random batches throughout.",
        least=1,
    )
    schedule: dict[int, int] = field(
        default_factory=dict,
        metadata={
            "meaning": "Cluster size by first epoch, such as {1 = 4, 5 = 8}, instead of "
            "`cluster_size` and `start_epoch`."
        },
    )
    start_epoch: int = setting(
        1, "First epoch whose batches are clustered; the first epoch of all is 0.", least=0
    )
    refresh_every: int = setting(1, "Epochs from one clustering to the next.", least=1)
    random_share: float = setting(
        0.0, "Share of the points that still go into random batches.", least=0, most=1
    )

    def sizes(self) -> dict[int, int]:
        """Cluster size by first epoch, from `schedule` or from `cluster_size` and `start_epoch`."""
        return dict(self.schedule) or {self.start_epoch: self.cluster_size}


@dataclass(frozen=True, kw_only=True)
class EncoderStageConfig(StageConfig):
    """The encoder stage."""

    learning_rate: float = setting(2e-3, "Learning rate of AdamW.", above=0)
    sparse_learning_rate: float = setting(
        5e-3,
        "Learning rate of SparseAdam, which updates the parameters with sparse gradients: their "
        "rows are in few batches.",
        above=0,
    )
    positives: Literal["one", "all"] = setting(
        "all",
        "Positives of a point that a visit trains on: one drawn uniformly (as NGAME does), or "
        "all. All of them make the label pool larger: worth it where encoding a label is cheap.",
    )
    random_labels: int = setting(
        0,
        "Labels drawn uniformly for each batch, encoded with the others and shared by its points.",
        least=0,
    )
    embeddings: Literal["fresh", "bank"] = setting(
        "bank",
        "What is clustered: the vectors of a new encoding pass, or those that training last saw.",
    )
    gather: bool = setting(
        True,
        "With several processes, each of which encodes its part of a batch: compare every point "
        "with the labels of the whole batch, as one process does, or with those of its part.",
    )


@dataclass(frozen=True, kw_only=True)
class ClassifierStageConfig(StageConfig):
    """The classifier stage."""

    labels: Literal["pool", "all"] = setting(
        "pool",
        "Labels that a batch is compared with: its points' positives, or all that have a training "
        "point, by the softmax, in bfloat16, which takes longer.",
    )
    step: float = setting(
        0.1, "labels = all: length of the first step of a label's vector.", above=0
    )
    learning_rate: float = setting(
        5e-3, "labels = pool: learning rate of the labels' vectors.", above=0
    )
    dropout: float = setting(0.5, "Dropout of the points' vectors.", least=0, below=1)
    finetune: bool = setting(
        False, "Also train the encoder, with `encoder_learning_rate`, instead of freezing it."
    )
    encoder_learning_rate: float = setting(
        2e-4, "Learning rate of the encoder if `finetune` is true.", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels == "all" and self.accumulate != 1:
            raise ValueError(f'accumulate is {self.accumulate}, expected 1 where labels is "all"')


ScorerName = Literal[
    "encoder",
    "classifier",
    "neighbours",
    "tfidf",
    "tfidf_title",
    "tfidf_neighbours",
    "tfidf_classifier",
    "co_occurrence",
]
SCORERS: tuple[ScorerName, ...] = typing.get_args(ScorerName)


@dataclass(frozen=True, kw_only=True)
class PredictionConfig(_Section):
    """Prediction: scorers and their fusion."""

    scorers: tuple[ScorerName, ...] = setting(
        SCORERS,
        "Scorers that are on: the labels' embeddings, their classifier vectors, votes of the "
        "nearest training points; and the same by words alone: TF-IDF cosines with the labels' "
        "texts, and with their titles where most texts are longer, a linear classifier of TF-IDF "
        "rows, votes of the points nearest by TF-IDF; and the labels that training points have "
        "together with those that the others find probable.",
    )
    k: int = setting(100, "Labels kept a text.", least=1)
    neighbours: int = setting(100, "Training points that vote.", least=1)
    vote_temperature: float = setting(
        0.05, "Temperature of the softmax over their similarities.", above=0
    )
    fuse_for: Literal["precision", "psp"] = setting(
        "precision",
        "What the weights of the fusion are fitted for: precision, or propensity-scored precision "
        "(PSP), by which rare labels count more.",
    )
    search: Literal["exact", "hnsw"] = setting(
        "exact",
        "How labels and training points are searched: exactly, or by an approximate index (of "
        "hnswlib, which the extra `ann` installs) that is kept with the run: for millions of them.",
    )


@dataclass(frozen=True, kw_only=True)
class Config(_Section):
    """All settings of a run."""

    seed: int = setting(0, "Seed of every random choice.", least=0, most=2**63 - 1)
    threads: int = setting(
        0, "Threads; 0 means the CPUs this process may use.", least=0, most=MAX_THREADS
    )
    device: str = setting("auto", 'A torch device; "auto" takes a GPU if there is one.')
    validation: float = setting(
        0.05,
        "Share of the training points held out, to choose weights by and to fit the fusion on; "
        "but at least 100 of them, and at most a fifth of all. None are where the data set has "
        "validation points.",
        above=0,
        below=1,
    )
    max_validation: int = setting(5_000, "Most points held out.", least=1)
    keep: Literal["best", "last"] = setting(
        "last",
        "Which epoch's weights a stage ends with: those of the best P@1 on the held-out points, "
        "or the last.",
    )
    self_pairs: Literal["drop", "keep"] = setting(
        "drop",
        "Where points are labels, such as articles that link to articles: leave each point's own "
        "label out of training, predictions and metrics, or treat it as any other.",
    )
    checkpoint_minutes: float = setting(2.0, "Minutes from one checkpoint to the next.", least=0)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    encoder_stage: EncoderStageConfig = field(default_factory=EncoderStageConfig)
    classifier_stage: ClassifierStageConfig = field(default_factory=ClassifierStageConfig)
    prediction: PredictionConfig = field(default_factory=PredictionConfig)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str] | None = None,
        sets: Sequence[str] = (),
        *,
        points: int | None = None,
        labels: int | None = None,
        whole: bool = False,
    ) -> Self:
        """Read a TOML file, then apply ``key=value`` settings with dotted keys.

        Parameters
        ----------
        path : str or path, optional
            The TOML file.
        sets : sequence of str
            Settings such as ``"encoder.dim=512"``, which override the file's.
        points, labels : int, optional
            The size of the data. If given, settings that are neither in the file nor in `sets`
            are those of `defaults_for`.
        whole : bool
            The file was written by `save`, and so has its last line.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            The file is not TOML, a setting does not exist (the message suggests the nearest), or
            a value has the wrong type or is out of bounds, or `whole` does not hold.
        """
        table: dict[str, Any] = {}
        if path is not None:
            try:
                text = Path(path).read_text(encoding="utf8")
                table = tomllib.loads(text)
                if whole and not text.rstrip().endswith(_LAST_LINE):
                    raise DamagedFileError(
                        f"{path} is damaged: it was cut, its last line, {_LAST_LINE!r}, is missing"
                    )
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
        encoder = table.get("encoder")
        if not isinstance(encoder, dict):
            encoder = {}
        elif encoder.get("model"):
            encoder.setdefault("kind", "transformer")
        if points is not None and labels is not None:
            kind = encoder.get("kind", "bag")
            lora = kind == "transformer" and bool(encoder.get("lora_rank"))
            suited = defaults_for(points, labels, kind, lora=lora)
            given = table.get("classifier_stage")
            if isinstance(given, dict) and given.keys() & {"loss", "accumulate"}:
                # Comparing with all labels has a loss and steps of its own.
                suited.get("classifier_stage", {}).pop("labels", None)
            table = _over(suited, table)
        config: Self = _build(cls, table, "")
        return config

    def save(self, path: str | PathLike[str]) -> None:
        """Write every setting as TOML, in one step."""
        with atomic_write(path) as aside:
            text = f"{_toml(dataclasses.asdict(self))}\n{_LAST_LINE}\n"
            aside.write_text(text, encoding="utf8")


_MOST_PAIRS = 200_000_000
"""Of points and labels, up to which the classifier stage by default compares all."""


def defaults_for(
    points: int, labels: int, kind: str = "bag", *, lora: bool = False
) -> dict[str, Any]:
    """The settings that did best on data of that size, as nested tables.

    Measured in bench/results/defaults.md.

    - Eight epochs, fewer for many points. More of them fit the training points and no others. But
      15 below 1,600 points, and about a hundred updates: less leave the encoder of a hundred points
      untrained.
    - Fewer than 12,000 points make smaller batches, so that an epoch has about 16 updates.
    - Fewer points, seen oftener, need more dropout of tokens.
    - If there are no more labels than a batch has points, the triplet loss and fine-tuning the
      encoder in the classifier stage give the better P@1. With more labels, the softmax and a
      frozen encoder do.
    - A transformer trains on small clustered batches, one positive a point, with small steps; the
      matrices of LoRA, which begin at zero, with larger ones.
    - With more labels, the classifier stage compares with all of them, if that is not too much;
      else the encoder stage compares with labels drawn at random, too.
    """
    points = max(points, 1)
    dropout = min(max(0.18 * math.log10(250_000 / points), 0.0), 0.25)
    batch_size = min(max(2 ** round(math.log2(points / 16)), 16), StageConfig().batch_size)
    encoder: dict[str, Any] = {"dropout": round(dropout, 2)}
    epochs = min(max(round(2500 / math.sqrt(points)), 3), 8)
    epochs = max(epochs, min(round(600 / math.sqrt(points)), 15))
    epochs = min(max(epochs, 96 * batch_size // points), 30)  # enough updates
    stage: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size}
    classifier: dict[str, Any] = {"batch_size": batch_size}
    if kind == "transformer":
        return {
            "encoder_stage": {
                "epochs": 5,
                "batch_size": 64,
                "learning_rate": 3e-3 if lora else 5e-5,
                "positives": "one",
                "cluster_size": 32,
            }
        }
    if labels <= StageConfig().batch_size:
        stage |= {"loss": "triplet", "margin": 0.2, "learning_rate": 5e-3}
        classifier |= {"loss": "triplet", "epochs": 10}
        classifier |= {"finetune": True, "encoder_learning_rate": 1e-3}
    elif points * labels <= _MOST_PAIRS:
        classifier["labels"] = "all"
    else:
        stage["random_labels"] = 2048
    return {"encoder": encoder, "encoder_stage": stage, "classifier_stage": classifier}


def _over(base: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """`base` overridden by `table`, section by section."""
    merged = dict(base)
    for key, value in table.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _over(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _build(kind: type[Any], table: Mapping[str, Any], prefix: str) -> Any:
    """Make a section, and the sections within it, from a table; errors name the dotted key."""
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise ValueError(f"there is no setting {prefix}{key}{_hint(key, hints, prefix)}")
        section = dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping)
        values[key] = _build(hints[key], value, f"{prefix}{key}.") if section else value
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{prefix}{error}") from None


def _hint(key: str, siblings: Iterable[str], prefix: str) -> str:
    """Suggest the setting with the most similar name, in the same section or else in any."""
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
    """Convert a value to the type of its setting; TypeError if it has another type."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"{key} is {value!r}, expected one of {', '.join(map(repr, choices))}")
        return value
    if typing.get_origin(kind) is tuple:  # a list of choices, kept in the order of the choices
        if not isinstance(value, list | tuple) or not value:
            raise TypeError(f"{key} is {value!r}, expected a list")
        choice = typing.get_args(kind)[0]
        chosen = {_convert(one, choice, f"{key}[{i}]") for i, one in enumerate(value)}
        return tuple(one for one in typing.get_args(choice) if one in chosen)
    if typing.get_origin(kind) is dict:  # the keys of a TOML table are text
        try:
            sizes = {int(epoch): _convert(size, int, key) for epoch, size in value.items()}
        except (AttributeError, TypeError, ValueError):
            raise TypeError(f"{key} is {value!r}, expected {{epoch = cluster size}}") from None
        for epoch, size in sizes.items():
            if epoch < 0 or size < 1:
                raise ValueError(
                    f"{key} has size {size} from epoch {epoch} on, expected sizes from 1 "
                    "and epochs from 0"
                )
        return sizes
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        wanted = "a section" if dataclasses.is_dataclass(kind) else kind.__name__
        raise TypeError(f"{key} is {value!r}, expected {wanted}")
    return value


def _in_words(bounds: Mapping[str, float]) -> str:
    return " and ".join(f"{_BOUNDS[kind][0]} {bound}" for kind, bound in bounds.items())


def described(kind: type[Any] = Config, name: str = "") -> str:
    """Every setting with its default and meaning, as a TOML file in which all is commented out."""
    text = f"[{name}]\n" if name else ""
    sections = ""
    for one in dataclasses.fields(kind):
        if "meaning" not in one.metadata:
            inner = f"{name}.{one.name}" if name else one.name
            sections += "\n" + described(one.default_factory, inner)  # type: ignore[arg-type]
            continue
        meaning = textwrap.wrap(f"{one.metadata['meaning']} {_limits(one)}", 98)
        text += "".join(f"# {line}\n" for line in meaning)
        setting = textwrap.wrap(f"{one.name} = {_literal(_default(one))}", 98)
        text += "".join(f"#{line}\n" for line in setting)
    return text + sections


def _limits(one: dataclasses.Field[Any]) -> str:
    """The choices or bounds of a setting as a sentence; empty if it has neither."""
    if typing.get_origin(one.type) is Literal:
        return f"One of {', '.join(map(_literal, typing.get_args(one.type)))}."
    if typing.get_origin(one.type) is tuple:
        return "Any of these."
    bounds = _in_words(one.metadata.get("bounds", {}))
    return bounds and f"{bounds[0].upper()}{bounds[1:]}."


def _default(one: dataclasses.Field[Any]) -> Any:
    factory = one.default_factory
    return one.default if factory is dataclasses.MISSING else factory()


def _attributes(kind: type[Any]) -> str:
    """The settings of a section as part of its docstring."""
    text = "\n\n    Attributes\n    ----------\n"
    for one in dataclasses.fields(kind):
        default = _default(one)
        if "meaning" in one.metadata:
            text += f"    {one.name} : {type(default).__name__}, default {_literal(default)}\n"
            meaning = f"{one.metadata['meaning']} {_limits(one)}"
            text += textwrap.fill(meaning, 96, initial_indent=" " * 8, subsequent_indent=" " * 8)
            text += "\n"
        else:
            text += f"    {one.name} : {type(default).__name__}\n"
    return text


def _toml(table: Mapping[str, Any], name: str = "") -> str:
    lines = [f"[{name}]"] if name else []
    lines += [f"{k} = {_literal(v)}" for k, v in table.items() if not isinstance(v, Mapping)]
    text = "\n".join(lines) + "\n"
    for key, value in table.items():
        if isinstance(value, Mapping):
            text += "\n" + _toml(value, f"{name}.{key}" if name else key)
    return text


def differences(one: Config, other: Config) -> str:
    """The settings in which two configs differ, such as "seed is 0, not 9"."""
    first, second = (flat(dataclasses.asdict(config)) for config in (one, other))
    return ", ".join(
        f"{name} is {_shown(value)}, not {_shown(second[name])}"
        for name, value in first.items()
        if value != second[name]
    )


def sets_of(path: str | PathLike[str]) -> list[str]:
    """The settings of a TOML file as ``KEY=VALUE`` each, as `Config.load` takes them."""
    Config.load(path)  # names the file in what is wrong with it
    table = tomllib.loads(Path(path).read_text(encoding="utf8"))
    return [f"{name}={_shown(value)}" for name, value in flat(table).items()]


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted key; a schedule is one."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        section = isinstance(value, Mapping) and key != "schedule"
        found |= flat(value, f"{prefix}{key}.") if section else {f"{prefix}{key}": value}
    return found


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {size}" for key, size in value.items()) + "}"
    return _literal(value)


def _literal(value: str | bool | int | float | Sequence[str]) -> str:
    """A value in TOML, which differs from JSON in infinity and in the escape of DEL."""
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


# So that help() says what each setting means.
for _kind in (
    *(EncoderConfig, StageConfig, EncoderStageConfig, ClassifierStageConfig),
    *(PredictionConfig, Config),
):
    _kind.__doc__ = f"{_kind.__doc__}{_attributes(_kind)}"

__all__ = [
    "SCORERS",
    "ClassifierStageConfig",
    "Config",
    "EncoderConfig",
    "EncoderStageConfig",
    "PredictionConfig",
    "ScorerName",
    "StageConfig",
    "defaults_for",
    "described",
    "differences",
]

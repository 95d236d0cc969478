"""The settings of a run: files, ``--set``, and what wrong ones are told."""

import dataclasses
import re
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngame.config import (
    SCORERS,
    ClassifierStageConfig,
    Config,
    EncoderConfig,
    EncoderStageConfig,
    PredictionConfig,
    StageConfig,
    defaults_for,
    described,
    differences,
)

CHANGED = Config(
    seed=7,
    device="cpu",
    validation=0.1,
    checkpoint_minutes=float("inf"),
    encoder=EncoderConfig(kind="transformer", model='C:\\a "b" Öl'),
    encoder_stage=EncoderStageConfig(schedule={0: 2, 5: 8}, learning_rate=1e-5, positives="one"),
    classifier_stage=ClassifierStageConfig(finetune=True, clip=0),
    prediction=PredictionConfig(k=5),
)


@pytest.mark.parametrize("config", [Config(), CHANGED], ids=["defaults", "changed"])
def test_file_comes_back(tmp_path, config):
    config.save(tmp_path / "config.toml")
    assert Config.load(tmp_path / "config.toml") == config


def test_file_holds_every_setting(tmp_path):
    Config().save(tmp_path / "config.toml")
    table = tomllib.loads((tmp_path / "config.toml").read_text(encoding="utf8"))
    assert table == settings()


def settings():
    """Every setting as TOML gives it."""
    table = dataclasses.asdict(Config())
    table["prediction"]["scorers"] = list(SCORERS)
    return table


@pytest.mark.parametrize("form", [tuple, list])
def test_scorers(form):
    chosen = PredictionConfig(scorers=form(["tfidf", "encoder", "tfidf"]))
    assert chosen.scorers == ("encoder", "tfidf")
    assert PredictionConfig().scorers == SCORERS
    for wrong in ([], "encoder", 5):
        with pytest.raises(TypeError, match=r"scorers is .*, expected a list"):
            PredictionConfig(scorers=wrong)
    with pytest.raises(ValueError, match=r"scorers\[1\] is 'bm25', expected one of 'encoder', "):
        PredictionConfig(scorers=["encoder", "bm25"])


@given(
    st.text(st.characters(codec="utf8")),
    st.floats(0, exclude_min=True, allow_infinity=True),
    st.dictionaries(st.integers(0, 99), st.integers(1, 99)),
)
def test_any_value_comes_back(tmp_path_factory, text, number, schedule):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    stage = EncoderStageConfig(temperature=number, schedule=schedule)
    config = Config(device=text, encoder_stage=stage)
    config.save(path)
    assert Config.load(path) == config


def test_sets_come_after_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("seed = 1\n[encoder]\ndim = 32\nlayers = 2\n")
    config = Config.load(path, ["encoder.dim=64", " seed =3", "encoder.dim=65"])
    assert (config.seed, config.encoder.dim, config.encoder.layers) == (3, 65, 2)


def test_values_of_sets():
    config = Config.load(
        None,
        [
            "device=cuda:1",
            'encoder.model="a b"',
            "encoder_stage.learning_rate=1",
            "classifier_stage.finetune=true",
            "encoder_stage.schedule={1 = 4, 3 = 8}",
            "classifier_stage.schedule.2=16",
        ],
    )
    assert config.device == "cuda:1"
    assert config.encoder.model == "a b"
    assert config.encoder_stage.learning_rate == 1.0
    assert type(config.encoder_stage.learning_rate) is float
    assert config.classifier_stage.finetune is True
    assert config.encoder_stage.sizes() == {1: 4, 3: 8}
    assert config.classifier_stage.sizes() == {2: 16}


@pytest.mark.parametrize("kind", ["bag", "transformer"])
@pytest.mark.parametrize("labels", [1, 1024, 1025, 10**8])
@pytest.mark.parametrize("points", [0, 1, 100_000, 10**8])
def test_settings_suited_to_the_data(points, labels, kind):
    chosen = [f"encoder.kind={kind}", "encoder.model=m"]
    config = Config.load(None, chosen, points=points, labels=labels)
    for section, settings in defaults_for(points, labels, kind).items():
        for name, value in settings.items():
            assert getattr(getattr(config, section), name) == value
    # What is said goes before, whether in a file or not, and the rest of the section stays.
    chosen += ["encoder_stage.epochs=33", "encoder.dropout=0.01"]
    stated = Config.load(None, chosen, points=points, labels=labels)
    assert (stated.encoder_stage.epochs, stated.encoder.dropout) == (33, 0.01)
    assert stated.encoder_stage.loss == config.encoder_stage.loss
    assert Config.load(None, chosen[:2]) == Config(encoder=EncoderConfig(kind=kind, model="m"))


def test_members_are_bags():
    sets = ["encoder.model=m", "encoder.members=2"]
    with pytest.raises(ValueError, match=r"encoder\.members is 2, expected 1 when kind is"):
        Config.load(sets=sets)


def test_all_labels_where_they_are_few_enough():
    def labels_of(*chosen, points=10_000, labels=20_000):
        config = Config.load(None, chosen, points=points, labels=labels)
        return config.classifier_stage.labels

    assert labels_of() == "all"
    assert labels_of(labels=20_001) == labels_of(labels=1024) == "pool"
    assert labels_of("encoder.kind=transformer", "encoder.model=m") == "pool"  # not measured
    # It has a loss of its own, and makes a step a batch.
    assert labels_of("classifier_stage.accumulate=2") == "pool"
    assert labels_of("classifier_stage.loss=triplet") == "pool"
    assert labels_of("classifier_stage.loss=triplet", "classifier_stage.labels=all") == "all"


@pytest.mark.parametrize(
    ("kind", "labels", "drawn"),
    [("bag", 20_000, 0), ("bag", 20_001, 2048), ("transformer", 20_001, 0)],
)
def test_labels_are_drawn_where_not_all_are_compared(kind, labels, drawn):
    chosen = [f"encoder.kind={kind}", "encoder.model=m"]
    config = Config.load(None, chosen, points=10_000, labels=labels)
    assert config.encoder_stage.random_labels == drawn


def test_a_model_means_a_transformer(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[encoder]\nmodel = "m"\n')
    for config in (Config.load(path), Config.load(sets=["encoder.model=m"])):
        assert config.encoder == EncoderConfig(kind="transformer", model="m")
    config = Config.load(sets=["encoder.model=m"], points=10, labels=10)
    assert config.encoder_stage.learning_rate == 5e-5
    assert Config.load(path, ["encoder.kind=bag"]).encoder.kind == "bag"
    assert Config.load(sets=["encoder.model="]).encoder.kind == "bag"


def test_lora_takes_larger_steps():
    sets = ["encoder.model=m", "encoder.lora_rank=8"]
    config = Config.load(sets=sets, points=10, labels=10)
    assert config.encoder_stage.learning_rate == 3e-3
    assert config.encoder_stage.positives == "one"


def test_few_points_make_small_batches():
    """So that eight epochs have enough updates."""
    sizes = {1: 16, 90: 16, 600: 32, 800: 64, 5000: 256, 12_000: 1024, 10**6: 1024}
    for points, size in sizes.items():
        config = Config.load(points=points, labels=500)
        assert config.encoder_stage.batch_size == config.classifier_stage.batch_size == size
        updates = config.encoder_stage.epochs * points / size
        most = 15 if points < 5000 else 8
        assert 3 <= config.encoder_stage.epochs <= most or points == 1 or 80 <= updates <= 96


def test_few_points_are_visited_more_often():
    few, many = (Config.load(points=points, labels=5000) for points in (20_000, 10**6))
    assert few.encoder_stage.epochs > many.encoder_stage.epochs
    assert few.encoder.dropout > many.encoder.dropout == 0


def test_wrong_sections_are_told_with_the_size_of_the_data_too():
    for setting in ("encoder=5", "encoder_stage=5"):
        with pytest.raises(ValueError, match="is 5, expected a section"):
            Config.load(None, [setting], points=10, labels=10)


def test_sizes_without_a_schedule():
    assert StageConfig(cluster_size=8, start_epoch=3).sizes() == {3: 8}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sed=1", "no setting sed, did you mean seed?"),
        ("encoder.dims=1", "no setting encoder.dims, did you mean encoder.dim?"),
        ("encoder_stages.epochs=1", "no setting encoder_stages, did you mean encoder_stage?"),
        ("batch_size=64", "no setting batch_size, did you mean encoder_stage.batch_size?"),
        ("encoder_stage.dim=64", "no setting encoder_stage.dim, did you mean encoder.dim?"),
        ("xyzzy=1", "no setting xyzzy$"),
        ("seed=one", "seed is 'one', expected int"),
        ("seed=true", "seed is True, expected int"),
        ("seed=1.5", "seed is 1.5, expected int"),
        ("seed=", "seed is '', expected int"),
        ("device=1", "device is 1, expected str"),
        ("encoder=5", "encoder is 5, expected a section"),
        ("seed.a=5", "seed is {'a': 5}, expected int"),
        ("encoder.kind=bert", "encoder.kind is 'bert', expected one of 'bag', 'transformer'"),
        ("classifier_stage.finetune=1", "classifier_stage.finetune is 1, expected bool"),
        ("encoder_stage.schedule=4", "encoder_stage.schedule is 4, expected {epoch = cluster"),
        ("encoder_stage.schedule={a = 4}", "encoder_stage.schedule is"),
        ("encoder_stage.schedule={1 = 0}", "encoder_stage.schedule has size 0 from epoch 1"),
        ("encoder_stage.schedule={-1 = 4}", "encoder_stage.schedule has size 4 from epoch -1"),
        ("seed=-1", "^seed is -1, expected at least 0"),
        ("validation=0", "validation is 0.0, expected more than 0 and less than 1"),
        ("validation=nan", "validation is nan"),
        ("encoder.dim=0", "encoder.dim is 0, expected at least 1"),
        ("encoder.dropout=1", "encoder.dropout is 1.0, expected at least 0 and less than 1"),
        ("encoder.kind=transformer", "^encoder.model is empty, expected a model"),
        ("encoder_stage.temperature=0", "encoder_stage.temperature is 0.0, expected more than 0"),
        (
            "encoder_stage.random_share=1.5",
            "encoder_stage.random_share is 1.5, expected at least 0 and at",
        ),
        ("classifier_stage.dropout=1", "classifier_stage.dropout is 1.0"),
        ("classifier_stage.batch_size=0", "classifier_stage.batch_size is 0, expected at least 1"),
        ("classifier_stage.encoder_learning_rate=0", "encoder_learning_rate is 0.0"),
        ("prediction.k=0", "prediction.k is 0, expected at least 1"),
        ("encoder.dim", "--set encoder.dim: expected key=value"),
    ],
)
def test_wrong_settings(setting, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.").replace("?", r"\?")):
        Config.load(None, [setting])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Config(seed="one"), TypeError, "seed is 'one', expected int"),
        (lambda: Config(seed=-1), ValueError, "seed is -1, expected at least 0"),
        (
            lambda: Config(threads=2**31),
            ValueError,
            "threads is 2147483648, expected at least 0 and",
        ),
        (lambda: Config(encoder={}), TypeError, "encoder is {}, expected a section"),
        (lambda: EncoderConfig(dim=2.0), TypeError, r"dim is 2\.0, expected int"),
        (lambda: EncoderConfig(kind="bert"), ValueError, "kind is 'bert', expected one of 'bag'"),
        (lambda: StageConfig(schedule={2: 0}), ValueError, "schedule has size 0 from epoch 2"),
        (lambda: StageConfig(schedule=[2]), TypeError, r"schedule is \[2\], expected {epoch"),
        (lambda: PredictionConfig(k=0), ValueError, "k is 0, expected at least 1"),
    ],
)
def test_settings_made_in_python_are_checked_too(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_differences_are_named():
    before = Config.load(sets=["encoder.dim=32", "encoder_stage.schedule={1 = 4, 5 = 8}"])
    assert differences(before, before) == ""
    sets = ["seed=9", "encoder_stage.schedule={1 = 4}", 'prediction.scorers=["encoder"]']
    assert differences(before, Config.load(sets=sets)) == (
        "seed is 0, not 9, encoder.dim is 32, not 256, encoder_stage.schedule is {1 = 4, 5 = 8}, "
        'not {1 = 4}, prediction.scorers is ["encoder", "classifier", "neighbours", "tfidf", '
        '"tfidf_title", "tfidf_neighbours", "tfidf_classifier", "co_occurrence"], not ["encoder"]'
    )


SECTIONS = (
    Config,
    EncoderConfig,
    EncoderStageConfig,
    ClassifierStageConfig,
    PredictionConfig,
)


def test_every_setting_has_a_meaning():
    for section in SECTIONS:
        for setting in dataclasses.fields(section):
            if setting.default is not dataclasses.MISSING:
                assert setting.metadata["meaning"].endswith(".")
                assert (
                    f"{setting.name} : {type(setting.default).__name__}, default" in section.__doc__
                )


def test_the_list_of_settings_changes_nothing_until_it_is_edited(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(described(), encoding="utf8")
    assert Config.load(path, points=20_000, labels=50) == Config.load(points=20_000, labels=50)
    # A setting is a line that begins with "#" and no space.
    lines = [re.sub("^#(?! )", "", line) for line in described().splitlines()]
    assert max(map(len, lines)) <= 120
    path.write_text("\n".join(lines), encoding="utf8")
    assert tomllib.loads(path.read_text(encoding="utf8")) == settings()


def test_set_within_what_is_no_section(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("encoder = 5\n")
    with pytest.raises(ValueError, match=r"--set encoder\.dim=3: encoder is no section"):
        Config.load(path, ["encoder.dim=3"])


def test_wrong_files(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("seed = \n")
    with pytest.raises(ValueError, match=r"a\.toml: .*line 1"):
        Config.load(path)
    path.write_bytes(b"device = '\xff'")
    with pytest.raises(ValueError, match=r"a\.toml: .*utf-8"):
        Config.load(path)
    with pytest.raises(FileNotFoundError):
        Config.load(tmp_path / "b.toml")

"""Several bag encoders side by side."""

import json

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

import ngame
from ngame.cli import main
from ngame.data.formats import save_dataset
from ngame.encoders.bag import BagEncoder
from ngame.encoders.ensemble import Ensemble, split
from ngame.encoders.load import load_encoder
from ngame.prediction.model import Model

TEXTS = ["red apple", "green pear", "yellow pepper", "red pepper and green bean", ""]


@pytest.fixture
def ensemble():
    first = BagEncoder.fit(TEXTS, dim=64, layers=1, seed=3)
    return Ensemble.of(first, TEXTS, 3, seed=3).eval()


def test_a_cosine_is_the_mean_of_the_members_cosines(ensemble):
    assert ensemble.dim == 192
    tokens = ensemble.tokenize(TEXTS[:4])
    x = F.normalize(ensemble(tokens), dim=1)
    of_members = [F.normalize(member(tokens), dim=1) for member in ensemble.members]
    mean = torch.stack([own @ own.T for own in of_members]).mean(0)
    torch.testing.assert_close(x @ x.T, mean)
    for part, own in zip(split(ensemble, x), of_members, strict=True):
        torch.testing.assert_close(part, own)
    assert split(ensemble.members[0], x) == [x]


def test_members_differ_and_are_drawn_by_the_seed(ensemble):
    first, *others = [member.embedding.weight for member in ensemble.members]
    for other in others:
        assert (first - other).abs().max() > 0.1
        # The frequencies are those of the same texts.
        torch.testing.assert_close(
            other.norm(dim=1) / first.norm(dim=1), torch.ones(len(first)), rtol=0.6, atol=0
        )
    again = Ensemble.of(BagEncoder.fit(TEXTS, dim=64, layers=1, seed=3), TEXTS, 3, seed=3)
    for ours, theirs in zip(ensemble.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_save_and_load(ensemble, tmp_path):
    ensemble.save(tmp_path)
    loaded = load_encoder(tmp_path).eval()
    tokens = loaded.tokenize(TEXTS)
    assert torch.equal(loaded(tokens), ensemble(tokens))
    alone = load_encoder(tmp_path / "1").eval()  # which sentence-transformers opens, too
    assert torch.equal(alone(tokens), ensemble.members[1](tokens))


def test_padded_texts_have_the_same_vectors(ensemble):
    tokens = ensemble.tokenize(TEXTS[:4])
    shape = 4, tokens.lengths.max()
    ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for row, own in enumerate(np.split(tokens.ids, tokens.offsets[1:-1])):
        ids[row, : len(own)], mask[row, : len(own)] = torch.from_numpy(own), True
    torch.testing.assert_close(ensemble.padded(ids, mask), ensemble(tokens))


@pytest.mark.parametrize(
    "sets", [(), tiny.FINETUNED, ("classifier_stage.labels='all'",)], ids=["pool", "tuned", "all"]
)
def test_a_run_trains_each_member_by_its_own_loss(tmp_path, sets):
    config = tiny.config("encoder.members=2", *sets)
    model = ngame.train(tiny.dataset(), config, folder=tmp_path)
    assert model.label_vectors.shape[1] == 2 * config.encoder.dim
    assert model.metrics["fused"]["P@1"] > 0.5
    for vectors in (model.label_vectors, model.classifier):
        for part in np.split(vectors, 2, axis=1):  # each member counts alike
            np.testing.assert_allclose(np.linalg.norm(part, axis=1), np.sqrt(0.5), rtol=1e-4)
    texts = tiny.dataset().test_texts
    again = Model.load(tmp_path).predict(texts)
    assert (again != model.predict(texts)).nnz == 0


def test_one_member_more_changes_nothing_for_the_first(tmp_path):
    """Their gradients do not mix: but for clipping, dropout and clusters it trains as if alone."""
    sets = (
        *("encoder.dropout=0.0", "classifier_stage.epochs=0"),
        *("encoder_stage.clip=0", "encoder_stage.cluster_size=1"),
    )
    found = []
    for members in (1, 2):
        model = ngame.train(tiny.dataset(), tiny.config(f"encoder.members={members}", *sets))
        found.append(model.encoder.members[0] if members > 1 else model.encoder)
    alone, beside = (dict(encoder.named_parameters()) for encoder in found)
    for name, value in alone.items():
        # All but steps by gradients that are nearly zero, whose sign is that of the rounding.
        close = torch.isclose(value, beside[name], rtol=1e-2, atol=1e-3)
        assert close.float().mean() > 0.97, name


def test_the_preset(tmp_path):
    save_dataset(tiny.dataset(), tmp_path / "data")
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    assert main(["train", data, "-o", run, "--preset", "quality", "--set", "encoder.dim=8"]) == 0
    assert json.loads((tmp_path / "run/encoder/1/config.json").read_text())["dim"] == 8

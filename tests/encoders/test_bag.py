"""The bag-of-sub-words encoder, `BagEncoder`."""

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from ngame.data.tokens import Tokens
from ngame.encoders.bag import BagEncoder, _drop_tokens
from ngame.encoders.base import Encoder
from ngame.encoders.encode import encode

TEXTS = ["red apple pie", "green apple", "a red car", "the green car", "Äpfel und Öl"] * 3
# Full-width letters, which Unicode compatibility normalisation turns into plain ones.
WIDE_APPLE = "\uff21\uff30\uff30\uff2c\uff25"
UNSEEN = ["blue \u4e16\u754c submarine", "\u200b\x00", f"\ufb01ne {WIDE_APPLE}", "apple " * 500]


@pytest.fixture
def encoder():
    return BagEncoder.fit(TEXTS, dim=12, layers=2, seed=3)


def test_is_an_encoder(encoder):
    assert isinstance(encoder, Encoder)
    vectors = encode(encoder, encoder.tokenize(TEXTS))
    assert vectors.shape == (len(TEXTS), 12)
    # The layers start as the identity, and the vectors before them all have the same length.
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.sqrt(12) / 2, rtol=1e-5)


def test_words_tell_texts_apart(encoder):
    a, b, same = encode(encoder, encoder.tokenize(["red apple pie", "green car", "PIE apple red"]))
    np.testing.assert_allclose(a, same, atol=1e-6)
    assert np.abs(a - b).max() > 0.1


def test_save_and_load(encoder, tmp_path):
    with torch.no_grad():  # other weights than the initial ones
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    encoder.dropout = 0.25
    encoder.save(tmp_path)
    loaded = BagEncoder.load(tmp_path)
    assert loaded.dropout == 0.25
    assert loaded.state_dict().keys() == encoder.state_dict().keys()
    tokens, again = encoder.tokenize(TEXTS + UNSEEN), loaded.tokenize(TEXTS + UNSEEN)
    np.testing.assert_array_equal(tokens.ids, again.ids)
    np.testing.assert_array_equal(encode(encoder, tokens), encode(loaded, again))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_saved_folder_loads_in_sentence_transformers(layers, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    encoder = BagEncoder.fit(TEXTS, dim=48, layers=layers)
    with torch.no_grad():  # layers that change what they get
        for parameter in encoder.layers.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    encoder.save(tmp_path)
    theirs = library.SentenceTransformer(str(tmp_path), device="cpu")
    assert theirs.get_embedding_dimension() == 48
    texts = [*TEXTS, *UNSEEN, "", " "]
    ours = encode(encoder, encoder.tokenize(texts))
    ours /= np.maximum(np.linalg.norm(ours, axis=1, keepdims=True), 1e-30)
    np.testing.assert_allclose(theirs.encode(texts), ours, atol=1e-6)
    np.testing.assert_allclose(theirs.encode([""]), ours[-1:], atol=1e-6)  # alone in its batch
    # Saved again by the library, it still opens there.
    theirs.save(str(tmp_path / "again"))
    again = library.SentenceTransformer(str(tmp_path / "again"), device="cpu")
    np.testing.assert_array_equal(again.encode(texts), theirs.encode(texts))


def test_texts_with_unknown_characters(encoder):
    tokens = encoder.tokenize(UNSEEN)
    lengths = tokens.lengths
    assert lengths[0] > 0
    vectors = encode(encoder, tokens)
    assert np.isfinite(vectors).all()
    full_width, plain = encode(encoder, encoder.tokenize([WIDE_APPLE, "apple"]))
    np.testing.assert_array_equal(full_width, plain)


def test_long_texts_are_cut(tmp_path):
    """A vocabulary of the start of each text, and the first tokens of each text."""
    texts = [f"{text} {'zebra ' * 100}" for text in TEXTS]
    short = BagEncoder.fit(texts, dim=4, vocab_size=60, max_length=2)
    whole = BagEncoder.fit([text[:32] for text in texts], dim=4, vocab_size=60)
    assert short.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    cut, full = short.tokenize(texts), whole.tokenize(texts)
    assert (cut.lengths == 2).all()
    assert (full.lengths > 100).all()
    np.testing.assert_array_equal(cut.ids[::2], full.ids[full.offsets[:-1]])
    short.save(tmp_path)
    assert BagEncoder.load(tmp_path).max_length == 2
    assert (BagEncoder.fit(texts, dim=4).tokenize(["a b " * 999]).lengths == 512).all()


def test_texts_without_a_token(encoder):
    """White space is a non-empty string without tokens."""
    tokens = encoder.tokenize([" ", "red", "\t"])
    assert tokens.lengths.tolist()[::2] == [0, 0]
    for training in (False, True):
        vectors = encoder.train(training)(tokens)
        assert torch.isfinite(vectors).all()
        encoder.zero_grad()
        vectors.sum().backward()
        assert all(torch.isfinite(p.grad.to_dense()).all() for p in encoder.parameters())
        assert encoder(encoder.tokenize([" "])).shape == (1, 12)
        assert encoder(encoder.tokenize([])).shape == (0, 12)


def test_training_and_evaluation_agree_without_dropout(encoder):
    tokens = encoder.tokenize(TEXTS + UNSEEN)
    trained = encoder.train()(tokens)
    evaluated = encoder.eval()(tokens)
    torch.testing.assert_close(trained, evaluated)
    for mode in (True, False):
        encoder.train(mode).zero_grad()
        (encoder(tokens) ** 2).sum().backward()
        gradient = encoder.embedding.weight.grad.coalesce()
        if mode:
            expected = gradient
    assert torch.equal(gradient.indices(), expected.indices())
    torch.testing.assert_close(gradient.values(), expected.values())


def test_gradient_is_sparse_and_summed(encoder):
    tokens = encoder.tokenize(["red red red apple", "red car"])
    encoder.train()(tokens).sum().backward()
    gradient = encoder.embedding.weight.grad
    assert gradient.is_sparse
    rows = gradient._indices()[0].tolist()
    assert sorted(rows) == sorted(set(tokens.ids.tolist()))


def test_dropout(encoder):
    tokens = encoder.tokenize(["red apple pie green car " * 20])
    encoder.dropout = 0.5
    plain = encoder.eval()(tokens)
    assert torch.equal(encoder(tokens), plain)
    encoder.train()
    torch.manual_seed(1)
    first, second = encoder(tokens), encoder(tokens)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(encoder(tokens), first)


def test_dropout_drops_its_share_but_never_a_whole_text():
    torch.manual_seed(0)
    rows = [[7], [], *([list(range(row, row + 40)) for row in range(100)])]
    tokens = Tokens.from_lists(rows)
    thin = _drop_tokens(tokens, 0.3)
    assert thin.lengths[2:].mean() == pytest.approx(28, abs=1)
    ends = thin.offsets
    for row, (a, b) in enumerate(pairwise(ends)):
        left = thin.ids[a:b].tolist()
        assert left == [i for i in rows[row] if i in left]
    for _ in range(20):
        lengths = _drop_tokens(Tokens.from_lists([[1, 2], [3], [], [4]]), 0.9).lengths
        assert lengths[[0, 1, 3]].all()
        assert lengths[2] == 0


def test_frequent_words_weigh_less():
    texts = [f"the word{number % 7} the" for number in range(70)]
    encoder = BagEncoder.fit(texts, dim=16)
    tokens = encoder.tokenize(["the", "word3"])
    sizes = encoder.embedding.weight.detach().norm(dim=1).numpy()
    # This word is in every text. Its weight is small, but its vector is not zero.
    assert 0 < sizes[tokens.ids[0]] < 0.1 * sizes[tokens.ids[1]]
    assert sizes[tokens.ids[1:]].max() > 0.2


def test_vocab_size():
    encoder = BagEncoder.fit(TEXTS, dim=4, vocab_size=30)
    assert encoder.tokenizer.get_vocab_size() <= 30
    assert encoder.embedding.num_embeddings == encoder.tokenizer.get_vocab_size()


FIT = """
import json, sys
from ngame.encoders.bag import BagEncoder
texts = json.loads(sys.stdin.read())
encoder = BagEncoder.fit(texts, dim=4, seed=5)
weights = encoder.embedding.weight.detach().numpy().tobytes().hex()
print(json.dumps([encoder.tokenizer.to_str(), encoder.tokenize(texts).ids.tolist(), weights]))
"""


def test_fit_is_the_same_in_every_process(rng):
    """With many words of equal counts, the result must not depend on hash-table order."""
    words = ["".join(rng.choice(list("abcdefgh"), 5)) for _ in range(300)]
    texts = [" ".join(rng.choice(words, 8)) for _ in range(200)]
    done = subprocess.run(
        [sys.executable, "-c", FIT],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
    )
    tokenizer, ids, weights = json.loads(done.stdout)
    here = BagEncoder.fit(texts, dim=4, seed=5)
    assert tokenizer == here.tokenizer.to_str()
    assert ids == here.tokenize(texts).ids.tolist()
    assert weights == here.embedding.weight.detach().numpy().tobytes().hex()


def test_weights_depend_on_the_seed():
    first, same, other = (BagEncoder.fit(TEXTS, dim=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.embedding.weight, same.embedding.weight)
    assert torch.equal(first.layers[0][0].weight, same.layers[0][0].weight)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


def test_bad_input(encoder):
    with pytest.raises(ValueError, match="texts is empty"):
        BagEncoder.fit([])
    with pytest.raises(TypeError, match="texts is a str"):
        encoder.tokenize("red")
    with pytest.raises(TypeError, match="text 1 is a NoneType, expected a str"):
        encoder.tokenize(["red", None])

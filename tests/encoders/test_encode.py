"""Encoding: side effects on training, the order of rows, and errors of wrong encoders."""

import doctest
import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ngame.data.tokens import Tokens
from ngame.encoders import bank as bank_module
from ngame.encoders import encode as encode_module
from ngame.encoders.encode import check_vectors, encode, encode_rows, evaluating
from ngame.encoders.vectors import normalize, to_float16


class Model(torch.nn.Module):
    """Has a layer frozen in evaluation mode, and a `train` that does more than set the mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(50, 6)
        self.body = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(6))
        self.merged = False
        self.body[1].eval()

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)

    def forward(self, rows):
        return self.body(self.table(torch.as_tensor(rows)))


@pytest.fixture
def model():
    model = Model().train()
    model.body[1].eval()
    return model


def modes(model):
    return [module.training for module in model.modules()]


def seed_all():
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)


def draw_of_all():
    return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_restores_every_mode(model, training):
    if not training:
        model.eval()
    before = modes(model)
    assert before == ([True, True, True, True, False] if training else [False] * 5)
    with evaluating(model):
        assert modes(model) == [False] * 5
        assert model.merged
        assert not torch.is_grad_enabled()
    assert modes(model) == before
    assert model.merged is not training
    assert torch.is_grad_enabled()


def test_evaluating_restores_after_an_error(model):
    before = modes(model)
    seed_all()
    expected = draw_of_all()

    def interrupted():
        draw_of_all()
        raise KeyboardInterrupt

    seed_all()
    with pytest.raises(KeyboardInterrupt), evaluating(model):
        interrupted()
    assert modes(model) == before
    assert torch.is_grad_enabled()
    assert draw_of_all() == expected


def test_training_draws_the_same_random_numbers(model):
    seed_all()
    expected = draw_of_all()
    seed_all()
    with evaluating(model), evaluating(model):
        draw_of_all()
    assert draw_of_all() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch sees")
def test_random_state_of_cuda(model):
    device = torch.device("cuda")
    torch.manual_seed(1)
    expected = torch.rand(1, device=device)
    torch.manual_seed(1)
    with evaluating(model):
        torch.rand(1, device=device)
    assert torch.equal(torch.rand(1, device=device), expected)


def test_tensors_made_within_the_block_can_be_used_in_training(model):
    """Inference mode would not allow that."""
    with evaluating(model):
        kept = torch.ones(2, 6) * 3
    (model(np.arange(2)) * kept).sum().backward()
    assert model.table.weight.grad.any()


def test_encoding_has_no_effect_on_a_training_step(model):
    """Dropout draws the same masks, and the running means of BatchNorm do not change."""

    def step():
        torch.manual_seed(5)
        return model(np.arange(8))

    model.body[1].train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = step()
    model.load_state_dict(state)
    torch.manual_seed(5)
    encode_rows(model, 50, model=model, chunk_size=7)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert torch.equal(model(np.arange(8)), expected)


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1000])
def test_rows_come_back_in_order(model, chunk_size):
    sizes = []

    def encode(rows):
        assert rows.dtype == np.int64
        sizes.append(len(rows))
        return model(rows)

    vectors = encode_rows(encode, 50, model=model, chunk_size=chunk_size)
    assert vectors.dtype == np.float32
    assert vectors.flags.c_contiguous
    with evaluating(model):
        np.testing.assert_allclose(vectors, model(np.arange(50)).numpy(), atol=1e-6)
    assert sizes == [chunk_size] * (50 // chunk_size) + [50 % chunk_size] * (50 % chunk_size > 0)


def test_chunks_have_rows_of_similar_length(model, rng):
    lengths = rng.integers(0, 40, 50)
    chunks = []

    def encode(rows):
        chunks.append(rows)
        return model(rows)

    vectors = encode_rows(encode, 50, model=model, chunk_size=64, lengths=lengths)
    np.testing.assert_array_equal(vectors, encode_rows(model, 50, model=model, chunk_size=1))
    assert (np.diff(lengths[np.concatenate(chunks)]) <= 0).all()
    for rows, after in zip(chunks, [*chunks[1:], []], strict=True):
        longest = max(1, lengths[rows[0]])
        assert len(rows) * longest <= 64
        assert not len(after) or (len(rows) + 1) * longest > 64  # not smaller than necessary
    encode_rows(
        encode, 3, model=model, chunk_size=2, lengths=[9, 9, 1]
    )  # rows longer than the chunk


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_accepted(model, dtype):
    expected = encode_rows(model, 50, model=model)
    np.testing.assert_allclose(
        encode_rows(lambda rows: model(rows).to(dtype), 50, model=model), expected, rtol=0.01
    )
    array = encode_rows(lambda rows: model(rows).double().numpy(), 50, model=model)
    np.testing.assert_array_equal(array, expected)


def test_wrong_encoders(model):
    def fails(encode, error, message, **others):
        with pytest.raises(error, match=message):
            encode_rows(encode, 5, model=model, **others)
        assert modes(model) == [True, True, True, True, False]

    fails(lambda rows: model(rows)[0], ValueError, r"returned shape \(6,\), expected \(5, width\)")
    fails(lambda rows: model(rows[1:]), ValueError, r"shape \(4, 6\), expected \(5, 6\)")
    fails(
        lambda rows: model(rows)[:, : 3 + rows[0] % 2],
        ValueError,
        r"shape \(1, 4\), expected \(1, 3\)",
        chunk_size=1,
    )
    fails(lambda rows: model(rows).tolist(), TypeError, "returned a list, expected a float tensor")
    fails(lambda rows: model(rows).int(), TypeError, "returned of dtype int32, expected floats")
    fails(
        lambda rows: model(rows).masked_fill(torch.as_tensor(rows[:, None] == 3), torch.inf),
        ValueError,
        "returned NaN or infinity for row 3$",
        chunk_size=2,
    )
    fails(model, ValueError, "lengths has 4 rows, n_rows is 5", lengths=[1] * 4)
    fails(model, TypeError, "lengths has dtype float64", lengths=[1.0] * 5)
    fails(model, ValueError, "chunk_size is 0", chunk_size=0)
    with pytest.raises(ValueError, match="n_rows is 0"):
        encode_rows(model, 0, model=model)


@pytest.mark.parametrize("module", [encode_module, bank_module])
def test_examples_in_docstrings(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


# Encoding texts


class Sums(torch.nn.Module):
    """A text's vector is (sum of its ids, number of its ids, 1)."""

    dim = 3

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, tokens):
        assert not self.training
        assert not torch.is_grad_enabled()
        self.batches.append(tokens.lengths)
        ids = [tokens.ids[a:b] for a, b in pairwise(tokens.offsets)]
        return torch.tensor([[float(sum(row)), len(row), 1.0] for row in ids])


def some_tokens(rng, rows=50):
    return Tokens.from_lists([rng.integers(100, size=rng.integers(8)) for _ in range(rows)])


@pytest.mark.parametrize("tokens_per_batch", [1, 7, 64, 10_000])
def test_texts_come_back_in_order(rng, tokens_per_batch):
    tokens = some_tokens(rng)
    encoder = Sums()
    vectors = encode(encoder, tokens, tokens_per_batch=tokens_per_batch)
    expected = [(tokens.ids[a:b].sum(), b - a, 1) for a, b in pairwise(tokens.offsets)]
    np.testing.assert_array_equal(vectors, expected)
    assert vectors.dtype == np.float32
    for lengths in encoder.batches:
        assert len(lengths) == 1 or len(lengths) * max(1, lengths.max()) <= tokens_per_batch


@pytest.mark.parametrize("device", [None, torch.device("cpu")], ids=["array", "tensor"])
@pytest.mark.parametrize("dim", [3, 256])
def test_unit_vectors_have_the_bits_of_those_scaled_afterwards(rng, device, dim):
    tokens = some_tokens(rng, 300)
    table = torch.nn.Embedding(100, dim)

    def forward(part):
        bags = part.ids.astype(np.int64), part.offsets[:-1]
        return F.embedding_bag(torch.from_numpy(bags[0]), table.weight, torch.from_numpy(bags[1]))

    encoder = Sums()
    encoder.dim, encoder.forward = dim, forward
    some = {"device": device, "tokens_per_batch": 64}
    expected = normalize(encode(encoder, tokens, **some))
    found = encode(encoder, tokens, unit=True, **some)
    half = encode(encoder, tokens, unit=True, dtype=torch.float16, **some)
    for vectors, same in ((found, expected), (half, to_float16(expected))):
        assert type(vectors) is type(same)
        assert vectors.dtype == same.dtype
        np.testing.assert_array_equal(vectors, same)
    assert tokens.lengths.min() == 0
    assert not found[np.argmin(tokens.lengths)].any()


def test_half_precision_takes_no_memory_beside_the_result():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.5


# Peak memory of encoding, as a multiple of its result of 102 MB.
MEMORY = """
import resource
import numpy as np, torch
from ngame.data.tokens import Tokens
from ngame.encoders.encode import encode
class Encoder(torch.nn.Module):
    dim = 512
    def forward(self, tokens):
        return torch.ones(len(tokens), self.dim)
torch.set_num_threads(1)
tokens = Tokens(np.ones(100_000, np.int32), np.arange(100_001))
few = {"unit": True, "dtype": torch.float16, "tokens_per_batch": 1000}
encode(Encoder(), tokens.part(slice(0, 2000)), **few)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = encode(Encoder(), tokens, **few)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / found.nbytes)
"""


def test_no_texts():
    assert encode(Sums(), Tokens.from_lists([])).shape == (0, 3)
    half = encode(Sums(), Tokens.from_lists([]), unit=True, dtype=torch.float16)
    assert half.dtype == np.float16


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("unit", [False, True])
def test_nan_names_the_text(value, unit):
    tokens = Tokens.from_lists([[1], [2, 2], [3]])
    encoder = Sums()
    good = encoder.forward
    encoder.forward = lambda t: good(t).masked_fill_(good(t) == 4, value)
    with pytest.raises(ValueError, match=r"NaN or infinity for row 1$"):
        encode(encoder, tokens, unit=unit)


def test_wrong_shape_and_type(rng):
    with pytest.raises(ValueError, match=r"returned shape \(2, 4\), expected \(2, 3\)"):
        check_vectors(torch.zeros(2, 4), 2, 3)
    with pytest.raises(ValueError, match=r"returned shape \(3,\), expected \(2, 3\)"):
        check_vectors(torch.zeros(3), 2, 3)
    with pytest.raises(TypeError, match="returned a ndarray, expected a tensor"):
        check_vectors(np.zeros((2, 3)), 2, 3)
    encoder = Sums()
    encoder.dim = 5
    with pytest.raises(ValueError, match=r"expected \(\d+, 5\)"):
        encode(encoder, some_tokens(rng))

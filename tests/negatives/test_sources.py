"""What sources offer, and under which ids."""

import io
import math

import numpy as np
import pytest
import torch

from ngame.negatives import Candidates, EmaEncoder, NegativeQueue, Schedule, SharedRandom

# Candidates


def test_scores_of_shared_and_own_candidates(rng):
    x = torch.from_numpy(rng.standard_normal((3, 4)))
    vectors = torch.from_numpy(rng.standard_normal((3, 2, 4)))
    own = Candidates(np.arange(6).reshape(3, 2), vectors)
    expected = np.array([[x[i] @ vectors[i, j] for j in range(2)] for i in range(3)])
    np.testing.assert_allclose(own.scores(x), expected)
    assert not own.shared
    assert len(own) == 2
    taken = own.take(slice(1, 3))
    np.testing.assert_allclose(taken.scores(x[1:]), expected[1:])
    assert taken.ids.tolist() == [[2, 3], [4, 5]]
    shared = Candidates([7, 8], vectors[0])
    np.testing.assert_allclose(shared.scores(x), x @ vectors[0].T)
    assert shared.take(slice(1, 2)) is shared


def test_ids_come_as_lists_arrays_or_tensors():
    for ids in ([1, 2], np.array([1, 2], np.int32), torch.tensor([1, 2])):
        candidates = Candidates(ids, torch.zeros(2, 3))
        assert candidates.ids.dtype == np.int64
        assert candidates.ids.tolist() == [1, 2]
    assert len(Candidates([], torch.zeros(0, 3))) == 0


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 2, 2)])
def test_candidates_of_wrong_shapes(shape):
    with pytest.raises(ValueError, match="ids has shape"):
        Candidates([1, 2], torch.zeros(shape))
    with pytest.raises(ValueError, match="shift has shape"):
        Candidates([1, 2], torch.zeros(2, 3), shift=torch.zeros(3))
    for ids, vectors in (([1, 2], torch.zeros(2, 3)), ([[1], [2]], torch.zeros(2, 1, 3))):
        with pytest.raises(ValueError, match="rows has shape"):
            Candidates(ids, vectors, rows=np.zeros(np.size(ids) - 1, int))
    with pytest.raises(TypeError):
        Candidates([1.5, 2], torch.zeros(2, 3))


# Draws


@pytest.mark.parametrize("weights", [None, np.arange(50)])
def test_draws_are_functions_of_the_step(weights):
    draw = SharedRandom(50, 8, weights=weights, reuse=3, seed=1).draw
    again = SharedRandom(50, 8, weights=weights, reuse=3, seed=1).draw
    for step in (7, 0, 5):
        ids, log_q = draw(step)
        np.testing.assert_array_equal(ids, again(step).ids)
        assert ids.dtype == np.int64
        assert log_q.dtype == np.float32
        assert len(ids) == len(log_q) == 8
        assert (np.diff(ids) > 0).all()
    np.testing.assert_array_equal(draw(3).ids, draw(5).ids)
    assert (draw(5).ids != draw(6).ids).any()
    SharedRandom(50, 8, seed=2**64)  # of any size
    other = SharedRandom(50, 8, weights=weights, reuse=3, seed=2)
    assert (draw(0).ids != other.draw(0).ids).any()


@pytest.mark.parametrize("power", [None, 1.0])
def test_how_often_ids_are_drawn_is_what_log_q_says(power):
    """The frequency of each id over many draws against the mean of the stated probabilities."""
    steps, count = 4000, 12
    weights = None if power is None else np.arange(count) ** power
    shared = SharedRandom(count, 4, weights=weights)
    there, stated = np.zeros(count), [[] for _ in range(count)]
    for step in range(steps):
        ids, log_q = shared.draw(step)
        there[ids] += 1
        for number, value in zip(ids, log_q, strict=True):
            stated[number].append(math.exp(value))
    if power is None:
        assert set(np.concatenate(stated).round(6)) == {round(4 / 12, 6)}
        assert (abs(there / steps - 1 / 3) < 3 * math.sqrt(2 / 9 / steps)).all()
    else:
        assert there[0] == 0
        # Inverse probabilities count every id once a step: an estimate of the number of ids.
        inverse = [sum(1 / q for q in values) / steps for values in stated[1:]]
        np.testing.assert_allclose(inverse, 1, atol=0.15)


def test_log_q_is_about_the_number_drawn_times_the_share():
    weights = np.ones(100_000)
    weights[0] = 10
    ids, log_q = SharedRandom(100_000, 50, weights=weights).draw(3)
    expected = np.log(50 * weights[ids] / weights.sum())
    np.testing.assert_allclose(log_q, expected, atol=2e-2)


def test_fewer_ids_than_asked_for():
    assert SharedRandom(3, 10).draw(0).ids.tolist() == [0, 1, 2]
    assert SharedRandom(3, 10).draw(0).log_q.tolist() == [0, 0, 0]
    few = SharedRandom(4, 10, weights=[0, 1, 0, 2]).draw(0)
    assert few.ids.tolist() == [1, 3]
    assert few.log_q.tolist() == [0, 0]
    assert SharedRandom(3, 0).draw(0).ids.tolist() == []
    assert SharedRandom(3, 0, weights=[1, 2, 3]).draw(0).ids.tolist() == []


def test_the_number_drawn_follows_a_schedule():
    draw = SharedRandom(100, Schedule({0: 2, 5: 20})).draw
    assert [len(draw(step).ids) for step in (0, 4, 5, 9)] == [2, 2, 20, 20]


def test_more_random_labels_estimate_the_whole_softmax_better():
    """Gradient of sampled softmax with log-q against the whole one's: unbiased as m grows."""
    rng = np.random.default_rng(0)
    items = torch.from_numpy(rng.standard_normal((200, 4)))
    query = torch.from_numpy(rng.standard_normal(4)).requires_grad_()
    (whole,) = torch.autograd.grad(torch.logsumexp(items @ query, 0), query)

    def bias(m, steps=600):
        shared, found = SharedRandom(200, m, seed=m), torch.zeros(steps, 4)
        for step in range(steps):
            ids, log_q = shared.draw(step)
            logits = items[ids] @ query - torch.from_numpy(log_q)
            (found[step],) = torch.autograd.grad(torch.logsumexp(logits, 0), query)
        return (found.mean(0) - whole).norm(), found.std(0).norm() / math.sqrt(steps)

    (few, _), (many, noise) = bias(4), bias(64)
    assert many < few / 2
    assert many < 0.05 + 3 * noise


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"count": 0}, ValueError, "count"),
        ({"m": -1}, ValueError, "m is -1"),
        ({"reuse": 0}, ValueError, "reuse"),
        ({"weights": [1, 2]}, ValueError, "weights has shape"),
        ({"weights": [1, -1, 1]}, ValueError, "negative"),
        ({"weights": [0, 0, 0]}, ValueError, "no positive"),
        ({"weights": [1, math.nan, 0]}, ValueError, "NaN"),
    ],
)
def test_bad_draws(options, error, message):
    with pytest.raises(error, match=message):
        SharedRandom(**({"count": 3, "m": 1} | options))


# Queues


@pytest.mark.parametrize("batches", [[1, 2, 3], [5, 5], [2, 9, 0, 1], [12], []])
def test_a_queue_against_a_list(batches):
    """Sizes that do not divide the capacity, and one beyond it; the oldest first."""
    queue, everything = NegativeQueue(5, 2), []
    for size in batches:
        ids = np.arange(size) + len(everything)
        everything += ids.tolist()
        queue.push(ids, torch.stack([torch.tensor([n, -n]) for n in ids]) if size else zeros(0))
        offered = queue.offer()
        assert offered.ids.tolist() == everything[-5:]
        assert offered.vectors[:, 0].tolist() == everything[-5:]
        assert len(queue) == len(offered) == min(5, len(everything))
    assert len(queue.offer()) == min(5, len(everything))


def zeros(rows):
    return torch.zeros(rows, 2)


def test_what_was_offered_stays_and_has_no_gradient():
    queue = NegativeQueue(2, 2)
    queue.push([1, 2], torch.ones(2, 2, requires_grad=True))
    offered = queue.offer(weight=0.5)
    queue.push([3, 4], zeros(2))
    assert offered.ids.tolist() == [1, 2]
    assert offered.weight == 0.5
    assert offered.vectors.tolist() == [[1, 1], [1, 1]]
    assert not offered.vectors.requires_grad


def test_a_queue_goes_on_from_its_state():
    queue = NegativeQueue(3, 2)
    queue.push([1, 2, 3, 4], torch.arange(8.0).reshape(4, 2))
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    state = torch.load(file)  # with weights_only, as by default
    other, older = NegativeQueue(3, 2), NegativeQueue(3, 2)
    other.load_state_dict(state)
    older.load_state_dict({**state, "ids": state["ids"].numpy()})
    for each in (queue, other, older):
        each.push([5], zeros(1))
        assert each.offer().ids.tolist() == [3, 4, 5]
        assert torch.equal(each.offer().vectors, queue.offer().vectors)
    with pytest.raises(ValueError, match="lacks vectors"):
        other.load_state_dict({"ids": np.zeros(3)})
    with pytest.raises(ValueError, match=r"state has ids of shape \(3,\), this queue \(4,\)"):
        NegativeQueue(4, 2).load_state_dict(queue.state_dict())


def test_a_state_of_a_queue_stays_as_it_was():
    queue = NegativeQueue(3, 2)
    queue.push([1, 2], torch.ones(2, 2))
    state = queue.state_dict()
    queue.push([3, 4], zeros(2))
    other = NegativeQueue(3, 2)
    other.load_state_dict(state)
    other.push([5], zeros(1))
    assert state["ids"].tolist() == [1, 2, -1]
    assert state["vectors"].tolist() == [[1, 1], [1, 1], [0, 0]]
    assert other.offer().ids.tolist() == [1, 2, 5]


def test_bad_pushes():
    queue = NegativeQueue(3, 2)
    with pytest.raises(ValueError, match="vectors has shape"):
        queue.push([1], torch.zeros(1, 3))
    with pytest.raises(ValueError, match="capacity"):
        NegativeQueue(0, 2)


# The encoder that follows


def test_following_by_the_closed_form():
    """After t steps behind a constant: m^t of its own start, the rest the encoder's."""
    encoder = torch.nn.Linear(3, 2)
    start = encoder.weight.detach().clone()
    assert EmaEncoder(encoder).momentum == 0.999
    follower = EmaEncoder(encoder, 0.9)
    assert encoder.training
    assert not follower.encoder.training
    with torch.no_grad():
        encoder.weight.add_(1)
    for _ in range(7):
        follower.update(encoder)
    expected = 0.9**7 * start + (1 - 0.9**7) * encoder.weight.detach()
    torch.testing.assert_close(follower.encoder.weight.data, expected)
    out = follower(torch.ones(1, 3))
    assert not out.requires_grad
    assert not any(parameter.requires_grad for parameter in follower.parameters())


def test_following_copies_buffers_and_takes_a_schedule():
    encoder = torch.nn.BatchNorm1d(2)
    follower = EmaEncoder(encoder, Schedule({0: 1.0, 10: 0.0}))
    encoder(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    with torch.no_grad():
        encoder.weight.fill_(5)
    follower.update(encoder, step=0)
    assert torch.equal(follower.encoder.running_mean, encoder.running_mean)
    assert follower.encoder.weight.tolist() == [1, 1]
    follower.update(encoder, step=10)
    assert follower.encoder.weight.tolist() == [5, 5]
    assert encoder.weight.requires_grad
    with pytest.raises(ValueError, match="momentum is 2"):
        EmaEncoder(encoder, 2)


def test_following_an_encoder_of_other_widths():
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 5))
    follower = EmaEncoder(encoder, 0.5)
    says = r"^1.weight of encoder has shape \[5, 2\], the copy's has \[2, 2\]: expected the encoder"
    with pytest.raises(ValueError, match=says):
        follower.update(other)
    for name, tensor in encoder.state_dict().items():  # nothing was changed
        assert torch.equal(follower.encoder.state_dict()[name], tensor)


def test_following_what_is_no_module():
    wanted = "expected a torch.nn.Module"
    with pytest.raises(TypeError, match=f"^encoder is a function, {wanted}"):
        EmaEncoder(lambda x: x)
    with pytest.raises(TypeError, match=r"^encoder is the class Linear, expected one made of it"):
        EmaEncoder(torch.nn.Linear)
    with pytest.raises(TypeError, match=f"^encoder is a OrderedDict, {wanted}"):
        EmaEncoder(torch.nn.Linear(2, 2)).update(torch.nn.Linear(2, 2).state_dict())


def with_a_part_compiled(encoder):
    return torch.nn.Sequential(torch.compile(encoder[0]), encoder[1])


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch's compiler
@pytest.mark.parametrize("copied_wrapped", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        torch.nn.DataParallel,
        lambda encoder: torch.compile(torch.nn.DataParallel(encoder)),
        lambda encoder: torch.nn.DataParallel(torch.compile(encoder)),
        with_a_part_compiled,
    ],
)
def test_following_an_encoder_that_is_wrapped(wrap, copied_wrapped):
    encoder = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    wrapped = wrap(encoder)
    follower = EmaEncoder(wrapped if copied_wrapped else encoder, 0.5)
    start = encoder[0].weight.detach().clone()
    with torch.no_grad():
        encoder[0].weight.add_(1)
        encoder[1].running_mean.add_(1)
    follower.update(encoder if copied_wrapped else wrapped)
    weight = next(follower.parameters())
    torch.testing.assert_close(weight.data, start + 0.5)
    assert next(follower.buffers()).tolist() == [1, 1]


def test_following_an_encoder_with_a_part_named_module():
    encoder = torch.nn.ModuleDict({"module": torch.nn.Linear(3, 2), "head": torch.nn.Linear(2, 2)})
    follower = EmaEncoder(encoder, 0.0)
    with torch.no_grad():
        encoder["module"].weight.add_(1)
    follower.update(encoder)
    assert torch.equal(follower.encoder["module"].weight, encoder["module"].weight)


def test_following_another_encoder():
    follower = EmaEncoder(torch.nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"encoder lacks bias, weight"):
        follower.update(torch.nn.Sequential(torch.nn.Linear(3, 2)))

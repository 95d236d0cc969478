"""A schedule at its places, between them and beyond."""

import math

import pytest

from ngame.negatives import Schedule, value_at


def test_steps_hold_until_the_next():
    size = Schedule({5: 32, 0: 1, 1: 8})
    assert [size(epoch) for epoch in (-1, 0, 0.99, 1, 4, 5, 100)] == [1, 1, 1, 8, 8, 32, 32]


@pytest.mark.parametrize(("shape", "quarter"), [("linear", 3.0), ("cosine", 4 - math.sqrt(2))])
def test_ends_middle_and_quarter(shape, quarter):
    ramp = Schedule({10: 2.0, 20: 6.0}, shape)
    assert [ramp(place) for place in (0, 10, 20, 99)] == [2, 2, 6, 6]
    assert ramp(15) == pytest.approx(4)
    assert ramp(12.5) == pytest.approx(quarter)


def test_several_ramps_join():
    ramp = Schedule({0: 0.0, 2: 1.0, 4: 0.0}, "linear")
    assert [ramp(place) for place in range(5)] == [0, 0.5, 1, 0.5, 0]


def test_a_step_may_be_infinite():
    margin = Schedule({0: math.inf, 3: 0.1})
    assert (margin(2), margin(3)) == (math.inf, 0.1)


def test_a_number_is_a_schedule_that_stays():
    assert value_at(3, 10) == 3
    assert value_at(Schedule({0: 1, 10: 2}), 10) == 2
    assert repr(Schedule({0: 1, 10: 2})) == "Schedule({0.0: 1.0, 10.0: 2.0}, 'step')"


@pytest.mark.parametrize(
    ("values", "shape", "message"),
    [
        ({}, "step", "values is empty"),
        ({0: 1}, "jump", "shape is 'jump'"),
        ({0: math.nan}, "step", "no NaN"),
        ({math.inf: 1}, "step", "finite places"),
        ({0: math.inf, 1: 0}, "linear", "finite numbers"),
    ],
)
def test_bad_values(values, shape, message):
    with pytest.raises(ValueError, match=message):
        Schedule(values, shape)

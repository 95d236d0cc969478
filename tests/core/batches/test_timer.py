"""The timer of refreshes."""

import doctest
import time

from ngame.batches import timer as timer_module
from ngame.batches.timer import RefreshTimer


def test_timer(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    timer = RefreshTimer()
    assert timer.share == 0
    now += 7
    timer.start_epoch()
    for seconds in (1, 2):
        with timer:
            now += seconds
        now += 3
    assert (timer.refresh_seconds, timer.seconds, timer.share) == (3, 9, 3 / 9)
    timer.start_epoch()
    assert (timer.refresh_seconds, timer.seconds, timer.share) == (0, 0, 0)


def test_example_in_the_docstring():
    found = doctest.testmod(timer_module)
    assert found.attempted > 0
    assert found.failed == 0

"""Lines where there is no terminal, a bar where there is one."""

import io
import sys

import pytest

from ngame import progress
from ngame.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass at each look at the clock, by the test's hand."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_a_minute(clock, capsys):
    for item in Progress("encoding", 5, "chunk").over("abcde"):
        assert item in "abcde"
        clock[0] += 31
    assert capsys.readouterr().err == "encoding: 40 %\nencoding: 80 %\n"


def test_what_is_within_says_nothing(clock, capsys):
    for _ in Progress("predicting", 2, "block").over(range(2)):
        for _ in Progress("encoding", 5, "chunk").over(range(5)):
            clock[0] += 31
    assert capsys.readouterr().err == "predicting: 50 %\n"
    for _ in Progress("encoding", 2, "chunk").over(range(2)):
        clock[0] += 61
    assert capsys.readouterr().err == "encoding: 50 %\n"


def test_short_work_says_nothing(clock, capsys):
    with Progress("encoding", 100, "row") as shown:
        for done in range(101):
            clock[0] += 0.5
            shown.reach(done)
    assert capsys.readouterr().err == ""


def test_one_process_of_several_speaks(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for _ in Progress("encoding", 5, "chunk").over(range(5)):
        clock[0] += 100
    assert capsys.readouterr().err == ""


def test_no_standard_error(monkeypatch):
    """As under pythonw, or where it was closed."""
    monkeypatch.setattr(sys, "stderr", None)
    assert list(Progress("encoding", 2, "chunk").over("ab")) == ["a", "b"]


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    with Progress("reading", 10, "B") as shown:
        shown._bar.start_t -= 10  # the bar waits for two seconds
        shown._bar.last_print_t -= 10
        shown.reach(7)
    assert "reading:  70%" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()

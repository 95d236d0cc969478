"""What long work tells people: a bar on a terminal, a line a minute elsewhere."""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import TypeVar

LINE_SECONDS = 60.0
"""Between two lines where there is no terminal."""

_T = TypeVar("_T")


def say(line: str) -> None:
    """Write a line to standard error; where it cannot be written, work goes on without it.

    It may be closed, or a file on a full disk, or a terminal that is gone.
    """
    if sys.stderr is not None:  # else `print` would go to standard output
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


def no_bar() -> bool | None:
    """What tqdm takes as `disable`: None hides bars where standard error is no terminal."""
    return True if sys.stderr is None else None


class Progress:
    """Counts what is done of `total`; a bar from the second second on, or a line a minute.

    Within the block of another one it shows nothing: that one tells of the whole. Of several
    processes of torchrun only the first writes lines.

    Parameters
    ----------
    what : what is done, such as "encoding"
    total : how much there is to do
    unit : of `total`; "B" is shown in thousands and millions
    """

    _shown = threading.local()  # `by`: the one that shows, in each thread

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit, self._done = what, total, unit, 0

    def __enter__(self) -> "Progress":
        from tqdm import tqdm  # here, since `import ngame` loads none

        inner = getattr(self._shown, "by", None) is not None
        if not inner:
            self._shown.by = self
        self._bar = tqdm(
            desc=self._what,
            total=self._total,
            unit=self._unit,
            unit_scale=self._unit == "B",
            disable=True if inner else no_bar(),
            delay=2,
            leave=False,
        )
        self._lines = self._bar.disable and not inner and os.environ.get("RANK", "0") == "0"
        self._said = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if getattr(self._shown, "by", None) is self:
            self._shown.by = None

    def reach(self, done: int) -> None:
        """So much is done in all."""
        self._bar.update(done - self._done)
        self._done = done
        if self._lines and done < self._total:
            now = time.monotonic()
            if now - self._said >= LINE_SECONDS:
                self._said = now
                say(f"{self._what}: {100 * done / self._total:.0f} %")

    def over(self, items: Iterable[_T]) -> Iterator[_T]:
        """Give the items; each is one of the total, done when the next is asked for."""
        with self:
            for done, item in enumerate(items, 1):
                yield item
                self.reach(done)

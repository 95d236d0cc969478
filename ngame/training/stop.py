"""Stopping a run by a signal between two updates, so that it can save its state."""

import signal
import threading
from types import FrameType
from typing import Any, NoReturn, Self

from ngame.files import exit_by_signal
from ngame.ranks import Ranks


class Stop:
    """Within the block Ctrl-C raises KeyboardInterrupt, and SIGTERM and SIGHUP raise SystemExit.

    Its code is 128 and the number of the signal: 143, and 129 where a terminal or ssh hung up.
    Between `hold` and `release` they wait. With several ranks they wait from the first `hold` to
    `end`: at a `release` all ranks act on a signal that came to any, so all stop at one place.
    Handlers that the program has set itself are left as they are, and so is all of it outside the
    main thread, where Python cannot set handlers.

    Attributes
    ----------
    whole : whether the state of the run can be saved; not between `hold` and `release`, where a
        second signal stops the run at once
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.whole = True
        self._held = False
        self._waiting: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            defaults = {
                signal.SIGINT: (signal.default_int_handler,),
                signal.SIGTERM: (signal.SIG_DFL, exit_by_signal),
                signal.SIGHUP: (signal.SIG_DFL, exit_by_signal),
            }
            for number, default in defaults.items():
                if signal.getsignal(number) in default:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def hold(self) -> None:
        """Let signals wait: what follows leaves the run in a state that cannot be saved."""
        self._held = True
        self.whole = False

    def release(self) -> None:
        """The state of the run is whole again: a signal that came meanwhile acts now."""
        self.whole = True
        if self._ranks.size == 1:
            self._held = False
        else:
            self._waiting = self._ranks.most(self._waiting or 0) or None
        if self._waiting is not None:
            self._raise(self._waiting)

    def end(self) -> None:
        """Let signals act at once from here on."""
        self.whole = True
        self._held = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        # A second signal acts at once, for those who do not want to wait; but a rank never stops
        # alone, where the others would wait for it. (torchrun passes on what the terminal sent.)
        if self._held and (self._waiting is None or self._ranks.size > 1):
            self._waiting = number
        else:
            self._raise(number)

    def _raise(self, number: int) -> NoReturn:
        self._waiting = None
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

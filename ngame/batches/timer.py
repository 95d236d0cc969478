"""The time that refreshes of the batches take."""

import time
from typing import Self


class RefreshTimer:
    """Measure the share of an epoch that the refresh of its batches takes.

    Examples
    --------
    >>> timer = RefreshTimer()
    >>> timer.start_epoch()
    >>> with timer:
    ...     time.sleep(0.001)
    >>> 0 < timer.share <= 1
    True
    """

    def __init__(self) -> None:
        self._entered = 0.0
        self.start_epoch()

    def start_epoch(self) -> None:
        """Start the clock of an epoch, before its refresh."""
        self._started = time.monotonic()
        self.refresh_seconds = 0.0

    def __enter__(self) -> Self:
        self._entered = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh_seconds += time.monotonic() - self._entered

    @property
    def seconds(self) -> float:
        """Seconds since the start of the epoch."""
        return time.monotonic() - self._started

    @property
    def share(self) -> float:
        """Share of the epoch's seconds, from 0 to 1, that the refresh took."""
        seconds = self.seconds
        return self.refresh_seconds / seconds if seconds > 0 else 0.0

"""Watchdog: a thread that notices where the main thread stands still."""

import math
import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls a function once the main thread has shown no sign of life for some time.

    Args:
        patience: Seconds.
        bark: Called once, in the thread.
    """

    def __init__(self, patience: float, bark: Callable[[], None]) -> None:
        self._patience, self._bark = patience, bark
        self._ended = threading.Event()
        self.feed()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self.feed()
        self._thread.start()

    def feed(self) -> None:
        """A sign of life."""
        self._fed = time.monotonic()

    def pause(self) -> None:
        """Expect no sign of life before the next one."""
        self._fed = math.inf

    def end(self) -> None:
        """Watch no more."""
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(self._patience / 10):
            if time.monotonic() > self._fed + self._patience:
                self._bark()
                return

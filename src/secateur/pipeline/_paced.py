"""Word of long work, not more often than somebody wants to read it."""

import time
from collections.abc import Callable

_EVERY_S = 20.0


class Paced:
    """Tells how far a search is, at most every twenty seconds, so that a short one is silent."""

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._clock = tell, clock
        self._told = clock()

    def __call__(self, fraction: float, what: str) -> None:
        """Called whenever a search has something to say."""
        now = self._clock()
        if now - self._told >= _EVERY_S:
            self._told = now
            self._tell(f"Searching, {100 * fraction:.0f} % done: {what}.")

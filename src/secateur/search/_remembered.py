"""What several searches of one model need not compute twice."""

from collections.abc import Callable

import numpy as np

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


class Remembered:
    """Numbers of a whole model by who computed them: an importance its scores, a strategy what blocks are worth.

    They are known by identity: two importances that are equal may look at other data. Whoever computed something is
    kept too, so that nobody else gets the same identity.
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[object, dict[str, FloatArray]]] = {}

    def of(self, who: object, compute: Callable[[], dict[str, FloatArray]]) -> dict[str, FloatArray]:
        """What somebody computed before, or computes now."""
        if id(who) not in self._found:
            self._found[id(who)] = (who, compute())
        return self._found[id(who)][1]

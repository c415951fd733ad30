"""What every importance is: a number per channel, from the model and perhaps some data."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.graph import ChannelGraph

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an importance may look at. Nothing here is changed by looking.

    Attributes:
        model: The traced model, in any mode.
        graph: Its channel graph.
        batches: (images (n, ...), labels (n,) int64) pairs, normalised as the model expects them, on its device.
            Importances that read only weights do not need them.
        seed: For those that draw random numbers.
    """

    model: nn.Module
    graph: ChannelGraph
    batches: tuple[tuple[Tensor, Tensor], ...] = ()
    seed: int = 0


class Importance(ABC):
    """How much a channel matters: higher is kept.

    Implementations are frozen dataclasses whose fields are their configuration.
    """

    @abstractmethod
    def scores(self, evidence: Evidence) -> dict[str, FloatArray]:
        """Score every channel of every prunable axis.

        Returns:
            Axis name to (axis size,) float64, finite, not negative. The unit is the method's own.
        """


def checked_scores(scores: Mapping[str, FloatArray], graph: ChannelGraph, source: object) -> dict[str, FloatArray]:
    """The scores of every prunable axis, if all of them can be ranked.

    Args:
        scores: Axis name to (axis size,).
        graph: The graph the axes belong to.
        source: Who made the scores, for the message.

    Raises:
        ModelError: If an axis is missing, has another shape, or holds NaN or infinity.
    """
    for axis in graph.prunable:
        if axis.name not in scores:
            raise ModelError(f"`scores` must hold every prunable axis; {source!r} gave none for {axis.name!r}.")
        values = np.asarray(scores[axis.name])
        if values.shape != (axis.size,):
            raise ModelError(
                f"`scores[{axis.name!r}]` must have shape ({axis.size},); got {values.shape} from {source!r}."
            )
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ModelError(
                f"`scores[{axis.name!r}]` must be finite; got {values[bad[0]]} for channel {bad[0]} and {len(bad)} "
                f"such of {axis.size} from {source!r}. Look for NaN or infinity in the weights or the batches."
            )
    return {axis.name: np.asarray(scores[axis.name], dtype=np.float64) for axis in graph.prunable}

"""Performance Efficiency: accuracy that is left, against size that is left."""

import math
from collections.abc import Callable
from operator import truediv


def performance_efficiency(
    *,
    accuracy: float,
    original_accuracy: float,
    size: float,
    original_size: float,
    formula: Callable[[float, float], float] = truediv,
) -> float:
    """What is kept of the accuracy, for what is kept of the size.

    PE = (accuracy / original_accuracy) / (size / original_size): 1 for the original, 2 for half the size at the same
    accuracy. It rewards size without end: a useless network of no parameters has the highest of all. So it is shown
    beside the accuracy, never instead of it.

    Args:
        accuracy: Of the compressed model, a fraction.
        original_accuracy: Of the original, on the same images.
        size: Of the compressed model: non-zero parameters, or MACs for the second variant. Any unit.
        original_size: Of the original, in the same unit.
        formula: Of (kept accuracy, kept size), both as fractions; the quotient unless told otherwise.

    Returns:
        Dimensionless; NaN if the original has neither accuracy nor size, or nothing is left of the size.

    References:
        The name is that of Malihi & Heidemann, Appl. Syst. Innov. 2024, 7(4), 56, whose formula could not be read.
        This definition is ours.
    """
    if not (original_accuracy > 0 and original_size > 0 and size > 0):
        return math.nan
    return formula(accuracy / original_accuracy, size / original_size)

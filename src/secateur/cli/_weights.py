"""From the words of the command line to how single weights are pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from secateur.cli._options import AllocationName, WeightScheduleName, WeightScoreName

if TYPE_CHECKING:
    from secateur.sparsity import WeightPruning


def pruning_of(
    score: WeightScoreName | None,
    allocation: AllocationName | None,
    schedule: WeightScheduleName | None,
    dense: Sequence[str] | None,
) -> WeightPruning | None:
    """How single weights are pruned; None if nothing is said of it."""
    from secateur import sparsity

    if score is allocation is schedule is None and not dense:
        return None
    usual = sparsity.WeightPruning()
    scores = {
        WeightScoreName.MAGNITUDE: sparsity.ByMagnitude(),
        WeightScoreName.TAYLOR: sparsity.ByTaylor(),
        WeightScoreName.SNIP: sparsity.BySnip(),
        WeightScoreName.MOVEMENT: sparsity.ByMovement(),
        WeightScoreName.RANDOM: sparsity.AtRandom(),
    }
    allocations = {
        AllocationName.GLOBAL: sparsity.Globally(),
        AllocationName.ERK: sparsity.ByERK(),
        AllocationName.EVEN: sparsity.Evenly(),
        AllocationName.TWO_OF_FOUR: sparsity.NOfM(2, 4),
        AllocationName.FOUR_OF_EIGHT: sparsity.NOfM(4, 8),
    }
    schedules = {
        WeightScheduleName.CUBIC: sparsity.Cubic,
        WeightScheduleName.ITERATIVE: sparsity.Iterative,
        WeightScheduleName.ONE_SHOT: sparsity.OneShot,
    }
    return replace(
        usual,
        score=usual.score if score is None else scores[score],
        allocation=usual.allocation if allocation is None else allocations[allocation],
        schedule=usual.schedule if schedule is None else schedules[schedule],
        exclude=tuple(dense or ()),
    )

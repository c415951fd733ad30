"""The second half of a budget: single weights at zero, after the channels."""

import copy
import warnings
from collections.abc import Sequence

from torch import Tensor, nn

from secateur.cost import Budget, Cost, format_count
from secateur.pipeline._plan import Plan
from secateur.pipeline._result import Halfway
from secateur.sparsity import Sparsify, WeightPruning, make_permanent_, nonzero_params


def pruning_for(budget: Budget, pruning: WeightPruning | None) -> WeightPruning | None:
    """How weights are pruned: as the caller says, or as usual; None if the budget does not ask for it."""
    if budget.nonzero is None:
        if pruning is not None:
            warnings.warn("`pruning` has no effect: the budget does not bound `nonzero`.", stacklevel=3)
        return None
    return pruning or WeightPruning()


def zeros_for(plan: Plan, half: Halfway, batches: Sequence[tuple[Tensor, Tensor]]) -> Sparsify | None:
    """The masks that the recovery trains under; None if the budget asks for none, or the channels meet it alone.

    Raises:
        BudgetError: If what may not be pruned is more than the budget allows.
    """
    limit = plan.budget.nonzero_limit(half.found.original)
    if plan.pruning is None or limit is None:
        return None
    density = plan.pruning.density_within(half.student, limit)
    if density == 1:
        plan.tell("The channels alone meet the bound on non-zero parameters: no single weight is pruned.")
        return None
    plan.tell(
        f"Pruning single weights: {100 * density:.1f} % of those that may go stay, "
        f"so that at most {format_count(limit)} parameters are not zero."
    )
    return Sparsify(density, plan.pruning, tuple(batches))


def with_zeros(masked: nn.Module) -> nn.Module:
    """A copy without masks: an ordinary model with zeros in it."""
    return make_permanent_(copy.deepcopy(masked)).eval()


def within(budget: Budget, student: nn.Module, original: Cost) -> tuple[bool, str]:
    """Whether a student has as few non-zero parameters as it must, and that in words; empty if nothing is asked."""
    limit = budget.nonzero_limit(original)
    if limit is None:
        return True, ""
    count = nonzero_params(student)
    return count <= limit, f", {100 * count / max(original.params, 1):.2f} % of the parameters not zero"

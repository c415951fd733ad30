"""Choose one candidate per stage by a genetic algorithm, as in the paper of SWP."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from secateur._arrays import IntArray
from secateur._kinds import settings
from secateur.errors import BudgetError
from secateur.nas.swp_table import Combination, ReducedTable, StageChoice, StageTable


def _run_pymoo(
    rows: ReducedTable, objectives: Sequence[int], sizes: "Evolution", mutation: float, seed: int
) -> IntArray:
    """Return the different choices that a genetic algorithm of pymoo visits, (n, stages), in lexicographic order."""
    # pymoo is an optional dependency and takes a second to import, so its subclasses are defined inside the function.
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.core.mutation import Mutation
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.ux import UniformCrossover
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.optimize import minimize

    last = np.array([len(row) - 1 for row in rows.losses])
    loss_scale = np.maximum([row.max() for row in rows.losses], 0).sum() or 1
    cost_scale = np.maximum(sum(cost.max(axis=1) for cost in rows.costs), 1)
    visited: list[IntArray] = []

    class Choices(Problem):
        """Sums of losses and costs, as fractions of their ranges, of one candidate per stage."""

        def _evaluate(self, x: IntArray, out: dict[str, object], *_: object, **__: object) -> None:
            # pymoo reports its final population only; every choice that it evaluates may be the best.
            visited.append(x.astype(np.int64))
            # Fractions of their ranges, because NSGA-II compares distances across objectives.
            loss, cost = rows.totals(x)
            out["F"] = np.column_stack([loss / loss_scale, *(cost[field] / cost_scale[field] for field in objectives)])
            # pymoo takes a constraint for met where G <= 0.
            if len(cost):
                out["G"] = ((cost - rows.capacity[:, None]) / cost_scale[:, None]).T

    class Redraw(Mutation):
        """Each stage is drawn again with a small probability."""

        def _do(self, _: object, X: IntArray, *__: object, random_state: Any, **___: object) -> IntArray:
            drawn = random_state.integers(0, last + 1, X.shape)
            return np.where(random_state.random(X.shape) < mutation, drawn, X)

    settings: dict[str, Any] = {
        "pop_size": sizes.population,
        "sampling": IntegerRandomSampling(),
        "crossover": UniformCrossover(),
        "mutation": Redraw(),
    }
    problem = Choices(
        n_var=len(last),
        n_obj=1 + len(objectives),
        n_ieq_constr=len(rows.capacity),
        xl=np.zeros_like(last),
        xu=last,
        vtype=int,
    )
    algorithm = NSGA2(**settings) if objectives else GA(**settings)
    minimize(problem, algorithm, ("n_gen", sizes.generations), seed=seed)
    return np.unique(np.concatenate(visited), axis=0)


@settings
class Evolution(Combination):
    """A genetic algorithm over the numbers of the candidates; needs the extra ``evolution``.

    Parents are drawn by binary tournament. A child has each stage from one parent or the other, and each stage is drawn
    anew with a small probability. The best of parents and children survive. Choices over a limit rank behind all
    others, by how far they exceed it. Candidates that are dominated within their stage are left out.

    Attributes:
        population: Number of choices in a generation.
        generations: Number of generations, including the first, random one.
        mutation: Probability with which each stage of a child is drawn anew; None means one stage on average.

    Raises:
        BudgetError: If a number is out of range.

    References:
        The paper (Zhang et al., arXiv:2011.04908) searches by evolution without giving its operators. These are pymoo's
        (Blank & Deb, IEEE Access 8, 2020); several objectives: NSGA-II, Deb et al., 2002.
    """

    population: int = 100
    generations: int = 100
    mutation: float | None = None

    def __post_init__(self) -> None:
        for name in ("population", "generations"):
            if getattr(self, name) < 2:
                raise BudgetError(f"`{name}` must be at least 2; got {getattr(self, name)}. 100 is usual.")
        if self.mutation is not None and not 0 <= self.mutation <= 1:
            raise BudgetError(f"`mutation` must be a probability, 0 to 1; got {self.mutation}. None suits most.")

    def combine(self, table: StageTable, seed: int) -> StageChoice:
        """Return the best choice visited.

        Raises:
            BudgetError: If no choice keeps to the limits, or none that does is visited.
            ImportError: If pymoo is not installed.
        """
        table.check()
        rows = ReducedTable.of(table, tuple(table.as_integers.capacity))
        # The best of all choices visited, because the last generation may have lost it.
        found = self.explore(rows, (), seed)
        if not len(found):
            raise BudgetError(
                f"`generations` must be enough to meet a choice within the budget; got {self.generations} of "
                f"{self.population}. `ExactKnapsack` says whether there is one. {table.infeasible()}"
            )
        loss, cost = rows.totals(found)
        # The last key of `lexsort` counts first: loss, then costs, then candidates, as for `ExactKnapsack`.
        best = np.lexsort((*found.T[::-1], *cost[::-1], loss))[0]
        return table.choose(rows.candidate_numbers(found[best].tolist()))

    def explore(self, rows: ReducedTable, objectives: Sequence[int], seed: int) -> IntArray:
        """Return the different choices visited within the capacity, (n, stages) rows, in lexicographic order.

        Args:
            rows: Candidates and capacity.
            objectives: Numbers of the fields to be minimized together with the loss; none means the loss only.
            seed: Random seed; the global random state is neither read nor changed.
        """
        mutation = 1 / len(rows.losses) if self.mutation is None else self.mutation
        _check_pymoo()
        visited = _run_pymoo(rows, objectives, self, mutation, seed)
        return visited[(rows.totals(visited)[1] <= rows.capacity[:, None]).all(axis=0)]


def _check_pymoo() -> None:
    if importlib.util.find_spec("pymoo") is None:
        raise ImportError("`Evolution` needs pymoo; got none. Run pip install 'secateur[evolution]'.")

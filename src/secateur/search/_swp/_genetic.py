"""Genetic algorithms over choices of one candidate per stage, by pymoo. Imported only where evolution is asked for."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.soo.nonconvex.ga import GA
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.operators.sampling.rnd import IntegerRandomSampling
from pymoo.optimize import minimize

from secateur.search._swp._sweep import Rows
from secateur.search._swp._table import IntArray


class Sizes(Protocol):
    """How long to search."""

    @property
    def population(self) -> int:
        """Choices in a generation."""
        ...

    @property
    def generations(self) -> int:
        """How many there are."""
        ...


def evolved(rows: Rows, objectives: Sequence[int], sizes: Sizes, mutation: float, seed: int) -> IntArray:
    """(n, stages) the different choices met on the way, in lexicographic order; see `Evolution`."""
    problem = _Choices(rows, objectives)
    settings: dict[str, Any] = {
        "pop_size": sizes.population,
        "sampling": IntegerRandomSampling(),
        "crossover": UniformCrossover(),
        "mutation": _Anew(mutation),
    }
    algorithm = NSGA2(**settings) if objectives else GA(**settings)
    minimize(problem, algorithm, ("n_gen", sizes.generations), seed=seed)
    return np.unique(np.concatenate(problem.met), axis=0)


class _Choices(Problem):
    """Sums of losses and costs, as fractions of their ranges, of one candidate per stage."""

    def __init__(self, rows: Rows, objectives: Sequence[int]):
        last = np.array([len(row) - 1 for row in rows.losses])
        fields = len(rows.room)
        super().__init__(
            n_var=len(last), n_obj=1 + len(objectives), n_ieq_constr=fields, xl=np.zeros_like(last), xu=last, vtype=int
        )
        self.rows, self.objectives, self.last = rows, list(objectives), last
        self.met: list[IntArray] = []

    def _evaluate(self, x: IntArray, out: dict[str, object], *_: object, **__: object) -> None:
        self.met.append(x.astype(np.int64))
        loss, cost = self.rows.sums(x)
        scale = np.maximum([row.max() for row in self.rows.losses], 0).sum() or 1
        span = np.maximum(sum(cost.max(axis=1) for cost in self.rows.costs), 1)
        out["F"] = np.column_stack([loss / scale, *(cost[field] / span[field] for field in self.objectives)])
        if len(cost):
            out["G"] = ((cost - self.rows.room[:, None]) / span[:, None]).T


class _Anew(Mutation):
    """Each stage is drawn anew with a probability."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def _do(
        self, problem: _Choices, X: IntArray, *_: object, random_state: np.random.Generator, **__: object
    ) -> IntArray:
        drawn = random_state.integers(0, problem.last + 1, X.shape)
        return np.where(random_state.random(X.shape) < self.probability, drawn, X)

"""The part of the budget that a combination leaves is used."""

from dataclasses import replace

import numpy as np
import pytest
from swp_runs import options_of, staged

from secateur.cost import Budget
from secateur.nas import Depths
from secateur.nas.swp_candidates import CandidateRows, CandidateSpace
from secateur.nas.swp_knapsack import fill_budget


def options(budget: Budget, *, untied: bool = False) -> CandidateSpace:
    found = options_of(staged(untied=untied), depths=Depths(), cuts=["4"])
    return replace(found, context=replace(found.context, budget=budget))


def fullness(of: CandidateSpace, rows: CandidateRows) -> float:
    cost, limits = of.context.costs.cost_of(*of.network_sizes(rows)), of.context.limits
    return max(getattr(cost, name) / limit for name, limit in limits.items())


def single_steps(of: CandidateSpace, rows: CandidateRows) -> list[CandidateRows]:
    found: list[CandidateRows] = []
    for number, stage in enumerate(of.of_stage):
        for at in np.flatnonzero(rows[number] < stage.max_numbers):
            wider = rows[number].copy()
            wider[at] += 1
            found.append((*rows[:number], wider, *rows[number + 1 :]))
    return found


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "budget", [Budget(macs="60%"), Budget(macs="80%", params="70%"), Budget(params="90%")], ids=str
)
def test_no_further_step_fits_unless_the_budget_is_used(budget, untied):
    of = options(budget, untied=untied)
    draw = np.random.default_rng(0)
    drawn = [of.smallest, *(of.sample(draw) for _ in range(20))]
    starts = [rows for rows in drawn if fullness(of, rows) <= 1]
    assert starts
    for rows in starts:
        found = fill_budget(of, rows)
        assert fullness(of, rows) <= fullness(of, found) <= 1
        assert all((after >= before).all() for before, after in zip(rows, found, strict=True))
        assert fullness(of, found) >= 0.995 or all(fullness(of, wider) > 1 for wider in single_steps(of, found))


def test_an_ample_budget_gives_the_full_network():
    of = options(Budget(macs="100%"))
    assert all(map(np.array_equal, fill_budget(of, of.largest), of.largest))
    nearly = tuple(np.maximum(row - 1, 0) for row in of.largest)
    assert fullness(of, fill_budget(of, nearly)) >= 0.995

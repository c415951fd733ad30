"""What a combination leaves of the budget is used."""

from dataclasses import replace

import numpy as np
import pytest
from swp_runs import options_of, staged

from secateur.cost import Budget
from secateur.nas import Depths
from secateur.nas.swp_candidates import Options, Rows
from secateur.nas.swp_knapsack import filled


def options(budget: Budget, *, untied: bool = False) -> Options:
    found = options_of(staged(untied=untied), depths=Depths(), cuts=["4"])
    return replace(found, problem=replace(found.problem, budget=budget))


def fullness(of: Options, rows: Rows) -> float:
    cost, limits = of.problem.costs.cost_of(*of.network(rows)), of.problem.limits
    return max(getattr(cost, name) / limit for name, limit in limits.items())


def single_steps(of: Options, rows: Rows) -> list[Rows]:
    found: list[Rows] = []
    for number, stage in enumerate(of.of_stage):
        for at in np.flatnonzero(rows[number] < stage.tops):
            wider = rows[number].copy()
            wider[at] += 1
            found.append((*rows[:number], wider, *rows[number + 1 :]))
    return found


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "budget", [Budget(macs="60%"), Budget(macs="80%", params="70%"), Budget(params="90%")], ids=str
)
def test_no_single_step_is_left_that_fits_unless_it_is_full(budget, untied):
    of = options(budget, untied=untied)
    draw = np.random.default_rng(0)
    drawn = [of.tiny, *(of.drawn(draw) for _ in range(20))]
    starts = [rows for rows in drawn if fullness(of, rows) <= 1]
    assert starts
    for rows in starts:
        found = filled(of, rows)
        assert fullness(of, rows) <= fullness(of, found) <= 1
        assert all((after >= before).all() for before, after in zip(rows, found, strict=True))
        assert fullness(of, found) >= 0.995 or all(fullness(of, wider) > 1 for wider in single_steps(of, found))


def test_everything_becomes_whole_where_there_is_room():
    of = options(Budget(macs="100%"))
    assert all(map(np.array_equal, filled(of, of.whole), of.whole))
    nearly = tuple(np.maximum(row - 1, 0) for row in of.whole)
    assert fullness(of, filled(of, nearly)) >= 0.995

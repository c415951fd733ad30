"""One candidate per stage under limits, compared with enumeration in exact arithmetic."""

import contextlib
import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secateur.errors import BudgetError, TrainingError
from secateur.nas import Evolution, ExactKnapsack, StageChoice, StageTable, pareto_front
from secateur.nas import swp_knapsack as _exact
from secateur.nas.swp_knapsack import solve_knapsack
from secateur.nas.swp_table import Bound, ReducedTable, enumerate_nondominated, nondominated_indices

FIELDS = ("macs", "params", "latency_s")


_NO_ROOM = "`budget` must leave room for one candidate of every stage"
_ROUNDED = Fraction(1, 2**56)
"""Of the largest sum: more than what a few costs are rounded up by together."""
_AT_THE_LIMIT = {"latency_s": (np.array([0.1]), np.array([0.1, 32.0]))}
"""0.1 + 0.1 + 0.1 is just within 0.1 + 0.2, but not rounded up beside 32."""


@st.composite
def tables(draw: st.DrawFn, fields: int = 3, most: int = 10**9) -> StageTable:
    """Few stages of few candidates, with many ties; the last field is of floats."""
    stages = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 5), min_size=stages, max_size=stages))
    names = FIELDS[: draw(st.integers(1, fields))]
    whole = st.integers(0, 9) | st.integers(0, most)
    real = st.sampled_from([0.1, 0.2, 0.3, 0.7]) | st.floats(0, 1e3)

    def rows(one: st.SearchStrategy, kind: type) -> tuple[np.ndarray, ...]:
        return tuple(np.array(draw(st.lists(one, min_size=n, max_size=n)), dtype=kind) for n in sizes)

    costs = {name: rows(real, np.float64) if name == "latency_s" else rows(whole, np.int64) for name in names}
    base = {name: draw(real if name == "latency_s" else whole) for name in names}
    losses = rows(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0]) | st.integers(-1000, 1000).map(float), np.float64)
    # Limits at, and next to, what some choice costs.
    limits = {}
    for name in names:
        some = [row[draw(st.integers(0, len(row) - 1))].item() for row in costs[name]]
        limits[name] = max(float(base[name] + sum(some)) + draw(st.sampled_from([0.0, 0.5, -1.0, 1e12])), 0.0)
    return StageTable(losses, costs, base, limits)


def every(
    table: StageTable, fields: tuple[str, ...], spare: Fraction = Fraction(0)
) -> list[tuple[Fraction, tuple[Fraction, ...], tuple[int, ...]]]:
    """(loss, costs, picked) of every choice within the limits, in fractions, the best first.

    Of a limit on seconds a part of the largest costs stays free.
    """
    free = {"latency_s": spare * sum(Fraction(row.max().item()) for row in table.costs.get("latency_s", ()))}
    found = []
    for picked in itertools.product(*(range(len(row)) for row in table.losses)):
        cost = {name: Fraction(table.base[name]) + total(table.costs[name], picked) for name in table.costs}
        if all(cost[name] <= Fraction(limit) - free.get(name, 0) for name, limit in table.limits.items()):
            found.append((total(table.losses, picked), tuple(cost[name] for name in fields), picked))
    return sorted(found)


def total(rows: tuple[np.ndarray, ...], picked: tuple[int, ...]) -> Fraction:
    return sum((Fraction(row[number].item()) for row, number in zip(rows, picked, strict=True)), Fraction(0))


def random_table(stages: int, candidates: int, seed: int, fields: int = 1, kept: float = 0.5) -> StageTable:
    """Losses that fall with the widths, and costs that grow with their products, as in a network."""
    draw = np.random.default_rng(seed)
    width = draw.uniform(0.1, 1, (stages, candidates, 3))
    macs = np.rint((width[..., 0] * width[..., 1] + width[..., 1] * width[..., 2]) * 5e6).astype(np.int64)
    params = np.rint((width[..., 0] + width[..., 2] ** 2) * 1e5 * (1 + np.arange(stages))[:, None]).astype(np.int64)
    losses = ((1 - width) ** 2).sum(-1) * draw.uniform(0.5, 2, (stages, 1)) + draw.uniform(0, 0.05, macs.shape)
    costs = {"macs": macs, "params": params, "latency_s": macs / 1e9 * draw.uniform(0.8, 1.2, macs.shape)}
    names = FIELDS[:fields]
    limits = {name: kept * float(costs[name].max(axis=1).sum()) for name in names}
    return StageTable(tuple(losses), {name: tuple(costs[name]) for name in names}, dict.fromkeys(names, 0), limits)


@settings(max_examples=80)
@example(
    StageTable((np.array([-1.0]), np.array([-1.0, -2.0])), _AT_THE_LIMIT, {"latency_s": 0.1}, {"latency_s": 0.1 + 0.2})
)
@given(tables())
def test_the_exact_choice_is_the_best_of_all(table):
    """Seconds are rounded up to 2^-60 of the largest sum, so a choice nearer to a limit than that may be left out."""
    possible = every(table, tuple(table.limits))
    surely = every(table, tuple(table.limits), spare=_ROUNDED)
    if not surely:
        with contextlib.suppress(BudgetError) if possible else pytest.raises(BudgetError, match=_NO_ROOM):
            assert table.allows(solve_knapsack(table))
        return
    found = solve_knapsack(table)
    assert table.allows(found)
    assert possible[0][0] <= total(table.losses, found.picked) <= surely[0][0]


@settings(max_examples=60)
@given(tables(fields=2))
def test_of_equal_losses_the_cheapest_and_then_the_first_is_chosen(table):
    possible = every(table, tuple(table.limits))
    if possible:
        assert solve_knapsack(table).picked == possible[0][2]


@settings(max_examples=12)
@given(tables(), st.integers(0, 3))
def test_exact_is_never_worse_than_evolution(table, seed):
    evolution = Evolution(population=10, generations=3)
    try:
        evolved = evolution.combine(table, seed)
    except BudgetError:
        return
    assert table.allows(evolved)
    assert evolved == evolution.combine(table, seed)
    assert total(table.losses, ExactKnapsack().combine(table, seed).picked) <= total(table.losses, evolved.picked)


@settings(max_examples=60)
@given(tables(fields=1))
def test_the_front_of_one_cost_equals_that_of_all_choices(table):
    unbounded = StageTable(table.losses, table.costs, table.base, {})
    for each in (table, unbounded):
        possible = every(each, ("macs",))
        if not possible:
            with pytest.raises(BudgetError, match="In reach"):
                pareto_front(each)
            continue
        points = {(loss, cost[0]) for loss, cost, _ in possible}
        best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
        found = pareto_front(each)
        assert found.fields == ("macs",)
        assert [(total(each.losses, c.picked), c.cost["macs"]) for c in found.choices] == sorted(
            best, key=lambda point: point[1]
        )


@settings(max_examples=60)
@given(tables(fields=2, most=1000))
def test_the_solver_alone_and_the_enumeration_alone_agree(table):
    """Two independent ways: HiGHS in floating point without bounds, and whole-number sums without HiGHS."""
    rows = ReducedTable.of(table, tuple(table.as_integers.capacity))
    sums = enumerate_nondominated(rows)
    possible = every(table, ())
    assert sums.complete
    assert bool(len(sums.loss)) == bool(possible)
    program = _exact._IntegerProgram.of(rows)
    answer = program.solve()
    if possible:
        assert answer is not None
        assert rows.fits(answer)
        # Of whole losses and small costs none of its tolerances matter.
        assert rows.loss(answer) == sums.loss.min()
        bound = Bound.around(rows, program.prices(), float(sums.loss.min()))
        assert enumerate_nondominated(rows, bound).loss.min() == sums.loss.min()
        kept = rows.prune(bound)
        assert enumerate_nondominated(kept).loss.min() == sums.loss.min()


@pytest.mark.parametrize("fields", [1, 2, 3])
def test_four_stages_of_two_hundred_candidates(fields):
    table = random_table(4, 200, seed=fields, fields=fields)
    found = solve_knapsack(table)
    evolved = Evolution(population=50, generations=30).combine(table, 0)
    assert table.allows(found)
    assert table.allows(evolved)
    assert found.loss <= evolved.loss <= 1.25 * found.loss
    assert found == solve_knapsack(table)
    # Less room, less choice: any tighter limit must lose as much or more.
    tighter = StageTable(table.losses, table.costs, table.base, {name: 0.9 * x for name, x in table.limits.items()})
    assert solve_knapsack(tighter).loss >= found.loss


@pytest.mark.parametrize("seed", range(3))
def test_one_limit_has_the_same_answer_as_its_front(seed):
    table = random_table(8, 100, seed)
    assert solve_knapsack(table) == pareto_front(table).choices[-1]


def test_a_limit_below_float_resolution_is_respected():
    """Sums that differ by one in 10^15, far below the tolerance of the solver but not of whole numbers."""
    large = 10**15
    rows = tuple(np.array([large, large + 1]) for _ in range(3))
    losses = tuple(np.array([1.0, 0.0]) for _ in range(3))
    for extra in range(4):
        table = StageTable(losses, {"macs": rows}, {"macs": 0}, {"macs": float(3 * large + extra)})
        assert solve_knapsack(table).cost["macs"] == 3 * large + extra
    seconds = tuple(np.array([1.0, 1.0 + 2.0**-50]) for _ in range(3))
    table = StageTable(losses, {"latency_s": seconds}, {"latency_s": 0.0}, {"latency_s": 3.0 + 2.0**-50})
    assert solve_knapsack(table).picked in {(0, 0, 1), (0, 1, 0), (1, 0, 0)}
    assert solve_knapsack(table).cost["latency_s"] <= 3.0 + 2.0**-50


def test_answers_of_the_solver_that_exceed_a_limit_are_refused(monkeypatch):
    table = random_table(3, 20, seed=5)
    right = solve_knapsack(table)
    real, asked = _exact.milp, []

    def careless(objective, **options):
        asked.append(options)
        found = real(objective, **options)
        if len(asked) == 1:
            found.x[:] = objective.max() - objective  # The best, and dearest, of every stage.
        return found

    monkeypatch.setattr(_exact, "milp", careless)
    assert solve_knapsack(table) == right
    monkeypatch.setattr(_exact, "milp", lambda *_, **__: type("Nothing", (), {"x": None})())
    assert solve_knapsack(table) == right


def test_an_incomplete_enumeration_still_considers_the_answer_of_the_solver(monkeypatch):
    table = random_table(4, 60, seed=2, fields=2)
    right = solve_knapsack(table)
    monkeypatch.setattr(
        _exact, "enumerate_nondominated", lambda rows, bound, **_: enumerate_nondominated(rows, bound, most=1)
    )
    assert solve_knapsack(table).loss == pytest.approx(right.loss, rel=1e-9)


def test_stages_with_a_single_candidate():
    table = StageTable(
        (np.array([2.0]), np.array([3.0, 1.0]), np.array([0.5])),
        {"macs": (np.array([5]), np.array([1, 4]), np.array([7]))},
        {"macs": 100},
        {"macs": 116.0},
    )
    expected = StageChoice((0, 1, 0), 3.5, {"macs": 116})
    assert solve_knapsack(table) == expected
    assert Evolution(population=4, generations=3).combine(table, 0) == expected
    only = StageTable((np.array([2.0]),), {"macs": (np.array([5]),)}, {"macs": 1}, {"macs": 6.0})
    assert solve_knapsack(only) == Evolution().combine(only, 0) == StageChoice((0,), 2.0, {"macs": 6})


def test_errors_on_infeasible_limits_say_which_costs_can_be_reached():
    table = random_table(2, 5, seed=0, fields=2)
    low, high = table.cost_range("macs")
    over = StageTable(table.losses, table.costs, table.base, {"macs": float(low - 1), "params": 1e9})
    for combine in (ExactKnapsack(), Evolution()):
        with pytest.raises(BudgetError, match=r"got macs<=.*In reach, each alone: macs from .* to .*Raise the budget"):
            combine.combine(over, 0)
    assert low == min(sum(costs) for costs in itertools.product(*table.costs["macs"]))
    assert high == max(sum(costs) for costs in itertools.product(*table.costs["macs"]))


def test_limits_that_can_be_met_one_by_one_but_not_together():
    costs = {"macs": (np.array([1, 9]),), "params": (np.array([9, 1]),)}
    table = StageTable((np.array([0.0, 0.0]),), costs, {"macs": 0, "params": 0}, {"macs": 5.0, "params": 5.0})
    with pytest.raises(BudgetError, match="In reach, each alone: macs from 1 to 9, params from 1 to 9"):
        solve_knapsack(table)
    with pytest.raises(BudgetError, match="`generations` must be enough to meet a choice within the budget"):
        Evolution(population=4, generations=3).combine(table, 0)
    with pytest.raises(BudgetError, match="In reach"):
        pareto_front(table)


def test_the_front_of_several_costs_is_nondominated_and_has_the_ends_of_the_exact_fronts():
    table = random_table(3, 8, seed=4, fields=2, kept=0.8)
    found = pareto_front(table, evolution=Evolution(population=60, generations=40), seed=1)
    points = [(c.loss, c.cost["macs"], c.cost["params"]) for c in found.choices]
    assert points == sorted(points, key=lambda point: (point[1], point[2], point[0]))
    assert not any(p != q and all(a <= b for a, b in zip(p, q, strict=True)) for p in points for q in points)
    assert all(table.allows(choice) for choice in found.choices)
    possible = {(float(loss), *map(int, cost)) for loss, cost, _ in every(table, ("macs", "params"))}
    best = {p for p in possible if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in possible)}
    # 512 choices and 2,400 looks: it misses little.
    rounded = {(round(p[0], 9), *p[1:]) for p in points}
    assert len({(round(p[0], 9), *p[1:]) for p in best} & rounded) >= 0.9 * len(best)
    assert found == pareto_front(table, evolution=Evolution(population=60, generations=40), seed=1)


def test_the_front_keeps_to_limits_on_other_costs():
    table = random_table(3, 10, seed=4, fields=2, kept=0.4)
    assert pareto_front(table, ("macs",), evolution=Evolution(population=30, generations=10)).fields == (
        "macs",
        "params",
    )
    with pytest.raises(BudgetError, match=r"`fields` must be among those with costs, \['macs', 'params'\]; got 'sec"):
        pareto_front(table, ("seconds",))


def test_nondominated_points_equal_those_by_definition():
    draw = np.random.default_rng(0)
    for fields in (1, 2, 3):
        points = draw.integers(0, 6, (fields + 1, 60))
        expected = [
            i
            for i in range(60)
            if not any(
                (points[:, j] <= points[:, i]).all() and ((points[:, j] < points[:, i]).any() or j < i)
                for j in range(60)
            )
        ]
        assert nondominated_indices(points[0], points[1:]).tolist() == expected


def test_evolution_does_not_change_the_global_random_state():
    np.random.seed(3)
    before = np.random.get_state()[1].tolist()
    Evolution(population=10, generations=3).combine(random_table(2, 10, 0), 5)
    assert np.random.get_state()[1].tolist() == before


def test_evolution_without_pymoo_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ImportError, match=r"pip install 'secateur\[evolution\]'"):
        Evolution().combine(random_table(2, 10, 0), 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 1}, "`population` must be at least 2; got 1"),
        ({"generations": 0}, "`generations` must be at least 2; got 0"),
        ({"mutation": 1.5}, "`mutation` must be a probability, 0 to 1; got 1.5"),
    ],
)
def test_settings_of_evolution_out_of_range_are_refused(settings, message):
    with pytest.raises(BudgetError, match=message):
        Evolution(**settings)


ONE = (np.array([1.0, 2.0]),)


@pytest.mark.parametrize(
    ("losses", "costs", "base", "limits", "error", "message"),
    [
        ((), {}, {}, {}, ValueError, "`losses` must have at least one stage; got none"),
        ((np.array([1, 2]),), {}, {}, {}, ValueError, r"`losses` must be \(candidates,\) floats; got int64 \(2,\) for"),
        ((np.zeros(0),), {}, {}, {}, ValueError, r"`losses` must be .* got float64 \(0,\) for stage 0"),
        ((np.array([1.0, np.nan]),), {}, {}, {}, TrainingError, "got nan for candidate 1 of stage 0"),
        (ONE, {"macs": (np.array([1]),)}, {"macs": 0}, {}, ValueError, "one number per candidate"),
        (ONE, {"macs": (np.array([1, -1]),)}, {"macs": 0}, {}, ValueError, "finite and not negative"),
        (ONE, {"macs": (np.array([True, False]),)}, {"macs": 0}, {}, ValueError, "whole numbers or floats throughout"),
        (ONE, {"macs": (np.array([1, 2**61]),)}, {"macs": 0}, {}, ValueError, r"less than 2\^60"),
        (ONE, {"macs": (np.array([1, 2]),)}, {}, {}, ValueError, r"`base` must have the fields of `costs`, \['macs'\]"),
        (ONE, {}, {}, {"macs": 3.0}, BudgetError, "`limits` must be on fields with costs"),
        (
            ONE,
            {"macs": (np.array([1, 2]),)},
            {"macs": 0},
            {"macs": np.nan},
            BudgetError,
            "negative or NaN; got macs=nan",
        ),
    ],
)
def test_inconsistent_tables_are_refused(losses, costs, base, limits, error, message):
    with pytest.raises(error, match=message):
        StageTable(losses, costs, base, limits)

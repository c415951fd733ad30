"""Which runs a comparison makes, with and without a time limit."""

from typing import Any

from compared import failed_run, run_of

from secateur.pipeline.rounds import Cell, Rounds
from secateur.tasks.classification import TOP1

BUDGETS = ("macs<=50%", "macs<=30%")


def plan(**others: Any) -> Rounds:
    settings: dict[str, Any] = {
        "strategies": ("a", "b", "c", "d", "e"),
        "budgets": BUDGETS,
        "seeds": (3, 4),
        "epochs": 7,
        "least_epochs": 1,
        "seconds": None,
        "metric": TOP1,
    }
    return Rounds(**(settings | others))


def finished(cells: tuple[Cell, ...], seconds: float = 4.0) -> list[Any]:
    """Runs of the cells; later strategies of the alphabet are better. Half of the time is training."""
    return [
        run_of(c.strategy, c.budget, c.seed, (ord(c.strategy) - 90) / 20, round=c.round, epochs=c.epochs,
               seconds=seconds, train_seconds=seconds / 2)
        for c in cells
    ]  # fmt: skip


def test_without_a_limit_every_run_is_made_once_with_all_epochs():
    cells = plan().first()
    assert len(cells) == len({cell.key for cell in cells}) == 5 * 2 * 2
    assert {cell.epochs for cell in cells} == {7}
    # Seed by seed: what an interruption leaves has the same seeds for every strategy.
    assert [cell.seed for cell in cells] == [3] * 10 + [4] * 10
    assert plan().following(finished(cells), 100.0) == ()


def test_with_a_limit_the_better_half_goes_on_with_more_epochs():
    rounds = plan(seconds=1000.0)
    first = rounds.first()
    assert {cell.epochs for cell in first} == {1}
    runs = finished(first)
    second = rounds.following(runs, 100.0)
    assert {cell.strategy for cell in second} == {"c", "d", "e"}
    # 900 s for two rounds, 12 runs in this one: 37.5 s each, of which 2 s are not training, at 2 s an epoch.
    assert {cell.epochs for cell in second} == {17}
    runs += finished(second, 20.0)
    third = rounds.following(runs, 400.0)
    assert {cell.strategy for cell in third} == {"d", "e"}
    assert {cell.round for cell in third} == {2}
    assert rounds.following([*runs, *finished(third)], 500.0) == ()


def test_no_round_without_time_for_more_epochs_and_none_with_what_failed():
    rounds = plan(seconds=1000.0)
    runs = finished(rounds.first())
    assert rounds.following(runs, 999.0) == ()
    broken = [failed_run(r.strategy, r.budget, r.seed) if (r.strategy, r.seed) == ("e", 4) else r for r in runs]
    assert {cell.strategy for cell in rounds.following(broken, 10.0)} == {"b", "c", "d"}


def test_a_cell_is_read_back():
    cell = Cell("python:my.module:make", "macs<=50%, latency<=4ms", 1, 2, 3)
    assert Cell.from_json(vars(cell)) == cell
    assert "/" not in cell.key
    assert " " not in cell.key

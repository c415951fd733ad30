"""Which candidates are scored in each round."""

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest
from swp_runs import options_of, staged

from secateur.errors import TrainingError
from secateur.nas import ExactKnapsack, Widths
from secateur.nas.swp_candidates import CandidateRows, CandidateSpace, StageCandidates

Losses = Callable[[CandidateRows], list[float]]


def options_to_search(untied: bool = False) -> CandidateSpace:
    """Eight widths an axis: 80 candidates in the first stage, 40 without blocks, thousands in the last."""
    return options_of(staged(untied=untied), widths=Widths(), budget="macs=50%")


def losses_by_size(options: CandidateSpace) -> Losses:
    """Losses that grow as widths and depths shrink, with a different weight for each."""
    draw = np.random.default_rng(7)
    weights = [draw.uniform(0.2, 1.0, len(of.max_numbers)) for of in options.of_stage]

    def of(rows: CandidateRows) -> list[float]:
        missing = [(top - row) / np.maximum(top, 1) for top, row in zip(options.largest, rows, strict=True)]
        return [float((w * m**2).sum()) for w, m in zip(weights, missing, strict=True)]

    return of


def record_round(candidates: StageCandidates, count: int, losses: Losses) -> list[CandidateRows]:
    proposed = candidates.propose(count)
    stages = len(candidates.rows)
    candidates.record(proposed, np.array([losses(rows) for rows in proposed]).reshape(len(proposed), stages))
    return proposed


def as_tuples(rows: CandidateRows) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for row in rows]


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_no_candidate_is_scored_twice_and_all_are_in_the_space(untied):
    options = options_to_search(untied)
    candidates = StageCandidates(options, 0)
    for number in range(4):
        assert candidates.rounds == number
        before = [len(rows) for rows in candidates.rows]
        proposed = record_round(candidates, 8, losses_by_size(options))
        assert len(proposed) == 8
        for stage, rows in enumerate(candidates.rows):
            new = as_tuples(tuple(rows[before[stage] :]))
            # Where there is nothing new the first is taken again, and not entered.
            got = as_tuples(tuple(network[stage] for network in proposed))
            assert got == new + [tuple(rows[0].tolist())] * (8 - len(new))
    for of, rows, losses in zip(options.of_stage, candidates.rows, candidates.losses, strict=True):
        assert len(losses) == len(rows) == len(set(as_tuples(tuple(rows)))) == min(32, of.size)
        assert all(((row >= 0) & (row <= of.max_numbers)).all() for row in rows)


def test_the_first_round_has_the_largest_and_smallest_candidate_and_all_sizes():
    options = options_to_search()
    for seed in range(5):
        candidates = StageCandidates(options, seed)
        proposed = candidates.propose(32)
        assert as_tuples(proposed[0]) == as_tuples(options.largest)
        assert as_tuples(proposed[1]) == as_tuples(options.smallest)
        size = np.array([rows[2].sum() / options.largest[2].sum() for rows in proposed])
        assert (np.histogram(size, bins=4, range=(0, 1))[0] >= 2).all()


def test_all_candidates_of_small_spaces_are_scored():
    options = options_of(staged(), widths=Widths((0.5,)))
    assert [of.size for of in options.of_stage] == [2, 2, 2 * 2 * 2 * 3]
    candidates = StageCandidates(options, 0)
    counts = []
    for _ in range(12):
        record_round(candidates, 6, losses_by_size(options))
        counts.append([len(rows) for rows in candidates.rows])
    assert counts[0] == [2, 2, 6]
    assert counts[-1][:2] == [2, 2]
    assert counts[-1][2] >= 20
    assert all(set(as_tuples(tuple(rows))) == {(0,), (1,)} for rows in candidates.rows[:2])


def test_a_round_without_new_candidates_is_empty():
    options = options_of(staged(), widths=Widths((0.5,)), depths=None, cuts=["4"])
    assert [of.size for of in options.of_stage] == [4, 8]
    candidates = StageCandidates(options, 0)
    record_round(candidates, 32, losses_by_size(options))
    assert [len(rows) for rows in candidates.rows] == [4, 8]
    assert record_round(candidates, 32, losses_by_size(options)) == []
    assert candidates.rounds == 2
    assert [len(rows) for rows in candidates.rows] == [4, 8]


def test_candidates_depend_only_on_the_seed_and_on_recorded_losses():
    options, losses = options_to_search(), losses_by_size(options_to_search())

    def all_of(seed: int, losses: Losses) -> list[list[tuple[int, ...]]]:
        candidates = StageCandidates(options, seed)
        for _ in range(3):
            np.random.seed(len(candidates.rows[0]))
            record_round(candidates, 6, losses)
        return [as_tuples(tuple(rows)) for rows in candidates.rows]

    state = np.random.get_state()
    try:
        first = all_of(0, losses)
        assert first == all_of(0, losses)
        assert first != all_of(1, losses)
        upside_down = all_of(0, lambda rows: [1 - loss for loss in losses(rows)])
        assert upside_down != first
        assert [rows[:6] for rows in upside_down] == [rows[:6] for rows in first]
    finally:
        np.random.set_state(state)


def test_restored_candidates_continue_identically():
    options = options_to_search()
    losses = losses_by_size(options)
    candidates = StageCandidates(options, 4)
    for _ in range(2):
        record_round(candidates, 6, losses)
    again = StageCandidates(options, 4)
    again.restore(json.loads(json.dumps(candidates.to_json())))
    assert again.rounds == 2
    for each in (candidates, again):
        record_round(each, 6, losses)
    assert again.to_json() == candidates.to_json()


def test_rounds_improve_the_best_combination_or_keep_it():
    """They come near the best of the whole space, which is found by enumeration and the exact combination."""
    options = options_to_search()
    losses = losses_by_size(options)
    space = StageCandidates(options, 0)
    every = [
        [np.array(row) for row in itertools.product(*(range(t + 1) for t in of.max_numbers))] for of in options.of_stage
    ]
    most = max(map(len, every))
    networks = [tuple(rows[n % len(rows)] for rows in every) for n in range(most)]
    space.record(networks, np.array([losses(rows) for rows in networks]))
    assert [len(rows) for rows in space.rows] == [of.size for of in options.of_stage]
    best = ExactKnapsack().combine(space.table(), 0).loss
    for seed in range(3):
        candidates = StageCandidates(options, seed)
        found = []
        for _ in range(6):
            record_round(candidates, 16, losses)
            found.append(ExactKnapsack().combine(candidates.table(), 0).loss)
        assert found == sorted(found, reverse=True)
        assert found[-1] < found[0]
        assert best <= found[-1] <= 1.25 * best


def test_parents_are_the_nondominated_candidates_ordered_by_loss():
    options = options_to_search()
    losses = losses_by_size(options)
    candidates = StageCandidates(options, 0)
    record_round(candidates, 24, losses)
    table = candidates.table()
    for stage, rows in enumerate(candidates.rows):
        points = list(zip(candidates.losses[stage], table.costs["macs"][stage].tolist(), strict=True))
        best = [p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)]
        parents = [tuple(row.tolist()) for row in candidates._parents(stage)]
        numbers = [as_tuples(tuple(rows)).index(parent) for parent in parents]
        assert [points[number] for number in numbers] == sorted(best)


def test_losses_that_are_not_finite_are_refused_when_they_are_used():
    options = options_to_search()
    candidates = StageCandidates(options, 0)
    record_round(candidates, 4, lambda rows: [float("nan")] * len(rows))
    with pytest.raises(TrainingError, match="`losses` must be finite; got nan for candidate 0 of stage 0"):
        candidates.propose(4)

"""Sparsity schedules compared with their formulas, and invalid settings."""

import itertools

import pytest

from secateur.errors import SparsityError
from secateur.prune import Cubic, Iterative, OneShot


def test_one_shot_is_constant() -> None:
    assert [OneShot(0.3).density_at(p) for p in (0.0, 0.5, 1.0)] == [0.3] * 3


def test_iterative_keeps_the_same_fraction_in_every_round() -> None:
    schedule = Iterative(0.0625, rounds=4)
    assert [schedule.density_at(p) for p in (0.0, 0.24, 0.25, 0.5, 0.75, 1.0)] == [
        0.5,
        0.5,
        0.25,
        0.125,
        0.0625,
        0.0625,
    ]
    assert Iterative(0.2, rounds=1).density_at(0.0) == OneShot(0.2).density_at(0.0)


def test_cubic_is_the_papers_equation_at_every_step() -> None:
    # Zhu & Gupta: s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 for t in {t0, t0 + dt, ..., t0 + n dt}.
    t0, n, dt, steps, initial, final = 20, 8, 10, 200, 0.1, 0.9
    schedule = Cubic(1 - final, initial_density=1 - initial, begin=t0 / steps, end=(t0 + n * dt) / steps)
    for k in range(n + 1):
        t = t0 + k * dt
        expected = final + (initial - final) * (1 - (t - t0) / (n * dt)) ** 3
        assert 1 - schedule.density_at(t / steps) == pytest.approx(expected, abs=1e-12)
    assert schedule.density_at(0.0) == pytest.approx(1 - initial)
    assert schedule.density_at(1.0) == pytest.approx(1 - final)


@pytest.mark.parametrize("schedule", [OneShot(0.1), Iterative(0.1), Cubic(0.1), Cubic(0.1, begin=0.3, end=0.6)])
def test_density_never_rises_and_ends_where_it_should(schedule: OneShot | Iterative | Cubic) -> None:
    densities = [schedule.density_at(step / 200) for step in range(201)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(densities))
    assert densities[-1] == pytest.approx(0.1)


def test_numbers_out_of_range_are_refused() -> None:
    for density in (0.0, 1.0, -1.0):
        for schedule in (OneShot, Iterative, Cubic):
            with pytest.raises(
                SparsityError, match=r"`density` must be the fraction .* in \(0, 1\); got .*one weight in"
            ):
                schedule(density)
    with pytest.raises(SparsityError, match="`rounds` must be at least 1; got 0"):
        Iterative(0.5, rounds=0)
    with pytest.raises(SparsityError, match=r"`initial_density` must be above density=0\.5; got 0\.5"):
        Cubic(0.5, initial_density=0.5)
    with pytest.raises(SparsityError, match=r"`initial_density` must be the fraction .* in \(0, 1\]; got 1\.5"):
        Cubic(0.5, initial_density=1.5)
    with pytest.raises(SparsityError, match=r"0 <= begin < end <= 1; got 0\.5 and 0\.5"):
        Cubic(0.5, begin=0.5, end=0.5)
    for schedule in (OneShot(0.5), Iterative(0.5), Cubic(0.5)):
        with pytest.raises(SparsityError, match=r"`progress` must be from 0 to 1; got 1\.5"):
            schedule.density_at(1.5)

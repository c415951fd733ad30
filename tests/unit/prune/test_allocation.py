"""Densities, counts and the masks that keep the highest scores."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import SparsityError
from secateur.prune import erk_counts, keep_globally, keep_largest, keep_n_of_m, mask_density, uniform_counts


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SCORES = {"a": random(4, 3, 3, 3, seed=1), "b": random(5, 8, seed=2), "c": random(2, 4, seed=3)}


def counted(masks: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def test_per_layer_keeps_round_of_each() -> None:
    assert uniform_counts(SCORES, 0.3) == {"a": 32, "b": 12, "c": 2}
    assert uniform_counts(SCORES, {"a": 1.0, "b": 0.01, "c": 0.5}) == {"a": 108, "b": 0, "c": 4}


def numpy_largest(values: np.ndarray, count: int) -> np.ndarray:
    """By sorting: descending values, then ascending index."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    kept = np.zeros(len(values), bool)
    kept[order[:count]] = True
    return kept


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=30), st.data())
def test_largest_are_those_of_a_sort_and_ties_go_by_index(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    mask = keep_largest({"a": torch.tensor(values, dtype=torch.float32)}, {"a": count})["a"]
    assert mask.tolist() == numpy_largest(np.array(values), count).tolist()


@given(st.floats(0.001, 1.0))
def test_global_keeps_exactly_round_of_all(density: float) -> None:
    masks = keep_globally(SCORES, density)
    flat = np.concatenate([score.flatten().numpy() for score in SCORES.values()])
    expected = numpy_largest(flat, round(density * 156))
    assert np.concatenate([mask.flatten().numpy() for mask in masks.values()]).tolist() == expected.tolist()
    assert mask_density(masks) == round(density * 156) / 156


def test_global_ties_go_by_the_order_of_tensors() -> None:
    masks = keep_globally({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, 0.625)
    assert masks["a"].all()
    assert masks["b"].tolist() == [[True, False], [False, False]]


def test_erk_gives_densities_in_proportion_to_dimensions() -> None:
    weights = {"conv": torch.empty(64, 32, 3, 3), "wide": torch.empty(128, 64, 3, 3), "fc": torch.empty(100, 128)}
    counts = erk_counts(weights, 0.1)
    total = 64 * 32 * 9 + 128 * 64 * 9 + 100 * 128
    assert sum(counts.values()) == round(0.1 * total)
    # Density over (sum of dimensions / product of dimensions): one epsilon for all, up to one weight of rounding.
    for name, weight in weights.items():
        epsilon = round(0.1 * total) / ((64 + 32 + 6) + (128 + 64 + 6) + (100 + 128))
        assert abs(counts[name] - epsilon * sum(weight.shape)) < 1


def test_erk_keeps_small_tensors_whole_and_shares_the_rest() -> None:
    weights = {"small": torch.empty(4, 2), "large": torch.empty(100, 100), "other": torch.empty(50, 100)}
    counts = erk_counts(weights, 0.5)
    # epsilon = 7504 / 356 would give the small one 126 of its 8; the others share 7496 as 200 : 150, which is
    # 4283.43 and 3212.57: the larger remainder is rounded up.
    assert counts == {"small": 8, "large": 4283, "other": 3213}


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6), st.floats(0.01, 1.0))
def test_erk_is_exact_and_never_above_a_tensors_size(shapes: list[tuple[int, int]], density: float) -> None:
    weights = {str(k): torch.empty(shape) for k, shape in enumerate(shapes)}
    counts = erk_counts(weights, density)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    assert sum(counts.values()) == round(density * sum(sizes.values()))
    assert all(0 <= counts[name] <= sizes[name] for name in counts)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 2)])
def test_n_of_m_keeps_the_best_of_every_group_of_inputs(n: int, m: int) -> None:
    scores = {"conv": random(3, 16, 2, 2, seed=5).round(decimals=1), "linear": random(4, 8, seed=6).round(decimals=1)}
    masks = keep_n_of_m(scores, n, m)
    for name, score in scores.items():
        rows = score.movedim(1, -1).reshape(-1, score.shape[1]).numpy()
        kept = masks[name].movedim(1, -1).reshape(-1, score.shape[1]).numpy()
        for row, mask in zip(rows, kept, strict=True):
            for start in range(0, len(row), m):
                expected = numpy_largest(row[start : start + m], n)
                assert mask[start : start + m].tolist() == expected.tolist()
    assert mask_density(masks) == n / m
    assert all(mask.is_contiguous() and mask.shape == scores[name].shape for name, mask in masks.items())


def test_bad_input_is_refused() -> None:
    for density in (0.0, -0.5, 1.5, math.nan):
        for allocate in (uniform_counts, erk_counts, keep_globally):
            with pytest.raises(
                SparsityError, match=rf"`density` must be the fraction of weights kept.*got {density}\."
            ):
                allocate(SCORES, density)
    with pytest.raises(SparsityError, match=r"`density\['b'\]` must be the fraction of weights kept.*; got 2\.0"):
        uniform_counts(SCORES, {"a": 0.5, "b": 2.0, "c": 0.5})
    with pytest.raises(SparsityError, match=r"`density` must name the tensors of `weights`; got unknown \['d'\]"):
        uniform_counts(SCORES, {"a": 0.5, "b": 0.5, "d": 0.5})
    with pytest.raises(SparsityError, match=r"`counts` must name the tensors of `scores`.*missing \['b', 'c'\]"):
        keep_largest(SCORES, {"a": 1})
    with pytest.raises(SparsityError, match="`counts` must be from 0 to 8 for 'c'; got 9"):
        keep_largest(SCORES, {"a": 1, "b": 1, "c": 9})
    broken = {"a": torch.tensor([[1.0, math.nan, 0.0, 1.0]])}
    for keep in (
        lambda: keep_largest(broken, {"a": 1}),
        lambda: keep_globally(broken, 0.5),
        lambda: keep_n_of_m(broken, 2, 4),
    ):
        with pytest.raises(SparsityError, match="`scores` must be numbers; got NaN in"):
            keep()
    with pytest.raises(SparsityError, match="`n` and `m` must be such that 1 <= n < m; got 4 and 4"):
        keep_n_of_m(SCORES, 4, 4)
    with pytest.raises(
        SparsityError, match=r"`m` must divide the input dimension .*; got 4 for a \(4, 3, 3, 3\)\. Leave"
    ):
        keep_n_of_m(SCORES, 2, 4)

"""Budgets on non-zero parameters: alone and after channels, in the artifact, the report and the result."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from noise_images import Dying, noise_data, noise_split
from run_pipeline import run_compress
from torch import nn

from secateur.data import ImageData
from secateur.errors import BudgetError
from secateur.pipeline import OnExisting, Reinitialize, verify
from secateur.pipeline import load as load_artifact
from secateur.prune import (
    ERKAllocation,
    NOfM,
    OneShot,
    TaylorScore,
    UniformAllocation,
    WeightPruning,
    get_masks,
    prunable_weights,
)
from secateur.report import performance_efficiency
from secateur.search import Uniform
from secateur.train import Silent, TrainConfig

SHORT = TrainConfig(epochs=2, batch_size=16)
HEAL_ONLY = TrainConfig(epochs=0)


def _model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
        )  # fmt: skip
        nn.init.normal_(model[1].bias)  # A fresh norm's bias is zero by itself.
        return model


def run(budget: str, data: ImageData | None = None, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"strategy": Uniform(), "train": SHORT, "callbacks": Silent(), "export": ()}
    return run_compress(_model(), data or noise_data(), budget=budget, **(defaults | settings))


def nonzero(model: nn.Module) -> int:
    return sum(int((parameter != 0).sum()) for parameter in model.parameters())


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "pruning",
    [
        None,
        WeightPruning(TaylorScore(), ERKAllocation(), OneShot),
        WeightPruning(allocation=UniformAllocation(), exclude=("0",), every=1),
    ],
)
def test_weights_alone(pruning: WeightPruning | None) -> None:
    result = run("nonzero=40%", weight_pruning=pruning)
    limit = int(0.4 * params(_model()))
    # Every weight that may stay does; rounding down per layer costs at most one in each of two.
    assert limit - 2 <= nonzero(result.model) <= limit
    assert result.nonzero == nonzero(result.model) == result.report.after.nonzero
    assert params(result.model) == params(_model())
    assert result.search.cost == result.search.original
    assert not get_masks(result.model)
    assert result.failed == ()
    assert [step.name for step in result.report.steps] == [
        "original",
        "cut and repaired",
        "weights pruned and distilled",
    ]
    assert any("not the network faster" in note for note in result.report.notes)
    if pruning is not None and pruning.exclude:
        assert bool((result.model[0].weight != 0).all())


def test_channels_first_then_weights(tmp_path: Path) -> None:
    small = run("macs=60%, nonzero=25%", out=tmp_path / "small")
    assert small.search.cost.macs <= 0.6 * small.search.original.macs
    limit = int(0.25 * params(_model()))
    assert nonzero(small.model) == limit
    assert params(small.model) == small.search.cost.params > limit
    checks = {check.name: check for check in small.report.checks}
    assert f"{100 * limit / params(_model()):.2f} % of the parameters not zero" in checks["Within the budget"].detail
    loaded = load_artifact(tmp_path / "small", factory=_model)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded.model(images), small.model(images))
    assert loaded.manifest.nonzero == limit
    assert loaded.manifest.recipe.metrics["nonzero"] == {"before": params(_model()), "after": limit}
    found = verify(tmp_path / "small", factory=_model)
    assert found.passed
    assert any(f"'nonzero': {limit}" in check.detail for check in found.checks)
    assert small.report.after.size_bytes == (tmp_path / "small" / "model.safetensors").stat().st_size
    assert small.report.after.size_bytes < small.report.before.size_bytes
    page = (tmp_path / "small" / "report.html").read_text()
    assert "Non-zero parameters" in page
    assert "Performance Efficiency" in page


def test_without_a_recovery_weights_go_at_once() -> None:
    result = run("nonzero=40%", train=HEAL_ONLY)
    limit = int(0.4 * params(_model()))
    assert nonzero(result.model) == limit
    assert result.report.steps[-1].name == "weights pruned"
    # The largest magnitudes stay, all layers together.
    kept = torch.cat([w[w != 0].abs() for w in prunable_weights(result.model).values()])
    pairs = zip(prunable_weights(_model()).values(), prunable_weights(result.model).values(), strict=True)
    gone = torch.cat([was[now == 0].abs() for was, now in pairs])
    assert kept.min() >= gone.max()


def test_a_pattern_keeps_its_own_part() -> None:
    pruning = WeightPruning(allocation=NOfM(2, 4), exclude=("0",))
    result = run("nonzero=70%", weight_pruning=pruning)
    weight = result.model[3].weight
    assert bool(((weight.unflatten(1, (-1, 4)) != 0).sum(2) == 2).all())
    assert int((result.model[7].weight != 0).sum()) == 24 * 4 // 2


def test_channels_that_are_enough_leave_the_weights_alone() -> None:
    said: list[str] = []
    result = run("params=30%, nonzero=60%", train=HEAL_ONLY, hear=said.append)
    assert nonzero(result.model) == params(result.model)
    assert any("The channels alone meet the bound" in line for line in said)


def test_a_student_from_scratch_is_pruned_too() -> None:
    result = run("macs=60%, nonzero=25%", init=Reinitialize())
    assert nonzero(result.model) <= int(0.25 * params(_model()))


def test_a_killed_run_goes_on_under_the_same_masks(tmp_path: Path) -> None:
    pruning = WeightPruning(schedule=partial(OneShot), every=1)
    whole = run("macs=60%, nonzero=25%", weight_pruning=pruning)
    out = tmp_path / "small"
    split = noise_split(64, 0)
    with pytest.raises(KeyboardInterrupt):
        run(
            "macs=60%, nonzero=25%", noise_data(Dying(split.images, split.labels, split.normalization)), out=out,
            weight_pruning=pruning,
        )  # fmt: skip
    resumed = run("macs=60%, nonzero=25%", out=out, weight_pruning=pruning, on_existing=OnExisting.RESUME)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_bound_below_what_is_never_pruned_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"`nonzero` must leave room for the 76 parameters that are not pruned"):
        run("nonzero=1%")


def test_pruning_without_a_bound_says_that_it_has_no_effect() -> None:
    with pytest.warns(UserWarning, match="`weight_pruning` has no effect: the budget does not bound `nonzero`"):
        run("macs=60%", weight_pruning=WeightPruning(), train=HEAL_ONLY)


def test_performance_efficiency_is_kept_accuracy_by_kept_size() -> None:
    result = run("nonzero=40%")
    before, after = result.report.before, result.report.after
    by_hand = (after.score.value / before.score.value) / (nonzero(result.model) / params(_model()))
    assert result.report.efficiency == (pytest.approx(by_hand), after.score.value / before.score.value)
    numbers: Any = {"accuracy": 0.9, "original_accuracy": 0.9, "size": 5, "original_size": 10}
    assert performance_efficiency(**numbers) == 2.0
    assert performance_efficiency(**numbers, formula=lambda accuracy, size: accuracy - size) == 0.5
    for name in ("original_accuracy", "size", "original_size"):
        assert performance_efficiency(**(numbers | {name: 0})) != performance_efficiency(**(numbers | {name: 0}))

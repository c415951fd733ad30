"""`compress` as a function: what it leaves alone, what it says, and how it meets what cannot be cut."""

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from noise_images import noise_data
from run_pipeline import run_compress
from torch import nn

import secateur
from secateur.cost import count_macs
from secateur.errors import ArtifactError, BudgetError, ModelError, SelectionError
from secateur.graph import HeadUnit, Selection
from secateur.graph._ledger import freeze_inputs
from secateur.pipeline import CutConfig, OnExisting, inspect_model
from secateur.prune import cut
from secateur.search import (
    L2,
    AxisRule,
    GlobalImportance,
    Knapsack,
    PCASlimming,
    RemoveBlocks,
    SearchSpace,
    Strategy,
    Uniform,
)
from secateur.train import Silent, TrainConfig

REPAIR_ONLY = TrainConfig(epochs=0)


def _model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 4),
        )


def test_callers_model_mode_and_random_state_stay():
    model = _model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    result = run_compress(
        model, noise_data(), budget="macs=50%", train=TrainConfig(epochs=1, batch_size=32), callbacks=Silent()
    )
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not result.model.training
    assert result.folder is None
    assert result.files == ()
    assert result.failed == ()
    example = torch.zeros(1, 3, 8, 8)
    assert 0.4 * count_macs(model, example) < count_macs(result.model, example) <= 0.5 * count_macs(model, example)
    assert result.report.after.macs == count_macs(result.model, example)


class _Moving(nn.Sequential):
    """A network that changes the working directory whenever it runs."""

    elsewhere = "/"

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        os.chdir(self.elsewhere)
        return super().forward(input)


def test_model_that_changes_the_working_directory_does_not_move_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
    monkeypatch.chdir(here)  # Also puts the working directory of this test back.
    monkeypatch.setattr(_Moving, "elsewhere", str(elsewhere))
    train = TrainConfig(epochs=1, batch_size=32)
    result = run_compress(_Moving(*_model()), noise_data(), budget="macs=50%", train=train, out=Path("small"))
    assert result.folder == here / "small"
    assert {"secateur.json", "report.html", "history.csv"} <= {path.name for path in (here / "small").iterdir()}
    assert [path.name for path in here.iterdir()] == ["small"]
    assert not list(elsewhere.iterdir())


def test_versions_outside_of_the_tested_window_are_warned_of(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda _name: ["torch>=0.3", 'torch<0.4; extra == "tested"'])
    with pytest.warns(UserWarning, match=r"not tested with torch .* \(tested: >=0\.3,<0\.4\)"):
        run_compress(_model(), noise_data(), budget="macs=50%", train=REPAIR_ONLY, callbacks=Silent())


def test_same_seed_same_weights():
    first, second = (
        run_compress(_model(), noise_data(), budget="macs=50%", train=TrainConfig(1, 32), callbacks=Silent(), seed=5)
        for _ in "12"
    )
    assert first.architecture == second.architecture
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_artifact_of_a_model_without_a_name_needs_its_factory(tmp_path: Path):
    out = tmp_path / "out"
    result = run_compress(_model(), noise_data(), budget="macs=50%", train=REPAIR_ONLY, out=out, export=())
    with pytest.raises(ArtifactError, match="factory"):
        secateur.load(out)
    loaded = secateur.load(out, factory=_model)
    images = next(noise_data().test.batches(32))[0]
    with torch.no_grad():
        assert torch.equal(loaded.model(images), result.model(images))
    assert {path.name for path in result.files} == {path.name for path in out.iterdir()}
    checks = secateur.verify(out, factory=_model, data=noise_data()).checks
    assert all(check.passed for check in checks)
    assert len(checks) == 4


def test_verify_notices_other_outputs_and_other_costs(tmp_path: Path):
    out = tmp_path / "out"
    run_compress(_model(), noise_data(), budget="macs=50%", train=REPAIR_ONLY, out=out, export=())

    class Louder(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.1 * super().forward(x) + self[0](x).mean()

    found = secateur.verify(out, factory=lambda: Louder(*_model()))
    assert not found.passed
    failed = {check.name for check in found.checks if not check.passed}
    assert failed == {"Counted costs = recorded costs", "Outputs for a seeded input = recorded outputs"}


def test_verify_fails_for_a_broken_export_and_goes_on(tmp_path: Path):
    out = tmp_path / "out"
    run_compress(_model(), noise_data(), budget="macs=50%", train=REPAIR_ONLY, out=out, export=())
    (out / "model.onnx").write_bytes(b"not a model")
    found = secateur.verify(out, factory=_model)
    failed = [check for check in found.checks if not check.passed]
    assert [check.name for check in failed] == ["model.onnx = model in PyTorch"]
    assert "does not run" in failed[0].detail
    assert len(found.checks) == 4


def test_curve_has_the_originals_accuracy_as_its_line():
    result = run_compress(
        _model(), noise_data(), budget="macs=50%", train=TrainConfig(epochs=1, batch_size=32), callbacks=Silent()
    )
    wanted = secateur.evaluate(_model(), noise_data().validation).value
    assert result.report.original_validation_score == wanted
    repaired = run_compress(_model(), noise_data(), budget="macs=50%", train=REPAIR_ONLY)
    assert repaired.report.original_validation_score is None


class Residual(nn.Module):
    """Three residual blocks; the first is the last module at its resolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.early = Branch(8)
        self.down = nn.Conv2d(8, 12, 2, stride=2)
        self.late = nn.Sequential(Branch(12), Branch(12))
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.late(self.down(self.early(self.stem(x)))).mean((2, 3)))


class Branch(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, 16, 3, padding=1), nn.Conv2d(16, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.conv1(x).relu())


def _residual() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Residual()
        for name in ("early", "late.0"):  # they hardly matter: the search will drop them
            nn.init.normal_(model.get_submodule(f"{name}.conv2").weight, std=1e-4)
            nn.init.zeros_(model.get_submodule(f"{name}.conv2").bias)
        return model


def test_survey_knows_what_is_left_without_the_blocks():
    found = inspect_model(_residual(), torch.zeros(1, 3, 8, 8), cut=CutConfig(space=SearchSpace(min_kept_fraction=1.0)))
    assert found.smallest == found.original
    without = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 2, stride=2), nn.AdaptiveAvgPool2d(1))
    macs = count_macs(nn.Sequential(*without, nn.Flatten(), nn.Linear(12, 4)), torch.zeros(1, 3, 8, 8))
    assert found.shallowest.macs == macs


def test_removed_blocks_are_distilled_written_and_reported(tmp_path: Path):
    out = tmp_path / "out"
    said: list[str] = []
    result = run_compress(
        _residual(), noise_data(), budget="macs=40%", out=out, export=(),
        strategy=RemoveBlocks(Uniform(), max_fraction=0.7),
        train=TrainConfig(epochs=2, batch_size=32), callbacks=Silent(), hear=said.append,
    )  # fmt: skip
    assert result.architecture.removed_blocks == ("early", "late.0")
    assert any("2 blocks removed, " in line for line in said)
    assert result.trained is not None
    report = result.report
    assert [(block.name, block.removed) for block in report.blocks] == [
        ("early", True), ("late.0", True), ("late.1", False),
    ]  # fmt: skip
    widths = {width.name: width.after for width in report.widths}
    assert widths["early.conv1"] == widths["late.0.conv1"] == 0
    assert 0 < widths["late.1.conv1"] <= 16
    assert result.failed == ()
    page = (out / "report.html").read_text()
    assert "2 of 3 residual blocks were removed whole" in page
    loaded = secateur.load(out, factory=_residual).model
    images = next(noise_data().test.batches(32))[0]
    with torch.no_grad():
        assert torch.equal(loaded(images), result.model(images))
    assert secateur.verify(out, factory=_residual, data=noise_data()).passed


def test_blocks_that_the_user_keeps_stay():
    result = run_compress(
        _residual(),
        noise_data(),
        budget="macs=70%",
        strategy=RemoveBlocks(Uniform(), max_fraction=1.0),
        selection=Selection(whole=("early.conv1",)),
        train=REPAIR_ONLY,
    )
    assert "early" not in result.architecture.removed_blocks
    assert result.architecture.removed_blocks
    fates = {block.name: block.kept_because for block in result.report.blocks}
    assert fates["early"] == "kept whole: a layer of it matched 'early.conv1'"


def test_budget_out_of_reach_of_widths_names_the_blocks_as_a_way_out():
    with pytest.raises(BudgetError, match=r"--min-kept\. Or let residual blocks go too \(--remove-blocks"):
        run_compress(_residual(), noise_data(), budget="macs=2%")
    few = RemoveBlocks(Uniform(), max_fraction=0.25)
    with pytest.raises(
        BudgetError, match=r"let more of the residual blocks go \(--remove-blocks, now 0\.25; in Python"
    ):
        run_compress(_residual(), noise_data(), budget="macs=2%", strategy=few)
    with pytest.raises(BudgetError) as refused:
        run_compress(_residual(), noise_data(), budget="macs=0.1%", strategy=RemoveBlocks(Uniform(), max_fraction=1.0))
    assert "--remove-blocks" not in str(refused.value)


def test_resumed_run_knows_its_removed_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    words = {
        "budget": "macs=40%", "strategy": RemoveBlocks(Uniform(), max_fraction=0.7),
        "selection": Selection(exclude=("late.1",)), "out": tmp_path / "out", "export": (), "callbacks": Silent(),
    }  # fmt: skip
    whole = run_compress(_residual(), noise_data(), train=REPAIR_ONLY, **{**words, "out": None})
    with monkeypatch.context() as patch:
        patch.setattr(import_module("secateur.pipeline.compress"), "train_with_teacher", stop)
        with pytest.raises(KeyboardInterrupt):
            run_compress(_residual(), noise_data(), **words)
    resumed = run_compress(_residual(), noise_data(), on_existing=OnExisting.RESUME, train=REPAIR_ONLY, **words)
    assert resumed.architecture == whole.architecture
    assert "early" in resumed.architecture.removed_blocks
    assert resumed.report.blocks == whole.report.blocks
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_original_that_guesses_is_noted():
    result = run_compress(_model(), noise_data(), budget="macs=50%", train=REPAIR_ONLY)
    assert any("about what guessing gives (25.0 %)" in note for note in result.report.notes)


def test_axis_that_cannot_be_cut_right_stays_and_the_search_is_repeated(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []

    def skeptical(model: nn.Module, graph: secateur.ChannelGraph, *args: object, **kwargs: object):
        calls.append(len(graph.prunable))
        done = cut(model, graph, *args, **kwargs)
        if len(calls) > 1:
            return done
        axis = graph.prunable[0].name
        proof = replace(done.verification, frozen=((axis, "for this test"),))
        return replace(done, graph=graph.with_frozen({axis: "for this test"}), verification=proof)

    monkeypatch.setattr(import_module("secateur.pipeline.config"), "cut", skeptical)
    said: list[str] = []
    model = _model()
    result = run_compress(
        model, noise_data(), budget="macs=70%", train=REPAIR_ONLY, strategy=Uniform(), hear=said.append
    )
    assert calls == [2, 1]
    assert any("Searching again" in line for line in said)
    assert [frozen.reason for frozen in result.report.frozen if frozen.name == "0"] == ["for this test"]
    example = torch.zeros(1, 3, 8, 8)
    assert result.model[0].out_channels == 16
    assert count_macs(result.model, example) <= 0.7 * count_macs(model, example)


def test_choices_and_rules_bind_and_are_recorded(tmp_path: Path):
    out = tmp_path / "out"
    choices, space = Selection(exclude=("0",)), SearchSpace(rules=(AxisRule("3", divisor=8),))
    said: list[str] = []
    result = run_compress(
        _model(), noise_data(), budget="macs=80%", selection=choices, space=space, train=REPAIR_ONLY,
        out=out, export=(), hear=said.append,
    )  # fmt: skip
    assert result.model[0].out_channels == 16
    assert result.model[3].out_channels in (8, 16)
    assert {f.name: f.reason for f in result.report.frozen}["0"] == "kept whole: matched exclude pattern '0'"
    assert result.report.choices == "exclude 0; 3: divisor 8"
    assert "exclude 0; 3: divisor 8" in (out / "report.html").read_text()
    assert any("1 prunable (exclude 0; 3: divisor 8)" in line for line in said)
    metrics = secateur.load(out, factory=_model).manifest.recipe.metrics
    assert metrics["choices"] == {"include": [], "exclude": ["0"], "whole": []}
    assert metrics["heads"] == "dimension"
    assert metrics["space"]["rules"] == [
        {"pattern": "3", "min_width": None, "divisor": 8, "min_kept_fraction": None}
    ]  # fmt: skip


@pytest.mark.parametrize("strategy", [Knapsack(L2()), PCASlimming(), GlobalImportance(), Uniform()])
def test_every_strategy_keeps_to_choices_and_rules(strategy: Strategy):
    space = SearchSpace(rules=(AxisRule("0", divisor=4), AxisRule("3", min_width=17)))
    result = run_compress(_model(), noise_data(), budget="macs=70%", space=space, train=REPAIR_ONLY, strategy=strategy)
    assert result.model[0].out_channels % 4 == 0
    assert result.model[3].out_channels >= 17
    only = run_compress(
        _model(),
        noise_data(),
        budget="macs=70%",
        selection=Selection(include=("3",)),
        train=REPAIR_ONLY,
        strategy=strategy,
    )
    assert only.model[0].out_channels == 16
    assert only.model[3].out_channels < 24


def test_budget_out_of_reach_under_choices_names_them_as_a_way_out():
    with pytest.raises(
        BudgetError, match=r"Reachable: macs .* Or loosen what you selected: exclude 0; 3: min_width 20\."
    ):
        run_compress(
            _model(),
            noise_data(),
            budget="macs=30%",
            selection=Selection(exclude=("0",)),
            space=SearchSpace(rules=(AxisRule("3", 20),)),
        )
    with pytest.raises(BudgetError, match=r"--min-kept\.$"):
        run_compress(_model(), noise_data(), budget="macs=1%", space=SearchSpace(5))


def test_choices_that_match_nothing_are_refused_before_the_search():
    with pytest.raises(SelectionError, match=r"`include` must match an axis.*'conv' matches none"):
        run_compress(_model(), noise_data(), budget="macs=50%", selection=Selection(include=("conv",)))
    with pytest.raises(SelectionError, match=r"`rules` must match an axis.*'conv' matches none"):
        run_compress(_model(), noise_data(), budget="macs=50%", space=SearchSpace(rules=(AxisRule("conv", 2),)))


def test_resumed_run_must_have_the_same_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    first = {"budget": "macs=80%", "out": tmp_path / "out", "export": (), "callbacks": Silent()}
    with monkeypatch.context() as patch:
        patch.setattr(import_module("secateur.pipeline.compress"), "train_with_teacher", stop)
        with pytest.raises(KeyboardInterrupt):
            run_compress(_model(), noise_data(), selection=Selection(exclude=("0",)), **first)
    resumed = {**first, "on_existing": OnExisting.RESUME, "train": REPAIR_ONLY}
    with pytest.raises(
        ArtifactError, match=r"selection was Selection\(.*exclude=\('0',\).*now Selection\(include=\('3',\)"
    ):
        run_compress(_model(), noise_data(), selection=Selection(include=("3",)), **resumed)
    with pytest.raises(ArtifactError, match="heads was dimension, now head"):
        run_compress(_model(), noise_data(), selection=Selection(exclude=("0",)), heads=HeadUnit.HEAD, **resumed)
    space = SearchSpace(min_kept_fraction=0.25, rules=(AxisRule("3", 4),))
    with pytest.raises(ArtifactError, match=r"space was SearchSpace\(.*now SearchSpace\(.*AxisRule\(pattern='3'"):
        run_compress(_model(), noise_data(), selection=Selection(exclude=("0",)), space=space, **resumed)
    done = run_compress(_model(), noise_data(), selection=Selection(exclude=("0",)), **resumed)
    assert done.model[0].out_channels == 16


def test_rules_of_the_users_own_reach_the_tracer():
    names = {"0": 16, "3": 24}
    usual = inspect_model(_model(), torch.zeros(1, 3, 8, 8))
    assert dict(usual.graph.sizes) == names
    # As if nobody knew what a ReLU does: what goes through it stays whole.
    blind = {"relu": freeze_inputs}
    assert dict(inspect_model(_model(), torch.zeros(1, 3, 8, 8), cut=CutConfig(rules=blind)).graph.sizes) == {}
    with pytest.raises(BudgetError, match="No axis of this model may be slimmed"):
        run_compress(_model(), noise_data(), budget="macs=50%", rules=blind)


def test_model_that_does_not_fit_is_refused_before_the_search():
    data = noise_data()
    with pytest.raises(ModelError, match=r"must run the images of noise \(3x8x8\)"):
        run_compress(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 4)), data, budget="macs=50%")
    with pytest.raises(ModelError, match=r"each of the 4 classes of noise.*got shape \(2, 9\)"):
        run_compress(nn.Sequential(nn.Flatten(), nn.Linear(192, 9)), data, budget="macs=50%")
    broken = _model()
    broken[0].weight.data[0] = torch.inf
    with pytest.raises(ModelError, match=r"finite weights; got NaN or infinity in 1 tensor.*0\.weight"):
        run_compress(broken, data, budget="macs=50%")

    class Unique(nn.ReLU):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("there is only one of me")

    unusual = _model()
    unusual.append(Unique())
    with pytest.raises(ModelError, match=r"cannot be copied: there is only one of me"):
        run_compress(unusual, data, budget="macs=50%")

    class Overflows(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 0

    with pytest.raises(ModelError, match="finite logits"):
        run_compress(Overflows(*_model()), data, budget="macs=50%")


def test_channels_last_models_are_cut_as_others():
    usual = run_compress(_model(), noise_data(), budget="macs=50%", train=REPAIR_ONLY)
    last = run_compress(
        _model().to(memory_format=torch.channels_last), noise_data(), budget="macs=50%", train=REPAIR_ONLY
    )
    assert [axis.frozen_because for axis in last.graph.axes] == [axis.frozen_because for axis in usual.graph.axes]
    assert last.architecture.widths == usual.architecture.widths
    assert last.model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_survey_names_range_share_and_reasons():
    model = _model()
    found = inspect_model(model, torch.zeros(1, 3, 8, 8), cut=CutConfig(space=SearchSpace(min_kept_fraction=0)))
    assert found.original.macs == count_macs(model, torch.zeros(1, 3, 8, 8))
    assert found.smallest.macs == 64 * 27 + 9 * 9 + 4
    assert [name for names in found.frozen.values() for name in names] == ["0/input", "7"]
    assert 0.99 < found.prunable_share <= 1
    assert found.prunable_macs_share == 1
    chosen = inspect_model(
        model,
        torch.zeros(1, 3, 8, 8),
        cut=CutConfig(selection=Selection(include=("3",)), space=SearchSpace(min_kept_fraction=0)),
    )
    # The first convolution is not cut any more: 16 x 3 x 9 weights at 64 positions.
    whole = count_macs(model, torch.zeros(1, 3, 8, 8))
    assert chosen.prunable_macs_share == pytest.approx(1 - 16 * 27 * 64 / whole)
    assert chosen.smallest.macs == 16 * 27 * 64 + 16 * 9 * 9 + 4

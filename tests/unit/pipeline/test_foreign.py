"""Any student from any teacher: the artifact, the report, resume, and what does not belong together."""

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from noise_images import Dying, noise_data, noise_split
from run_pipeline import run_distill
from squares import Squares, pooled_net
from torch import Tensor, nn

from secateur.cost import count_macs
from secateur.data import ImageData, own_data
from secateur.distill import MeanOverTaps, Objective, Term, hint_loss, make_adaptors, paired_stages, select_features
from secateur.errors import ArtifactError, ModelError, TrainingError
from secateur.graph import trace
from secateur.models import CifarResNet, ModelSource, load_model
from secateur.pipeline import HintStage, ModelSpec, OnExisting, load, verify
from secateur.tasks import Regression
from secateur.train import (
    CheckpointPolicy,
    RunSettings,
    Silent,
    TrainConfig,
    distill_after_hints,
    open_fabric,
    train_with_teacher,
)

SHORT = TrainConfig(epochs=2, batch_size=16)


def _resnet(widths: tuple[int, int, int], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CifarResNet(1, widths=widths, num_classes=4).eval()


TEACHER = ModelSpec(_resnet((8, 16, 24), 1), "teacher")
STUDENT = ModelSpec(_resnet((4, 8, 12)), "student")
TAPS = {"layer1": "layer1", "layer3": "layer3"}


def hint() -> Term:
    adaptors = make_adaptors(STUDENT.model, TEACHER.model, TAPS, torch.zeros(1, 3, 8, 8))
    return Term("hint", MeanOverTaps(hint_loss, dict(adaptors.items())), inputs=select_features, taps=TAPS)


def run(data: ImageData | None = None, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"teacher": TEACHER, "train": SHORT, "callbacks": Silent(), "export": ()}
    return run_distill(settings.pop("student", STUDENT), data=data or noise_data(), **(defaults | settings))


def equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_the_student_is_that_of_the_engine() -> None:
    objective = Objective(terms=(hint(),))
    before = {name: tensor.clone() for name, tensor in STUDENT.model.state_dict().items()}
    result = run(objective=objective)
    by_hand = train_with_teacher(
        STUDENT.model, teacher=TEACHER.model, data=noise_data(), train=SHORT, objective=objective,
        run=RunSettings(callbacks=Silent(), fabric=open_fabric()),
    )  # fmt: skip
    assert equal(result.model, by_hand.model)
    assert all(torch.equal(before[name], tensor) for name, tensor in STUDENT.model.state_dict().items())
    report = result.report
    assert [step.name for step in report.steps] == ["teacher", "student before", "distilled"]
    assert report.before.macs == count_macs(TEACHER.model, torch.zeros(1, 3, 8, 8))
    assert report.after.macs == count_macs(STUDENT.model, torch.zeros(1, 3, 8, 8))
    assert report.strategy == "distilled from teacher: 0.9 kd (T = 4) + 0.1 labels + 1 hint"
    assert result.failed == ()
    assert (result.folder, result.files) == (None, ())


def test_hints_come_first_if_they_shall() -> None:
    hinting = HintStage((hint(),), TrainConfig(epochs=1, batch_size=16))
    result = run(hint_stage=hinting)
    by_hand = distill_after_hints(
        STUDENT.model, teacher=TEACHER.model, data=noise_data(), hints=hinting.hints, hint_train=hinting.train,
        train=SHORT, run=RunSettings(callbacks=Silent(), fabric=open_fabric()),
    )  # fmt: skip
    assert equal(result.model, by_hand.model)
    assert result.report.strategy.endswith("after 1 epochs of hints")


def test_after_hints_the_task_is_that_of_the_run() -> None:
    """The first stage has no labels; the second learns them as numbers, which cross-entropy would refuse or misread."""
    nets = [ModelSpec(pooled_net(2), name) for name in ("student", "teacher")]
    tap = {"0": "0"}
    adaptors = make_adaptors(nets[0].model, nets[1].model, tap, torch.zeros(1, 3, 16, 16))
    term = Term("hint", MeanOverTaps(hint_loss, dict(adaptors.items())), inputs=select_features, taps=tap)
    found = run_distill(
        nets[0], teacher=nets[1], data=own_data((Squares("numbers"), Squares("numbers", 24))), train=SHORT,
        task=Regression(), hint_stage=HintStage((term,), TrainConfig(epochs=1, batch_size=16)),
        objective=Objective(kd_weight=0.0, label_weight=1.0), callbacks=Silent(), export=(),
    )  # fmt: skip
    assert {step.score.metric.name for step in found.report.steps} == {"root mean squared error"}
    assert {record.metric.name for record in found.trained.history} == {"root mean squared error"}


def test_the_report_compares_teacher_and_student_image_by_image() -> None:
    report = run(train=TrainConfig(epochs=1, batch_size=16)).report
    teacher, student = (step.answers.right for step in (report.steps[0], report.steps[-1]))
    assert report.paired.lost == int((teacher & ~student).sum())
    assert report.paired.gained == int((student & ~teacher).sum())


def test_an_artifact_is_written_loaded_and_verified(tmp_path: Path) -> None:
    out = tmp_path / "small"
    result = run(out=out)
    loaded = load(out, factory=lambda: _resnet((4, 8, 12)))
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.model(images), result.model(images))
    assert verify(out, factory=lambda: _resnet((4, 8, 12))).passed
    assert sorted(path.name for path in result.files) == [
        "history.csv",
        "model.safetensors",
        "report.html",
        "secateur.json",
    ]
    assert "student from teacher" in (out / "report.html").read_text()
    assert loaded.manifest.recipe.metrics["distillation"]["teacher"] == "teacher"
    assert not (tmp_path / "small.work").exists()


@pytest.mark.long
def test_a_named_student_is_built_again_by_its_name(tmp_path: Path) -> None:
    model, source = load_model("cifar_resnet20", num_classes=4)
    run(
        student=ModelSpec(model, "cifar_resnet20", source),
        out=tmp_path / "small",
        train=TrainConfig(1, batch_size=32),
    )
    assert (
        load(tmp_path / "small").manifest.recipe.source == ModelSource.parse("cifar_resnet20", num_classes=4).to_json()
    )


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    out, split = tmp_path / "small", noise_split(64, 0)
    dying = Dying(split.images, split.labels, split.normalization)
    whole = run(objective=Objective(terms=(hint(),)))
    with pytest.raises(KeyboardInterrupt):
        run(noise_data(dying), out=out, objective=Objective(terms=(hint(),)))
    assert not out.exists()
    with pytest.raises(ArtifactError, match="unfinished run beside it"):
        run(out=out, objective=Objective(terms=(hint(),)))
    with pytest.raises(ArtifactError, match="seed was 0, now 1"):
        run(out=out, objective=Objective(terms=(hint(),)), on_existing=OnExisting.RESUME, seed=1)
    resumed = run(out=out, objective=Objective(terms=(hint(),)), on_existing=OnExisting.RESUME)
    assert equal(resumed.model, whole.model)


class Wide(nn.Module):
    """Three logits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1))


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_other_classes_or_inputs_are_refused(who: str) -> None:
    with pytest.raises(ModelError, match="one logit for each of the 4 classes"):
        run(**{who: ModelSpec(Wide())})
    with pytest.raises(ModelError, match=r"must run the images of noise \(3x8x8\)"):
        run(**{who: ModelSpec(nn.Sequential(nn.Flatten(), nn.Linear(10, 4)))})


def test_taps_that_do_not_exist_are_refused_with_the_nearest() -> None:
    term = Term("hint", MeanOverTaps(hint_loss), inputs=select_features, taps={"layer3": "layr3"})
    with pytest.raises(TrainingError, match=r"`teacher` must have the tapped module 'layr3'.*Did you mean layer3"):
        run(objective=Objective(terms=(term,)))


def test_stages_are_paired_by_their_resolution() -> None:
    class Stem(nn.Module):
        """A network that begins at half the resolution."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1)
            self.head = nn.Linear(6, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.two(self.one(images)).mean((2, 3)))

    images = torch.zeros(2, 3, 8, 8)
    student, teacher = trace(STUDENT.model, images), trace(Stem().eval(), images)
    assert paired_stages(student, trace(TEACHER.model, images)) == {n: n for n in ("layer1", "layer2", "layer3")}
    assert paired_stages(student, teacher) == {"layer2": "one", "layer3": "two"}
    assert paired_stages(teacher, student) == {"one": "layer2", "two": "layer3"}
    # No resolution in common: the last ones, in order.
    larger = trace(STUDENT.model, torch.zeros(2, 3, 40, 40))
    assert paired_stages(larger, teacher) == {"layer2": "one", "layer3": "two"}
    flat = trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), images)
    with pytest.raises(TrainingError, match="`student` must have modules with traced channels"):
        paired_stages(flat, teacher)
    with pytest.raises(TrainingError, match="`teacher` must have modules with traced channels"):
        paired_stages(teacher, flat)


def test_checkpoints_are_written_when_they_shall_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(
        import_module("secateur.train.checkpoint"), "save_checkpoint", lambda folder, saved: written.append(saved.name)
    )
    run(out=tmp_path / "small", checkpoints=CheckpointPolicy(math.inf, 2))
    assert "epoch-000000-step-000002" in written
    assert not any(name.endswith("1") and "step" in name for name in written)


def test_versions_outside_of_the_tested_window_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda _name: ["torch>=0.3", 'torch<0.4; extra == "tested"'])
    with pytest.warns(UserWarning, match="not tested with torch"):
        run()

"""Any trainer recovers the student between cut and export; what it returns is checked, and nothing is lost."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import secateur
from secateur.cost import Budget
from secateur.errors import ArtifactError, KindError, TrainingError
from secateur.pipeline import CutConfig, ModelSpec, OnExisting, RecoveryConfig, RunConfig, distill_model
from secateur.tasks import Imitation, Regression, Task
from secateur.train import RecoverContext, Silent

CUT = CutConfig(calibration_images=32, space=secateur.SearchSpace(divisor=1))
SETTINGS: dict[str, Any] = {"strategy": secateur.Knapsack(), "cut": CUT, "export": ()}


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting a network to time it takes seconds, and times are not what is tested here."""
    monkeypatch.setattr("secateur.pipeline.finalize.latency_on", lambda *_: ((), ()))


def net(width: int = 12) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3)]
        return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


def data() -> tuple[TensorDataset, TensorDataset]:
    draw = torch.Generator().manual_seed(1)
    images, labels = torch.randn(72, 3, 8, 8, generator=draw), torch.randint(0, 3, (72,), generator=draw)
    return TensorDataset(images[:48], labels[:48]), TensorDataset(images[48:], labels[48:])


def run(**more: Any) -> RunConfig:
    return RunConfig(callbacks=Silent(), device=torch.device("cpu"), **more)


def compress(loop: Any, out: Path | None = None, **more: Any) -> secateur.CompressResult:
    settings = {**SETTINGS, "run": run(), **more}
    return secateur.compress(net(), data(), "macs=50%", recovery=loop, out=out, **settings)


def plain_loop(student: nn.Module, teacher: nn.Module, splits: Any, context: RecoverContext) -> nn.Module:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for images, labels in splits.train.batches(16, seed=context.seed, device=context.device):
        with torch.no_grad():
            wanted = teacher(images)
        found = student(images)
        loss = context.task.loss(found, labels) + context.task.imitation(found, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def test_any_loop_recovers_the_student(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def loop(student: nn.Module, teacher: nn.Module, splits: Any, context: RecoverContext) -> nn.Module:
        seen.update(student=student, context=context, before=context.score(student).value)
        assert student.training
        assert not teacher.training
        assert all(p.requires_grad for p in student.parameters())
        assert not any(p.requires_grad for p in teacher.parameters())
        assert len(splits.train) == 48
        assert context.folder is not None
        assert context.folder.is_dir()
        return plain_loop(student, teacher, splits, context)

    with torch.no_grad():  # Whatever the caller has set.
        found = compress(loop, tmp_path / "out")
    assert [step.name for step in found.report.steps] == ["original", "cut and repaired", "recovered"]
    assert found.trained is None
    assert all(check.passed for check in found.report.checks)
    for mine, theirs in zip(found.model.parameters(), seen["student"].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert found.model is not seen["student"]
    assert not found.model.training
    loaded = secateur.load(tmp_path / "out", factory=net).model
    images = data()[1].tensors[0]
    assert torch.equal(loaded(images), found.model(images))
    assert not (tmp_path / "out.work").exists()
    steps = json.loads((tmp_path / "out" / "secateur.json").read_text())["metrics"]["test_accuracy"]
    assert [step["step"] for step in steps] == ["original", "cut and repaired", "recovered"]


def test_the_same_seed_gives_the_same_student_and_the_callers_random_state_stays() -> None:
    def noisy(student: nn.Module, *_: Any) -> nn.Module:
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        return student

    state = torch.get_rng_state()
    first, second = (compress(RecoveryConfig(recover=noisy)).model for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_loop_may_train_in_place_and_return_nothing() -> None:
    def in_place(student: nn.Module, teacher: nn.Module, splits: Any, context: RecoverContext) -> None:
        plain_loop(student, teacher, splits, context)

    trained, in_one = compress(plain_loop).model, compress(in_place).model
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), in_one.parameters(), strict=True))


def test_imitation_has_a_score_too() -> None:
    scores: list[float] = []

    def loop(student: nn.Module, teacher: nn.Module, _splits: Any, context: RecoverContext) -> nn.Module:
        scores.extend([context.score(teacher).value, context.score(student).value])
        return student

    train, validation = data()
    compress_of_images = tuple(TensorDataset(part.tensors[0]) for part in (train, validation))
    secateur.compress(net(), compress_of_images, "macs=50%", task=Imitation(), recovery=loop, run=run(), **SETTINGS)
    assert scores[0] == 0
    assert scores[1] > 0


def raises(*_: Any) -> nn.Module:
    raise RuntimeError("CUDA ran out of something")


def nan_weights(student: nn.Module, *_: Any) -> nn.Module:
    with torch.no_grad():
        next(student.parameters()).fill_(float("nan"))
    return student


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def other_function(student: nn.Module, *_: Any) -> nn.Module:
    assert isinstance(student, nn.Sequential)
    student[4] = nn.GELU()
    return student


BAD: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (raises, "stopped with RuntimeError: CUDA ran out of something. Correct it"),
    "another architecture": (lambda *_: net(5), "returned a Sequential with other tensors: 0.bias, 0.weight"),
    "the teacher": (lambda _, teacher, *__: teacher, "must return the architecture that it was given"),
    "wrapped": (lambda student, *_: Wrapped(student), "without what a trainer has wrapped around it"),
    "another function": (other_function, "with the same weights, the model that .* computes something else"),
    "NaN": (nan_weights, r"must return finite weights; .* in 1 tensor\(s\): 0.weight"),
    "nothing": (lambda *_: None, "returned NoneType. End it with `return student`"),
    "numbers": (lambda *_: 0.9, "returned float"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_goes_wrong_is_one_message_and_the_cut_student_is_kept(name: str, tmp_path: Path) -> None:
    loop, message = BAD[name]
    with pytest.raises(TrainingError, match=message) as caught:
        compress(loop, tmp_path / "out")
    assert "`recover` must" in str(caught.value)
    assert (tmp_path / "out.work" / "student.safetensors").is_file()
    assert not (tmp_path / "out").exists()


def test_after_an_error_the_run_goes_on_with_the_cut_student(tmp_path: Path) -> None:
    def interrupted(student: nn.Module, _teacher: nn.Module, _splits: Any, context: RecoverContext) -> nn.Module:
        assert context.folder is not None
        (context.folder / "epoch").write_text("3")
        raise ValueError("no space left")

    def continued(student: nn.Module, teacher: nn.Module, splits: Any, context: RecoverContext) -> nn.Module:
        assert context.folder is not None
        assert (context.folder / "epoch").read_text() == "3"
        return plain_loop(student, teacher, splits, context)

    with pytest.raises(TrainingError, match="no space left"):
        compress(interrupted, tmp_path / "out")
    with pytest.raises(ArtifactError, match="unfinished run"):
        compress(continued, tmp_path / "out")
    found = compress(continued, tmp_path / "out", run=run(on_existing=OnExisting.RESUME))
    whole = compress(plain_loop)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), whole.model.parameters(), strict=True))


def test_what_a_loop_returned_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*arguments: Any) -> nn.Module:
        calls.append(1)
        return plain_loop(*arguments)

    def fails(_run: Any) -> Any:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["secateur.pipeline.compress"], "finalize", fails)
        with pytest.raises(OSError, match="disk is full"):
            compress(counted, tmp_path / "out")
    found = compress(counted, tmp_path / "out", run=run(on_existing=OnExisting.RESUME))
    assert len(calls) == 1
    assert all(
        torch.equal(a, b)
        for a, b in zip(found.model.parameters(), compress(plain_loop).model.parameters(), strict=True)
    )


def test_bad_settings_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(KindError, match=r"`recovery` must be of the type RecoveryConfig or a function; got 'mine'"):
        compress("mine", tmp_path / "out")
    with pytest.raises(TrainingError, match="must be left out where the budget bounds `nonzero`"):
        secateur.compress(
            net(), data(), Budget.parse("nonzero=30%"), recovery=plain_loop, out=tmp_path / "out", run=run()
        )
    assert list(tmp_path.iterdir()) == []


def test_distill_takes_a_loop_too(tmp_path: Path) -> None:
    images = secateur.load_data("digits", limit=64)
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(64, w), nn.ReLU(), nn.Linear(w, 10)) for w in (32, 8))
    found = distill_model(
        ModelSpec(student), teacher=ModelSpec(teacher), data=images, train=plain_loop, out=tmp_path / "a", export=(),
        run=run(),
    )  # fmt: skip
    assert found.trained is None
    assert [step.name for step in found.report.steps] == ["teacher", "student before", "trained"]
    assert "a loop of the user's own" in found.report.strategy
    assert not torch.equal(found.model[1].weight, student[1].weight)
    with pytest.raises(TrainingError, match="must return finite weights"):
        distill_model(ModelSpec(student), teacher=ModelSpec(teacher), data=images, train=nan_weights, run=run())


def test_a_loop_of_a_distillation_is_told_the_task() -> None:
    tasks: list[Task] = []

    def loop(student: nn.Module, _teacher: nn.Module, _splits: Any, context: RecoverContext) -> nn.Module:
        tasks.append(context.task)
        return student

    draw = torch.Generator().manual_seed(1)
    numbers = TensorDataset(torch.randn(32, 3, 8, 8, generator=draw), torch.randn(32, 3, generator=draw))
    teacher, student = ModelSpec(net(16)), ModelSpec(net())
    distill_model(student, teacher=teacher, data=(numbers, numbers), train=loop, task=Regression(), run=run())
    assert tasks == [Regression()]


def test_a_cut_model_is_an_ordinary_one_to_pickle() -> None:
    cut = secateur.cut(net(), secateur.trace(net(), torch.randn(1, 3, 8, 8)), secateur.Architecture())
    text = pickle.dumps(cut.model)
    assert b"secateur.prune" not in text

"""Teachers: several as one, chains of them, their logits on disk, and those that have nothing to teach."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import Blobs, fit_small, same, small_config, small_net, state, with_run
from torch import Tensor, nn

from secateur.distill import Ensemble, MeanOverTaps, Objective, Term, hint_loss, select_features
from secateur.errors import ModelError, TrainingError
from secateur.train import (
    Precision,
    Silent,
    Trained,
    born_again,
    distill_chain,
    reset_weights_,
    train_with_teacher,
)

TAUGHT = fit_small(
    small_net(9, width=12), Blobs(96), train=small_config(8), objective=Objective.of_labels(), callbacks=Silent()
).model


class Data:
    train, validation, augment = Blobs(48), Blobs(24, seed=1), None


class Counting(nn.Module):
    """A teacher that counts its batches in a file: copies of it count together."""

    def __init__(self, inner: nn.Module, log: Path) -> None:
        super().__init__()
        self.inner, self.log = inner, log

    def forward(self, images: Tensor) -> Tensor:
        with self.log.open("a") as file:
            file.write("x")
        return self.inner(images)

    @property
    def batches(self) -> int:
        return len(self.log.read_text()) if self.log.exists() else 0


def run(**settings: Any) -> Trained:
    defaults: dict[str, Any] = {
        "teacher": TAUGHT, "data": Data(), "train": small_config(3), "callbacks": Silent(),
    }  # fmt: skip
    return train_with_teacher(settings.pop("student", small_net(dropout=0.2)), **with_run(**(defaults | settings)))


@pytest.mark.parametrize("precision", list(Precision))
def test_logits_on_disk_replay_exactly_and_the_teacher_runs_once(tmp_path: Path, precision: Precision) -> None:
    teacher = Counting(TAUGHT, tmp_path / "log")
    schedule = small_config(3, precision=precision)
    without = run(teacher=teacher, train=schedule)
    assert teacher.batches == 9
    first = run(teacher=teacher, train=schedule, teacher_cache=tmp_path / "logits")
    assert teacher.batches == 18
    second = run(teacher=teacher, train=schedule, teacher_cache=tmp_path / "logits")
    assert teacher.batches == 18, "it did not run again"
    assert same(state(first.model), state(without.model))
    assert same(state(second.model), state(without.model))
    # Another student learns from the same file.
    other = run(student=small_net(4), teacher=teacher, train=schedule, teacher_cache=tmp_path / "logits")
    assert teacher.batches == 18
    assert same(state(other.model), state(run(student=small_net(4), train=schedule).model))
    names = sorted(path.name for path in (tmp_path / "logits").iterdir())
    assert names == [*(f"seed-0-epoch-00000{epoch}.safetensors" for epoch in range(3)), "teacher.json"]


def test_another_seed_has_logits_of_its_own(tmp_path: Path) -> None:
    teacher = Counting(TAUGHT, tmp_path / "log")
    for seed in (0, 1):
        run(teacher=teacher, train=small_config(1, seed=seed), teacher_cache=tmp_path / "logits")
    assert teacher.batches == 6
    assert len(list((tmp_path / "logits").glob("seed-1-*"))) == 1


def test_a_run_killed_within_an_epoch_leaves_whole_epochs(tmp_path: Path) -> None:
    class Fragile(Blobs):
        def batches(self, *args: Any, epoch: int = 0, **settings: Any) -> Any:
            for step, batch in enumerate(super().batches(*args, epoch=epoch, **settings)):
                if (epoch, step) == (1, 2):
                    raise KeyboardInterrupt
                yield batch

    class Broken(Data):
        train = Fragile(48)

    with pytest.raises(KeyboardInterrupt):
        run(data=Broken(), teacher_cache=tmp_path / "logits", folder=tmp_path / "run")
    assert [path.name for path in (tmp_path / "logits").glob("seed*")] == ["seed-0-epoch-000000.safetensors"]
    resumed = run(teacher_cache=tmp_path / "logits", folder=tmp_path / "run")
    assert same(state(resumed.model), state(run().model))


def test_other_images_are_refused(tmp_path: Path) -> None:
    class Other(Data):
        augment = 0.5

    run(teacher_cache=tmp_path / "logits")
    message = r"`teacher_cache` must hold logits for these images; those of step 1 in .*epoch-000000.*belong to others"
    with pytest.raises(TrainingError, match=message):
        run(data=Other(), teacher_cache=tmp_path / "logits")
    with pytest.raises(TrainingError, match=message):
        run(train=small_config(3, batch_size=24), teacher_cache=tmp_path / "logits")


def test_another_teacher_or_precision_is_refused(tmp_path: Path) -> None:
    run(teacher_cache=tmp_path / "logits")
    with pytest.raises(TrainingError, match="`teacher_cache` must be a folder for one teacher in one precision; got"):
        run(teacher=small_net(1), teacher_cache=tmp_path / "logits")
    with pytest.raises(TrainingError, match=r"BF16_MIXED.*Name another folder"):
        run(train=small_config(3, precision=Precision.BF16_MIXED), teacher_cache=tmp_path / "logits")


@pytest.mark.parametrize("name", ["teacher.json", "seed-0-epoch-000000.safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    run(teacher_cache=tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(TrainingError, match=rf"{name} is damaged .*the teacher runs again"):
        run(teacher_cache=tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TrainingError, match="`teacher_cache` must be a folder that can be written"):
        run(teacher_cache=tmp_path / "file")


def test_features_need_a_teacher_that_runs(tmp_path: Path) -> None:
    hint = Term("hint", MeanOverTaps(hint_loss), inputs=select_features, taps={"0": "0"})
    with pytest.raises(TrainingError, match="`teacher_cache` must go with losses of logits alone; hint needs features"):
        run(objective=Objective(terms=(hint,)), teacher_cache=tmp_path)
    with pytest.warns(UserWarning, match="`teacher_cache` has no effect"):
        fit_small(
            small_net(), Blobs(16), train=small_config(1), objective=Objective.of_labels(), callbacks=Silent(),
            teacher_cache=tmp_path,
        )  # fmt: skip


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_an_ensemble_is_the_weighted_mean_of_logits(weights: tuple[float, float] | None) -> None:
    teachers = [small_net(1).eval(), small_net(2, width=12).eval()]
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    share = (0.5, 0.5) if weights is None else (0.25, 0.75)
    with torch.no_grad():
        expected = share[0] * teachers[0](images) + share[1] * teachers[1](images)
        torch.testing.assert_close(Ensemble(teachers, weights)(images), expected)
    trained = run(teacher=Ensemble(teachers, weights))
    assert not same(state(trained.model), state(run(teacher=teachers[0]).model))
    one = run(teacher=Ensemble(teachers, (1.0, 0.0)))
    torch.testing.assert_close(state(one.model), state(run(teacher=teachers[0]).model))


def test_teachers_of_an_ensemble_are_tapped_by_number() -> None:
    hint = Term("hint", MeanOverTaps(hint_loss), inputs=select_features, taps={"0": "teachers.1.0"})
    trained = run(teacher=Ensemble([small_net(1), small_net(2)]), objective=Objective(terms=(hint,)))
    assert "hint" in trained.history[-1].parts


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), "one or more with a weight each; got 2 with 1 weights"),
        ((-1.0, 1.0), "`weights` must be finite, not negative and not all 0"),
        ((0.0, 0.0), "`weights` must be finite, not negative and not all 0"),
        ((float("nan"), 1.0), "`weights` must be finite"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Ensemble([small_net(1), small_net(2)], weights)


def test_an_ensemble_of_none_or_of_other_classes_is_refused() -> None:
    with pytest.raises(TrainingError, match="`teachers` must be one or more"):
        Ensemble([])
    with pytest.raises(TrainingError, match=r"must have the same classes; got logits of \[\(2, 3\), \(2, 5\)\]"):
        Ensemble([small_net(1), small_net(2, classes=5)])(torch.zeros(2, 3, 8, 8))


def test_assistants_teach_in_a_row(tmp_path: Path) -> None:
    students = [small_net(1, width=10), small_net(2)]
    settings: dict[str, Any] = {"data": Data(), "train": small_config(2), "callbacks": Silent()}
    found = distill_chain(students, teacher=TAUGHT, **with_run(folder=tmp_path, **settings))
    assistant = train_with_teacher(students[0], teacher=TAUGHT, **with_run(**settings))
    student = train_with_teacher(students[1], teacher=assistant.model, **with_run(**settings))
    assert [same(state(one.model), state(other.model)) for one, other in zip(found, (assistant, student), strict=True)]
    assert same(state(found[1].model), state(student.model))
    assert {path.name for path in tmp_path.iterdir()} == {"student-0", "student-1"}
    shutil.rmtree(tmp_path / "student-1")
    again = distill_chain(students, teacher=TAUGHT, **with_run(folder=tmp_path, **settings))
    assert same(state(again[1].model), state(student.model))
    with pytest.raises(TrainingError, match="`students` must name at least one"):
        distill_chain([], teacher=TAUGHT, **with_run(**settings))


def test_a_network_is_born_again() -> None:
    settings: dict[str, Any] = {"data": Data(), "callbacks": Silent()}
    before = state(TAUGHT)
    found = born_again(TAUGHT, train=small_config(2, seed=5), generations=2, **with_run(**settings))
    assert same(state(TAUGHT), before)
    first = train_with_teacher(
        reset_weights_(small_net(width=12), 6), teacher=TAUGHT, train=small_config(2, seed=6), **with_run(**settings)
    )
    second = train_with_teacher(
        reset_weights_(small_net(width=12), 7),
        teacher=first.model,
        train=small_config(2, seed=7),
        **with_run(**settings),
    )
    for one, other in zip(found, (first, second), strict=True):
        assert same(state(one.model), state(other.model))
    with pytest.raises(TrainingError, match="`generations` must be at least 1; got 0"):
        born_again(TAUGHT, train=small_config(1), generations=0, **with_run(**settings))


def test_a_network_that_cannot_be_drawn_anew_is_not_born_again() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)) * self.scale

    with pytest.raises(ModelError, match="`teacher` must be able to reset all weights"):
        born_again(Own(), data=Data(), **with_run(train=small_config(1)))


class Saying(nn.Module):
    """A teacher with the same answer to everything."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.said = nn.Parameter(torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        return self.said.expand(len(images), -1) + 0 * images.mean()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_teacher_without_finite_logits_stops_the_run(bad: float) -> None:
    with pytest.raises(TrainingError, match="`teacher` must give finite logits; got NaN or infinity for training"):
        run(teacher=Saying(0.0, bad, 0.0))


def test_a_teacher_that_guesses_is_warned_of_once(recwarn: pytest.WarningsRecorder) -> None:
    run(teacher=TAUGHT)
    assert not [warning for warning in recwarn if "no better than chance" in str(warning.message)]
    right = int((Data.train.labels == 0).sum())
    with pytest.warns(
        UserWarning, match=rf"right on {100 * right / 48:.1f} % of 48 .*no better than chance \(33.3 %\)"
    ):
        run(teacher=Saying(1.0, 0.0, 0.0))


def test_remembered_settings_are_words(tmp_path: Path) -> None:
    run(teacher_cache=tmp_path)
    said = json.loads((tmp_path / "teacher.json").read_text())
    assert set(said) == {"teacher", "precision"}
    assert said["precision"] == "FLOAT32"

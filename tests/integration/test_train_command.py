"""``secateur train`` on handwritten digits."""

import json
from pathlib import Path
from typing import get_args

import pytest
from command_line import Run
from safetensors.torch import load_file

import secateur
from secateur.cli.train import RecipeFlags, RecipeName
from secateur.errors import TrainingError
from secateur.train import RECIPES, SGD, AdamW


@pytest.fixture(autouse=True)
def _unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No latency: measuring it takes longer than all the rest."""
    monkeypatch.setattr("secateur.pipeline.finalize.latency_between", lambda *_: ((), ()))
    monkeypatch.setattr("secateur.pipeline.finalize.both_files", lambda *_: ())


def words(out: Path, *more: object) -> tuple[object, ...]:
    return (
        *("train", "--model", "digits_resnet", "--data", "digits", "--out", out, "--export", "", "--threads", 1),
        *("--batch-size", 64, "--lr", 0.05, *more),
    )


def test_a_network_learns_and_is_written(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "base"
    found = run(*words(out, "--epochs", 4, "--ema", 0.9, "--label-smoothing", 0.1, "--rand-augment", "rand-m3-n1"))
    assert found.exit_code == 0, found.output
    assert "Performance Efficiency" not in found.stdout  # Nothing is smaller.
    metrics = secateur.load(out).manifest.recipe.metrics
    accuracy = {step["step"]: step["top1"] for step in metrics["test_accuracy"]}
    assert accuracy["before"] < 0.4 < 0.7 < accuracy["trained"]
    assert metrics["training"]["recipe"] == "cifar-resnet"
    assert "auto_augment='rand-m3-n1'" in metrics["training"]["augment"]
    assert (out / "report.html").is_file()
    assert "Performance Efficiency" not in (out / "report.html").read_text()


@pytest.mark.slow
def test_what_was_trained_can_be_compressed(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "base"
    assert run(*words(out, "--epochs", 1)).exit_code == 0
    small = run("compress", "--model", out, "--data", "digits", "--budget", "macs=60%", "--out", tmp_path / "small",
                "--epochs", 0, "--export", "", "--threads", 1, "--divisor", 1, "--strategy", "uniform")  # fmt: skip
    assert small.exit_code == 0, small.output


def test_an_interrupted_training_is_resumed_bit_for_bit(run: Run, tmp_path: Path, monkeypatch) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    settings = ("--epochs", 2, "--seed", 3, "--ema", 0.9)
    assert run(*words(whole, *settings)).exit_code == 0
    from secateur.train.supervised import SupervisedStep

    measure = SupervisedStep.measure

    def interrupted(self, summary):
        if summary.epoch == 2:
            raise KeyboardInterrupt
        return measure(self, summary)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedStep, "measure", interrupted)
        assert run(*words(halves, *settings)).exit_code != 0
    assert not halves.exists()
    again = run(*words(halves, *settings))
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    other = run(*words(halves, *settings, "--resume", "--weight-decay", 0.1))
    assert other.exit_code == 2
    resumed = run(*words(halves, *settings, "--resume"))
    assert resumed.exit_code == 0, resumed.output
    one, other_half = (load_file(folder / "model.safetensors") for folder in (whole, halves))
    assert all(one[name].equal(other_half[name]) for name in one)
    # Everything but times is in both histories alike.
    histories = [json.loads((folder / "secateur.json").read_text()) for folder in (whole, halves)]
    assert histories[0].keys() == histories[1].keys()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--recipe", "resnet"), "cifar-resnet"),
        (("--epochs", 0), "--epochs"),
        (("--label-smoothing", 2), "`--label-smoothing` must be in [0, 1)"),
        (("--ema", 2), "`--ema` must be in [0, 1)"),
        (("--rand-augment", "rad-m9"), "`--auto-augment` must be a policy of timm"),
        (("--resume", "--restart"), "`--resume` continues"),
        (("--mixup", -1), "`--mixup` must be finite and not negative"),
    ],
)
def test_bad_words_end_with_a_sentence(run: Run, tmp_path: Path, more: tuple[object, ...], message: str) -> None:
    found = run(*words(tmp_path / "base", *more))
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())
    assert not (tmp_path / "base").exists()


def test_flags_change_the_recipe_and_nothing_else() -> None:
    assert set(get_args(RecipeName)) == set(RECIPES)
    for name in get_args(RecipeName):
        assert RecipeFlags(recipe=name).to_recipe() == RECIPES[name]
    flags = RecipeFlags(recipe="cifar-strong", epochs=2, ema=0, weight_decay=0.1, warmup=0.5, precision="32")
    changed = flags.to_recipe().train
    assert (changed.epochs, changed.ema_decay, changed.warmup_fraction) == (2, None, 0.5)
    assert changed.optimizer == SGD(weight_decay=0.1)
    assert changed.learning_rate == RECIPES["cifar-strong"].train.learning_rate
    assert RecipeFlags(optimizer="adamw", weight_decay=0.2).to_recipe().train.optimizer == AdamW(weight_decay=0.2)


def test_augmentation_is_that_of_the_data_and_the_recipe() -> None:
    data = secateur.load_data("digits", limit=40)
    assert RecipeFlags().augment(data).augment == data.augment
    assert RecipeFlags(recipe="cifar-strong").augment(data).augment.auto_augment == "rand-m5-n2-mstd0.5"
    assert RecipeFlags(recipe="cifar-strong", auto_augment="none").augment(data).augment == data.augment
    assert RecipeFlags(erase=0.5).augment(data).augment.erase == 0.5


def test_a_training_needs_epochs_and_labels() -> None:
    from secateur.pipeline import ModelSpec, train_model
    from secateur.tasks.imitation import Imitation
    from secateur.train import TrainConfig

    data, model = secateur.load_data("digits", limit=40), secateur.load_model("digits_resnet")[0]
    with pytest.raises(TrainingError, match="`train` must have epochs; got 0"):
        train_model(ModelSpec(model), data=data, train=TrainConfig(epochs=0))
    with pytest.raises(TrainingError, match="`task` must have labels to learn from"):
        train_model(ModelSpec(model), data=data, train=TrainConfig(epochs=1), task=Imitation())

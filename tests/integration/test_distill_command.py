"""``secateur distill`` on handwritten digits."""

from pathlib import Path

import pytest
from command_line import Run

import secateur
from secateur.export import is_artifact


def words(weights: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        *("distill", "--teacher", "digits_resnet", "--teacher-weights", weights, "--student", "digits_resnet"),
        *("--data", "digits", "--out", out, "--threads", 1, "--batch-size", 64, "--epochs", 3, "--export", "", *more),
    )


@pytest.mark.long
def test_a_student_learns_and_is_written(run: Run, digits_weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    found = run(*words(digits_weights, out, "--loss", "kd", "--loss", "hint", "--teacher-cache", tmp_path / "none"))
    assert found.exit_code == 2
    assert "`--teacher-cache` must go with losses of logits alone; hint needs features" in found.stderr
    found = run(*words(digits_weights, out, "--loss", "kd", "--loss", "hint"))
    assert found.exit_code == 0, found.output
    assert is_artifact(out)
    steps = secateur.load(out).manifest.recipe.metrics["test_accuracy"]
    accuracy = {step["step"]: step["top1"] for step in steps}
    assert accuracy["teacher"] > 0.9
    assert accuracy["student before"] < 0.4
    assert accuracy["distilled"] > 0.8
    assert "Performance Efficiency" in found.stdout
    # The artifact is a teacher too.
    again = run(*words(digits_weights, tmp_path / "again")[:1], "--teacher", out, "--student", "digits_resnet",
                "--data", "digits", "--out", tmp_path / "again", "--epochs", 1, "--export", "", "--threads", 1,
                "--teacher-cache", tmp_path / "logits")  # fmt: skip
    assert again.exit_code == 0, again.output
    assert len(list((tmp_path / "logits").glob("seed-0-*"))) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--loss", "nothing"), "`--loss` must be one of"),
        (("--hints", "layer3"), "`--hints` must pair a module"),
        (("--hint-epochs", 1), "`--hint-epochs` must go with a loss of features"),
        (("--loss", "hint", "--hints", "layer3=layr3"), "must have the tapped module 'layr3'"),
        (("--resume", "--restart"), "`--resume` continues"),
        (("--loss", "dkd", "--mixup", 0.2), "`--loss` must go without --mixup and --cutmix for dkd"),
        (("--mixup", -1), "`--mixup` must be finite and not negative"),
        (("--rand-augment", "rad-m9"), "`--auto-augment` must be a policy of timm"),
    ],
)
def test_bad_words_end_with_a_sentence(
    run: Run, digits_weights: Path, tmp_path: Path, more: tuple[object, ...], message: str
) -> None:
    found = run(*words(digits_weights, tmp_path / "student", *more))
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())
    assert not (tmp_path / "student").exists()


@pytest.mark.long
def test_images_are_varied_and_mixed(run: Run, digits_weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "student"
    strong = ("--mixup", 0.2, "--cutmix", 1.0, "--rand-augment", "rand-m5-mstd0.5", "--erase", 0.2)
    found = run(*words(digits_weights, out, *strong, "--label-smoothing", 0.1, "--label-weight", 0.5))
    assert found.exit_code == 0, found.output
    steps = secateur.load(out).manifest.recipe.metrics["test_accuracy"]
    assert {step["step"]: step["top1"] for step in steps}["distilled"] > 0.3  # a tenth is chance; three epochs

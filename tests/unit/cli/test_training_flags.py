"""Flags of the training, from the words to the schedule; and one process only."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from command_line import secateur

from secateur.errors import TrainingError
from secateur.train import CheckpointPolicy, Compiled, Eager, Execution, TrainConfig


def seen_by(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: object) -> dict[str, Any]:
    """What `compress` would be called with."""
    seen: list[dict[str, Any]] = []

    def pretended(*_: Any, **given: Any) -> None:
        seen.append(given)
        raise TrainingError("seen")

    monkeypatch.setattr(import_module("secateur.pipeline.compress"), "compress", pretended)
    usual = ("--model", "digits_resnet", "--data", "digits", "--budget", "macs=50%", "--out", folder / "out")
    assert secateur("compress", *usual, *words).exit_code == 2
    (given,) = seen
    return given


@pytest.mark.parametrize(("words", "wanted"), [((), (1, None)), (("--accumulate", 4, "--clip-norm", 1.5), (4, 1.5))])
def test_parts_and_clipping_reach_the_schedule(monkeypatch, tmp_path, words, wanted):
    schedule: TrainConfig = seen_by(monkeypatch, tmp_path, *words)["recovery"].train
    assert (schedule.accumulate, schedule.clip_norm) == wanted


def test_bad_clipping_is_refused_before_anything_is_loaded(tmp_path):
    words = ("--model", "none", "--data", "none", "--budget", "macs=50%", "--out", tmp_path / "out")
    found = secateur("compress", *words, "--clip-norm", -1)
    assert found.exit_code == 2
    assert "`--clip-norm` must be positive" in found.stderr


def test_commands_that_do_not_train_refuse_to_be_one_of_several_processes(monkeypatch, tmp_path):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    found = secateur("evaluate", "--model", "none", "--data", "none")
    assert found.exit_code == 2
    assert "This command must run in one process; got number 1 of 2" in found.stderr.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_torchrun_with_one_process_is_fine(monkeypatch, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert seen_by(monkeypatch, tmp_path)["recovery"].train.accumulate == 1


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), CheckpointPolicy(600.0, None)),
        (("--checkpoint-minutes", 0.5, "--checkpoint-steps", 7), CheckpointPolicy(30.0, 7)),
    ],
)
def test_times_of_checkpoints(monkeypatch, tmp_path, words, wanted):
    assert seen_by(monkeypatch, tmp_path, *words)["run"].checkpoints == wanted


@pytest.mark.parametrize(("words", "wanted"), [((), Eager()), (("--compile",), Compiled())])
def test_networks_are_compiled_if_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...], wanted: Execution
) -> None:
    assert seen_by(monkeypatch, tmp_path, *words)["recovery"].execution == wanted

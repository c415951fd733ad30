"""The words of the command that compares strategies."""

import json
from importlib import import_module
from pathlib import Path

import pytest
from command_line import Run

from secateur.cli.compare import named_strategies, parse_duration
from secateur.errors import SelectionError, TrainingError


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1h30m", 5400)])
def test_times_are_read(text: str, seconds: float):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "30 m", "0s", "-5m", "5d", "1h30"])
def test_other_times_are_refused(text: str):
    with pytest.raises(TrainingError, match="`--time` must be a time such as 90s"):
        parse_duration(text)


def test_strategies_by_name():
    found = named_strategies(("auto", "pca"), trust_source=False)
    assert found["auto"] is None
    assert type(found["pca"]).__name__ == "PCASlimming"
    with pytest.raises(SelectionError, match="once; got pca"):
        named_strategies(("pca", "pca"), trust_source=False)


def test_all_that_is_wrong_is_said_at_once(run: Run, tmp_path: Path):
    found = run("compare", "--model", "no_such_net", "--data", "digits", "--budget", "macs=50%", "--budget", "half",
                "--strategy", "magic", "--time", "soon", "--out", tmp_path / "o")  # fmt: skip
    assert found.exit_code == 2
    for words in ("no_such_net", "half", "magic", "`--time` must be"):
        assert words in found.stderr


def test_json_lines(run: Run, tmp_path: Path, digits_weights: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(import_module("secateur.pipeline.compare"), "latency_on", lambda *_: ((), ()))
    found = run(
        "compare", "--model", "digits_resnet", "--weights", digits_weights, "--data", "digits", "--limit", 256,
        "--budget", "macs=60%", "--strategy", "uniform", "--seeds", 1, "--epochs", 0, "--calibration", 64,
        "--out", tmp_path / "o", "--threads", 1, "--json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [line["kind"] for line in lines] == ["run", "winner"]
    assert lines[1]["strategy"] == "uniform"
    assert found.stderr == ""

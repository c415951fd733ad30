"""What a long command says: one line, or lines of JSON."""

import json
from pathlib import Path

import pytest
from command_line import Run, compress_words


@pytest.mark.long
def test_quiet_is_one_line(run: Run, digits_weights: Path, tmp_path: Path):
    words = (*compress_words(digits_weights, tmp_path / "o"), "--strategy", "uniform", "--divisor", 2, "--epochs", 1)
    found = run(*words, "--export", "", "--quiet", "--target", "torch")
    assert found.exit_code == 0, found.output
    (line,) = found.stdout.splitlines()
    assert line.startswith("digits_resnet: 50.")
    assert "% accuracy instead of" in line
    assert line.endswith("report.html")


@pytest.mark.long
def test_json_is_lines_for_machines(run: Run, digits_weights: Path, tmp_path: Path):
    words = (*compress_words(digits_weights, tmp_path / "o"), "--strategy", "uniform", "--divisor", 2, "--epochs", 1)
    found = run(*words, "--limit", 256, "--export", "", "--json", "--target", "torch")
    assert found.exit_code == 0, found.output
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    kinds = [line["kind"] for line in lines]
    assert set(kinds) == {"step", "epoch", "result"}
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [0, 1]
    result = lines[-1]
    assert result["kind"] == "result"
    assert result["after"]["macs"] <= 0.5 * result["before"]["macs"]
    assert all(check["passed"] for check in result["checks"])

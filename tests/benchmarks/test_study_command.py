"""``python -m benchmarks.study`` on a few handwritten digits."""

import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from command_line import Result, outcome

from benchmarks.study.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def run(*words: object) -> Result:
    found = outcome(main, *words)
    if found.exception is not None:
        raise found.exception
    return found


def test_a_small_study_is_run_shown_and_gone_on_with(tmp_path: Path) -> None:
    words = (
        *("--study", "pruning-x-distillation", "--data", "digits", "--out", tmp_path / "study"),
        *("--family", "resnet", "--seeds", 1, "--weights-kept", "0.3", "--macs-kept", "", "--limit", 200),
        *("--teacher-epochs", 1, "--student-epochs", 1, "--recovery-images", 64, "--test-images", 50, "--threads", 1),
    )
    found = run(*words)
    assert found.exit_code == 0, found.output
    assert "What distillation adds to labels alone" in found.stdout
    assert "Wrote" in found.stdout
    rows = pq.read_table(tmp_path / "study" / "results.parquet").to_pylist()
    assert {(row["family"], row["pruned"], row["kept"]) for row in rows} == {("resnet", "weights", 0.3)}
    assert len(rows) == 7
    again = run(*words)
    assert again.exit_code == 0
    assert "Cell" not in again.stderr
    other = run(*words, "--recovery-epochs", 2)
    assert other.exit_code == 2
    assert "must be continued with the settings" in " ".join(other.stderr.split())


def test_unknown_words_are_refused(tmp_path: Path) -> None:
    words = ("--study", "pruning-x-distillation", "--data", "digits", "--out", tmp_path / "study")
    assert "argument --study: invalid choice: 'other'" in run(*words[:1], "other", *words[2:]).output
    found = run(*words, "--weights-kept", "half")
    assert found.exit_code == 2
    assert "`--weights-kept` must be numbers separated by commas" in " ".join(found.stderr.split())


def test_an_interrupted_study_names_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "study.json").write_text("{}")

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.study.__main__.load_data", stopped)
    found = run("--data", "digits", "--out", tmp_path)
    assert found.exit_code == 130
    assert f"The work so far is in {tmp_path}: " in found.stderr
    assert found.stderr.splitlines()[-1].startswith("python -m benchmarks.study ")


STUDY = (
    *("--study", "pruning-x-distillation", "--data", "digits", "--family", "resnet", "--seeds", "1"),
    *("--weights-kept", "0.3", "--macs-kept", "0.5", "--limit", "200", "--teacher-epochs", "1", "--precision", "32"),
    *("--student-epochs", "1", "--recovery-images", "64", "--test-images", "50", "--threads", "1"),
)


@pytest.mark.slow
def test_a_study_killed_by_the_system_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "benchmarks" / "study", *STUDY, "--out", str(tmp_path / "killed")]
    victim = subprocess.Popen(words)
    while len(list((tmp_path / "killed" / "cells").glob("*.json"))) < 3:
        assert victim.poll() is None, "it must still run"
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    assert not (tmp_path / "killed" / "results.parquet").exists(), "killed too late to show anything"
    tables: list[list[dict[str, object]]] = []
    for folder in ("killed", "whole"):
        found = run(*STUDY, "--out", tmp_path / folder)
        assert found.exit_code == 0, found.output
        rows = pq.read_table(tmp_path / folder / "results.parquet").to_pylist()
        tables.append([{name: value for name, value in row.items() if name != "cpu_s"} for row in rows])
    assert len(tables[0]) == 14
    assert tables[0] == tables[1]

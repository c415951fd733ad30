"""``secateur compare`` on a few handwritten digits."""

from pathlib import Path

import pyarrow.parquet as pq
from command_line import Run


def test_a_small_study_is_run_shown_and_gone_on_with(run: Run, tmp_path: Path) -> None:
    words = (
        *("compare", "--study", "pruning-x-distillation", "--data", "digits", "--out", tmp_path / "study"),
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


def test_unknown_words_are_refused(run: Run, tmp_path: Path) -> None:
    words = ("compare", "--study", "pruning-x-distillation", "--data", "digits", "--out", tmp_path / "study")
    assert "Invalid value for '--study'" in run(*words[:2], "other", *words[3:]).output
    found = run(*words, "--weights-kept", "half")
    assert found.exit_code == 2
    assert "`--weights-kept` must be numbers separated by commas" in " ".join(found.stderr.split())

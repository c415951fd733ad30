"""The table of epochs is read back by Python's csv module."""

import csv
import io
import math
import os
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from small_runs import LABELS_ONLY, Blobs, Fragile, Killed, fit_small, small_config, small_net
from tas_runs import Recorder

from secateur.errors import TrainingError
from secateur.train import CheckpointPolicy, CsvLog, Silent, TerminalProgress, Trained


def run(log: CsvLog, source: Blobs | None = None, epochs: int = 3, **more: Any) -> Trained:
    return fit_small(
        small_net(), source or Blobs(48), train=small_config(epochs), objective=LABELS_ONLY,
        validation=Blobs(16, seed=1), callbacks=log, **more,
    )  # fmt: skip


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def timeless(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows]


def test_every_epoch_is_a_row_with_all_its_numbers(tmp_path: Path) -> None:
    stream = io.StringIO()
    trained = run(CsvLog(tmp_path / "new" / "history.csv", TerminalProgress(stream)))
    rows = table(tmp_path / "new" / "history.csv")
    assert [(row["loop"], row["epoch"]) for row in rows] == [("train", str(epoch)) for epoch in range(4)]
    for row, record in zip(rows, trained.history, strict=True):
        assert float(row["validation_score"]) == record.validation_score
        assert float(row["validation_loss"]) == record.validation_loss
    for row, record in zip(rows[1:], trained.history[1:], strict=True):
        assert float(row["mean_loss"]) == record.train_loss
        assert float(row["mean_label"]) == record.parts["label"]
        assert float(row["last_learning_rate"]) == record.learning_rate
        assert float(row["seconds"]) == record.seconds
        assert float(row["images_per_s"]) == record.images_per_s
    assert rows[0]["mean_loss"] == ""
    assert len(stream.getvalue().splitlines()) == 4
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["history.csv"]


def test_steps_are_handed_on(tmp_path: Path) -> None:
    seen = Recorder()
    run(CsvLog(tmp_path / "history.csv", seen), epochs=1)
    assert seen.opened == [{"what": "train", "epochs": 1, "steps": 3, "done": 0}]
    assert seen.steps[-1][:2] == (1, 3)


@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (0, 2), (1, 0), (1, 2), (2, 1)])
def test_a_resumed_run_leaves_no_gap_and_no_double(tmp_path: Path, epoch: int, step: int) -> None:
    run(CsvLog(tmp_path / "whole.csv", Silent()))
    path, more = tmp_path / "history.csv", {"folder": tmp_path / "run", "checkpoints": CheckpointPolicy(math.inf, 2)}
    with pytest.raises(Killed):
        run(CsvLog(path, Silent()), Fragile(48, epoch, step), **more)
    assert [row["epoch"] for row in table(path)] == [str(number) for number in range(epoch + 1)]
    run(CsvLog(path, Silent()), **more)
    assert timeless(table(path)) == timeless(table(tmp_path / "whole.csv"))


def test_rows_that_no_checkpoint_knows_of_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between a row and its checkpoint."""
    run(CsvLog(tmp_path / "whole.csv", Silent()))
    path = tmp_path / "history.csv"
    with monkeypatch.context() as patch:

        def killed(folder: Path, saved: Any) -> None:
            if saved.epoch == 1:
                raise Killed

        patch.setattr(import_module("secateur.train.checkpoint"), "save_checkpoint", killed)
        with pytest.raises(Killed):
            run(CsvLog(path, Silent()), folder=tmp_path / "run")
    assert [row["epoch"] for row in table(path)] == ["0", "1"]
    run(CsvLog(path, Silent()), folder=tmp_path / "run")
    assert timeless(table(path)) == timeless(table(tmp_path / "whole.csv"))


def test_loops_share_a_table_and_one_begun_anew_replaces_its_own_rows(tmp_path: Path) -> None:
    log = CsvLog(tmp_path / "history.csv", Silent())
    for what, numbers in (("search", {"entropy": 0.5}), ("train", {"mean_loss": 2.0}), ("train", {"mean_loss": 1.0})):
        with log.start(what, epochs=1, steps=1, done=0) as meter:
            meter.epoch(1, numbers, "")
    assert table(tmp_path / "history.csv") == [
        {"loop": "search", "epoch": "1", "entropy": "0.5", "mean_loss": ""},
        {"loop": "train", "epoch": "1", "entropy": "", "mean_loss": "1.0"},
    ]


@pytest.mark.parametrize("content", [b"mine\n", b"a,b\n1,2\n", b"loop,epoch\ntrain,first\n", b"\xff\xfe\x00"])
def test_another_file_is_not_overwritten(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "history.csv"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=r"history\.csv must be a table of epochs"):
        run(CsvLog(path, Silent()))
    assert path.read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "history.csv")
    with pytest.raises(TrainingError, match=r"got something else \(it is a pipe, a device or a folder\)"):
        run(CsvLog(tmp_path / "history.csv", Silent()))


def test_a_file_that_cannot_be_written_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"history\.csv must be a"):
        run(CsvLog(tmp_path / "file" / "history.csv", Silent()))

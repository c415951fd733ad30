import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LABELS_ONLY, Blobs, Fragile, Killed, fit_small, same, small_config, small_net, state
from torch import nn

from secateur.distill import AlignedFeatures, Objective, Tap
from secateur.errors import TrainingError
from secateur.train import SGD, AdamW, Silent, Trained


def run(source: Blobs, student: nn.Module | None = None, **settings: Any) -> Trained:
    defaults: dict[str, Any] = {"train": small_config(3), "objective": LABELS_ONLY, "callbacks": Silent()}
    return fit_small(student or small_net(dropout=0.3), source, **(defaults | settings))


FEATURES: dict[str, Any] = {
    "teacher": small_net(5),
    "objective": Objective(feature_weight=1.0),
    "alignment": AlignedFeatures((Tap("1", 1, 8, tuple(range(8))),)),
}


@pytest.mark.parametrize(
    ("settings", "killed_in"),
    [
        ({"train": small_config(3, learning_rate=0.2), "validation": Blobs(32, seed=1)}, 1),
        ({"train": small_config(3, optimizer=AdamW(), learning_rate=0.01)}, 2),
        ({"train": small_config(3, ema_decay=0.9), "validation": Blobs(32, seed=1)}, 1),
        ({"train": small_config(3, optimizer=SGD(momentum=0.0, nesterov=False)), **FEATURES}, 1),
        # The best epoch is an early one, which the checkpoint has to keep.
        ({"train": small_config(3, learning_rate=4.0, warmup_fraction=1.0), "validation": Blobs(32, seed=1)}, 2),
        ({"train": small_config(3)}, 0),
    ],
)
def test_a_killed_run_continued_is_bit_identical(tmp_path: Path, settings: dict[str, Any], killed_in: int) -> None:
    whole = run(Blobs(48), **settings)
    with pytest.raises(Killed):
        run(Fragile(48, epoch=killed_in), folder=tmp_path / "run", **settings)
    torch.manual_seed(99)
    source = Blobs(48)
    resumed = run(source, folder=tmp_path / "run", **settings)
    assert [call["epoch"] for call in source.calls] == list(range(killed_in, 3))
    assert same(state(resumed.model), state(whole.model))
    assert (resumed.best_epoch, resumed.best_score) == (whole.best_epoch, whole.best_score)
    times = {"seconds": 0.0, "images_per_s": None}
    assert [r.to_json() | times for r in resumed.history] == [r.to_json() | times for r in whole.history]


def test_a_finished_run_is_returned_without_training(tmp_path: Path) -> None:
    first = run(Blobs(48), folder=tmp_path, validation=Blobs(16))
    source, validation = Blobs(48), Blobs(16)
    again = run(source, folder=tmp_path, validation=validation)
    assert (source.calls, validation.calls) == ([], [])
    assert same(state(again.model), state(first.model))
    assert again.history == first.history


def test_the_folder_holds_two_complete_checkpoints_without_pickle(tmp_path: Path) -> None:
    (tmp_path / ".epoch-000001.0123abcd.part").mkdir()  # left by a killed run
    (tmp_path / "notes.txt").write_text("mine")
    run(Blobs(48), folder=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch-000002", "epoch-000003", "notes.txt"]
    assert sorted(p.name for p in (tmp_path / "epoch-000003").iterdir()) == ["state.json", "tensors.safetensors"]
    recorded = json.loads((tmp_path / "epoch-000003" / "state.json").read_text())
    assert recorded["epoch"] == 3
    assert [record["epoch"] for record in recorded["numbers"]["history"]] == [1, 2, 3]


def test_a_run_killed_while_it_writes_goes_on_from_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(Blobs(48))
    rename = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if target.name == "epoch-000002":
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # A killed process cleans up nothing.
        with pytest.raises(Killed):
            run(Blobs(48), folder=tmp_path)
    assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-000001"]
    assert len(list(tmp_path.glob(".epoch-*.part"))) == 1
    source = Blobs(48)
    resumed = run(source, folder=tmp_path)
    assert [call["epoch"] for call in source.calls] == [1, 2]
    assert same(state(resumed.model), state(whole.model))
    assert not list(tmp_path.glob(".epoch-*.part"))


def test_a_full_disk_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(
        TrainingError, match=r"`checkpoint` must be a folder that can be written; .*No space left.*is resumed"
    ):
        run(Blobs(16), folder=tmp_path)
    assert not list(tmp_path.iterdir())  # half of a checkpoint would take the room of the next


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    whole = run(Blobs(48), folder=tmp_path)
    truncate(tmp_path / "epoch-000003" / "tensors.safetensors")
    source = Blobs(48)
    with pytest.warns(UserWarning, match=r"going on from .*epoch-000002, because later ones are damaged: epoch-000003"):
        resumed = run(source, folder=tmp_path)
    assert [call["epoch"] for call in source.calls] == [2]
    assert same(state(resumed.model), state(whole.model))
    # The damaged one has been replaced by a good one.
    assert same(state(run(Blobs(48), folder=tmp_path).model), state(whole.model))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: truncate(folder / "tensors.safetensors"), "does not have the recorded SHA-256"),
        (lambda folder: truncate(folder / "state.json"), "epoch-000001: "),
        (lambda folder: (folder / "state.json").unlink(), "No such file"),
        (lambda folder: (folder / "state.json").write_text('{"schema": 2}'), "schema 2 was written by another version"),
        (lambda folder: (folder / "state.json").write_text('{"schema": 1}'), "sha256"),
        (lambda folder: (folder / "state.json").write_text("[]"), "epoch-000001: "),
    ],
)
def test_only_damaged_checkpoints_are_refused(tmp_path: Path, damage: Any, reason: str) -> None:
    schedule = small_config(1)
    run(Blobs(16), folder=tmp_path, train=schedule)
    damage(tmp_path / "epoch-000001")
    with pytest.raises(TrainingError, match=rf"must hold a readable checkpoint; got only damaged ones in .*{reason}"):
        run(Blobs(16), folder=tmp_path, train=schedule)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": small_config(3, learning_rate=0.5)}, r"train\.learning_rate was 0\.05, now 0\.5\. Use"),
        ({"train": small_config(4)}, r"train\.epochs was 3, now 4\. Use"),
        ({"train": small_config(3, optimizer=AdamW())}, r"train\.optimizer was SGD\(.*now AdamW\("),
        ({"objective": Objective.of_labels(label_smoothing=0.1)}, r"objective\.label_smoothing was 0\.0, now 0\.1"),
        ({"augment": 1.0}, r"augment was None, now 1\.0"),
        ({"validation": Blobs(8)}, r"validation was none, now 8 images"),
        ({"student": small_net(1)}, r"student was [0-9a-f]{64}, now [0-9a-f]{64}"),
        (FEATURES, r"alignment was none, now [0-9a-f]{64}"),
        ({"objective": Objective(label_weight=1.0, kd_weight=1.0), "teacher": small_net(1)}, r"teacher was none, now "),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run(Blobs(16), folder=tmp_path)
    with pytest.raises(TrainingError, match=rf"settings it was begun with; got others than in .*{message}"):
        run(Blobs(16), folder=tmp_path, **changes)


def test_another_source_is_refused(tmp_path: Path) -> None:
    run(Blobs(16), folder=tmp_path)
    with pytest.raises(TrainingError, match="source was 16 images, now 17 images"):
        run(Blobs(17), folder=tmp_path)


def test_a_file_is_no_checkpoint_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="`checkpoint` must be a folder; got the file"):
        run(Blobs(16), folder=tmp_path / "file")


def test_a_copied_folder_goes_on_elsewhere(tmp_path: Path) -> None:
    whole = run(Blobs(48), folder=tmp_path / "here")
    shutil.rmtree(tmp_path / "here" / "epoch-000003")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert same(state(run(Blobs(48), folder=tmp_path / "there").model), state(whole.model))


VICTIM = """
import sys, torch
from pathlib import Path
from small_runs import LABELS_ONLY, Blobs, fit_small, small_config, small_net
from secateur.train import Silent
torch.set_num_threads(1)
fit_small(small_net(dropout=0.3), Blobs(2000), train=small_config(40), objective=LABELS_ONLY, callbacks=Silent(),
    validation=Blobs(64, seed=1), folder=Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_process_killed_by_the_system_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"train": small_config(40), "validation": Blobs(64, seed=1)}
    tests = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, str(tmp_path)], env=os.environ | {"PYTHONPATH": tests})
    while not list(tmp_path.glob("epoch-*3")):
        assert victim.poll() is None, "it must still run"
        time.sleep(0.01)
    victim.kill()
    victim.wait()
    assert not (tmp_path / "epoch-000040").exists(), "killed too late to show anything"
    resumed = run(Blobs(2000), folder=tmp_path, **settings)
    assert same(state(resumed.model), state(run(Blobs(2000), **settings).model))

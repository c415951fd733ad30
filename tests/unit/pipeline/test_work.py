"""The folder of an unfinished run: there from the first moment, gone when nobody needs it."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pytest
import torch

from secateur.errors import ArtifactError
from secateur.pipeline import OnExisting
from secateur.pipeline.workspace import CutState, environment_of, open_run_directory

SETTINGS = {"budget": "macs<=50%", "seed": "0"}


def cutting() -> CutState:
    return CutState(
        search={"strategy": "Uniform()"},
        frozen=(("conv1", "reaches the output"),),
        kept_blocks=(("layer1", "is shared"),),
        architecture={"kept": {"conv2": [0, 2]}, "removed_blocks": []},
        verification={"max_abs": 0.0},
        repairs=({"repair": "Refit()"},),
        student={"weight": torch.arange(6.0).reshape(2, 3).t()},  # not contiguous
        widths_follow=False,
    )


def interrupted(out: Path, *, with_search: bool = False, with_cut: bool = False) -> Path:
    with contextlib.suppress(KeyboardInterrupt), open_run_directory(out, SETTINGS, OnExisting.RESUME) as work:
        if with_search:
            work.search_checkpoint(0).mkdir()
            (work.search_checkpoint(0) / "state.json").write_text("{}")
        if with_cut:
            work.write(cutting())
        raise KeyboardInterrupt
    return out.with_name(f"{out.name}.work")


def test_it_is_ours_from_the_first_moment_and_gone_at_the_end(tmp_path: Path):
    with open_run_directory(tmp_path / "out", SETTINGS, OnExisting.ERROR) as work:
        assert json.loads((tmp_path / "out.work" / "settings.json").read_text()) == SETTINGS
        assert work.read() is None
        assert not work.search_checkpoint(0).exists()
        assert work.search_checkpoint(0) != work.search_checkpoint(1)
    assert list(tmp_path.iterdir()) == []


def test_what_is_worth_something_stays(tmp_path: Path):
    assert not interrupted(tmp_path / "out").exists()
    assert interrupted(tmp_path / "out", with_search=True).is_dir()
    assert interrupted(tmp_path / "out").is_dir()  # resumed, and interrupted again before anything new
    assert interrupted(tmp_path / "other", with_cut=True).is_dir()


def test_what_was_written_is_read_again(tmp_path: Path):
    interrupted(tmp_path / "out", with_cut=True)
    with open_run_directory(tmp_path / "out", SETTINGS, OnExisting.RESUME) as work:
        read = work.read()
    wanted = cutting()
    assert read is not None
    assert torch.equal(read.student["weight"], wanted.student["weight"])
    for name in ("search", "frozen", "kept_blocks", "architecture", "verification", "repairs", "widths_follow"):
        assert getattr(read, name) == getattr(wanted, name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", b"{"),
        ("run.json", b"{}"),
        ("run.json", b"[1]"),
        ("student.safetensors", b"not tensors"),
        ("settings.json", b"{"),
        ("settings.json", b"7"),
        ("settings.json", b"[" * 100_000),
        ("run.json", b"[" * 100_000),
    ],
)
def test_damage_is_said(tmp_path: Path, name: str, content: bytes):
    folder = interrupted(tmp_path / "out", with_cut=True)
    (folder / name).write_bytes(content)
    with (
        pytest.raises(ArtifactError, match=r"unfinished run in .*out\.work is damaged \(.*Begin again with --restart"),
        open_run_directory(tmp_path / "out", SETTINGS, OnExisting.RESUME) as work,
    ):
        work.read()
    assert folder.is_dir()
    with open_run_directory(tmp_path / "out", SETTINGS, OnExisting.OVERWRITE) as work:
        assert work.read() is None


def test_other_settings_are_refused_and_nothing_is_touched(tmp_path: Path):
    folder = interrupted(tmp_path / "out", with_search=True)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for settings, said in (
        ({**SETTINGS, "seed": "1"}, "seed was 0, now 1 "),
        ({"seed": "0"}, "budget was macs<=50%, now absent"),
        ({**SETTINGS, "heads": "head"}, "heads was absent, now head"),
    ):
        with (
            pytest.raises(ArtifactError, match=f"must have the settings it was begun with; {said}"),
            open_run_directory(tmp_path / "out", settings, OnExisting.RESUME),
        ):
            pass
    with (
        pytest.raises(
            ArtifactError, match=r"no unfinished run beside it; got .*out\.work\. Go on with it \(--resume\)"
        ),
        open_run_directory(tmp_path / "out", SETTINGS, OnExisting.ERROR),
    ):
        pass
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("on_existing", list(OnExisting))
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, on_existing: OnExisting):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "run.json").write_text("mine")
    with (
        pytest.raises(ArtifactError, match=r"must be the work of an interrupted run, or not be there.*Move it away"),
        open_run_directory(tmp_path / "out", SETTINGS, on_existing),
    ):
        pass
    assert (tmp_path / "out.work" / "run.json").read_text() == "mine"


def test_a_full_disk_takes_neither_the_search_nor_leaves_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path) -> None:
        if "run" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    def write() -> None:
        with open_run_directory(tmp_path / "out", SETTINGS, OnExisting.RESUME) as work, monkeypatch.context() as patch:
            patch.setattr(import_module("secateur._files"), "_flush", full)
            work.write(cutting())

    interrupted(tmp_path / "out", with_search=True)
    with pytest.raises(ArtifactError, match=r"could not be written: No space left on device.*--resume"):
        write()
    names = sorted(path.name for path in (tmp_path / "out.work").iterdir())
    assert names == ["lock", "search-0", "settings.json", "surroundings.json"]
    with open_run_directory(tmp_path / "out", SETTINGS, OnExisting.RESUME) as work:
        assert work.read() is None
        assert (work.search_checkpoint(0) / "state.json").is_file()


def test_no_part_of_a_finished_run_is_ever_left_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A process killed while it removes its work: what is left is hidden, and gone when the next run begins."""
    monkeypatch.setattr(import_module("secateur._files").shutil, "rmtree", lambda *_, **__: None)
    with open_run_directory(tmp_path / "out", SETTINGS, OnExisting.ERROR) as work:
        work.write(cutting())
    assert not (tmp_path / "out.work").exists()
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    with open_run_directory(tmp_path / "out", SETTINGS, OnExisting.ERROR) as work:
        assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
        assert work.read() is None


def test_drafts_of_killed_runs_are_removed_and_nothing_else(tmp_path: Path):
    mine = (".out.01234567.part", ".out.work.89abcdef.part", ".out.work.89abcdef.old")
    others = ("out", ".out.01234567.old", ".out2.01234567.part", ".out.part", "out.01234567.part")
    for name in (*mine, *others):
        (tmp_path / name).mkdir()
    with open_run_directory(tmp_path / "out", SETTINGS, OnExisting.ERROR):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted((*others, "out.work"))


OTHER_PROCESS = """
import sys
from pathlib import Path
from secateur.pipeline.workspace import OnExisting, open_run_directory
with open_run_directory(Path(sys.argv[1]), {"budget": "macs<=50%", "seed": "0"}, OnExisting.RESUME):
    print("in", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="locks of fcntl are POSIX")
def test_two_processes_are_not_at_one_run(tmp_path: Path):
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        for on_existing in (OnExisting.RESUME, OnExisting.OVERWRITE):
            with (
                pytest.raises(ArtifactError, match=r"one process at a time; another process is working in"),
                open_run_directory(tmp_path / "out", SETTINGS, on_existing),
            ):
                pass
        assert (tmp_path / "out.work" / "settings.json").is_file()
    finally:
        other.kill()
        other.communicate()
    with open_run_directory(tmp_path / "out", SETTINGS, OnExisting.RESUME):
        pass


def test_another_environment_is_warned_of(tmp_path: Path):
    here = {"threads": "2", "torch": "2.15"}

    def interrupted_again(now: dict[str, str]) -> None:
        with (
            contextlib.suppress(KeyboardInterrupt),
            open_run_directory(tmp_path / "out", SETTINGS, OnExisting.RESUME, now) as work,
        ):
            work.search_checkpoint(0).mkdir(exist_ok=True)
            (work.search_checkpoint(0) / "state.json").write_text("{}")
            raise KeyboardInterrupt

    interrupted_again(here)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interrupted_again(here)
    with pytest.warns(UserWarning, match=r"different hardware or versions: threads was 2, now 1\. Its result"):
        interrupted_again(here | {"threads": "1"})


def test_the_environment_is_what_the_last_bits_depend_on():
    found = environment_of(torch.device("cpu"))
    assert found["threads"] == str(torch.get_num_threads())
    assert (found["device"], found["torch"]) == ("cpu", torch.__version__)
    assert found["processor"]

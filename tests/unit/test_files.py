"""Folders that are replaced as a whole, what is carried over, and who may work in one."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur import _files
from secateur._files import LOCK, atomic_folder, clean_stale, locked, temporary_folder
from secateur.errors import ArtifactError

OWN = ("model", "report.html")


def own(_older: Path) -> tuple[str, ...]:
    return OWN


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "exchange":
        monkeypatch.setattr(_files, "_exchange", lambda *_: False)


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.usefixtures("way")
def test_what_is_not_ours_is_carried_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model").write_text("old")
    (out / "report.html").write_text("old")
    with atomic_folder(out, replaceable=own) as draft:
        (draft / "model").write_text("new")
        (out / "logs").mkdir()
        (out / "logs" / "events").write_text("mine")
        (out / ".hidden").write_text("mine")
        (out / "link").symlink_to(tmp_path / "nowhere")
    assert content(out) == {"model": "new", "logs/events": "mine", ".hidden": "mine"}
    assert (out / "link").is_symlink()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("way")
def test_a_folder_that_appears_meanwhile_is_not_an_older_artifact(tmp_path: Path) -> None:
    """What has the name of one of our files, and is not ours, keeps its content under another name."""
    out = tmp_path / "out"
    with atomic_folder(out, replaceable=lambda _: ()) as draft:
        (draft / "model").write_text("new")
        out.mkdir()
        (out / "model").write_text("mine")
        (out / "notes.txt").write_text("mine")
    found = content(out)
    assert (found.pop("model"), found.pop("notes.txt")) == ("new", "mine")
    assert list(found.values()) == ["mine"]
    assert next(iter(found)).startswith("model.kept-")


@pytest.mark.usefixtures("way")
def test_a_folder_with_the_name_of_one_of_our_files_is_the_user_s(tmp_path: Path) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "x").write_text("mine")
    with atomic_folder(tmp_path / "out", replaceable=own) as draft:
        (draft / "model").write_text("new")
    assert sorted(content(tmp_path / "out").values()) == ["mine", "new"]


@given(st.sets(st.sampled_from([*OWN, "a", "b.txt", ".c"])), st.sets(st.sampled_from([*OWN, "a", "b.txt"]), min_size=1))
def test_nothing_foreign_is_ever_lost(tmp_path_factory: pytest.TempPathFactory, before: set[str], after: set[str]):
    out = tmp_path_factory.mktemp("x") / "out"
    out.mkdir()
    for name in before:
        (out / name).write_text(f"old {name}")
    with atomic_folder(out, replaceable=own) as draft:
        for name in after:
            (draft / name).write_text(f"new {name}")
    found = content(out)
    assert all(found[name] == f"new {name}" for name in after)
    assert {f"old {name}" for name in before - {*OWN}} <= set(found.values())
    assert not {f"old {name}" for name in OWN} & set(found.values())
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("what", ["file", "link"])
def test_a_file_that_appears_in_the_place_of_the_folder_stays(tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(FileExistsError), atomic_folder(out, replaceable=own) as draft:  # noqa: PT012
        (draft / "model").write_text("new")
        out.write_text("mine") if what == "file" else out.symlink_to(tmp_path)
    assert out.is_symlink() if what == "link" else out.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_process_had_not_carried_over_yet_is_rescued(tmp_path: Path) -> None:
    out, draft = tmp_path / "out", tmp_path / ".out.0123abcd.part"
    for folder in (out, draft):
        folder.mkdir()
        (folder / "model").write_text(folder.name)
    (draft / ".model.0123abcd.part.onnx").write_text("a temporary file")
    (draft / "logs").mkdir()
    (draft / "logs" / "events").write_text("mine")
    clean_stale(out, tmp_path / "out.work", own=OWN)
    assert content(out) == {"model": "out", "logs/events": "mine"}
    assert not draft.exists()


def test_without_the_folder_itself_nothing_foreign_is_removed(tmp_path: Path) -> None:
    draft = tmp_path / ".out.0123abcd.part"
    draft.mkdir()
    (draft / "notes.txt").write_text("mine")
    clean_stale(tmp_path / "out", tmp_path / "out.work", own=OWN)
    assert (draft / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_what_must_be_new_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="used by one process at a time"):  # noqa: SIM117, PT012
        with atomic_folder(tmp_path / "out", must_be_new=True) as draft:
            (draft / "x").write_text("mine")
            with atomic_folder(tmp_path / "out", must_be_new=True) as other:
                (other / "x").write_text("first")
    assert content(tmp_path / "out") == {"x": "first"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_threads_of_one_process_are_kept_apart(tmp_path: Path) -> None:
    """Under any name of the folder; afterward it is free again."""
    (tmp_path / "link").symlink_to(tmp_path)
    found: list[str] = []

    def work() -> None:
        for name in (tmp_path, tmp_path / "link", tmp_path / "x" / ".."):
            try:
                with locked(name):
                    found.append("inside")
            except ArtifactError as error:
                found.append(str(error))

    (tmp_path / "x").mkdir()
    with locked(tmp_path):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(found) == 3
    assert all("another thread of this process is working in" in said for said in found)
    with locked(tmp_path):
        pass


@pytest.mark.skipif(os.name == "nt", reason="fcntl")
def test_a_thread_that_is_refused_does_not_release_the_lock(tmp_path: Path) -> None:
    """Locks of POSIX belong to the process and end when it closes the file, whoever opened it."""
    again = f"from secateur._files import locked; from pathlib import Path\nwith locked(Path({str(tmp_path)!r})): pass"
    with locked(tmp_path):
        with pytest.raises(ArtifactError), locked(tmp_path):
            pass
        found = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "used by one process at a time" in found.stderr


@pytest.mark.skipif(os.name == "nt", reason="open files cannot be removed")
def test_the_lock_of_a_folder_that_was_replaced_is_worth_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import fcntl

    def replaced(*_: object) -> None:
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).touch()

    monkeypatch.setattr(fcntl, "lockf", replaced)
    with pytest.raises(ArtifactError, match="used by one process at a time"), locked(tmp_path):
        pass


def test_no_place_for_temporary_files_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files.tempfile, "tempdir", str(tmp_path / "absent"))
    nowhere = r"A folder for temporary files must be found in TMPDIR.*Set TMPDIR"
    with pytest.raises(ArtifactError, match=nowhere), temporary_folder("a-"):
        pass
    monkeypatch.setattr(_files.tempfile, "tempdir", str(tmp_path))
    no_room = r"must have \d+\.\d MB free; got .* MB in .*Free some space there"
    with pytest.raises(ArtifactError, match=no_room), temporary_folder("a-", room=2**62):
        pass
    with temporary_folder("a-", room=1) as folder:
        (folder / "file").touch()
        assert folder.name.startswith("a-")
    assert list(tmp_path.iterdir()) == []

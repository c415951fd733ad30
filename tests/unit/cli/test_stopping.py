"""Signals during a long command: a checkpoint, 128 + the signal, and how to go on."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur._runtime import accept_stop_requests, stoppable
from secateur.cli.output import resumable, signal_handler
from secateur.errors import ExportError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
ALL = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if os.name != "nt" else []))


@pytest.fixture(autouse=True)
def _same_handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in ALL]
    yield
    assert [signal.getsignal(number) for number in ALL] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (1, 129)])
def test_outside_of_a_loop_a_signal_ends_the_command_at_once(number: int, code: int, tmp_path: Path) -> None:
    done: list[str] = []

    @resumable
    def command(*, out_folder: Path) -> None:
        os.kill(os.getpid(), number)
        done.append(str(out_folder))

    with pytest.raises(SystemExit) as ended:
        command(out_folder=tmp_path / "out")
    assert ended.value.code == code
    assert not done


@pytest.mark.parametrize("number", ALL)
def test_what_is_ignored_stays_ignored(number: int, tmp_path: Path) -> None:
    """As nohup and shells without job control want it."""
    before = signal.signal(number, signal.SIG_IGN)

    @resumable
    def command(*, out_folder: Path) -> str:
        os.kill(os.getpid(), number)
        return out_folder.name

    try:
        assert command(out_folder=tmp_path / "out") == "out"
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_library_that_makes_an_error_of_the_signal_is_seen_through(tmp_path: Path) -> None:
    """As torch's ONNX exporter does, whose error becomes ours."""

    @resumable
    def command(*, out_folder: Path) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ExportError("`model` must hold only operations that ONNX has.") from error

    with pytest.raises(SystemExit) as ended:
        command(out_folder=tmp_path / "out")
    assert ended.value.code == 143


def test_in_a_loop_it_asks_and_the_loop_ends_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []

    @resumable
    def command(*, out_folder: Path) -> None:
        with accept_stop_requests() as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.asked
            done.append("the step")
            assert [signal.getsignal(number) for number in ALL] == [
                signal.SIG_DFL
            ] * 3  # the second one is the system's
            (out_folder.parent / "out.work").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        command(out_folder=tmp_path / "out")
    assert ended.value.code == 143
    assert done == ["the step"]
    said = capfd.readouterr().err
    assert "Stopping: a checkpoint is written after this step." in said
    assert f"The work so far is in {tmp_path / 'out.work'}: continue with the same command and --resume:" in said


def test_it_says_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/secateur", "compress", "--restart", "--out", "a folder"])
    (tmp_path / "out.work").mkdir()

    @resumable
    def command(*, out_folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        command(out_folder=tmp_path / "out")
    assert ended.value.code == 130  # whoever raised it
    assert capfd.readouterr().err.splitlines()[-1] == "secateur compress --out 'a folder' --resume"


def test_without_work_nothing_is_promised(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    @resumable
    def command(*, out_folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        command(out_folder=tmp_path / "out")
    assert capfd.readouterr().err == "Interrupted. Nothing was written.\n"


@pytest.mark.parametrize("kind", [ValueError, ExportError])
def test_results_and_errors_come_through(kind: type[Exception]) -> None:
    @resumable
    def command(*, out_folder: Path) -> str:
        if out_folder.name == "bad":
            raise kind("mine")
        return "done"

    assert command(out_folder=Path("good")) == "done"
    with pytest.raises(kind, match="mine"):
        command(out_folder=Path("bad"))


def test_other_threads_change_nothing() -> None:
    seen: list[object] = []

    def elsewhere() -> None:
        with signal_handler() as caught:
            seen.append([signal.getsignal(number) for number in ALL])
            seen.append(caught.exit_code)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [[signal.getsignal(number) for number in ALL], 130]


def test_a_request_from_outside_is_not_taken_over() -> None:
    with stoppable() as outer:
        with signal_handler(), accept_stop_requests() as inner:
            pass
        with accept_stop_requests() as again:
            assert again is outer
    assert inner is not outer


FORKS = """
import os, signal, sys, time
from secateur.cli.output import signal_handler
with signal_handler():
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGINT)
        print("still here", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        print("never", flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_forked_worker_leaves_ctrl_c_to_its_parent_and_obeys_its_end() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines() == ["still here", "-15"]


DEAF = """
import os, signal, sys, time
from secateur._runtime import accept_stop_requests
from secateur.cli.output import signal_handler
with signal_handler(), accept_stop_requests():
    os.kill(os.getpid(), signal.SIGTERM)
    print("asked", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never", flush=True)
"""


def test_the_second_signal_ends_a_loop_that_does_not_listen() -> None:
    done = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "asked\n"

"""The same tasks in this process and on Ray, with workers that are killed and tasks that raise."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from worker_tasks import by_kind, picky, scaled, where

from secateur.errors import WorkerError
from secateur.workers import InProcess, OnRay, Pool

# Not importorskip: to import Ray would change this process.
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def test_in_process_computes_in_order_and_in_this_process():
    with InProcess().running(scaled, torch.arange(3.0)) as pool:
        found = list(pool.map(iter(range(4))))
        assert pool.size == 1
    assert [index for index, _ in found] == [0, 1, 2, 3]
    assert all(torch.equal(result, torch.arange(3.0) * index) for index, result in found)
    with InProcess().running(where, None) as pool:
        assert next(pool.map([0.0]))[1][0] == os.getpid()


def test_in_process_raises_what_a_task_raises_after_the_results_before_it():
    with InProcess().running(picky, None) as pool:
        results = pool.map(range(6))
        assert [next(results) for _ in range(3)] == [(0, 0), (1, 1), (2, 2)]
        with pytest.raises(KeyError, match="no 3 here"):
            next(results)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"address": "here"}, "`address` must be 'local', 'auto' or HOST:PORT; got 'here'"),
        ({"workers": 0}, "`workers` must be at least 1; got 0"),
        ({"threads_each": 0}, "`threads_each` must be at least 1; got 0"),
        ({"retries": -1}, "`retries` must be at least 0; got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(WorkerError, match=message):
        OnRay(**settings)


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ImportError, match=r"pip install 'secateur\[ray\]'"), OnRay().running(picky, None):
        pass


@needs_ray
class TestOnRay:
    """One start of Ray serves all of these, as it takes ten seconds: the task says which function is called."""

    @pytest.fixture(scope="class")
    def pool(self) -> Pool:
        with OnRay(workers=2, retries=1).running(by_kind, torch.arange(5.0)) as pool:
            assert _both_work(pool)
            yield pool

    def test_results_are_those_of_one_process(self, pool):
        tasks = [("scaled", factor) for factor in range(12)]
        with InProcess().running(by_kind, torch.arange(5.0)) as here:
            expected = dict(here.map(tasks))
        found = dict(pool.map(tasks))
        assert sorted(found) == list(range(12))
        assert all(torch.equal(found[index], expected[index]) for index in expected)

    def test_two_workers_of_one_thread_each(self, pool):
        assert _both_work(pool)
        found = [result for _, result in pool.map([("where", 0.2)] * 8)]
        assert pool.size == 2
        assert len({process for process, _, _ in found}) == 2
        assert os.getpid() not in {process for process, _, _ in found}
        assert {(threads, variable) for _, threads, variable in found} == {(1, "1")}

    def test_results_come_as_soon_as_they_are_there(self, pool):
        assert _both_work(pool)
        order = [index for index, _ in pool.map([("where", 3.0), *[("where", 0.0)] * 5])]
        assert order[-1] == 0

    def test_what_a_task_raises_is_raised_here_and_the_pool_goes_on(self, pool):
        with pytest.raises(KeyError, match="no 3 here") as caught:
            list(pool.map(("picky", number) for number in range(8)))
        assert any("On a worker of Ray" in note and "picky" in note for note in caught.value.__notes__)
        assert sorted(pool.map([("picky", 5), ("picky", 7)])) == [(0, 5), (1, 7)]

    def test_leaving_early_abandons_the_rest(self, pool):
        taken = []
        for _index, _result in pool.map((taken.append(number), ("picky", 9))[1] for number in range(1000)):
            break
        assert len(taken) <= 2 * pool.size + 1
        assert sorted(pool.map([("picky", 5)])) == [(0, 5)]

    def test_an_error_that_cannot_be_packed_keeps_its_message(self, pool):
        with pytest.raises(RuntimeError, match="UnpackableError: of no use elsewhere"):
            list(pool.map([("unpackable", None)]))

    def test_workers_killed_while_they_compute_lose_nothing(self, pool, tmp_path):
        found = sorted(pool.map([("killed_once", (tmp_path, number)) for number in range(6)]))
        assert found == [(number, number**2) for number in range(6)]
        assert len(list(tmp_path.iterdir())) == 3

    def test_a_task_that_always_ends_its_worker_is_given_up(self, pool):
        with pytest.raises(WorkerError, match=r"A worker of Ray must .*; those of task 0 ended 2 times\..*--resume\.$"):
            list(pool.map([("killed_always", None)]))


@needs_ray
@pytest.mark.slow
def test_nothing_of_this_process_changes_and_nothing_is_left():
    """Environment, signals, threads and modules; no process, no file in the temporary folder or in the home."""
    before, folders = _state(), _left_behind()
    with OnRay(workers=1).running(picky, None) as pool:
        assert list(pool.map([1])) == [(0, 1)]
        during = _state()
        driver = _children()
        assert len(driver) == 1
    assert before == during == _state()
    assert "ray" not in sys.modules
    assert _gone(driver)
    assert _left_behind() == folders


@needs_ray
@pytest.mark.slow
def test_kill_9_of_the_caller_ends_ray(tmp_path):
    folders = _left_behind()
    program = (
        "import sys; from worker_tasks import where; from secateur.workers import OnRay\n"
        "with OnRay(workers=1).running(where, None) as pool:\n"
        "    for _, found in pool.map([0.0, 600.0]): print(found[0], flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    caller = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, cwd=tmp_path, start_new_session=True
    )
    worker = int(caller.stdout.readline())
    everyone = _descendants(caller.pid)
    assert worker in everyone
    caller.kill()
    caller.wait()
    caller.stdout.close()
    assert _gone(everyone)
    assert _left_behind() == folders


@needs_ray
@pytest.mark.slow
def test_kill_9_of_what_speaks_to_ray_is_an_error_and_leaves_nothing():
    with OnRay(workers=1).running(where, None) as pool:
        assert len(list(pool.map([0.0]))) == 1
        (driver,) = _children()
        everyone = {driver, *_descendants(driver)}
        os.kill(driver, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"Ray ended before the work was done\. .*--resume\.$"):
            list(pool.map([0.0] * 100))
    assert _gone(everyone)


@needs_ray
@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_an_error():
    with (
        pytest.raises(WorkerError, match=r"`address` must lead to a Ray that can be used; got '127.0.0.1:1'"),
        OnRay("127.0.0.1:1").running(picky, None),
    ):
        pass


def _both_work(pool: Pool, rounds: int = 100) -> bool:
    """Whether both workers have started: on a busy machine one may be seconds later than the other."""
    found = set()
    for _ in range(rounds):
        found = {result[0] for _, result in pool.map([("where", 0.2)] * 4)}
        if len(found) == 2:
            break
    return len(found) == 2


def _state() -> dict[str, object]:
    return {
        "environment": dict(os.environ),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "hooks": (sys.excepthook, threading.excepthook, sys.breakpointhook),
        "path": list(sys.path),
        "folder": Path.cwd(),
        "generator": torch.get_rng_state().tolist(),
    }


def _left_behind() -> set[Path]:
    return {*Path("/tmp").glob("ray*"), *Path.home().glob(".ray*")}


def _children() -> list[int]:
    return [child for child in _parents() if _parents().get(child) == os.getpid()]


def _descendants(process: int) -> set[int]:
    parents, found = _parents(), {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {process}


def _parents() -> dict[int, int]:
    """The parent of every process that is not a zombie."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found[int(status.parent.name)] = int(parent)
    return found


def _gone(processes: object, within_s: float = 60.0) -> bool:
    """Whether all of them end; a process that ended leaves no sign of when, so this looks again and again."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if not set(processes) & set(_parents()):
            return True
        time.sleep(0.2)
    return False

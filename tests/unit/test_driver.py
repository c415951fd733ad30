"""The program between the caller and Ray, piece by piece in this process, without Ray."""

import io
import queue
import sys

import cloudpickle
import numpy as np
import pytest
import torch
from worker_tasks import by_kind

from secateur import _ray_driver as _driver


def packed(function: object, shared: object) -> np.ndarray:
    return np.frombuffer(cloudpickle.dumps((function, shared)), dtype=np.uint8)


def test_messages_come_out_as_they_went_in_and_end_with_none():
    stream = io.BytesIO()
    messages = [("task", 3, b"x" * 100_000), ("forget",), ({"a": [1, None]}, b"")]
    for message in messages:
        _driver.write(stream, message)
    cut = io.BytesIO(stream.getvalue()[:-1])
    stream.seek(0)
    assert [_driver.read(stream) for _ in messages] == messages
    assert _driver.read(stream) is None
    assert [_driver.read(cut) for _ in messages] == [*messages[:2], None]


def test_an_actor_computes_and_packs_what_is_raised():
    actor = _driver.Actor(packed(by_kind, torch.arange(3.0)), torch.get_num_threads(), [sys.path[0]])
    kind, result = actor.run(cloudpickle.dumps(("scaled", 2)))
    assert kind == "result"
    assert torch.equal(cloudpickle.loads(result), torch.tensor([0.0, 2.0, 4.0]))
    kind, error = actor.run(cloudpickle.dumps(("picky", 3)))
    assert kind == "raised"
    assert isinstance(cloudpickle.loads(error), KeyError)
    assert "On a worker of Ray" in cloudpickle.loads(error).__notes__[0]
    kind, error = actor.run(cloudpickle.dumps(("unpackable", None)))
    assert str(cloudpickle.loads(error)) == "UnpackableError: of no use elsewhere"


def test_what_cannot_be_unpacked_is_an_error_of_the_task():
    kind, error = _driver.Actor(np.zeros(3, np.uint8), torch.get_num_threads(), []).run(cloudpickle.dumps(1))
    assert kind == "raised"
    assert isinstance(cloudpickle.loads(error), Exception)


class Doubling:
    """A cluster that computes at once, one task in a step."""

    def __init__(self) -> None:
        self.tasks: list[tuple[int, bytes]] = []

    @property
    def busy(self) -> bool:
        return bool(self.tasks)

    def submit(self, number: int, task: bytes) -> None:
        self.tasks.append((number, task))

    def forget(self) -> None:
        self.tasks.clear()

    def step(self) -> list[tuple[object, ...]]:
        number, task = self.tasks.pop(0)
        return [("result", number, task * 2)]


@pytest.mark.parametrize(("forgets", "expected"), [(False, [0, 1]), (True, [])])
def test_the_driver_answers_until_the_caller_closes(forgets, expected):
    inbox, out, cluster = queue.SimpleQueue(), io.BytesIO(), Doubling()
    cluster.submit(0, b"a")
    cluster.submit(1, b"b")
    if forgets:
        inbox.put(("forget",))
    else:
        real = cluster.step
        cluster.step = lambda: (inbox.put(None) if len(cluster.tasks) == 1 else None, real())[1]
    if forgets:
        inbox.put(None)
    _driver.serve(cluster, inbox, out)
    out.seek(0)
    answers = [answer[1] for answer in iter(lambda: _driver.read(out), None)]
    assert answers == expected


def test_what_the_caller_writes_is_listened_to():
    stream, inbox = io.BytesIO(), queue.SimpleQueue()
    _driver.write(stream, ("task", 0, b"a"))
    stream.seek(0)
    _driver._listen(stream, inbox)
    assert [inbox.get(), inbox.get()] == [("task", 0, b"a"), None]


def test_an_address_where_nobody_listens():
    with pytest.raises(OSError, match="refused"):
        _driver._check_answers("127.0.0.1:1")
    _driver._check_answers("local")


def test_cores_of_this_process():
    assert _driver._cores() >= 1

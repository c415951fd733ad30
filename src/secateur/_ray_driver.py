"""The process between the caller and Ray: `OnRay` runs this file, so that Ray changes nothing in the caller's process.

It passes pickled tasks to Ray actors and pickled results back, and unpickles neither. Only the standard library is
imported at the top, because the caller imports this module too, for the messages.
"""

import contextlib
import os
import pickle
import queue
import shutil
import socket
import struct
import sys
import threading
import traceback
from collections import deque
from typing import Any, BinaryIO

_PATIENCE = 300
"""Seconds in which Ray must have started. It takes ten if a core is free, and minutes if none is."""


def write(stream: BinaryIO, message: tuple[object, ...]) -> None:
    """Write one message, preceded by its length."""
    packed = pickle.dumps(message, protocol=5)
    stream.write(struct.pack("<Q", len(packed)))
    stream.write(packed)
    stream.flush()


def read(stream: BinaryIO) -> tuple[Any, ...] | None:
    """Read the next message; None if the other side has closed."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    (length,) = struct.unpack("<Q", head)
    packed = stream.read(length)
    return pickle.loads(packed) if len(packed) == length else None


class Actor:
    """A Ray actor that holds the function and the shared data, unpickled with the first task."""

    def __init__(self, packed: Any, threads: int, paths: list[str]):
        self._packed, self._threads, self._paths = packed, threads, paths
        self._held: Any = None

    def run(self, task: bytes) -> tuple[str, bytes]:
        """Compute a task: return ("result", its result) or ("raised", the exception), pickled."""
        import cloudpickle  # Both sides need the same version: the caller pickles with it.

        try:
            if self._held is None:
                self._held = self._unpacked()
            function, shared = self._held
            return "result", cloudpickle.dumps(function(shared, cloudpickle.loads(task)))
        except Exception as error:
            error.add_note("On a worker of Ray:\n" + "".join(traceback.format_exception(error)))
            return "raised", _packed_error(error)

    def _unpacked(self) -> Any:
        import cloudpickle
        import torch

        sys.path.extend(path for path in self._paths if path not in sys.path)
        torch.set_num_threads(self._threads)
        return cloudpickle.loads(memoryview(self._packed))


def _packed_error(error: Exception) -> bytes:
    import cloudpickle

    try:
        packed = cloudpickle.dumps(error)
        cloudpickle.loads(packed)
    except Exception:
        return cloudpickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
    return packed


class Cluster:  # pragma: no cover -- in a process of its own, as the tests of `OnRay` run it
    """A connection to Ray and the actors of one pool.

    Args:
        settings: address ("local", "auto" or HOST:PORT), folder (for the files of a local Ray), workers (None means as
            many as there are cores for), threads_each (threads of each worker, and CPUs that Ray reserves for it),
            retries (how often a task is computed again after its worker ended), paths (the caller's module path).
        packed: The pickled function and shared data.
    """

    def __init__(self, settings: dict[str, Any], packed: bytes):
        import numpy as np
        import ray
        from ray.exceptions import RayError

        local = settings["address"] == "local"
        threads = settings["threads_each"]
        wanted = settings["workers"] or (max(_cores() // threads, 1) if local else None)
        options: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
        if local:
            options |= {"num_cpus": wanted * threads, "include_dashboard": False, "_temp_dir": settings["folder"]}
        self.ray, self._errors = ray, RayError
        ray.init(address=settings["address"], **options)
        cpus = int(ray.cluster_resources().get("CPU", 0))
        self.size = wanted or max(cpus // threads, 1)
        if self.size * threads > cpus:
            raise RuntimeError(
                f"`workers` must find enough CPUs in the cluster; {self.size} of {threads} threads each are asked for, "
                f"and it has {cpus}."
            )
        self._retries = settings["retries"]
        # Every worker of a machine reads the bytes of an array in place, without a copy.
        shared = ray.put(np.frombuffer(packed, dtype=np.uint8))
        actor: Any = ray.remote(num_cpus=threads, max_restarts=0, max_task_retries=0)(Actor)
        self._start = lambda: actor.remote(shared, threads, settings["paths"])
        self._idle = [self._start() for _ in range(self.size)]
        self._pending: deque[tuple[int, bytes]] = deque()
        self._running: dict[Any, tuple[Any, int, bytes]] = {}
        self._deaths: dict[int, int] = {}

    def submit(self, number: int, task: bytes) -> None:
        """Add a task to the queue."""
        self._pending.append((number, task))

    def forget(self) -> None:
        """Drop the tasks that no worker has started."""
        self._pending.clear()

    @property
    def busy(self) -> bool:
        """Whether any task is not finished."""
        return bool(self._pending or self._running)

    def step(self) -> list[tuple[object, ...]]:
        """Give tasks to idle workers, wait for a moment, and return the messages of finished tasks."""
        while self._pending and self._idle:
            actor = self._idle.pop()
            number, task = self._pending.popleft()
            self._running[actor.run.remote(task)] = (actor, number, task)
        done, _ = self.ray.wait(list(self._running), num_returns=1, timeout=0.05)
        return [message for each in done for message in self._finished(each)]

    def _finished(self, reference: Any) -> list[tuple[object, ...]]:
        actor, number, task = self._running.pop(reference)
        try:
            kind, packed = self.ray.get(reference)
        except self._errors as error:
            self._idle.append(self._start())
            self._deaths[number] = self._deaths.get(number, 0) + 1
            if self._deaths[number] > self._retries:
                return [("lost", number, self._deaths[number], str(error))]
            self._pending.appendleft((number, task))
            return []
        self._idle.append(actor)
        return [(kind, number, packed)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve(cluster: Cluster, inbox: "queue.SimpleQueue[tuple[Any, ...] | None]", out: BinaryIO) -> None:
    """Answer messages until the caller closes."""
    while True:
        try:
            message = inbox.get(block=not cluster.busy)
        except queue.Empty:
            message = ()
        if message is None:
            return
        if message and message[0] == "task":
            cluster.submit(message[1], message[2])
        elif message and message[0] == "forget":
            cluster.forget()
        elif cluster.busy:
            for answer in cluster.step():
                write(out, answer)


def run_driver() -> None:  # pragma: no cover -- as `Cluster`
    """Read the settings and the pickled function, then serve."""
    # Ray prints to standard output, where the caller reads messages: standard output becomes standard error.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    first = read(sys.stdin.buffer)
    if first is None:
        return
    settings, packed = first
    # Behind the installed packages, so that no module of the caller hides one that Ray needs.
    sys.path.extend(path for path in settings["paths"] if path not in sys.path)
    # Ray tries an address that nobody answers forever.
    patience = threading.Timer(_PATIENCE, _give_up, args=(out,))
    patience.start()
    try:
        _check_answers(settings["address"])
        cluster = Cluster(settings, packed)
    except Exception as error:
        write(out, ("failed", f"{type(error).__name__}: {error}"))
        return
    finally:
        patience.cancel()
    write(out, ("ready", cluster.size))
    inbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, inbox), daemon=True).start()
    try:
        # A broken pipe means that the caller is gone.
        with contextlib.suppress(BrokenPipeError):
            serve(cluster, inbox, out)
    finally:
        cluster.ray.shutdown()
    # A caller that was killed cannot remove it.
    shutil.rmtree(settings["folder"], ignore_errors=True)


def _check_answers(address: str) -> None:
    """Fail at once if nobody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _give_up(out: BinaryIO) -> None:  # pragma: no cover -- as `Cluster`
    write(out, ("failed", f"no answer within {_PATIENCE} s"))
    os._exit(1)


def _listen(stream: BinaryIO, inbox: "queue.SimpleQueue[tuple[Any, ...] | None]") -> None:
    while True:
        message = read(stream)
        inbox.put(message)
        if message is None:
            return


if __name__ == "__main__":
    run_driver()

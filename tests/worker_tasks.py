"""Tasks for tests of workers: importable, so that other processes find them."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def scaled(shared: Tensor, task: int) -> Tensor:
    return shared * task


def where(shared: object, task: float) -> tuple[int, int, str | None]:
    time.sleep(task)
    return os.getpid(), torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")


def picky(shared: object, task: int) -> int:
    if task == 3:
        raise KeyError(f"no {task} here")
    return task


def killed_once(shared: Path, task: int) -> int:
    """kill -9 at the first try of every second task."""
    mark = shared / str(task)
    if task % 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task**2


def killed_always(shared: object, task: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def unpackable(shared: object, task: object) -> None:
    class UnpackableError(Exception):
        def __init__(self) -> None:
            super().__init__("of no use elsewhere")
            self.lock = threading.Lock()

    raise UnpackableError


def by_kind(shared: Tensor, task: tuple[str, Any]) -> object:
    """One function for all of these, so that one pool serves many tests."""
    kind, argument = task
    functions = {"scaled": scaled, "where": where, "picky": picky, "unpackable": unpackable}
    if kind == "killed_once":
        return killed_once(*argument)
    if kind == "killed_always":
        return killed_always(shared, 0)
    return functions[kind](shared, argument)

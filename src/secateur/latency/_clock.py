"""Clocks, and the settings of the process that hold while time is taken."""

import gc
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clock:
    """Seconds from some fixed moment, and what they count."""

    name: str
    read: Callable[[], float]


ELAPSED = Clock("elapsed time", time.perf_counter)
# Windows counts a thread's processor time in steps of 16 ms. Both runtimes do all work on the calling thread.
ONE_THREAD = ELAPSED if os.name == "nt" else Clock("processor time", time.thread_time)


def load_average() -> float | None:
    """Programs that were running or waiting, on average of the last minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


@contextmanager
def torch_threads(threads: int) -> Generator[None]:
    """PyTorch's threads on the CPU for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def same_environment() -> Generator[None]:
    """Environment variables are at the end what they were before; compilers leave notes to themselves in them."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def no_garbage_collection() -> Generator[None]:
    """No pause for garbage."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

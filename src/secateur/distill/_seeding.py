"""Initial values from a seed, whatever ran before."""

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def initialised(seed: int) -> Generator[None]:
    """Draw from the CPU's generator as from a fresh one with this seed; its state is put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

"""Shared fixtures: where the real data lies, and a guard against tests that leak state."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.utils._python_dispatch import _len_torch_dispatch_stack

# The nets are small: a second thread mostly waits for the first, and pytest runs one worker per core.
torch.set_num_threads(1)

# Suites are run in the background and under nohup too, where shells turn these signals off for all that they start.
if threading.current_thread() is threading.main_thread():
    for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(_number) == signal.SIG_IGN:
            signal.signal(_number, _usual)

SHARED = Path(__file__).resolve().parents[2] / "shared"

# A first torch call takes longer than hypothesis' default deadline; in CI the examples are the same every time.
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """The real CIFAR-10 parquet folder, or a skip where it is absent."""
    folder = SHARED / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"real CIFAR-10 is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def weights_folder() -> Path:
    """The pretrained CIFAR-10 ResNets, or a skip where they are absent."""
    folder = SHARED / "weights"
    if not folder.is_dir():
        pytest.skip(f"pretrained weights are not at {folder}")
    return folder


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """Fail a test that leaves another dtype, grad mode, mode, thread count, environment or working folder behind."""
    before = _state()
    yield
    after = _state()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, f"test leaked state (before, after): {changed}"


def _state() -> dict[str, object]:
    """What a test must leave as it found it."""
    # Set by third parties at first use; harmless, and pytest changes PYTEST_CURRENT_TEST itself.
    ignored = ("PYTEST_", "KMP_", "TF_", "COLUMNS", "LINES", "TORCH", "TRITON", "PJRT_", "CUDA_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ignored)}
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "dispatch modes": _len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "fast path of attention": torch.backends.mha.get_fastpath_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "environment": environment,
        "working folder": str(Path.cwd()),
    }

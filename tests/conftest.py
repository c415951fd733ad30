"""Shared fixtures: where the real data lies, and a guard against tests that leak state."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
def _no_leaks():
    """Fail a test that leaves another dtype, grad mode or thread count behind."""
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    yield
    after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    assert before == after, f"test leaked (dtype, grad mode, threads): {before} -> {after}"

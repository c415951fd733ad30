import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from small_runs import CPU, LABELS_ONLY, Blobs, fit_small, small_config, small_net
from torch import nn

from secateur.errors import TrainingError
from secateur.train import Precision, Silent, best_precision, copy_to_device, open_fabric


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, Precision.BF16_MIXED),
        ({"avx512_bf16": False, "amx_bf16": True}, Precision.BF16_MIXED),
        ({"avx512_bf16": False, "avx512_f": True}, Precision.FLOAT32),
        ({}, Precision.FLOAT32),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_if_it_can(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: Precision
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert best_precision(CPU) is expected


def test_an_old_torch_that_cannot_say_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert best_precision(CPU) is Precision.FLOAT32


@pytest.mark.parametrize("native", [True, False])
def test_cuda_computes_in_bfloat16_only_if_it_is_native(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    expected = Precision.BF16_MIXED if native else Precision.FLOAT32
    assert best_precision(torch.device("cuda")) is expected


def test_other_devices_compute_in_float32() -> None:
    assert best_precision(torch.device("mps")) is Precision.FLOAT32


@pytest.mark.parametrize("precision", list(Precision))
def test_open_fabric_is_one_device_in_this_process(precision: Precision, capfd: pytest.CaptureFixture[str]) -> None:
    environment, threads = dict(os.environ), torch.get_num_threads()
    fabric = open_fabric(precision, device=CPU)
    assert (fabric.device, fabric.world_size) == (CPU, 1)
    assert fabric.strategy.precision.precision == precision.value
    assert (dict(os.environ), torch.get_num_threads()) == (environment, threads)
    assert capfd.readouterr() == ("", "")


def test_one_process_of_a_cluster_job_is_not_taken_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "job", "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert open_fabric(device=CPU).world_size == 1


def test_a_fabric_of_the_caller_brings_its_precision() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    schedule = small_config(1, precision=None)
    trained = fit_small(
        small_net(), Blobs(16), train=schedule, objective=LABELS_ONLY, callbacks=Silent(), fabric=fabric
    )
    assert trained.precision is Precision.BF16_MIXED


@pytest.mark.parametrize(
    ("fabric", "message"),
    [
        (
            SimpleNamespace(strategy=object()),
            r"`fabric` must have one device, or the strategy ddp; got object\. Models",
        ),
        (
            Fabric(accelerator="cpu", devices=2, strategy="ddp_fork", plugins=[LightningEnvironment()]),
            r"`fabric` must have started its 2 processes; got one that has not\. Call fabric\.launch\(\) first",
        ),
        (
            Fabric(accelerator="cpu", devices=1, precision="bf16-mixed"),
            r"`precision` must be that of `fabric`, BF16_MIXED; got FLOAT32\. Give one of the two",
        ),
        (
            Fabric(accelerator="cpu", devices=1, precision="64-true"),
            r"`fabric` must have one of the precisions \['32-true', 'bf16-mixed'\]; got '64-true'",
        ),
    ],
)
def test_other_fabrics_are_refused(fabric: Any, message: str) -> None:
    settings: dict[str, Any] = {"objective": LABELS_ONLY, "train": small_config(1)}
    with pytest.raises(TrainingError, match=message):
        fit_small(small_net(), Blobs(16), callbacks=Silent(), fabric=fabric, **settings)


def test_a_placed_copy_has_channels_last_convolutions_and_leaves_the_model() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv3d(2, 2, 3), nn.Linear(3, 3))
    copy = copy_to_device(model, CPU)
    assert copy[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))
    assert copy[1].weight.is_contiguous()

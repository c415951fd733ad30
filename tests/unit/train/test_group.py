"""Processes that torchrun starts; two real ones are in tests/integration/test_torchrun.py."""

from pathlib import Path

import pytest
import torch

from secateur._runtime import process_count
from secateur.errors import TrainingError
from secateur.pipeline.workspace import fabric_for, first_alone
from secateur.train import Precision, open_fabric, open_group

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [({}, 1), ({"WORLD_SIZE": "4"}, 1), ({"RANK": "0", "WORLD_SIZE": ""}, 1), ({"RANK": "1", "WORLD_SIZE": "4"}, 4)],
)
def test_processes_are_those_of_torchrun(variables, wanted, monkeypatch):
    """SLURM sets WORLD_SIZE for other reasons too: without a rank there is one."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert process_count() == wanted


def test_a_number_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(TrainingError, match=r"WORLD_SIZE must be a number of processes.*'two'"):
        process_count()


def test_a_group_needs_torchrun_and_as_many_processes_on_each_machine(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(TrainingError, match=r"must be started by torchrun.*got 1 in all"):
        open_group(device=torch.device("cpu"))
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match="as many on each machine; got 4 in all and 3 on this one"):
        open_group(device=torch.device("cpu"))


def test_processes_take_their_devices_themselves():
    with pytest.raises(TrainingError, match=r"no number with several processes.*got cuda:1. Say cuda"):
        open_group(device=torch.device("cuda:1"))


def test_a_run_has_a_device_or_a_fabric():
    own = open_fabric(Precision.FLOAT32, device=torch.device("cpu"))
    assert fabric_for(own, None, None, None) is own
    assert fabric_for(None, Precision.FLOAT32, torch.device("cpu"), None).device == torch.device("cpu")
    with pytest.raises(TrainingError, match="`device` must be left out with `fabric`"):
        fabric_for(own, None, torch.device("cpu"), None)


class Pretended:
    """One of two processes; notes when it waits for the other."""

    world_size = 2

    def __init__(self, rank: int, log: list[str]):
        self.is_global_zero, self._log = rank == 0, log

    def barrier(self) -> None:
        self._log.append("waits")


@pytest.mark.parametrize(("rank", "wanted"), [(0, ["works", "waits"]), (1, ["waits", "works"])])
def test_the_first_goes_before_the_others(rank, wanted):
    log: list[str] = []
    with first_alone(Pretended(rank, log)):  # type: ignore[arg-type]
        log.append("works")
    assert log == wanted


def test_an_error_of_the_first_lets_nobody_go_on():
    log: list[str] = []
    with pytest.raises(ValueError, match="mine"), first_alone(Pretended(0, log)):  # type: ignore[arg-type]
        raise ValueError("mine")
    assert log == []


def test_several_processes_need_a_folder_to_share():
    with pytest.raises(TrainingError, match="`out` must be given with 2 processes"):
        fabric_for(Pretended(0, []), None, None, None)  # type: ignore[arg-type]
    odd = Pretended(0, [])
    odd.strategy = object()  # type: ignore[attr-defined]
    with pytest.raises(TrainingError, match="one device, or the strategy ddp"):
        fabric_for(odd, None, None, Path("out"))  # type: ignore[arg-type]

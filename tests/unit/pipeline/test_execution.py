"""How networks are run: it reaches every training, and is looked at before the work begins."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from noise_images import noise_data
from run_pipeline import run_compress, run_distill
from torch import Tensor, nn

from secateur.distill import Objective, Term, dist_loss
from secateur.errors import TrainingError
from secateur.models import CifarResNet
from secateur.pipeline import HintStage, ModelSpec
from secateur.search import Uniform
from secateur.train import Execution, Silent, TrainConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SHORT = TrainConfig(epochs=1, batch_size=32)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Noting(Execution):
    """Eager; notes what is asked of it."""

    asked: list[str] = field(default_factory=list)

    def prepared(self, model: nn.Module) -> Callable[[Tensor], Any]:
        self.asked.append("student" if model.training else "teacher")
        return model

    @contextmanager
    def running(self) -> Generator[None]:
        self.asked.append("epoch")
        yield

    def check(self, fabric: "Fabric") -> None:
        self.asked.append(f"check on {fabric.device.type}")


class Refusing(Noting):
    """Cannot be done here."""

    def check(self, fabric: "Fabric") -> None:
        raise TrainingError("no compiler")


def network(width: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CifarResNet(1, widths=(width, width, width), num_classes=4).eval()


def told(_message: str) -> None:
    raise AssertionError("work has begun")


def test_the_recovery_is_run_as_asked():
    how = Noting()
    settings: dict[str, Any] = {"budget": "macs=60%", "strategy": Uniform(), "callbacks": Silent(), "device": CPU}
    run_compress(network(8), noise_data(), train=SHORT, execution=how, **settings)
    assert how.asked == ["check on cpu", "check on cpu", "student", "teacher", "epoch"]
    with pytest.raises(TrainingError, match="no compiler"):
        run_compress(network(8), noise_data(), train=SHORT, execution=Refusing(), hear=told, **settings)
    run_compress(network(8), noise_data(), train=TrainConfig(epochs=0), execution=Refusing(), **settings)


def test_both_stages_of_a_distillation_are_run_as_asked():
    how, pupils = Noting(), (ModelSpec(network(4), "small"), ModelSpec(network(8), "large"))
    settings: dict[str, Any] = {"data": noise_data(), "train": SHORT, "callbacks": Silent(), "device": CPU}
    hinting = HintStage((Term("dist", dist_loss),), SHORT)
    run_distill(
        pupils[0], teacher=pupils[1], objective=Objective(), hint_stage=hinting, execution=how, export=(), **settings
    )
    assert how.asked == ["check on cpu", *(["check on cpu", "student", "teacher", "epoch"] * 2)]
    with pytest.raises(TrainingError, match="no compiler"):
        run_distill(pupils[0], teacher=pupils[1], execution=Refusing(), hear=told, **settings)

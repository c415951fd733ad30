"""The augmentation is part of what makes two runs the same."""

from dataclasses import replace

import pytest
from noise_images import noise_data
from torch import nn

from secateur.cost import Budget, OnnxRuntime
from secateur.data import Augment, ImageData
from secateur.distill import Objective
from secateur.pipeline import CutConfig, ModelSpec, RecoveryConfig, RunConfig
from secateur.pipeline.config import Plan
from secateur.pipeline.distill import DistillPlan
from secateur.search import Uniform
from secateur.tasks import Classification
from secateur.train import Eager, TrainConfig, open_fabric

MODEL = nn.Linear(2, 2)


def of_distillation(data: ImageData) -> dict[str, str]:
    spec = ModelSpec(MODEL)
    return DistillPlan(
        student=spec, teacher=spec, data=data, task=Classification(), train=TrainConfig(1), recover=None,
        objective=Objective(), hint_stage=None, teacher_cache=None, execution=Eager(), run=RunConfig(),
        fabric=open_fabric(),
    ).settings()  # fmt: skip


def of_compression(data: ImageData) -> dict[str, str]:
    return Plan(
        model=MODEL, data=data, task=Classification(), budget=Budget.parse("macs=50%"), strategy=Uniform(),
        cut=CutConfig(), recovery=RecoveryConfig(), target=OnnxRuntime(), output=None,
        run=RunConfig(), fabric=open_fabric(),
    ).settings()  # fmt: skip


@pytest.mark.parametrize("settings_of", [of_distillation, of_compression])
def test_another_augmentation_is_another_run(settings_of) -> None:
    data = noise_data()
    usual = settings_of(data)
    assert settings_of(noise_data()) == usual
    for changed in (Augment(padding=2), Augment(padding=1, mixup=0.2), Augment(padding=1, auto_augment="rand-m9")):
        other = settings_of(replace(data, augment=changed))
        assert {name for name in usual if usual[name] != other[name]} == {"augment"}

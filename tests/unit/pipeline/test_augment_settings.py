"""The augmentation is part of what makes two runs the same."""

from dataclasses import replace

import pytest
from noise_images import noise_data
from torch import nn

from secateur.cost import Budget
from secateur.data import Augment, ImageData
from secateur.distill import Objective
from secateur.graph import HeadUnit, Selection
from secateur.pipeline import Branches, KeepWeights, ModelSpec
from secateur.pipeline.config import Plan
from secateur.pipeline.distill import DistillConfig
from secateur.search import SearchSpace, Uniform
from secateur.train import Silent, TrainConfig, open_fabric

MODEL = nn.Linear(2, 2)


def lesson(data: ImageData) -> dict[str, str]:
    pupil = ModelSpec(MODEL)
    return DistillConfig(pupil, pupil, data, TrainConfig(1), Objective(), None, open_fabric(), "").settings()


def plan(data: ImageData) -> dict[str, str]:
    return Plan(
        model=MODEL, data=data, budget=Budget.parse("macs=50%"), strategy=Uniform(), choices=Selection(),
        heads=HeadUnit.HEAD, branches=Branches.TIED, rules={}, space=SearchSpace(), schedule=TrainConfig(1),
        objective=Objective(), start=KeepWeights(), calibration=8, seed=0, fabric=open_fabric(), name="", command="",
        delivery=None, progress=Silent(), tell=print,
    ).settings()  # fmt: skip


@pytest.mark.parametrize("settings_of", [lesson, plan])
def test_another_augmentation_is_another_run(settings_of) -> None:
    data = noise_data()
    usual = settings_of(data)
    assert settings_of(noise_data()) == usual
    for changed in (Augment(padding=2), Augment(padding=1, mixup=0.2), Augment(padding=1, auto_augment="rand-m9")):
        other = settings_of(replace(data, augment=changed))
        assert {name for name in usual if usual[name] != other[name]} == {"augment"}

"""From the words of the command line to how single weights are pruned."""

from typing import get_args

from secateur.cli.options import AllocationName, WeightFlags, WeightScheduleName, WeightScoreName
from secateur.prune import (
    Cubic,
    ERKAllocation,
    GlobalAllocation,
    Iterative,
    NOfM,
    SparsitySchedule,
    TaylorScore,
    WeightPruning,
    WeightScore,
)


def test_every_name_is_a_choice_of_its_own():
    scores = [WeightFlags(weight_score=name).to_pruning().score for name in get_args(WeightScoreName)]
    assert all(isinstance(score, WeightScore) for score in scores)
    assert len(set(map(repr, scores))) == len(get_args(WeightScoreName))
    allocations = [WeightFlags(weight_allocation=name).to_pruning().allocation for name in get_args(AllocationName)]
    assert len(set(map(repr, allocations))) == len(get_args(AllocationName))
    schedules = [WeightFlags(weight_schedule=name).to_pruning().schedule(0.5) for name in get_args(WeightScheduleName)]
    assert all(isinstance(schedule, SparsitySchedule) for schedule in schedules)
    assert len(set(map(repr, schedules))) == len(get_args(WeightScheduleName))


def test_what_is_not_said_is_the_default():
    assert WeightFlags().to_pruning() is None
    assert WeightFlags(dense=("conv1",)).to_pruning() == WeightPruning(exclude=("conv1",))
    assert WeightFlags(weight_score="taylor").to_pruning() == WeightPruning(TaylorScore(), GlobalAllocation(), Cubic)
    found = WeightFlags(weight_allocation="erk", weight_schedule="iterative").to_pruning()
    assert found == WeightPruning(allocation=ERKAllocation(), schedule=Iterative)
    assert WeightFlags(weight_allocation="4:8").to_pruning().allocation == NOfM(4, 8)

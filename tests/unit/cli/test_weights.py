"""From the words of the command line to how single weights are pruned."""

from secateur.cli._words import pruning_of
from secateur.cli.options import AllocationName, WeightScheduleName, WeightScoreName
from secateur.prune import (
    ByERK,
    ByTaylor,
    Cubic,
    Globally,
    Iterative,
    NOfM,
    SparsitySchedule,
    WeightPruning,
    WeightScore,
)


def test_every_name_is_a_choice_of_its_own():
    scores = [pruning_of(name, None, None, None).score for name in WeightScoreName]
    assert all(isinstance(score, WeightScore) for score in scores)
    assert len(set(map(repr, scores))) == len(WeightScoreName)
    allocations = [pruning_of(None, name, None, None).allocation for name in AllocationName]
    assert len(set(map(repr, allocations))) == len(AllocationName)
    schedules = [pruning_of(None, None, name, None).schedule(0.5) for name in WeightScheduleName]
    assert all(isinstance(schedule, SparsitySchedule) for schedule in schedules)
    assert len(set(map(repr, schedules))) == len(WeightScheduleName)


def test_what_is_not_said_is_as_usual():
    assert pruning_of(None, None, None, None) is None
    assert pruning_of(None, None, None, ["conv1"]) == WeightPruning(exclude=("conv1",))
    assert pruning_of(WeightScoreName.TAYLOR, None, None, None) == WeightPruning(ByTaylor(), Globally(), Cubic)
    found = pruning_of(None, AllocationName.ERK, WeightScheduleName.ITERATIVE, None)
    assert found == WeightPruning(allocation=ByERK(), schedule=Iterative)
    assert pruning_of(None, AllocationName.FOUR_OF_EIGHT, None, None).allocation == NOfM(4, 8)

"""How much of a stage's error arrives at the output: with stages of really cut models, run one after the other."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from swp_runs import alone, fresh_norms_, judge_of, options_of, quick, staged, subnets_of, whole
from tas_runs import run
from torch import Tensor

from secateur.nas import InPlace, Labels, run_remaining_stages, stage_effects, stage_features
from secateur.nas.swp import held_out_losses


def far(y: Tensor, x: Tensor) -> float:
    return float(((y - x) ** 2).mean() / x.var(unbiased=False))


def test_effects_are_those_of_stages_run_one_after_the_other():
    options = options_of(staged())
    judge, subnets = judge_of(options, InPlace()), subnets_of(options, 3)
    stages, images, last = judge.stages, judge.calibration[0], len(judge.stages) - 1
    full = fresh_norms_(copy.deepcopy(judge.supernet.model))
    own, arrived = np.zeros(last + 1), np.zeros(last + 1)
    with torch.no_grad():
        targets = whole(full, stages, images)
        for subnet in subnets:
            for number in range(last + 1):
                small = fresh_norms_(judge.supernet.extract(subnet))
                output = alone(small, stages, number, images, targets[:-1])
                own[number] += far(output, targets[number])
                for later in range(number + 1, last + 1):
                    output = alone(full, stages, later, images, [output] * later)
                arrived[number] += far(output, targets[-1])
    assert last > 0
    got = stage_effects(judge.supernet, subnets, stages, images)
    np.testing.assert_allclose(got, arrived / own, rtol=1e-9)
    assert got[last] == 1
    np.testing.assert_array_equal(judge.weighted(subnets).weights, got)


def test_the_full_nets_own_feature_leads_to_its_own_output():
    judge = judge_of(options_of(staged()), InPlace())
    images = judge.calibration[0]
    with torch.no_grad():
        logits, handed_on = stage_features(judge.supernet, judge.stages, images, tensors=judge.full)
        for number, feature in enumerate(handed_on):
            again = run_remaining_stages(judge.supernet, judge.stages, images, number, feature, tensors=judge.full)
            other = run_remaining_stages(judge.supernet, judge.stages, images, number, 2 * feature, tensors=judge.full)
            assert torch.equal(again, logits)
            assert not torch.equal(other, logits)


def test_losses_are_multiplied_by_the_weights():
    options = options_of(staged())
    judge, subnets = judge_of(options, InPlace()), subnets_of(options, 2)
    weights = np.arange(2.0, 2.0 + len(judge.stages))
    np.testing.assert_array_equal(
        held_out_losses(replace(judge, weights=weights), subnets), held_out_losses(judge, subnets) * weights
    )


def test_one_stage_and_stages_without_any_loss_weigh_one():
    whole_net = options_of(staged(), cuts=())
    assert judge_of(whole_net, Labels(), torch.float32).weighted(subnets_of(whole_net, 2)).weights.tolist() == [1.0]
    options = options_of(staged())
    assert judge_of(options, InPlace()).weighted([]).weights.tolist() == [1.0] * len(options.stages)


def test_a_search_says_what_it_weighed_by():
    found = run(staged(), quick(1), seed=3)
    notes: Any = found.notes
    weights = notes["weights"]
    assert len(weights) == len(notes["stages"])
    assert weights[-1] == 1
    assert all(0 < weight < 100 for weight in weights)

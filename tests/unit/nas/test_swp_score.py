"""What candidates are worth: against really cut models, stage by stage, with batch norms measured by themselves."""

import copy
import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from slow_search import data as noise
from swp_runs import (
    alone,
    as_text,
    fresh_norms_,
    judge_of,
    options_of,
    quick,
    recalibrated,
    staged,
    subnets_of,
    supernet_of,
    whole,
)
from tas_runs import run
from torch import Tensor

from secateur._runtime import torch_threads
from secateur.nas import InPlace, Labels, SoftLabels, Subnet, Supervision
from secateur.nas.swp import CandidateScorer, held_out_losses
from secateur.train import Precision, open_fabric
from secateur.workers import InProcess, OnRay

# Not importorskip: to import Ray would change this process.
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
each_graph = pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
CPU = torch.device("cpu")
module = import_module("secateur.nas.swp")


def loss_by_hand(supervision: Supervision, y: Tensor, x: Tensor, labels: Tensor) -> float:
    if supervision == InPlace():
        return float(((y - x) ** 2).mean() / x.var(unbiased=False))
    log_q = y.log_softmax(1)
    if supervision == Labels():
        return float(-log_q[torch.arange(len(labels)), labels].mean())
    return float((x.softmax(1) * (x.log_softmax(1) - log_q)).sum(1).mean())


def losses_by_hand(judge: CandidateScorer, subnet: Subnet) -> list[float]:
    """Every stage of the cut model alone: norms measured on the full net's features, then judged on them."""
    stages = judge.stages
    full = recalibrated(judge.supernet.model, judge.calibration)
    losses = []
    with torch.no_grad():
        for number in range(len(stages)):
            small = fresh_norms_(judge.supernet.extract(subnet))
            for images in judge.calibration:
                alone(small, stages, number, images, whole(full, stages, images)[:-1])
            small.eval()
            found = []
            for images, labels in judge.held_out:
                targets = whole(full, stages, images)
                output = alone(small, stages, number, images, targets[:-1])
                found.append(loss_by_hand(judge.supervision, output, targets[number], labels))
            losses.append(sum(found) / len(found))
    return losses


@each_graph
@pytest.mark.parametrize("cuts", [None, ()], ids=["stages", "whole"])
def test_losses_are_those_of_the_cut_model_stage_by_stage(cuts, untied):
    options = options_of(staged(untied=untied), cuts=cuts)
    judge, subnets = judge_of(options, InPlace()), subnets_of(options, 4)
    got = held_out_losses(judge, subnets)
    assert got.shape == (4, len(options.stages))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, [losses_by_hand(judge, subnet) for subnet in subnets], rtol=1e-9)
    assert (got[0] > 0.01).all()


@pytest.mark.parametrize("supervision", [Labels(), SoftLabels()])
def test_losses_of_whole_networks_from_labels_and_logits(supervision):
    options = options_of(staged(), cuts=())
    judge, subnets = judge_of(options, supervision, torch.float32), subnets_of(options, 3)
    wanted = [losses_by_hand(judge, subnet) for subnet in subnets]
    # The logits differ by some 1e-7 of 1; divergences of 0.01 by as much.
    np.testing.assert_allclose(held_out_losses(judge, subnets), wanted, rtol=1e-4, atol=1e-6)


def in_chunks(judge: CandidateScorer, subnets: Sequence[Subnet], size: int) -> np.ndarray:
    chunks = [subnets[first : first + size] for first in range(0, len(subnets), size)]
    return np.concatenate([held_out_losses(judge, chunk) for chunk in chunks])


def test_losses_do_not_depend_on_the_chunks():
    options = options_of(staged(untied=True))
    judge, subnets = judge_of(options, InPlace(), torch.float32), subnets_of(options, 6)
    together = held_out_losses(judge, subnets)
    for size in (1, 4):
        assert np.array_equal(in_chunks(judge, subnets, size), together)
    assert np.array_equal(held_out_losses(judge, subnets[::-1]), together[::-1])
    assert held_out_losses(judge, []).shape == (0, 3)


def test_the_full_net_has_almost_no_loss_and_the_tiny_one_has():
    """Not none at all: its norms are measured on features that the averages of two batches have normalized."""
    options = options_of(staged())
    judge = judge_of(options, InPlace())
    full, tiny = held_out_losses(judge, [options.subnet(options.largest), options.subnet(options.smallest)])
    assert full[0] < 1e-4
    assert (full < 0.02).all()
    assert (tiny > 10 * full).all()


def test_judging_leaves_the_supernet_alone():
    options = options_of(staged())
    judge = judge_of(options, InPlace())
    before = copy.deepcopy(judge.supernet.state_dict())
    one = held_out_losses(judge, subnets_of(options, 2))
    assert all(torch.equal(before[name], tensor) for name, tensor in judge.supernet.state_dict().items())
    assert not any(module.training for module in judge.supernet.modules())
    assert all(parameter.grad is None for parameter in judge.supernet.parameters())
    assert np.array_equal(one, held_out_losses(judge, subnets_of(options, 2)))


@pytest.mark.parametrize(("images", "sizes"), [(64, [64]), (374, [374]), (376, [188, 188]), (800, [267, 267, 266])])
def test_a_judge_divides_the_images_evenly_and_looks_at_the_full_net(images, sizes):
    options = options_of(staged())
    supernet = supernet_of(options, torch.float32).train()
    split = noise().train.subset(torch.arange(images) % 64)
    calibration = [batch for batch, _ in staged().batches]
    judge = CandidateScorer.of(
        supernet,
        stages=options.stages,
        supervision=InPlace(),
        calibration=calibration,
        images=split,
        fabric=open_fabric(Precision.FLOAT32),
    )
    assert [len(batch) for batch, _ in judge.held_out] == sizes
    assert not any(module.training for module in supernet.modules())
    assert judge.device == CPU
    wanted = recalibrated(supernet.model, calibration)
    for name, tensor in judge.full.items():
        torch.testing.assert_close(tensor, dict(wanted.named_buffers())[name])


def test_judging_in_bfloat16_is_judging_up_to_its_digits():
    options = options_of(staged())
    exact = judge_of(options, InPlace(), torch.float32)
    subnets = subnets_of(options, 3)
    half = held_out_losses(replace(exact, precision=Precision.BF16_MIXED), subnets)
    single = held_out_losses(exact, subnets)
    assert not np.array_equal(half, single)
    np.testing.assert_allclose(half, single, rtol=0.1, atol=0.01)


def test_judging_takes_one_thread_whatever_the_process_has(monkeypatch: pytest.MonkeyPatch):
    """As a worker of Ray does; the threads of the process are as before afterward."""
    options = options_of(staged())
    judge, subnets, seen = judge_of(options, InPlace(), torch.float32), subnets_of(options, 3), list[int]()
    real = module.run_stages

    def watched(*arguments: Any, **named: Any) -> Any:
        seen.append(torch.get_num_threads())
        return real(*arguments, **named)

    monkeypatch.setattr(module, "run_stages", watched)
    found = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            found.append(held_out_losses(judge, subnets))
            assert torch.get_num_threads() == threads
    assert set(seen) == {1}
    assert all(np.array_equal(found[0], each) for each in found)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_ray_finds_what_one_process_finds(threads: int):
    """To the last bit, with workers of one thread as is usual; starting Ray takes most of the time."""
    with torch_threads(threads):
        found = [run(staged(), quick(1, workers=workers), seed=3) for workers in (InProcess(), OnRay(workers=1))]
    assert found[0].architecture == found[1].architecture
    assert as_text(found[0].notes) == as_text(found[1].notes)

"""Every distillation loss and every way to prune weights, on every network of the zoo."""

import copy
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

from secateur.cli.distill import LOGIT_LOSSES, LossName, Pair, to_objective
from secateur.distill import PUBLISHED, paired_stages
from secateur.errors import SparsityError, TraceError, TrainingError
from secateur.graph import trace
from secateur.prune import (
    ERKAllocation,
    GlobalAllocation,
    MagnitudeScore,
    MovementScore,
    NOfM,
    RandomScore,
    SnipScore,
    TaylorScore,
    UniformAllocation,
    WeightPruning,
    apply_masks,
    mask_density,
    prunable_weights,
)

LEARNED = ("vid", "crd", "review")
"""Losses with something to learn: not 0 for two equal networks."""

MATCHING = ("kd", "dkd", "dist", "standardized", "sp", "pkt")
SCORES = (MagnitudeScore(), RandomScore(1), TaylorScore(), SnipScore(), MovementScore(0.01))
ALLOCATIONS = (GlobalAllocation(), UniformAllocation(), ERKAllocation())


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def taps_of(model: nn.Module) -> dict[str, str]:
    """The stages of a network, or none where it has none."""
    try:
        graph = trace(model, images(2))
        return paired_stages(graph, graph)
    except (TraceError, TrainingError):
        return {}


def other(model: nn.Module) -> nn.Module:
    """The same network with other weights."""
    model = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=draw))
    return model


def total(name: str, student: nn.Module, teacher: nn.Module, taps: dict[str, str], labels: Tensor) -> Tensor:
    pair = Pair(student, teacher, images(2), 12)
    objective = to_objective(
        {name: PUBLISHED[name].weight}, pair, taps, temperature=4.0, label_weight=0.0, label_smoothing=0.0
    )
    with objective.record(student, teacher) as recorded:
        with torch.no_grad():
            teacher_logits = teacher(images())
        value, _ = objective(student(images()), teacher_logits=teacher_logits, labels=labels, recorder=recorded)
    return value


@pytest.mark.parametrize("net", ZOO)
def test_every_loss_teaches_every_network(net: str) -> None:
    model = ZOO[net]().model
    logits = model(images())
    if logits.ndim != 2 or logits.shape[1] < 2:
        pytest.skip(f"gives {tuple(logits.shape)}, which is no batch of logits")
    labels, taps = torch.arange(6) % logits.shape[1], taps_of(model)
    for name in get_args(LossName):
        if name not in LOGIT_LOSSES and not taps:
            continue
        student = other(model).requires_grad_()
        value = total(name, student, model, taps, labels)
        assert torch.isfinite(value), name
        value.backward()
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        assert gradients, name
        assert all(bool(gradient.isfinite().all()) for gradient in gradients), name
        assert any(bool(gradient.any()) for gradient in gradients), name
        if name in MATCHING:
            same = total(name, copy.deepcopy(model), model, taps, labels)
            assert abs(float(same)) < 1e-4 * max(1.0, abs(float(value))), name


def loss_of(model: nn.Module) -> tuple[tuple[Tensor, Tensor], ...]:
    logits = model(images())
    return ((images(), torch.zeros(6, *logits.shape[2:], dtype=torch.int64)),)


@pytest.mark.parametrize("net", ZOO)
def test_every_sparsifier_prunes_every_network(net: str) -> None:
    model = ZOO[net]().model
    batches = loss_of(model)
    size = sum(weight.numel() for weight in prunable_weights(model).values())
    for score in SCORES:
        for allocation in ALLOCATIONS:
            masks = WeightPruning(score, allocation).masks(model, 0.4, batches)
            kept = sum(int(mask.sum()) for mask in masks.values())
            assert kept == round(0.4 * size) or (isinstance(allocation, UniformAllocation) and kept <= 0.4 * size), (
                score,
                kept,
            )
            assert masks.keys() == prunable_weights(model).keys()
            _check_zeroed(model, masks)


def _check_zeroed(model: nn.Module, masks: dict[str, Tensor]) -> None:
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in masks.items():
            zeroed.get_parameter(name).mul_(kept)
        assert torch.equal(apply_masks(model, masks)(images()), zeroed(images()))


@pytest.mark.parametrize("net", ZOO)
def test_patterns_prune_what_they_divide(net: str) -> None:
    model = ZOO[net]().model
    odd = tuple(name for name, weight in prunable_weights(model).items() if weight.shape[1] % 4)
    make: Callable[[tuple[str, ...]], dict[str, Tensor]] = lambda exclude: WeightPruning(  # noqa: E731
        allocation=NOfM(2, 4), exclude=exclude
    ).masks(model, 0.5)
    if odd:
        with pytest.raises(SparsityError, match="`m` must divide the input dimension"):
            make(())
    if len(odd) < len(prunable_weights(model)):
        assert mask_density(make(odd)) == 0.5

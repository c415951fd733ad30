"""Every distillation loss and every way to prune weights, on every network of the zoo."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

from secateur.cli._words import OF_LOGITS, USUAL, Pair, objective_of
from secateur.cli.options import LossName
from secateur.distill import paired_stages
from secateur.errors import SparsityError, TraceError, TrainingError
from secateur.graph import trace
from secateur.prune import (
    AtRandom,
    ByERK,
    ByMagnitude,
    ByMovement,
    BySnip,
    ByTaylor,
    Evenly,
    Globally,
    NOfM,
    WeightPruning,
    density_of,
    masked,
    prunable,
)

LEARNED = (LossName.VID, LossName.CRD, LossName.REVIEW)
"""Losses with something to learn: not 0 for two equal networks."""

MATCHING = (LossName.KD, LossName.DKD, LossName.DIST, LossName.STANDARDIZED, LossName.SP, LossName.PKT)
SCORES = (ByMagnitude(), AtRandom(1), ByTaylor(), BySnip(), ByMovement(0.01))
ALLOCATIONS = (Globally(), Evenly(), ByERK())


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


def total(name: LossName, student: nn.Module, teacher: nn.Module, taps: dict[str, str], labels: Tensor) -> Tensor:
    pair = Pair(student, teacher, images(2), 12)
    objective = objective_of({name: USUAL[name]}, pair, taps, temperature=4.0, label_weight=0.0, label_smoothing=0.0)
    with objective.watch(student, teacher) as watch:
        with torch.no_grad():
            teacher_logits = teacher(images())
        value, _ = objective(student(images()), teacher_logits=teacher_logits, labels=labels, watch=watch)
    return value


@pytest.mark.parametrize("net", ZOO)
def test_every_loss_teaches_every_network(net: str) -> None:
    model = ZOO[net]().model
    logits = model(images())
    if logits.ndim != 2 or logits.shape[1] < 2:
        pytest.skip(f"gives {tuple(logits.shape)}, which is no batch of logits")
    labels, taps = torch.arange(6) % logits.shape[1], taps_of(model)
    for name in LossName:
        if name not in OF_LOGITS and not taps:
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
    size = sum(weight.numel() for weight in prunable(model).values())
    for score in SCORES:
        for allocation in ALLOCATIONS:
            masks = WeightPruning(score, allocation).masks(model, 0.4, batches)
            kept = sum(int(mask.sum()) for mask in masks.values())
            assert kept == round(0.4 * size) or (isinstance(allocation, Evenly) and kept <= 0.4 * size), (score, kept)
            assert masks.keys() == prunable(model).keys()
            _check_zeroed(model, masks)


def _check_zeroed(model: nn.Module, masks: dict[str, Tensor]) -> None:
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in masks.items():
            zeroed.get_parameter(name).mul_(kept)
        assert torch.equal(masked(model, masks)(images()), zeroed(images()))


@pytest.mark.parametrize("net", ZOO)
def test_patterns_prune_what_they_divide(net: str) -> None:
    model = ZOO[net]().model
    odd = tuple(name for name, weight in prunable(model).items() if weight.shape[1] % 4)
    make: Callable[[tuple[str, ...]], dict[str, Tensor]] = lambda exclude: WeightPruning(  # noqa: E731
        allocation=NOfM(2, 4), exclude=exclude
    ).masks(model, 0.5)
    if odd:
        with pytest.raises(SparsityError, match="`m` must divide the input dimension"):
            make(())
    if len(odd) < len(prunable(model)):
        assert density_of(make(odd)) == 0.5

"""A tiny net in two stages and a quick search for the tests of SWP; also parts of stages, run by hand."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from slow_search import data as noise
from tas_runs import Block, Net
from torch import Tensor, nn

from secateur.cost import Budget, CostModel
from secateur.errors import SelectionError
from secateur.graph import ChannelGraph, Stage, find_stages, trace, untie
from secateur.nas import (
    SWP,
    Depths,
    Subnet,
    Supernet,
    SupernetWeights,
    Supervision,
    Widths,
    measure_batch_norms,
    order_by_score,
)
from secateur.nas.swp import CandidateScorer
from secateur.nas.swp_candidates import CandidateSpace
from secateur.prune import original_names
from secateur.search import L2, ScoringInputs, SearchContext, SearchResult, SearchSpace
from secateur.train import SGD, Precision, TrainConfig

SPACE, WIDTHS, DEPTHS = SearchSpace(), Widths((0.3, 0.6)), Depths()
BatchNorm = nn.modules.batchnorm._BatchNorm


class Staged(nn.Sequential):
    """Two residual blocks at each of two resolutions, and a head."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 10), Block(8, 10),
            nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), Block(12, 14), Block(12, 14),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
        )  # fmt: skip


def staged(*, untied: bool = False) -> Net:
    """The net, its graph and two batches of its training images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        model = Staged().eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    batches = tuple(noise().train.batches(16, device=torch.device("cpu")))[:2]
    return Net(model, untie(model, graph) if untied else graph, batches)


def quick_config(epochs: int = 2, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {"batch_size": 16, "learning_rate": 0.05, "optimizer": SGD(), "warmup_fraction": 0.0}
    return TrainConfig(epochs, **(usual | {"precision": Precision.FLOAT32} | changes))


def quick(epochs: int = 2, **fields: Any) -> SWP:
    """Widths and depths, three steps an epoch, four candidates a round, in half a second."""
    given: dict[str, Any] = {
        "train": quick_config(epochs), "importance": L2(), "depths": Depths(), "candidates": 12, "rounds": 3,
        "held_out": 16, "student_weights": SupernetWeights(),
    }  # fmt: skip
    return SWP(**(given | fields))


def problem_of(
    model: nn.Module, graph: ChannelGraph, budget: str = "macs=50%, params=60%", space: SearchSpace = SPACE
) -> SearchContext:
    """A search without data."""
    costs = CostModel(graph)
    return SearchContext(ScoringInputs(model, graph), costs, Budget.parse(budget), space, lambda _done, _what: None)


def options_of(
    given: Net,
    *,
    widths: Widths | None = WIDTHS,
    depths: Depths | None = DEPTHS,
    cuts: Sequence[str] | None = None,
    **settings: Any,
) -> CandidateSpace:
    """What there is to choose from."""
    problem = problem_of(given.model, given.graph, **settings)
    return CandidateSpace.of(problem, find_stages(given.model, given.graph, cuts), widths, depths)


def finest(model: nn.Module, graph: ChannelGraph) -> list[str]:
    """Cuts wherever there can be one."""
    cuts: list[str] = []
    for name, _ in model.named_modules():
        for some in ([*cuts, name], [*cuts[:-1], name]):
            try:
                find_stages(model, graph, some)
            except SelectionError:
                continue
            cuts = some
            break
    return cuts


class _StageIsOverError(Exception):
    pass


def alone(model: nn.Module, stages: Sequence[Stage], number: int, images: Tensor, handed_on: Sequence[Tensor]):
    """One stage of an ordinary model: fed at its start, left at its end."""
    names = {original: name for name, original in original_names(model).items()}
    found: list[Tensor] = []

    def feed(_module, _inputs, _output):
        return handed_on[number - 1].clone()

    def leave(_module, _inputs, output):
        found.append(output)
        raise _StageIsOverError

    with ExitStack() as stack:
        if number > 0:
            hook = model.get_submodule(names[stages[number - 1].cut]).register_forward_hook(feed)
            stack.callback(hook.remove)
        if number < len(stages) - 1:
            hook = model.get_submodule(names[stages[number].cut]).register_forward_hook(leave)
            stack.callback(hook.remove)
        try:
            return model(images)
        except _StageIsOverError:
            return found[0]


def whole(model: nn.Module, stages: Sequence[Stage], images: Tensor) -> tuple[Tensor, ...]:
    """What an ordinary model computes at the end of every stage, detached but for the last."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for stage in stages[:-1]:
            module = model.get_submodule(stage.cut)
            hook = module.register_forward_hook(lambda _m, _i, out: found.append(out.detach().clone()))
            stack.callback(hook.remove)
        output = model(images)
    return (*found, output)


def fresh_norms_(model: nn.Module) -> nn.Module:
    """Batch norms that forget what they know, use the batch, and average plainly; all else in evaluation mode."""
    model.eval()
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.reset_running_stats()
            module.train()
            module.momentum = None
    return model


def recalibrated(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """A copy with batch-norm statistics of these images, in evaluation mode."""
    model = fresh_norms_(copy.deepcopy(model))
    with torch.no_grad():
        for images in batches:
            model(images)
    return model.eval()


def as_text(notes: Mapping[str, Any]) -> str:
    """Notes without the times."""
    training = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in notes["training"]]
    return repr({**notes, "training": training})


def assert_same(one: SearchResult, other: SearchResult) -> None:
    """Bit by bit, but for the time it took."""
    assert one.architecture == other.architecture
    assert one.weights is not None
    assert other.weights is not None
    assert one.weights.keys() == other.weights.keys()
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert as_text(one.notes) == as_text(other.notes)


def supernet_of(options: CandidateSpace, dtype: torch.dtype) -> Supernet:
    """With channels in an order of their own."""
    inputs = options.context.inputs
    draw = np.random.default_rng(2)
    graph = replace(inputs.graph, example=tuple(tensor.to(dtype) for tensor in inputs.graph.example))
    scores = {axis.name: draw.random(axis.size) for axis in graph.prunable}
    return Supernet(copy.deepcopy(inputs.model).to(dtype), graph, order_by_score(scores)).eval()


def judge_of(options: CandidateSpace, supervision: Supervision, dtype: torch.dtype = torch.float64) -> CandidateScorer:
    """A judge with images in two batches of calibration and two held out."""
    supernet = supernet_of(options, dtype)
    batches = [(images.to(dtype), labels) for images, labels in noise().train.batches(16, device=torch.device("cpu"))]
    calibration = tuple(images for images, _ in batches[:2])
    full = measure_batch_norms(supernet, supernet.full, calibration)
    return CandidateScorer(
        supernet, options.stages, supervision, calibration, tuple(batches[2:]), full, Precision.FLOAT32
    )


def subnets_of(options: CandidateSpace, count: int) -> list[Subnet]:
    draw = np.random.default_rng(1)
    return [options.subnet(rows) for rows in (options.smallest, *(options.sample(draw) for _ in range(count - 1)))]

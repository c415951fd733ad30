"""An optimizer goes on after a cut: its state is sliced as its parameters are, bit for bit."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cuts import random_architecture
from torch import nn
from zoo import ZOO

import secateur
from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph import untie
from secateur.prune import Cut

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-3),
}


def train_(model: nn.Module, optimizer: torch.optim.Optimizer, example: torch.Tensor, steps: int = 2) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(example).square().mean().backward()
        optimizer.step()


def same_slice(part: torch.Tensor, whole: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> bool:
    """Whether a state is the slice that the new parameter is of the old one, whose values are all different."""
    where = (old.reshape(-1, 1) == new.reshape(1, -1)).int().argmax(0)
    return bool(torch.equal(part, whole.reshape(-1)[where].reshape(new.shape)))


@pytest.mark.parametrize("net", ["residual", "few_groups", "flatten_linear", "tied_parameter"])
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_state_is_a_slice_bit_for_bit(name: str, net: str) -> None:
    torch.manual_seed(0)  # With other weights, two of the thousands of random values may be equal.
    model, example = ZOO[net]()
    model.train()
    optimizer = OPTIMIZERS[name](model.parameters())
    train_(model, optimizer, example)
    before = copy.deepcopy(optimizer.state_dict())
    graph = secateur.trace(model, example)
    cut = secateur.cut(model, graph, random_architecture(graph, 3))
    sliced = cut.slice_optimizer(optimizer)
    assert type(sliced) is type(optimizer)
    olds, news = dict(model.named_parameters()), dict(cut.model.named_parameters())
    assert [id(p) for p in sliced.param_groups[0]["params"]] == [id(p) for p in news.values()]
    compared = 0
    for key, new in news.items():
        old = olds[key]
        assert sliced.state[new].keys() == optimizer.state[old].keys()
        for entry, whole in optimizer.state[old].items():
            part = sliced.state[new][entry]
            if whole.dim() == 0:
                assert torch.equal(part, whole)
                assert part is not whole
            else:
                compared += 1
                assert same_slice(part, whole, new.data, old.data), (key, entry)
    assert compared >= len(news)
    # The original's optimizer is as it was, and the new one trains.
    after = optimizer.state_dict()
    assert str(before) == str(after)
    train_(cut.model.train(), sliced, example)
    assert all(bool(torch.isfinite(p).all()) for p in news.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_keeping_everything_continues_bit_for_bit(name: str) -> None:
    """Two more steps after a cut that removes nothing are the two steps that the original would have made."""
    model, example = ZOO["plain"]()
    optimizer = OPTIMIZERS[name](model.parameters())
    train_(model, optimizer, example)
    cut = secateur.cut(model, secateur.trace(model, example), Architecture())
    sliced = cut.slice_optimizer(optimizer)
    train_(cut.model, sliced, example)
    train_(model, optimizer, example)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), cut.model.parameters(), strict=True))


def test_factored_state_is_sliced_where_it_is_not_one() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    optimizer = OPTIMIZERS["adafactor"](model.parameters())
    train_(model, optimizer, torch.randn(4, 6))
    graph = secateur.trace(model, torch.randn(1, 6))
    cut = secateur.cut(model, graph, Architecture.of({graph.prunable[0].name: [1, 2, 6]}))
    state = cut.slice_optimizer(optimizer).state[cut.model[2].weight]
    whole = optimizer.state[model[2].weight]
    assert torch.equal(state["col_var"], whole["col_var"][:, [1, 2, 6]])
    assert torch.equal(state["row_var"], whole["row_var"])


def untied_without_a_block() -> tuple[nn.Module, torch.Tensor, Callable[[], Cut]]:
    model, example = ZOO["residual"]()
    graph = untie(model, secateur.trace(model, example))
    branch = next(axis for axis in graph.prunable if axis.residual_axis is not None)
    blocks = [graph.removable[-1].name]
    kept = Architecture.of({branch.name: np.arange(1, branch.size)}, blocks)
    return model, example, lambda: secateur.cut(model, graph, kept)


def test_removed_blocks_leave_and_narrow_branches_are_found() -> None:
    model, example, make = untied_without_a_block()
    groups = [
        {"params": [p for n, p in model.named_parameters() if "weight" in n], "lr": 0.1},
        {"params": [p for n, p in model.named_parameters() if "weight" not in n], "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    train_(model, optimizer, example, steps=1)
    cut = make()
    assert any("inner" in name for name, _ in cut.model.named_parameters())
    sliced = cut.slice_optimizer(optimizer)
    held = {id(p) for group in sliced.param_groups for p in group["params"]}
    assert held == {id(p) for p in cut.model.parameters()}
    assert [group["lr"] for group in sliced.param_groups] == [0.1, 0.2]
    assert len(held) < len(list(model.parameters()))
    for new in cut.model.parameters():
        assert sliced.state[new]["momentum_buffer"].shape == new.shape


def test_a_scheduler_goes_on() -> None:
    model, example = ZOO["plain"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train_(model, optimizer, example, steps=1)
    scheduler.step()
    graph = secateur.trace(model, example)
    cut = secateur.cut(model, graph, random_architecture(graph, 0))
    scheduler.optimizer = sliced = cut.slice_optimizer(optimizer)
    train_(cut.model, sliced, example, steps=1)
    scheduler.step()
    assert sliced.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_parameters_of_other_modules_stay() -> None:
    model, example = ZOO["plain"]()
    scale = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([*model.parameters(), scale])
    optimizer.zero_grad()
    (model(example).square().mean() + scale.sum()).backward()
    optimizer.step()
    graph = secateur.trace(model, example)
    sliced = secateur.cut(model, graph, random_architecture(graph, 0)).slice_optimizer(optimizer)
    assert sliced.param_groups[0]["params"][-1] is scale
    assert torch.equal(sliced.state[scale]["exp_avg"], optimizer.state[scale]["exp_avg"])
    assert sliced.state[scale]["exp_avg"] is not optimizer.state[scale]["exp_avg"]


def test_what_cannot_be_sliced_is_refused() -> None:
    model, example = ZOO["plain"]()
    graph = secateur.trace(model, example)
    cut = secateur.cut(model, graph, random_architecture(graph, 0))
    with pytest.raises(SurgeryError, match="must hold parameters of the model that was cut; got none"):
        cut.slice_optimizer(torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[next(model.parameters())]["sketch"] = torch.zeros(5)
    with pytest.raises(SurgeryError, match=r"got 'sketch' \(5,\) for .*weight"):
        cut.slice_optimizer(optimizer)

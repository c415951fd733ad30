"""Scores and searches that need a loss take that of the task: Taylor, scores of single weights, TAS and SWP."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import secateur
from secateur import SWP, TAS, GlobalImportance, Knapsack, RemoveBlocks
from secateur._batches import with_targets
from secateur.errors import DataError, SecateurError
from secateur.nas import Labels
from secateur.pipeline import CutConfig, RecoveryConfig, RunConfig
from secateur.pipeline.compress import with_task
from secateur.prune import MovementScore, SnipScore, TaylorScore, WeightPruning
from secateur.search import Fastest, ScoringInputs, Taylor
from secateur.tasks import Classification, Imitation, MultiLabel, Regression, Segmentation, Task
from secateur.train import Precision, Silent, TrainConfig

RUN: dict[str, Any] = {
    "recovery": RecoveryConfig(TrainConfig(1, batch_size=16, learning_rate=1e-3, precision=Precision.FLOAT32)),
    "run": RunConfig(callbacks=Silent(), device=torch.device("cpu")),
    "export": (),
}
CUT = CutConfig(calibration_images=32, space=secateur.SearchSpace(divisor=1))


def items(kind: str, count: int, seed: int) -> TensorDataset:
    """Noise with targets of one kind."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=draw)
    targets = {
        "masks": (images.mean(1) > 0).long(),
        "several": (images.mean((2, 3))[:, :2] > 0).float(),
        "numbers": images.mean((2, 3))[:, :2],
    }
    return TensorDataset(images, targets[kind]) if kind in targets else TensorDataset(images)


def data_of(kind: str) -> tuple[TensorDataset, TensorDataset]:
    return items(kind, 64, 0), items(kind, 24, 1)


def net(*head: nn.Module) -> nn.Module:
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    more = [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*body, *more, *head)


def dense_net(outputs: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return net(nn.Conv2d(16, outputs, 1)).eval()


def pooled_net(outputs: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return net(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, outputs)).eval()


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are not what is tested here."""
    monkeypatch.setattr("secateur.pipeline.finalize.latency_on", lambda *_: ((), ()))


CASES: dict[str, tuple[Task, nn.Module, str]] = {
    "segmentation": (Segmentation(), dense_net(2), "masks"),
    "several labels": (MultiLabel(), pooled_net(2), "several"),
    "regression": (Regression(), pooled_net(2), "numbers"),
}


def a_batch(kind: str) -> tuple[Tensor, Tensor]:
    images, targets = items(kind, 8, 2).tensors
    return images, targets


@pytest.mark.parametrize("name", CASES)
def test_taylor_is_the_change_of_the_tasks_loss(name: str) -> None:
    """By another way: the derivative of the loss by a gate on each channel, which all readers see."""
    task, model, kind = CASES[name]
    images, targets = a_batch(kind)
    graph = secateur.trace(model, images[:2])
    inputs = ScoringInputs(model, graph, (with_targets(images, targets),))
    scores = Taylor(task=task).scores(inputs)
    first = next(axis for axis in graph.prunable if axis.size == 16)
    assert isinstance(model, nn.Sequential)
    gate = torch.ones(1, 16, 1, 1, requires_grad=True)
    hidden = model[:3](images) * gate  # the output of the first ReLU, read by the second convolution
    task.loss(model[3:](hidden), targets).backward()
    assert gate.grad is not None
    np.testing.assert_allclose(scores[first.name], gate.grad.abs().flatten().double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("score", [TaylorScore(), SnipScore(), MovementScore()], ids=lambda score: type(score).__name__)
def test_weights_are_scored_by_the_tasks_loss(score: Any) -> None:
    found = secateur.compress(
        dense_net(2),
        data_of("masks"),
        "nonzero=40%",
        task=Segmentation(),
        strategy=Knapsack(),
        **{**RUN, "cut": CutConfig(calibration_images=32, weight_pruning=WeightPruning(score))},
    )
    assert found.nonzero <= 0.4 * found.search.original.params
    assert found.report.steps[-1].name == "weights pruned and distilled"


@pytest.mark.parametrize(
    "strategy",
    [
        GlobalImportance(Taylor()),
        TAS(train=TrainConfig(1, batch_size=16, learning_rate=0.01)),
        SWP(train=TrainConfig(1, batch_size=16, learning_rate=0.01), candidates=8, held_out=16),
        SWP(
            train=TrainConfig(1, batch_size=16, learning_rate=0.01),
            candidates=8,
            held_out=16,
            cuts=(),
            supervision=Labels(),
        ),
    ],
    ids=["Taylor", "TAS", "SWP", "SWP with labels"],
)
def test_strategies_with_a_loss_search_for_other_tasks(strategy: Any) -> None:
    settings = {**RUN, "cut": CUT}
    found = secateur.compress(
        pooled_net(2), data_of("numbers"), "macs=60%", task=Regression(), strategy=strategy, **settings
    )
    assert found.search.cost.macs <= 0.6 * found.search.original.macs
    assert all(check.passed for check in found.report.checks)


def test_all_parts_of_a_strategy_get_the_task() -> None:
    task = Segmentation()
    strategy = Fastest((Knapsack(Taylor()), RemoveBlocks(GlobalImportance(Taylor()))), fewer_blocks=())
    found = with_task(strategy, task)
    first, second = found.strategies
    assert first.importance.task == task
    assert second.strategy.importance.task == task
    assert repr(found) == repr(strategy)
    assert with_task(SWP(supervision=Labels()), task).supervision.task == task
    assert with_task(WeightPruning(TaylorScore()), task).score.loss == task.loss
    own = WeightPruning(TaylorScore(loss=nn.functional.mse_loss))
    assert with_task(own, task).score.loss is nn.functional.mse_loss
    for same in (Knapsack(), RemoveBlocks(Knapsack()), WeightPruning()):
        assert with_task(same, task) is same
    assert with_task(strategy, Classification()) is strategy


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (GlobalImportance(Taylor()), "must hold targets for Taylor"),
        (TAS(), "must have targets for TAS"),
        (SWP(), "must have targets for SWP"),
    ],
    ids=["Taylor", "TAS", "SWP"],
)
def test_imitation_has_no_loss_to_search_by(strategy: Any, message: str) -> None:
    settings = {**RUN, "cut": CUT}
    with pytest.raises(DataError, match=message):
        secateur.compress(dense_net(3), data_of("nothing"), "macs=60%", task=Imitation(), strategy=strategy, **settings)


class TwoOutputs(nn.Module):
    """A net that returns a mapping, as torchvision's segmentation models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = dense_net(2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.net(x)}


def test_a_supernet_needs_one_tensor_and_says_so() -> None:
    settings = {**RUN, "cut": CUT}
    with pytest.raises(SecateurError, match="must take one tensor and return one for TAS; got dict"):
        secateur.compress(TwoOutputs(), data_of("masks"), "macs=60%", task=Segmentation(), strategy=TAS(), **settings)

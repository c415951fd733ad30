"""`compress` takes any task and the data that people have, and its report and artifact speak of their metric."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend import Pretend
from squares import RUN, NamedOutputs, SquareDetector, Squares, dense_net, pooled_net
from torch import Tensor, nn
from torch.utils.data import DataLoader

import secateur
from secateur.data.annotated import as_lists
from secateur.distill import Objective, Term
from secateur.distill.logit_losses import dist_loss
from secateur.errors import SecateurError
from secateur.search import Knapsack, Taylor
from secateur.tasks import Detection, ImageToImage, Imitation, MultiLabel, Regression, Segmentation, Task

KINDS: dict[str, tuple[Task, Any, str, str]] = {
    "segmentation": (Segmentation(), NamedOutputs, "masks", "mIoU"),
    "several labels": (MultiLabel(), lambda: pooled_net(2), "several", "mean average precision"),
    "regression": (Regression(), lambda: pooled_net(2), "numbers", "root mean squared error"),
    "one number": (Regression(absolute=True), lambda: pooled_net(2), "numbers", "mean absolute error"),
    "image to image": (ImageToImage(), lambda: dense_net(3), "images", "PSNR"),
    "imitation": (Imitation(), lambda: dense_net(3), "nothing", "distance from the original's outputs"),
    "detection": (Detection(), SquareDetector, "boxes", "mAP@0.5"),
}


def data_of(kind: str) -> Any:
    if kind == "boxes":
        return tuple(DataLoader(Squares(kind, n), batch_size=16, collate_fn=as_lists) for n in (64, 24, 24))
    return Squares(kind), Squares(kind, 24)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_every_task_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    task, make, kind, metric = KINDS[name]
    model = make()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    # The default exports and times a dozen candidates, which two tasks are enough for.
    one = {} if name in {"segmentation", "detection"} else {"strategy": Knapsack(), "target": Pretend()}
    settings = {"task": task, "out": tmp_path / "out", "export": (), **one, **RUN}
    found = secateur.compress(model, data_of(kind), "macs=60%", **settings)
    assert all(check.passed for check in found.report.checks), [c for c in found.report.checks if not c.passed]
    assert found.search.cost.macs <= 0.6 * found.search.original.macs
    assert found.report.metric.name == metric
    assert [step.score.n for step in found.report.steps] == [24] * len(found.report.steps)
    # Nothing of the way in which detectors are searched is left on the models.
    assert "forward" not in vars(found.model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    scores = json.loads((tmp_path / "out" / "secateur.json").read_text())["metrics"]["test_scores"]
    assert scores["metric"]["name"] == metric
    assert scores["steps"][0]["value"] == found.report.steps[0].score.value
    page = (tmp_path / "out" / "report.html").read_text()
    assert metric.replace("'", "&#39;") in page
    assert "top-1" not in page
    loaded = secateur.load(tmp_path / "out", factory=make).model
    again = secateur.evaluate(loaded, secateur.data.own_data(data_of(kind)).test, task=task, original=model)
    assert again.value == pytest.approx(found.report.steps[-1].score.value, rel=1e-4)


def test_imitation_ends_no_farther_than_the_repairs_left_it() -> None:
    found = secateur.compress(
        dense_net(3), Squares("nothing"), "macs=40%", task=Imitation(), strategy=Knapsack(), **RUN
    )
    steps = [step.score.value for step in found.report.steps]
    assert found.trained is not None
    assert found.trained.best_score <= found.trained.history[0].validation_score
    assert steps[0] == 0


def test_a_loader_of_ones_own_classifies_and_keeps_its_batch_size() -> None:
    loader = DataLoader(Squares("classes"), batch_size=8, shuffle=True)
    data = (loader, Squares("classes", 24))
    found = secateur.compress(pooled_net(2), data, "macs=60%", strategy=Knapsack(), target=Pretend(), **RUN)
    assert found.report.metric.is_share
    assert found.trained is not None
    assert any("No test split was given" in note for note in found.report.notes)


@pytest.mark.parametrize(
    ("data", "task", "match"),
    [
        (iter([]), Regression(), "an iterator, which can be read only once|an iterator"),
        (Squares("numbers"), Segmentation(), "logits"),
        (Squares("masks"), Regression(), "must return what the targets are"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_searched(data: Any, task: Task, match: str) -> None:
    with pytest.raises(SecateurError, match=match):
        secateur.compress(pooled_net(2), data, "macs=60%", task=task, **RUN)


class LogitsByName(nn.Module):
    """As the classifiers of transformers return them: an object whose first tensor is the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = pooled_net(2)

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        logits = self.net(x)
        return {"loss": None, "logits": logits, "embedding": logits.softmax(1)[:, :1]}


def test_a_classifier_that_returns_an_object_with_logits_goes_the_whole_way(tmp_path: Path) -> None:
    objective = Objective(terms=(Term("dist", dist_loss),))
    settings = RUN | {"recovery": replace(RUN["recovery"], objective=objective), "strategy": Knapsack(Taylor())}
    given = {"target": Pretend(), "out": tmp_path / "out", **settings}
    found = secateur.compress(LogitsByName(), data_of("classes"), "macs=60%", **given)
    alone = secateur.compress(pooled_net(2), data_of("classes"), "macs=60%", **(given | {"out": None}))
    assert all(check.passed for check in found.report.checks), [c for c in found.report.checks if not c.passed]
    assert [step.score.value for step in found.report.steps] == [step.score.value for step in alone.report.steps]
    wanted = alone.model.state_dict()
    assert all(
        torch.equal(tensor, wanted[name.removeprefix("net.")]) for name, tensor in found.model.state_dict().items()
    )
    checked = secateur.verify(tmp_path / "out", factory=LogitsByName)
    assert all(check.passed for check in checked.checks), checked


def test_a_supernet_of_a_classifier_that_returns_an_object_is_refused() -> None:
    with pytest.raises(SecateurError, match="must take one tensor and return one for SWP; got dict"):
        secateur.compress(LogitsByName(), data_of("classes"), "macs=60%", strategy=secateur.SWP(), **RUN)

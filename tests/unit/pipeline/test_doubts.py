"""What a report doubts: a model that guesses is named, one that has learned something is not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from noise_images import noise_data
from run_pipeline import run_compress
from torch import nn

from secateur.cost import count_denormals
from secateur.data import MemorySplit
from secateur.data.dataset import guessing_accuracy
from secateur.pipeline import inspect_model
from secateur.pipeline.finalize import guessing_doubt
from secateur.report import Measured, RunReport, Step
from secateur.report.html import render
from secateur.tasks import Score
from secateur.tasks.classification import TOP1
from secateur.train import Silent, TrainConfig


def _data(*counts: int):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8)
    data = noise_data()
    test = MemorySplit(images, labels, data.test.normalization)
    return replace(data, test=test, classes=tuple(map(str, range(len(counts)))))


def _step(right: int, of: int) -> Step:
    return Step("original", Score(right / of, None, of, TOP1))


@pytest.mark.parametrize(
    ("counts", "right", "doubted"),
    [
        ((500, 500), 980, False),  # Twice the chance is 100 %, which no classifier of two classes is above.
        ((500, 500), 600, False),
        ((500, 500), 510, True),
        ((950, 50), 940, True),
        ((950, 50), 980, False),
        ((340, 330, 330), 600, False),
        ((10,) * 100, 25, False),
        ((10,) * 100, 15, True),
        ((5, 5), 8, True),  # Of ten images nothing can be said.
    ],
)
def test_a_model_is_compared_with_the_most_frequent_class(counts: tuple[int, ...], right: int, doubted: bool) -> None:
    said = guessing_doubt("original", _step(right, sum(counts)), _data(*counts))
    assert bool(said) is doubted
    if said:
        assert f"about what guessing gives ({100 * max(counts) / sum(counts):.1f} %)" in said[0]


@given(st.lists(st.integers(20, 300), min_size=2, max_size=6), st.floats(0, 1))
def test_nothing_is_doubted_that_is_three_deviations_above_chance(counts: list[int], part: float) -> None:
    n, chance = sum(counts), max(counts) / sum(counts)
    above = chance + 3 * (chance * (1 - chance) / n) ** 0.5
    right = round(n * (above + part * (1 - above))) + 1
    assert right > n or guessing_doubt("original", _step(right, n), _data(*counts)) == ()
    assert guessing_doubt("original", _step(int(chance * n), n), _data(*counts))


def test_a_split_that_does_not_say_its_labels_counts_as_balanced() -> None:
    assert guessing_accuracy(object(), 4) == 0.25
    assert guessing_accuracy(_data(3, 1).test, 2) == 0.75


def _steep() -> nn.Module:
    """Without a norm, so that a high rate makes it explode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 4),
        )  # fmt: skip


@pytest.mark.parametrize(("rate", "gave_up"), [(0.5, False), (1e30, True)])
def test_a_recovery_that_diverges_is_said_and_leaves_nothing_worse(rate: float, gave_up: bool, tmp_path: Path) -> None:
    # The one-epoch training has four steps, and the third in a row that is far too high ends it.
    train, heard = TrainConfig(2, 16, learning_rate=rate, warmup_fraction=0.0), list[str]()
    result = run_compress(
        _steep(), noise_data(), budget="macs=50%", train=train, callbacks=Silent(), out=tmp_path / "out", export=(),
        hear=heard.append,
    )  # fmt: skip
    assert result.trained is not None
    assert result.trained.divergences
    assert result.trained.gave_up is gave_up
    assert set(result.trained.divergences) <= set(result.report.notes)
    assert set(result.trained.divergences) <= set(heard)
    cut, last = result.report.steps[1], result.report.steps[-1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("How accuracy came back" in page) is result.report.recovered
    if gave_up:
        assert last == cut
        assert not result.report.recovered
        assert torch.isfinite(next(result.model.parameters())).all()


def test_accuracy_came_back_only_if_it_rose() -> None:
    def report(*right: float) -> RunReport:
        steps = tuple(Step(str(n), Score(top1, None, 100, TOP1)) for n, top1 in enumerate(right))
        return RunReport("net", Measured(2, 2), Measured(1, 1), steps=steps)

    assert report(0.9, 0.5, 0.8).recovered
    assert not report(0.9, 0.5).recovered
    assert not report(0.9, 0.5, 0.5).recovered
    assert not report(0.9).recovered
    assert "Accuracy after each step" in render(report(0.9, 0.5))


def _with_denormals() -> nn.Module:
    """A net of which 60 % of the weights of two layers are denormal."""
    model = _steep()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            flat = layer.weight.view(-1)
            flat[: round(0.6 * len(flat))] = 1e-40
    return model


def test_denormal_weights_are_said_and_set_to_zero_if_asked() -> None:
    model, still = _with_denormals(), TrainConfig(0)
    settings = {"budget": "macs=60%", "train": still, "callbacks": Silent()}
    heard: list[str] = []
    told = run_compress(model, noise_data(), hear=heard.append, **settings)
    (note,) = (note for note in told.report.notes if "denormal" in note)
    assert "57.9 % of the weights and running statistics are denormal" in note
    assert "--flush-denormals" in note
    assert not any("denormal numbers to 0" in line for line in heard)
    heard.clear()
    flushed = run_compress(model, noise_data(), hear=heard.append, flush_denormals=True, **settings)
    assert not any("denormal" in note for note in flushed.report.notes)
    (said,) = (line for line in heard if "denormal" in line)
    assert said.startswith("Set 1641 denormal numbers to 0 (57.9 % of all); outputs change by at most ")
    assert count_denormals(flushed.model).counts == {}
    assert count_denormals(model).counts  # the caller's model is not changed


def test_inspect_counts_denormals() -> None:
    report = inspect_model(_with_denormals().eval(), torch.zeros(1, 3, 8, 8))
    assert report.denormals.counts == {"0.weight": 259, "2.weight": 1382}
    assert report.to_json()["denormals"] == {"fraction": 1641 / 2836, "counts": {"0.weight": 259, "2.weight": 1382}}


@pytest.mark.parametrize(("epochs", "said"), [(1, False), (2, True)])
def test_few_validation_images_that_choose_between_epochs_are_named(epochs: int, *, said: bool) -> None:
    data = noise_data()
    count = len(data.validation)
    assert 0 < count < 100
    result = run_compress(_steep(), data, budget="macs=60%", train=TrainConfig(epochs, 16), callbacks=Silent())
    assert any(f"Only {count} validation images chose the epoch" in note for note in result.report.notes) is said

"""From the words of the command line to the losses of a distillation."""

from typing import get_args

import pytest
import torch
from small_runs import Blobs, small_config

from secateur.cli.distill import (
    LOGIT_LOSSES,
    LossName,
    Pair,
    hint_terms,
    inferred_taps,
    parse_losses,
    parse_taps,
    to_objective,
)
from secateur.distill import PUBLISHED
from secateur.errors import TrainingError
from secateur.models import CifarResNet
from secateur.train import RunSettings, Silent, fit

PAIR = Pair(
    CifarResNet(1, widths=(4, 8, 12), num_classes=3).eval(), CifarResNet(1, widths=(6, 8, 20), num_classes=3).eval(),
    torch.zeros(2, 3, 8, 8), 48,
)  # fmt: skip


def test_words_name_losses_and_weights() -> None:
    assert parse_losses([]) == {"kd": PUBLISHED["kd"].weight}
    assert parse_losses(["dkd", "hint=3"]) == {"dkd": 1.0, "hint": 3.0}
    assert set(PUBLISHED) == set(get_args(LossName))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kld"], "`--loss` must be one of kd, dkd, .*; got 'kld'"),
        (["kd=x"], "must have a positive weight, such as kd=0.5; got 'kd=x'"),
        (["kd=0"], "must have a positive weight"),
        (["kd", "kd=2"], "must name each loss once; got 'kd' again"),
    ],
)
def test_other_words_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        parse_losses(words)


def test_pairs_of_modules() -> None:
    assert parse_taps(["layer1=layer2", "layer3=layer3"]) == {"layer1": "layer2", "layer3": "layer3"}
    with pytest.raises(TrainingError, match="`--hints` must pair a module of the student with one of the teacher"):
        parse_taps(["layer1"])


@pytest.mark.parametrize("name", get_args(LossName))
def test_every_loss_trains(name: str) -> None:
    taps = inferred_taps(PAIR)
    assert taps == {"layer1": "layer1", "layer2": "layer2", "layer3": "layer3"}
    objective = to_objective(
        {name: PUBLISHED[name].weight}, PAIR, taps, temperature=4.0, label_weight=0.1, label_smoothing=0.0
    )
    trained = fit(
        PAIR.student, Blobs(32), train=small_config(1, learning_rate=0.001), objective=objective,
        teacher=PAIR.teacher, run=RunSettings(callbacks=Silent()),
    )  # fmt: skip
    expected = {"rkd_distance", "rkd_angle"} if name == "rkd" else {name}
    assert set(trained.history[-1].parts) == {"label", *expected}
    assert all(torch.isfinite(torch.tensor(value)) for value in trained.history[-1].parts.values())


def test_a_first_stage_takes_the_losses_of_features() -> None:
    taps = inferred_taps(PAIR)
    hints = hint_terms({"kd": 1.0, "hint": 2.0}, PAIR, taps)
    assert [(term.name, term.weight, dict(term.taps)) for term in hints] == [("hint", 2.0, taps)]
    with pytest.raises(TrainingError, match="`--hint-epochs` must go with a loss of features; got none"):
        hint_terms(dict.fromkeys(LOGIT_LOSSES, 1.0), PAIR, taps)

"""From the words of the command line to the losses of a distillation."""

import pytest
import torch
from small_runs import Blobs, small_schedule

from secateur.cli._words import OF_LOGITS, USUAL, Pair, hints_of, inferred_taps, losses_of, objective_of, taps_of
from secateur.cli.options import LossName
from secateur.errors import TrainingError
from secateur.models import CifarResNet
from secateur.train import Silent, fit

PAIR = Pair(
    CifarResNet(1, widths=(4, 8, 12), num_classes=3).eval(), CifarResNet(1, widths=(6, 8, 20), num_classes=3).eval(),
    torch.zeros(2, 3, 8, 8), 48,
)  # fmt: skip


def test_words_name_losses_and_weights() -> None:
    assert losses_of(None) == {LossName.KD: USUAL[LossName.KD]}
    assert losses_of(["dkd", "hint=3"]) == {LossName.DKD: 1.0, LossName.HINT: 3.0}
    assert set(USUAL) == set(LossName)


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
        losses_of(words)


def test_pairs_of_modules() -> None:
    assert taps_of(["layer1=layer2", "layer3=layer3"]) == {"layer1": "layer2", "layer3": "layer3"}
    with pytest.raises(TrainingError, match="`--hints` must pair a module of the student with one of the teacher"):
        taps_of(["layer1"])


@pytest.mark.parametrize("name", LossName)
def test_every_loss_trains(name: LossName) -> None:
    taps = inferred_taps(PAIR)
    assert taps == {"layer1": "layer1", "layer2": "layer2", "layer3": "layer3"}
    objective = objective_of({name: USUAL[name]}, PAIR, taps, temperature=4.0, label_weight=0.1, label_smoothing=0.0)
    trained = fit(
        PAIR.student, Blobs(32), schedule=small_schedule(1, learning_rate=0.001), objective=objective,
        teacher=PAIR.teacher, progress=Silent(),
    )  # fmt: skip
    expected = {"rkd_distance", "rkd_angle"} if name is LossName.RKD else {name.value}
    assert set(trained.history[-1].parts) == {"label", *expected}
    assert all(torch.isfinite(torch.tensor(value)) for value in trained.history[-1].parts.values())


def test_a_first_stage_takes_the_losses_of_features() -> None:
    taps = inferred_taps(PAIR)
    hints = hints_of({LossName.KD: 1.0, LossName.HINT: 2.0}, PAIR, taps)
    assert [(term.name, term.weight, dict(term.taps)) for term in hints] == [("hint", 2.0, taps)]
    with pytest.raises(TrainingError, match="`--hint-epochs` must go with a loss of features; got none"):
        hints_of(dict.fromkeys(OF_LOGITS, 1.0), PAIR, taps)

"""Two classifiers on the same images: counts, interval, classes, confusions, and answers noted on the way."""

import math

import pytest
import torch
from scipy.stats import binom
from small_runs import Blobs, small_net

from secateur.tasks import Classification
from secateur.tasks.outcomes import Answers, NotedAnswers, PairedTest, changed_confusions, class_changes
from secateur.train import evaluate


def bits(text: str) -> torch.Tensor:
    return torch.tensor([each == "1" for each in text])


def test_only_images_with_different_answers_count():
    found = PairedTest.of(bits("1111100000"), bits("1100011100"))
    assert (found.n, found.lost, found.gained, found.change) == (10, 3, 3, 0.0)
    assert found.low == pytest.approx(-found.high)
    assert found.p_value == 1.0


def test_the_p_value_is_that_of_coin_tosses():
    found = PairedTest.of(bits("1" * 9 + "0"), bits("0" * 9 + "1"))
    # Nine or more losses out of ten, in both directions.
    assert found.p_value == pytest.approx(2 * binom.sf(8, 10, 0.5))
    assert found.high < 0


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        draws = torch.rand(300, generator=generator)
        # 6 % only the first model is right, 3 % only the second, 80 % both.
        first, second = draws < 0.86, (draws < 0.80) | ((draws >= 0.86) & (draws < 0.89))
        found = PairedTest.of(first, second)
        held += found.low <= -0.03 <= found.high
    assert 0.92 <= held / 400 <= 0.985


def test_equal_models_and_bad_input():
    same = PairedTest.of(bits("1110"), bits("1110"))
    assert (same.p_value, same.change) == (1.0, 0.0)
    assert same.low < 0 < same.high
    with pytest.raises(ValueError, match="same images as `first`"):
        PairedTest.of(bits("11"), bits("111"))
    with pytest.raises(ValueError, match="same images as `first`"):
        PairedTest.of(bits(""), bits(""))


def test_classes_and_confusions():
    labels = torch.tensor([0, 0, 1, 1, 1, 3])
    before = Answers(torch.tensor([0, 0, 1, 1, 0, 3]), labels)
    after = Answers(torch.tensor([0, 1, 1, 1, 1, 0]), labels)
    rows = [(c.name, c.n, c.before, c.after) for c in class_changes(before, after, ("cat", "dog"))]
    assert rows == [("cat", 2, 2, 1), ("dog", 3, 2, 3), ("3", 1, 1, 0)]
    assert changed_confusions(before, after, ("cat", "dog")) == (
        ("cat", "dog", 0, 1), ("3", "cat", 0, 1), ("dog", "cat", 1, 0),
    )  # fmt: skip


def test_noting_answers_changes_no_score():
    split, net = Blobs(50), small_net()
    noted = NotedAnswers(Classification())
    score = evaluate(net, split, task=noted, batch_size=16, device=torch.device("cpu"))
    plain = evaluate(net, split, batch_size=16, device=torch.device("cpu"))
    assert (score.value, score.loss, score.n) == (plain.value, plain.loss, plain.n)
    assert noted.answers is not None
    assert torch.equal(noted.answers.labels, split.labels)
    assert math.isclose(float(noted.answers.right.float().mean()), score.value, abs_tol=1e-6)
    again = evaluate(net, split, task=noted, batch_size=16, device=torch.device("cpu"))
    assert len(noted.answers.labels) == again.n == 50

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from secateur.distill import pkt_loss, rkd_angle_loss, rkd_distance_loss, similarity_loss
from secateur.errors import TrainingError


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The two features have other sizes and scales: no relation may depend on them.
STUDENT, TEACHER = random(5, 2, 3, seed=1), 4 * random(5, 7, seed=2) + 1
ROWS = [x.flatten(1).numpy() for x in (STUDENT, TEACHER)]
IMAGES = range(5)


def huber(x: float) -> float:
    return x * x / 2 if abs(x) <= 1 else abs(x) - 0.5


def test_rkd_distance_is_its_formula_pair_by_pair() -> None:
    relative = []
    for rows in ROWS:
        d = {(i, j): math.dist(rows[i], rows[j]) for i in IMAGES for j in IMAGES}
        mu = sum(d.values()) / 20
        relative.append({pair: value / mu for pair, value in d.items()})
    expected = sum(huber(relative[0][p] - relative[1][p]) for p in relative[0]) / 25
    assert rkd_distance_loss(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-12)


def test_rkd_angle_is_its_formula_triple_by_triple() -> None:
    def cosine(rows: np.ndarray, i: int, j: int, k: int) -> float:
        if i == j or k == j:
            return 0.0
        a, b = rows[i] - rows[j], rows[k] - rows[j]
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    triples = [(i, j, k) for i in IMAGES for j in IMAGES for k in IMAGES]
    expected = sum(huber(cosine(ROWS[0], *t) - cosine(ROWS[1], *t)) for t in triples) / 125
    assert rkd_angle_loss(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-11)


def test_similarity_is_its_formula_row_by_row() -> None:
    grams = []
    for rows in ROWS:
        gram = np.array([[rows[i] @ rows[j] for j in IMAGES] for i in IMAGES])
        grams.append(np.stack([row / np.linalg.norm(row) for row in gram]))
    expected = np.linalg.norm(grams[0] - grams[1]) ** 2 / 25
    assert similarity_loss(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-12)


def test_pkt_is_its_formula_image_by_image() -> None:
    probabilities = []
    for rows in ROWS:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        kernel = np.array([[(unit[i] @ unit[j] + 1) / 2 for j in IMAGES] for i in IMAGES])
        probabilities.append(kernel / kernel.sum(1, keepdims=True))
    q, p = probabilities
    expected = sum(p[i, j] * math.log(p[i, j] / q[i, j]) for i in IMAGES for j in IMAGES) / 25
    assert pkt_loss(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-12)


LOSSES = [rkd_distance_loss, rkd_angle_loss, similarity_loss, pkt_loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_agree_with_finite_differences_and_the_teacher_gets_none(loss) -> None:
    student, teacher = random(4, 3, seed=3).requires_grad_(), random(4, 2, seed=4).requires_grad_()
    assert gradcheck(lambda s: loss(s, teacher.detach()), (student,))
    loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("loss", LOSSES)
def test_a_rotated_and_scaled_copy_has_zero_loss(loss) -> None:
    feature = random(6, 4, seed=5)
    rotation = torch.linalg.qr(random(4, 4, seed=6))[0]
    assert loss(3 * feature @ rotation, feature).item() == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_and_zero_images_give_finite_losses_and_gradients(loss) -> None:
    student = torch.zeros(4, 3)
    student[2] = 1.0
    for feature in (student, torch.zeros(4, 3)):
        feature.requires_grad_()
        value = loss(feature, random(4, 3, seed=7).float())
        (gradient,) = torch.autograd.grad(value, feature)
        assert torch.isfinite(torch.cat([value.detach().reshape(1), gradient.flatten()])).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_is_as_good_as_the_formula(loss) -> None:
    # A mean far from zero: where inner products would lose the digits of differences.
    student, teacher = 50 + random(8, 16, seed=8), random(8, 4, seed=9)
    assert loss(student.float(), teacher.float()).item() == pytest.approx(loss(student, teacher).item(), rel=1e-3)
    assert loss(student.bfloat16(), teacher.bfloat16()).dtype is torch.float32


@pytest.mark.parametrize("loss", LOSSES)
def test_features_of_other_images_are_refused(loss) -> None:
    with pytest.raises(TrainingError, match=r"of the same images; got \(4, 3\) and \(5, 3\)\. Tap modules whose"):
        loss(torch.zeros(4, 3), torch.zeros(5, 3))
    with pytest.raises(TrainingError, match=r"`student` must hold at least [23] images.*; got 1\. Use larger batches"):
        loss(torch.zeros(1, 3), torch.zeros(1, 3))

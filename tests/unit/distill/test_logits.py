import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from secateur.distill import dist_loss, dkd_loss, kd_loss, standardize_logits, standardized_kd_loss
from secateur.errors import TrainingError


def random(*shape: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


LABELS = torch.tensor([0, 4, 2, 2, 1, 3])


@pytest.mark.parametrize(("temperature", "alpha", "beta"), [(1.0, 1.0, 1.0), (4.0, 1.0, 8.0), (2.0, 0.0, 3.0)])
def test_dkd_is_its_formula_image_by_image(temperature: float, alpha: float, beta: float) -> None:
    student, teacher = random(6, 5, seed=1), random(6, 5, seed=2)
    expected = 0.0
    for zs, zt, label in zip(student.numpy(), teacher.numpy(), LABELS.tolist(), strict=True):
        qs, qt = softmax(zs / temperature), softmax(zt / temperature)
        tckd = qt[label] * math.log(qt[label] / qs[label])
        tckd += (1 - qt[label]) * math.log((1 - qt[label]) / (1 - qs[label]))
        nckd = 0.0
        for c in range(5):
            if c != label:
                pt, ps = qt[c] / (1 - qt[label]), qs[c] / (1 - qs[label])
                nckd += pt * math.log(pt / ps)
        expected += temperature**2 * (alpha * tckd + beta * nckd) / 6
    loss = dkd_loss(student, teacher, LABELS, temperature=temperature, alpha=alpha, beta=beta)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_kd_is_dkd_with_one_minus_the_teachers_label_probability_as_beta() -> None:
    # Eq. (6) of the paper, for one image: KD = TCKD + (1 - q_label) NCKD.
    student, teacher = random(1, 5, seed=3), random(1, 5, seed=4)
    doubt = 1 - softmax(teacher[0].numpy() / 4.0)[2]
    loss = dkd_loss(student, teacher, torch.tensor([2]), temperature=4.0, alpha=1.0, beta=doubt)
    assert loss.item() == pytest.approx(kd_loss(student, teacher, temperature=4.0).item(), rel=1e-12)


def test_dkd_of_a_fully_confident_teacher_is_finite() -> None:
    teacher = torch.tensor([[200.0, 0.0, 1.0]])
    student = torch.tensor([[0.0, 0.0, 0.0]], requires_grad=True)
    loss = dkd_loss(student, teacher, torch.tensor([0]), temperature=1.0)
    loss.backward()
    assert student.grad is not None
    assert torch.isfinite(torch.cat([loss.detach().reshape(1), student.grad.flatten()])).all()


@pytest.mark.parametrize(("temperature", "inter", "intra"), [(1.0, 1.0, 1.0), (4.0, 2.0, 0.5)])
def test_dist_is_its_formula_by_numpys_correlation(temperature: float, inter: float, intra: float) -> None:
    student, teacher = random(6, 5, seed=5), random(6, 5, seed=6)
    ys = np.stack([softmax(z / temperature) for z in student.numpy()])
    yt = np.stack([softmax(z / temperature) for z in teacher.numpy()])
    rows = np.mean([1 - np.corrcoef(ys[i], yt[i])[0, 1] for i in range(6)])
    columns = np.mean([1 - np.corrcoef(ys[:, j], yt[:, j])[0, 1] for j in range(5)])
    loss = dist_loss(student, teacher, temperature=temperature, inter=inter, intra=intra)
    assert loss.item() == pytest.approx(temperature**2 * (inter * rows + intra * columns), rel=1e-10)


def test_dist_of_one_image_counts_its_classes_as_uncorrelated() -> None:
    student = random(1, 5, seed=7).requires_grad_()
    loss = dist_loss(student, student.detach() + 3.0, temperature=1.0, inter=1.0, intra=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(1.0, abs=1e-12)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_standardized_logits_are_numpys_z_scores() -> None:
    logits = 5 * random(6, 7, seed=8) + 3
    z = logits.numpy()
    expected = (z - z.mean(1, keepdims=True)) / z.std(1, keepdims=True)
    np.testing.assert_allclose(standardize_logits(logits).numpy(), expected, rtol=1e-12)


def test_standardized_kd_is_invariant_to_scale_and_shift() -> None:
    student, teacher = random(6, 5, seed=9), random(6, 5, seed=10)
    loss = standardized_kd_loss(student, teacher).item()
    z = [(x.numpy() - x.numpy().mean(1, keepdims=True)) / x.numpy().std(1, keepdims=True) for x in (student, teacher)]
    expected = 0.0
    for s, t in zip(*z, strict=True):
        q, p = softmax(s / 2.0), softmax(t / 2.0)
        expected += 4.0 * (p * np.log(p / q)).sum() / 6
    assert loss == pytest.approx(expected, rel=1e-12)
    assert standardized_kd_loss(7 * student + 1, 0.1 * teacher - 2).item() == pytest.approx(loss, rel=1e-10)


def test_constant_logits_standardize_to_zero_with_a_finite_gradient() -> None:
    logits = torch.full((2, 3), 4.0, requires_grad=True)
    standardize_logits(logits).sum().backward()
    assert torch.equal(standardize_logits(logits), torch.zeros(2, 3))
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


LOSSES = {
    "dkd": lambda s, t: dkd_loss(s, t, LABELS[:3] % 4, temperature=2.0),
    "dist": lambda s, t: dist_loss(s, t, temperature=2.0),
    "standardized": standardized_kd_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences_and_the_teacher_gets_none(name: str) -> None:
    student, teacher = random(3, 4, seed=11).requires_grad_(), random(3, 4, seed=12).requires_grad_()
    assert gradcheck(lambda z: LOSSES[name](z, teacher.detach()), (student,))
    LOSSES[name](student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_equal_logits_have_zero_loss(name: str) -> None:
    logits = random(3, 4, seed=13)
    assert LOSSES[name](logits, logits).item() == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    student, teacher = random(3, 4, seed=14).bfloat16(), random(3, 4, seed=15).bfloat16()
    loss = LOSSES[name](student, teacher)
    assert loss.dtype is torch.float32
    assert torch.equal(loss, LOSSES[name](student.float(), teacher.float()))


@pytest.mark.parametrize("name", LOSSES)
def test_other_classes_are_refused(name: str) -> None:
    with pytest.raises(TrainingError, match=r"got \(3, 4\) and \(3, 5\)\. Use a teacher with the student's classes"):
        LOSSES[name](torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(TrainingError, match=r"`student_logits` must have at least 2 classes; got 1\. Use `kd_loss`"):
        LOSSES[name](torch.zeros(3, 1), torch.zeros(3, 1))


def test_labels_must_be_indices_of_the_batch() -> None:
    logits = torch.zeros(3, 4)
    with pytest.raises(TrainingError, match=r"`labels` must be class indices of shape \(3,\); got torch.int64 \(2,\)"):
        dkd_loss(logits, logits, torch.tensor([0, 1]))
    with pytest.raises(TrainingError, match=r"got torch.float32 \(3,\)\. Give the labels of the batch, not one-hot"):
        dkd_loss(logits, logits, torch.zeros(3))


def test_numbers_out_of_range_are_refused() -> None:
    logits = torch.zeros(3, 4)
    with pytest.raises(TrainingError, match=r"`alpha` must be finite and not negative; got -1\.0"):
        dkd_loss(logits, logits, LABELS[:3], alpha=-1.0)
    with pytest.raises(TrainingError, match="`beta` must be finite and not negative; got nan"):
        dkd_loss(logits, logits, LABELS[:3], beta=math.nan)
    with pytest.raises(TrainingError, match="`inter` must be finite"):
        dist_loss(logits, logits, inter=math.inf)
    with pytest.raises(TrainingError, match="`intra` must be finite"):
        dist_loss(logits, logits, intra=-2.0)
    for loss in (
        lambda: dkd_loss(logits, logits, LABELS[:3], temperature=0.0),
        lambda: dist_loss(logits, logits, temperature=0.0),
        lambda: standardized_kd_loss(logits, logits, temperature=0.0),
    ):
        with pytest.raises(TrainingError, match=r"`temperature` must be positive and finite; got 0\.0"):
            loss()

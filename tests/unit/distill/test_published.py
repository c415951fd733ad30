"""The losses compared with those of torchdistill, a published implementation (the ``bench`` extra)."""

import math

import pytest
import torch
from torch import nn

from secateur.distill import (
    VariationalInformation,
    attention_loss,
    contrastive_loss,
    dist_loss,
    kd_loss,
    pkt_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    standardized_kd_loss,
)

published = pytest.importorskip(
    "torchdistill.losses.mid_level", reason="torchdistill is not installed: pip install 'secateur[bench]'"
)

PLACES = ("m", "output", "m", "output")
PAIR = {"p": {"student": {"path": "m", "io": "output"}, "teacher": {"path": "m", "io": "output"}}}


def random(*shape: int, seed: int) -> torch.Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theirs(loss: nn.Module, student: object, teacher: torch.Tensor) -> float:
    return float(loss({"m": {"output": student}}, {"m": {"output": teacher}}))


STUDENT, TEACHER = random(6, 5, seed=1), random(6, 5, seed=2)
MAPS = random(6, 4, 3, 3, seed=3), random(6, 4, 3, 3, seed=4)


def test_logit_losses_agree() -> None:
    kd = theirs(published.KDLoss(*PLACES, temperature=4.0, alpha=0.0), STUDENT, TEACHER)
    assert kd_loss(STUDENT, TEACHER, temperature=4.0).item() == pytest.approx(16 * kd, rel=1e-6)
    dist = theirs(published.DISTLoss(*PLACES, beta=2.0, gamma=0.5, tau=4.0), STUDENT, TEACHER)
    assert dist_loss(STUDENT, TEACHER, temperature=4.0, inter=2.0, intra=0.5).item() == pytest.approx(dist, rel=1e-6)
    # Theirs divides by the unbiased deviation: ours at a temperature higher by sqrt(5 / 4).
    higher = 2.0 * math.sqrt(5 / 4)
    standard = theirs(published.LogitStdKDLoss(*PLACES, temperature=2.0, alpha=0.0), STUDENT, TEACHER)
    ours = standardized_kd_loss(STUDENT, TEACHER, temperature=higher).item() / higher**2
    assert ours == pytest.approx(standard, rel=1e-6)


def test_feature_losses_agree() -> None:
    attention = theirs(published.ATLoss(PAIR, mode="code"), *MAPS)
    assert attention_loss(*MAPS).item() == pytest.approx(attention, rel=1e-6)
    vid = VariationalInformation(nn.Identity(), 4).double()
    predicted = (MAPS[0], vid.variance.detach()[:, None, None])
    assert vid(*MAPS).item() == pytest.approx(theirs(published.VIDLoss(PAIR), predicted, MAPS[1]), rel=1e-6)


def test_relational_losses_agree() -> None:
    rows = [x.flatten(1) for x in MAPS]
    pkt = theirs(published.PKTLoss(*PLACES, eps=1e-12), *rows)
    assert pkt_loss(*MAPS).item() == pytest.approx(pkt, rel=1e-6)
    # Their SPKDLoss divides rows by the sum of magnitudes, not by the L2 norm of the paper: not compared.
    for ours, factors in ((rkd_distance_loss, (1.0, 0.0)), (rkd_angle_loss, (0.0, 1.0))):
        rkd = theirs(published.RKDLoss("m", "m", *factors, reduction="mean"), *MAPS)
        assert ours(*MAPS).item() == pytest.approx(rkd, rel=1e-6)


def test_contrastive_losses_agree() -> None:
    positive, negatives = random(6, seed=5).tanh(), random(6, 7, seed=6).tanh()
    crd = published.CRDLoss.__new__(published.CRDLoss)
    nn.Module.__init__(crd)
    crd.eps, crd.num_samples = 0.0, 20
    probabilities = (torch.cat([positive[:, None], negatives], 1) / 0.5).exp() / 30.0
    expected = crd.compute_contrast_loss(probabilities[:, :, None]).item()
    loss = contrastive_loss(positive, negatives, temperature=0.5, samples=20, scale=30.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)

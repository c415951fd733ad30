"""Every loss with its weight, as the command line builds it, is the loss of the reference code with its own weight.

The reference formulas are written here anew, from the code that `PUBLISHED` names, on the same features.
"""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.cli.distill import LossName, Pair, to_objective
from secateur.distill import PUBLISHED, BatchOutputs, Term, dkd_loss, published_label_weight, select_pooled_features
from secateur.errors import TrainingError

BATCH, CLASSES = 6, 5


class Net(nn.Module):
    """Two stages whose outputs have the same shapes in student and teacher, so that adaptors are identities."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


def random(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TAPS = {"layer1": "layer1", "layer2": "layer2"}
LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
ZS, ZT = random(BATCH, CLASSES, seed=1), random(BATCH, CLASSES, seed=2)
SHAPES = (BATCH, 4, 8, 8), (BATCH, 6, 4, 4)
FS = [random(*shape, seed=3 + i) for i, shape in enumerate(SHAPES)]
FT = [random(*shape, seed=5 + i) for i, shape in enumerate(SHAPES)]


def kl(log_q: Tensor, p: Tensor) -> Tensor:
    return (p * (p.log() - log_q)).sum(1).mean()


def of_kd() -> Tensor:
    return 0.9 * 16 * kl((ZS / 4).log_softmax(1), (ZT / 4).softmax(1))


def of_dkd() -> Tensor:
    one = F.one_hot(LABELS, CLASSES).bool()
    qs, qt = (ZS / 4).softmax(1), (ZT / 4).softmax(1)

    def two(q: Tensor) -> Tensor:
        return torch.stack([q[one], 1 - q[one]], 1)

    others = [z[~one].reshape(BATCH, CLASSES - 1) / 4 for z in (ZS, ZT)]
    return 16 * (1.0 * kl(two(qs).log(), two(qt)) + 8.0 * kl(others[0].log_softmax(1), others[1].softmax(1)))


def of_dist() -> Tensor:
    def pearson(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)])

    s, t = (ZS / 4).softmax(1), (ZT / 4).softmax(1)
    return 16 * (2.0 * (1 - pearson(s, t)).mean() + 2.0 * (1 - pearson(s.T, t.T)).mean())


def of_standardized() -> Tensor:
    # The reference divides by the unbiased deviation, ours by the biased one of the paper.
    s, t = ((z - z.mean(1, keepdim=True)) / z.std(1, correction=0, keepdim=True) / 2 for z in (ZS, ZT))
    return 9 * 4 * kl(s.log_softmax(1), t.softmax(1))


def of_hint() -> Tensor:
    return sum((100 * (s - t).square().mean() for s, t in zip(FS, FT, strict=True)), torch.zeros(())) / 2


def of_attention() -> Tensor:
    def at(x: Tensor) -> Tensor:
        return F.normalize(x.pow(2).mean(1).flatten(1))

    return 1000 * sum(((at(s) - at(t)).pow(2).mean() for s, t in zip(FS, FT, strict=True)), torch.zeros(()))


def of_vid() -> Tensor:
    # 5 is the initial variance; the regressors are identities here.
    parts = [((s - t).square() / 5 + math.log(5)).mean() / 2 for s, t in zip(FS, FT, strict=True)]
    return 1.0 * (parts[0] + parts[1])


def of_rkd() -> Tensor:
    s, t = FS[-1].mean((2, 3)), FT[-1].mean((2, 3))

    def distances(f: Tensor) -> Tensor:
        d = (f[:, None] - f[None]).square().sum(2).clamp(min=1e-24).sqrt() * (1 - torch.eye(BATCH))
        return d / d[d > 1e-6].mean()

    def angles(f: Tensor) -> Tensor:
        e = F.normalize(f[None] - f[:, None], dim=2)
        return torch.bmm(e, e.transpose(1, 2))

    return 25 * F.smooth_l1_loss(distances(s), distances(t)) + 50 * F.smooth_l1_loss(angles(s), angles(t))


def of_sp() -> Tensor:
    s, t = (F.normalize(f.flatten(1) @ f.flatten(1).T) for f in (FS[-1], FT[-1]))
    return 3000 * (s - t).square().sum() / BATCH**2


def of_pkt() -> Tensor:
    kernels = [(F.normalize(f.mean((2, 3))) @ F.normalize(f.mean((2, 3))).T + 1) / 2 for f in (FS[-1], FT[-1])]
    q, p = (k / k.sum(1, keepdim=True) for k in kernels)
    return 30000 * (p * torch.log((p + 1e-7) / (q + 1e-7))).mean()


REFERENCES: dict[str, Callable[[], Tensor]] = {
    "kd": of_kd, "dkd": of_dkd, "dist": of_dist, "standardized": of_standardized, "hint": of_hint,
    "attention": of_attention, "vid": of_vid, "rkd": of_rkd, "sp": of_sp, "pkt": of_pkt,
}  # fmt: skip
PAIR = Pair(Net(), Net(), torch.zeros(2, 3, 8, 8), 48)


def built(name: str, weight: float) -> tuple[float, tuple[Term, ...]]:
    objective = to_objective(
        {name: weight}, PAIR, TAPS, temperature=4.0, label_weight=published_label_weight([name]), label_smoothing=0.0
    )
    return objective.kd_weight, objective.terms


@pytest.mark.parametrize("name", REFERENCES)
def test_weight_and_loss_are_those_of_the_reference(name: str) -> None:
    kd_weight, terms = built(name, PUBLISHED[name].weight)
    if name == "kd":
        from secateur.distill import kd_loss

        found = kd_weight * kd_loss(ZS, ZT, temperature=4.0)
    else:
        features = dict(zip(TAPS, zip(FS, FT, strict=True), strict=True))
        batches = [
            BatchOutputs(LABELS, ZS, ZT, *(tuple(features[tap][i] for tap in term.taps) for i in (0, 1)))
            for term in terms
        ]
        found = torch.stack([term.weight * term(batch) for term, batch in zip(terms, batches, strict=True)]).sum()
    assert found.item() == pytest.approx(REFERENCES[name]().item(), rel=2e-4)


def test_the_others_have_their_published_weights_too() -> None:
    # ReviewKD and CRD have layers of their own: their losses are compared in test_review and test_contrast.
    assert set(get_args(LossName)) == set(PUBLISHED) == {*REFERENCES, "crd", "review"}
    assert (PUBLISHED["crd"].weight, PUBLISHED["review"].weight) == (0.8, 1.0)
    assert [term.weight for name in ("crd", "review") for term in built(name, PUBLISHED[name].weight)[1]] == [0.8, 1.0]


def test_the_labels_count_as_published_with_each_loss() -> None:
    assert {name: published_label_weight([name]) for name in PUBLISHED} == {
        **dict.fromkeys(PUBLISHED, 1.0), "kd": 0.1, "standardized": 0.1,
    }  # fmt: skip
    assert published_label_weight(["kd", "hint"]) == 1.0
    assert published_label_weight(["python:mine:loss"]) == 1.0


def test_warm_ups_end_every_epoch_with_the_weight_of_the_reference() -> None:
    for name in ("dkd", "review"):
        (term,) = built(name, 2.0)[1]
        for epoch in (1, 7, 20, 21, 240):
            assert term.weight_at(epoch / 240) == pytest.approx(2.0 * min(epoch / 20, 1))
    (plain,) = built("dist", 2.0)[1]
    assert plain.weight_at(1e-6) == 2.0


def test_a_warm_up_is_part_of_the_objective_and_of_its_description() -> None:
    from secateur.distill import Objective, select_labeled_logits

    term = Term("dkd", dkd_loss, select_labeled_logits, 1.0, warmup_fraction=0.5)
    objective = Objective(kd_weight=0.0, label_weight=0.0, terms=(term,))
    whole, part = (
        _total(objective, progress) for progress in (1.0, 0.125)
    )  # fmt: skip
    assert part == pytest.approx(whole / 4, rel=1e-6)
    assert "warmup_fraction=0.5" in term.description
    assert "warmup" not in Term("dkd", dkd_loss, select_labeled_logits).description
    with pytest.raises(TrainingError, match=r"`warmup_fraction` must be in \[0, 1\]; got 2"):
        Term("dkd", dkd_loss, warmup_fraction=2)


def _total(objective, progress: float) -> float:
    with objective.record(PAIR.student, PAIR.teacher) as recorder:
        total, _ = objective(ZS, teacher_logits=ZT, labels=LABELS, recorder=recorder, progress=progress)
    return total.item()


def test_pooling_leaves_vectors_alone() -> None:
    batch = BatchOutputs(LABELS, ZS, ZT, (FS[0], random(6, 3, 4, seed=9), ZS), (FT[0], random(6, 3, 4, seed=8), ZT))
    student, _ = select_pooled_features(batch)
    assert [tuple(f.shape) for f in student] == [(6, 4), (6, 4), (6, 5)]
    assert torch.equal(student[2], ZS)

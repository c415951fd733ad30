import copy
import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from secateur.distill import ContrastiveRepresentation, contrastive_loss
from secateur.errors import TrainingError


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_loss_is_its_formula_pair_by_pair(scale: float) -> None:
    positive, negatives = random(3, seed=1).tanh(), random(3, 4, seed=2).tanh()
    samples, temperature = 10, 0.5

    def probability(x: float) -> float:
        u = math.exp(x / temperature) / scale
        return u / (u + 4 / samples)

    expected = sum(-math.log(probability(x)) for x in positive.tolist())
    expected -= sum(math.log(1 - probability(x)) for row in negatives.tolist() for x in row)
    loss = contrastive_loss(positive, negatives, temperature=temperature, samples=samples, scale=scale)
    assert loss.item() == pytest.approx(expected / 3, rel=1e-12)
    tensor = contrastive_loss(
        positive, negatives, temperature=temperature, samples=samples, scale=torch.tensor(scale, dtype=torch.float64)
    )
    assert tensor.item() == pytest.approx(expected / 3, rel=1e-12)


def test_gradients_agree_with_finite_differences() -> None:
    positive, negatives = random(3, seed=3).tanh().requires_grad_(), random(3, 4, seed=4).tanh().requires_grad_()
    assert gradcheck(lambda p, n: contrastive_loss(p, n, temperature=0.5, samples=9), (positive, negatives))


def test_loss_does_not_overflow_at_a_low_temperature() -> None:
    positive, negatives = torch.tensor([-1.0]), torch.tensor([[1.0]])
    loss = contrastive_loss(positive, negatives, temperature=0.001, samples=1)
    assert loss.item() == pytest.approx(2000.0, rel=1e-6)


def crd(**changed: int) -> ContrastiveRepresentation:
    return ContrastiveRepresentation(3, 5, **{"size": 8, "negatives": 4, "dimension": 6, "seed": 1, **changed})


BATCHES = [
    (random(4, 3, 2, 2, seed=10 + k), random(4, 5, 2, 2, seed=20 + k), torch.tensor([k, 1 - k, 2, 3])) for k in (0, 1)
]


def test_the_module_equals_the_formula_on_negatives_drawn_from_its_bank() -> None:
    module = crd().double()
    banks = module.student_bank.clone(), module.teacher_bank.clone()
    student, teacher, labels = BATCHES[0]
    drawn = module._draw(labels)
    assert drawn.shape == (4, 4)
    s = F.normalize(student.mean((2, 3)) @ module.student_head.weight.T + module.student_head.bias, dim=1)
    t = F.normalize(teacher.mean((2, 3)) @ module.teacher_head.weight.T + module.teacher_head.bias, dim=1)
    expected = 0.0
    for anchor, other, bank in ((s, t, banks[1]), (t, s, banks[0])):
        positive = torch.stack([anchor[i] @ other[i] for i in range(4)])
        negatives = torch.stack([torch.stack([anchor[i] @ bank[j] for j in drawn[i]]) for i in range(4)])
        u = torch.exp(torch.cat([positive[:, None], negatives], 1) / 0.07)
        scale = u.mean().item() * 8
        expected += contrastive_loss(positive, negatives, temperature=0.07, samples=8, scale=scale).item()
    assert module(student, teacher, labels).item() == pytest.approx(expected, rel=1e-6)
    # The oldest four slots now hold the batch.
    torch.testing.assert_close(module.student_bank, torch.cat([s.detach(), banks[0][4:]]))
    torch.testing.assert_close(module.teacher_bank, torch.cat([t.detach(), banks[1][4:]]))
    assert module.bank_labels.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


def test_bank_overwrites_the_oldest_and_keeps_its_scale() -> None:
    module = crd(size=6)
    for student, teacher, labels in BATCHES:
        module(student.float(), teacher.float(), labels)
        scales = module.scales.clone()
    assert module.bank_labels.tolist() == [2, 3, 2, 3, 1, 0]
    assert (int(module.position), int(module.steps)) == (2, 2)
    module(*(x.float() for x in BATCHES[0][:2]), BATCHES[0][2])
    assert torch.equal(module.scales, scales)


def test_negatives_are_of_other_classes_and_drawn_evenly() -> None:
    module = crd(size=8, negatives=6000)
    module.bank_labels = torch.tensor([0, 0, 1, 1, 2, -1, 0, 1])
    drawn = module._draw(torch.tensor([0, 1]))
    for row, allowed in zip(drawn, ({2, 3, 4, 5, 7}, {0, 1, 4, 5, 6}), strict=True):
        counts = torch.bincount(row, minlength=8)
        assert {slot for slot, count in enumerate(counts.tolist()) if count} == allowed
        # 6000 draws of probability 1/5: standard deviation 31.
        assert counts[counts > 0].sub(1200).abs().max() < 160


def test_a_copy_and_a_restored_state_dict_continue_identically() -> None:
    def run(module: ContrastiveRepresentation, batch: int) -> torch.Tensor:
        student, teacher, labels = BATCHES[batch]
        return module(student.float(), teacher.float(), labels)

    module, other = crd(), crd(seed=5)
    run(module, 0)
    copied = copy.deepcopy(module)
    other.seed = module.seed
    other.load_state_dict(module.state_dict())
    before = torch.random.get_rng_state()
    losses = [run(m, 1) for m in (module, copied, other)]
    assert torch.equal(torch.stack(losses), losses[0].expand(3))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(crd().student_bank, crd().student_bank)
    assert not torch.equal(crd().student_bank, crd(seed=2).student_bank)


def test_gradients_reach_student_and_heads_but_not_the_teacher() -> None:
    module = crd()
    student, teacher = (x.float().requires_grad_() for x in BATCHES[0][:2])
    module(student, teacher, BATCHES[0][2]).backward()
    assert teacher.grad is None
    for tensor in (student, *module.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_training_pulls_the_embeddings_of_an_image_together() -> None:
    module = crd(size=64, negatives=16)
    student, teacher = random(8, 3, seed=30).float(), random(8, 5, seed=31).float()
    labels = torch.arange(8)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(module(student, teacher, labels))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].item() < losses[0].item() / 2


def test_tokens_and_vectors_are_pooled() -> None:
    student, teacher, labels = BATCHES[0]
    as_tokens = [x.flatten(2).transpose(1, 2).float() for x in (student, teacher)]
    as_vectors = [x.mean((2, 3)).float() for x in (student, teacher)]
    losses = [crd()(*pair, labels) for pair in (as_tokens, as_vectors)]
    torch.testing.assert_close(*losses)


def test_bad_input_is_refused() -> None:
    student, teacher, labels = (*(x.float() for x in BATCHES[0][:2]), BATCHES[0][2])
    with pytest.raises(TrainingError, match=r"`size` must be at least the batch, 4; got 3\. Use a larger bank"):
        crd(size=3)(student, teacher, labels)
    with pytest.raises(TrainingError, match=r"must be features .* of the same images; got \(4, 3, 2, 2\) and \(3, 5"):
        crd()(student, teacher[:3], labels)
    with pytest.raises(TrainingError, match=r"`labels` must be class indices of shape \(4,\)"):
        crd()(student, teacher, labels[:3])
    module = crd(size=4)
    module(student, teacher, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TrainingError, match="`labels` must be of more than one class; the bank holds only"):
        module(student, teacher, torch.zeros(4, dtype=torch.int64))
    for name in ("size", "negatives", "dimension"):
        with pytest.raises(TrainingError, match=f"`{name}` must be at least 1; got 0"):
            crd(**{name: 0})
    with pytest.raises(TrainingError, match="`temperature` must be positive"):
        ContrastiveRepresentation(3, 5, size=8, temperature=0.0)
    with pytest.raises(TrainingError, match=r"shapes \(batch,\) and \(batch, N\); got \(3,\) and \(2, 4\)"):
        contrastive_loss(torch.zeros(3), torch.zeros(2, 4), temperature=1.0, samples=4)
    with pytest.raises(TrainingError, match="`samples` must be positive and finite; got 0"):
        contrastive_loss(torch.zeros(3), torch.zeros(3, 4), temperature=1.0, samples=0)
    with pytest.raises(TrainingError, match=r"`scale` must be positive and finite; got 0\.0"):
        contrastive_loss(torch.zeros(3), torch.zeros(3, 4), temperature=1.0, samples=4, scale=0.0)

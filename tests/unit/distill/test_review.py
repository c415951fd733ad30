import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from secateur.distill import AttentionFusion, KnowledgeReview, hcl_loss
from secateur.errors import TrainingError


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STUDENTS = (random(2, 3, 8, 8, seed=1), random(2, 4, 4, 4, seed=2), random(2, 6, seed=3))
TEACHERS = (random(2, 5, 8, 8, seed=4), random(2, 7, 8, 8, seed=5), random(2, 9, seed=6))


def nearest(feature: torch.Tensor, size: int) -> torch.Tensor:
    """Resize by the nearest pixel, index by index."""
    index = [i * feature.shape[2] // size for i in range(size)]
    return feature[:, :, index][:, :, :, index]


def norm(feature: torch.Tensor) -> torch.Tensor:
    """Batch norm in training mode with its initial scale and shift."""
    mean, variance = feature.mean((0, 2, 3), keepdim=True), feature.var((0, 2, 3), correction=0, keepdim=True)
    return (feature - mean) / (variance + 1e-5).sqrt()


def test_review_equals_the_figure_of_the_paper_step_by_step() -> None:
    review = KnowledgeReview((3, 4, 6), (5, 7, 9), seed=3).double()
    assert review.levels[0].enter[0].out_channels == 6
    total, fused = 0.0, None
    for level in (2, 1, 0):
        student, teacher = (
            x[level] if x[level].ndim == 4 else x[level][:, :, None, None] for x in (STUDENTS, TEACHERS)
        )
        layer = review.levels[level]
        x = norm(torch.einsum("oc,nchw->nohw", layer.enter[0].weight[:, :, 0, 0], student))
        if fused is not None:
            y = nearest(fused, x.shape[2])
            both = torch.einsum("oc,nchw->nohw", layer.attention.weight[:, :, 0, 0], torch.cat([x, y], 1))
            a, b = torch.sigmoid(both + layer.attention.bias[:, None, None]).unbind(1)
            x = a[:, None] * x + b[:, None] * y
        fused = nearest(x, teacher.shape[2])
        predicted = norm(F.conv2d(fused, layer.leave[0].weight, padding=1))
        total += hcl_loss(predicted, teacher).item()
    assert review(STUDENTS, TEACHERS).item() == pytest.approx(total, rel=1e-10)


def test_width_is_that_of_the_deepest_feature_up_to_512_or_as_given() -> None:
    def width(review: KnowledgeReview) -> int:
        return review.levels[0].enter[0].out_channels

    assert width(KnowledgeReview((3, 700), (4, 5))) == 512
    assert width(KnowledgeReview((3, 20), (4, 5))) == 20
    assert width(KnowledgeReview((3, 20), (4, 5), width=7)) == 7


def test_the_seed_determines_initial_values_and_the_random_state_is_restored() -> None:
    before = torch.random.get_rng_state()
    same, again, other = (KnowledgeReview((3, 4), (5, 6), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [review.levels[0].leave[0].weight for review in (same, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_gradients_agree_with_finite_differences_and_the_teacher_gets_none() -> None:
    review = KnowledgeReview((2, 3), (2, 2), seed=4).double()
    students = (random(2, 2, 3, 3, seed=7).requires_grad_(), random(2, 3, 2, 2, seed=8).requires_grad_())
    teachers = [random(2, 2, 3, 3, seed=9).requires_grad_(), random(2, 2, 2, 2, seed=10).requires_grad_()]
    assert gradcheck(lambda a, b: review((a, b), [t.detach() for t in teachers]), students)
    review(students, teachers).backward()
    assert all(t.grad is None for t in teachers)
    assert all(p.grad is not None for p in review.parameters())


def test_half_precision_features_are_computed_in_float32() -> None:
    review = KnowledgeReview((3, 4, 6), (5, 7, 9))
    half = review([s.bfloat16() for s in STUDENTS], [t.bfloat16() for t in TEACHERS])
    assert half.dtype is torch.float32


def test_fusion_of_the_deepest_level_has_no_attention() -> None:
    assert len(list(AttentionFusion(3, 4, 5, deepest=True).parameters())) == 6
    assert len(list(AttentionFusion(3, 4, 5, deepest=False).parameters())) == 8


def test_other_levels_are_refused() -> None:
    review = KnowledgeReview((3, 4), (5, 7)).double()
    with pytest.raises(TrainingError, match=r"`students` must be 2 maps or vectors; got \[\(2, 3, 8, 8\)\]\. Tap as"):
        review(STUDENTS[:1], TEACHERS[:1])
    with pytest.raises(TrainingError, match=r"`teachers` must be 2 maps or vectors; got"):
        review(STUDENTS[:2], (TEACHERS[0], TEACHERS[1][0]))
    with pytest.raises(TrainingError, match=r"feature \(2, 5, 8, 8\); got \(2, 7, 8, 8\)"):
        review(STUDENTS[:2], (TEACHERS[0], TEACHERS[0]))
    with pytest.raises(TrainingError, match="of the same levels; got 2 and 1"):
        KnowledgeReview((3, 4), (5,))
    with pytest.raises(TrainingError, match="of the same levels; got 0 and 0"):
        KnowledgeReview((), ())

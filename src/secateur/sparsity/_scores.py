"""What a weight is worth. Every score is higher for weights that should stay."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from secateur.errors import SparsityError
from secateur.sparsity._masks import make_permanent_
from secateur.sparsity._weights import Weights

Batch = tuple[Tensor, Tensor]
"""Inputs and labels."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""A scalar for the model's output and the labels, the mean over the batch, such as `secateur.distill.label_loss`."""


def magnitude(weights: Weights) -> dict[str, Tensor]:
    """|w|, in units of the weights.

    Args:
        weights: Of `prunable`.

    References:
        Han et al., arXiv:1506.02626.
    """
    return {name: weight.detach().abs() for name, weight in weights.items()}


def random_scores(weights: Weights, *, seed: int = 0) -> dict[str, Tensor]:
    """Uniform in [0, 1), the same on every device. Weights at exactly 0 score -inf, so that pruned ones stay so.

    Args:
        weights: Of `prunable`.
        seed: Of the draw; torch's own random state is not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _pruned_last(torch.rand(weight.shape, generator=generator).to(weight.device), weight)
        for name, weight in weights.items()
    }


def taylor(model: nn.Module, weights: Weights, batches: Iterable[Batch], loss: Loss) -> dict[str, Tensor]:
    """The squared change of the loss when a weight becomes zero, to first order.

    The mean over the batches of  (w * dL/dw)^2, in squared units of the loss. The model runs in eval mode.

    Args:
        model: Left as it is.
        weights: Of `prunable`; they name the tensors.
        batches: Inputs and labels, on the model's device.
        loss: Mean over a batch.

    Returns:
        Scores, float32 or better.

    Raises:
        SparsityError: If there are no batches, or a score is not finite.

    References:
        Molchanov et al., arXiv:1906.10771, the first-order criterion, for single weights.
    """
    sums, count = _summed(model, weights, batches, loss, lambda weight, gradient: (weight * gradient).square())
    return {name: total / count for name, total in sums.items()}


def snip(model: nn.Module, weights: Weights, batches: Iterable[Batch], loss: Loss) -> dict[str, Tensor]:
    """How much the loss depends on a weight being there.

    |w * g| / sum over all weights of |w * g|, with g the mean over the batches of dL/dw. Dimensionless, sum 1. The
    model runs in eval mode. The paper takes one batch, before training.

    Args:
        model: Left as it is.
        weights: See `taylor`.
        batches: See `taylor`.
        loss: See `taylor`.

    Returns:
        Scores, float32 or better.

    Raises:
        SparsityError: See `taylor`.

    References:
        Lee et al. (SNIP), arXiv:1810.02340, connection sensitivity.
    """
    sums, _ = _summed(model, weights, batches, loss, torch.mul)
    scores = {name: total.abs() for name, total in sums.items()}
    whole = sum(score.sum().item() for score in scores.values())
    return {name: score / (whole or 1.0) for name, score in scores.items()}


def movement(
    model: nn.Module, weights: Weights, batches: Iterable[Batch], loss: Loss, *, learning_rate: float
) -> dict[str, Tensor]:
    """Whether training moves a weight away from zero.

    Along plain SGD steps on the batches (in a copy, in eval mode):  -sum over steps of w * dL/dw, in units of the loss.
    Positive for weights that grow in magnitude; weights at exactly 0 score -inf, so that pruned ones stay so.

    Args:
        model: Left as it is.
        weights: See `taylor`.
        batches: See `taylor`; a step each.
        loss: See `taylor`.
        learning_rate: Of the steps, >= 0.

    Returns:
        Scores, float32 or better.

    Raises:
        SparsityError: See `taylor`.

    References:
        Sanh et al., arXiv:2005.07683, the accumulated score of movement pruning.
    """
    sums, _ = _summed(model, weights, batches, loss, torch.mul, learning_rate=learning_rate)
    return {name: _pruned_last(-total, weights[name]) for name, total in sums.items()}


def _summed(
    model: nn.Module,
    weights: Weights,
    batches: Iterable[Batch],
    loss: Loss,
    term: Callable[[Tensor, Tensor], Tensor],
    *,
    learning_rate: float = 0.0,
) -> tuple[dict[str, Tensor], int]:
    """The sum over batches of a function of weights and gradients, in a copy that takes a step of SGD after each."""
    copied = make_permanent_(copy.deepcopy(model)).eval()
    parameters = dict(copied.named_parameters(remove_duplicate=False))
    named = {name: parameters[name].requires_grad_() for name in weights}
    sums = {
        name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for name, weight in weights.items()
    }
    count = 0
    for inputs, labels in batches:
        with torch.enable_grad():
            value = loss(copied(inputs), labels)
        gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for (name, weight), gradient in zip(named.items(), gradients, strict=True):
                sums[name] += term(weight, gradient)
                weight.sub_(gradient, alpha=learning_rate)
        count += 1
    if not count:
        raise SparsityError("`batches` must hold at least one batch; got none. Give inputs with labels.")
    for name, total in sums.items():
        if not bool(total.isfinite().all()):
            raise SparsityError(
                f"`loss` must have finite gradients; got others in {name!r}. Check the inputs and the loss for NaN."
            )
    return sums, count


def _pruned_last(scores: Tensor, weight: Tensor) -> Tensor:
    """Scores in which a weight at exactly 0, pruned before, is the first to go."""
    return scores.masked_fill(weight == 0, -torch.inf)

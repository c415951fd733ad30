"""What a weight is worth. Every score is higher for weights that should stay.

How many weights each tensor keeps, and which: budgets, and the largest scores within them."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from secateur._runtime import Batch, copy_model
from secateur.errors import SparsityError
from secateur.prune.masks import Counts, Scores, Weights, check_density, check_same_names, make_permanent_

Loss = Callable[[Tensor, Tensor], Tensor]
"""A scalar for the model's output and the labels, the mean over the batch, such as `secateur.distill.label_loss`."""


def magnitude_scores(weights: Weights) -> dict[str, Tensor]:
    """|w|, in units of the weights.

    Args:
        weights: Of `prunable_weights`.

    References:
        Han et al., arXiv:1506.02626.
    """
    return {name: weight.detach().abs() for name, weight in weights.items()}


def random_scores(weights: Weights, *, seed: int = 0) -> dict[str, Tensor]:
    """Uniform in [0, 1), the same on every device. Weights at exactly 0 score -inf, so that pruned ones stay so.

    Args:
        weights: Of `prunable_weights`.
        seed: Of the draw; torch's own random state is not touched.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _pruned_last(torch.rand(weight.shape, generator=generator).to(weight.device), weight)
        for name, weight in weights.items()
    }


def taylor_scores(model: nn.Module, weights: Weights, batches: Iterable[Batch], loss: Loss) -> dict[str, Tensor]:
    """The squared change of the loss when a weight becomes zero, to first order.

    The mean over the batches of  (w * dL/dw)^2, in squared units of the loss. The model runs in eval mode.

    Args:
        model: Left as it is.
        weights: Of `prunable_weights`; they name the tensors.
        batches: Inputs and labels, on the model's device.
        loss: Mean over a batch.

    Returns:
        Scores, float32 or better.

    Raises:
        SparsityError: If there are no batches, or a score is not finite.

    References:
        Molchanov et al., arXiv:1906.10771, the first-order criterion, for single weights.
    """
    sums, count = _sum_over_batches(
        model, weights, batches, loss, lambda weight, gradient: (weight * gradient).square()
    )
    return {name: total / count for name, total in sums.items()}


def snip_scores(model: nn.Module, weights: Weights, batches: Iterable[Batch], loss: Loss) -> dict[str, Tensor]:
    """How much the loss depends on a weight being there.

    |w * g| / sum over all weights of |w * g|, with g the mean over the batches of dL/dw. Dimensionless, sum 1. The
    model runs in eval mode. The paper takes one batch, before training.

    Args:
        model: Left as it is.
        weights: See `taylor_scores`.
        batches: See `taylor_scores`.
        loss: See `taylor_scores`.

    Returns:
        Scores, float32 or better.

    Raises:
        SparsityError: See `taylor_scores`.

    References:
        Lee et al. (SNIP), arXiv:1810.02340, connection sensitivity.
    """
    sums, _ = _sum_over_batches(model, weights, batches, loss, torch.mul)
    scores = {name: total.abs() for name, total in sums.items()}
    whole = sum(score.sum().item() for score in scores.values())
    return {name: score / (whole or 1.0) for name, score in scores.items()}


def movement_scores(
    model: nn.Module, weights: Weights, batches: Iterable[Batch], loss: Loss, *, learning_rate: float
) -> dict[str, Tensor]:
    """Whether training moves a weight away from zero.

    Along plain SGD steps on the batches (in a copy, in eval mode):  -sum over steps of w * dL/dw, in units of the loss.
    Positive for weights that grow in magnitude; weights at exactly 0 score -inf, so that pruned ones stay so.

    Args:
        model: Left as it is.
        weights: See `taylor_scores`.
        batches: See `taylor_scores`; a step each.
        loss: See `taylor_scores`.
        learning_rate: Of the steps, >= 0.

    Returns:
        Scores, float32 or better.

    Raises:
        SparsityError: See `taylor_scores`.

    References:
        Sanh et al., arXiv:2005.07683, the accumulated score of movement pruning.
    """
    sums, _ = _sum_over_batches(model, weights, batches, loss, torch.mul, learning_rate=learning_rate)
    return {name: _pruned_last(-total, weights[name]) for name, total in sums.items()}


def _sum_over_batches(
    model: nn.Module,
    weights: Weights,
    batches: Iterable[Batch],
    loss: Loss,
    term: Callable[[Tensor, Tensor], Tensor],
    *,
    learning_rate: float = 0.0,
) -> tuple[dict[str, Tensor], int]:
    """The sum over batches of a function of weights and gradients, in a copy that takes a step of SGD after each."""
    copied = make_permanent_(copy_model(model)).eval()
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


def uniform_counts(weights: Weights, density: float | Mapping[str, float]) -> dict[str, int]:
    """Each tensor keeps round(density * n) of its n weights.

    Args:
        weights: Of `prunable_weights`, or scores of them.
        density: Kept fraction in (0, 1], one for all tensors or one for each by name, such as the widths of a PCA.

    Raises:
        SparsityError: If a density is out of range, or the names are not those of the weights.
    """
    densities = dict(density) if isinstance(density, Mapping) else dict.fromkeys(weights, density)
    check_same_names("density", densities, weights, "`weights`")
    for name, value in densities.items():
        check_density(f"density[{name!r}]" if isinstance(density, Mapping) else "density", value, dense=True)
    return {name: round(densities[name] * weight.numel()) for name, weight in weights.items()}


def erk_counts(weights: Weights, density: float) -> dict[str, int]:
    """Sparser where tensors are larger: the Erdos-Renyi kernel rule, with exactly round(density * N) of all N kept.

    The density of a tensor with dimensions d_1, d_2, ... is  epsilon * (d_1 + d_2 + ...) / (d_1 * d_2 * ...), at most
    1; one epsilon for all, such that the whole keeps ``density``. Counts are rounded down, and the largest remainders,
    the first among equals, get the rest.

    Args:
        weights: Of `prunable_weights`, or scores of them.
        density: Kept fraction of all weights together, in (0, 1].

    Raises:
        SparsityError: If ``density`` is out of range.

    References:
        Evci et al. (RigL), arXiv:1911.11134, Erdos-Renyi-Kernel (ERK).
    """
    check_density("density", density, dense=True)
    sizes = {name: weight.numel() for name, weight in weights.items()}
    sums = {name: sum(weight.shape) for name, weight in weights.items()}
    total = round(density * sum(sizes.values()))
    dense: set[str] = set()
    while True:
        free = [name for name in sizes if name not in dense]
        rest = total - sum(sizes[name] for name in dense)
        # A tensor keeps epsilon * (sum of its dimensions) weights.
        epsilon = rest / sum(sums[name] for name in free) if free else 0.0
        over = {name for name in free if epsilon * sums[name] > sizes[name]}
        if not over:
            break
        dense |= over
    exact = {name: float(sizes[name]) if name in dense else epsilon * sums[name] for name in sizes}
    counts = {name: min(math.floor(value), sizes[name]) for name, value in exact.items()}
    order = sorted((name for name in sizes if counts[name] < sizes[name]), key=lambda name: counts[name] - exact[name])
    for name in order[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def keep_largest(scores: Scores, counts: Counts) -> dict[str, Tensor]:
    """Masks of the highest scores of each tensor; among equal scores the first stay, by index.

    Args:
        scores: By name, without NaN.
        counts: How many each tensor keeps, from `uniform_counts` or `erk_counts`.

    Returns:
        bool masks with exactly so many True.

    Raises:
        SparsityError: If names differ, a count is out of range, or a score is NaN.
    """
    check_same_names("counts", counts, scores, "`scores`")
    for name, score in scores.items():
        if not 0 <= counts[name] <= score.numel():
            raise SparsityError(f"`counts` must be from 0 to {score.numel()} for {name!r}; got {counts[name]}.")
    return {name: _largest(score.flatten(), counts[name], name).view(score.shape) for name, score in scores.items()}


def keep_globally(scores: Scores, density: float) -> dict[str, Tensor]:
    """Masks of the round(density * N) highest of all N scores, whatever their tensor.

    Among equal scores the first stay, by the order of the tensors, then by index.

    Args:
        scores: By name, in one unit, without NaN; on one device.
        density: Kept fraction of all weights together, in (0, 1].

    Raises:
        SparsityError: If ``density`` is out of range, or a score is NaN.
    """
    check_density("density", density, dense=True)
    flat = torch.cat([score.flatten() for score in scores.values()])
    kept = _largest(flat, round(density * len(flat)), "all weights")
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def keep_n_of_m(scores: Scores, n: int, m: int) -> dict[str, Tensor]:
    """Masks that keep the n highest scores of every m neighbors along the input dimension.

    Neighbors have consecutive positions in dimension 1 and equal ones elsewhere, as the sparse tensor cores of GPUs
    want it (2 of 4). Among equal scores the first stay.

    Args:
        scores: By name, without NaN.
        n: Kept of each group, 1 <= n < m.
        m: Size of a group; divides dimension 1 of every tensor.

    Raises:
        SparsityError: If n and m do not fit each other, or m does not divide an input dimension.

    References:
        Mishra et al., arXiv:2104.08378.
    """
    if not 1 <= n < m:
        raise SparsityError(f"`n` and `m` must be such that 1 <= n < m; got {n} and {m}. 2 of 4 is usual.")
    bad = [f"{name} {tuple(score.shape)}" for name, score in scores.items() if score.shape[1] % m]
    if bad:
        raise SparsityError(
            f"`m` must divide the input dimension (dimension 1) of every tensor; got {m} for {', '.join(bad[:4])}"
            f"{f' and {len(bad) - 4} more' if len(bad) > 4 else ''}. Leave them out with prunable(model, exclude=...)."
        )
    masks: dict[str, Tensor] = {}
    for name, score in scores.items():
        _check_numbers(score, name)
        groups = score.movedim(1, -1).unflatten(-1, (-1, m))
        # The rank of each score in its group; equal ones by index.
        ranks = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        masks[name] = (ranks < n).flatten(-2).movedim(-1, 1).contiguous()
    return masks


def mask_density(masks: Mapping[str, Tensor]) -> float:
    """The fraction of weights that masks keep, over all of them."""
    kept = sum(int(mask.sum()) for mask in masks.values())
    return kept / sum(mask.numel() for mask in masks.values())


def _largest(flat: Tensor, count: int, name: str) -> Tensor:
    """Exactly so many True, at the highest values; the first among equals. In linear time, without sorting."""
    _check_numbers(flat, name)
    if count == 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    threshold = flat.kthvalue(len(flat) - count + 1).values
    kept = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    kept[ties[: count - int(kept.sum())]] = True
    return kept


def _check_numbers(score: Tensor, name: str) -> None:
    if bool(score.isnan().any()):
        raise SparsityError(f"`scores` must be numbers; got NaN in {name!r}. Check the weights they were made from.")

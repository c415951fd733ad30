"""Scores of single weights, higher for those to keep, and the masks that keep the highest scores within a budget."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from secateur._batches import call_model
from secateur._runtime import Batch, copy_model, with_recurrent_gradients_
from secateur.errors import SparsityError
from secateur.prune.masks import Counts, Scores, Weights, check_density, check_same_names, make_permanent_

Loss = Callable[[Tensor, Tensor], Tensor]
"""A function of the model's output and the labels: the mean loss of the batch, as `secateur.distill.label_loss`."""


def magnitude_scores(weights: Weights) -> dict[str, Tensor]:
    """Return |w|, in units of the weights.

    Args:
        weights: The result of `prunable_weights`.

    References:
        Han et al., arXiv:1506.02626.
    """
    return {name: weight.detach().abs() for name, weight in weights.items()}


def random_scores(weights: Weights, *, seed: int = 0) -> dict[str, Tensor]:
    """Return uniform numbers in [0, 1), the same on every device. Weights of exactly 0 score -inf and stay pruned.

    Args:
        weights: The result of `prunable_weights`.
        seed: The random seed; the global random state of torch is not used.
    """
    # On the CPU, because a GPU draws other numbers from the same seed.
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _pruned_last(torch.rand(weight.shape, generator=generator).to(weight.device), weight)
        for name, weight in weights.items()
    }


def taylor_scores(model: nn.Module, weights: Weights, batches: Iterable[Batch], loss: Loss) -> dict[str, Tensor]:
    """Return the squared change of the loss when a weight becomes zero, to first order.

    The mean over the batches of  (w * dL/dw)^2, in squared units of the loss. The model runs in eval mode.

    Args:
        model: Not modified.
        weights: The result of `prunable_weights`, for the names of the tensors.
        batches: Inputs and labels, on the model's device.
        loss: The mean loss of a batch.

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
    """Return the connection sensitivity: how much the loss depends on the presence of a weight.

    |w * g| / sum over all weights of |w * g|, with g the mean over the batches of dL/dw. Dimensionless, sum 1. The
    model runs in eval mode. The paper takes one batch, before training.

    Args:
        model: Not modified.
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
    # The sum over the batches of w * g is their number times w * mean(g), and the division below cancels the number.
    scores = {name: total.abs() for name, total in sums.items()}
    whole = sum(score.sum().item() for score in scores.values())
    return {name: score / (whole or 1.0) for name, score in scores.items()}


def movement_scores(
    model: nn.Module, weights: Weights, batches: Iterable[Batch], loss: Loss, *, learning_rate: float
) -> dict[str, Tensor]:
    """Return how much training moves each weight away from zero.

    Along plain SGD steps on the batches (in a copy, in eval mode), this is  -sum over steps of w * dL/dw,  in units of
    the loss. It is positive for weights that grow in magnitude. Weights of exactly 0 score -inf and stay pruned.

    Args:
        model: Not modified.
        weights: See `taylor_scores`.
        batches: See `taylor_scores`; there is one step for each.
        loss: See `taylor_scores`.
        learning_rate: The learning rate of the steps, >= 0.

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
    """Sum a function of weights and gradients over batches, in a copy that takes a step of SGD after each of them."""
    # Without masks, gradients reach the weights themselves, of which pruned ones are zero.
    copied = with_recurrent_gradients_(make_permanent_(copy_model(model)).eval())
    parameters = dict(copied.named_parameters(remove_duplicate=False))
    # Frozen weights have scores too: they can be pruned without being trained.
    named = {name: parameters[name].requires_grad_() for name in weights}
    sums = {
        # Half-precision sums would lose the terms of later batches.
        name: torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for name, weight in weights.items()
    }
    count = 0
    for inputs, labels in batches:
        # The caller may have switched gradients off.
        with torch.enable_grad():
            value = loss(call_model(copied, inputs), labels)
        # A weight that the loss does not reach has gradient 0, and so score 0.
        gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            for (name, weight), gradient in zip(named.items(), gradients, strict=True):
                # Before the step, because the gradient is that of the weight before it.
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
    """Give weights of exactly 0, which were pruned before, the lowest score."""
    return scores.masked_fill(weight == 0, -torch.inf)


def uniform_counts(weights: Weights, density: float | Mapping[str, float]) -> dict[str, int]:
    """Return the counts with which each tensor keeps round(density * n) of its n weights.

    Args:
        weights: The result of `prunable_weights`, or scores of these.
        density: The kept fraction in (0, 1], one for all tensors or one for each by name.

    Raises:
        SparsityError: If a density is out of range, or the names are not those of the weights.
    """
    densities = dict(density) if isinstance(density, Mapping) else dict.fromkeys(weights, density)
    check_same_names("density", densities, weights, "`weights`")
    for name, value in densities.items():
        check_density(f"density[{name!r}]" if isinstance(density, Mapping) else "density", value, dense=True)
    return {name: round(densities[name] * weight.numel()) for name, weight in weights.items()}


def erk_counts(weights: Weights, density: float) -> dict[str, int]:
    """Return counts by the Erdos-Renyi kernel rule, sparser in larger tensors, with round(density * N) of all N kept.

    The density of a tensor with dimensions d_1, d_2, ... is  epsilon * (d_1 + d_2 + ...) / (d_1 * d_2 * ...), at most
    1; one epsilon for all, such that the whole keeps ``density``. Counts are rounded down, and the largest remainders,
    the first among equals, get the rest.

    Args:
        weights: The result of `prunable_weights`, or scores of these.
        density: The kept fraction of all weights together, in (0, 1].

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
    # Ends, because every round but the last makes at least one more tensor dense.
    while True:
        free = [name for name in sizes if name not in dense]
        rest = total - sum(sizes[name] for name in dense)
        # A tensor keeps epsilon * (sum of its dimensions) weights.
        epsilon = rest / sum(sums[name] for name in free) if free else 0.0
        # A tensor that would keep more than all its weights is dense, and the others share the rest.
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
    """Return masks of the highest scores of each tensor; of equal scores, those with the lowest index are kept.

    Args:
        scores: By name, without NaN.
        counts: The number of weights that each tensor keeps, from `uniform_counts` or `erk_counts`.

    Returns:
        bool masks with exactly this number of True values.

    Raises:
        SparsityError: If names differ, a count is out of range, or a score is NaN.
    """
    check_same_names("counts", counts, scores, "`scores`")
    for name, score in scores.items():
        if not 0 <= counts[name] <= score.numel():
            raise SparsityError(f"`counts` must be from 0 to {score.numel()} for {name!r}; got {counts[name]}.")
    return {name: _largest(score.flatten(), counts[name], name).view(score.shape) for name, score in scores.items()}


def keep_globally(scores: Scores, density: float) -> dict[str, Tensor]:
    """Return masks of the round(density * N) highest of all N scores, in any tensors.

    Of equal scores, the first ones are kept, in order of the tensors, then of the indices.

    Args:
        scores: By name, in one unit, without NaN; on one device.
        density: The kept fraction of all weights together, in (0, 1].

    Raises:
        SparsityError: If ``density`` is out of range, or a score is NaN.
    """
    check_density("density", density, dense=True)
    flat = torch.cat([score.flatten() for score in scores.values()])
    kept = _largest(flat, round(density * len(flat)), "all weights")
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


def keep_n_of_m(scores: Scores, n: int, m: int) -> dict[str, Tensor]:
    """Return masks that keep the n highest scores of every m neighbors along the input dimension.

    Neighbors have consecutive positions in dimension 1 and equal ones elsewhere, as the sparse tensor cores of GPUs
    require (2 of 4). Of equal scores, the first ones are kept.

    Args:
        scores: By name, without NaN.
        n: The number of weights to keep in each group, 1 <= n < m.
        m: The size of a group, which must divide dimension 1 of every tensor.

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
    """Return the fraction of all weights that the masks keep."""
    kept = sum(int(mask.sum()) for mask in masks.values())
    return kept / sum(mask.numel() for mask in masks.values())


def _largest(flat: Tensor, count: int, name: str) -> Tensor:
    """Return a mask of the ``count`` highest values, the first ones of equal values. Linear time, without sorting."""
    _check_numbers(flat, name)
    if count == 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    # `topk` does not define which of equal values it returns; this keeps the first ones.
    # The count-th highest of n values is the (n - count + 1)-th lowest.
    threshold = flat.kthvalue(len(flat) - count + 1).values
    kept = flat > threshold
    ties = (flat == threshold).nonzero().squeeze(1)
    kept[ties[: count - int(kept.sum())]] = True
    return kept


def _check_numbers(score: Tensor, name: str) -> None:
    if bool(score.isnan().any()):
        raise SparsityError(f"`scores` must be numbers; got NaN in {name!r}. Check the weights they were made from.")

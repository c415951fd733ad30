"""Batch-norm statistics of a cut model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph import shadow_of
from secateur.surgery._cut import Wound
from secateur.surgery._slice import kept_positions_of_tensors
from secateur.surgery._widen import original_names

BatchNorm = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True)
class RecalibrateBatchNorm:
    """Measure the batch-norm statistics of the cut model anew, relative to the original's on the same images.

    The running statistics of a trained model come from augmented images and many batches. Measuring the cut model
    on a few clean images would replace them by something else, cut or not. So both models are measured on the same
    images with batch statistics, and only the *change* is applied:

        mean' = mean + (mean_cut - mean_original),   var' = var * var_cut / var_original

    An uncut model is therefore left exactly as it is.

    Attributes:
        eps: Added to both variances before dividing.

    References:
        Recalibration itself: Yu & Huang, arXiv:1903.05134, Section 3.3; Li et al. (EagleEye), arXiv:2007.02491.
        The relative form is ours.
    """

    eps: float = 1e-8

    def heal_(self, small: nn.Module, wound: Wound) -> None:
        """Update the running statistics of ``small`` in place."""
        before = batch_statistics(wound.original, wound.images)
        after = batch_statistics(small, wound.images)
        kept = kept_positions_of_tensors(wound.graph, wound.architecture)
        modules, names = dict(small.named_modules()), original_names(small)
        for place, (mean, variance) in after.items():
            name = names[place]
            if name not in before:
                continue
            old_mean, old_variance = before[name]
            positions = kept.get(f"{name}.running_mean", {}).get(0)
            if positions is not None:
                chosen = torch.from_numpy(positions).to(old_mean.device)
                old_mean, old_variance = old_mean[chosen], old_variance[chosen]
            layer: Any = modules[place]
            layer.running_mean.add_((mean - old_mean).to(layer.running_mean.dtype))
            ratio = (variance + self.eps) / (old_variance + self.eps)
            layer.running_var.mul_(ratio.to(layer.running_var.dtype))


def _with_company(images: Sequence[Tensor]) -> list[Tensor]:
    """The same images, a last batch of one joined to its neighbour: one value has no variance, and torch refuses it."""
    batches = list(images)
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def batch_statistics(model: nn.Module, images: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and biased variance of every batch-norm input, with every batch norm normalising by its own batch.

    Returns:
        Module name to ((channels,) mean, (channels,) variance), float64, averaged over all images.
    """
    sums: dict[str, list[Any]] = {}
    model = shadow_of(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BatchNorm) and m.track_running_stats}

    def watch(name: str) -> Any:
        def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().transpose(0, 1).flatten(1).double()
            total = sums.setdefault(name, [0.0, 0.0, 0])
            total[0], total[1] = total[0] + x.sum(1), total[1] + x.square().sum(1)
            total[2] += x.size(1)

        return hook

    for name, layer in layers.items():
        layer.register_forward_pre_hook(watch(name))
        # Without running statistics a batch norm uses those of the batch, in eval mode too.
        layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    with torch.no_grad():
        for batch in _with_company(images):
            model(batch)
    return {
        name: (total / count, (squares / count - (total / count).square()).clamp_min(0))
        for name, (total, squares, count) in sums.items()
    }

"""Batch-norm statistics of single subnets."""

import contextlib
from collections.abc import Generator, Iterable, Mapping

import torch
from torch import Tensor, nn

from secateur.errors import DataError
from secateur.supernet._supernet import Subnet, Supernet

BatchNorm = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]


def calibrated(supernet: Supernet, subnet: Subnet, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Batch-norm statistics of one subnet, to be passed to it as ``tensors``.

    Every batch norm uses the statistics of the batch meanwhile; their means and unbiased variances are averaged over
    the batches. The supernet is left as it is.

    Args:
        supernet: In any mode.
        subnet: Which one.
        batches: Normalised images, in batches of two or more.

    Returns:
        Buffer name to its value; empty if the subnet has no batch norms with running statistics.

    Raises:
        DataError: If there are batch norms and no images.

    References:
        Yu & Huang, arXiv:1903.05134, Section 3.3.
    """
    statistics = untouched(supernet, subnet)
    if not statistics:
        return {}
    with measuring(supernet), torch.no_grad():
        seen = 0
        for images in batches:
            supernet(subnet, images, tensors=statistics)
            seen += 1
    check_seen(seen)
    return statistics


@contextlib.contextmanager
def measuring(supernet: Supernet) -> Generator[None]:
    """Batch norms use the statistics of the batch, and average them plainly; all else is in evaluation mode."""
    training = {module: module.training for module in supernet.modules()}
    norms = _norms(supernet)
    momenta = {norm: norm.momentum for norm in norms.values()}
    supernet.eval()
    try:
        for norm in norms.values():
            norm.training, norm.momentum = True, None  # None is torch's word for the plain mean over all batches.
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in training.items():
            module.training = mode


def untouched(supernet: Supernet, subnet: Subnet) -> dict[str, Tensor]:
    """Fresh statistics of the subnet's shapes; what runs while `measuring` with them as ``tensors`` fills them."""
    gone = supernet.graph.removed_modules(subnet.removed_blocks)
    parts = supernet.tensors_of(subnet)
    whole = dict(supernet.model.named_buffers())
    fresh: dict[str, Tensor] = {}
    for norm in _norms(supernet):
        prefix = f"{norm}." if norm else ""
        for name, start in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            key = prefix + name
            if key in whole and not gone(norm):
                fresh[key] = torch.full_like(parts.get(key, whole[key]), start)
    return fresh


def check_seen(batches: int) -> None:
    """Refuse statistics of no images.

    Raises:
        DataError: If there were no batches.
    """
    if not batches:
        raise DataError("`batches` must hold images to measure batch norms on; got none. Pass some training images.")


def _norms(supernet: Supernet) -> Mapping[str, BatchNorm]:
    return {
        name: module
        for name, module in supernet.model.named_modules()
        if isinstance(module, BatchNorm) and module.track_running_stats
    }

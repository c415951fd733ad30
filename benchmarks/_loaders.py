"""Load the same images with the loaders of torchvision and timm, as their users write them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import CIFAR10, ImageFolder

from secateur.data import MemorySplit, Normalization

Batches = Iterator[tuple[Tensor, Tensor]]
WORKERS = 2


def torchvision_cifar10(source: MemorySplit, batch_size: int) -> DataLoader[Any]:
    """Return `torchvision.datasets.CIFAR10` in a DataLoader: pad 4, crop, flip, ToTensor, Normalize."""
    dataset = CIFAR10.__new__(CIFAR10)  # Its __init__ reads files that are not here; its items come from these fields.
    dataset.data = source.images.permute(0, 2, 3, 1).contiguous().numpy()
    dataset.targets = source.labels.tolist()
    dataset.target_transform = None
    dataset.transform = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *_to_floats(source.normalization)]
    )
    return _loader(dataset, batch_size)


def torchvision_folder(
    folder: Path, normalization: Normalization, side: int, batch_size: int, policy: str | None
) -> DataLoader[Any]:
    """Return `torchvision.datasets.ImageFolder` in a DataLoader, with crop, flip, policy, ToTensor and Normalize."""
    policies: list[Any] = []
    if policy is not None:
        policies = [transforms.RandAugment(magnitude=9)]
    steps = [transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip(), *policies]
    return _loader(ImageFolder(str(folder), transforms.Compose([*steps, *_to_floats(normalization)])), batch_size)


def timm_folder(folder: Path, normalization: Normalization, side: int, batch_size: int, policy: str | None) -> Any:
    """Return timm's dataset and loader, with the same crop and flip, on the CPU."""
    from timm.data import auto_augment, create_dataset, create_loader

    # timm uses 0 bits at the highest magnitude, which Pillow 13 refuses. Keep at least one bit, as we do.
    least = auto_augment.posterize
    for name, operation in auto_augment.NAME_TO_OP.items():
        if operation is least:
            auto_augment.NAME_TO_OP[name] = lambda image, bits, **_: least(image, max(1, bits))
    return create_loader(
        create_dataset("", str(folder)),
        input_size=(3, side, side),
        batch_size=batch_size,
        is_training=True,
        use_prefetcher=False,
        color_jitter=None,
        auto_augment=policy,
        interpolation="bilinear",
        mean=normalization.mean,
        std=normalization.std,
        num_workers=WORKERS,
        persistent_workers=True,
    )


def _to_floats(normalization: Normalization) -> list[Any]:
    return [transforms.ToTensor(), transforms.Normalize(normalization.mean, normalization.std)]


def _loader(dataset: Any, batch_size: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
        generator=torch.Generator().manual_seed(0),
    )

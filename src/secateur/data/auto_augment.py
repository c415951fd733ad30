"""AutoAugment, RandAugment and AugMix as timm has them, as a pure function of an image and a number.

timm's operations draw from the global generators of ``random`` and ``numpy``, which belong to the caller. So we load a
copy of that one module of timm for ourselves and put generators in the place of its two names: each thread has its own,
seeded anew for every image. Nothing else of timm is loaded, and the module that others import stays as it is.
"""

import random
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


_REAL, _WHOLE = r"\d+(\.\d+)?", r"\d+"
_FORMS = {
    "rand": rf"rand(-(m|n|mmax|inc){_WHOLE}|-(p|mstd){_REAL}|-t(weights|3aw?))*",
    "augmix": rf"augmix(-(m|w|d|b){_WHOLE}|-(a|mstd){_REAL})*",
    "auto": rf"(original|originalr|v0|v0r|3a)(-mstd{_REAL})?",
}
"""Names that timm understands. It passes over what it does not, in silence; we do not."""

_TRANSLATED = 0.45
"""Longest shift as a part of the side, for policies that shift by pixels; timm's ``create_transform`` has it."""
_MIXED_TRANSLATED = 0.3
"""The same of AugMix, there."""


def check_policy(name: str) -> None:
    """Refuse a name that is none of timm's.

    Raises:
        DataError: If so.
    """
    if not any(re.fullmatch(form, name) for form in _FORMS.values()):
        raise DataError(
            f"`auto_augment` must be a policy of timm, such as 'rand-m9-mstd0.5-inc1', 'original' or 'augmix-m3-w3'; "
            f"got {name!r}. None varies no colors or shapes."
        )


@dataclass(frozen=True, eq=False)
class Policy:
    """A policy for images of one size, see `policy_of`.

    Attributes:
        transform: timm's, of our copy of its module.
    """

    transform: Callable[["Image"], "Image"]

    def __call__(self, pixels: np.ndarray, key: int) -> np.ndarray:
        """Vary one image.

        Args:
            pixels: (h, w, c) uint8, c = 1 or 3; not changed.
            key: All that is random is drawn from it; below 2^64.

        Returns:
            The same shape, uint8.
        """
        from PIL import Image

        _DRAWN.seed(key)
        array = np.ascontiguousarray(pixels)
        varied = np.asarray(self.transform(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)))
        return varied[..., None] if varied.ndim == 2 else varied

    def vary(self, pixels: Tensor, keys: np.ndarray) -> Tensor:
        """Vary a batch.

        Args:
            pixels: (n, h, w, c), uint8 or float in [0, 255]; on any device.
            keys: (n,) uint64.

        Returns:
            The same shape and device, uint8.
        """
        bytes_ = pixels.round().to(torch.uint8) if pixels.is_floating_point() else pixels
        pairs = zip(bytes_.cpu().numpy(), keys.tolist(), strict=True)
        return torch.from_numpy(np.stack([self(image, key) for image, key in pairs])).to(pixels.device)


@cache
def policy_of(name: str, size: tuple[int, int, int], mean: tuple[float, ...]) -> Policy:
    """timm's policy of a name, with the settings that its ``create_transform`` makes of size and mean.

    Args:
        name: See `secateur.data.Augment`.
        size: Channels, height, width of the images.
        mean: Of pixels / 255 per channel: what is shifted or turned in from outside has this color.

    Raises:
        DataError: If the images are neither gray nor color.
    """
    if size[0] not in (1, 3):
        raise DataError(f"`auto_augment` must be given gray or color images; got {size[0]} channels. Leave it out.")
    from PIL.Image import Resampling

    color = tuple(min(255, round(255 * m)) for m in mean)
    settings: dict[str, Any] = {
        "translate_const": int(min(size[1:]) * _TRANSLATED),
        "img_mean": color[0] if len(color) == 1 else color,
        "interpolation": Resampling.BILINEAR,
    }
    timm: Any = _library()
    if name.startswith("rand"):
        return Policy(timm.rand_augment_transform(name, settings))
    if name.startswith("augmix"):
        return Policy(timm.augment_and_mix_transform(name, settings | {"translate_pct": _MIXED_TRANSLATED}))
    return Policy(timm.auto_augment_transform(name, settings))


class _Drawn(threading.local):
    """The generators of a thread, for the image that it varies."""

    def __init__(self) -> None:
        self.python = random.Random(0)
        self.numpy = np.random.RandomState(0)

    def seed(self, key: int) -> None:
        self.python.seed(key)
        self.numpy.seed((key & 0xFFFFFFFF, key >> 32))


_DRAWN = _Drawn()


class _Python:
    """Stands for the module ``random``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_DRAWN.python, name)


class _Numpy:
    """Stands for ``numpy``."""

    @property
    def random(self) -> np.random.RandomState:
        return _DRAWN.numpy

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@cache
def _library() -> Any:
    """Our copy of timm's module; it is in no list of modules."""
    timm = find_spec("timm")
    assert timm is not None
    assert timm.submodule_search_locations is not None
    path = Path(timm.submodule_search_locations[0]) / "data" / "auto_augment.py"
    spec = spec_from_file_location("timm.data.auto_augment", path)
    assert spec is not None
    assert spec.loader is not None
    module: Any = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.random is random
    assert module.np is np
    module.random, module.np = _Python(), _Numpy()
    module.NAME_TO_OP |= {name: _posterised for name, op in module.NAME_TO_OP.items() if op is module.posterize}
    return module


def _posterised(image: "Image", bits: int, **_: Any) -> "Image":
    """The image with so many bits per channel, at least one.

    timm's policies ask for none at their highest magnitude. Pillow made a black image of that before version 13, which
    refuses it; nothing can be learned from a black image.
    """
    from PIL import ImageOps

    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))

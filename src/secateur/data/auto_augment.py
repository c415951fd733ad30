"""AutoAugment, RandAugment and AugMix of timm, as pure functions of an image and a seed.

timm's operations draw from the global generators of ``random`` and ``numpy``, which belong to the caller. So this file
loads a private copy of that one module of timm and replaces the two names in it. Each thread has its own generators,
seeded anew for every image. Nothing else of timm is loaded, and the module that others import is not changed.
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


_REAL, _INTEGER = r"\d+(\.\d+)?", r"\d+"
_POLICY_PATTERNS = {
    "rand": rf"rand(-(m|n|mmax|inc){_INTEGER}|-(p|mstd){_REAL}|-t(weights|3aw?))*",
    "augmix": rf"augmix(-(m|w|d|b){_INTEGER}|-(a|mstd){_REAL})*",
    "auto": rf"(original|originalr|v0|v0r|3a)(-mstd{_REAL})?",
}
"""Names that timm understands. It silently ignores the rest of a name; we refuse it."""

_MAX_SHIFT = 0.45
"""Longest shift as a fraction of the side, for policies that shift by pixels, as in timm's ``create_transform``."""
_AUGMIX_MAX_SHIFT = 0.3
"""Longest shift of AugMix as a fraction of the side, as in timm's ``create_transform``."""


def check_policy(name: str) -> None:
    """Check that timm has a policy of this name.

    Raises:
        DataError: If it has none.
    """
    if not any(re.fullmatch(form, name) for form in _POLICY_PATTERNS.values()):
        raise DataError(
            f"`auto_augment` must be a policy of timm, such as 'rand-m9-mstd0.5-inc1', 'original' or 'augmix-m3-w3'; "
            f"got {name!r}. None applies no policy."
        )


@dataclass(frozen=True, eq=False)
class Policy:
    """A policy for images of one size, see `load_policy`.

    Attributes:
        transform: The transform made by our copy of timm's module.
    """

    transform: Callable[["Image"], "Image"]

    def __call__(self, pixels: np.ndarray, key: int) -> np.ndarray:
        """Vary one image.

        Args:
            pixels: (h, w, c) uint8, c = 1 or 3; not changed.
            key: Random seed, below 2^64.

        Returns:
            (h, w, c) uint8.
        """
        from PIL import Image

        _GENERATORS.seed(key)
        array = np.ascontiguousarray(pixels)
        varied = np.asarray(self.transform(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)))
        return varied[..., None] if varied.ndim == 2 else varied

    def apply(self, pixels: Tensor, keys: np.ndarray) -> Tensor:
        """Vary a batch.

        Args:
            pixels: (n, h, w, c), uint8 or float in [0, 255]; on any device.
            keys: (n,) uint64, a random seed for each image.

        Returns:
            (n, h, w, c) uint8, on the same device.
        """
        bytes_ = pixels.round().to(torch.uint8) if pixels.is_floating_point() else pixels
        pairs = zip(bytes_.cpu().numpy(), keys.tolist(), strict=True)
        return torch.from_numpy(np.stack([self(image, key) for image, key in pairs])).to(pixels.device)


@cache
def load_policy(name: str, size: tuple[int, int, int], mean: tuple[float, ...]) -> Policy:
    """Make timm's policy of a name, with the settings that its ``create_transform`` derives from size and mean.

    Args:
        name: See `secateur.data.Augment`.
        size: Channels, height, width of the images.
        mean: Mean of pixels / 255 per channel, the color of what is shifted or rotated in from outside.

    Raises:
        DataError: If the images are neither gray nor color.
    """
    if size[0] not in (1, 3):
        raise DataError(f"`auto_augment` must be given gray or color images; got {size[0]} channels. Leave it out.")
    from PIL.Image import Resampling

    color = tuple(min(255, round(255 * m)) for m in mean)
    settings: dict[str, Any] = {
        "translate_const": int(min(size[1:]) * _MAX_SHIFT),
        "img_mean": color[0] if len(color) == 1 else color,
        "interpolation": Resampling.BILINEAR,
    }
    timm: Any = _load_timm_module()
    if name.startswith("rand"):
        return Policy(timm.rand_augment_transform(name, settings))
    if name.startswith("augmix"):
        return Policy(timm.augment_and_mix_transform(name, settings | {"translate_pct": _AUGMIX_MAX_SHIFT}))
    return Policy(timm.auto_augment_transform(name, settings))


class _ThreadGenerators(threading.local):
    """The random generators of a thread, seeded for the image that it varies."""

    def __init__(self) -> None:
        self.python = random.Random(0)
        self.numpy = np.random.RandomState(0)

    def seed(self, key: int) -> None:
        self.python.seed(key)
        self.numpy.seed((key & 0xFFFFFFFF, key >> 32))


_GENERATORS = _ThreadGenerators()


class _RandomModule:
    """Replaces the module ``random``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_GENERATORS.python, name)


class _NumpyModule:
    """Replaces ``numpy``."""

    @property
    def random(self) -> np.random.RandomState:
        return _GENERATORS.numpy

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@cache
def _load_timm_module() -> Any:
    """Load our copy of timm's module, which is not in ``sys.modules``."""
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
    module.random, module.np = _RandomModule(), _NumpyModule()
    module.NAME_TO_OP |= {name: _posterize for name, op in module.NAME_TO_OP.items() if op is module.posterize}
    return module


def _posterize(image: "Image", bits: int, **_: Any) -> "Image":
    """Reduce the bits per channel of an image, to one at least.

    timm's policies ask for zero bits at their highest magnitude, which Pillow from version 13 on refuses. Before, it
    returned a black image, from which nothing can be learned.
    """
    from PIL import ImageOps

    return image if bits >= 8 else ImageOps.posterize(image, max(1, bits))

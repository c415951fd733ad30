"""Write a folder of JPEGs similar to ImageNet: 500 x 375 pixels, about 100 kB, made of CIFAR-10 and noise."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from secateur.data import MemorySplit

SIDES = (500, 375)
_QUALITY = 94
_FIELDS = 4


def write_photographs(folder: Path, source: MemorySplit, n: int) -> int:
    """Write the first n images as ``folder/<class>/<number>.jpg``; three of four are landscape, one is portrait.

    Noise of four scales is added to the enlarged image, so that the files are as large as photographs of this size.

    Returns:
        Mean bytes per file.
    """
    random = np.random.default_rng(0)
    fields = {size: [_noise(size, random) for _ in range(_FIELDS)] for size in (SIDES, SIDES[::-1])}
    total = 0
    for i in range(n):
        size = SIDES if i % 4 else SIDES[::-1]
        image = functional.interpolate(source.images[i : i + 1].float(), size[::-1], mode="bicubic")[0]
        shift = tuple(int(s) for s in random.integers(0, min(SIDES), 2))
        pixels = image + fields[size][i % _FIELDS].roll(shift, (1, 2))
        path = folder / str(int(source.labels[i])) / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        array = pixels.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(array).save(path, quality=_QUALITY)
        total += path.stat().st_size
    return total // n


def _noise(size: tuple[int, int], random: np.random.Generator) -> Tensor:
    width, height = size
    field = torch.zeros(1, 1, height, width)
    for scale in (1, 2, 4, 8):
        coarse = torch.from_numpy(random.normal(0, 9, (1, 1, -(-height // scale), -(-width // scale)))).float()
        field += functional.interpolate(coarse, (height, width), mode="nearest" if scale == 1 else "bilinear")
    return field[0]

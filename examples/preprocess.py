"""Make a model's input of an image file, by the rule in secateur.json, with numpy and Pillow alone."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
BORDER = 114


def model_input(path: str | Path, about: dict[str, Any]) -> np.ndarray:
    """Return (1, channels, height, width) float32.

    Args:
        path: The image file.
        about: The content of secateur.json.
    """
    rule = about["input"]["preprocessing"]
    bands = [resized(band, rule) for band in Image.open(path).convert(MODES[rule["channels"]]).split()]
    pixels = np.stack([np.asarray(band, np.float32) for band in bands]) / 255
    if rule["mean"]:
        pixels -= np.array(rule["mean"], np.float32)[:, None, None]
    if rule["std"]:
        pixels /= np.array(rule["std"], np.float32)[:, None, None]
    return np.ascontiguousarray((pixels[::-1] if rule["bgr"] else pixels)[None])


def resized(band: Image.Image, rule: dict[str, Any]) -> Image.Image:
    """Squash, crop or letterbox one channel to the size of the input; one that has the size stays as it is."""
    if rule["size"] is None or [band.height, band.width] == rule["size"]:
        return band
    height, width = rule["size"]
    sides = ((band.height, height), (band.width, width))
    if rule["resize"] == "squash":
        down, across = height, width
    elif rule["resize"] == "crop":  # Scale until it covers the size / the fraction, and take the middle.
        factor = max(round(wanted / rule["crop_fraction"]) / side for side, wanted in sides)
        down, across = (max(wanted, round(side * factor)) for side, wanted in sides)
    else:  # letterbox: scale until it fits into the size, and add gray borders.
        factor = min(wanted / side for side, wanted in sides)
        down, across = (max(1, min(wanted, round(side * factor))) for side, wanted in sides)
    scaled = band.resize((across, down), Image.Resampling[rule["interpolation"].upper()])
    framed = Image.new("L", (width, height), BORDER)
    framed.paste(scaled, (-((across - width) // 2), -((down - height) // 2)))
    return framed

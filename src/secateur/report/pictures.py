"""Examples for a report: boxes, masks and images of the labels, the original and the compressed model, side by side."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur._batches import batch_length, call_model, take
from secateur._runtime import copy_model
from secateur.data.loaders import ItemSplit, OwnData
from secateur.report.run import ClassColor, Picture, PictureRow
from secateur.tasks.base import Drawing, Task

if TYPE_CHECKING:
    from PIL.Image import Image

EXAMPLES = 4
"""Test images on a page."""
_LONGEST = 320
"""Pixels of the longer side, so that a page stays small."""
_SMALLEST = 96
_JPEG_QUALITY = 82
_COLORS = (
    *((230, 25, 75), (60, 180, 75), (255, 200, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240)),
    *((240, 50, 230), (210, 245, 60), (250, 190, 212), (0, 128, 128), (170, 110, 40), (128, 0, 0), (128, 128, 0)),
)
"""Colors that people tell apart easily (Trubetskoy, 20 distinct colors)."""
_ROUNDS = (1.0, 0.6, 0.35)
"""What further classes darken the same colors by, round by round; after the last one, colors repeat."""
_NOT_COUNTED = (150, 150, 150)
_OPACITY = 0.55


def example_pictures(
    task: Task,
    data: Any,
    original: nn.Module,
    student: nn.Module,
    *,
    names: tuple[str, str] = ("original", "compressed"),
) -> tuple[PictureRow, ...]:
    """Return a few test images as labels, original and compressed model see them; none if the task draws nothing.

    Args:
        task: Says what is drawn of outputs and targets.
        data: Of the user's own; a set of classes has no pictures.
        original: In any mode, on any device; not changed.
        student: The same.
        names: What the two are called.
    """
    if not isinstance(data, OwnData):
        return ()
    inputs, targets = _few(data)
    if inputs is None:
        return ()
    with torch.no_grad():
        outputs = [call_model(copy_model(model).eval().cpu(), inputs) for model in (original, student)]
    rows: list[PictureRow] = []
    for item in range(batch_length(inputs)):
        image = _pixels(inputs[item], data)
        drawn = [(name, task.drawing(each, item)) for name, each in zip(names, outputs, strict=True)]
        if targets is not None and (wanted := task.target_drawing(targets, item)) is not None:
            drawn.insert(0, ("labels", wanted))
        pictures = [
            Picture(name, _draw(image, drawing, data.classes)) for name, drawing in drawn if drawing is not None
        ]
        if len(pictures) < len(drawn):
            return ()
        if any(drawing is not None and drawing.image is not None for _, drawing in drawn):
            pictures.insert(0, Picture("input", _as_uri(_scaled(image))))
        rows.append(PictureRow(tuple(pictures), _legend([one for _, one in drawn if one is not None], data.classes)))
    return tuple(rows)


def _few(data: OwnData) -> tuple[Any, Any]:
    """A few test images, evenly spaced where they can be, on the CPU; None if they are no images."""
    split: Any = data.test
    if isinstance(split, ItemSplit):
        count = min(EXAMPLES, len(split))
        split = split.subset(sorted({round(place) for place in np.linspace(0, len(split) - 1, count)}))
    inputs, targets = next(iter(split.batches(EXAMPLES)))
    inputs, targets = take(inputs, slice(EXAMPLES)), take(targets, slice(EXAMPLES))
    first = inputs[0] if isinstance(inputs, list | Tensor) and len(inputs) else None
    is_image = isinstance(first, Tensor) and first.ndim == 3 and first.shape[0] in (1, 2, 3, 4)
    return (inputs, targets) if is_image else (None, None)


def _pixels(image: Tensor, data: OwnData) -> np.ndarray:
    """(height, width, 3) uint8 of an input: its normalization is undone as far as it is known."""
    pixels = image.detach().float().cpu()
    rule = data.preprocessing
    if rule is not None:
        pixels = pixels.flip(0) if rule.bgr else pixels
        for values, undo in ((rule.std, torch.mul), (rule.mean, torch.add)):
            if values:
                pixels = undo(pixels, torch.tensor(values)[:, None, None])
    elif float(pixels.min()) < 0 or float(pixels.max()) > 1:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / (high - low).clamp_min(1e-6)
    return _as_bytes(pixels)


def _as_bytes(pixels: Tensor) -> np.ndarray:
    channels = pixels[:3] if pixels.shape[0] >= 3 else pixels[:1].expand(3, -1, -1)
    return (channels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()


def _scaled(pixels: np.ndarray) -> "Image":
    from PIL import Image

    image = Image.fromarray(pixels)
    longest = max(image.size)
    factor = _LONGEST / longest if longest > _LONGEST else max(1, -(-_SMALLEST // longest))
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BILINEAR if factor < 1 else Image.Resampling.NEAREST)


def _draw(pixels: np.ndarray, drawing: Drawing, classes: Sequence[str]) -> str:
    if drawing.image is not None:
        return _as_uri(_scaled(_as_bytes(drawing.image.detach().float().cpu())))
    if drawing.mask is not None:
        return _as_uri(_scaled(_masked(pixels, drawing.mask, drawing.void)))
    return _as_uri(_boxed(pixels, drawing, classes))


def _masked(pixels: np.ndarray, mask: Tensor, void: int | None) -> np.ndarray:
    """Classes as colors over the image; pixels that do not count stay gray."""
    height, width = pixels.shape[:2]
    indices = mask.detach().cpu().long()
    if indices.shape != (height, width):
        resized = nn.functional.interpolate(indices[None, None].float(), size=(height, width), mode="nearest")
        indices = resized[0, 0].long()
    palette = np.array([_color(index) for index in range(len(_COLORS) * len(_ROUNDS))], dtype=np.float32)
    colors = palette[(indices % len(palette)).numpy()]
    blended = (1 - _OPACITY) * pixels + _OPACITY * colors
    if void is not None:
        gray = pixels.mean(2, keepdims=True).repeat(3, 2)
        blended = np.where((indices == void).numpy()[..., None], gray, blended)
    return blended.round().astype(np.uint8)


def _boxed(pixels: np.ndarray, drawing: Drawing, classes: Sequence[str]) -> "Image":
    from PIL import ImageDraw

    image = _scaled(pixels)
    factor = image.width / pixels.shape[1]
    pen = ImageDraw.Draw(image)
    assert drawing.boxes is not None
    words: list[tuple[float, float, str, tuple[int, int, int]]] = []
    for place, box in enumerate((drawing.boxes.detach().cpu().double() * factor).tolist()):
        label = int(drawing.labels[place]) if drawing.labels is not None else 0
        color = _color(label)
        x1, y1, x2, y2 = box
        pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=color, width=2)
        name = _class_name(label, classes)
        said = name if drawing.scores is None else f"{name} {float(drawing.scores[place]):.2f}"
        words.append((max(x1, 0.0), max(y1, 0.0), said, color))
    # After all boxes, on their color: text alone is lost in a picture.
    for left, top, said, color in words:
        width, height = pen.textbbox((0, 0), said)[2:]
        pen.rectangle((left, top, left + width + 4, top + height + 2), fill=color)
        pen.text((left + 2, top), said, fill="black" if _is_light(color) else "white")
    return image


def _is_light(color: tuple[int, int, int]) -> bool:
    """Whether black is read better on a color than white, by its luma (ITU-R BT.601)."""
    red, green, blue = color
    return 0.299 * red + 0.587 * green + 0.114 * blue > 128


def _color(index: int) -> tuple[int, int, int]:
    """The color of a class."""
    darkened, place = divmod(index % (len(_COLORS) * len(_ROUNDS)), len(_COLORS))
    red, green, blue = (round(_ROUNDS[darkened] * part) for part in _COLORS[place])
    return red, green, blue


def _class_name(index: int, classes: Sequence[str]) -> str:
    return classes[index] if 0 <= index < len(classes) else str(index)


def _legend(drawings: Sequence[Drawing], classes: Sequence[str]) -> tuple[ClassColor, ...]:
    """The classes of masks or boxes, in their order; pixels that do not count come last."""
    shown, is_void = set[int](), False
    for drawing in drawings:
        if drawing.mask is not None:
            found = set(drawing.mask.unique().tolist())
            is_void |= drawing.void in found
            shown |= found - {drawing.void}
        elif drawing.boxes is not None and drawing.labels is not None:
            shown |= set(drawing.labels.tolist())
    names = {index: _class_name(index, classes) for index in sorted(shown)}
    entries = [
        ClassColor(index, f"class {name}" if name == str(index) else name, _as_css(_color(index)))
        for index, name in names.items()
    ]
    return (*entries, ClassColor(-1, "not counted", _as_css(_NOT_COUNTED))) if is_void else tuple(entries)


def _as_css(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _as_uri(image: "Image") -> str:
    held = io.BytesIO()
    image.convert("RGB").save(held, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"

"""Boxes, masks and images of both models on the page, at their places and small."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from secateur.data.annotated import as_lists
from secateur.data.loaders import own_data
from secateur.data.preprocessing import Preprocessing
from secateur.report.html import render
from secateur.report.pictures import EXAMPLES, example_pictures
from secateur.report.run import ClassColor, Measured, Picture, PictureRow, RunReport
from secateur.tasks import Classification, Detection, ImageToImage, Imitation, Segmentation


class Fixed(nn.Module):
    """Returns one answer for every image."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return self.answer(images)


def pixels_of(picture: Picture) -> np.ndarray:
    kind, _, content = picture.uri.partition(";base64,")
    assert kind == "data:image/jpeg"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(int)


def gray(count: int = 6, size: tuple[int, int] = (96, 120)) -> torch.Tensor:
    return torch.full((count, 3, *size), 0.5)


def rows_of(task, targets, original, student, images=None):
    images = gray() if images is None else images
    items = list(zip(images, targets, strict=True)) if targets is not None else [(image,) for image in images]
    return example_pictures(task, own_data((items, items, items)), Fixed(original), Fixed(student))


def test_masks_lie_where_the_classes_are() -> None:
    wanted = torch.zeros(96, 120, dtype=torch.long)
    wanted[:48] = 1
    wanted[-8:] = 255
    logits = torch.stack([(wanted != 1).float(), (wanted == 1).float()])
    rows = rows_of(
        Segmentation(void=255),
        [wanted] * 6,
        lambda x: logits.expand(len(x), -1, -1, -1),
        lambda x: -logits[None].expand(len(x), -1, -1, -1),
    )
    assert len(rows) == EXAMPLES
    labels, original, compressed = (pixels_of(picture) for picture in rows[0].pictures)
    assert [picture.name for picture in rows[0].pictures] == ["labels", "original", "compressed"]
    assert labels.shape == (96, 120, 3)
    assert np.abs(labels[10:40] - original[10:40]).max() <= 4
    assert np.abs(original[10:40].mean((0, 1)) - compressed[60:80].mean((0, 1))).max() <= 4
    assert np.abs(original[10:40].mean((0, 1)) - compressed[10:40].mean((0, 1))).max() > 40
    assert np.ptp(labels[-3:].reshape(-1, 3).mean(0)) <= 3  # What does not count stays gray.


def test_boxes_lie_where_they_are_and_unlikely_ones_are_left_out() -> None:
    box, low = [20.0, 10.0, 60.0, 50.0], [70.0, 60.0, 100.0, 90.0]

    def answer(images):
        found = {"boxes": torch.tensor([box, low]), "labels": torch.tensor([1, 1]), "scores": torch.tensor([0.9, 0.1])}
        return [found for _ in images]

    target = {"boxes": torch.tensor([low]), "labels": torch.tensor([1])}
    loader: DataLoader = DataLoader([(image, target) for image in gray(4)], batch_size=2, collate_fn=as_lists)  # pyright: ignore
    rows = example_pictures(Detection(), own_data((loader, loader, loader)), Fixed(answer), Fixed(answer))
    labels, original, _ = (pixels_of(picture) for picture in rows[0].pictures)
    changed = [np.argwhere(np.abs(picture - 128).max(2) > 30) for picture in (labels, original)]
    assert (changed[1].max(0) <= [54, 64]).all()
    assert (changed[1].min(0) >= [6, 16]).all()
    assert (changed[0].min(0) >= [56, 66]).all()
    # The label lies on the color of its class, where it is read on any picture.
    corner = original[12:20, 22:34].reshape(-1, 3)
    assert (np.abs(corner - 128).max(1) > 30).mean() > 0.9


def test_images_are_shown_beside_their_input() -> None:
    bright = torch.ones(6, 3, 96, 120)
    rows = rows_of(ImageToImage(), list(bright), lambda x: x, lambda x: x * 0)
    assert [picture.name for picture in rows[0].pictures] == ["input", "labels", "original", "compressed"]
    means = [pixels_of(picture).mean() for picture in rows[0].pictures]
    assert means == pytest.approx([128, 255, 128, 0], abs=2)


def test_what_draws_nothing_has_no_pictures() -> None:
    def classes(images):
        return torch.zeros(len(images), 2)

    assert rows_of(Classification(), [0] * 6, classes, classes) == ()
    assert rows_of(Imitation(), None, classes, classes) == ()
    assert len(rows_of(Imitation(), None, lambda x: x, lambda x: x)) == EXAMPLES


def test_normalization_is_undone_and_large_images_become_small() -> None:
    rule = Preprocessing(mean=(0.5, 0.25, 0.5), std=(0.5, 0.25, 0.5), bgr=True)
    image = rule.finish(torch.full((3, 900, 1200), 64, dtype=torch.uint8))
    items = [(image, image)] * 2
    data = replace(own_data((items, items, items)), preprocessing=rule)
    rows = example_pictures(ImageToImage(), data, nn.Identity(), nn.Identity())
    shown = pixels_of(rows[0].pictures[0])
    assert shown.shape == (240, 320, 3)
    assert np.abs(shown - 64).max() <= 2


def test_the_page_holds_the_pictures_and_stays_small() -> None:
    noise = torch.rand(4, 3, 480, 640, generator=torch.Generator().manual_seed(0))
    rows = rows_of(ImageToImage(), list(noise), lambda x: x, lambda x: x, images=noise)
    report = RunReport("net", Measured(2, 2), Measured(1, 1), pictures=rows)
    page = render(report)
    assert page.count('<img src="data:image/jpeg;base64,') == 4 * len(rows)
    assert 'alt="Test image 1: compressed"' in page
    assert len(page) < 4e6
    assert "<img" not in render(RunReport("net", Measured(2, 2), Measured(1, 1)))


def test_a_legend_names_the_classes_that_the_pictures_show_in_their_colors() -> None:
    wanted = torch.zeros(96, 120, dtype=torch.long)
    wanted[:48] = 3
    wanted[-8:] = 255
    logits = torch.nn.functional.one_hot(torch.full((96, 120), 17), 20).movedim(2, 0).float()
    items = [(image, wanted) for image in gray()]
    data = replace(own_data((items, items, items)), classes=("sky", "road", "tree", "<car>"))
    model = Fixed(lambda x: logits.expand(len(x), -1, -1, -1))
    rows = example_pictures(Segmentation(void=255), data, model, model)
    legend = rows[0].classes
    assert [(one.index, one.name) for one in legend] == [
        (0, "sky"),
        (3, "<car>"),
        (17, "class 17"),
        (-1, "not counted"),
    ]
    labels, original, _ = (pixels_of(picture) for picture in rows[0].pictures)
    for one, seen in zip(legend, (labels[55:80], labels[10:40], original[10:40]), strict=False):
        color = np.array([int(one.color[at : at + 2], 16) for at in (1, 3, 5)])
        assert np.abs(seen.mean((0, 1)) - (0.45 * 128 + 0.55 * color)).max() <= 5, one
    assert legend[1].color != legend[2].color  # 3 + 14: the next round of the colors is darker.
    page = render(RunReport("net", Measured(2, 2), Measured(1, 1), pictures=rows))
    assert page.count("not counted") == 1  # Once for all images.
    for one in legend:
        assert (
            f'<li><i style="--swatch:{one.color}"></i>{one.name.replace("<", "&lt;").replace(">", "&gt;")}</li>' in page
        )


def test_a_legend_of_boxes_has_the_classes_of_any_image_and_images_have_none() -> None:
    box = torch.tensor([[20.0, 10.0, 60.0, 50.0]])

    def answer(images):
        return [{"boxes": box, "labels": torch.tensor([2]), "scores": torch.tensor([0.9])} for _ in images]

    items = [(image, {"boxes": box, "labels": torch.tensor([1])}) for image in gray(4)]
    loader: DataLoader = DataLoader(items, batch_size=2, collate_fn=as_lists)  # pyright: ignore
    data = replace(own_data((loader, loader, loader)), classes=("background", "cell", "plate"))
    rows = example_pictures(Detection(), data, Fixed(answer), Fixed(answer))
    assert [one.name for one in rows[0].classes] == ["cell", "plate"]
    rows = rows_of(ImageToImage(), list(torch.ones(6, 3, 96, 120)), lambda x: x, lambda x: x)
    page = render(RunReport("net", Measured(2, 2), Measured(1, 1), pictures=rows))
    assert rows[0].classes == ()
    assert "Colors of the classes" not in page


def test_every_image_adds_its_classes_to_the_legend() -> None:
    picture = (Picture("labels", "data:,"),)
    one, two = ClassColor(1, "road", "#111111"), ClassColor(0, "sky", "#222222")
    void = ClassColor(-1, "not counted", "#333333")
    rows = (PictureRow(picture, (one, void)), PictureRow(picture, (two, one)))
    page = render(RunReport("net", Measured(2, 2), Measured(1, 1), pictures=rows))
    assert [page.count(f"</i>{each.name}</li>") for each in (two, one, void)] == [1, 1, 1]
    assert page.index("</i>sky<") < page.index("</i>road<") < page.index("</i>not counted<")

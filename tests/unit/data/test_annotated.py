"""Boxes, masks and numbers are read from the formats that people have, and move with their images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from secateur.data.annotated import (
    FileItems,
    as_lists,
    read_coco,
    read_masks,
    read_table,
    read_unlabeled,
    read_voc,
    read_yolo,
)
from secateur.data.layouts import MASKS, look_at
from secateur.data.preprocessing import Interpolation, Preprocessing, ResizeMode
from secateur.errors import DataError

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
RAW = Preprocessing()
BOX = (8, 4, 24, 16)  # x1, y1, x2, y2 in an image of 40 x 20


def save_image(path: Path, size: tuple[int, int] = (40, 20), box: tuple[int, ...] = BOX) -> None:
    """A black image with a white box."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[box[1] : box[3], box[0] : box[2]] = 255
    Image.fromarray(pixels).save(path)


def coco(folder: Path, splits: tuple[str, ...] = ("train", "val"), **changes) -> Path:
    for split in splits:
        save_image(folder / "images" / f"{split}.png")
        note = {"image_id": 7, "category_id": 5, "bbox": [8, 4, 16, 12], "iscrowd": 0} | changes
        crowd = note | {"iscrowd": 1}
        flat = note | {"bbox": [1, 1, 0, 5]}
        content = {
            "images": [{"id": 7, "file_name": f"{split}.png"}],
            "annotations": [note, crowd, flat],
            "categories": [{"id": 9, "name": "dog"}, {"id": 5, "name": "cat"}],
        }
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return folder


def yolo(folder: Path) -> Path:
    for split in ("train", "valid"):
        save_image(folder / split / "images" / "a.png")
        save_image(folder / split / "images" / "empty.png")
        (folder / split / "labels").mkdir()
        (folder / split / "labels" / "a.txt").write_text("0 0.4 0.5 0.4 0.6\n\n")
    (folder / "classes.txt").write_text("cat\ndog\n")
    return folder


def voc(folder: Path) -> Path:
    save_image(folder / "JPEGImages" / "a.png")
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    box = "<bndbox><xmin>8</xmin><ymin>4</ymin><xmax>24</xmax><ymax>16</ymax></bndbox>"
    item = f"<object><name>{{}}</name><difficult>{{}}</difficult>{box}</object>"
    text = f"<annotation><filename>a.png</filename>{item.format('cat', 0)}{item.format('dog', 1)}</annotation>"
    (folder / "Annotations" / "a.xml").write_text(text)
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    return folder


@pytest.mark.parametrize(
    ("write", "read", "names"),
    [(coco, read_coco, ("cat", "dog")), (yolo, read_yolo, ("cat", "dog")), (voc, read_voc, ("cat",))],
)
def test_boxes_are_where_the_pixels_are(tmp_path: Path, write, read, names) -> None:
    items = read(write(tmp_path), RAW)["train"]
    image, target = items[0]
    assert items.class_names == names
    assert torch.equal(target["boxes"], torch.tensor([BOX]).float())
    assert target["labels"].tolist() == [1]
    assert type(target["boxes"]) is Tensor
    x1, y1, x2, y2 = BOX
    assert float(image[:, y1:y2, x1:x2].min()) == 1
    assert float(image.sum()) == 3 * (x2 - x1) * (y2 - y1)


@pytest.mark.parametrize("resize", list(ResizeMode))
@pytest.mark.parametrize("size", [(32, 32), (24, 60), (20, 40)])
def test_boxes_move_with_their_image(tmp_path: Path, resize: ResizeMode, size: tuple[int, int]) -> None:
    rule = Preprocessing(size, resize, crop_fraction=1.0, interpolation=Interpolation.NEAREST)
    image, target = read_coco(coco(tmp_path), rule)["train"][0]
    assert tuple(image.shape) == (3, *size)
    white = (image[0] == 1).nonzero()
    found = [*white.min(0).values.flip(0).tolist(), *(white.max(0).values.flip(0) + 1).tolist()]
    # Half a pixel of rounding on every side.
    assert (torch.tensor(found) - target["boxes"][0]).abs().max() <= 1


def test_boxes_outside_of_a_crop_are_left_out(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "train.png", (100, 20))
    coco(tmp_path, ("val",))
    data = {
        "images": [{"id": 1, "file_name": "train.png"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": box} for box in ([0, 0, 10, 10], [45, 5, 10, 10])],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "annotations" / "train.json").write_text(json.dumps(data))
    (tmp_path / "annotations" / "instances_val2017.json").unlink()
    _, target = read_coco(tmp_path, Preprocessing((20, 20), crop_fraction=1.0))["train"][0]
    assert torch.equal(target["boxes"], torch.tensor([[5.0, 5, 15, 15]]))
    assert target["labels"].tolist() == [1]


def test_an_image_without_objects_has_an_empty_target(tmp_path: Path) -> None:
    items = read_yolo(yolo(tmp_path), RAW)["val"]
    images, targets = as_lists([items[0], items[1]])
    assert [len(target["boxes"]) for target in targets] == [1, 0]
    assert targets[1]["boxes"].shape == (0, 4)
    assert len(images) == 2


@pytest.mark.parametrize("resize", list(ResizeMode))
def test_masks_move_with_their_image_and_borders_count_for_nothing(tmp_path: Path, resize: ResizeMode) -> None:
    save_image(tmp_path / "train" / "images" / "a.png")
    mask = np.zeros((20, 40), dtype=np.uint8)
    mask[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 3
    (tmp_path / "train" / "labels").mkdir()
    Image.fromarray(mask).save(tmp_path / "train" / "labels" / "a.png")
    rule = Preprocessing((40, 40), resize, crop_fraction=1.0, interpolation=Interpolation.NEAREST)
    image, target = read_masks(tmp_path, rule)["train"][0]
    assert target.dtype == torch.int64
    assert torch.equal(target == 3, image[0] == 1)
    assert set(target.unique().tolist()) == ({0, 3, 255} if resize is ResizeMode.LETTERBOX else {0, 3})


def test_masks_have_class_names_where_a_file_lists_them(tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "images" / "a.png")
    (tmp_path / "train" / "labels").mkdir()
    Image.fromarray(np.ones((20, 40), dtype=np.uint8)).save(tmp_path / "train" / "labels" / "a.png")
    assert read_masks(tmp_path, RAW)["train"].class_names == ()
    (tmp_path / "classes.txt").write_text("sky\nroad \n\n")
    assert read_masks(tmp_path, RAW)["train"].class_names == ("sky", "road")
    assert look_at(MASKS, tmp_path, channels=3).outputs == 2
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")  # No mask shows a car.
    assert look_at(MASKS, tmp_path, channels=3).outputs == 3
    (tmp_path / "classes.txt").write_text("sky\n")
    with pytest.raises(DataError, match=r"classes\.txt must have a line for each class .* got 1 names, .* class 1"):
        look_at(MASKS, tmp_path, channels=3)


def test_tables_give_numbers_and_column_names(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "a.png")
    (tmp_path / "train.csv").write_text("image,left,right\na.png,1,0.5\n")
    items = read_table(tmp_path, RAW)["train"]
    assert items.class_names == ("left", "right")
    assert items[0][1].tolist() == [1, 0.5]


def test_images_without_labels_are_found_below_the_folder(tmp_path: Path) -> None:
    save_image(tmp_path / "deep" / "b.png")
    save_image(tmp_path / "a.png")
    items = read_unlabeled(tmp_path, RAW)["train"]
    assert [path.name for path in items.files] == ["a.png", "b.png"]
    assert items[0].shape == (3, 20, 40)
    save_image(tmp_path / "train" / "c.png")
    assert len(read_unlabeled(tmp_path, RAW)["train"]) == 1


def test_pixels_are_normalized_and_reordered_in_the_stated_order(tmp_path: Path) -> None:
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[..., 0], pixels[..., 3] = 255, 51
    Image.fromarray(pixels).save(tmp_path / "a.png")
    rule = Preprocessing(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0), bgr=True)
    image = read_unlabeled(tmp_path, rule)["train"][0]
    assert image[:, 0, 0].tolist() == [0.0, -1.0, 1.0]
    with_alpha = read_unlabeled(tmp_path, Preprocessing(channels=4))["train"][0]
    assert with_alpha[:, 0, 0].tolist() == pytest.approx([1, 0, 0, 0.2])
    assert read_unlabeled(tmp_path, Preprocessing(channels=1))["train"][0].shape == (1, 2, 2)


def test_augmentation_moves_boxes_too(tmp_path: Path) -> None:
    from torchvision.transforms import v2

    items = read_coco(coco(tmp_path), RAW)["train"].varied_by(v2.RandomHorizontalFlip(p=1))
    image, target = items[0]
    x1, y1, x2, y2 = target["boxes"][0].int().tolist()
    assert (x1, y1, x2, y2) == (16, 4, 32, 16)
    assert float(image[:, y1:y2, x1:x2].min()) == 1


@pytest.mark.parametrize("rule", [RAW, Preprocessing((2, 3), ResizeMode.SQUASH, 0.5, mean=(0.1, 0.2, 0.3), bgr=True)])
def test_the_rule_survives_json(rule: Preprocessing) -> None:
    assert Preprocessing.from_json(json.loads(json.dumps(rule.to_json()))) == rule


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"size": (0, 3)}, "positive height and width"),
        ({"crop_fraction": 0}, r"in \(0, 1\]; got 0"),
        ({"mean": (1.0,)}, "a number for each of 3 channels"),
        ({"std": (0.0, 1.0, 1.0)}, "a standard deviation positive"),
        ({"channels": 17}, "from 1 to 16; got 17"),
        ({"channels": 0}, "from 1 to 16; got 0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(settings, match) -> None:
    with pytest.raises(DataError, match=match):
        Preprocessing(**settings)


def broken_coco(folder: Path) -> None:
    coco(folder, category_id=77)


def escaping_coco(folder: Path) -> None:
    coco(folder, ("train",))
    path = folder / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text().replace("train.png", "../../secret.png"))


def absent_image(folder: Path) -> None:
    coco(folder, ("train",))
    (folder / "images" / "train.png").unlink()


def bad_line(folder: Path) -> None:
    yolo(folder)
    (folder / "train" / "labels" / "a.txt").write_text("0 0.1 0.2 0.3\n")


def pixels_for_fractions(folder: Path) -> None:
    yolo(folder)
    (folder / "train" / "labels" / "a.txt").write_text("0 120 40 30 30\n")


def too_few_names(folder: Path) -> None:
    yolo(folder)
    (folder / "classes.txt").unlink()
    (folder / "classes.txt").write_text("cat\n")
    (folder / "train" / "labels" / "a.txt").write_text("5 0.4 0.5 0.4 0.6\n")


def entities(folder: Path) -> None:
    voc(folder)
    text = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation><filename>&b;</filename></annotation>'
    (folder / "Annotations" / "a.xml").write_text(text)


def no_mask(folder: Path) -> None:
    save_image(folder / "train" / "images" / "a.png")


def word_in_table(folder: Path) -> None:
    save_image(folder / "images" / "a.png")
    (folder / "train.csv").write_text("image,left\na.png,many\n")


def table_without_images(folder: Path) -> None:
    (folder / "train.csv").write_text("file,left\na.png,1\n")


@pytest.mark.parametrize(
    ("write", "read", "match"),
    [
        (
            broken_coco,
            read_coco,
            "must be in COCO format; it is not: `annotations` 0 must have the `category_id` of a listed one; got 77",
        ),
        (escaping_coco, read_coco, "must lie inside of"),
        (absent_image, read_coco, r"train\.png' must be a file in"),
        (bad_line, read_yolo, r"a\.txt, line 1: must be `class x y width height`"),
        (pixels_for_fractions, read_yolo, "fractions of the image.*Divide by"),
        (too_few_names, read_yolo, "1 names and a class number 5"),
        (entities, read_voc, "it declares entities"),
        (no_mask, read_masks, r"must have a mask of its name in .*none for .*a\.png \(1 images"),
        (word_in_table, read_table, "line 2, column left: must be a number; got 'many'"),
        (table_without_images, read_table, "must have a column `image`"),
        (lambda folder: None, read_coco, r"must hold annotations/train\.json in COCO format; got \[\]"),
        (lambda folder: None, read_unlabeled, "must hold images"),
    ],
)
def test_damaged_data_are_named(tmp_path: Path, write, read, match: str) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match=match):
        read(tmp_path, RAW)


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "images" / "a.png")
    save_image(tmp_path / "train" / "labels" / "a.png", (40, 20))
    with pytest.raises(DataError, match=r"a\.png must have one class per pixel .*shape \(20, 40, 3\)"):
        read_masks(tmp_path, RAW)["train"][0]


@pytest.mark.skipif(not (SHARED / "bccd").is_dir(), reason="needs ../shared/data/bccd")
def test_real_boxes() -> None:
    found = read_coco(SHARED / "bccd", RAW)
    assert {split: len(items) for split, items in found.items()} == {"train": 205, "val": 87, "test": 72}
    assert found["train"].class_names == ("RBC", "WBC", "Platelets")
    image, target = found["train"][0]
    assert image.shape == (3, 480, 640)
    assert set(target["labels"].tolist()) <= {1, 2, 3}


@pytest.mark.skipif(not (SHARED / "camvid").is_dir(), reason="needs ../shared/data/camvid")
def test_real_masks() -> None:
    found = read_masks(SHARED / "camvid", Preprocessing((240, 320), ResizeMode.SQUASH))
    assert {split: len(items) for split, items in found.items()} == {"train": 367, "val": 101, "test": 233}
    image, target = found["test"][0]
    assert (image.shape, target.shape) == ((3, 240, 320), (240, 320))
    assert set(target.unique().tolist()) <= set(range(12))


def test_items_are_a_dataset(tmp_path: Path) -> None:
    from secateur.data.loaders import own_split

    items = read_coco(coco(tmp_path), RAW)["train"]
    assert isinstance(items, FileItems)
    split = own_split(torch.utils.data.DataLoader(items, batch_size=1, collate_fn=as_lists))
    images, targets = next(split.batches(1))
    assert isinstance(images, list)
    assert len(targets) == 1

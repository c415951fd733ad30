"""Image files with boxes, masks, numbers or no labels at all, as datasets of (image, target) items.

Formats: COCO, YOLO text and Pascal VOC for boxes, folders of images and masks, CSV files for classes and numbers, and
folders of images without labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from secateur.data.annotation_files import (
    coco_notes,
    read_json,
    read_table_rows,
    read_text_file,
    read_xml,
    shortened,
)
from secateur.data.image_files import (
    ARRAY_SUFFIX,
    IMAGE_SUFFIXES,
    open_mask,
    open_pixels,
)
from secateur.data.preprocessing import Preprocessing
from secateur.errors import DataError

SPLITS = ("train", "val", "test")
"""Names of the splits; ``val`` may also be called ``valid`` or ``validation``."""
_OTHER_NAMES = {"val": ("val", "valid", "validation")}
MASK_FOLDERS = ("labels", "masks")
"""Names of folders of masks."""
_SHOWN = 5
_MOST_CLASSES = 131_071
"""Classes of a set of boxes. A line of text can name any number, and every class takes a name and outputs."""
_SUFFIXES = IMAGE_SUFFIXES | {ARRAY_SUFFIX}


class Targets(Protocol):
    """The targets of a set of images, in the order of its files."""

    def __len__(self) -> int: ...

    def read(self, place: int, size: tuple[int, int]) -> Any:
        """Return the target of one image as tv_tensors or plain tensors.

        Args:
            place: Number of the image.
            size: Its height and width.
        """
        ...


@dataclass(frozen=True, eq=False)
class FileItems(Dataset[Any]):
    """Image files and their targets, preprocessed.

    Attributes:
        files: The images.
        targets: Their targets; None gives images alone.
        preprocessing: How they become inputs.
        augment: Varies (image, target) in tv_tensors before they are resized; None varies nothing.
        class_names: Names of the classes; empty for numbers.
    """

    files: tuple[Path, ...]
    targets: Targets | None
    preprocessing: Preprocessing
    augment: Callable[..., Any] | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> Any:
        """Return (image, target), or the image alone.

        Raises:
            DataError: If the file cannot be decoded.
        """
        from torchvision import tv_tensors

        path = self.files[place]
        pixels = open_pixels(path, lambda: str(path), self.preprocessing.channels)
        image: Any = tv_tensors.Image(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))
        target = None if self.targets is None else self.targets.read(place, tuple(image.shape[-2:]))
        placed = _is_placed(target)
        if self.augment is not None:
            image, target = self.augment(image, target) if placed else (self.augment(image), target)
        if isinstance(target, tv_tensors.Image):
            target = self._placed_image(target, (int(image.shape[-2]), int(image.shape[-1])))
            (image,) = self.preprocessing.geometry(image)
        elif isinstance(target, dict):
            image, boxes, labels = *self.preprocessing.geometry(image, target["boxes"]), target["labels"]
            target = {"boxes": boxes.as_subclass(Tensor).float(), "labels": labels}
            target = _with_area(target)
        elif placed:
            image, target = self.preprocessing.geometry(image, target)
            target = target.as_subclass(Tensor).long()
        else:
            (image,) = self.preprocessing.geometry(image)
        finished = self.preprocessing.finish(image.as_subclass(Tensor))
        return finished if self.targets is None else (finished, target)

    def _placed_image(self, target: Any, source: tuple[int, int]) -> Tensor:
        """The wanted image in 0...1: resized as the input is, and larger by the same factors as the files are."""
        rule = self.preprocessing
        if rule.size is not None:
            height, width = (
                round(wanted * target.shape[dim - 2] / side)
                for dim, (wanted, side) in enumerate(zip(rule.size, source, strict=True))
            )
            (target,) = replace(rule, size=(height, width)).geometry(target)
        return target.as_subclass(Tensor).float() / 255

    def varied_by(self, augment: Callable[..., Any] | None) -> "FileItems":
        """Return the same items with another augmentation."""
        return replace(self, augment=augment)


def _is_placed(target: Any) -> bool:
    """Whether a target lies in the image, and moves with it."""
    from torchvision import tv_tensors

    return isinstance(target, dict | tv_tensors.Mask | tv_tensors.Image)


def _with_area(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out boxes of which the crop has left nothing."""
    boxes = target["boxes"]
    kept = ((boxes[:, 2:] - boxes[:, :2]) > 1e-3).all(1)
    return {name: value[kept] for name, value in target.items()}


@dataclass(frozen=True, eq=False)
class BoxTargets:
    """Boxes and classes of images.

    Attributes:
        boxes: For every image (n, 4) as x1, y1, x2, y2 in pixels, or in fractions of the image.
        labels: For every image (n,) classes, from 1; 0 is the background of torchvision's detectors.
        are_fractions: Whether boxes are fractions.
    """

    boxes: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    are_fractions: bool = False

    def __len__(self) -> int:
        return len(self.boxes)

    def read(self, place: int, size: tuple[int, int]) -> dict[str, Any]:
        """See `Targets.read`: a mapping with boxes and labels."""
        from torchvision import tv_tensors

        height, width = size
        boxes = self.boxes[place]
        if self.are_fractions:
            boxes = boxes * torch.tensor([width, height, width, height])
        boxes = boxes.clone()
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        placed = tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYXY, canvas_size=size)  # pyright: ignore
        return {"boxes": placed, "labels": self.labels[place]}


@dataclass(frozen=True, eq=False)
class MaskTargets:
    """Masks with one class index per pixel, as image files.

    Attributes:
        files: One for each image.
    """

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, place: int, size: tuple[int, int]) -> Any:
        """See `Targets.read`.

        Raises:
            DataError: If the mask has another size than its image, or more than one channel.
        """
        from torchvision import tv_tensors

        path = self.files[place]
        mask = open_mask(path)
        if mask.shape != size:
            raise DataError(
                f"{path} must have one class per pixel of its image, {size[1]} x {size[0]}; got an array of the shape "
                f"{mask.shape}. Save it in one channel and in the size of the image."
            )
        return tv_tensors.Mask(torch.from_numpy(mask.astype(np.int64)))


@dataclass(frozen=True, eq=False)
class ImageTargets:
    """Images that a model shall make of others, such as those without noise, or of twice the size.

    Attributes:
        files: One for each image.
        channels: Of each of them.
    """

    files: tuple[Path, ...]
    channels: int = 3

    def __len__(self) -> int:
        return len(self.files)

    def read(self, place: int, size: tuple[int, int]) -> Any:
        """See `Targets.read`."""
        from torchvision import tv_tensors

        del size
        path = self.files[place]
        pixels = open_pixels(path, lambda: str(path), self.channels)
        return tv_tensors.Image(torch.from_numpy(np.array(pixels)).permute(2, 0, 1))


@dataclass(frozen=True, eq=False)
class NumberTargets:
    """Rows of numbers.

    Attributes:
        rows: (n, columns) float32.
    """

    rows: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, place: int, size: tuple[int, int]) -> Tensor:
        """See `Targets.read`."""
        del size
        return self.rows[place]


def as_lists(items: list[Any]) -> tuple[list[Tensor], list[Any]]:
    """Collate images of different sizes with their boxes: a list of images and a list of targets."""
    return [image for image, _ in items], [target for _, target in items]


def read_coco(folder: Path, preprocessing: Preprocessing) -> dict[str, FileItems]:
    """Read COCO files: ``annotations/{train,val,test}.json`` (or ``instances_*.json``) and images beside them.

    Crowds are left out, and so are boxes without an area. Classes are numbered from 1 in the order of their ids.

    Args:
        folder: Holds ``annotations``, and images in ``images`` or in a folder of the split's name.
        preprocessing: How the images become inputs.

    Returns:
        The splits that are there, by name.

    Raises:
        DataError: If annotations or images are missing or damaged.
    """
    found: dict[str, FileItems] = {}
    names: tuple[str, ...] | None = None
    for split, path in files_of_splits(folder / "annotations", "*.json").items():
        data = read_json(path)
        try:
            images, boxes, here = coco_notes(data)
        except ValueError as error:
            raise DataError(f"{path} must be in COCO format; it is not: {error}.") from error
        if names is not None and here != names:
            raise DataError(f"all annotation files must have the same categories; {path} has {here}, others {names}.")
        names = here
        places = dict.fromkeys((split, path.stem.split("_")[-1]))
        files = [_image_beside(folder, tuple(places), name, path) for name in images.values()]
        found[split] = _boxes_of(files, [boxes[which] for which in images], preprocessing, names)
    return _checked(found, folder, "annotations/train.json in COCO format")


def read_yolo(folder: Path, preprocessing: Preprocessing) -> dict[str, FileItems]:
    """Read YOLO text files: ``images/{train,val,test}/*`` with ``labels/{train,val,test}/*.txt``, or the split first.

    A line is ``class x y width height`` in fractions of the image; classes are numbered from 0 there, and from 1 here.
    Names are taken from ``classes.txt`` if it is there. An image without a file has no objects.

    Raises:
        DataError: If a line is not of this form, or images are missing.
    """
    found: dict[str, FileItems] = {}
    names = _listed_names(folder)
    highest = 0
    for split in SPLITS:
        pair = paired_folders(folder, split, ("labels",))
        if pair is None:
            continue
        images, labels = pair
        files = images_in(images)
        boxes = [_yolo_lines(labels / f"{file.stem}.txt") for file in files]
        highest = max([highest, *(label for each in boxes for _, label in each)])
        found[split] = _boxes_of(files, boxes, preprocessing, (), are_fractions=True)
    names = names or tuple(f"class {number}" for number in range(highest))
    if highest > len(names):
        raise DataError(
            f"{folder / 'classes.txt'} must name every class; got {len(names)} names and a class number {highest - 1}."
        )
    found = {split: replace(items, class_names=names) for split, items in found.items()}
    return _checked(found, folder, "images/train and labels/train in YOLO format")


def _listed_names(folder: Path) -> tuple[str, ...]:
    """Names of the classes in ``classes.txt``, one a line in the order of their indices; none without the file."""
    listed = folder / "classes.txt"
    names = read_text_file(listed, "names of classes").split("\n") if listed.is_file() else []
    return tuple(name.strip() for name in names if name.strip())


def _yolo_lines(path: Path) -> list[tuple[list[float], int]]:
    if not path.exists():
        return []
    found: list[tuple[list[float], int]] = []
    for number, line in enumerate(read_text_file(path, "lines of boxes").splitlines(), 1):
        if not line.strip():
            continue
        try:
            label, x, y, width, height = line.split()
            middle, half = (float(x), float(y)), (float(width) / 2, float(height) / 2)
            box = [middle[0] - half[0], middle[1] - half[1], middle[0] + half[0], middle[1] + half[1]]
            entry = (box, int(label) + 1)
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: must be `class x y width height`; got {line[:80]!r}. Correct the line."
            ) from error
        if entry[1] < 1 or min(half) < 0 or not all(abs(side) <= 2 for side in box):  # NaN is not.
            raise DataError(
                f"{path}, line {number}: the box must be in fractions of the image, and the class not negative; got "
                f"{line[:80]!r}. Divide by the image's width and height."
            )
        if entry[1] > _MOST_CLASSES:
            raise DataError(f"{path}, line {number}: the class must be below {_MOST_CLASSES}; got {line[:80]!r}.")
        if min(half) > 0:
            found.append(entry)
    return found


def read_voc(folder: Path, preprocessing: Preprocessing) -> dict[str, FileItems]:
    """Read Pascal VOC: ``Annotations/*.xml``, ``JPEGImages/*``, and lists in ``ImageSets/Main/{train,val,test}.txt``.

    Objects marked difficult are left out. Classes are numbered from 1 in alphabetical order.

    Raises:
        DataError: If a file is missing or damaged.
    """
    notes: dict[str, list[tuple[str, list[tuple[list[float], str]]]]] = {}
    for split, path in files_of_splits(folder / "ImageSets" / "Main", "*.txt").items():
        lines = read_text_file(path, "a list of names").splitlines()
        stems = [_inside(folder, line.split()[0]) for line in lines if line.strip()]
        notes[split] = [_voc_objects(folder / "Annotations" / f"{stem}.xml") for stem in stems]
    names = tuple(sorted({name for each in notes.values() for _, boxes in each for _, name in boxes}))
    number = {name: place for place, name in enumerate(names, 1)}
    found: dict[str, FileItems] = {}
    for split, images in notes.items():
        files = [_image_beside(folder, ("JPEGImages",), name, folder / "Annotations") for name, _ in images]
        boxes = [[(box, number[name]) for box, name in each] for _, each in images]
        found[split] = _boxes_of(files, boxes, preprocessing, names)
    return _checked(found, folder, "ImageSets/Main/train.txt in Pascal VOC format")


def _voc_objects(path: Path) -> tuple[str, list[tuple[list[float], str]]]:
    from xml.etree import ElementTree

    try:
        text = read_xml(path)
        if "<!ENTITY" in text or "<!DOCTYPE" in text:
            # Entities can name other files and grow without bound; annotations have none.
            raise ValueError("it declares entities")
        root = ElementTree.fromstring(text)
        found: list[tuple[list[float], str]] = []
        for item in root.iter("object"):
            if (item.findtext("difficult") or "0").strip() == "1":
                continue
            box = item.find("bndbox")
            sides = [
                float((box.findtext(name) if box is not None else None) or "nan")
                for name in ("xmin", "ymin", "xmax", "ymax")
            ]
            if not all(np.isfinite(sides)):
                raise ValueError("an object without a box")
            if sides[2] > sides[0] and sides[3] > sides[1]:
                found.append((sides, (item.findtext("name") or "").strip()))
        return (root.findtext("filename") or f"{path.stem}.jpg").strip(), found
    except (OSError, ValueError, RecursionError, ElementTree.ParseError) as error:
        raise DataError(
            f"{path} must be an annotation in Pascal VOC format; got {error}. Repair or remove it."
        ) from error


def read_masks(folder: Path, preprocessing: Preprocessing) -> dict[str, FileItems]:
    """Read ``{train,val,test}/images/*`` with ``{train,val,test}/labels/*.png`` (or ``masks``), matched by name.

    Names of the classes are taken from ``classes.txt`` if it is there.

    Raises:
        DataError: If an image has no mask.
    """
    found: dict[str, FileItems] = {}
    for split in SPLITS:
        if (pair := paired_folders(folder, split, MASK_FOLDERS)) is not None:
            files, masks = _images_with_partners(*pair, "mask")
            found[split] = FileItems(files, MaskTargets(masks), preprocessing, class_names=_listed_names(folder))
    return _checked(found, folder, "train/images and train/labels")


def read_pairs(folder: Path, preprocessing: Preprocessing) -> dict[str, FileItems]:
    """Read ``{train,val,test}/images/*`` with the wanted images in ``{train,val,test}/targets/*``, matched by name.

    Raises:
        DataError: If an image has no partner.
    """
    found: dict[str, FileItems] = {}
    for split in SPLITS:
        if (pair := paired_folders(folder, split, ("targets",))) is not None:
            files, wanted = _images_with_partners(*pair, "wanted image")
            found[split] = FileItems(files, ImageTargets(wanted, preprocessing.channels), preprocessing)
    return _checked(found, folder, "train/images and train/targets")


def paired_folders(folder: Path, split: str, partners: Sequence[str]) -> tuple[Path, Path] | None:
    """Find the folder of a split's images, and the one of their partners; None if they are not there.

    Either ``train/images`` and ``train/labels``, or ``images/train`` and ``labels/train``. The first partner is taken
    if no other is there.
    """
    for other in _OTHER_NAMES.get(split, (split,)):
        for images, places in (
            (folder / other / "images", [folder / other / name for name in partners]),
            (folder / "images" / other, [folder / name / other for name in partners]),
        ):
            if images.is_dir():
                return images, next((place for place in places if place.is_dir()), places[0])
    return None


def _images_with_partners(images: Path, partners: Path, what: str) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    files = images_in(images)
    found = {path.stem: path for path in (images_in(partners) if partners.is_dir() else ())}
    missing = [file for file in files if file.stem not in found]
    if missing:
        raise DataError(
            f"every image must have a {what} of its name in {partners}; got none for {missing[0]} "
            f"({len(missing)} images in all)."
        )
    return files, tuple(found[file.stem] for file in files)


def read_table(folder: Path, preprocessing: Preprocessing) -> dict[str, FileItems]:
    """Read ``{train,val,test}.csv``: a column ``image`` with paths relative to the folder, all others numbers.

    Columns are classes with 0 or 1 for `MultiLabel`, and values for `Regression`.

    Raises:
        DataError: If a file is not of this form, or an image is missing.
    """
    found: dict[str, FileItems] = {}
    for split, path in files_of_splits(folder, "*.csv").items():
        rows = read_table_rows(path)
        columns = tuple(name for name in rows[0] if name != "image")
        numbers = np.empty((len(rows), len(columns)), dtype=np.float32)
        for line, row in enumerate(rows):
            for place, name in enumerate(columns):
                try:
                    numbers[line, place] = float(row[name])
                except ValueError as error:
                    raise DataError(
                        f"{path}, line {line + 2}, column {name}: must be a number; got {shortened(row[name])}."
                    ) from error
        files = [_image_beside(folder, (), row["image"], path) for row in rows]
        found[split] = FileItems(tuple(files), NumberTargets(torch.from_numpy(numbers)), preprocessing, None, columns)
    return _checked(found, folder, "train.csv")


def read_unlabeled(folder: Path, preprocessing: Preprocessing) -> dict[str, FileItems]:
    """Read images without labels: those of ``train``, ``val`` and ``test`` folders, or all below the folder.

    Raises:
        DataError: If there are none.
    """
    found: dict[str, FileItems] = {}
    for split in SPLITS:
        for other in _OTHER_NAMES.get(split, (split,)):
            if (folder / other).is_dir() and split not in found and (files := images_in(folder / other, deep=True)):
                found[split] = FileItems(files, None, preprocessing)
    if "train" not in found:
        found = {"train": FileItems(images_in(folder, deep=True), None, preprocessing)}
    return _checked(found, folder, "images")


def _boxes_of(
    files: Sequence[Path],
    boxes: Sequence[Sequence[tuple[list[float], int]]],
    preprocessing: Preprocessing,
    names: tuple[str, ...],
    *,
    are_fractions: bool = False,
) -> FileItems:
    placed = tuple(torch.tensor([box for box, _ in each], dtype=torch.float32).reshape(-1, 4) for each in boxes)
    labels = tuple(torch.tensor([label for _, label in each], dtype=torch.int64) for each in boxes)
    return FileItems(tuple(files), BoxTargets(placed, labels, are_fractions), preprocessing, None, names)


def files_of_splits(folder: Path, pattern: str) -> dict[str, Path]:
    """Find one file per split: the one whose name is the split's, or else ends with it or begins with it."""
    files = sorted(folder.glob(pattern)) if folder.is_dir() else []
    found: dict[str, Path] = {}
    for split in SPLITS:
        for other in _OTHER_NAMES.get(split, (split,)):
            names = [path for path in files if path.stem.lower() == other]
            names += [path for path in files if any(part == other for part in _words(path.stem))]
            if names and split not in found:
                found[split] = names[0]
    return found


def _words(stem: str) -> list[str]:
    """``instances_val2017`` is the words instances and val."""
    return ["".join(letter for letter in part if not letter.isdigit()) for part in stem.lower().split("_")]


def images_in(folder: Path, *, deep: bool = False) -> tuple[Path, ...]:
    """Return the image files of a folder by name; with ``deep``, of those inside of it too."""
    paths = folder.rglob("*") if deep else folder.glob("*")
    shown = (path for path in paths if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."))
    return tuple(sorted(path for path in shown if path.is_file()))


def _image_beside(folder: Path, splits: Sequence[str], name: str, named_in: Path) -> Path:
    """Find an image file of an annotation: in ``images``, in a folder of the split, or below the folder."""
    _inside(folder, name)
    inner = ("images", *(f"images/{split}" for split in splits), *splits, "")
    try:
        found = next((place for inside in inner if (place := folder / inside / name).is_file()), None)
    except OSError:  # The name is too long for a file.
        found = None
    if found is None:
        places = ", ".join(str(folder / inside) for inside in ("images", *splits))
        raise DataError(
            f"{shortened(name)} must be a file in {places} or {folder}; there is none. {named_in} names it: add the "
            "image, or remove what names it."
        )
    return found


def _inside(folder: Path, name: str) -> str:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"image files must lie inside of {folder}; got {shortened(name)}.")
    return name


def _checked(found: dict[str, FileItems], folder: Path, wanted: str) -> dict[str, FileItems]:
    if "train" not in found or not len(found["train"]):
        inside = sorted(path.name for path in folder.iterdir())[:_SHOWN] if folder.is_dir() else "no such folder"
        raise DataError(f"{folder} must hold {wanted}; got {inside}. See docs/data.md for the formats.")
    for split, items in found.items():
        if not len(items):
            raise DataError(f"{folder} must hold at least one image in every split; `{split}` has none.")
    return found

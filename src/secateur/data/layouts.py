"""Folders of images with boxes, masks, numbers or nothing: which layout a folder has, and its splits for a run.

Everything that can be wrong with such a folder is looked for before anything is computed: files that cannot be read,
images of different sizes, transparency that would be lost, values of masks, boxes outside of their images.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from secateur._batches import split_batch
from secateur.data.annotated import (
    MASK_FOLDERS,
    BoxTargets,
    FileItems,
    MaskTargets,
    NumberTargets,
    as_lists,
    files_of_splits,
    images_in,
    paired_folders,
    read_coco,
    read_masks,
    read_pairs,
    read_table,
    read_unlabeled,
    read_voc,
    read_yolo,
)
from secateur.data.image_files import (
    ARRAY_SUFFIX,
    ImageProblems,
    decoding_problem,
    end_problem,
    header_problem,
    open_pixels,
    read_image_header,
)
from secateur.data.images import decoding_threads
from secateur.data.loaders import ItemSplit, OwnData, own_data
from secateur.data.preprocessing import MASK_BORDER, Preprocessing
from secateur.errors import DataError

Reader = Callable[[Path, Preprocessing], dict[str, FileItems]]
_SHOWN = 8
_OUTSIDE = 2.0
"""A box may reach this many pixels beyond its image: some formats count from 1."""


@dataclass(frozen=True)
class FolderLayout:
    """How the images and annotations of a folder are arranged.

    Attributes:
        name: In front of the folder: ``coco:FOLDER``.
        holds: What such a folder holds, in words.
        is_in: Whether a folder has it.
        read: Reads its splits.
    """

    name: str
    holds: str
    is_in: Callable[[Path], bool]
    read: Reader

    def __str__(self) -> str:
        return f"{self.name}: {self.holds}"


def _has_coco(folder: Path) -> bool:
    return "train" in files_of_splits(folder / "annotations", "*.json")


def _has_voc(folder: Path) -> bool:
    return (folder / "Annotations").is_dir() and "train" in files_of_splits(folder / "ImageSets" / "Main", "*.txt")


def _has_yolo(folder: Path) -> bool:
    pair = paired_folders(folder, "train", ("labels",))
    return pair is not None and any(path.suffix == ".txt" for path in _entries(pair[1]))


def _has_masks(folder: Path) -> bool:
    pair = paired_folders(folder, "train", MASK_FOLDERS)
    return pair is not None and pair[1].is_dir() and bool(images_in(pair[1]))


def _has_pairs(folder: Path) -> bool:
    pair = paired_folders(folder, "train", ("targets",))
    return pair is not None and pair[1].is_dir()


def _has_table(folder: Path) -> bool:
    return "train" in files_of_splits(folder, "*.csv")


def _has_images(folder: Path) -> bool:
    return bool(images_in(folder, deep=True))


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


COCO = FolderLayout("coco", "annotations/train.json (or instances_*.json) and images/", _has_coco, read_coco)
YOLO = FolderLayout(
    "yolo", "images/train/*.jpg and labels/train/*.txt, or train/images and train/labels", _has_yolo, read_yolo
)
VOC = FolderLayout("voc", "Annotations/*.xml, JPEGImages/ and ImageSets/Main/train.txt", _has_voc, read_voc)
MASKS = FolderLayout(
    "masks", "train/images/*.jpg and train/labels/*.png with a class index per pixel", _has_masks, read_masks
)
PAIRS = FolderLayout("pairs", "train/images/*.png and the wanted train/targets/*.png", _has_pairs, read_pairs)
TABLE = FolderLayout("table", "train.csv with a column `image` and columns of numbers", _has_table, read_table)
UNLABELED = FolderLayout("images", "image files, in train/ and val/ or anywhere", _has_images, read_unlabeled)
BOXES = (COCO, YOLO, VOC)
"""Layouts of boxes."""
ANNOTATED = (*BOXES, MASKS, PAIRS, TABLE)
LAYOUTS = (*ANNOTATED, UNLABELED)
"""All layouts; that of classes, a folder for each, is read by `load_data`."""


def find_layout(spec: str | Path, wanted: Sequence[FolderLayout], task: str) -> tuple[FolderLayout, Path]:
    """Return the layout of a folder, without reading any image.

    Args:
        spec: A folder, or ``NAME:FOLDER`` with the name of its layout.
        wanted: Layouts that the task can use. That of unlabeled images counts only where no other is found.
        task: Name of the task, for messages.

    Raises:
        DataError: If there is no such folder, or it has none of the layouts, or several.
    """
    known = {layout.name: layout for layout in LAYOUTS}
    name, colon, rest = str(spec).partition(":")
    named = known[name] if colon and name in known else None
    folder = Path(rest if named else spec)
    listed = "\n".join(f"- {layout}" for layout in wanted)
    if named is not None and named not in wanted:
        raise DataError(f"`data` of the task {task} must have one of these layouts; got {name}.\n{listed}")
    if not folder.is_dir():
        raise DataError(
            f"`data` must be a folder for the task {task}; there is no folder {str(folder)[:500]}.\n{listed}"
        )
    if named is not None:
        return named, folder
    found = [layout for layout in wanted if layout.is_in(folder)]
    found = [layout for layout in found if layout is not UNLABELED] or found
    if len(found) == 1:
        return found[0], folder
    inside = ", ".join(sorted(path.name for path in folder.iterdir())[:_SHOWN]) or "nothing"
    if found:
        names = " or ".join(f"{layout.name}:{folder}" for layout in found)
        raise DataError(f"`data` must have one layout; {folder} has several. Say which: {names}.")
    other = [layout for layout in ANNOTATED if layout not in wanted and layout.is_in(folder)]
    hint = f" It looks like {' or '.join(layout.name for layout in other)}, which is for another task." if other else ""
    raise DataError(
        f"`data` of the task {task} must have one of these layouts; {folder} holds {inside}.{hint}\n{listed}"
    )


def describe_annotations(folder: Path) -> str:
    """Return the names of the layouts with annotations that a folder has, joined by `or`; empty if there are none."""
    return " or ".join(layout.name for layout in ANNOTATED if layout.is_in(folder))


@dataclass(frozen=True)
class Seen:
    """What the headers of all images say.

    Attributes:
        channels: 1 if all are gray, 3 for color; or the number that was asked for.
        size: Height and width, if all have the same; else None.
    """

    channels: int
    size: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class OwnImages:
    """A folder that was looked at, before it is known how its images become inputs.

    Attributes:
        layout: How it is arranged.
        folder: The folder.
        splits: Its splits, whose preprocessing is not chosen yet.
        seen: What the images are like.
        skipped: Images that are left out because they cannot be used.
        outputs: Numbers that a model gives, as ``num_classes`` counts them; None where the data do not say.
        notes: What the reader of a report must know.
    """

    layout: FolderLayout
    folder: Path
    splits: Mapping[str, FileItems]
    seen: Seen
    skipped: tuple[str, ...]
    outputs: int | None
    notes: tuple[str, ...] = ()

    def to_data(
        self, rule: Preprocessing, *, labeled: bool, lists: bool, limit: int | None, held_out: float, seed: int
    ) -> OwnData:
        """Return the splits of a run.

        Args:
            rule: How images become inputs.
            labeled: Whether targets are given; else there are only inputs.
            lists: Whether batches are lists of images, of any size, instead of one tensor.
            limit: Number of training images to use, the first ones; None uses all.
            held_out: The fraction of the training images that is held out where there is no validation split.
            seed: Seed of that choice.

        Raises:
            DataError: If the limit is out of range, or nothing can be held out.
        """
        parts = {split: self._items(split, rule, labeled=labeled) for split in self.splits}
        count = len(cast(Any, parts["train"]))
        if limit is not None and not 1 <= limit <= count:
            raise DataError(f"`limit` must lie between 1 and the {count} training images there are; got {limit}.")
        collate, split = None if not lists else as_lists if labeled else list, split_batch if labeled else _inputs_alone
        splits = {name: ItemSplit(items, collate=collate, split=split) for name, items in parts.items()}
        train = splits["train"] if limit is None else splits["train"].subset(range(limit))
        notes = list(self.notes)
        if "val" not in splits:
            train, splits["val"] = _held_out(train, held_out, seed)
            notes.append(f"There is no validation split: {len(splits['val'])} training images were held out for it.")
        given = (train, splits["val"], *([splits["test"]] if "test" in splits else []))
        found = own_data(given, seed=seed, name=self.folder.resolve().name)
        return replace(
            found,
            classes=self._names if labeled else (),
            mean=rule.mean,
            std=rule.std,
            skipped=self.skipped,
            notes=(*notes, *found.notes),
            preprocessing=rule,
            outputs=self.outputs,
        )

    @property
    def _names(self) -> tuple[str, ...]:
        """Class names in the order of a model's outputs: those of detectors begin with the background."""
        first = next(iter(self.splits.values()))
        return (("background",) if isinstance(first.targets, BoxTargets) else ()) + first.class_names

    def _items(self, split: str, rule: Preprocessing, *, labeled: bool) -> Dataset[Any]:
        items = replace(self.splits[split], preprocessing=rule)
        items = items if labeled else replace(items, targets=None)
        if not self.skipped:
            return items
        out = set(self.skipped)
        kept = [place for place, path in enumerate(items.files) if str(path) not in out]
        if not kept:
            raise DataError(f"the split `{split}` of {self.folder} must have an image that can be used; got none.")
        return Subset(items, kept)


def _inputs_alone(batch: Any) -> tuple[Any, None]:
    """A list of two images is no pair of inputs and targets."""
    return batch, None


def _held_out(train: ItemSplit, fraction: float, seed: int) -> tuple[ItemSplit, ItemSplit]:
    held = max(1, round(fraction * len(train)))
    if held >= len(train):
        raise DataError(f"`data` must hold enough images to validate on; got {len(train)}. Add a folder `val`.")
    order = np.random.default_rng(seed).permutation(len(train))
    return train.subset(sorted(order[held:].tolist())), train.subset(sorted(order[:held].tolist()))


def look_at(
    layout: FolderLayout, folder: Path, *, channels: int | None, void: int | None = None, skip_bad_images: bool = False
) -> OwnImages:
    """Read the annotations of a folder and look at all of its images.

    Args:
        layout: See `find_layout`.
        folder: The folder.
        channels: Channels of the inputs; None takes what the images have, and refuses transparent ones.
        void: Value of pixels of masks that do not count; None means 255, see `MASK_BORDER`.
        skip_bad_images: Leave out images that cannot be decoded instead of refusing them.

    Raises:
        DataError: If anything cannot be used; the message names it and says what to do.
    """
    splits = layout.read(folder, Preprocessing(channels=channels or 3))
    files = [path for items in splits.values() for path in items.files]
    seen, sizes, skipped = _look_at_files(folder, files, channels, skip_bad_images)
    outputs, notes = None, list[str]()
    usable = {name: [path in sizes for path in items.files] for name, items in splits.items()}
    first = next(iter(splits.values()))
    if isinstance(first.targets, BoxTargets):
        outputs, notes = len(first.class_names) + 1, _look_at_boxes(splits, sizes)
    elif isinstance(first.targets, MaskTargets):
        found, names = _look_at_masks(splits, usable, sizes, MASK_BORDER if void is None else void), first.class_names
        if names and len(names) < found:
            raise DataError(
                f"{folder / 'classes.txt'} must have a line for each class of the masks; got {len(names)} names, and a "
                f"mask holds class {found - 1}, the first of which is 0. Add the missing names, or remove the file."
            )
        outputs = max(found, len(names))
    elif isinstance(first.targets, NumberTargets):
        outputs = len(first.class_names)
        _look_at_numbers(splits)
    return OwnImages(layout, folder, splits, seen, skipped, outputs, tuple(notes))


def _look_at_files(
    folder: Path, files: Sequence[Path], channels: int | None, skip: bool
) -> tuple[Seen, dict[Path, tuple[int, int]], tuple[str, ...]]:
    def problem_of(path: Path) -> DataError | None:
        if path.suffix.lower() == ARRAY_SUFFIX or skip or (channels is not None and channels > 4):
            return decoding_problem(path, channels)
        return header_problem(path) or _transparency_problem(path, channels) or end_problem(path, channels)

    problems = ImageProblems(skip)
    with ThreadPoolExecutor(decoding_threads()) as pool:
        for path, problem in zip(files, pool.map(problem_of, files), strict=True):
            if problem is not None:
                problems.note(str(path), problem)
        good = [path for path in files if str(path) not in problems.found]
        problems.check_left(folder.name, len(files), len(good))
        skipped = problems.settle(folder.name, len(files))
        headers = list(pool.map(_header, good))
    sizes = {path: size for path, (_, size) in zip(good, headers, strict=True)}
    gray = all(depth == 1 for depth, _ in headers)
    same = set(sizes.values())
    deepest = max(depth for depth, _ in headers)
    found = channels or (deepest if deepest > 4 else 1 if gray else 3)
    return Seen(found, next(iter(same)) if len(same) == 1 else None), sizes, skipped


def _header(path: Path) -> tuple[int, tuple[int, int]]:
    """Channels without transparency, and height and width."""
    if path.suffix.lower() == ARRAY_SUFFIX:
        height, width, depth = open_pixels(path, lambda: str(path)).shape
        return depth, (height, width)
    mode, (width, height) = read_image_header(path)
    return 1 if mode in ("1", "L", "LA") else 3, (height, width)


def _transparency_problem(path: Path, channels: int | None) -> DataError | None:
    if channels is not None:
        return None
    mode, _ = read_image_header(path)
    return decoding_problem(path) if mode in ("LA", "PA", "RGBA", "P") else None


def _look_at_boxes(splits: Mapping[str, FileItems], sizes: Mapping[Path, tuple[int, int]]) -> list[str]:
    notes: list[str] = []
    empty, beyond = 0, 0
    for name, items in splits.items():
        targets = cast(BoxTargets, items.targets)
        for path, boxes in zip(items.files, targets.boxes, strict=True):
            empty += len(boxes) == 0
            if not len(boxes) or path not in sizes:
                continue
            height, width = (1, 1) if targets.are_fractions else sizes[path]
            slack = _OUTSIDE / max(*sizes[path]) if targets.are_fractions else _OUTSIDE
            far = (boxes[:, 0] >= width) | (boxes[:, 1] >= height) | (boxes[:, 2] <= 0) | (boxes[:, 3] <= 0)
            if bool(far.any()):
                box = [round(side, 3) for side in boxes[far][0].tolist()]
                raise DataError(
                    f"boxes must lie in their image; {path}, {sizes[path][1]} x {sizes[path][0]}, has the box {box} "
                    "(x1, y1, x2, y2) outside of it. Correct the annotations, or the units of the boxes."
                )
            most = torch.tensor([width, height]) + slack
            beyond += int(((boxes[:, :2] < -slack) | (boxes[:, 2:] > most)).any(1).sum())
        if not sum(map(len, targets.boxes)):
            raise DataError(f"the split `{name}` must have at least one box; got none in {len(items)} images.")
    if empty:
        count = sum(map(len, splits.values()))
        notes.append(f"{empty} of {count} images have no box: they count as images without objects.")
    if beyond:
        notes.append(f"{beyond} boxes reach beyond their image, and are cut at its border.")
        warnings.warn(notes[-1], stacklevel=3)
    return notes


def _look_at_masks(
    splits: Mapping[str, FileItems],
    usable: Mapping[str, Sequence[bool]],
    sizes: Mapping[Path, tuple[int, int]],
    void: int,
) -> int:
    """Read every mask, and return the number of classes."""

    def values(place: tuple[MaskTargets, int, Path]) -> np.ndarray:
        targets, number, path = place
        return np.unique(np.asarray(targets.read(number, sizes[path])))

    places = [
        (cast(MaskTargets, items.targets), number, path)
        for name, items in splits.items()
        for number, path in enumerate(items.files)
        if usable[name][number]
    ]
    with ThreadPoolExecutor(decoding_threads()) as pool:
        found = sorted({int(value) for each in pool.map(values, places) for value in each} - {void})
    if not found:
        raise DataError(f"masks must hold at least one class; got only {void}, which counts for nothing (`void`).")
    if found == [0] and void == MASK_BORDER:
        raise DataError(
            f"masks must hold a class index per pixel; got only 0 and {MASK_BORDER}, which counts for nothing. If they "
            "are pictures in black and white, save class 1 as the value 1, or name another value as `void`."
        )
    if found[-1] > 4 * len(found) + 16:
        warnings.warn(
            f"The masks hold {len(found)} values up to {found[-1]}: are they class indices? A value that does not "
            "count is named by `void`.",
            stacklevel=3,
        )
    return found[-1] + 1


def _look_at_numbers(splits: Mapping[str, FileItems]) -> None:
    for name, items in splits.items():
        rows = cast(NumberTargets, items.targets).rows
        if not bool(torch.isfinite(rows).all()):
            line = int((~torch.isfinite(rows)).any(1).nonzero()[0, 0])
            raise DataError(f"{name}.csv, line {line + 2}: numbers must be finite; got {rows[line].tolist()}.")

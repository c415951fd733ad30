"""``--task``: folders of boxes, masks, numbers and nothing go from words to an artifact and a report."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import picture_sets as sets
import pytest
from command_line import secateur
from PIL import Image

from secateur.cli.tasks import named_task
from secateur.cli.words import channels_of, image_size, resizing_of
from secateur.data.preprocessing import Interpolation, ResizeMode, Resizing
from secateur.errors import DataError, SecateurError, TrainingError
from secateur.tasks import Imitation, Segmentation

SMALL = (
    *("--trust-source", "--budget", "macs=70%", "--strategy", "uniform", "--importance", "l1", "--divisor", 2),
    *("--calibration", 8, "--batch-size", 4, "--lr", 0.001, "--export", "", "--threads", 1, "--quiet"),
)

RUNS: dict[str, tuple[Callable[[Path], Path], str, str, tuple[object, ...]]] = {
    "detection": (sets.write_coco, "SmallDetector", "mAP@0.5", ()),
    "segmentation": (sets.write_masks, "segmenter", "mIoU", ("--image-size", "12x20")),
    "multilabel": (lambda f: sets.write_table(f, several_classes=True), "numbers", "mean average precision", ()),
    "regression": (sets.write_table, "numbers", "root mean squared error", ()),
    "image-to-image": (sets.write_pairs, "restorer", "PSNR", ()),
    "imitation": (sets.write_unlabeled, "numbers", "distance from the original's outputs", ()),
    "imitation:detection": (sets.write_yolo, "SmallDetector", "distance from the original's outputs", ()),
}


def compress(out: Path, data: object, model: str, *words: object):
    return secateur("compress", "--model", f"python:picture_sets:{model}", "--data", data, "--out", out, *SMALL, *words)


SLOW = ("multilabel", "regression", "image-to-image")


@pytest.mark.parametrize("task", [pytest.param(t, marks=pytest.mark.slow) if t in SLOW else t for t in RUNS])
def test_words_become_an_artifact_with_the_metric_of_the_task(tmp_path: Path, task: str) -> None:
    write, model, metric, words = RUNS[task]
    found = compress(tmp_path / "out", write(tmp_path / "data"), model, "--task", task, *words)
    assert found.exit_code == 0, found.output
    stored = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert stored["metrics"]["test_scores"]["metric"]["name"] == metric
    assert {step["n"] for step in stored["metrics"]["test_scores"]["steps"]} <= {6, 2}
    rule = stored["input"]["preprocessing"]
    assert rule["size"] == ([12, 20] if words else None if "detection" in task else [16, 16])
    assert metric in found.stdout
    assert "top-1" not in (tmp_path / "out" / "report.html").read_text()
    if task == "segmentation":
        last = stored["metrics"]["test_scores"]["steps"][-1]["value"]
        again = secateur(
            *("evaluate", "--model", tmp_path / "out", "--task", task, "--data", tmp_path / "data", "--trust-source")
        )
        assert f"test mIoU {100 * last:.2f} % of 6 images" in again.stdout, again.output


TRAIN = ("--trust-source", "--epochs", 1, "--batch-size", 4, "--export", "", "--threads", 1, "--quiet")


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_a_base_of_any_task_is_trained(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.pipeline.finalize.latency_between", lambda *_: ((), ()))
    monkeypatch.setattr("secateur.pipeline.finalize.both_files", lambda *_: ())
    write, model, metric, words = RUNS[task]
    found = secateur(
        *("train", "--model", f"python:picture_sets:{model}", "--data", write(tmp_path / "data"), "--task", task),
        *("--out", tmp_path / "base", *TRAIN, *words),
    )
    assert found.exit_code == 0, found.output
    stored = json.loads((tmp_path / "base" / "secateur.json").read_text())["metrics"]
    assert stored["test_scores"]["metric"]["name"] == metric
    assert [step["step"] for step in stored["test_scores"]["steps"]] == ["before", "trained"]
    assert stored["training"]["recipe"] == "adamw"
    assert "top-1" not in (tmp_path / "base" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--task", "imitation"), "`--task` must have labels to learn from; got imitation"),
        (("--task", "segmentation", "--mixup", 0.2), "`--mixup` must go with --task classification"),
        (("--task", "segmentation", "--label-smoothing", 0.1), "`--label-smoothing` must go with --task classif"),
    ],
)
def test_training_refuses_what_has_no_effect(tmp_path: Path, words: tuple[object, ...], said: str) -> None:
    data = sets.write_masks(tmp_path / "data")
    given = ("train", "--model", "python:picture_sets:segmenter", "--data", data, "--out", tmp_path / "base")
    found = secateur(*given, *TRAIN, *words)
    assert found.exit_code == 2
    assert said in " ".join(found.stderr.split())


@pytest.mark.parametrize("write", [sets.write_coco, sets.write_yolo, sets.write_voc])
def test_layouts_of_boxes_are_recognized(tmp_path: Path, write) -> None:
    found = secateur(
        *("evaluate", "--model", "python:picture_sets:SmallDetector", "--task", "detection", "--trust-source"),
        *("--data", write(tmp_path / "data"), "--threads", 1),
    )
    assert found.exit_code == 0, found.output
    assert "test mAP@0.5" in found.stdout
    assert "of 6 images" in found.stdout


def test_a_detector_is_inspected_and_distilled(tmp_path: Path) -> None:
    model, data = "python:picture_sets:SmallDetector", sets.write_coco(tmp_path / "data")
    shown = secateur("inspect", "--model", model, "--task", "detection", "--image-size", 16, "--trust-source")
    assert shown.exit_code == 0, shown.output
    assert "Reachable: macs" in shown.stdout
    words = ("--task", "detection", "--data", data, "--trust-source", "--epochs", 1, "--batch-size", 4, "--lr", 0.001)
    found = secateur(
        *("distill", "--teacher", model, "--student", model, *words, "--out", tmp_path / "out", "--export", ""),
        *("--threads", 1, "--quiet"),
    )
    assert found.exit_code == 0, found.output
    assert "mAP@0.5" in found.stdout


def test_transparency_is_kept_when_it_is_asked_for_and_never_lost_in_silence(tmp_path: Path) -> None:
    folder = sets.write_table(tmp_path / "data")
    for path in (folder / "images").iterdir():
        pixels = np.dstack([np.asarray(Image.open(path)), np.full((16, 16), 7, np.uint8)])
        Image.fromarray(pixels).save(path)
    refused = compress(tmp_path / "out", folder, "numbers", "--task", "regression", "--epochs", 0)
    assert refused.exit_code == 2
    assert "transparent pixels unless `--channels` is given" in refused.stderr
    words = ("--task", "regression", "--trust-source", "--channels", 4, "--data", folder, "--threads", 1)
    found = secateur("evaluate", "--model", "python:picture_sets:transparent_numbers", *words)
    assert found.exit_code == 0, found.output
    assert "root mean squared error" in found.stdout


def test_numbers_of_words() -> None:
    assert image_size("240x320") == (240, 320)
    assert image_size(7) == (7, 7)
    assert image_size(None) is None
    assert channels_of("16") == (16, False)
    assert channels_of("bgr") == (3, True)
    assert resizing_of(None, None) is None
    assert resizing_of("crop:0.9,bicubic", None) == Resizing(ResizeMode.CROP, 0.9, Interpolation.BICUBIC)
    own = Resizing(ResizeMode.CROP, 0.7, Interpolation.NEAREST)
    assert resizing_of("squash", own) == Resizing(ResizeMode.SQUASH, 0.7, Interpolation.NEAREST)
    assert named_task("segmentation", void=11).task == Segmentation(void=11)
    assert named_task("imitation:segmentation").task == Imitation(Segmentation(void=255))


@pytest.mark.parametrize("text", ["0", "3x", "x", "1x2x3", "9999999", "a"])
def test_sizes_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="`--image-size` must be a height and a width"):
        image_size(text)


@pytest.mark.parametrize("text", ["", "big", "squash:2", "crop:x", "crop:2", "bilinear:1"])
def test_ways_of_resizing_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"`--resize` must be|`crop_fraction` must be in"):
        resizing_of(text, None)


@pytest.mark.parametrize("text", ["0", "17", "three", "-1", ""])
def test_channels_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="from 1 to 16"):
        channels_of(text)


@pytest.mark.parametrize(
    ("text", "void", "match"),
    [
        ("detect", None, "`--task` must be one of classification, multilabel"),
        ("imitation:imitation", None, "`--task` must be one of"),
        ("regression", 3, "`--void` must go with --task segmentation"),
        ("python:picture_sets:segmenter", None, "needs your consent"),
    ],
)
def test_tasks_that_are_none_are_refused(text: str, void: int | None, match: str) -> None:
    with pytest.raises(SecateurError, match=match):
        named_task(text, void=void)
    assert issubclass(TrainingError, SecateurError)


def _bad_boxes(folder: Path) -> Path:
    sets.write_coco(folder)
    path = folder / "annotations" / "train.json"
    data = json.loads(path.read_text())
    data["annotations"][0]["bbox"] = [100, 100, 5, 5]
    path.write_text(json.dumps(data))
    return folder


def _no_boxes(folder: Path) -> Path:
    sets.write_coco(folder)
    path = folder / "annotations" / "val.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
    return folder


def _no_annotation(folder: Path) -> Path:
    sets.write_masks(folder)
    (folder / "train" / "labels" / "train03.png").unlink()
    return folder


def _mixed_sizes(folder: Path) -> Path:
    sets.write_masks(folder)
    for part in ("images", "labels"):
        path = folder / "train" / part / "train03.png"
        Image.open(path).resize((9, 8), Image.Resampling.NEAREST).save(path)
    return folder


def _damaged(folder: Path) -> Path:
    sets.write_masks(folder)
    path = folder / "train" / "images" / "train03.png"
    path.write_bytes(path.read_bytes()[:-40])
    return folder


def _black_and_white(folder: Path) -> Path:
    sets.write_masks(folder)
    for path in folder.glob("*/labels/*.png"):
        Image.fromarray(np.asarray(Image.open(path)) * np.uint8(255)).save(path)
    return folder


def _not_a_number(folder: Path) -> Path:
    sets.write_table(folder)
    (folder / "train.csv").write_text((folder / "train.csv").read_text().replace(",0.", ",nan", 1))
    return folder


def _both(folder: Path) -> Path:
    sets.write_coco(folder)
    return sets.write_voc(folder)


BAD: dict[str, tuple[Callable[[Path], object], str, str, tuple[object, ...], str]] = {
    "box outside": (_bad_boxes, "detection", "SmallDetector", (), r"train00\.png, 16 x 16, has the box .*outside"),
    "split without boxes": (_no_boxes, "detection", "SmallDetector", (), "`val` must have at least one box"),
    "image without mask": (_no_annotation, "segmentation", "segmenter", (), r"got none for .*train03\.png"),
    "mixed sizes": (_mixed_sizes, "segmentation", "segmenter", (), "`--image-size` must be given for images of diff"),
    "damaged": (_damaged, "segmentation", "segmenter", (), r"train03\.png must be an image"),
    "black and white": (_black_and_white, "segmentation", "segmenter", (), "a class index per pixel; got only 0 and"),
    "a class too many": (
        lambda folder: sets.write_masks(folder, void=5),
        *("segmentation", "segmenter", ()),
        r"must lie in 0\.\.\.1, the model's classes; got 0\.\.\.5.*--void",
    ),
    "targets of another task": (sets.write_table, "multilabel", "segmenter", (), "must have the shape of the logits"),
    "no classes but numbers": (
        lambda folder: _replaced(sets.write_table(folder), ",0.", ",7."),
        *("multilabel", "numbers", ()),
        "must be 0 or 1; got values",
    ),
    "no number": (_not_a_number, "regression", "numbers", (), r"train\.csv.*line"),
    "several layouts": (_both, "detection", "SmallDetector", (), "has several. Say which: coco:.* or voc:"),
    "layout of another task": (sets.write_coco, "segmentation", "segmenter", (), "looks like coco, which is for"),
    "unknown layout": (
        sets.write_unlabeled,
        "detection",
        "SmallDetector",
        (),
        "(?s)holds some.*- coco: .*- yolo: .*- voc: ",
    ),
    "no folder": (lambda folder: folder / "none", "detection", "SmallDetector", (), "there is no folder"),
    "no task": (sets.write_coco, "classification", "numbers", (), "`--task` must be given for .*looks like coco"),
    "mixed labels": (sets.write_masks, "segmentation", "segmenter", ("--mixup", 0.2), "`--mixup` must go with"),
}


def _replaced(folder: Path, old: str, new: str) -> Path:
    for path in folder.glob("*.csv"):
        path.write_text(path.read_text().replace(old, new))
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_message_before_anything_is_written(tmp_path: Path, name: str) -> None:
    write, task, model, words, match = BAD[name]
    data = write(tmp_path / "data")
    found = compress(tmp_path / "out", data, model, "--task", task, *words)
    assert found.exit_code == 2, found.output
    said = " ".join(found.stderr.split())
    assert said.count("Error: ") == 1
    assert re.search(match, found.stderr if "(?s)" in match else said), said
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.work").exists()


def test_damaged_images_can_be_left_out(tmp_path: Path) -> None:
    words = ("--task", "segmentation", "--skip-bad-images", "--trust-source", "--threads", 1)
    found = secateur(
        *("evaluate", "--model", "python:picture_sets:segmenter", "--data", _damaged(tmp_path / "data"), *words)
    )
    assert found.exit_code == 0, found.output
    assert "train03.png" in found.stderr
    assert "of 6 images" in found.stdout

"""Exported files of an artifact: written by name, recorded, checked again, and used by scripts without Secateur."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Run, Small, compress_words
from PIL import Image

import secateur
from secateur.data import load_data
from secateur.data.annotated import read_unlabeled
from secateur.data.preprocessing import Interpolation, Preprocessing, ResizeMode
from secateur.export import Format

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS: Mapping[Format, str] = {
    Format.ONNX: "consume_onnx.py",
    Format.INT8: "consume_onnx.py",
    Format.PT2: "consume_pt2.py",
    Format.OPENVINO: "consume_openvino.py",
    Format.EXECUTORCH: "consume_executorch.py",
}
WITHOUT_SECATEUR = (
    "import os, runpy, sys; sys.modules['secateur'] = None; sys.argv = sys.argv[1:]; "
    "sys.path.insert(0, os.path.dirname(sys.argv[0])); runpy.run_path(sys.argv[0])"
)


def _present(form: Format) -> bool:
    return form.exporter.extra is None or importlib.util.find_spec(form.exporter.extra) is not None


@pytest.fixture(scope="module")
def exported(small: Small, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the artifact with every format that this machine can make."""
    folder = tmp_path_factory.mktemp("exported") / "small"
    shutil.copytree(small.folder, folder)
    names = ",".join(form.value for form in Format if _present(form))
    found = run("export", "--model", folder, "--data", "digits", "--export", names)
    assert found.exit_code == 0, found.output
    assert "same answer for" in found.stdout
    return folder


@pytest.fixture(scope="module")
def run() -> Run:
    """The command line, for fixtures of the module."""
    from command_line import secateur as command

    return command


@pytest.mark.parametrize("form", list(Format), ids=lambda form: form.value)
def test_script_without_secateur_says_what_the_model_says(exported: Path, tmp_path: Path, form: Format) -> None:
    if not _present(form):
        pytest.skip(f"{form.exporter.extra} is not installed: pip install 'secateur[{form.exporter.extra}]'")
    data, model = load_data("digits"), secateur.load(exported).model
    for n in (0, 11):
        images = data.test.subset(torch.tensor([n]))
        (batch,) = images.batches(1)
        Image.fromarray(images.images[0, 0].numpy()).save(tmp_path / "image.png")
        words = [EXAMPLES / SCRIPTS[form], exported / form.exporter.file, tmp_path / "image.png"]
        found = subprocess.run(
            [sys.executable, "-c", WITHOUT_SECATEUR, *words], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        wanted = data.classes[int(model(batch[0]).argmax())]
        assert found.stdout.strip().splitlines()[-1] == wanted


@pytest.fixture(scope="module")
def photographs(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact made with photographs of many sizes, which are scaled and cropped; they lie beside it."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 20)):
        for place in range(count):
            size = random.integers(20, 60, 2)
            colors = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            image = Image.fromarray(colors).resize(tuple(map(int, size)), Image.Resampling.BICUBIC)
            path = folder / "data" / split / ("cat" if place % 2 else "dog") / f"{place:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    names = ",".join(form.value for form in (Format.ONNX, Format.PT2, Format.OPENVINO) if _present(form))
    words = ("--budget", "macs=70%", "--strategy", "uniform", "--importance", "l1", "--divisor", 2, "--quiet")
    found = run(
        *("compress", "--model", "python:picture_sets:classifier", "--trust-source", "--data", folder / "data"),
        *("--image-size", "16x24", "--resize", "crop:0.7,bicubic", "--out", folder / "out", "--export", names),
        *("--epochs", 0, "--calibration", 8, "--threads", 1, *words),
    )
    assert found.exit_code == 0, found.output
    return folder


@pytest.mark.long
@pytest.mark.parametrize("form", [Format.ONNX, Format.PT2, Format.OPENVINO], ids=lambda form: form.value)
def test_scripts_give_the_accuracy_of_the_report_to_the_image(photographs: Path, form: Format) -> None:
    if not _present(form):
        pytest.skip(f"{form.exporter.extra} is not installed: pip install 'secateur[{form.exporter.extra}]'")
    images = sorted((photographs / "data" / "test").glob("*/*.png"))
    words = [EXAMPLES / SCRIPTS[form], photographs / "out" / form.exporter.file, *images]
    found = subprocess.run([sys.executable, "-c", WITHOUT_SECATEUR, *words], capture_output=True, text=True, check=True)
    said = found.stdout.strip().splitlines()[-len(images) :]
    assert set(said) == {"cat", "dog"}
    right = sum(name == path.parent.name for name, path in zip(said, images, strict=True))
    last = json.loads((photographs / "out" / "secateur.json").read_text())["metrics"]["test_accuracy"][-1]
    assert (right, len(images)) == (round(last["top1"] * last["n"]), last["n"])


@pytest.mark.parametrize("mode", list(ResizeMode))
@pytest.mark.parametrize("interpolation", list(Interpolation))
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_example_makes_the_input_that_the_rule_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: ResizeMode, interpolation: Interpolation, channels: int
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("preprocess")
    random = np.random.default_rng(1)
    mean, std = ((0.4, 0.3, 0.2, 0.1)[:channels], (0.5, 0.6, 0.7, 0.8)[:channels])
    rule = Preprocessing((18, 23), mode, 0.8, interpolation, mean, std, channels, bgr=channels == 3)
    for place, size in enumerate(((18, 23), (40, 30), (9, 50), (23, 18))):
        path = tmp_path / f"{place}.png"
        pixels = random.integers(0, 256, (*size, channels), dtype=np.uint8)
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(path)
        wanted = read_unlabeled(tmp_path, rule)["train"][place]
        found = example.model_input(path, {"input": {"preprocessing": rule.to_json()}})
        assert found.shape == (1, channels, 18, 23)
        assert np.abs(found[0] - wanted.numpy()).max() < 1e-6


def test_scripts_are_short_and_know_nothing_of_us() -> None:
    scripts = sorted(EXAMPLES.glob("consume_*.py"))
    assert {path.name for path in scripts} == set(SCRIPTS.values())
    for path in scripts:
        text = path.read_text()
        assert "import secateur" not in text
        assert len([line for line in text.splitlines() if line.strip()]) <= 20


def test_artifact_tells_of_its_files(exported: Path) -> None:
    recorded = json.loads((exported / "secateur.json").read_text())["verification"]["exports"]
    assert set(recorded) == {form.value for form in Format if _present(form)}
    for name, entry in recorded.items():
        for file in entry["files"]:
            assert (exported / file["name"]).stat().st_size == file["bytes"]
        agreement = entry["agreement"]
        if name == "int8":
            assert agreement["n"] == 359
            assert agreement["top1"] >= 0.95 * agreement["float_top1"]
        else:
            assert agreement["max_rel"] <= agreement["tolerance"] == 1e-4
            assert agreement["batch_sizes"] == [1, 4]


def test_verify_runs_every_file_again(exported: Path, run: Run) -> None:
    found = secateur.verify(exported, trust_source=True)
    assert found.passed
    names = [check.name for check in found.checks]
    for form in filter(_present, Format):
        assert sum(form.exporter.file in name for name in names) == 1
    shy = secateur.verify(exported)
    assert shy.passed
    assert any(said.startswith("model.pt2 was not checked") for said in shy.passed_over)
    said = run("verify", exported, "--data", "digits", "--threads", 1)
    assert said.exit_code == 0, said.output
    assert "model.pt2 was not checked" in " ".join(said.stdout.split())


def test_another_int8_file_is_noticed(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    path = folder / Format.INT8.exporter.file
    path.write_bytes(path.read_bytes() + b"\0")
    found = secateur.verify(folder)
    assert [check.name for check in found.checks if not check.passed] == [
        "model.int8.onnx = the file that was measured"
    ]
    path.write_bytes(b"not a model")
    checked = {check.name: check for check in secateur.verify(folder, data=load_data("digits")).checks}
    assert "it does not run" in checked["model.int8.onnx answers as the float model"].detail


def test_missing_library_and_missing_images_are_refused(small: Small, run: Run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    words = (*compress_words(small.weights, tmp_path / "out", quick=True), "--epochs", 1)
    found = run(*words, "--export", "onnx,openvino")
    assert found.exit_code == 2
    assert "pip install 'secateur[openvino]'" in " ".join(found.stderr.split())
    assert list(tmp_path.iterdir()) == []
    found = run("export", "--model", small.folder, "--export", "int8", "--out", tmp_path / "files")
    assert found.exit_code == 2
    assert "Say --data" in found.stderr


def test_library_missing_where_the_artifact_is_verified(exported: Path, monkeypatch) -> None:
    if not _present(Format.OPENVINO):
        pytest.skip("openvino is not installed: pip install 'secateur[openvino]'")
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = secateur.verify(exported)
    assert found.passed
    assert any("model.xml was not checked" in said and "pip install" in said for said in found.passed_over)


@pytest.mark.long
def test_int8_is_a_step_of_compress(small: Small, run: Run, tmp_path: Path, monkeypatch) -> None:
    words = (*compress_words(small.weights, tmp_path / "out", quick=True), "--epochs", 1, "--export", "int8")
    found = run(*words)
    assert found.exit_code == 0, found.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()).count("model.int8.onnx") == 1
    assert "same answer" in found.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Files for other runtimes" in page
    entry = json.loads((tmp_path / "out" / "secateur.json").read_text())["verification"]["exports"]["int8"]
    steps = json.loads((tmp_path / "out" / "secateur.json").read_text())["metrics"]["test_accuracy"]
    assert entry["agreement"]["float_top1"] == pytest.approx(steps[-1]["top1"], abs=1.5 / 359)
    assert entry["latency"]["runtime"].startswith("onnxruntime")
    assert entry["latency"]["after"]["median"] > 0
    assert secateur.verify(tmp_path / "out").passed


@pytest.mark.long
def test_collapsed_int8_file_is_a_failed_check(small: Small, run: Run, tmp_path: Path, monkeypatch) -> None:
    def spoiled(content: bytes, calibration: object) -> bytes:
        import onnx
        from onnx import numpy_helper

        model = onnx.load_from_string(content)
        for held in model.graph.initializer:
            if len(held.dims) == 4:
                held.CopyFrom(numpy_helper.from_array(0 * numpy_helper.to_array(held), held.name))
        return model.SerializeToString()

    monkeypatch.setattr("secateur.export.int8.quantize", spoiled)
    found = run(*compress_words(small.weights, tmp_path / "out", quick=True), "--epochs", 1, "--export", "int8")
    assert found.exit_code == 2
    assert "must keep 95 % of the float model's accuracy" in " ".join(found.stderr.split())
    assert not (tmp_path / "out" / "model.int8.onnx").exists()
    assert (tmp_path / "out" / "model.safetensors").exists()

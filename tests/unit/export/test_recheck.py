"""Exported files are run where they lie: a wrong, foreign or broken one is told apart from the model."""

from pathlib import Path

import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from secateur.errors import ExportError
from secateur.export import compare_file, export_onnx, export_pt2

pytestmark = pytest.mark.window

IMAGES = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
FORMATS = pytest.mark.parametrize(
    ("export", "name"), [(export_onnx, "model.onnx"), (export_pt2, "model.pt2")], ids=["onnx", "pt2"]
)


def _model(classes: int = 3, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes)).eval()


@pytest.mark.long
@FORMATS
def test_same_model_agrees_and_others_do_not(tmp_path: Path, export, name: str):
    path = tmp_path / name
    export(_model(), IMAGES, path)
    same = compare_file(path, _model(), IMAGES)
    assert same.max_rel <= same.tolerance == 1e-4
    assert same.batch_sizes == (2,)
    assert same.format == path.suffix[1:]
    other = compare_file(path, _model(seed=1), IMAGES)
    assert other.max_rel > 0.01
    with torch.no_grad():
        difference = (_model(seed=1)(IMAGES) - _model()(IMAGES)).abs().max()
    assert other.max_abs == pytest.approx(float(difference), rel=1e-4)
    with pytest.raises(ExportError, match=r"outputs have shape \(2, 3\), not \(2, 4\)"):
        compare_file(path, _model(classes=4), IMAGES)


@FORMATS
def test_broken_file_says_so(tmp_path: Path, export, name: str):
    path = tmp_path / name
    path.write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"it does not run \(.*\): export it again"):
        compare_file(path, _model(), IMAGES)


def test_file_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(ExportError, match=r"`path` must end in \.onnx or \.pt2 or \.xml or \.pte; got .*model\.tflite"):
        compare_file(tmp_path / "model.tflite", _model(), IMAGES)


def onnx_of(nodes: list[object], **more: object) -> bytes:
    slots = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 1, 6, 6]) for name in ("input", "output")]
    graph = helper.make_graph(nodes, "g", slots[:1], slots[1:], **more)
    return helper.make_model(graph).SerializeToString()


def endless() -> bytes:
    """Runs for 2^62 rounds."""
    boolean = helper.make_tensor_value_info("go", TensorProto.BOOL, [])
    number = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y"))
    steps = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Abs", ["x"], ["y"])]
    on = helper.make_tensor_value_info("on", TensorProto.BOOL, [])
    body = helper.make_graph(steps, "body", [number, boolean, x], [on, y])
    rounds = helper.make_tensor("rounds", TensorProto.INT64, [], [2**62])
    return onnx_of([helper.make_node("Loop", ["rounds", "", "input"], ["output"], body=body)], initializer=[rounds])


def elsewhere(path: str) -> bytes:
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=path)
    return onnx_of([helper.make_node("Add", ["input", "w"], ["output"])], initializer=[tensor])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (endless(), "'Loop', which can repeat others without end"),
        (elsewhere("../../../etc/passwd"), "its numbers in other files"),
        (elsewhere("/dev/zero"), "its numbers in other files"),
        (onnx_of([helper.make_node("Run", ["input"], ["output"], domain="evil")]), r"not ONNX's: \['evil'\]"),
    ],
)
def test_an_onnx_file_of_a_stranger_only_computes(tmp_path: Path, content: bytes, words: str):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ExportError, match=words):
        compare_file(tmp_path / "model.onnx", _model(), IMAGES)


def test_links_to_other_files_are_not_followed(tmp_path: Path):
    export_onnx(_model(), IMAGES, tmp_path / "real.onnx")
    (tmp_path / "model.onnx").symlink_to(tmp_path / "real.onnx")
    with pytest.raises(ExportError, match="must be a regular file; got a symbolic link"):
        compare_file(tmp_path / "model.onnx", _model(), IMAGES)

"""int8: the integers in the file are those of the folded weights, and its answers are counted, not believed."""

import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from small_runs import LABELS_ONLY, Blobs, small_config, small_net
from torch import Tensor, nn

from secateur import _files
from secateur.errors import ArtifactError, ExportError
from secateur.export import Quantized, compare_int8_file, export_int8, onnx_bytes
from secateur.train import RunSettings, Silent, fit

CPU = torch.device("cpu")
TRAIN, TEST = Blobs(256), Blobs(300, seed=7)


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(nn.functional.silu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class Inverted(nn.Module):
    """An inverted residual with a depthwise convolution."""

    def __init__(self, width: int, activation: type[nn.Module], gate: nn.Module) -> None:
        super().__init__()
        wide = 2 * width
        self.branch = nn.Sequential(
            nn.Conv2d(width, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            activation(),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            activation(),
            gate,
            nn.Conv2d(wide, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _inverted(activation: type[nn.Module], gate: type[nn.Module] | None) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = small_net()
        return nn.Sequential(*net[:3], Inverted(8, activation, nn.Identity() if gate is None else gate(16)), *net[3:])


NETS = {
    "residual": lambda: _inverted(nn.ReLU, None),
    "mobilenetv2": lambda: _inverted(nn.ReLU6, None),
    "efficientnet": lambda: _inverted(nn.SiLU, Gate),
}


def _batches(split: Blobs) -> list[tuple[Tensor, Tensor]]:
    return list(split.batches(64, device=CPU))


def _taught(model: nn.Module) -> nn.Module:
    return fit(
        model, TRAIN, train=small_config(4), objective=LABELS_ONLY, run=RunSettings(callbacks=Silent())
    ).model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return _taught(small_net())


def _export(model: nn.Module, path: Path, **more: float) -> Quantized:
    return export_int8(model, [images for images, _ in _batches(TRAIN)], _batches(TEST), path, **more)


@pytest.mark.parametrize("name", NETS)
def test_networks_of_many_kinds_keep_their_answers(name: str, tmp_path: Path) -> None:
    model = _taught(NETS[name]())
    found = _export(model, tmp_path / "model.int8.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.int8.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        in_float = model(TEST.images).argmax(1)
    in_int8 = torch.from_numpy(session.run(None, {"input": TEST.images.numpy()})[0]).argmax(1)
    assert found.n == 300
    assert found.top1 == pytest.approx(float((in_int8 == TEST.labels).float().mean()))
    assert found.float_top1 == pytest.approx(float((in_float == TEST.labels).float().mean()))
    assert found.agreement == pytest.approx(float((in_int8 == in_float).float().mean()))
    assert found.float_top1 > 0.7
    assert found.agreement > 0.95
    types = {node.op_type for node in onnx.load(tmp_path / "model.int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= types
    assert "BatchNormalization" not in types


def test_weights_are_the_folded_ones_rounded_for_each_channel(model: nn.Module, tmp_path: Path) -> None:
    _export(model, tmp_path / "model.int8.onnx")
    graph = onnx.load(tmp_path / "model.int8.onnx").graph
    held = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    convolution, norm = model[0], model[1]
    factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    folded = (convolution.weight.double() * factor[:, None, None, None]).detach().numpy()
    (integers,) = [each for each in held.values() if each.dtype == np.int8 and each.shape == folded.shape]
    scale = np.abs(folded).reshape(len(folded), -1).max(1) / 64
    # Symmetric, a scale for each channel, and 255 x 64 x 2 < 2^15: rounding is off by half a step at most.
    assert (np.abs(integers.astype(int)).reshape(len(integers), -1).max(1) == 64).all()
    assert (
        np.abs(integers.astype(float) * scale[:, None, None, None] - folded) <= 0.501 * scale[:, None, None, None]
    ).all()


@pytest.mark.window
def test_nothing_else_changes(model: nn.Module, tmp_path: Path, capfd) -> None:
    model.train()
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    disabled = logging.root.manager.disable
    _export(model, tmp_path / "model.int8.onnx")
    assert model.training
    model.eval()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert logging.root.manager.disable == disabled
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["model.int8.onnx"]


def test_lost_accuracy_is_an_error_and_leaves_the_older_file(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.int8.onnx"
    path.write_bytes(b"older")
    with pytest.raises(
        ExportError, match=r"must keep 200 % of the float model's accuracy; got .* The file was removed"
    ):
        _export(model, path, least_kept=2.0)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [(path.name, b"older")]


def test_file_is_compared_where_it_lies(model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.int8.onnx"
    written = _export(model, path)
    in_float = onnx_bytes(model, (TEST.images[:2],))
    assert compare_int8_file(path, in_float, _batches(TEST)) == written
    _export(small_net(seed=3).eval(), path, least_kept=0.0)
    assert compare_int8_file(path, in_float, _batches(TEST)).agreement < 1
    path.write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"it does not run \(.*\): export it again"):
        compare_int8_file(path, in_float, _batches(TEST))


def test_what_cannot_be_used_is_refused(model: nn.Module, tmp_path: Path) -> None:
    images = TRAIN.images[:8]
    with pytest.raises(ExportError, match=r"`path` must end in \.onnx"):
        export_int8(model, [images], _batches(TEST), tmp_path / "model.int8")
    with pytest.raises(ExportError, match=r"`calibration` must hold batches of at least two images"):
        export_int8(model, [], _batches(TEST), tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"`labeled` must hold at least one image"):
        export_int8(model, [images], [], tmp_path / "model.onnx")
    with pytest.raises(ExportError, match=r"must give logits \(batch, classes\).* int8 is for classifiers"):
        export_int8(model[:1], [images], _batches(TEST), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_is_usual() -> None:
    found = Quantized(top1=0.89, float_top1=0.9, agreement=0.97, n=1000)
    assert found.kept == pytest.approx(0.98889, abs=1e-5)
    assert not found.usual
    assert Quantized(0.8911, 0.9, 0.97, 1000).usual
    assert str(found) == "89.00 % of 1000 images right, in float 90.00 %; the same answer for 97.00 %"
    assert found.to_json() == {"top1": 0.89, "float_top1": 0.9, "agreement": 0.97, "n": 1000}


def test_no_room_among_the_temporary_files_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime would end with an error about Protobuf."""
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr(_files.shutil, "disk_usage", lambda _: full)
    monkeypatch.setattr("secateur.export.int8.open_session", lambda *_, **__: pytest.fail("it begins without room"))
    with pytest.raises(ArtifactError, match=r"The folder for temporary files must have 0.3 MB free; got 0.0 MB"):
        export_int8(small_net(), [torch.zeros(2, 3, 8, 8)], _batches(TEST), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []

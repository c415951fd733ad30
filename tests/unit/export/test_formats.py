"""Exported files compute what the model computes, for any batch size, or do not appear."""

import errno
import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from secateur.errors import ExportError
from secateur.export import export_onnx, export_pt2
from secateur.export import onnx as _onnx
from secateur.export import torch_export as _pt2

pytestmark = pytest.mark.window

FORMATS = pytest.mark.parametrize(
    ("export", "name", "room"), [(export_onnx, "model.onnx", _onnx), (export_pt2, "model.pt2", _pt2)]
)

RUNNER = {_onnx: "session_runner", _pt2: "_run_pt2"}
"""What each room opens its file with."""


class Net(nn.Module):
    """Convolutions, batch normalization that differs between train and eval, an option-A pad, a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 10, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(10)
        self.head = nn.Linear(10 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 3))
        return self.head((self.bn2(self.conv2(x)) + shortcut).relu().flatten(1))


@pytest.fixture
def model() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net()
        for norm in (model.bn1, model.bn2):
            nn.init.uniform_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
        return model.eval()


@pytest.fixture
def translated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Translate `Net` to ONNX, which takes seconds, only once for the tests of what happens afterward."""
    real = _onnx.onnx_bytes

    def remembered(model: nn.Module, inputs: tuple[Tensor, ...], *settings: object, **more: object) -> bytes:
        if not _TRANSLATED:
            _TRANSLATED.append(real(model, inputs, *settings, **more))
        return _TRANSLATED[0]

    monkeypatch.setattr(_onnx, "onnx_bytes", remembered)


_TRANSLATED: list[bytes] = []


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_onnx_equals_eager(model: Net, images: Tensor, tmp_path: Path) -> None:
    import onnxruntime

    path = tmp_path / "new" / "model.onnx"
    parity = export_onnx(model, images, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": images.numpy()})
    wanted = model(images).detach().numpy()
    assert parity.batch_sizes == (1, 5)
    assert parity.max_rel <= parity.tolerance == 1e-4
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    assert session.run(None, {"input": images[:3].numpy()})[0].shape == (3, 5)
    assert [(slot.name, slot.shape) for slot in session.get_inputs()] == [("input", ["batch", 3, 8, 8])]
    assert [(slot.name, slot.shape) for slot in session.get_outputs()] == [("output", ["batch", 5])]
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    assert parity.to_json()["batch_sizes"] == [1, 5]


def test_pt2_equals_eager(model: Net, images: Tensor, tmp_path: Path) -> None:
    parity = export_pt2(model, images, tmp_path / "model.pt2")
    reloaded = torch.export.load(tmp_path / "model.pt2").module()
    assert (parity.format, parity.batch_sizes) == ("pt2", (1, 5))
    assert torch.equal(reloaded(images[:3]), model(images[:3]))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_pt2_holds_no_pickle_and_no_images(model: Net, images: Tensor, tmp_path: Path) -> None:
    export_pt2(model, images, tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    assert all(b'"use_pickle": true' not in data for data in content.values())
    assert all(not data for name, data in content.items() if "sample_inputs" in name)
    assert not any(data.startswith((b"\x80\x02", b"\x80\x04", b"PK")) for data in content.values())


@FORMATS
@pytest.mark.usefixtures("translated_once")
def test_files_hold_no_paths_of_this_machine(export, name, room, model, images, tmp_path: Path) -> None:
    export(model, images, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert str(Path(__file__).parent).encode() not in content
    assert b"site-packages" not in content
    assert b"stack_trace" not in content


@FORMATS
def test_the_model_and_the_process_are_left_alone(export, name, room, model, images, tmp_path: Path, capfd) -> None:
    model.train()
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    levels = logging.getLogger("torch.onnx").level
    export(model, images, tmp_path / name)
    assert model.training
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert logging.getLogger("torch.onnx").level == levels
    assert capfd.readouterr() == ("", "")


@FORMATS
@pytest.mark.usefixtures("translated_once")
def test_a_file_that_disagrees_is_removed(export, name, room, model, images, tmp_path, monkeypatch) -> None:
    real = getattr(room, RUNNER[room])

    def wrong(session):
        run = real(session)
        return lambda batch: [output + 0.1 for output in run(batch)]

    monkeypatch.setattr(room, RUNNER[room], wrong)
    with pytest.raises(ExportError, match=r"must compute what the model computes .* file was removed"):
        export(model, images, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@FORMATS
@pytest.mark.usefixtures("translated_once")
def test_a_failed_export_leaves_the_older_file(export, name, room, model, images, tmp_path, monkeypatch) -> None:
    (tmp_path / name).write_bytes(b"older")
    monkeypatch.setattr(room, RUNNER[room], lambda _: lambda batch: [batch[0]])
    with pytest.raises(ExportError, match=r"must give outputs of shapes \[\(1, 5\)\]"):
        export(model, images, tmp_path / name)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(name, b"older")]


@FORMATS
@pytest.mark.usefixtures("translated_once")
def test_a_full_disk_leaves_nothing(export, name, room, model, images, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ExportError, match=r"could not be written: OSError: .*No space left on device"):
        export(model, images, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@FORMATS
@pytest.mark.usefixtures("translated_once")
def test_outputs_must_be_finite(export, name, room, model, images, tmp_path) -> None:
    images[0, 0, 0, 0] = torch.inf
    with pytest.raises(ExportError, match="outputs must be finite"):
        export(model, images, tmp_path / name)


@FORMATS
def test_one_sample_is_refused(export, name, room, model, images, tmp_path) -> None:
    with pytest.raises(ExportError, match=r"at least two samples .* \[\(1, 3, 8, 8\)\]"):
        export(model, images[:1], tmp_path / name)


@FORMATS
def test_the_suffix_is_checked(export, name, room, model, images, tmp_path) -> None:
    with pytest.raises(ExportError, match=r"`path` must end in \.\w+; got .*model.zip"):
        export(model, images, tmp_path / "model.zip")


@FORMATS
def test_value_dependent_models_are_refused(export, name, room, images, tmp_path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match=r"must be capturable by torch.export for any batch size"):
        export(Branch(), images, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_batch_size_is_refused(images: Tensor, tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(2, 1, 1, 1)

    with pytest.raises(ExportError, match="for any batch size; got"):
        export_pt2(Fixed(), images, tmp_path / "model.pt2")


@pytest.mark.usefixtures("translated_once")
def test_a_file_that_cannot_run_is_refused(model: Net, images: Tensor, tmp_path: Path, monkeypatch) -> None:
    def broken(batch: object) -> list[Tensor]:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(_onnx, RUNNER[_onnx], lambda _: broken)
    with pytest.raises(ExportError, match=r"onnx file must run on 1 sample\(s\); got: RuntimeError: no kernel\."):
        export_onnx(model, images, tmp_path / "model.onnx")


def test_operations_without_onnx_are_refused(images: Tensor, tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(ExportError, match="must hold only operations that ONNX has"):
        export_onnx(Odd(), images, tmp_path / "model.onnx")


def test_models_too_large_for_onnx_are_refused(model: Net, images: Tensor, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(_onnx, "_MAX_WEIGHT_BYTES", 1000)
    with pytest.raises(ExportError, match="at most 1e-06 GB of weights"):
        export_onnx(model, images, tmp_path / "model.onnx")


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"sum": x + y, "product": x * y}

    example = (torch.arange(6.0).view(3, 2) + 1, torch.ones(3, 2))
    assert export_onnx(Two(), example, tmp_path / "model.onnx").max_abs == 0
    assert export_pt2(Two(), example, tmp_path / "model.pt2").max_abs == 0

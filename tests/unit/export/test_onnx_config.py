"""ONNX files with a chosen opset, free image sizes, float16 and chosen outputs compute what the model computes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from command_line import outcome
from noise_images import noise_data
from pretend import Pretend
from run_pipeline import run_compress
from squares import RUN, SquareDetector, Squares
from torch import Tensor, nn
from torch.utils.data import DataLoader

import secateur
from secateur.cli import main
from secateur.data.annotated import as_lists
from secateur.errors import ExportError
from secateur.export import OnnxConfig, export_onnx
from secateur.search import Knapsack
from secateur.tasks import Detection
from secateur.train import TrainConfig

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    ).eval()


class Detector(nn.Module):
    """Takes a list of images and returns the boxes whose score is high, so that their number depends on values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Conv2d(3, 8, 3, 2, 1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        maps = self.head(self.body(torch.stack(images)).relu())
        found: list[dict[str, Tensor]] = []
        for each in maps:
            good = each[0] > 0
            found.append({"boxes": each[1:, good].T, "scores": each[0][good]})
        return found


def file_of(path: Path) -> tuple[onnx.ModelProto, onnxruntime.InferenceSession]:
    return onnx.load(path), onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def shape(slot: onnx.ValueInfoProto) -> list[object]:
    return [dim.dim_param or dim.dim_value for dim in slot.type.tensor_type.shape.dim]


def run(session: onnxruntime.InferenceSession, images: Tensor) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(out)) for out in session.run(None, {"input": images.numpy()})]


@pytest.mark.parametrize("opset", [18, 22])
def test_opset(tmp_path: Path, opset: int) -> None:
    export_onnx(net(), IMAGES, tmp_path / "m.onnx", config=OnnxConfig(opset=opset))
    found, session = file_of(tmp_path / "m.onnx")
    assert found.opset_import[0].version == opset
    with torch.no_grad():
        torch.testing.assert_close(run(session, IMAGES)[0], net()(IMAGES))


def test_height_and_width_are_free(tmp_path: Path) -> None:
    parity = export_onnx(net(), IMAGES, tmp_path / "m.onnx", config=OnnxConfig(free_size=True))
    assert parity.max_rel <= 1e-4
    found, session = file_of(tmp_path / "m.onnx")
    assert shape(found.graph.input[0]) == ["batch", 3, "height", "width"]
    assert shape(found.graph.output[0]) == ["batch", 5]
    other = torch.randn(1, 3, 41, 57)
    with torch.no_grad():
        torch.testing.assert_close(run(session, other)[0], net()(other))


def test_half_has_floats_at_both_ends(tmp_path: Path) -> None:
    parity = export_onnx(net(), IMAGES, tmp_path / "half.onnx", config=OnnxConfig(half=True))
    assert 1e-5 < parity.max_rel <= parity.tolerance == 2e-2
    found, session = file_of(tmp_path / "half.onnx")
    assert onnx.TensorProto.FLOAT not in {tensor.data_type for tensor in found.graph.initializer}
    assert shape(found.graph.input[0])[0] == "batch"
    with torch.no_grad():
        torch.testing.assert_close(run(session, IMAGES)[0], net()(IMAGES), rtol=1e-2, atol=1e-2)


def test_a_model_in_half_is_written(tmp_path: Path) -> None:
    model = net().half()
    export_onnx(model, IMAGES, tmp_path / "half.onnx")
    assert next(model.parameters()).dtype == torch.float16
    _, session = file_of(tmp_path / "half.onnx")
    assert run(session, IMAGES)[0].dtype == torch.float32


def test_all_at_once(tmp_path: Path) -> None:
    config = OnnxConfig(19, free_size=True, half=True, outputs=("2", "5"))
    export_onnx(net(), IMAGES, tmp_path / "m.onnx", config=config)
    found, session = file_of(tmp_path / "m.onnx")
    assert [slot.name for slot in found.graph.output] == ["2", "5"]
    assert [tuple(out.shape) for out in run(session, IMAGES)] == [(3, 8, 16, 16), (3, 5)]
    assert OnnxConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_raw_heads_of_a_model_that_takes_a_list(tmp_path: Path) -> None:
    model, images = Detector(), list(IMAGES)
    parity = export_onnx(model, images, tmp_path / "m.onnx", config=OnnxConfig(outputs=("body", "head")))
    assert parity.batch_sizes == (1,)
    found, session = file_of(tmp_path / "m.onnx")
    assert shape(found.graph.input[0]) == [1, 3, 32, 32]
    assert [slot.name for slot in found.graph.output] == ["body", "head"]
    with torch.no_grad():
        wanted = model.head(model.body(IMAGES[1:2]).relu())
    torch.testing.assert_close(run(session, IMAGES[1:2])[1], wanted)
    assert not model.head._forward_hooks


class Resized(Detector):
    """Resizes its images, as torchvision's detectors do."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        sized = [nn.functional.interpolate(image[None], size=(96, 96), mode="bilinear")[0] for image in images]
        return super().forward(sized)


def test_resizing_is_an_operation_of_the_file(tmp_path: Path) -> None:
    export_onnx(Resized(), list(IMAGES), tmp_path / "m.onnx", config=OnnxConfig(outputs=("head",)))
    found, _ = file_of(tmp_path / "m.onnx")
    assert "Resize" in {node.op_type for node in found.graph.node}
    assert (tmp_path / "m.onnx").stat().st_size < 20_000  # Tables of positions would be 96 x 96 numbers each.


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def large(layer: nn.Linear) -> nn.Linear:
    """Give a layer weights that float16 cannot hold."""
    nn.init.constant_(layer.weight, 1e5)
    return layer


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: OnnxConfig(opset=13), r"`opset` must be from 18, .*; got 13"),
        (lambda path: OnnxConfig(opset=99), r"`opset` must be from 18, .*; got 99"),
        (lambda path: OnnxConfig(outputs=("5", "5")), r"each once; got '5' twice"),
        (lambda path: OnnxConfig(outputs=("5", "")), "got an empty name"),
        (lambda path: export_onnx(net(), IMAGES, path, config=OnnxConfig(outputs=("6",))), "got '6'. It has 0, 1"),
        (
            lambda path: export_onnx(Branch(), torch.randn(2, 4), path, config=OnnxConfig(outputs=("unused",))),
            "it did not run unused",
        ),
        (
            lambda path: export_onnx(FLAT, IMAGES, path, config=OnnxConfig(free_size=True)),
            "`free_size` needs a model that takes images of other sizes; at 96x64",
        ),
        (
            lambda path: export_onnx(Branch(), torch.randn(2, 4), path, config=OnnxConfig(free_size=True)),
            "takes no tensor with four dimensions",
        ),
        (lambda path: export_onnx(Detector(), list(IMAGES), path), "`outputs` must name modules of a model that takes"),
        (
            lambda path: export_onnx(
                Detector(), list(IMAGES), path, config=OnnxConfig(free_size=True, outputs=("head",))
            ),
            "this one takes a list of images",
        ),
        (
            lambda path: export_onnx(
                Detector(), [IMAGES[0], IMAGES[1, :, :16]], path, config=OnnxConfig(outputs=("head",))
            ),
            "`example` must hold images of one size",
        ),
        (
            lambda path: export_onnx(
                large(nn.Linear(4, 4)), torch.ones(2, 4), path, config=OnnxConfig(half=True)
            ),
            "NaN or infinity|float16 has too few digits",
        ),
        (lambda path: OnnxConfig.from_json({"opset": "new"}), "does not say how the ONNX file was written"),
    ],
)  # fmt: skip
def test_bad_values(tmp_path: Path, make, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        make(tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.slow
def test_a_run_writes_and_verifies_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )
    config = OnnxConfig(half=True, outputs=("2", "5"))
    run_compress(
        model, noise_data(), budget="macs=60%", train=TrainConfig(0, 8), out=tmp_path / "run", times=False, onnx=config
    )
    stored = json.loads((tmp_path / "run/secateur.json").read_text())["verification"]["exports"]["onnx"]
    assert OnnxConfig.from_json(stored["onnx"]) == config
    found = secateur.verify(tmp_path / "run", factory=lambda: model)
    assert [check.passed for check in found.checks if check.name.startswith("model.onnx")] == [True]


def test_settings_without_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="`export` must name onnx if it is set how"):
        run_compress(
            net(), noise_data(), budget="macs=60%", train=TrainConfig(0, 8), out=tmp_path / "run", export=(),
            onnx=OnnxConfig(half=True),
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--onnx-opset", "12"], "`--onnx-opset` must be from 18"),
        (["--onnx-outputs", "fc,fc"], "`--onnx-outputs` must name modules of the model, each once"),
        (["--onnx-outputs", "nothing"], "`--onnx-outputs` must name modules of the model; got 'nothing'"),
        (["--onnx-half", "--export", "pt2"], "`--export` must name onnx"),
    ],
)
def test_on_the_command_line(tmp_path: Path, flags: list[str], said: str) -> None:
    words = ["export", "--model", "cifar_resnet20", "--out", str(tmp_path / "files"), "--image-size", "32", *flags]
    found = outcome(main, *words)
    assert found.exit_code == 2
    assert said in " ".join(found.stderr.split())


@pytest.mark.slow
def test_a_detector_is_written_up_to_its_heads_and_verified(tmp_path: Path) -> None:
    data = tuple(DataLoader(Squares("boxes", n), batch_size=8, collate_fn=as_lists) for n in (32, 16))
    onnx_config = OnnxConfig(outputs=("body.6", "head"))
    secateur.compress(
        SquareDetector(), data, "macs=60%", task=Detection(), strategy=Knapsack(), target=Pretend(),
        out=tmp_path / "run", cut=RUN["cut"], recovery=RUN["recovery"], run=replace(RUN["run"], onnx=onnx_config),
    )  # fmt: skip
    _, session = file_of(tmp_path / "run" / "model.onnx")
    assert [slot.name for slot in session.get_outputs()] == ["body.6", "head"]
    found = secateur.verify(tmp_path / "run", factory=SquareDetector)
    assert found.passed
    assert [check.name for check in found.checks][-1] == "model.onnx = model in PyTorch"

"""Cuts of one model are exported once: their files have the operations and widths of the cut, or are exported anew."""

from importlib import import_module

import onnx
import pytest
import torch
from torch import Tensor, nn

from secateur.cost import OnnxRuntime
from secateur.cost.denormals import count_denormals
from secateur.cost.onnx_templates import OnnxTemplates, drawn_copy
from secateur.export.onnx import open_session, session_runner
from secateur.graph import trace
from secateur.models import load_model
from secateur.prune import apply_architecture
from secateur.search import SearchSpace
from secateur.search.latency_fit import architecture_of, probes

_templates = import_module("secateur.cost.onnx_templates")
SPECS = [("cifar_mobilenetv2", (3, 16, 16)), ("torchvision:resnet18", (3, 32, 32)), ("digits_resnet", (1, 8, 8))]


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that are exported."""
    found: list[nn.Module] = []
    exported = _templates.onnx_bytes

    def export(model: nn.Module, inputs: tuple[Tensor, ...]) -> bytes:
        found.append(model)
        return exported(model, inputs)

    monkeypatch.setattr(_templates, "onnx_bytes", export)
    return found


def _cuts(spec: str, size: tuple[int, ...]) -> tuple[list[nn.Module], Tensor]:
    model, _ = load_model(spec, seed=0)
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    graph = trace(model.eval(), images)
    rows = probes(graph, SearchSpace(divisor=4))[:3]
    return [apply_architecture(model, graph, architecture_of(graph, row)).eval() for row in rows], images


def assert_close(templates: OnnxTemplates, model: nn.Module, images: Tensor) -> None:
    """The content for a model computes what the model computes with the same random weights."""
    found = session_runner(open_session(templates.content(model, (images,)), threads=1))((images,))[0]
    with torch.no_grad():
        torch.testing.assert_close(found, drawn_copy(model)(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("spec", "size"), SPECS)
def test_files_of_cuts_compute_what_the_cuts_compute(
    spec: str, size: tuple[int, ...], exports: list[nn.Module]
) -> None:
    (whole, *cuts), images = _cuts(spec, size)
    templates = OnnxTemplates()
    for model in (whole, *cuts):
        content = templates.content(model, (images,))
        found = session_runner(open_session(content, threads=1))((images,))[0]
        with torch.no_grad():
            wanted = drawn_copy(model)(images)
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2 * float(wanted.abs().max()))
        held = sum(torch.Size(each.dims).numel() for each in onnx.load_from_string(content).graph.initializer)
        matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
        # Batch norms may be folded, of which one number for each channel is left.
        assert matrices <= held <= sum(p.numel() for p in model.parameters()) + 100
    # The shortcuts of digits_resnet pad by numbers of channels, which are constants in the file.
    assert len(exports) == 1
    assert templates.content(cuts[-1], (images,)) == content
    assert len(exports) == 1


def test_a_factor_that_the_exporter_folds_into_weights_does_not_hide_a_template(exports: list[nn.Module]) -> None:
    """Batch norms divide by sqrt(variance + eps); MobileNetV3 has an eps of 0.001 and many of them."""
    templates, images = OnnxTemplates(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for width in (8, 5):
        layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width, eps=0.5), nn.Hardswish(), nn.Conv2d(width, 4, 3)]
        model = nn.Sequential(*layers).eval()
        assert_close(templates, model, images)
    assert len(exports) == 1


class Multiplied(nn.Module):
    """A layer and a number that is no tensor: a constant in the file."""

    def __init__(self, width: int, number: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.number


def test_constants_that_come_again_are_found_in_another_template(exports: list[nn.Module]) -> None:
    templates, images = OnnxTemplates(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for width, number in [(8, 2.0), (6, 3.0), (7, 2.0), (5, 3.0)]:
        model = Multiplied(width, number).eval()
        assert_close(templates, model, images)
    assert len(exports) == 2


class Padded(nn.Module):
    """Pads channels, then space: ONNX counts axes from the first, PyTorch from the last."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8 - before - after, 3)
        self.sides = (before, after)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.conv(x), (0, 0, 0, 0, *self.sides))
        return nn.functional.pad(x, (1, 2, 0, 3))


def test_paddings_are_exchanged_too(exports: list[nn.Module]) -> None:
    templates, images = OnnxTemplates(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for sides in [(1, 1), (2, 1), (0, 4)]:
        model = Padded(*sides).eval()
        assert_close(templates, model, images)
    assert len(exports) == 1


def test_weights_are_drawn_without_denormals_and_activations_stay_near_one() -> None:
    model, _ = load_model("cifar_resnet56", seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-39)
    drawn = drawn_copy(model.eval())
    assert count_denormals(model).counts
    assert not count_denormals(drawn).counts
    with torch.no_grad():
        largest = float(drawn(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).abs().max())
    assert 1e-3 < largest < 1e6


def test_a_target_of_cuts_is_the_same_target() -> None:
    target = OnnxRuntime(2, 3)
    mine = target.for_cuts()
    assert (mine.key, mine.clock, mine.batch, mine.threads) == (target.key, target.clock, 3, 2)
    assert isinstance(mine, OnnxRuntime)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    with mine.opened(model, (torch.zeros(3, 3, 8, 8),)) as run:
        assert run()[0].shape == (3, 4, 6, 6)


def test_large_models_are_exported_each(monkeypatch: pytest.MonkeyPatch, exports: list[nn.Module]) -> None:
    monkeypatch.setattr(_templates, "_MOST_BYTES", 10)
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    templates = OnnxTemplates()
    for _ in "12":
        templates.content(model, (torch.zeros(2, 3, 8, 8),))
    assert exports == [model, model]

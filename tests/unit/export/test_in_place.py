"""Operations that write to their input: exported files compute what the model does, whoever else reads that input."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from secateur.export import export_onnx
from secateur.export._common import export_program
from secateur.export.onnx_model import compute_out_of_place_

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self, code: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        self.code = code
        self.conv, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.drop, self.relu, self.relu6 = nn.Dropout(), nn.ReLU(inplace=True), nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.code(self, x)


def chain(m: Net, x: Tensor) -> Tensor:
    return m.second(m.relu6(m.norm(m.conv(x))))


def sum_in_place(m: Net, x: Tensor) -> Tensor:
    h = m.conv(x)
    out = m.norm(h)
    out += m.second(h)
    return m.relu(out)


def shortcut_after_the_write(m: Net, x: Tensor) -> Tensor:
    h = m.conv(x)
    return m.second(m.relu(h)) + h


def view_of_what_is_read_again(m: Net, x: Tensor) -> Tensor:
    h = m.conv(x)
    m.relu(h.flatten(2))
    return m.second(h)


def dropout_returns_its_input(m: Net, x: Tensor) -> Tensor:
    h = m.conv(x)
    return m.relu(m.drop(h)) * 0.5 + h


def part_of_channels(m: Net, x: Tensor) -> Tensor:
    h = m.conv(x)
    low, _ = h.chunk(2, 1)
    m.relu(low)
    return m.second(h)


@pytest.mark.parametrize(
    ("code", "left"),
    [
        (chain, 0),
        (sum_in_place, 0),
        (shortcut_after_the_write, 0),  # The capture lets the shortcut read the result.
        (view_of_what_is_read_again, 1),
        (dropout_returns_its_input, 1),
        (part_of_channels, 1),
    ],
)
def test_in_place_operations_return_their_result_only_where_nothing_else_reads_their_input(
    code: Callable[[Net, Tensor], Tensor], left: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Net(code).eval()
    with torch.no_grad():
        wanted = model(IMAGES.clone())
    program = export_program(model, (IMAGES,))
    compute_out_of_place_(program)
    names = [str(node.target).split(".") for node in program.graph.nodes if node.op == "call_function"]
    assert len([name for name in names if name[0] == "aten" and name[1].endswith("_")]) == left
    with torch.no_grad():
        torch.testing.assert_close(program.module()(IMAGES.clone()), wanted)
    export_onnx(model, IMAGES, tmp_path / "model.onnx")  # It compares the file with the model.

"""The time of an ONNX file by module: whose operation each one is, whatever the runtime and the exporter renamed."""

import importlib
import math
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from secateur.cost.module_times import ModuleSeconds, module_seconds, owners_of_nodes
from secateur.export.onnx import onnx_bytes, open_session

_module_times = importlib.import_module("secateur.cost.module_times")


class Mixed(nn.Module):
    """Convolution, norm and activation that are fused; matrices that the exporter transposes; a sum of activations."""

    def __init__(self, biases: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)
        self.head = nn.Linear(16, 4)
        self.offset = nn.Parameter(torch.randn(1, 64, 16))
        for layer in (self.second, self.up, self.down):
            nn.init.constant_(layer.bias, biases)
        with torch.no_grad():
            self.norm.running_var.uniform_(0.5, 2)
            self.norm.weight.uniform_(0.5, 2)

    def forward(self, images: Tensor) -> Tensor:
        found = self.norm(self.first(images)).relu()
        found = (self.second(found) + found).relu()
        rows = found.flatten(2).transpose(1, 2) + self.offset
        return self.head((rows + self.down(self.up(rows).relu())).mean(1))


MODULES = {"", "first", "second", "up", "down", "head"}


def mixed(biases: float = 0.0) -> tuple[nn.Module, bytes, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model, inputs = Mixed(biases).eval(), (torch.randn(1, 3, 8, 8),)
    return model, onnx_bytes(model, inputs), inputs


@pytest.mark.parametrize("biases", [0.0, 0.5])
def test_every_module_with_weights_has_a_time_and_the_parts_add_up(biases: float):
    """Equal biases are one tensor of the file, which says nothing of who reads it."""
    model, content, inputs = mixed(biases)
    found = module_seconds([(model, content), (model, content)], inputs, threads=1, patience_s=0.2)
    assert found is not None
    for each in found:
        # The norm may be folded into the convolution before it.
        assert set(each.modules) - {"norm"} == MODULES
        assert min(each.modules.values()) > 0
        assert each.other > 0
        assert each.total == pytest.approx(math.fsum(each.modules.values()) + each.other)


def test_what_the_runtime_made_of_a_layer_is_still_of_that_layer(tmp_path: Path):
    model, content, _ = mixed()
    written = tmp_path / "as_it_runs.onnx"
    open_session(content, threads=1, profile=tmp_path / "profile", optimized=written)
    owners, nodes = owners_of_nodes(model, content, written), onnx.load(written).graph.node
    kinds = {name: [node.op_type for node in nodes if owners.get(node.name) == name] for name in MODULES}
    for name in ("first", "second"):
        assert [kind for kind in kinds[name] if kind in ("Conv", "FusedConv")], kinds
    for name in ("up", "down"):
        assert [kind for kind in kinds[name] if "MatMul" in kind or "Gemm" in kind], kinds
    # What reads no weights is nobody's.
    assert not [node.name for node in nodes if node.op_type in ("ReduceMean", "Transpose") and node.name in owners]


def test_a_convolution_in_a_layout_of_the_runtime_is_found_by_its_value(tmp_path: Path):
    """Not every processor has that layout: here the runtime's file is written by hand."""
    model, content, _ = mixed()
    given = onnx.load_from_string(content)
    conv = [node for node in given.graph.node if node.op_type == "Conv"][1]
    last = next(node for node in given.graph.node if conv.output[0] in node.input)
    made = onnx.helper.make_node("Conv", ["reorder_1", "reorder_2"], ["y"], name=f"{last.output[0]}_nchwc")
    pool = onnx.helper.make_node("MaxPool", ["y"], ["z"], name=f"{conv.output[0]}_nchwc")
    unknown = onnx.helper.make_node("Conv", ["y", "reorder_3"], ["v"], name="nowhere_nchwc")
    graph = onnx.helper.make_graph([made, pool, unknown], "made", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "made.onnx")
    assert owners_of_nodes(model, content, tmp_path / "made.onnx") == {made.name: "second"}


def test_files_that_would_take_long_are_left_out(monkeypatch: pytest.MonkeyPatch):
    model, content, inputs = mixed()
    monkeypatch.setattr(_module_times, "_LARGEST_FILE", 100)
    assert module_seconds([(model, content)], inputs, threads=1) is None
    assert ModuleSeconds().total == 0

"""The data flow of a model is the same whether all values are computed or only those that are read."""

import contextlib

import pytest
import timm
import torch
from torch import Tensor, nn
from zoo import ZOO

from secateur.graph._record import FakeValueReadError, ForwardRun, record_execution, record_execution_once


def record_of(run: ForwardRun) -> tuple[object, ...]:
    flow = run.flow
    return (
        flow.names,
        flow.sources,
        flow.from_input,
        flow.call,
        flow.returned,
        flow.additions,
        [vars(call) for call in flow.calls],
        run.mixings,
        run.stored,
    )


@pytest.mark.parametrize("name", ZOO)
def test_the_record_does_not_depend_on_what_is_computed(name):
    model, example = ZOO[name]()
    lean, full = (record_execution_once(model, (example[:1],), computed=computed) for computed in (False, True))
    assert record_of(lean) == record_of(full)
    assert any(lean.flow.fake)
    assert not any(full.flow.fake)


@pytest.mark.parametrize(
    "name", ["resnet18", "efficientnet_b0", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_the_record_of_published_models_does_not_depend_on_it(name):
    model = timm.create_model(name, img_size=64) if "tiny" in name else timm.create_model(name)
    example = torch.randn(1, 3, 64, 64)
    lean, full = (record_execution_once(model.eval(), (example,), computed=computed) for computed in (False, True))
    assert record_of(lean) == record_of(full)


class Reading(nn.Module):
    """Takes a way that depends on numbers; perhaps it minds no exception."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.stem, self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        with torch.no_grad():
            self.stem.bias.fill_(100.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        large = False
        if self.way == "item":
            large = bool(x.mean().item() > 50)
        if self.way == "list":
            large = x.detach()[0, 0, 0].tolist()[0] > 50
        if self.way == "caught":
            with contextlib.suppress(Exception):
                large = bool(x.mean() > 50)
        return self.left(x) if large else self.right(x)


@pytest.mark.parametrize("way", ["item", "list", "caught"])
def test_what_is_read_is_computed(way):
    model, example = Reading(way).eval(), torch.rand(1, 3, 4, 4)
    with pytest.raises(FakeValueReadError):
        record_execution_once(model, (example,), computed=False)
    assert [call.module for call in record_execution(model, (example,)).flow.calls] == ["", "stem", "left"]


def test_parameters_are_named_where_they_are_read():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    run = record_execution(model, (torch.rand(1, 3, 4, 4),))
    read = {name: stored for name, stored in zip(run.flow.names, run.stored, strict=True) if stored}
    assert list(read) == ["convolution", "native_batch_norm"]
    assert read["convolution"] == ("0.weight", "0.bias")
    assert set(read["native_batch_norm"]) == {"1.weight", "1.bias", "1.running_mean", "1.running_var"}

"""The quick copy of a model is as deep as `copy.deepcopy`."""

import copy

import torch
from torch import nn
from zoo import ZOO

from secateur._runtime import copy_model


class Peculiar(nn.Module):
    """Holds modules and tensors in every odd place, and copies itself in its own way in one of them."""

    class Own(nn.Linear):
        def __deepcopy__(self, memo):
            twin = nn.Linear(self.in_features, self.out_features)
            twin.was_copied = True
            return twin

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.listed = [self.first, {"table": torch.ones(3)}]
        self.sizes = (2, 3)
        self.absent = None
        self.register_module("nothing", None)
        self.own = Peculiar.Own(4, 2)
        self.register_buffer("steps", torch.zeros(()))
        self.seen, self.conv, self.recurrent = set(), nn.Conv1d(4, 2, 3), nn.GRU(4, 2)
        self.conv.seen = self.seen
        self.first.register_forward_hook(lambda *_: None)


def test_a_copy_shares_nothing_and_keeps_the_ties():
    model = Peculiar().eval()
    twin = copy_model(model, {})
    assert isinstance(twin, Peculiar)
    assert not twin.training
    assert twin.first is twin.again is twin.listed[0]
    assert twin.first is not model.first
    assert twin.first.weight.data_ptr() != model.first.weight.data_ptr()
    assert twin.listed[1]["table"] is not model.listed[1]["table"]
    assert (twin.sizes, twin.absent, twin.nothing) == ((2, 3), None, None)
    assert twin.own.was_copied
    assert twin.steps is not model.steps
    assert twin.conv.seen is twin.seen is not model.seen
    assert twin.conv.weight is not model.conv.weight
    assert twin.recurrent._flat_weights[0] is twin.recurrent.weight_ih_l0
    assert len(twin.first._forward_hooks) == 1
    twin.first.register_forward_hook(lambda *_: None)
    assert len(model.first._forward_hooks) == 1


def test_the_memo_decides_what_is_shared():
    model = Peculiar()
    twin = copy_model(model, {id(model.first.weight): model.first.weight})
    assert twin.first.weight is model.first.weight
    assert twin.first.bias is not model.first.bias


def test_copies_of_the_zoo_compute_the_same():
    for name, make in ZOO.items():
        model, example = make()
        with torch.no_grad():
            expected = copy.deepcopy(model)(example)
            assert torch.equal(copy_model(model, {})(example), expected), name

"""The copy of a model is as deep as `copy.deepcopy`, and exists where `copy.deepcopy` fails."""

import collections
import copy
import functools
import logging
import math
import threading
import warnings
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from zoo import ZOO

from secateur._runtime import add_run_context_, copy_model, torch_threads
from secateur.errors import ModelError


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
    twin = copy_model(model)
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
            assert torch.equal(copy_model(model)(example), expected), name


def same_outputs(model, example):
    """Whether a copy, and the model after that, compute what the model computes."""
    with torch.no_grad():
        expected = model(example)
        return torch.equal(copy_model(model)(example), expected) and torch.equal(model(example), expected)


class Keeps(nn.Module):
    """Keeps its last output, and everything else that `copy.deepcopy` refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.body(x)
        return self.last


class Pair(NamedTuple):
    first: Tensor
    second: str


@dataclass
class Store:
    lock: object
    features: dict


@pytest.mark.parametrize("place", ["attribute", "list", "tuple", "named tuple", "object", "partial", "buffer", "deque"])
def test_a_tensor_computed_from_others_is_copied_without_its_history(place):
    model = Keeps()
    last = model(torch.ones(2, 4))
    model.last = {
        "attribute": last,
        "list": [last, {"again": last}],
        "tuple": (1, (last,)),
        "named tuple": Pair(last, "last"),
        "object": Store(threading.Lock(), {"last": last}),
        "partial": functools.partial(torch.add, last),
        "buffer": None,
        "deque": collections.deque([last], maxlen=3),
    }[place]
    if place == "buffer":
        model.register_buffer("computed", last)
    with pytest.raises((RuntimeError, TypeError)):
        copy.deepcopy(model)
    twin = copy_model(model)
    held = {
        "attribute": lambda m: m.last,
        "list": lambda m: m.last[1]["again"],
        "tuple": lambda m: m.last[1][0],
        "named tuple": lambda m: m.last.first,
        "object": lambda m: m.last.features["last"],
        "partial": lambda m: m.last.args[0],
        "buffer": lambda m: m.computed,
        "deque": lambda m: m.last[0],
    }[place]
    assert torch.equal(held(twin), last)
    assert held(twin) is not last
    assert not held(twin).requires_grad
    assert held(model) is last
    assert last.grad_fn is not None
    if place == "list":
        assert twin.last[0] is twin.last[1]["again"]
    if place == "deque":
        assert twin.last.maxlen == 3


def weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(4, 3))


@pytest.mark.parametrize(
    "make",
    [
        weight_norm,
        lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
        lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", amount=5),
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
    ],
)
def test_weights_that_are_computed_by_hooks_are_computed_in_the_copy(make):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.ReLU())
    model(torch.ones(2, 4)).sum().backward()
    model.eval()
    model[0].settings = math
    example = torch.randn(2, 4)
    assert same_outputs(model, example)
    twin, before = copy_model(model), model(example)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2).add_(1)
    assert torch.equal(model(example), before)
    assert not torch.equal(twin(example), before)


def test_what_cannot_be_copied_is_shared(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.MultiheadAttention(4, 2), nn.LSTM(4, 2))
    with (tmp_path / "log.txt").open("w") as file:
        shared = {
            "config": math,
            "file": file,
            "lock": threading.Lock(),
            "log": logging.getLogger("a model"),
            "steps": (n for n in range(3)),
            "kind": nn.Linear,
        }
        for module in model:
            for name, value in shared.items():
                setattr(module, name, value)
            module.nested = [shared, (file, [math])]
        twin = copy_model(model)
        for module in twin:
            assert all(getattr(module, name) is value for name, value in shared.items())
            assert module.nested[0] == shared
            assert module.nested[0] is not shared
            assert module.nested[1][0] is file
        assert next(model[0].steps) == 0
    assert twin[2]._flat_weights[0] is twin[2].weight_ih_l0
    assert twin[2]._flat_weight_refs[0]() is twin[2].weight_ih_l0


def test_a_generator_of_random_numbers_is_copied_with_its_state():
    model = nn.Linear(4, 3)
    model.generator = torch.Generator().manual_seed(3)
    twin = copy_model(model)
    drawn = torch.rand(5, generator=twin.generator)
    assert torch.equal(torch.rand(5, generator=model.generator), drawn)


def test_references_within_a_model_stay_within_the_copy():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    child = model[1][0]
    child.parent, child.parents = weakref.ref(model), [model]
    child.neighbor, child.stranger = weakref.proxy(model[0]), weakref.ref(nn.Linear)
    child.weight_of_neighbor = weakref.ref(model[0].weight)
    handle = model[0].register_forward_hook(model[1].forward)
    model.handle = handle
    twin = copy_model(model)
    copied = twin[1][0]
    assert copied.parent() is twin is copied.parents[0]
    assert child.parent() is model is child.parents[0]
    assert copied.neighbor.weight is twin[0].weight
    assert copied.weight_of_neighbor() is twin[0].weight
    assert copied.stranger() is nn.Linear
    (hook,) = twin[0]._forward_hooks.values()
    assert hook.__self__ is twin[1]
    twin.handle.remove()
    assert not twin[0]._forward_hooks
    assert len(model[0]._forward_hooks) == 1


def test_a_module_that_refuses_to_be_copied_is_named():
    class Unique(nn.Linear):
        def __reduce_ex__(self, protocol):
            raise NotImplementedError("there is only one")

    with pytest.raises(ModelError, match=r"`model` \(Sequential\) cannot be copied: there is only one\. Change"):
        copy_model(nn.Sequential(Unique(2, 2)))


def test_a_module_that_copies_itself_may_hold_computed_tensors():
    class Own(Keeps):
        def __deepcopy__(self, memo):
            twin = Own()
            twin.last = copy.deepcopy(self.last, memo)
            return twin

    model = nn.Sequential(Own())
    last = model(torch.ones(1, 4))
    assert torch.equal(copy_model(model)[0].last, last)


def test_copies_of_scripted_modules_compute_the_same():
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 3)), nn.ReLU())
    assert same_outputs(model, torch.randn(2, 4))
    assert copy_model(model)[0].weight.data_ptr() != model[0].weight.data_ptr()


def test_views_go_on_sharing_their_memory():
    model = nn.Module()
    model.register_buffer("table", torch.arange(6.0))
    model.register_buffer("start", model.table[:3])
    twin = copy_model(model)
    twin.table[0] = 9
    assert twin.start[0] == 9
    assert model.start[0] == 0


def test_contexts_of_runs_and_parametrizations_go_along():
    entered = []
    model = nn.Sequential(nn.Linear(4, 3))
    parametrize.register_parametrization(model[0], "weight", nn.Identity())

    class Context:
        def __enter__(self):
            entered.append(1)

        def __exit__(self, *_):
            entered.append(2)

    add_run_context_(model, lambda _: Context())
    assert same_outputs(model, torch.randn(2, 4))
    assert entered == [1, 2] * 3


def test_threads_are_set_and_restored():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with torch_threads(None):
            assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before

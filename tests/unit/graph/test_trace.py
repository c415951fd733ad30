"""`trace` does not change the model or the process, and its errors say what to do."""

import weakref
from typing import Any

import pytest
import torch
from cuts import one_channel
from torch import Tensor, nn
from zoo import ZOO

from secateur.errors import KindError, TraceError
from secateur.graph import shadow_copy, trace
from secateur.graph._ledger import Ledger
from secateur.graph._size_ints import SizeInt
from secateur.prune import apply_architecture

pytestmark = pytest.mark.window


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that tracing could disturb."""
    found: dict[str, Any] = {"rng": torch.get_rng_state().tolist(), "grad": torch.is_grad_enabled()}
    for name, module in model.named_modules():
        found[f"{name} identity"] = id(module)
        found[f"{name} training"] = module.training
        for key, value in vars(module).items():
            if key.startswith("_") and isinstance(value, dict) and "hooks" in key:
                found[f"{name}.{key}"] = (id(value), list(value.items()))
            elif isinstance(value, int | float | str | tuple | list):
                items = value if isinstance(value, tuple | list) else [value]
                found[f"{name}.{key}"] = (type(value), value, [type(item) for item in items])
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad._version)
        found[f"{name} tensor"] = (id(tensor), tensor.data_ptr(), tensor._version, tensor.requires_grad, grad)
        found[f"{name} value"] = tensor.detach().clone().numpy().tobytes()
        found[f"{name} attributes"] = sorted(vars(tensor))
    return found


def disturbable(name: str) -> tuple[nn.Module, Tensor]:
    """A net in training mode with gradients, hooks and a frozen parameter."""
    model, example = ZOO[name]()
    model(example).sum().backward()
    model.train()
    next(model.children()).eval()
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda module, args, out: None)
    list(model.modules())[-1].register_forward_pre_hook(lambda module, args: None)
    return model, example


@pytest.mark.parametrize(
    "name", ["residual", "option_a_residual", "split", "dropout", "inverted_residual_se", "attention"]
)
def test_tracing_changes_nothing(name):
    model, example = disturbable(name)
    before, x = snapshot(model), example.clone()
    trace(model, example)
    assert snapshot(model) == before
    assert torch.equal(x, example)
    assert not vars(example)


def test_tracing_does_not_depend_on_the_mode_of_the_model():
    model, example = ZOO["dropout"]()
    calm = trace(model, example)
    model.train()
    busy = trace(model, example)
    assert [(a.name, a.size, a.frozen_because) for a in calm.axes] == [
        (a.name, a.size, a.frozen_because) for a in busy.axes
    ]
    assert calm.tensors == busy.tensors
    assert calm.operations == busy.operations


def test_tracing_is_deterministic():
    first, second = (trace(*ZOO["shuffle_v2"]()) for _ in range(2))
    for a, b in zip(first.axes, second.axes, strict=True):
        assert (a.name, a.size, a.frozen_because) == (b.name, b.size, b.frozen_because)
        for one, two in zip(a.sites, b.sites, strict=True):
            assert (one.tensor, one.dim, one.role, one.index.tolist()) == (
                two.tensor,
                two.dim,
                two.role,
                two.index.tolist(),
            )
    assert first.edits == second.edits


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.width = 4
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.dropout(self.body(x), training=True)
        return self.head(x.mean((2, 3)).view(-1, self.width))


def test_a_failure_while_tracing_changes_nothing_either():
    model = Failing()
    before = snapshot(model)
    with pytest.raises(
        TraceError, match=r"cannot run the example input of shape \[\(1, 3, 8, 8\)\] \(in module 'head'\)"
    ):
        trace(model, torch.zeros(2, 3, 8, 8))
    assert snapshot(model) == before
    assert not any(isinstance(value, SizeInt) for module in model.modules() for value in vars(module).values())
    # The recorders are gone too.
    assert type(torch.zeros(2, 3).shape) is torch.Size


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((), r"`example` must hold at least one tensor; got tuple\. Pass an input batch"),
        (
            torch.zeros(1, 4, 8, 8),
            r"cannot run the example input of shape \[\(1, 4, 8, 8\)\] \(in module '0.0'\).*channels",
        ),
        (torch.zeros(0, 3, 8, 8), r"`example` must hold at least one image; got a batch of shape \(0, 3, 8, 8\)"),
    ],
)
def test_wrong_examples_are_refused(example, message):
    with pytest.raises(TraceError, match=message):
        trace(ZOO["plain"]()[0], example)


def test_an_example_of_another_kind_is_refused():
    message = r"`example` must be of the type Tensor or a tuple or a list or a mapping; got 'image\.png' \(str\)"
    with pytest.raises(KindError, match=message):
        trace(ZOO["plain"]()[0], "image.png")


def test_a_model_without_parameters_is_refused():
    with pytest.raises(TraceError, match=r"`model` \(ReLU\) has no parameters; there is nothing to prune"):
        trace(nn.ReLU(), torch.zeros(1, 3, 8, 8))


def test_a_model_that_cannot_be_copied_is_refused_in_words():
    class Unique(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise NotImplementedError("there is only one")

    with pytest.raises(TraceError, match=r"`model` \(Sequential\) cannot be copied: there is only one\. .*remove"):
        trace(nn.Sequential(Unique(3, 4, 1)), torch.zeros(1, 3, 8, 8))


def test_a_model_that_holds_what_cannot_be_copied_is_traced():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))
    model.sizes, model.settings = (n for n in range(3)), torch
    model.last = model(torch.ones(1, 3, 8, 8))
    assert [axis.name for axis in trace(model, torch.zeros(1, 3, 8, 8)).prunable] == ["0"]
    assert next(model.sizes) == 0


def test_only_the_first_of_a_batch_is_used_of_every_input():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(1, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
            return self.head((self.first(x) + scale * self.second(y)).mean((2, 3)))

    graph = trace(Two(), (torch.zeros(3, 3, 4, 4), torch.zeros(3, 1, 4, 4), 0.5))
    assert [t.shape[0] for t in graph.example[:2]] == [1, 1]
    assert graph.example_shape == (1, 3, 4, 4)
    assert {a.name: a.size for a in graph.prunable} == {"first": 4}


def test_several_outputs_are_all_kept_whole():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 1)

        def forward(self, x: Tensor) -> dict[str, Any]:
            x = self.body(x).relu()
            return {"a": self.a(x), "rest": [self.b(x)]}

    graph = trace(Heads(), torch.zeros(1, 3, 4, 4))
    assert {a.name: a.size for a in graph.prunable} == {"body": 6}
    assert graph.by_name["a"].frozen_because == graph.by_name["b"].frozen_because == "reaches the model's output"


def test_a_shadow_shares_parameters_and_nothing_else():
    model, example = disturbable("residual")
    shadow = shadow_copy(model)
    assert not any(module.training for module in shadow.modules())
    for (name, a), (other, b) in zip(model.named_parameters(), shadow.named_parameters(), strict=True):
        assert name == other
        assert a.data_ptr() == b.data_ptr()
        assert a is not b  # A flag or a gradient of the one is not one of the other.
    assert not {id(m) for m in model.modules()} & {id(m) for m in shadow.modules()}
    assert not {t.data_ptr() for t in model.buffers()} & {t.data_ptr() for t in shadow.buffers()}
    before = snapshot(model)
    with torch.no_grad():
        shadow.train()(example)
    assert snapshot(model) == before


def test_weight_norm_and_other_computed_weights_can_be_traced_and_cut():
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Conv2d(3, 6, 3))
    new = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 8, 3))
    model = nn.Sequential(old, nn.ReLU(), new, nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1))
    x = torch.randn(1, 3, 8, 8)
    model(x)
    graph = trace(model, x)
    assert "3" in {a.name for a in graph.prunable}
    small = apply_architecture(model, graph, one_channel(graph))
    assert small.eval()(x).shape == model(x).shape


def test_tensors_known_by_identity_live_as_long_as_what_knows_them():
    """A model may replace a buffer while it runs, and another tensor would take its memory, and so its identity."""
    ledger, tensor = Ledger(), torch.ones(3)
    alive = weakref.ref(tensor)
    ledger.store("table", tensor)
    del tensor
    assert alive() is not None

"""The inputs of `trace`: examples of every form, and models that must be prepared first."""

import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cuts import apart, outputs, random_architecture
from torch import Tensor, nn
from zoo import ZOO

from secateur.errors import ModelError, TraceError
from secateur.graph import trace
from secateur.graph.rules import per_channel, pointwise
from secateur.prune import cut, mask_removed


class TwoInputs(nn.Module):
    """An image and a vector, a dict with a tuple and a list inside out."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 8, 3, padding=1)
        self.vector = nn.Linear(4, 8)
        self.first = nn.Linear(8, 5)
        self.second = nn.Linear(8, 2)

    def forward(self, image: Tensor, vector: Tensor, scale: float = 1.0) -> dict[str, object]:
        joined = self.image(image).relu().mean((2, 3)) + scale * self.vector(vector)
        return {"classes": (self.first(joined), [self.second(joined)]), "name": "two"}


IMAGE, VECTOR = torch.randn(2, 3, 8, 8), torch.randn(2, 4)


@pytest.mark.parametrize(
    "example",
    [(IMAGE, VECTOR), (IMAGE, VECTOR, 2.0), {"vector": VECTOR, "image": IMAGE}],
    ids=["two", "three", "named"],
)
def test_several_inputs_and_nested_outputs(example):
    model = TwoInputs().eval()
    graph = trace(model, example)
    assert {a.name: a.size for a in graph.prunable} == {"image": 8}
    assert [t.shape[0] for t in graph.example if isinstance(t, Tensor)] == [1, 1]
    architecture = random_architecture(graph, 1)
    made = cut(model, graph, architecture)
    assert made.verification.frozen == ()
    assert (
        apart(outputs(mask_removed(model, graph, architecture), IMAGE, VECTOR), outputs(made.model, IMAGE, VECTOR))
        < 1e-5
    )


def test_a_list_is_one_input_as_detectors_take_it():
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 6, 3)
            self.head = nn.Conv2d(6, 4, 1)

        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            return [{"boxes": self.head(self.body(image[None]).relu()).flatten(2)[0].T} for image in images]

    images = [torch.randn(3, 8, 8), torch.randn(3, 12, 9)]
    graph = trace(Detector().eval(), images)
    assert {a.name: a.size for a in graph.prunable} == {"body": 6}
    assert [tuple(t.shape) for t in graph.example[0]] == [(3, 8, 8), (3, 12, 9)]


def test_an_input_of_the_wrong_name_is_refused():
    with pytest.raises(TraceError, match=r"must name arguments of the model's forward.*got picture, vector"):
        trace(TwoInputs(), {"picture": IMAGE, "vector": VECTOR})


def test_an_input_by_keyword_only_is_refused():
    class Keyword(nn.Linear):
        def forward(self, input: Tensor, *, scale: float) -> Tensor:
            return super().forward(input) * scale

    with pytest.raises(TraceError, match=r"names scale, .* by keyword only"):
        trace(Keyword(4, 4), {"input": VECTOR, "scale": 2.0})


@pytest.mark.parametrize(
    ("wrap", "reason"),
    [
        (torch.compile, r"is compiled. Pass the module that was compiled \(`model._orig_mod`\)"),
        (nn.DataParallel, r"is a parallel wrapper. Pass the module inside \(`model.module`\)"),
        (lambda m: nn.Sequential(m, nn.LazyLinear(3)), "the module '1' .* parameters without a shape yet"),
        (lambda m: m.to("meta"), "meta device"),
        (
            lambda m: torch.ao.quantization.quantize_dynamic(nn.Sequential(m, nn.Linear(5, 5)), {nn.Linear}),
            "is quantized. Prune the floating-point model",
        ),
        (lambda m: nn.Flatten(), "has no parameters"),
    ],
    ids=["compiled", "parallel", "lazy", "meta", "quantized", "empty"],
)
def test_models_that_must_be_prepared_first(wrap, reason):
    model, example = ZOO["plain"]()
    with pytest.raises(TraceError, match=reason):
        trace(wrap(model), example)


class Unhashable(nn.Sequential):  # noqa: PLW1641, as it is the subject
    def __eq__(self, other: object) -> bool:
        return self is other


@pytest.mark.parametrize("wrap", [Unhashable, lambda model: nn.Sequential(model, Unhashable())], ids=["all", "part"])
def test_modules_that_pytorch_cannot_list(wrap):
    model, example = ZOO["plain"]()
    with pytest.raises(ModelError, match=r"must be hashable.* got Unhashable, .* Write `__hash__ = torch"):
        trace(wrap(model), example)


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 16, 4)
    ).eval()


def with_part(change: Callable[[nn.Module], nn.Module], position: int = 3) -> nn.Module:
    model = small_net()
    model[position] = change(model[position])  # type: ignore[index, operator]
    return model


def saved_and_loaded(model: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    file = io.BytesIO()
    torch.jit.save(model, file)
    file.seek(0)
    return torch.jit.load(file)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def with_compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward)
    return model


SMALL_IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
SCRIPTED = r"is TorchScript, whose code cannot be changed. Pass the eager module"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.jit.script(small_net()), rf"`model` \(RecursiveScriptModule\) {SCRIPTED}"),
        (lambda: torch.jit.trace(small_net(), SMALL_IMAGE), rf"`model` \(TopLevelTracedModule\) {SCRIPTED}"),
        (lambda: saved_and_loaded(torch.jit.script(small_net())), rf"`model` .* {SCRIPTED}"),
        (lambda: torch.jit.freeze(torch.jit.script(small_net())), rf"`model` .* {SCRIPTED}"),
        (lambda: with_part(torch.jit.script), rf"the module '3' of `model` \(RecursiveScriptModule\) {SCRIPTED}"),
        (lambda: with_part(lambda m: torch.jit.trace(m, torch.randn(1, 8, 6, 6))), rf"the module '3' .* {SCRIPTED}"),
        (lambda: compiled_in_place(small_net()), "`model` .* is compiled in place"),
        (lambda: with_part(compiled_in_place), "the module '3' .* is compiled in place"),
        (lambda: with_compiled_forward(small_net()), "`model` .* is compiled in place"),
        (lambda: torch.export.export(small_net(), (SMALL_IMAGE,)), r"got ExportedProgram. Pass its module"),
        (
            lambda: torch.export.unflatten(torch.export.export(small_net(), (SMALL_IMAGE,))),
            r"was exported. Pass the flat module",
        ),
        (lambda: F.relu, "must be a torch.nn.Module; got builtin_function_or_method|got function"),
    ],
    ids=[
        "scripted", "traced", "loaded", "frozen", "scripted_part", "traced_part", "compiled", "compiled_part",
        "compiled_forward", "exported_program", "unflattened", "function",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_code_that_nobody_can_read_is_refused_at_the_door(make, reason):
    with pytest.raises(TraceError, match=reason):
        trace(make(), SMALL_IMAGE)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.fx.symbolic_trace(small_net()),
        lambda: torch.export.export(small_net(), (SMALL_IMAGE,)).module(),
        lambda: with_part(lambda m: torch.jit.script(nn.ReLU()), 2),
    ],
    ids=["fx", "export", "scripted_activation"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_graphs_of_modules_and_scripted_activations_are_cut(make):
    model = make()
    graph = trace(model, SMALL_IMAGE)
    assert graph.sizes["0"] == 8
    made = cut(model, graph, random_architecture(graph, 1))
    assert made.verification.frozen == ()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_numbers_in_a_scripted_function_freeze_what_they_count():
    @torch.jit.script
    def halves(x):
        return x[:, :8] + x[:, 8:]

    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(halves(self.first(x)))).mean((2, 3))

    graph = trace(Scripted().eval(), SMALL_IMAGE)
    assert graph.sizes == {"second": 6}
    assert "takes the size 8" in str(graph.by_name["first"].frozen_because)


def test_weights_of_a_type_of_their_own_are_refused():
    class Packed(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return super().__torch_dispatch__(func, types, args, kwargs or {})

    model = small_net()
    model[0].register_buffer("packed", Tensor._make_subclass(Packed, torch.ones(8)))
    with pytest.raises(TraceError, match=r"the module '0' .* holds weights as Packed"):
        trace(model, SMALL_IMAGE)


@torch.library.custom_op("secateur_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return x * 2


class WithCustomOperation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(double(self.first(x)).relu()).mean((2, 3))


def test_a_custom_operation_freezes_what_it_meets_with_the_reason():
    graph = trace(WithCustomOperation().eval(), IMAGE)
    assert "`double` in the model itself has no channel rule" in str(graph.by_name["first"].frozen_because)


@pytest.mark.parametrize("name", ["double", "secateur_tests::double"])
@pytest.mark.parametrize("rule", [pointwise, per_channel])
def test_a_rule_of_ones_own_makes_it_prunable(name, rule):
    model = WithCustomOperation().eval()
    graph = trace(model, IMAGE, rules={name: rule})
    assert [a.name for a in graph.prunable] == ["first"]
    made = cut(model, graph, random_architecture(graph, 0))
    assert made.verification.frozen == ()


def test_control_flow_that_data_decide_is_traced_along_the_way_taken():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.body(x))
            return self.left(x) if x.sum() > -1 else self.right(x)

    graph = trace(Branching().eval(), VECTOR)
    assert [s.tensor for s in graph.by_name["body"].sites] == ["body.weight", "body.bias", "left.weight"]
    assert graph.unseen == ("right.weight", "right.bias")


def test_an_auxiliary_head_is_cut_along_with_what_it_reads():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.head, self.extra = nn.Linear(8, 5), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            x = self.norm(self.body(x)).relu().mean((2, 3))
            return (self.head(x), self.extra(x)) if self.training else self.head(x)

    model = Auxiliary().eval()
    graph = trace(model, IMAGE)
    assert graph.unseen == ()
    small = cut(model, graph, random_architecture(graph, 2)).model.train()
    assert [tuple(t.shape) for t in small(IMAGE)] == [(2, 5), (2, 5)]
    assert small.extra.weight.shape == small.head.weight.shape != (5, 8)


def test_a_cut_holds_for_another_input_size_too():
    model, example = ZOO["residual"]()
    graph = trace(model, example)
    architecture = random_architecture(graph, 3)
    made, larger = cut(model, graph, architecture), torch.randn(2, 3, 20, 12)
    assert apart(outputs(mask_removed(model, graph, architecture), larger), outputs(made.model, larger)) < 1e-5

"""The inputs of `trace`: examples of every form, and models that must be prepared first."""

import pytest
import torch
import torch.nn.functional as F
from cuts import apart, outputs, random_architecture
from torch import Tensor, nn
from zoo import ZOO

from secateur.errors import TraceError
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

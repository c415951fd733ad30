"""`cut` never returns a wrong model: graphs with deliberate errors, models that count their channels, and errors."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from cuts import apart, one_channel, outputs, random_architecture
from torch import Tensor, nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph import ChannelGraph, Extent, Site, SizeEdit, trace
from secateur.prune import Cut, RepairResult, apply_architecture, cut, mask_removed, prunable_parameter_fraction

pytestmark = pytest.mark.window


def proven(made: Cut, model: nn.Module, example: Tensor, graph: ChannelGraph) -> None:
    """The returned model equals the original masked by the *true* graph."""
    want = outputs(mask_removed(model, graph, made.architecture), example)
    assert apart(want, outputs(made.model, example)) <= 1e-5
    assert made.verification.max_rel <= made.verification.tolerance


def with_sites(graph: ChannelGraph, axis: str, change: Callable[[Site], Site | None]) -> ChannelGraph:
    """The graph with the sites of one axis changed or dropped."""
    sites = tuple(new for new in map(change, graph.by_name[axis].sites) if new is not None)
    return replace(graph, axes=tuple(replace(a, sites=sites) if a.name == axis else a for a in graph.axes))


def rolled(tensor: str, dim: int) -> Callable[[Site], Site]:
    return lambda s: replace(s, index=np.roll(s.index, 1, axis=0)) if (s.tensor, s.dim) == (tensor, dim) else s


def without(tensor: str, dim: int) -> Callable[[Site], Site | None]:
    return lambda s: None if (s.tensor, s.dim) == (tensor, dim) else s


WRONG_BUT_SHAPED: list[tuple[str, str, str, int]] = [
    ("residual", "1.conv1", "1.conv2.weight", 1),
    ("residual", "0.0", "1.conv2.weight", 0),
    ("residual", "2.conv2", "4.fc.weight", 1),
    ("residual", "2.conv2", "3.bn2.bias", 0),
    ("plain", "1.0", "1.1.running_mean", 0),
    ("plain", "1.0", "1.1.running_var", 0),
    ("plain", "1.0", "1.1.weight", 0),
    ("dense", "2.conv", "6.weight", 1),
    ("dense", "0", "3.norm.weight", 0),
    ("flatten_linear", "2.0", "5.weight", 1),
    ("inverted_residual_se", "1.expand.0", "1.excite.expand.bias", 0),
    ("depthwise_separable", "0.0", "1.0.weight", 0),
]


@pytest.mark.parametrize(("name", "axis", "tensor", "dim"), WRONG_BUT_SHAPED)
def test_a_site_rolled_by_one_is_caught_and_its_axis_frozen(name, axis, tensor, dim):
    """All shapes agree, the model runs, only the numbers are wrong."""
    model, example = ZOO[name]()
    graph = trace(model, example)
    wrong = with_sites(graph, axis, rolled(tensor, dim))
    size = graph.by_name[axis].size
    made = cut(model, wrong, Architecture.of({axis: range(0, size, 2)}))
    assert [name for name, _ in made.verification.frozen] == [axis]
    assert "was not exact: outputs differ by" in made.verification.frozen[0][1]
    assert made.graph.by_name[axis].frozen_because == made.verification.frozen[0][1]
    assert made.architecture.widths.get(axis, size) == size
    proven(made, model, example, graph)


def test_a_whole_axis_that_is_innocent_stays_cut():
    """The culprit goes back, what was cut elsewhere stays cut where the error can be told apart."""
    model, example = ZOO["residual"]()
    graph = trace(model, example)
    wrong = with_sites(graph, "3.conv1", rolled("3.bn1.weight", 0))
    asked = Architecture.of({"1.conv1": [0, 3, 4], "2.conv1": [1, 2], "3.conv1": [0, 1, 5]})
    made = cut(model, wrong, asked)
    assert {name for name, _ in made.verification.frozen} == {"3.conv1"}
    assert made.architecture == Architecture.of({"1.conv1": [0, 3, 4], "2.conv1": [1, 2]})
    proven(made, model, example, graph)


@pytest.mark.parametrize(
    ("name", "axis", "tensor", "dim"),
    [
        ("residual", "1.conv1", "1.conv2.weight", 1),
        ("residual", "1.conv1", "1.bn1.weight", 0),
        ("plain", "1.0", "2.0.weight", 1),
        ("plain", "1.0", "1.1.running_var", 0),
        ("dense", "2.conv", "3.norm.bias", 0),
    ],
)
def test_a_dropped_site_is_caught_and_its_axis_frozen(name, axis, tensor, dim):
    """Shapes no longer fit: the cut model does not even run."""
    model, example = ZOO[name]()
    graph = trace(model, example)
    wrong = with_sites(graph, axis, without(tensor, dim))
    made = cut(model, wrong, Architecture.of({axis: [0, 1]}))
    assert {name for name, _ in made.verification.frozen} == {axis}
    assert "the cut model does not run" in made.verification.frozen[0][1]
    proven(made, model, example, graph)


@pytest.mark.parametrize("seed", range(4))
def test_many_wrong_sites_at_once_still_end_in_a_right_model(seed):
    model, example = ZOO["residual"]()
    graph = wrong = trace(model, example)
    for axis in ("1.conv1", "2.conv2", "3.conv1"):
        site = graph.by_name[axis].sites[-1]
        wrong = with_sites(wrong, axis, rolled(site.tensor, site.dim))
    made = cut(model, wrong, random_architecture(graph, seed))
    proven(made, model, example, graph)


@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_behind_a_head_that_ignores_its_input_a_wrong_site_is_caught_inside(bias):
    model, example = ZOO["residual"]()
    with torch.no_grad():
        list(model.modules())[-1].weight.zero_()
        list(model.modules())[-1].bias.fill_(bias)
    assert (model(example) == bias).all()
    graph = trace(model, example)
    wrong = with_sites(graph, "3.conv1", rolled("3.bn1.weight", 0))
    made = cut(model, wrong, Architecture.of({"3.conv1": [0, 2, 3]}))
    assert [name for name, _ in made.verification.frozen] == ["3.conv1"]
    assert "although the outputs are equal" in made.verification.frozen[0][1]
    right = cut(model, graph, Architecture.of({"3.conv1": [0, 2, 3]}))
    assert right.verification.frozen == ()


def test_an_output_without_numbers_to_compare_is_refused():
    model, example = ZOO["plain"]()
    graph = trace(model, example)
    model.register_forward_hook(lambda module, args, out: out.argmax(1))
    with pytest.raises(SurgeryError, match="must hold a floating-point tensor"):
        cut(model, graph, Architecture.of({"0.0": [1, 2]}))


def test_a_missing_edit_is_caught():
    model, example = ZOO["option_a_residual"]()
    graph = trace(model, example)
    wrong = replace(graph, edits=tuple(e for e in graph.edits if e.attribute != "low"))
    made = cut(model, wrong, Architecture.of({"2.conv2": [1]}))
    assert [name for name, _ in made.verification.frozen] == ["2.conv2"]
    proven(made, model, example, graph)


def test_where_nothing_can_be_blamed_an_error_says_so():
    """An edit that breaks the model although no channel goes."""
    model, example = ZOO["split"]()
    graph = trace(model, example)
    wrong = replace(graph, edits=(SizeEdit("", "sizes", 0, Extent(9)),))
    with pytest.raises(
        SurgeryError, match=r"could not be cut correctly: the cut model does not run: .*split.* report this"
    ):
        cut(model, wrong, Architecture())


class Counting(nn.Module):
    """The forward pass depends on how many channels there are."""

    def __init__(self, scale: Callable[[Tensor], Tensor]):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.scale(self.stem(x).relu())).relu().mean((2, 3)))


@pytest.mark.parametrize(
    "scale",
    [
        lambda x: x / math.sqrt(x.shape[1]),
        lambda x: x + 1.0 / len(x[0]),
        lambda x: x / math.log(x.numel()),
    ],
)
def test_a_model_that_computes_with_the_number_of_its_channels_is_caught(scale):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, example = Counting(scale).eval(), torch.randn(1, 3, 8, 8)
    graph = trace(model, example)
    asked = {"stem": [0, 2, 5], "inner": [1, 2]}
    made = cut(model, graph, Architecture.of({name: asked[name] for name in graph.sizes}))
    # Where the size is seen to be used, when the model is traced; else when the cut is verified.
    assert (
        graph.by_name["stem"].frozen_because
        or "was not exact: outputs differ by" in dict(made.verification.frozen)["stem"]
    )
    assert made.model.stem.weight.shape[0] == 8
    proven(made, model, example, graph)


def test_the_cut_is_what_was_asked_for():
    model, example = ZOO["residual"]()
    graph = trace(model, example)
    asked = random_architecture(graph, 5)
    model.train()
    made = cut(model, graph, asked)
    assert made.architecture == asked
    assert made.graph is graph
    assert not made.model.training
    assert model.training
    assert made.verification.frozen == ()
    assert made.verification.dtype == "float32"
    assert 0 <= made.verification.max_rel <= made.verification.tolerance == 1e-5
    assert made.repairs == ()


def test_double_precision_is_proved_to_double_precision():
    model, example = ZOO["dense"]()
    model, example = model.double(), example.double()
    graph = trace(model, example)
    made = cut(model, graph, random_architecture(graph, 2))
    assert made.verification.dtype == "float64"
    assert made.verification.tolerance == 1e-12
    assert made.verification.frozen == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    model, example = ZOO["plain"]()
    graph = trace(model, example)
    with torch.no_grad():
        model[0][0].weight[0, 0, 0, 0] = value
    with pytest.raises(SurgeryError, match=r"output on the example is not finite \(NaN or inf\)\. Check its weights"):
        cut(model, graph, Architecture.of({"1.0": [0, 1]}))


def test_removed_channels_may_divide_zero_by_zero():
    """x / |x| is NaN where a channel is zero; nobody reads it, so the cut is right all the same."""

    class Unit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.abs().amax((2, 3), keepdim=True)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Unit(), nn.Conv2d(8, 4, 1)).eval()
    example = torch.randn(1, 3, 8, 8)
    graph = trace(model, example)
    made = cut(model, graph, Architecture.of({"0": [1, 2, 6]}))
    assert made.verification.frozen == ()
    assert made.model[0].weight.shape[0] == 3
    assert made.verification.max_rel <= 1e-5


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (
            {"nowhere": [0]},
            r"`architecture` names the axis 'nowhere', which this model lacks\. It has: 0\.0, 1\.0, 2\.0",
        ),
        ({"3.fc": [0, 1]}, r"cuts the axis '3.fc', which must stay whole: reaches the model's output"),
        ({"0.0": [0, 12]}, r"keeps channel 12 of '0\.0', which has 12"),
    ],
)
def test_architectures_that_do_not_fit_are_refused(kept, message):
    model, example = ZOO["plain"]()
    graph = trace(model, example)
    for act in (cut, apply_architecture, mask_removed):
        with pytest.raises(SurgeryError, match=message):
            act(model, graph, Architecture.of(kept))


def test_naming_a_frozen_axis_as_whole_is_fine():
    model, example = ZOO["plain"]()
    graph = trace(model, example)
    made = cut(model, graph, Architecture.of({"3.fc": range(5), "0.0": [3]}))
    assert made.model[0][0].out_channels == 1


def test_declared_sizes_follow_the_tensors():
    model, example = ZOO["inverted_residual_se"]()
    graph = trace(model, example)
    for module in cut(model, graph, random_architecture(graph, 0)).model.modules():
        if isinstance(module, nn.Conv2d):
            assert (module.out_channels, module.in_channels // module.groups) == tuple(module.weight.shape[:2])
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_mean)


def test_memory_format_and_frozen_parameters_survive():
    model, example = ZOO["plain"]()
    model.to(memory_format=torch.channels_last)
    model[1][0].weight.requires_grad_(False)
    graph = trace(model, example)
    small = apply_architecture(model, graph, one_channel(graph, 1))
    wide = apply_architecture(model, graph, Architecture.of({"0.0": range(0, 12, 2), "1.0": range(0, 16, 3)}))
    assert wide[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not small[1][0].weight.requires_grad
    assert small[0][0].weight.requires_grad


def test_masking_zeroes_parameters_and_leaves_statistics():
    model, example = ZOO["plain"]()
    graph = trace(model, example)
    masked = mask_removed(model, graph, Architecture.of({"0.0": [1, 2]}))
    gone = [0, *range(3, 12)]
    assert not masked[0][0].weight[gone].any()
    assert not masked[0][1].bias[gone].any()
    assert not masked[1][0].weight[:, gone].any()
    assert masked[1][0].weight[:, [1, 2]].all()
    assert torch.equal(masked[0][1].running_var, model[0][1].running_var)


def test_the_share_of_prunable_parameters_is_what_it_says():
    model, example = ZOO["plain"]()
    everything = sum(p.numel() for p in model.parameters())
    assert prunable_parameter_fraction(trace(model, example)) == pytest.approx((everything - 5) / everything)


def test_cutting_uses_no_random_numbers_and_changes_no_modes():
    model, example = ZOO["dropout"]()
    graph = trace(model, example)
    state = torch.get_rng_state()
    cut(model, graph, random_architecture(graph, 0))
    assert torch.equal(state, torch.get_rng_state())


def test_the_result_of_a_repair_survives_json():
    result = RepairResult("Refit()", 0.5, 0.25, True, held_out=False, skipped=(("conv1", "its inputs are zero"),))
    assert RepairResult.from_json(json.loads(json.dumps(asdict(result)))) == result
    # As an earlier version stored it.
    assert RepairResult.from_json({"repair": "Refit()", "before": 0.5, "after": 0.25, "kept": True}).skipped == ()

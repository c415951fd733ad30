import copy
import math
from importlib import import_module

import pytest
import torch
from hand_graphs import Plain, plain
from torch import Tensor, nn

from secateur.architecture import Architecture
from secateur.cost import count_macs
from secateur.distill import MatchFeatures
from secateur.errors import TrainingError
from secateur.graph import trace
from secateur.prune import OutputDistance, RepairContext, apply_architecture, cut

KEPT = Architecture.of({"conv1": (0, 2, 5, 6), "conv2": (1, 3, 4, 7, 8, 11)})
QUICK = MatchFeatures(steps=30, learning_rate=3e-3)


def images(seed: int = 0, count: int = 64) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def traced() -> tuple[Plain, RepairContext]:
    """A network and what a repair of its cut gets."""
    model, _ = plain()
    assert isinstance(model, Plain)
    graph = trace(model.eval(), images(count=1))
    return model, RepairContext(model, graph, KEPT, (images(1), images(2, 40)))


def sliced(context: RepairContext) -> nn.Module:
    return apply_architecture(context.original, context.graph, context.architecture).eval()


def test_outputs_of_images_it_has_not_seen_come_nearer() -> None:
    model, context = traced()
    small, distance = sliced(context), OutputDistance(model, [images(9)])
    before = distance.of(small)
    assert MatchFeatures(steps=150, learning_rate=1e-2).apply_(small, context) == {}
    assert distance.of(small) < 0.3 * before


def test_one_step_is_adam_on_the_formula() -> None:
    """The gradient of the mean over stages plus the mean over outputs, written out once more, and Adam's first step."""
    model, context = traced()
    small = sliced(context)
    twin = copy.deepcopy(small)
    batch = images(3, 8)
    MatchFeatures(steps=1, learning_rate=1e-3, batch_size=8).apply_(
        small, RepairContext(model, context.graph, KEPT, (batch,))
    )
    seen: list[dict[str, Tensor]] = [{}, {}]
    for found, net in zip(seen, (model, twin), strict=True):
        for name in context.graph.stages:
            net.get_submodule(name).register_forward_hook(lambda _m, _i, out, f=found, n=name: f.update({n: out}))
    with torch.no_grad():
        wanted = model(batch)
    given = twin(batch)
    terms = []
    for name in context.graph.stages:
        kept = list(context.graph.kept_positions(name, KEPT.by_name))
        target = seen[0][name][:, kept].detach()
        terms.append(((seen[1][name] - target) ** 2).mean() / (target.var(correction=0) + 1e-6))
    loss = sum(terms) / len(terms) + ((given - wanted) ** 2).mean() / (wanted.var(correction=0) + 1e-6)
    loss.backward()
    for (name, mine), theirs in zip(twin.named_parameters(), small.parameters(), strict=True):
        assert mine.grad is not None
        step = 1e-3 * mine.grad / (mine.grad.abs() + 1e-8)
        torch.testing.assert_close(theirs, (mine - step).detach(), rtol=1e-4, atol=2e-5, msg=name)


def test_model_and_random_state_are_left_alone() -> None:
    model, context = traced()
    small = sliced(context)
    for parameter in small.parameters():
        parameter.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    QUICK.apply_(small, context)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in small.parameters())
    assert not any(module.training for module in small.modules())
    assert not any(module._forward_hooks for net in (model, small) for module in net.modules())


def test_the_same_seed_gives_the_same_bits() -> None:
    _, context = traced()
    first, second, other = sliced(context), sliced(context), sliced(context)
    QUICK.apply_(first, context)
    QUICK.apply_(second, context)
    MatchFeatures(steps=30, learning_rate=3e-3, seed=1).apply_(other, context)
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_cut_undoes_it_where_it_does_harm() -> None:
    model, context = traced()
    batch = (images(1),)
    done = cut(model, context.graph, KEPT, calibration=batch, repairs=(MatchFeatures(steps=3, learning_rate=100.0),))
    assert [repair.kept for repair in done.repairs] == [False]
    want = sliced(context).state_dict()
    assert all(torch.equal(value, want[name]) for name, value in done.model.state_dict().items())


class Two(nn.Module):
    """Inputs by name, two outputs, and a recurrent layer with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.memory = nn.LSTM(6, 5, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, pixels: Tensor, scale: Tensor) -> dict[str, Tensor]:
        feature = self.second(torch.relu(self.first(pixels))) * scale[:, None, None, None]
        return {"map": feature, "last": self.memory(feature.mean(3).transpose(1, 2))[0]}


def test_any_inputs_and_outputs_and_recurrent_layers() -> None:
    torch.manual_seed(0)
    model = Two().eval()
    batch = {"pixels": images(1, 32), "scale": torch.ones(32)}
    graph = trace(model, batch)
    axis = next(axis for axis in graph.prunable if axis.size == 8)
    architecture = Architecture.of({axis.name: (0, 1, 4, 6)})
    small = apply_architecture(model, graph, architecture).eval()
    distance = OutputDistance(model, [{"pixels": images(5, 16), "scale": torch.ones(16)}])
    before = distance.of(small)
    QUICK.apply_(small, RepairContext(model, graph, architecture, (batch,)))
    assert distance.of(small) < before
    assert (small.memory.dropout, small.memory.training) == (0.5, False)


def test_what_the_original_gives_is_computed_once_and_a_pass_later_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three passes over four batches: with room for targets the original runs four times, without it twelve."""
    model, context = traced()
    context = RepairContext(model, context.graph, KEPT, (images(1), images(2)))
    runs: list[int] = []
    found: dict[int, nn.Module] = {}
    module = import_module("secateur.distill.match_features")
    whole = module.shadow_copy

    def watched(original: nn.Module) -> nn.Module:
        copied = whole(original)
        copied.register_forward_hook(lambda *_: runs.append(1))
        return copied

    monkeypatch.setattr(module, "shadow_copy", watched)
    for room, times in ((2**29, 4), (0, 12)):
        monkeypatch.setattr(module, "_TARGET_BYTES", room)
        runs.clear()
        found[room] = sliced(context)
        MatchFeatures(steps=12, batch_size=32).apply_(found[room], context)
        assert len(runs) == times
    for one, other in zip(*(net.parameters() for net in found.values()), strict=True):
        assert torch.equal(one, other)


def test_it_learns_from_further_images_too() -> None:
    _, context = traced()
    few, many = sliced(context), sliced(context)
    MatchFeatures(steps=6, batch_size=32).apply_(few, context)
    more = MatchFeatures(steps=6, batch_size=32, more=(images(5),))
    more.apply_(many, context)
    assert any(not torch.equal(a, b) for a, b in zip(few.parameters(), many.parameters(), strict=True))
    assert more == MatchFeatures(steps=6, batch_size=32)
    assert "tensor" not in repr(more)


def test_the_number_of_steps_follows_the_cost_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, context = traced()
    module = import_module("secateur.distill.match_features")
    batch = (images(1), list(range(32)))
    macs = count_macs(sliced(context), images(1)[:1])
    monkeypatch.setattr(module, "_ALL_MACS", 3 * 32 * macs * 150.5)
    assert module._steps_for(sliced(context), batch) == 150
    monkeypatch.setattr(module, "_ALL_MACS", 1)
    assert module._steps_for(sliced(context), batch) == 100
    monkeypatch.setattr(module, "_ALL_MACS", 1e18)
    assert module._steps_for(sliced(context), batch) == 400


def test_half_precision_is_skipped_with_the_reason() -> None:
    _, context = traced()
    small = sliced(context).bfloat16()
    assert "less than 32 bits" in QUICK.apply_(small, context)["the model"]


def test_what_cannot_be_is_refused() -> None:
    for wrong in ({"steps": 0}, {"batch_size": -1}, {"learning_rate": 0.0}, {"learning_rate": math.inf}):
        with pytest.raises(TrainingError, match=f"`{next(iter(wrong))}` must be"):
            MatchFeatures(**wrong)

"""Training of the supernet: gradients against really cut models, and what is counted against counting by hand."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from poisoned import Exploding, poisoned
from slow_search import data as noise
from swp_runs import alone, as_text, options_of, quick, quick_config, staged, whole
from tas_runs import Net, Recorder, run
from torch import Tensor, nn

from secateur.errors import BudgetError, TrainingError
from secateur.graph import trace
from secateur.nas import (
    InPlace,
    Labels,
    RandomSampler,
    SandwichSampler,
    SoftLabels,
    SubnetSampler,
    Supernet,
    Supervision,
)
from secateur.nas.swp_candidates import CandidateRows, CandidateSpace
from secateur.nas.swp_train import SupernetStep, SupervisionTarget, SWPSearchConfig, TrainingCounts
from secateur.prune import original_names
from secateur.train import SGD, AdamW, Precision, Trainer, open_fabric

PLAIN = SGD(momentum=0.0, nesterov=False, weight_decay=0.0)
each_graph = pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])


def run_of(
    options: CandidateSpace,
    nets: SubnetSampler,
    supervision: Supervision,
    dtype: torch.dtype = torch.float32,
    **train: Any,
) -> tuple[SupernetStep, Supernet]:
    """A training before its first step, with channels as they are in the model."""
    inputs = options.context.inputs
    graph = replace(inputs.graph, example=tuple(tensor.to(dtype) for tensor in inputs.graph.example))
    supernet = Supernet(copy.deepcopy(inputs.model).to(dtype), graph).train()
    fabric = open_fabric(Precision.FLOAT32)
    config = SWPSearchConfig(options, nets, supervision, noise().train, None, quick_config(**train), fabric)
    return SupernetStep(config, supernet), supernet


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    (images, labels), *_rest = noise().train.batches(16, device=torch.device("cpu"))
    return images.to(dtype), labels


# --- gradients --------------------------------------------------------------------------------------------------------


def loss_by_hand(supervision: Supervision, outputs: Sequence[Tensor], targets: Sequence[Tensor], labels: Tensor):
    """Of every stage, as the formulas have it."""
    if supervision == Labels():
        return [-outputs[-1].log_softmax(1)[torch.arange(len(labels)), labels].mean()]
    if supervision == SoftLabels():
        p, log_q = targets[-1].softmax(1), outputs[-1].log_softmax(1)
        return [(p * (p.log() - log_q)).sum(1).mean()]
    return [((y - x) ** 2).mean() / x.var(unbiased=False) for y, x in zip(outputs, targets, strict=True)]


def gradients_by_hand(
    model: nn.Module,
    options: CandidateSpace,
    supernet: Supernet,
    nets: Sequence[CandidateRows],
    supervision: Supervision,
    full: bool,
) -> tuple[dict[str, Tensor], list[float]]:
    """Of really cut models, stage by stage, put where their channels are in the whole one; and the losses."""
    images, labels = batch(next(model.parameters()).dtype)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    teacher = copy.deepcopy(model).train()
    *handed_on, logits = whole(teacher, options.stages, images)
    entropy = F.cross_entropy(logits, labels)
    if full:
        entropy.backward()
        for name, parameter in teacher.named_parameters():
            total[name] += parameter.grad
    losses = np.zeros(len(options.stages))
    for rows in nets:
        small = supernet.extract(options.subnet(rows)).train()
        outputs = [alone(small, options.stages, n, images, handed_on) for n in range(len(options.stages))]
        found = loss_by_hand(supervision, outputs, [*handed_on, logits.detach()], labels)
        (sum(found) / len(nets)).backward()
        losses += [float(loss.detach()) / len(nets) for loss in found]
        for name, original in original_names(small).items():
            for leaf, parameter in small.get_submodule(name).named_parameters(recurse=False):
                if parameter.grad is not None:
                    key = f"{original}.{leaf}" if original else leaf
                    total[key][tuple(slice(0, n) for n in parameter.shape)] += parameter.grad
    return total, [float(entropy.detach()), *losses]


CASES = [
    (SandwichSampler(2), InPlace(), None),
    (SandwichSampler(0), InPlace(), None),
    (RandomSampler(3), InPlace(), None),
    (SandwichSampler(1), InPlace(), ()),
    (SandwichSampler(1), SoftLabels(), ()),
    (RandomSampler(2), Labels(), ()),
]


@each_graph
@pytest.mark.parametrize(("nets", "supervision", "cuts"), CASES)
def test_a_step_is_that_of_the_really_cut_models(nets, supervision, cuts, untied):
    """CE of the full net + the mean over the others of their stages' losses, each fed with the full net's features.

    The latter are detached by hand, so that a gradient that crosses a cut or reaches the teacher would show.
    """
    dtype = torch.float64 if supervision == InPlace() else torch.float32
    options = options_of(staged(untied=untied), cuts=cuts)
    step, supernet = run_of(options, nets, supervision, dtype, optimizer=PLAIN)
    before = copy.deepcopy(supernet.model)
    others = nets.of(options, np.random.default_rng(5))
    wanted, losses = gradients_by_hand(before, options, supernet, others, supervision, nets.full_learns)
    step.draw.bit_generator.state = np.random.default_rng(5).bit_generator.state
    parts = Trainer(step).train_step(batch(dtype), 0, 0.1)
    total = parts.pop("total")
    # Cross-entropy is computed in float32 whatever the model is.
    tolerance = 1e-6 if supervision == InPlace() else 2e-5
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert scale > 0.01
    for name, parameter in supernet.model.named_parameters():
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(got, wanted[name], rtol=tolerance, atol=tolerance * scale)
        moved = before.get_parameter(name) - 0.1 * wanted[name]
        torch.testing.assert_close(parameter.detach(), moved.detach(), rtol=tolerance, atol=tolerance * scale)
    assert list(parts) == ["full", *(f"stage_{n}" for n in range(1, len(losses)))]
    np.testing.assert_allclose([float(part) for part in parts.values()], losses, rtol=1e-5)
    assert float(total) == pytest.approx(sum(losses), rel=1e-5)


def test_variances_of_parts_of_a_batch_are_those_of_the_batch():
    """Two processes: what each says is averaged, and both then have what one process would have."""
    draw = torch.Generator().manual_seed(3)
    batch = [5 + torch.randn(8, 3, 4, 4, generator=draw), 0.1 * torch.randn(8, 4, generator=draw)]
    labels = torch.zeros(4, dtype=torch.int64)
    parts = [[tensor[rank::2] for tensor in batch] for rank in range(2)]
    said: list[Tensor] = []
    for part in parts:
        _ = SupervisionTarget.of(part, labels, lambda tensor: said.append(tensor) or tensor).variances
    mean = torch.stack(said).mean(0)
    wanted = torch.stack([tensor.var(unbiased=False) for tensor in batch])
    for part in parts:
        torch.testing.assert_close(SupervisionTarget.of(part, labels, lambda _: mean).variances, wanted)
        assert not torch.allclose(SupervisionTarget.of(part, labels).variances, wanted, rtol=1e-4)


# --- which networks, and from what ------------------------------------------------------------------------------------


def as_lists(networks: Sequence[CandidateRows]) -> list[list[list[int]]]:
    return [[row.tolist() for row in rows] for rows in networks]


def test_the_sandwich_is_the_tiny_net_and_drawn_ones_and_its_ablation_only_drawn_ones():
    options = options_of(staged())
    drawn = [options.sample(draw) for draw in [np.random.default_rng(1)] for _ in range(3)]
    sandwich, only = (nets.of(options, np.random.default_rng(1)) for nets in (SandwichSampler(3), RandomSampler(3)))
    assert as_lists(sandwich) == as_lists([options.smallest, *drawn])
    assert as_lists(only) == as_lists(drawn)
    assert SandwichSampler().full_learns
    assert not RandomSampler().full_learns


def test_numbers_of_networks_out_of_range_are_refused():
    with pytest.raises(TrainingError, match="`random` must not be negative; got -1"):
        SandwichSampler(-1)
    with pytest.raises(TrainingError, match="`random` must be at least 1; got 0"):
        RandomSampler(0)


@pytest.mark.parametrize("supervision", [Labels(), SoftLabels()])
def test_logits_and_labels_say_nothing_of_stages(supervision):
    seen = Recorder()
    message = rf"`supervision` must be InPlace\(\) for a model in stages; got {type(supervision).__name__}\(\) for 3"
    with pytest.raises(BudgetError, match=message):
        run(staged(), quick(supervision=supervision), callbacks=seen)
    assert seen.opened == []
    assert run(staged(), quick(1, supervision=supervision, cuts=())).notes["loss"] > 0  # type: ignore[operator]


# --- what is counted --------------------------------------------------------------------------------------------------


def channels_of(supernet: Supernet, options: CandidateSpace, rows: CandidateRows) -> dict[str, int]:
    """How many channels of each axis a really cut model has; 0 for an axis that went with its block."""
    small = supernet.extract(options.subnet(rows))
    there = {
        f"{original}.{leaf}": parameter.shape[0]
        for name, original in original_names(small).items()
        for leaf, parameter in small.get_submodule(name).named_parameters(recurse=False)
    }
    # In this net an axis is named after the convolution that produces it.
    return {name: there.get(f"{name.removesuffix('/branch')}.weight", 0) for name in supernet.graph.sizes}


@each_graph
@pytest.mark.parametrize("nets", [SandwichSampler(2), RandomSampler(3)])
def test_fairness_is_what_counting_every_channel_gives(nets, untied):
    """Branches are never wider than their streams, and channels of a removed block learn nothing."""
    options = options_of(staged(untied=untied))
    supernet = Supernet(options.context.inputs.model, options.context.inputs.graph)
    names = [options.context.costs.axes[axis] for stage in options.of_stage for axis in stage.axes]
    times = {name: np.zeros(supernet.graph.sizes[name], dtype=int) for name in names}
    tally, draw = TrainingCounts(options), np.random.default_rng(0)
    assert tally.fairness == 1
    seen: set[str] = set()
    for _ in range(8):
        networks = [*nets.of(options, draw), *([options.largest] if nets.full_learns else [])]
        for rows in networks:
            tally.add(rows)
            seen.update(f"{number} {row.tolist()}" for number, row in enumerate(rows))
            for name, width in channels_of(supernet, options, rows).items():
                if name in times:
                    times[name][:width] += 1
        wanted = min(count.min() / count.max() for count in times.values())
        assert tally.fairness == pytest.approx(wanted, abs=1e-12)
    for number, counted in enumerate(tally.candidates):
        assert counted["trained"] == sum(candidate.startswith(f"{number} ") for candidate in seen)
        assert 10 ** counted["log10"] == pytest.approx(options.of_stage[number].size)
    again = TrainingCounts(options)
    again.restore(json.loads(json.dumps(tally.to_json())))
    assert (again.fairness, again.candidates) == (tally.fairness, tally.candidates)
    again.add(options.smallest)
    tally.add(options.smallest)
    assert again.to_json() == tally.to_json()


def test_channels_that_never_learned_are_told():
    options = options_of(staged())
    tally = TrainingCounts(options)
    tally.add(options.smallest)
    assert tally.fairness == 0


def test_the_sandwich_is_fairer_than_its_ablation():
    """With the full net in every step no channel learns less than once in four networks."""
    found = {}
    for name, nets in (("sandwich", SandwichSampler(2)), ("drawn", RandomSampler(4))):
        notes = run(staged(), quick(2, sampler=nets, depths=None, candidates=2, rounds=1)).notes
        history: Any = notes["training"]
        assert history[-1]["fairness"] == notes["fairness"]
        found[name] = notes["fairness"]
    assert found["drawn"] < 0.5
    assert found["sandwich"] >= 0.25


# --- the course of it -------------------------------------------------------------------------------------------------


def test_losses_of_the_epochs_are_noted_and_fall():
    seen = Recorder()
    history: Any = run(staged(), quick(4), callbacks=seen).notes["training"]
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3, 4]
    assert all(len(epoch["stages"]) == 3 for epoch in history)
    # Those of features; the labels are noise, so what the logits do is chance.
    for number in (0, 1):
        assert history[-1]["stages"][number] < 0.8 * history[0]["stages"][number]
    assert seen.opened[0] == {"what": "search", "epochs": 4, "steps": 3, "done": 0}
    trained, judged = seen.epochs[:4], seen.epochs[4:]
    for (number, numbers, line), noted in zip(trained, history, strict=True):
        assert number == noted["epoch"]
        assert numbers["epoch_full_loss"] == noted["full"]
        assert [numbers[f"epoch_stage_{n}_loss"] for n in (1, 2, 3)] == noted["stages"]
        assert numbers["epoch_total_loss"] == pytest.approx(noted["full"] + sum(noted["stages"]), rel=1e-5)
        assert line.startswith(f"epoch {number}/4  full net {noted['full']:.4f}  stages ")
    assert [number for number, _, _ in judged] == [1, 2, 3]
    assert judged[0][2] == "round 1/3  candidates of each stage 4, 4, 4"


def test_the_learning_rate_is_that_of_the_schedule():
    seen = Recorder()
    strategy = quick(4)
    schedule = replace(strategy.train, warmup_fraction=0.25)
    run(staged(), replace(strategy, train=schedule), callbacks=seen)
    rates = [numbers["learning_rate"] for _, _, numbers in seen.steps if "learning_rate" in numbers]
    # The last of the three steps of every epoch is shown.
    assert rates == [schedule.learning_rate_at(3 * epoch + 2, steps=12) for epoch in range(4)]


@pytest.mark.parametrize(("epoch", "step"), [(1, 1), (2, 3)])
def test_a_loss_that_is_not_finite_stops_the_training(epoch, step, tmp_path):
    """It says when; what was good is kept, and with good images the search goes on from there."""
    message = rf"the loss \(.*nan.*\) must stay finite; that failed at epoch {epoch}, step {step} \(learning rate"
    with pytest.raises(TrainingError, match=message):
        run(staged(), quick(2), data=poisoned(epoch, step), folder=tmp_path)
    assert [path.name for path in tmp_path.glob("epoch-*")] == [f"epoch-{n:06d}" for n in range(1, epoch)]
    seen = Recorder()
    found = run(staged(), quick(2), folder=tmp_path, callbacks=seen)
    assert seen.opened[0]["done"] == epoch - 1
    assert as_text(found.notes) == as_text(run(staged(), quick(2)).notes)


def test_weights_that_are_not_finite_leave_no_checkpoint(tmp_path):
    """The only step of the epoch spoils them; no loss has shown it yet."""
    given = staged()
    model = nn.Sequential(*given.model, Exploding()).eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    strategy = quick(2, train=quick_config(2, batch_size=48))
    with pytest.raises(TrainingError, match="the weights must stay finite; that failed at the end of epoch 1"):
        run(Net(model, graph, given.batches), strategy, folder=tmp_path)
    assert list(tmp_path.glob("epoch-*")) == []


def test_nothing_of_the_callers_is_changed():
    given = staged(untied=True)
    given.model.train()
    given.model[1].eval()
    given.model[0].weight.requires_grad = False
    before = {name: tensor.clone() for name, tensor in given.model.state_dict().items()}
    modes = [module.training for module in given.model.modules()]
    state, rng = torch.get_rng_state(), np.random.get_state()[1].copy()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = run(given, quick(1))
    assert all(torch.equal(before[name], tensor) for name, tensor in given.model.state_dict().items())
    assert modes == [module.training for module in given.model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(rng, np.random.get_state()[1])
    assert all(parameter.grad is None for parameter in given.model.parameters())
    assert not any(module._forward_hooks for module in given.model.modules())
    # And a frozen weight is not trained, others are.
    assert found.weights is not None
    assert torch.equal(found.weights["0.weight"], given.model[0].weight)
    assert not torch.equal(found.weights["3.conv1.weight"], given.model[3].conv1.weight)


@pytest.mark.parametrize("cuts", [None, ()], ids=["stages", "whole"])
def test_it_trains_in_bfloat16_and_with_another_optimizer(cuts):
    schedule = quick_config(2, precision=Precision.BF16_MIXED, optimizer=AdamW(), learning_rate=0.001)
    supervision = InPlace() if cuts is None else SoftLabels()
    found = run(staged(), quick(train=schedule, cuts=cuts, supervision=supervision))
    exact = run(
        staged(), quick(train=replace(schedule, precision=Precision.FLOAT32), cuts=cuts, supervision=supervision)
    )
    assert found.weights is not None
    assert all(tensor.isfinite().all() for tensor in found.weights.values())
    (half, single) = (notes["training"][0] for notes in (found.notes, exact.notes))  # type: ignore[index]
    assert half["full"] != single["full"]
    # Eight bits of mantissa.
    np.testing.assert_allclose([half["full"], *half["stages"]], [single["full"], *single["stages"]], rtol=0.1)

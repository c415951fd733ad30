"""`cut`: slice, verify, freeze what cannot be cut right, heal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph._record import shadow_copy
from secateur.graph.graph import ChannelGraph
from secateur.prune.slice import apply_architecture, check_architecture
from secateur.prune.verify import Mismatch, Verification, compare_outputs


@dataclass(frozen=True, eq=False)
class RepairContext:
    """What a repairs step works on.

    Attributes:
        original: The full model; never modified.
        graph: Its channel graph.
        architecture: What was kept.
        images: Calibration batches, normalized, on the model's device.
    """

    original: nn.Module
    graph: ChannelGraph
    architecture: Architecture
    images: tuple[torch.Tensor, ...]

    @property
    def was_cut(self) -> bool:
        """Whether any channel or block was removed."""
        axes = self.graph.by_name
        fewer = any(len(channels) < axes[name].size for name, channels in self.architecture.kept)
        return fewer or bool(self.architecture.removed_blocks)


class Repair(Protocol):
    """A closed-form repair of a freshly cut model."""

    def apply_(self, small: nn.Module, context: RepairContext) -> None:
        """Change the weights or statistics of ``small`` in place."""
        ...


@dataclass(frozen=True)
class RepairResult:
    """One repair and what it did to the logits.

    Attributes:
        repair: Its name and configuration.
        before: Distance from the original's outputs on the calibration images before: see `output_distance`.
        after: The same after.
        kept: False if it made things worse and was undone.
    """

    repair: str
    before: float
    after: float
    kept: bool


@dataclass(frozen=True, eq=False)
class Cut:
    """A cut model and the proof that the cut is right.

    Attributes:
        model: The smaller model, in eval mode.
        graph: The graph it was cut by; axes that could not be cut right are frozen in it, and blocks that could not be
            removed are kept.
        architecture: What was kept; whole on axes that had to be frozen.
        verification: Sliced against masked, before repairs.
        repairs: What each repair did.
    """

    model: nn.Module
    graph: ChannelGraph
    architecture: Architecture
    verification: Verification
    repairs: tuple[RepairResult, ...] = ()


def cut(
    model: nn.Module,
    graph: ChannelGraph,
    architecture: Architecture,
    *,
    calibration: Sequence[torch.Tensor] = (),
    repairs: Sequence[Repair] = (),
) -> Cut:
    """Cut a model to an architecture, prove it, and repair it.

    The cut model must equal the original with the removed channels and the removed branches zeroed. Where it does not,
    a block that cannot be removed by itself is kept, or else the module in which the two first differ is found and its
    channels are frozen, with a reason, and the cut is made again: a wrong model is never returned, at worst a larger
    one. A repair after which the outputs on the calibration images lie further from
    the original's than before is undone: what helps one model (new batch norm statistics, say) hurts another.

    Args:
        model: The traced model; not modified.
        graph: Its channel graph.
        architecture: Channels to keep, and blocks to remove.
        calibration: Batches of normalized images for the repairs.
        repairs: Repairs to apply in order, such as ``Refit()`` and ``RecalibrateBatchNorm()``; each needs calibration.

    Raises:
        SurgeryError: If the architecture does not fit, a repair has no images, or no correct cut is found.
    """
    if repairs and not calibration:
        raise SurgeryError("`repairs` needs `calibration` images; got none. Pass some training images, or repairs=().")
    check_architecture(graph, architecture)
    frozen: tuple[tuple[str, str], ...] = ()
    while True:
        small = apply_architecture(model, graph, architecture).eval()
        result = compare_outputs(model, small, graph, architecture)
        if isinstance(result, Verification):
            break
        reasons = _find_inexact_blocks(model, graph, architecture)
        if reasons:
            graph = graph.with_kept_blocks(reasons)
        else:
            reasons = _find_axes_to_freeze(result, graph, architecture)
            graph = graph.with_frozen(reasons)
        frozen += tuple(sorted(reasons.items()))
        architecture = _drop_frozen(architecture, graph)
    context = RepairContext(model, graph, architecture, tuple(calibration))
    results = _repair_(small, context, repairs)
    return Cut(small, graph, architecture, replace(result, frozen=frozen), results)


def _repair_(small: nn.Module, context: RepairContext, repairs: Sequence[Repair]) -> tuple[RepairResult, ...]:
    if not repairs or not context.was_cut:
        return ()
    distance = OutputDistance(context.original, context.images)
    now = distance.of(small)
    done: list[RepairResult] = []
    for repair in repairs:
        saved = {name: tensor.clone() for name, tensor in small.state_dict().items()}
        repair.apply_(small, context)
        after = distance.of(small)
        kept = after <= now
        done.append(RepairResult(repr(repair), now, after, kept))
        if kept:
            now = after
        else:
            small.load_state_dict(saved)
    return tuple(done)


class OutputDistance:
    """How far the outputs of cut models are from the original's: mean ||z' - z||^2 / mean ||z - mean(z)||^2.

    Dimensionless; 0 is equal, 1 is as good as always giving the mean output. Needs no labels.

    Args:
        original: Runs once, here.
        images: Batches of normalized images, on its device.
    """

    def __init__(self, original: nn.Module, images: Sequence[torch.Tensor]):
        self._images = tuple(images)
        self._wanted = _run_flat(original, self._images)

    def of(self, small: nn.Module) -> float:
        """The distance of one cut model."""
        return _distance(self._wanted, _run_flat(small, self._images))


def output_distance(original: nn.Module, small: nn.Module, images: Sequence[torch.Tensor]) -> float:
    """How far the outputs of one cut model are from the original's; see `OutputDistance`."""
    return OutputDistance(original, images).of(small)


def _run_flat(model: nn.Module, images: Sequence[torch.Tensor]) -> torch.Tensor:
    model = shadow_copy(model)
    with torch.no_grad():
        outputs = [tree_leaves(model(batch)) for batch in images]
    flat = [torch.cat([t.flatten(1) for t in out if t.is_floating_point()], 1) for out in outputs]
    return torch.cat(flat).double()


def _distance(wanted: torch.Tensor, got: torch.Tensor) -> float:
    error = (got - wanted).square().sum(1).mean()
    spread = (wanted - wanted.mean(0)).square().sum(1).mean()
    distance = float(error / spread.clamp_min(1e-30))
    return float("inf") if math.isnan(distance) else distance


def _drop_frozen(architecture: Architecture, graph: ChannelGraph) -> Architecture:
    """The architecture less what the graph says must stay."""
    kept = {n: c for n, c in architecture.kept if graph.by_name[n].frozen_because is None}
    blocks = (n for n in architecture.removed_blocks if graph.blocks_by_name[n].kept_because is None)
    return Architecture.of(kept, blocks)


def _find_inexact_blocks(model: nn.Module, graph: ChannelGraph, architecture: Architecture) -> dict[str, str]:
    """The removed blocks without which the model is not the original with their branches zeroed, and why.

    Looked at without any other cut: all of them together, and if that is wrong one by one. If each is right alone, the
    last one by name has to stay.
    """
    blocks = architecture.removed_blocks
    if not blocks or isinstance(_verify_without_blocks(model, graph, blocks), Verification):
        return {}
    alone = {name: _verify_without_blocks(model, graph, (name,)) for name in blocks} if len(blocks) > 1 else {}
    wrong = {name: found for name, found in alone.items() if isinstance(found, Mismatch)}
    if not wrong:
        return {max(blocks): "removing it was not exact: the model without it is not the original with zeros added"}
    return {name: f"removing it was not exact: {found.what}" for name, found in wrong.items()}


def _verify_without_blocks(model: nn.Module, graph: ChannelGraph, blocks: tuple[str, ...]) -> Verification | Mismatch:
    only = Architecture.of({}, blocks)
    return compare_outputs(model, apply_architecture(model, graph, only).eval(), graph, only)


def _find_axes_to_freeze(mismatch: Mismatch, graph: ChannelGraph, architecture: Architecture) -> dict[str, str]:
    """The cut axes to freeze: those the guilty module touches, else those of the module around it, and so on."""
    cut_axes = {n for n, channels in architecture.kept if len(channels) < graph.by_name[n].size}
    module = mismatch.module
    while True:
        inside = {m for m in graph.touching if m == module or m.startswith(module + ".") or not module}
        guilty = cut_axes & {name for m in inside for name in graph.touching[m]}
        if guilty:
            reason = f"cutting {module or 'the model'} was not exact: {mismatch.what}"
            # A branch that stays whole keeps its stream whole.
            streams = {graph.by_name[name].into for name in guilty} - {None}
            return dict.fromkeys(sorted(guilty.union(map(str, streams))), reason)
        if not module:
            raise SurgeryError(f"the model could not be cut correctly: {mismatch.what}. Please report this model.")
        module = module.rpartition(".")[0]

"""`cut` slices a model to an architecture, verifies the result, and repairs its weights without training."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import nn

from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph.graph import ChannelGraph
from secateur.graph.trace import Example
from secateur.prune.calibration import CalibrationSplit, check_batches, split_calibration
from secateur.prune.distance import OutputDistance
from secateur.prune.slice import apply_architecture, check_architecture
from secateur.prune.verify import Mismatch, Verification, compare_outputs


@dataclass(frozen=True, eq=False)
class RepairContext:
    """The inputs of a repair.

    Attributes:
        original: The full model; never modified.
        graph: Its channel graph.
        architecture: The architecture of the cut model.
        images: Calibration batches to fit to, normalized, on the model's device, in any form that `secateur.trace`
            takes as an example. Those that judge the repair are not among them.
    """

    original: nn.Module
    graph: ChannelGraph
    architecture: Architecture
    images: tuple[Example, ...]

    @property
    def was_cut(self) -> bool:
        """Return whether any channel or block was removed."""
        axes = self.graph.by_name
        fewer = any(len(channels) < axes[name].size for name, channels in self.architecture.kept)
        return fewer or bool(self.architecture.removed_blocks)


class Repair(Protocol):
    """A repair of a cut model in closed form, without training."""

    def apply_(self, small: nn.Module, context: RepairContext) -> Mapping[str, str] | None:
        """Change the weights or statistics of ``small`` in place.

        Returns:
            The layers that were to be repaired and could not be, with the reason; they are left as they were. None if
            there are none.
        """
        ...


@dataclass(frozen=True)
class RepairResult:
    """One repair and its effect on the outputs.

    Attributes:
        repair: The name and configuration of the repair.
        before: The distance to the original's outputs before, on held-out calibration images (see `OutputDistance`).
        after: The distance after the repair, on the same images.
        kept: False if the repair increased the distance and was undone.
        held_out: False if there were too few calibration images to hold any out. Then the distances are on the images
            that the repair was fitted to, which makes it look better than it is.
        skipped: (layer, reason) pairs: layers that could not be repaired and were left as they were.
    """

    repair: str
    before: float
    after: float
    kept: bool
    held_out: bool = True
    skipped: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RepairResult":
        """Read what ``dataclasses.asdict`` gives, after it was stored as JSON, which has no tuples."""
        skipped = tuple((str(layer), str(reason)) for layer, reason in data.get("skipped", ()))
        fields: dict[str, Any] = {**data, "skipped": skipped}
        return cls(**fields)


@dataclass(frozen=True, eq=False)
class Cut:
    """A cut model and the evidence that it was cut correctly.

    Attributes:
        model: The smaller model, in eval mode.
        graph: The channel graph, in which axes that could not be cut correctly are frozen, and blocks that could not be
            removed correctly are kept.
        architecture: The architecture of the cut model, with all channels of the axes that had to be frozen.
        verification: The comparison of the sliced with the masked model, before repairs.
        repairs: The effect of each repair.
    """

    model: nn.Module
    graph: ChannelGraph
    architecture: Architecture
    verification: Verification
    repairs: tuple[RepairResult, ...] = ()

    def __repr__(self) -> str:
        before = sum(
            math.prod(extent.at(self.graph.sizes) for extent in self.graph.tensors[name])
            for name in self.graph.parameters
        )
        after = sum(parameter.numel() for parameter in self.model.parameters())
        architecture = repr(self.architecture).splitlines()[0]
        lines = [f"  {architecture}", f"  {self.verification!r}", *(f"  {repair!r}" for repair in self.repairs[:10])]
        return "\n".join((f"Cut({type(self.model).__name__}, {before} -> {after} parameters)", *lines))


def cut(
    model: nn.Module,
    graph: ChannelGraph,
    architecture: Architecture,
    *,
    calibration: Sequence[Example] = (),
    repairs: Sequence[Repair] = (),
    held_out: Sequence[Example] = (),
) -> Cut:
    """Cut a model to an architecture, verify the result, and repair it.

    The cut model must compute the same as the original with the removed channels and branches zeroed. If it does not,
    a block whose removal alone is wrong is kept; otherwise the module in which the two first differ is found, and its
    channels are frozen with a reason. Then the model is cut again. So the result is never wrong, at worst larger than
    intended. A repair that increases the distance to the original's outputs on images that it was not fitted to is
    undone, because what helps one model (such as new batch norm statistics) harms another.

    Args:
        model: The traced model; not modified.
        graph: Its channel graph.
        architecture: The channels to keep, and the blocks to remove.
        calibration: Batches of normalized images for the repairs, each in any form that `secateur.trace` takes as an
            example: a tensor, a tuple of positional inputs, a mapping of inputs by name. A quarter of the images is
            held out to judge the repairs by (see `secateur.prune.split_calibration`), unless ``held_out`` is given.
        repairs: The repairs to apply in order, such as ``Refit()`` and ``RecalibrateBatchNorm()``.
        held_out: Batches to judge the repairs by. Then all of ``calibration`` is fitted to.

    Raises:
        SurgeryError: If the architecture does not fit, a repair has no images, or no correct cut is found.
    """
    if repairs and not calibration:
        raise SurgeryError("`repairs` needs `calibration` images; got none. Pass some training images, or repairs=().")
    if repairs:
        check_batches(model, calibration, "calibration")
        check_batches(model, held_out, "held_out")
    check_architecture(graph, architecture)
    frozen: tuple[tuple[str, str], ...] = ()
    while True:
        small = apply_architecture(model, graph, architecture).eval()
        result = compare_outputs(model, small, graph, architecture)
        if isinstance(result, Verification):
            break
        # Blocks first: a wrong block makes every channel after it look wrong.
        reasons = _find_inexact_blocks(model, graph, architecture)
        if reasons:
            graph = graph.with_kept_blocks(reasons)
        else:
            reasons = _find_axes_to_freeze(result, graph, architecture)
            graph = graph.with_frozen(reasons)
        frozen += tuple(sorted(reasons.items()))
        architecture = _drop_frozen(architecture, graph)
    split = CalibrationSplit(tuple(calibration), tuple(held_out)) if held_out else split_calibration(calibration)
    context = RepairContext(model, graph, architecture, split.fit)
    results = _repair_(small, context, repairs, split)
    return Cut(small, graph, architecture, replace(result, frozen=frozen), results)


def _repair_(
    small: nn.Module, context: RepairContext, repairs: Sequence[Repair], split: CalibrationSplit[Example]
) -> tuple[RepairResult, ...]:
    if not repairs or not context.was_cut:
        return ()
    distance = OutputDistance(context.original, split.held_out)
    now = distance.of(small)
    done: list[RepairResult] = []
    for repair in repairs:
        # A repair may change any weight or statistic, so all are saved.
        saved = {name: tensor.clone() for name, tensor in small.state_dict().items()}
        skipped = repair.apply_(small, context) or {}
        after = distance.of(small)
        kept = after <= now and math.isfinite(after)
        done.append(RepairResult(repr(repair), now, after, kept, not split.is_shared, tuple(skipped.items())))
        if kept:
            now = after
        else:
            small.load_state_dict(saved)
    return tuple(done)


def _drop_frozen(architecture: Architecture, graph: ChannelGraph) -> Architecture:
    """Return the architecture with all channels of frozen axes and all blocks that must be kept."""
    kept = {n: c for n, c in architecture.kept if graph.by_name[n].frozen_because is None}
    blocks = (n for n in architecture.removed_blocks if graph.blocks_by_name[n].kept_because is None)
    return Architecture.of(kept, blocks)


def _find_inexact_blocks(model: nn.Module, graph: ChannelGraph, architecture: Architecture) -> dict[str, str]:
    """Return the blocks whose removal is not exact, and why.

    They are removed without any other cut: first all together, and if that is wrong, one by one. If each alone is
    exact, the last one by name is returned.
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
    """Return the axes to freeze: the cut axes of the module that differs, else of the module around it, and so on."""
    cut_axes = {n for n, channels in architecture.kept if len(channels) < graph.by_name[n].size}
    module = mismatch.module
    while True:
        inside = {m for m in graph.module_axes if m == module or m.startswith(module + ".") or not module}
        guilty = cut_axes & {name for m in inside for name in graph.module_axes[m]}
        if guilty:
            reason = f"cutting {module or 'the model'} was not exact: {mismatch.what}"
            # A frozen branch needs all channels of the residual axis that it is added to.
            streams = {graph.by_name[name].residual_axis for name in guilty} - {None}
            return dict.fromkeys(sorted(guilty.union(map(str, streams))), reason)
        if not module:
            raise SurgeryError(f"the model could not be cut correctly: {mismatch.what}. Please report this model.")
        module = module.rpartition(".")[0]

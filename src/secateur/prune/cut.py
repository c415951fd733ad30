"""`cut` slices a model to an architecture, verifies the result, and repairs its weights without training."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur._caller_state import in_default_state
from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph.graph import ChannelGraph
from secateur.graph.trace import Example
from secateur.prune.calibration import CalibrationSplit, check_batches, split_calibration
from secateur.prune.culprits import cut_exactly
from secateur.prune.described_widths import DescribedWidths
from secateur.prune.distance import OutputDistance
from secateur.prune.optimizer_state import AnyOptimizer, slice_optimizer_state
from secateur.prune.slice import check_architecture
from secateur.prune.verify import Verification


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
        original: The model that was cut: the caller's own, not a copy.
        described: What became of numbers that describe widths and that the forward pass does not read, such as
            ``num_features``: which ones follow the cut, and which are stale.
    """

    model: nn.Module
    graph: ChannelGraph
    architecture: Architecture
    verification: Verification
    repairs: tuple[RepairResult, ...] = ()
    original: nn.Module | None = None
    described: DescribedWidths = field(default_factory=DescribedWidths)

    def slice_optimizer(self, optimizer: AnyOptimizer) -> AnyOptimizer:
        """Return an optimizer of the cut model that goes on where an optimizer of the original was.

        Momentum and other state is a bit-equal slice, so that training can be continued right after the cut. A
        scheduler goes on with ``scheduler.optimizer = sliced``.

        Args:
            optimizer: Any optimizer of the original's parameters, such as SGD, Adam or AdamW; not changed.

        Raises:
            SurgeryError: If it holds none of the original's parameters, or state that cannot be sliced.
        """
        if self.original is None:
            raise SurgeryError("`original` must be the model that was cut; got None. Use what `secateur.cut` returned.")
        return slice_optimizer_state(optimizer, self.original, self.model, self.graph, self.architecture)

    def __repr__(self) -> str:
        before = sum(
            math.prod(extent.at(self.graph.sizes) for extent in self.graph.tensors[name])
            for name in self.graph.parameters
        )
        after = sum(parameter.numel() for parameter in self.model.parameters())
        architecture = repr(self.architecture).splitlines()[0]
        lines = [f"  {architecture}", f"  {self.verification!r}", *(f"  {repair!r}" for repair in self.repairs[:10])]
        return "\n".join((f"Cut({type(self.model).__name__}, {before} -> {after} parameters)", *lines))


@in_default_state
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
    the blocks and axes that make it wrong are found by halving, and stay whole (see `cut_exactly`). So the result is
    never wrong, at worst larger than intended, and then a warning says so. A repair that increases the distance to the
    original's outputs on images that it was not fitted to is undone, because what helps one model (such as new batch
    norm statistics) harms another.

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
    # Before the repairs, which change weights: after them, the outputs need not be those of the masked original.
    exact = cut_exactly(model, graph, architecture)
    if exact.verification.frozen:
        warnings.warn(
            _describe_frozen(exact.verification.frozen), stacklevel=3
        )  # The caller of the decorated function.
    split = CalibrationSplit(tuple(calibration), tuple(held_out)) if held_out else split_calibration(calibration)
    context = RepairContext(model, exact.graph, exact.architecture, split.fit)
    results = _repair_(exact.model, context, repairs, split)
    return Cut(exact.model, exact.graph, exact.architecture, exact.verification, results, model, exact.described)


def _describe_frozen(frozen: Sequence[tuple[str, str]]) -> str:
    names = ", ".join(name for name, _ in frozen[:5]) + (", ..." if len(frozen) > 5 else "")
    reasons = next(reason for _, reason in frozen)
    return (
        f"The cut model is larger than the architecture: {names} must stay whole ({reasons}). If the architecture was "
        "searched for a budget, search again on the graph of the result."
    )


def _repair_(
    small: nn.Module, context: RepairContext, repairs: Sequence[Repair], split: CalibrationSplit[Example]
) -> tuple[RepairResult, ...]:
    if not repairs or not context.was_cut:
        return ()
    distance = OutputDistance(context.original, split.held_out)
    now = distance.of(small)
    done: list[RepairResult] = []
    for repair in repairs:
        # A repair may change any weight or statistic, so all are saved, also those that a state_dict leaves out.
        saved = {name: tensor.detach().clone() for name, tensor in _tensors(small).items()}
        skipped = repair.apply_(small, context) or {}
        after = distance.of(small)
        kept = after <= now and math.isfinite(after)
        done.append(RepairResult(repr(repair), now, after, kept, not split.is_shared, tuple(skipped.items())))
        if kept:
            now = after
        else:
            with torch.no_grad():
                for name, tensor in _tensors(small).items():
                    tensor.copy_(saved[name])
    return tuple(done)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}

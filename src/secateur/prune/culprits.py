"""Cuts that are exact: the axes and blocks that would make a cut wrong are found by halving, and stay whole."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph.graph import ChannelGraph
from secateur.graph.trace import check_repeatable
from secateur.prune.described_widths import DescribedWidths, update_described_widths_
from secateur.prune.slice import apply_architecture
from secateur.prune.verify import Mismatch, Verification, compare_outputs


@dataclass(frozen=True, eq=False)
class ExactCut:
    """A cut model that computes what the original does, with everything whole that would make it wrong.

    Attributes:
        model: The smaller model, in eval mode.
        graph: The channel graph, in which what must stay whole is frozen.
        architecture: What was cut.
        verification: The comparison with the original.
        described: What became of numbers that describe widths and that the forward pass does not read.
    """

    model: nn.Module
    graph: ChannelGraph
    architecture: Architecture
    verification: Verification
    described: DescribedWidths


def cut_exactly(model: nn.Module, graph: ChannelGraph, architecture: Architecture) -> ExactCut:
    """Cut a model to an architecture, without the axes and blocks that would make the result wrong.

    Args:
        model: The traced model; not modified.
        graph: Its channel graph.
        architecture: The channels to keep, and the blocks to remove.

    Raises:
        SurgeryError: If the architecture does not fit, or no correct cut is found.
        TraceError: If the model returns something else on every run, so that nothing can be compared.
    """
    frozen: tuple[tuple[str, str], ...] = ()
    # Ends, because every round freezes something that was cut, or raises.
    while True:
        small, described, result = _cut_and_compared(model, graph, architecture)
        if isinstance(result, Verification):
            return ExactCut(small, graph, architecture, replace(result, frozen=frozen), described)
        # A model that never returns the same twice would lose all of its cuts, one after the other.
        check_repeatable(model, graph.example)
        culprits = find_culprits(model, graph, architecture, result)
        graph = graph.with_kept_blocks(culprits.blocks).with_frozen(culprits.axes)
        frozen += (*sorted(culprits.blocks.items()), *sorted(culprits.axes.items()))
        architecture = _drop_frozen(architecture, graph)


def _cut_and_compared(
    model: nn.Module, graph: ChannelGraph, architecture: Architecture
) -> tuple[nn.Module, DescribedWidths, Verification | Mismatch]:
    """Cut once, and compare what was cut; without numbers that describe widths if they make the difference."""
    small = apply_architecture(model, graph, architecture).eval()
    described = update_described_widths_(model, small, graph)
    result = compare_outputs(model, small, graph, architecture)
    if isinstance(result, Mismatch) and described.followed:
        small, described = apply_architecture(model, graph, architecture).eval(), described.undone()
        result = compare_outputs(model, small, graph, architecture)
    return small, described, result


def _drop_frozen(architecture: Architecture, graph: ChannelGraph) -> Architecture:
    """Return the architecture with all channels of frozen axes and all blocks that must be kept."""
    kept = {n: c for n, c in architecture.kept if graph.by_name[n].frozen_because is None}
    blocks = (n for n in architecture.removed_blocks if graph.blocks_by_name[n].kept_because is None)
    return Architecture.of(kept, blocks)


@dataclass(frozen=True)
class Culprits:
    """What must stay whole, by name, with the reason.

    Attributes:
        axes: Axes of which no channel may be removed.
        blocks: Blocks that may not be removed.
    """

    axes: dict[str, str] = field(default_factory=dict[str, str])
    blocks: dict[str, str] = field(default_factory=dict[str, str])


def find_culprits(model: nn.Module, graph: ChannelGraph, architecture: Architecture, mismatch: Mismatch) -> Culprits:
    """Return the axes or blocks without which a wrong cut is right.

    Blocks come first, because a wrong block makes every channel after it look wrong: they are removed without any
    other cut. Then the axes are cut one after the other, those last that the module with the first difference uses, and
    halving finds the axis with which the cut becomes wrong. This axis stays whole, and so on with the rest. One culprit
    of n axes takes about log2(n) comparisons, two or three if it is in the module with the first difference. Of axes
    that are wrong only together, the last one stays whole.

    Args:
        model: The traced model.
        graph: Its channel graph.
        architecture: The cut that is wrong.
        mismatch: The difference that was found.

    Raises:
        SurgeryError: If the cut is wrong whatever stays whole.
    """
    search = _Search(model, graph, architecture.removed_blocks)
    blocks = search.wrong_blocks(architecture.removed_blocks)
    if blocks:
        return Culprits(blocks=blocks)
    kept = {n: channels for n, channels in architecture.kept if len(channels) < graph.by_name[n].size}
    suspects = _suspects(mismatch, graph, set(kept))
    # A residual axis may only be cut where its branches are, so it comes after them.
    streams = {axis.residual_axis for axis in graph.axes}
    order = sorted(kept, key=lambda name: (name in suspects, name in streams))
    return Culprits(axes=search.wrong_axes(kept, order, len(order) - len(suspects), mismatch))


def _suspects(mismatch: Mismatch, graph: ChannelGraph, cut_axes: set[str]) -> set[str]:
    """Return the cut axes of the module that differs, else of the module around it, and so on; and their streams."""
    module = mismatch.module
    while True:
        inside = {m for m in graph.module_axes if m == module or m.startswith(module + ".") or not module}
        suspects = cut_axes & {name for m in inside for name in graph.module_axes[m]}
        if suspects or not module:
            streams = {str(graph.by_name[name].residual_axis) for name in suspects}
            return suspects | (streams & cut_axes)
        module = module.rpartition(".")[0]


class _Search:
    """Comparisons of parts of one cut."""

    def __init__(self, model: nn.Module, graph: ChannelGraph, blocks: tuple[str, ...]) -> None:
        self._model, self._graph, self._blocks = model, graph, blocks

    def _compare(self, architecture: Architecture) -> Verification | Mismatch:
        small = apply_architecture(self._model, self._graph, architecture).eval()
        return compare_outputs(self._model, small, self._graph, architecture)

    def wrong_blocks(self, blocks: Sequence[str]) -> dict[str, str]:
        """Return the blocks whose removal is not exact, and why; of blocks wrong only together, the last by name."""
        found: dict[str, str] = {}

        def compare(names: Sequence[str]) -> str | None:
            result = self._compare(Architecture.of({}, names)) if names else None
            return result.what if isinstance(result, Mismatch) else None

        order = sorted(blocks)
        what = compare(order)
        first = 0
        while what is not None:
            number, why = _first_wrong(order, first, compare, what, None)
            found[order[number]] = f"removing it was not exact: {why}"
            # What comes before the culprit was right, so the next search need not look there.
            first = number
            del order[number]
            what = compare(order)
        return found

    def wrong_axes(
        self, kept: dict[str, tuple[int, ...]], order: Sequence[str], innocent: int, mismatch: Mismatch
    ) -> dict[str, str]:
        """Return the axes that must stay whole, and why.

        Args:
            kept: The kept channels of every axis that is cut.
            order: These axes in the order in which they are cut, branches before their residual axes.
            innocent: How many of them, at the beginning, are not suspected.
            mismatch: The difference if all are cut.
        """
        found: dict[str, str] = {}

        def compare(names: Sequence[str]) -> str | None:
            result = self._compare(Architecture.of({name: kept[name] for name in names}, self._blocks))
            return result.what if isinstance(result, Mismatch) else None

        order, first = list(order), 0
        what: str | None = mismatch.what
        while what is not None:
            if not order:
                raise SurgeryError(f"the model could not be cut correctly: {what}. Please report this model.")
            number, why = _first_wrong(order, first, compare, what, innocent)
            name = order[number]
            # A branch that stays whole needs all channels of the residual axis that it is added to.
            stream = self._graph.by_name[name].residual_axis
            for axis in (name, *([] if stream is None else [stream])):
                found[axis] = f"cutting {axis} was not exact: {why}"
                if axis in order:
                    innocent -= order.index(axis) < innocent
                    order.remove(axis)
            first = min(number, len(order))
            what = compare(order)
        return found


def _first_wrong(
    order: Sequence[str],
    right: int,
    compare: Callable[[Sequence[str]], str | None],
    what: str,
    guess: int | None,
) -> tuple[int, str]:
    """Return the number of the first item with which the items up to it are wrong, and the description.

    Args:
        order: The items; all together are wrong.
        right: So many at the beginning are known to be right together.
        compare: Describes the difference of some items; None if they are right.
        what: The description for all items.
        guess: How many to try first.
    """
    wrong = len(order)
    # At any moment the first `right` items are right together, and the first `wrong` ones are not.
    while wrong - right > 1:
        middle = guess if guess is not None and right < guess < wrong else (right + wrong) // 2
        found = compare(order[:middle])
        if found is None:
            right = middle
        else:
            wrong, what = middle, found
    return wrong - 1, what

"""Stages of a traced model: parts in sequence that pass on a single tensor, so that each can be searched separately.

The output of a module can end a stage if it is the *single live tensor* at that point: everything that the model
returns depends on the input through this tensor alone.
"""

import difflib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from secateur.errors import SelectionError
from secateur.graph._record import record_execution
from secateur.graph.blocks import CONSTANT, DataFlow, ModuleCall
from secateur.graph.graph import Block, ChannelAxis, ChannelDim, ChannelGraph


@dataclass(frozen=True)
class CutPoint:
    """The output of a module at which a stage can end, because it is the single live tensor.

    Attributes:
        module: The qualified name of the module.
        value: The step that computed the output.
        size: The number of elements at batch 1.
        resolution: The shape without the batch and the channels.
    """

    module: str
    value: int
    size: int
    resolution: tuple[int, ...]


class StageExecution:
    """One forward pass, with the steps at which operations, tensors and outputs occur.

    Args:
        model: The traced model; not modified. It runs once on the example.
        graph: Its channel graph.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph):
        run = record_execution(model, graph.example)
        self.graph = graph
        self.flow = run.flow
        self.times: Mapping[str, int] = Counter(call.module for call in run.flow.calls)
        self.steps_of_tensor = _readers(run.flow, run.stored)
        self._reach = _last_reads(run.flow)
        self._last = max((v for v, reach in enumerate(self._reach) if reach > CONSTANT), default=CONSTANT)
        self._jumped = _last_reads_before(self._reach)

    def is_live(self, call: ModuleCall) -> bool:
        """Return whether the output of a call is the single live tensor.

        This is so if no later step that contributes to the model's output reads a value that was computed before. The
        output of the model itself does not count, because nothing follows it.
        """
        value = call.output
        inside = bool(call.module) and call.begin <= value < call.end and call.items is None
        # A module that runs several times would cut at several points.
        if not inside or self.times[call.module] != 1 or self._reach[value] == CONSTANT or value == self._last:
            return False
        # Nor may the output need anything that the module computes after this value, such as a tensor that it stores.
        return self._jumped[value] <= value and not any(r > CONSTANT for r in self._reach[value + 1 : call.end])

    @cached_property
    def outputs(self) -> tuple[CutPoint, ...]:
        """The single live tensors in order of execution, each with the outermost module that returns it."""
        # Several nested modules return the same value; the outermost is the most stable name for it.
        outermost: dict[int, CutPoint] = {}
        for call in self.flow.calls:  # In order of entry: the outermost comes first.
            if call.output not in outermost and self.is_live(call):
                outermost[call.output] = self.output_of(call)
        return tuple(outermost[value] for value in sorted(outermost))

    def output_of(self, call: ModuleCall) -> CutPoint:
        """Return the output of a call as a cut point."""
        shape = tuple(call.output_shape)
        seen = self.graph.activations.get(call.module)
        # Without known channels: images have them in dimension 1, tokens in the last one.
        channels = seen.dim if seen is not None else 1 if len(shape) == 4 else len(shape) - 1
        resolution = tuple(size for dim, size in enumerate(shape) if dim not in (0, channels))
        return CutPoint(call.module, call.output, math.prod(shape[1:]), resolution)

    @cached_property
    def macs(self) -> tuple[tuple[int, int], ...]:
        """The step and the MACs at full width of each operation of the graph."""
        sizes = self.graph.sizes
        times = Counter((operation.module, operation.kind) for operation in self.graph.operations)
        steps: dict[tuple[str, str], list[int]] = {key: [] for key in times}
        for step, (name, call) in enumerate(zip(self.flow.names, self.flow.call, strict=True)):
            key = (self.flow.calls[call].module if call >= 0 else "", name)
            if key in steps:
                steps[key].append(step)
        # If a module makes more calls of a kind than are counted, it is unknown which: take the first one for all.
        rows = {
            key: iter(found if len(found) == times[key] else found[:1] * times[key]) for key, found in steps.items()
        }
        return tuple(
            (
                next(rows[operation.module, operation.kind], 0),
                round(operation.factor * math.prod(extent.at(sizes) for extent in operation.extents)),
            )
            for operation in self.graph.operations
        )

    def axes_at(self, module: str) -> frozenset[str]:
        """Return the names of the axes whose channels a module's output has."""
        seen = self.graph.activations.get(module)
        if seen is None:
            return frozenset()
        channel_dims = (ChannelDim(0, seen.dim, seen.axis, seen.channel), *seen.others)
        return frozenset(self.graph.axes[int(n)].name for one in channel_dims for n in set(one.axis.tolist()) if n >= 0)


def _last_reads(flow: DataFlow) -> list[int]:
    """Return for every value the last step that reads it on a path from the input to the output of the model.

    The number of steps stands for the caller of the model, -1 for a value that is on no such path.
    """
    reach = [
        len(flow.names) if fed and value in flow.returned else CONSTANT for value, fed in enumerate(flow.from_input)
    ]
    # Backward, so that the readers of a value are known before its sources are visited.
    for step in reversed(range(len(reach))):
        if reach[step] == CONSTANT:
            continue
        for source in flow.sources[step]:
            if source != CONSTANT and flow.from_input[source]:
                reach[source] = max(reach[source], step)
    return reach


def _last_reads_before(reach: list[int]) -> list[int]:
    """Return for every value the last step that reads any value before it."""
    furthest, jumped = CONSTANT, list[int]()
    for each in reach:
        jumped.append(furthest)
        furthest = max(furthest, each)
    return jumped


def _readers(flow: DataFlow, stored: list[tuple[str, ...]]) -> dict[str, set[int]]:
    """Return for each parameter and buffer the steps in which it meets values that depend on the input.

    For a weight that is normalized first, these are the steps that use the normalized weight.
    """
    behind: dict[int, set[str]] = {}
    readers: dict[str, set[int]] = {}
    for step, names in enumerate(stored):
        found = {*names}.union(*(behind.get(source, ()) for source in flow.sources[step]))
        # A value computed from weights only passes them on to the steps that use it.
        if not flow.from_input[step]:
            behind[step] = found
            continue
        for name in found:
            readers.setdefault(name, set()).add(step)
    return readers


def drop_widened(outputs: tuple[CutPoint, ...], operations: list[int]) -> Iterator[CutPoint]:
    """Yield the cut points except those after a single layer that only widens: it belongs to the next stage.

    Args:
        outputs: The cut points at one resolution, in order.
        operations: The steps of the counted operations.
    """
    groups: list[list[CutPoint]] = []
    for output in outputs:
        # Outputs with no counted operation between them are at the same depth.
        if groups and _count_between(groups[-1][-1], output, operations) == 0:
            groups[-1].append(output)
        else:
            groups.append([output])
    for number, group in enumerate(groups):
        before = groups[number - 1][-1] if number else None
        # More elements at the same resolution mean more channels.
        widened = before is not None and before.size < group[-1].size
        if not (widened and before is not None and _count_between(before, group[0], operations) == 1):
            yield min(reversed(group), key=lambda output: output.module.count("."))


def _count_between(first: CutPoint, second: CutPoint, operations: list[int]) -> int:
    return sum(first.value < step <= second.value for step in operations)


_SMALL_STAGE = 0.05
"""A stage with less than this fraction of the MACs is merged with a neighbor."""
_LARGE_STAGE = 0.5
"""A stage with more than this fraction of the MACs is divided."""
_PARTS = 4
"""The number of parts into which a stage with all the MACs would be divided."""
_SUGGESTIONS = 3


@dataclass(frozen=True)
class Stage:
    """A part of a model between two cut points.

    Attributes:
        name: ``stage1``, ``stage2`` and so on.
        cut: The module whose output ends it; empty for the last one, which ends with the model's output.
        axes: The prunable axes inside: all tensors with their channels are used in this stage only, and neither its
            input nor its output has any of the channels.
        blocks: The removable blocks inside that do not contain the cut module.
        macs: The multiply-accumulates at full width and batch 1.
    """

    name: str
    cut: str
    axes: tuple[str, ...]
    blocks: tuple[str, ...]
    macs: int


def find_stages(model: nn.Module, graph: ChannelGraph, cuts: Sequence[str] | None = None) -> tuple[Stage, ...]:
    """Divide a model into stages that can be searched one by one.

    A *cut* is a module that is called once and returns the single live tensor. An axis whose channels occur at a cut or
    in two stages is a *boundary* axis: it belongs to no stage and keeps all channels. So the MACs and parameters that
    an architecture saves are the sums of what it saves in the stages.

    By default, there is one cut at each spatial resolution: the last one that does not follow a layer which only
    widens (such a layer belongs to the next stage). Stages in which nothing can be cut, or with less than 5 % of the
    MACs, are merged with the smaller of their neighbors. A stage with more than half of the MACs, as in a transformer,
    is then divided into about equal parts of about a quarter of all MACs. A model without cuts is one stage.

    Args:
        model: The traced model; not modified. It runs once more on the example.
        graph: Its channel graph; `untie` may have been applied.
        cuts: The modules whose outputs end a stage, in order of execution, without that of the last stage.

    Returns:
        The stages in order of execution, at least one. With ``cuts``, also those in which nothing can be cut.

    Raises:
        SelectionError: If a cut names no module, is no single live tensor, or is out of order.
    """
    division = _StageDivider(StageExecution(model, graph))
    if cuts is not None:
        return division.stages(_check_cuts(division.passage, model, cuts))
    return division.stages(division.find_cuts())


class _StageDivider:
    def __init__(self, passage: StageExecution):
        self.passage = passage
        self.graph = passage.graph
        self._readers = passage.steps_of_tensor
        self._spans: dict[str, list[int]] = {}
        for call in passage.flow.calls:
            self._spans.setdefault(call.module, []).extend((call.begin, max(call.begin, call.end - 1)))
        self._steps = [step for step, _ in passage.macs]
        self._total = max(sum(macs for _, macs in passage.macs), 1)

    def find_cuts(self) -> list[CutPoint]:
        """Return the default cuts."""
        cuts = self._merge_small(self._last_by_resolution())
        # Again, because a part of a divided stage may have nothing to cut.
        return self._merge_small(self._split_large(cuts))

    def stages(self, cuts: Sequence[CutPoint]) -> tuple[Stage, ...]:
        """Return the stages between cuts."""
        ends = [cut.value for cut in cuts]
        crossing = frozenset[str]().union(*(self.passage.axes_at(cut.module) for cut in cuts))
        axes = {axis.name: self._stage_of_axis(axis, ends) for axis in self.graph.prunable if axis.name not in crossing}
        # Removing the cut module itself would remove the end of the stage.
        removable = [block for block in self.graph.removable if not any(block.replaces(cut.module) for cut in cuts)]
        blocks = {block.name: self._stage_of_block(block, ends) for block in removable}
        self._check_operations(ends, axes, blocks)
        macs = [0] * (len(cuts) + 1)
        for step, count in self.passage.macs:
            macs[_stage_number(step, ends)] += count
        return tuple(
            Stage(
                f"stage{number + 1}",
                cuts[number].module if number < len(cuts) else "",
                tuple(name for name, stage in axes.items() if stage == number),
                tuple(name for name, stage in blocks.items() if stage == number),
                macs[number],
            )
            for number in range(len(cuts) + 1)
        )

    def _stage_of_axis(self, axis: ChannelAxis, ends: Sequence[int]) -> int | None:
        """Return the stage that uses every tensor of an axis; None if there are several, or a tensor is not used."""
        steps = [self._readers.get(site.tensor, set[int]()) for site in axis.sites]
        stages = {_stage_number(step, ends) for step in set[int]().union(*steps)}
        return stages.pop() if all(steps) and len(stages) == 1 else None

    def _stage_of_block(self, block: Block, ends: Sequence[int]) -> int | None:
        """Return the stage in which all replaced modules of a block run; None if there are several."""
        steps = (step for gone in block.replacements for step in self._spans.get(gone.module, ()))
        stages = {_stage_number(step, ends) for step in steps}
        return stages.pop() if len(stages) == 1 else None

    def _check_operations(
        self, ends: Sequence[int], axes: dict[str, int | None], blocks: dict[str, int | None]
    ) -> None:
        """Remove axes and blocks from their stages if an operation of another stage depends on them."""
        # Otherwise the costs of the stages would not add up, and they could not be searched separately.
        for step, operation in zip(self._steps, self.graph.operations, strict=True):
            here = _stage_number(step, ends)
            for name in {name for extent in operation.extents for name, _ in extent.terms}:
                if axes.get(name, here) != here:
                    axes[name] = None
            for name in operation.blocks:
                if blocks.get(name, here) != here:
                    blocks[name] = None

    def _last_by_resolution(self) -> list[CutPoint]:
        """Return the last cut point at each resolution that does not follow a widening layer."""
        at: dict[tuple[int, ...], list[CutPoint]] = {}
        for output in self.passage.outputs:
            # What global pooling leaves has no resolution; only the head follows it.
            if max(output.resolution, default=1) > 1:
                at.setdefault(output.resolution, []).append(output)
        last = [list(drop_widened(tuple(outputs), self._steps))[-1] for outputs in at.values()]
        return sorted(last, key=lambda output: output.value)

    def _merge_small(self, cuts: list[CutPoint]) -> list[CutPoint]:
        """Merge stages that are small or in which nothing can be cut with a neighbor, the smallest first."""
        cuts = list(cuts)
        while cuts:
            stages = self.stages(cuts)
            poor = [n for n, s in enumerate(stages) if not (s.axes or s.blocks) or s.macs < _SMALL_STAGE * self._total]
            if not poor:
                break
            # The smallest first, because merging it may make its neighbor large enough.
            number = min(poor, key=lambda n: stages[n].macs)
            neighbors = [n for n in (number - 1, number + 1) if 0 <= n < len(stages)]
            other = min(neighbors, key=lambda n: stages[n].macs)
            # Cut n is between the stages n and n + 1.
            del cuts[min(number, other)]
        return cuts

    def _split_large(self, cuts: list[CutPoint]) -> list[CutPoint]:
        """Add cuts in stages with most of the MACs."""
        more = list(cuts)
        borders = [-1, *(cut.value for cut in cuts), len(self.passage.flow.names)]
        for (low, high), stage in zip(itertools.pairwise(borders), self.stages(cuts), strict=True):
            if stage.macs > _LARGE_STAGE * self._total:
                # Only cut points strictly inside the stage can divide it.
                inside = [output for output in self.passage.outputs if low < output.value < high]
                more += self._choose_even_cuts(inside, round(_PARTS * stage.macs / self._total), low, high)
        return sorted(set(more), key=lambda output: output.value)

    def _choose_even_cuts(self, outputs: list[CutPoint], parts: int, low: int, high: int) -> list[CutPoint]:
        """Return the cut points, of outer modules if possible, that divide the MACs between two steps evenly."""
        outputs = list(drop_widened(tuple(outputs), self._steps))
        inside = [(step, macs) for step, macs in self.passage.macs if low < step < high]
        total = max(sum(macs for _, macs in inside), 1)
        before = {output: sum(macs for step, macs in inside if step <= output.value) / total for output in outputs}
        aims = [part / parts for part in range(1, parts)]
        chosen: list[CutPoint] = []
        for depth in sorted({output.module.count(".") for output in outputs}):
            level = [output for output in outputs if output.module.count(".") <= depth]
            chosen = [min(level, key=lambda output: abs(before[output] - aim)) for aim in aims]
            # Deeper modules are needed only if a cut is nearer to the aim of another one.
            if all(abs(before[output] - aim) < 0.5 / parts for output, aim in zip(chosen, aims, strict=True)):
                break
        return chosen


def _stage_number(step: int, ends: Sequence[int]) -> int:
    """Return the number of the stage of a step, given the last steps of all stages but the last."""
    return int(np.searchsorted(ends, step, side="left"))


def _check_cuts(passage: StageExecution, model: nn.Module, cuts: Sequence[str]) -> list[CutPoint]:
    """Return the cut points that a user names."""
    known = [name for name, _ in model.named_modules() if name]
    found: list[CutPoint] = []
    for name in cuts:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=_SUGGESTIONS)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise SelectionError(f"`cuts` must name modules of the model; got {name!r}.{hint}")
        call = next((call for call in passage.flow.calls if call.module == name), None)
        if call is None or not passage.is_live(call):
            begin = call.begin if call is not None else 0
            raise SelectionError(
                f"`cuts` must name modules that run once and return one tensor which alone the model's output depends "
                f"on from there; {name!r} {_explain_refusal(passage, name)}."
                f"{_suggest_neighbors(passage.outputs, begin)}"
            )
        found.append(passage.output_of(call))
    for first, second in itertools.pairwise(found):
        if first.value >= second.value:
            order = sorted(set(found), key=lambda output: output.value)
            raise SelectionError(
                f"`cuts` must be in order of execution, each once; got {second.module!r} after {first.module!r}. "
                f"In order: {', '.join(output.module for output in order)}."
            )
    return found


def _explain_refusal(passage: StageExecution, name: str) -> str:
    times = passage.times.get(name, 0)
    if times != 1:
        return f"runs {times} times"
    call = next(call for call in passage.flow.calls if call.module == name)
    return "does not return one tensor" if call.items is not None else "is passed by, or computes nothing"


def _suggest_neighbors(outputs: Iterable[CutPoint], begin: int) -> str:
    before, after = [], []
    for output in outputs:
        (after if output.value >= begin else before).append(output.module)
    near = [*before[-1:], *after[:1]]
    return f" Near it are {' and '.join(near)}." if near else " This model has no such module."

"""Single live tensors: module outputs through which alone everything that a model returns depends on its input.

Stages of a traced model: parts in a row that hand on a single tensor.

Stage(name, cut, axes, blocks, macs)
stages_of(model, graph, cuts=None) -> tuple[Stage, ...]"""

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
    """The output of a module that is the single live tensor when it is returned.

    Attributes:
        module: Qualified name.
        value: The step that computed it.
        size: Number of elements at batch 1.
        resolution: Its shape without the batch and the channels.
    """

    module: str
    value: int
    size: int
    resolution: tuple[int, ...]


class StageExecution:
    """One forward pass, and where in it everything lies that a stage may hold.

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
        """Whether the output of a call can be replaced, and all that follows depends on nothing else of the input.

        With the steps in order of execution that is so if no step after it reads, for the sake of what the model
        returns, anything that an earlier one has computed. An output that nothing follows ends no stage.
        """
        value = call.given
        inside = bool(call.module) and call.begin <= value < call.end and call.items is None
        if not inside or self.times[call.module] != 1 or self._reach[value] == CONSTANT or value == self._last:
            return False
        return self._jumped[value] <= value and not any(r > CONSTANT for r in self._reach[value + 1 : call.end])

    @cached_property
    def outputs(self) -> tuple[CutPoint, ...]:
        """Of every single live tensor the outermost module that returns it, in order of execution."""
        outermost: dict[int, CutPoint] = {}
        for call in self.flow.calls:  # In order of entry: the outermost comes first.
            if call.given not in outermost and self.is_live(call):
                outermost[call.given] = self.output_of(call)
        return tuple(outermost[value] for value in sorted(outermost))

    def output_of(self, call: ModuleCall) -> CutPoint:
        """What a call returns."""
        shape = tuple(call.given_shape)
        seen = self.graph.activations.get(call.module)
        channels = seen.dim if seen is not None else 1 if len(shape) == 4 else len(shape) - 1
        resolution = tuple(size for dim, size in enumerate(shape) if dim not in (0, channels))
        return CutPoint(call.module, call.given, math.prod(shape[1:]), resolution)

    @cached_property
    def macs(self) -> tuple[tuple[int, int], ...]:
        """For each counted operation of the graph: its step, and its MACs at full width."""
        sizes = self.graph.sizes
        times = Counter((operation.module, operation.kind) for operation in self.graph.operations)
        steps: dict[tuple[str, str], list[int]] = {key: [] for key in times}
        for step, (name, call) in enumerate(zip(self.flow.names, self.flow.call, strict=True)):
            key = (self.flow.calls[call].module if call >= 0 else "", name)
            if key in steps:
                steps[key].append(step)
        # Where a module makes more calls of a kind than are counted, nobody knows which: the first stands for all.
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

    def crossing(self, module: str) -> frozenset[str]:
        """Names of the axes whose channels a module's output has."""
        seen = self.graph.activations.get(module)
        if seen is None:
            return frozenset()
        lanes = (ChannelDim(0, seen.dim, seen.axis, seen.channel), *seen.others)
        return frozenset(self.graph.axes[int(n)].name for lane in lanes for n in set(lane.axis.tolist()) if n >= 0)


def _last_reads(flow: DataFlow) -> list[int]:
    """For every value, the last step that reads it on a way from the input to what leaves the model.

    The number of steps stands for the caller, -1 for a value that lies on no such way.
    """
    reach = [len(flow.names) if fed and value in flow.given else CONSTANT for value, fed in enumerate(flow.fed)]
    for step in reversed(range(len(reach))):
        if reach[step] == CONSTANT:
            continue
        for source in flow.sources[step]:
            if source != CONSTANT and flow.fed[source]:
                reach[source] = max(reach[source], step)
    return reach


def _last_reads_before(reach: list[int]) -> list[int]:
    """For every value, the last step that reads any of the values before it."""
    furthest, jumped = CONSTANT, list[int]()
    for each in reach:
        jumped.append(furthest)
        furthest = max(furthest, each)
    return jumped


def _readers(flow: DataFlow, stored: list[tuple[str, ...]]) -> dict[str, set[int]]:
    """For each parameter and buffer the steps on whose results the input tells too, and which it enters.

    It may be computed with before (a weight that is normalized): what counts is where the result is used.
    """
    behind: dict[int, set[str]] = {}
    readers: dict[str, set[int]] = {}
    for step, names in enumerate(stored):
        found = {*names}.union(*(behind.get(source, ()) for source in flow.sources[step]))
        if not flow.fed[step]:
            behind[step] = found
            continue
        for name in found:
            readers.setdefault(name, set()).add(step)
    return readers


def drop_widened(outputs: tuple[CutPoint, ...], operations: list[int]) -> Iterator[CutPoint]:
    """The outputs without those that a single layer has only widened: it belongs to what follows.

    Args:
        outputs: Of one resolution, in order.
        operations: Steps of the counted operations.
    """
    groups: list[list[CutPoint]] = []
    for output in outputs:
        if groups and _count_between(groups[-1][-1], output, operations) == 0:
            groups[-1].append(output)
        else:
            groups.append([output])
    for number, group in enumerate(groups):
        before = groups[number - 1][-1] if number else None
        widened = before is not None and before.size < group[-1].size
        if not (widened and before is not None and _count_between(before, group[0], operations) == 1):
            yield min(reversed(group), key=lambda output: output.module.count("."))


def _count_between(first: CutPoint, second: CutPoint, operations: list[int]) -> int:
    return sum(first.value < step <= second.value for step in operations)


_SMALL_STAGE = 0.05
"""Of the MACs: a stage with less is merged with a neighbor."""
_LARGE_STAGE = 0.5
"""Of the MACs: a stage with more is divided."""
_PARTS = 4
"""Into how many stages a whole model would be divided."""
_SUGGESTIONS = 3


@dataclass(frozen=True)
class Stage:
    """A part of a model between two single live tensors.

    Attributes:
        name: ``stage1``, ``stage2`` and so on.
        cut: The module whose output ends it; empty for the last one, which ends with the model's output.
        axes: Prunable axes that live wholly inside: every tensor with their channels is used in this stage only, and
            the tensors that it takes and gives have none of them.
        blocks: Removable blocks wholly inside that leave the cut module where it is.
        macs: Multiply-accumulates at full width, batch 1.
    """

    name: str
    cut: str
    axes: tuple[str, ...]
    blocks: tuple[str, ...]
    macs: int


def find_stages(model: nn.Module, graph: ChannelGraph, cuts: Sequence[str] | None = None) -> tuple[Stage, ...]:
    """Divide a model into stages that can be searched one by one.

    A *cut* is a module that is called once and returns one tensor through which alone all that the model returns
    depends on its input. What lies wholly between two cuts is a stage's own; an axis whose channels are seen at a cut,
    or in two stages, is a *boundary* axis: it belongs to no stage and stays whole. So the MACs and params that an
    architecture with whole boundary axes saves are the sum of what it saves in each stage.

    Where no cuts are given, they are found: at each spatial resolution the last one, by its outermost module, that a
    single layer has not just widened (such a layer belongs to what follows). Stages without a choice, or with less than
    5 % of the MACs, are merged with the smaller of their neighbors. A stage with more than half of the MACs, a
    transformer for example, is then divided into about equal parts of about a quarter of the MACs. A model without a
    single live tensor is one stage.

    Args:
        model: The traced model; not modified. It runs once more on the example.
        graph: Its channel graph, tied or not (see `untie`).
        cuts: Names of the modules whose outputs end a stage, in order of execution, without the last stage's.

    Returns:
        The stages in order of execution, at least one. Of given cuts, those too that offer nothing to choose.

    Raises:
        SelectionError: If a cut names no module, is no single live tensor, or is out of order.
    """
    division = _StageDivider(StageExecution(model, graph))
    if cuts is not None:
        return division.stages(_check_cuts(division.passage, model, cuts))
    return division.stages(division.found())


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

    def found(self) -> list[CutPoint]:
        """The cuts by rule."""
        cuts = self._merged(self._by_resolution())
        return self._merged(self._divided(cuts))

    def stages(self, cuts: Sequence[CutPoint]) -> tuple[Stage, ...]:
        """What lies between cuts."""
        ends = [cut.value for cut in cuts]
        crossing = frozenset[str]().union(*(self.passage.crossing(cut.module) for cut in cuts))
        axes = {axis.name: self._stage_of_axis(axis, ends) for axis in self.graph.prunable if axis.name not in crossing}
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
        """The stage in which every tensor of an axis is used; None if there is no such, or one is not used at all."""
        steps = [self._readers.get(site.tensor, set[int]()) for site in axis.sites]
        stages = {_stage_number(step, ends) for step in set[int]().union(*steps)}
        return stages.pop() if all(steps) and len(stages) == 1 else None

    def _stage_of_block(self, block: Block, ends: Sequence[int]) -> int | None:
        """The stage in which what goes with a block runs; what stays may be shared, and has no effect without it."""
        steps = (step for gone in block.replacements for step in self._spans.get(gone.module, ()))
        stages = {_stage_number(step, ends) for step in steps}
        return stages.pop() if len(stages) == 1 else None

    def _check_operations(
        self, ends: Sequence[int], axes: dict[str, int | None], blocks: dict[str, int | None]
    ) -> None:
        """Take away from their stages what an operation counts in another one: channels of weights used elsewhere."""
        for step, operation in zip(self._steps, self.graph.operations, strict=True):
            here = _stage_number(step, ends)
            for name in {name for extent in operation.extents for name, _ in extent.terms}:
                if axes.get(name, here) != here:
                    axes[name] = None
            for name in operation.blocks:
                if blocks.get(name, here) != here:
                    blocks[name] = None

    def _by_resolution(self) -> list[CutPoint]:
        """At each resolution the last output that is not just widened."""
        at: dict[tuple[int, ...], list[CutPoint]] = {}
        for output in self.passage.outputs:
            if max(output.resolution, default=1) > 1:
                at.setdefault(output.resolution, []).append(output)
        last = [list(drop_widened(tuple(outputs), self._steps))[-1] for outputs in at.values()]
        return sorted(last, key=lambda output: output.value)

    def _merged(self, cuts: list[CutPoint]) -> list[CutPoint]:
        """Without cuts beside stages that are small or offer nothing, the smallest of these first."""
        cuts = list(cuts)
        while cuts:
            stages = self.stages(cuts)
            poor = [n for n, s in enumerate(stages) if not (s.axes or s.blocks) or s.macs < _SMALL_STAGE * self._total]
            if not poor:
                break
            number = min(poor, key=lambda n: stages[n].macs)
            neighbors = [n for n in (number - 1, number + 1) if 0 <= n < len(stages)]
            other = min(neighbors, key=lambda n: stages[n].macs)
            del cuts[min(number, other)]
        return cuts

    def _divided(self, cuts: list[CutPoint]) -> list[CutPoint]:
        """With further cuts in stages that hold most of the model."""
        more = list(cuts)
        borders = [-1, *(cut.value for cut in cuts), len(self.passage.flow.names)]
        for (low, high), stage in zip(itertools.pairwise(borders), self.stages(cuts), strict=True):
            if stage.macs > _LARGE_STAGE * self._total:
                inside = [output for output in self.passage.outputs if low < output.value < high]
                more += self._equal_parts(inside, round(_PARTS * stage.macs / self._total), low, high)
        return sorted(set(more), key=lambda output: output.value)

    def _equal_parts(self, outputs: list[CutPoint], parts: int, low: int, high: int) -> list[CutPoint]:
        """The outputs that divide the MACs between two steps most evenly, of the outermost modules that can do so."""
        outputs = list(drop_widened(tuple(outputs), self._steps))
        inside = [(step, macs) for step, macs in self.passage.macs if low < step < high]
        total = max(sum(macs for _, macs in inside), 1)
        before = {output: sum(macs for step, macs in inside if step <= output.value) / total for output in outputs}
        aims = [part / parts for part in range(1, parts)]
        chosen: list[CutPoint] = []
        for depth in sorted({output.module.count(".") for output in outputs}):
            level = [output for output in outputs if output.module.count(".") <= depth]
            chosen = [min(level, key=lambda output: abs(before[output] - aim)) for aim in aims]
            # Each nearer to its own aim than to those of others.
            if all(abs(before[output] - aim) < 0.5 / parts for output, aim in zip(chosen, aims, strict=True)):
                break
        return chosen


def _stage_number(step: int, ends: Sequence[int]) -> int:
    """The number of the stage that a step runs in, given the values that end all but the last."""
    return int(np.searchsorted(ends, step, side="left"))


def _check_cuts(passage: StageExecution, model: nn.Module, cuts: Sequence[str]) -> list[CutPoint]:
    """The outputs of modules that a user names."""
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
                f"on from there; {name!r} {_explain_refusal(passage, name)}.{_suggest_neighbors(passage.outputs, begin)}"
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

"""Single live tensors: module outputs through which alone everything that a model returns depends on its input."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from secateur.graph._channels import ChannelGraph, Lane
from secateur.graph._flow import CONSTANT, Flow, ModuleCall
from secateur.graph._watch import watch


@dataclass(frozen=True)
class LiveOutput:
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


class Passage:
    """One forward pass, and where in it everything lies that a stage may hold.

    Args:
        model: The traced model; not modified. It runs once on the example.
        graph: Its channel graph.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph):
        run = watch(model, graph.example)
        self.graph = graph
        self.flow = run.flow
        self.times: Mapping[str, int] = Counter(call.module for call in run.flow.calls)
        self.steps_of_tensor = _readers(run.flow, run.stored)
        self._reach = _reach(run.flow)
        self._last = max((v for v, reach in enumerate(self._reach) if reach > CONSTANT), default=CONSTANT)
        self._jumped = _jumped(self._reach)

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
    def outputs(self) -> tuple[LiveOutput, ...]:
        """Of every single live tensor the outermost module that returns it, in order of execution."""
        outermost: dict[int, LiveOutput] = {}
        for call in self.flow.calls:  # In order of entry: the outermost comes first.
            if call.given not in outermost and self.is_live(call):
                outermost[call.given] = self.output_of(call)
        return tuple(outermost[value] for value in sorted(outermost))

    def output_of(self, call: ModuleCall) -> LiveOutput:
        """What a call returns."""
        shape = tuple(call.given_shape)
        seen = self.graph.activations.get(call.module)
        channels = seen.dim if seen is not None else 1 if len(shape) == 4 else len(shape) - 1
        resolution = tuple(size for dim, size in enumerate(shape) if dim not in (0, channels))
        return LiveOutput(call.module, call.given, math.prod(shape[1:]), resolution)

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
        lanes = (Lane(0, seen.dim, seen.axis, seen.channel), *seen.others)
        return frozenset(self.graph.axes[int(n)].name for lane in lanes for n in set(lane.axis.tolist()) if n >= 0)


def _reach(flow: Flow) -> list[int]:
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


def _jumped(reach: list[int]) -> list[int]:
    """For every value, the last step that reads any of the values before it."""
    furthest, jumped = CONSTANT, list[int]()
    for each in reach:
        jumped.append(furthest)
        furthest = max(furthest, each)
    return jumped


def _readers(flow: Flow, stored: list[tuple[str, ...]]) -> dict[str, set[int]]:
    """For each parameter and buffer the steps on whose results the input tells too, and which it enters.

    It may be computed with before (a weight that is normalised): what counts is where the result is used.
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


def behind_widening(outputs: tuple[LiveOutput, ...], operations: list[int]) -> Iterator[LiveOutput]:
    """The outputs without those that a single layer has only widened: it belongs to what follows.

    Args:
        outputs: Of one resolution, in order.
        operations: Steps of the counted operations.
    """
    groups: list[list[LiveOutput]] = []
    for output in outputs:
        if groups and _between(groups[-1][-1], output, operations) == 0:
            groups[-1].append(output)
        else:
            groups.append([output])
    for number, group in enumerate(groups):
        before = groups[number - 1][-1] if number else None
        widened = before is not None and before.size < group[-1].size
        if not (widened and before is not None and _between(before, group[0], operations) == 1):
            yield min(reversed(group), key=lambda output: output.module.count("."))


def _between(first: LiveOutput, second: LiveOutput, operations: list[int]) -> int:
    return sum(first.value < step <= second.value for step in operations)

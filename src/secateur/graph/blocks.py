"""Where every value of a forward pass comes from and goes to: what residual branches are found in.

A *step* is one ATen call, numbered in order of execution; a model input counts as one too. The value a tensor holds is
named by the step that wrote it last, through whichever view that was.

Find the removable residual branches of a traced forward pass, in any model.

A sum x + b is looked at from its end. Its *branch* are the steps that serve b alone: everything they compute is used
by each other or by the sum. It is residual if x itself, unchanged, is among what b is computed from. Then zeros in the
place of b leave x, and the modules that run in the branch can go:

1. If one module takes x and returns the sum (perhaps after a ReLU that changes nothing, because x is the output of
   one), the whole module becomes a pass-through.
2. Else the modules with parameters at the end of the branch become silent, those before them pass-throughs. What the
   model computes without modules in between runs on; it must turn zeros into zeros.

Where neither is sure, the branch is not a block."""

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from secateur.graph.graph import Block, Replacement, StandIn

ADDITION = "add"
INPUT = "input"
CONSTANT = -1
"""Stands for a parameter, a buffer or any other value that no step has written."""
_RUNS = itertools.count()


def _storage_key(tensor: torch.Tensor) -> int:
    """What tensors that share their numbers have in common, as long as one of them lives."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


@cache
def is_pointwise(func: Any) -> bool:
    """Whether an ATen overload is said to work elementwise."""
    return torch.Tag.pointwise in func.tags


@cache
def is_mutable(func: Any) -> bool:
    """Whether an ATen overload writes into an argument."""
    return bool(func._schema.is_mutable)


class ValueOrigin(NamedTuple):
    """Where what a tensor holds comes from.

    Attributes:
        value: The step that wrote it; `CONSTANT` if none did.
        fed: Whether it depends on the model's input.
        hollow: Whether it was not computed, or from something that was not.
    """

    value: int
    fed: bool
    hollow: bool


@dataclass(frozen=True)
class Addition:
    """A sum of two tensors of the same shape that both depend on the model's input.

    No other sums are counted. Whether a linear layer adds its bias by one depends on the batch size.

    Attributes:
        number: How many such sums came before it in the forward pass.
        left: The value of the first operand.
        right: The value of the second operand.
    """

    number: int
    left: int
    right: int


@dataclass(eq=False)
class ModuleCall:
    """One call of a module.

    Attributes:
        module: Qualified name.
        begin: First step that ran in it.
        taken: The value of its first tensor argument.
        taken_shape: Its shape.
        end: The step after the last one that ran in it.
        given: The value of its first output tensor.
        given_shape: Its shape.
        items: Length of the tuple it returns; None if it returns a tensor, 0 if something else than tensors and None.
        others: The values of the other tensors of that tuple.
    """

    module: str
    begin: int
    taken: int = CONSTANT
    taken_shape: tuple[int, ...] = ()
    end: int = -1
    given: int = CONSTANT
    given_shape: tuple[int, ...] = ()
    items: int | None = 0
    others: tuple[int, ...] = ()


@dataclass(eq=False)
class DataFlow:
    """Append-only record of the steps and the module calls of one forward pass.

    Attributes:
        names: ATen name of each step.
        sources: The values each step reads, one for each tensor, `CONSTANT` included.
        fed: Whether the result of each step depends on the model's input.
        hollow: Whether the numbers of each step's result were not computed; see `_unread`.
        pointwise: Whether each step works elementwise.
        call: The innermost module call each step ran in; -1 for none.
        additions: The sums of two tensors, by step.
        calls: Module calls in order of their begin.
        given: The values that leave the record: the model returns them, or python reads their numbers.
    """

    names: list[str] = field(default_factory=list[str])
    sources: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    fed: list[bool] = field(default_factory=list[bool])
    hollow: list[bool] = field(default_factory=list[bool])
    pointwise: list[bool] = field(default_factory=list[bool])
    call: list[int] = field(default_factory=list[int])
    additions: dict[int, Addition] = field(default_factory=dict[int, Addition])
    calls: list[ModuleCall] = field(default_factory=list[ModuleCall])
    given: set[int] = field(default_factory=set[int])
    _open: list[int] = field(default_factory=list[int])
    _writers: dict[int, int] = field(default_factory=dict[int, int])
    _uncomputed: set[int] = field(default_factory=set[int])
    _added: int = 0
    _mark: str = field(default_factory=lambda: f"_secateur_step_{next(_RUNS)}")

    def read(self, tensor: torch.Tensor) -> ValueOrigin:
        """Where what a tensor holds comes from.

        Its memory tells too whether it was computed: ``x.data`` and the like are made by no step.
        """
        value: int = getattr(tensor, self._mark, CONSTANT)
        uncomputed = False
        if (self._writers or self._uncomputed) and tensor.layout == torch.strided:
            memory = _storage_key(tensor)
            value = max(value, self._writers.get(memory, CONSTANT))
            uncomputed = memory in self._uncomputed
        if value < 0:
            return ValueOrigin(value, False, uncomputed)
        return ValueOrigin(value, self.fed[value], uncomputed or self.hollow[value])

    def value_of(self, tensor: torch.Tensor) -> int:
        """The step that wrote what a tensor holds."""
        return self.read(tensor).value

    def is_hollow(self, tensor: torch.Tensor) -> bool:
        """Whether what a tensor holds was not computed, or from something that was not."""
        return self.read(tensor).hollow

    def feed(self, example: Any) -> None:
        """The inputs of the model."""
        for tensor in tree_leaves(example):
            if isinstance(tensor, torch.Tensor):
                self.hollow.append(False)
                self._append(INPUT, (), fed=True, pointwise=False)
                # By its storage: the caller's tensor is not to carry a mark of ours.
                self._writers[_storage_key(tensor)] = len(self.names) - 1

    def addition(self, name: str, inputs: Sequence[torch.Tensor], read: Sequence[ValueOrigin]) -> int | None:
        """The number of a sum of two tensors that is about to run; None if it is none that counts."""
        if name != ADDITION or len(inputs) != 2 or inputs[0].shape != inputs[1].shape:
            return None
        return self._added if all(reading.fed for reading in read) else None

    def step(
        self,
        func: Any,
        name: str,
        plain: bool,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        *,
        read: Sequence[ValueOrigin],
        hollow: bool = False,
    ) -> None:
        """One ATen call that has just run.

        Args:
            func: The ATen overload.
            name: Its base name.
            plain: Whether it was given positional arguments only (no ``alpha``).
            inputs: The tensors it was given.
            outputs: The tensors it returned.
            read: Where what the inputs held came from.
            hollow: Whether it was not run at all, and others stand in for what it would return.
        """
        sources = tuple(reading.value for reading in read)
        number = len(self.names)
        added = self.addition(name, inputs, read)
        if added is not None:
            self._added += 1
            if plain:
                self.additions[number] = Addition(added, sources[0], sources[1])
        self.hollow.append(hollow or any(reading.hollow for reading in read))
        self._append(name, sources, any(reading.fed for reading in read), is_pointwise(func))
        if not outputs:
            self.given.add(number)
        for tensor in outputs:
            setattr(tensor, self._mark, number)
        strided = [_storage_key(tensor) for tensor in outputs if tensor.layout == torch.strided]
        if is_mutable(func):
            self._writers.update(dict.fromkeys(strided, number))
        if self.hollow[number]:
            self._uncomputed.update(strided)
        else:
            self._uncomputed.difference_update(strided)  # Memory that was freed since, and is used again.

    def _append(self, name: str, sources: tuple[int, ...], fed: bool, pointwise: bool) -> None:
        self.names.append(name)
        self.sources.append(sources)
        self.fed.append(fed)
        self.pointwise.append(pointwise)
        self.call.append(self._open[-1] if self._open else -1)

    def enter(self, module: str, args: Any, kwargs: Any) -> None:
        """A module begins to run."""
        call = ModuleCall(module, len(self.names))
        tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
        if tensor is not None:
            with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                call.taken, call.taken_shape = self.value_of(tensor), tensor.shape
        self._open.append(len(self.calls))
        self.calls.append(call)

    def leave(self, out: Any) -> None:
        """The innermost running module has returned."""
        call = self.calls[self._open.pop()]
        call.end = len(self.names)
        first, *rest = out if type(out) is tuple and out else (out,)
        if isinstance(first, torch.Tensor):
            with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                call.given, call.given_shape = self.value_of(first), first.shape
                call.others = tuple(self.value_of(item) for item in rest if isinstance(item, torch.Tensor))
            if all(item is None or isinstance(item, torch.Tensor) for item in rest):
                call.items = len(out) if type(out) is tuple else None

    def finish(self, out: Any) -> None:
        """The model has returned."""
        self.given.update(self.value_of(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        self.given.discard(CONSTANT)


_RESHAPING = frozenset({
    "view", "_unsafe_view", "_reshape_alias", "reshape", "expand", "slice", "split", "split_with_sizes", "chunk",
    "unbind", "select", "squeeze", "unsqueeze", "roll", "flip", "index", "index_select", "im2col",
})  # fmt: skip
_SHAPE_PRESERVING = frozenset({
    "permute", "transpose", "t", "clone", "contiguous", "alias", "detach", "_to_copy", "native_dropout", "dropout",
})  # fmt: skip
ZERO_PRESERVING = _RESHAPING | _SHAPE_PRESERVING | frozenset({
    "relu", "gelu", "silu", "tanh", "hardswish", "leaky_relu", "neg", "div", "mean", "sum", "avg_pool2d",
    "max_pool2d_with_indices", "_adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d",
})  # fmt: skip
"""Steps whose result is zero where their first operand is."""
_NONNEGATIVE = frozenset({"relu", "sigmoid", "hardsigmoid", "_softmax", "abs", "square"})
_KEEPS_SIGN = _RESHAPING | _SHAPE_PRESERVING | frozenset({
    "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "mean", "sum", "add", "mul", "cat", "stack",
    "upsample_nearest2d", "upsample_bilinear2d", "hardtanh",
})  # fmt: skip
"""Steps whose result is not negative where no operand is."""


@dataclass(frozen=True, eq=False)
class _Branch:
    """The steps that serve one operand of a sum alone.

    Attributes:
        addition: The step of the sum.
        shortcut: The value x.
        result: The value b.
        operand: Which operand of the sum b is.
        steps: Every step whose result serves b, or nothing, and no one else.
        serving: Those of them that b is computed from.
    """

    addition: int
    shortcut: int
    result: int
    operand: int
    steps: frozenset[int]
    serving: frozenset[int]


@dataclass(frozen=True, eq=False)
class _FoundBlock:
    """A block that has no place among the others yet.

    Attributes:
        block: The block; its name is that of the module that goes as a whole, else empty.
        call: The innermost module call that the sum runs in.
        entering: The value x that the sum adds to.
        leaving: What the stream goes on with: the value the whole module returns, else the sum.
    """

    block: Block
    call: int
    entering: int
    leaving: int


def find_blocks(flow: DataFlow, model: nn.Module, counted: Collection[str]) -> tuple[Block, ...]:
    """Every removable residual branch that holds multiply-accumulates.

    Args:
        flow: The traced forward pass.
        model: The model that ran, for the tensors of its modules.
        counted: Names of the modules that ran a counted operation, one for each.
    """
    return _BlockFinder(flow, model).blocks(counted)


def enclosing_names(name: str) -> Iterator[str]:
    """A module or tensor and the modules around it, innermost first; the model itself is left out."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def blocks_of_modules(blocks: Iterable[Block]) -> Callable[[str], tuple[str, ...]]:
    """A function that names the blocks with which a module goes."""
    owners: dict[str, list[str]] = {}
    for block in blocks:
        for replacement in block.replacements:
            owners.setdefault(replacement.module, []).append(block.name)

    @cache
    def names(module: str) -> tuple[str, ...]:
        return tuple(name for around in enclosing_names(module) for name in owners.get(around, ()))

    return names


class _BlockFinder:
    def __init__(self, flow: DataFlow, model: nn.Module):
        self.flow = flow
        self.users = _needed_by(flow)
        self.begins = [call.begin for call in flow.calls]
        self.times: dict[str, int] = {}
        for call in flow.calls:
            self.times[call.module] = self.times.get(call.module, 0) + 1
        self.tensors = _TensorOwners(model)
        self.positive = _find_nonnegative(flow)
        self.shortcuts: dict[int, int] = {}

    def blocks(self, counted: Collection[str]) -> tuple[Block, ...]:
        found: list[_FoundBlock] = []
        for step, addition in self.flow.additions.items():
            branch = self._branch(step, addition)
            if branch is None:
                continue
            self.shortcuts[step] = branch.shortcut
            one = self._found(branch, addition)
            if one is not None and 0 < sum(map(one.block.replaces, counted)) < len(counted):
                found.append(one)
        return self._named(found)

    def _branch(self, step: int, addition: Addition) -> _Branch | None:
        pairs = ((addition.left, addition.right, 1), (addition.right, addition.left, 0))
        for shortcut, result, operand in pairs:
            if shortcut < 0 or result <= 0 or not self.flow.fed[shortcut] or self.users[result] != [step]:
                continue
            trunk = self._trunk(step, shortcut)
            if result <= min(trunk):
                continue
            origin = self._ancestors(result, min(trunk))
            if not trunk & origin:
                continue
            steps = self._exclusive(step, result, min(trunk))
            return _Branch(step, shortcut, result, operand, steps, steps & origin)
        return None

    def _trunk(self, step: int, shortcut: int) -> set[int]:
        """The shortcut, and what it is the same as if the branches added to it by the same module call are removed."""
        trunk = {shortcut}
        while shortcut in self.shortcuts and self.flow.call[shortcut] == self.flow.call[step]:
            shortcut = self.shortcuts[shortcut]
            trunk.add(shortcut)
        return trunk

    def _ancestors(self, value: int, first: int) -> set[int]:
        """Every step from ``first`` on that a value is computed from, itself included."""
        seen, waiting = {value}, [value]
        while waiting:
            for source in self.flow.sources[waiting.pop()]:
                if source >= first and source not in seen:
                    seen.add(source)
                    waiting.append(source)
        return seen

    def _exclusive(self, step: int, result: int, after: int) -> frozenset[int]:
        steps: set[int] = set()
        for number in range(step - 1, after, -1):
            if all(user in steps or (user == step and number == result) for user in self.users[number]):
                steps.add(number)
        return frozenset(steps)

    def _found(self, branch: _Branch, addition: Addition) -> _FoundBlock | None:
        inside = self._calls_inside(branch)
        whole = self._whole(branch)
        if whole is not None:
            replacements = (Replacement(whole.module, StandIn.PASS_THROUGH),)
            modules = {call.module for call in inside} | {whole.module}
        else:
            replacements = self._silenced(branch, inside)
            modules = {call.module for call in inside}
        if not replacements or any(self.times[r.module] > 1 for r in replacements):
            return None
        tensors = self.tensors.only_in([r.module for r in replacements])
        if tensors is None:
            return None
        name, leaving = (whole.module, whole.given) if whole is not None else ("", branch.addition)
        block = Block(name, addition.number, branch.operand, replacements, tuple(sorted(modules)), tensors)
        return _FoundBlock(block, self.flow.call[branch.addition], branch.shortcut, leaving)

    def _calls_inside(self, branch: _Branch) -> list[ModuleCall]:
        """Module calls of which every step lies in the branch and some step serves it."""
        first = bisect_right(self.begins, min(branch.steps) - 1)
        found: list[ModuleCall] = []
        for call in self.flow.calls[first:]:
            if call.begin >= branch.addition:
                break
            span = range(call.begin, call.end)
            if any(s in branch.serving for s in span) and all(s in branch.steps for s in span):
                found.append(call)
        return found

    def _whole(self, branch: _Branch) -> ModuleCall | None:
        """The call that takes x and returns x + b, if that is all it does."""
        number = self.flow.call[branch.addition]
        if number < 0:
            return None
        call = self.flow.calls[number]
        if not call.module or call.items is not None or call.taken != branch.shortcut:
            return None
        last = branch.addition
        for step in range(call.begin, call.end):
            if step in branch.steps or step == branch.addition or not self.users[step]:
                continue
            rectified = self.flow.names[step] == "relu" and self.positive[branch.shortcut]
            if not rectified or self.flow.sources[step] != (last,) or self.users[last] != [step]:
                return None
            last = step
        return call if call.given == last else None

    def _silenced(self, branch: _Branch, inside: list[ModuleCall]) -> tuple[Replacement, ...]:
        """Stand-ins for the outermost modules with parameters; empty if the result would not surely be zero."""
        outermost: list[ModuleCall] = []
        for call in inside:
            if call.module in self.tensors.parameters and not (outermost and call.begin < outermost[-1].end):
                outermost.append(call)
        owner = {step: call for call in outermost for step in range(call.begin, call.end)}
        loose = sorted(step for step in branch.serving if step not in owner)
        zero: set[int] = set()
        last: list[ModuleCall] = []
        for step in _walk_back(branch, self.flow, owner):
            call = owner.get(step)
            if call is not None and call not in last:
                last.append(call)
                if step != call.given:
                    return ()
        zero.update(call.given for call in last)
        for step in loose:
            if self._is_zero(step, zero):
                zero.add(step)
        if branch.result not in zero or not self._shapes_fit(loose, outermost):
            return ()
        return tuple(
            Replacement(call.module, StandIn.SILENCE if call in last else StandIn.PASS_THROUGH, call.items)
            for call in outermost
        )

    def _is_zero(self, step: int, zero: Collection[int]) -> bool:
        name, sources = self.flow.names[step], self.flow.sources[step]
        if name == "mul":
            return any(source in zero for source in sources)
        if name in {"cat", "stack"} or step in self.flow.additions:
            return all(source in zero for source in sources)
        return name in ZERO_PRESERVING and sources[:1] != () and sources[0] in zero

    def _gives_one_tensor(self, call: ModuleCall) -> bool:
        """Whether nothing but its first tensor matters of what a module returns."""
        others = (user for value in call.others if value != CONSTANT for user in self.users[value])
        return call.items != 0 and all(user < call.end for user in others)

    def _shapes_fit(self, loose: Iterable[int], calls: Iterable[ModuleCall]) -> bool:
        """Whether what runs between the stand-ins takes the shapes that these pass on."""
        if not all(map(self._gives_one_tensor, calls)):
            return False
        if all(call.taken_shape == call.given_shape for call in calls):
            return True
        fed = (step for step in loose if self.flow.fed[step])
        return all(self.flow.pointwise[step] or self.flow.names[step] in _SHAPE_PRESERVING for step in fed)

    def _named(self, found: list[_FoundBlock]) -> tuple[Block, ...]:
        sums = Counter(one.call for one in found)
        named: list[Block] = []
        taken: Counter[str] = Counter()
        leaving: dict[int, str] = {}
        for one in found:
            name = one.block.name or (self.flow.calls[one.call].module if one.call >= 0 and sums[one.call] == 1 else "")
            if not name:
                name = max(one.block.replacements, key=lambda r: self.tensors.parameters.get(r.module, 0)).module
            taken[name] += 1
            name = name if taken[name] == 1 else f"{name}#{taken[name]}"
            named.append(replace(one.block, name=name, follows=leaving.get(one.entering)))
            leaving[one.leaving] = name
        return tuple(named)


class _TensorOwners:
    """Which tensors lie in which modules.

    Attributes:
        names: Every name of a tensor, by identity.
        inside: The tensors of a module and those in it, by its name; once for each of their names.
        parameters: Number of parameters in a module, by its name; modules without any are left out.
    """

    def __init__(self, model: nn.Module):
        self.names: dict[int, list[str]] = {}
        self.inside: dict[str, list[int]] = {}
        self.parameters: dict[str, int] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            for module in self._hold(name, tensor):
                self.parameters[module] = self.parameters.get(module, 0) + tensor.numel()
        for name, tensor in model.named_buffers(remove_duplicate=False):
            self._hold(name, tensor)

    def _hold(self, name: str, tensor: torch.Tensor) -> list[str]:
        """The modules around a tensor."""
        self.names.setdefault(id(tensor), []).append(name)
        around = list(enclosing_names(name.rpartition(".")[0]))
        for module in around:
            self.inside.setdefault(module, []).append(id(tensor))
        return around

    def only_in(self, modules: Iterable[str]) -> tuple[str, ...] | None:
        """The tensors of some modules by their first names; None if one of them lies elsewhere too."""
        held = Counter(tensor for module in modules for tensor in self.inside.get(module, ()))
        if any(times < len(self.names[tensor]) for tensor, times in held.items()):
            return None
        return tuple(self.names[tensor][0] for tensor in held)


def _needed_by(flow: DataFlow) -> list[list[int]]:
    """For every step, the steps that need its result, the end for the caller. What serves nobody needs nothing."""
    users: list[list[int]] = [[] for _ in flow.names]
    for value in flow.given:
        users[value].append(len(flow.names))
    for step in range(len(flow.names) - 1, -1, -1):
        if users[step]:
            for source in set(flow.sources[step]) - {CONSTANT}:
                users[source].append(step)
    return users


def _find_nonnegative(flow: DataFlow) -> list[bool]:
    known: list[bool] = []
    for step, (name, sources) in enumerate(zip(flow.names, flow.sources, strict=True)):
        # Of a sum or product with a number nothing is known.
        plain = step in flow.additions if name == "add" else len(sources) == 2 if name == "mul" else bool(sources)
        inherits = name in _KEEPS_SIGN and plain
        known.append(name in _NONNEGATIVE or (inherits and all(s >= 0 and known[s] for s in sources)))
    return known


def _walk_back(branch: _Branch, flow: DataFlow, owner: Collection[int]) -> Iterable[int]:
    """Steps of the branch met on the ways back from its result; the ways end at the steps of owned modules."""
    seen, waiting = {branch.result}, [branch.result]
    while waiting:
        step = waiting.pop()
        yield step
        if step in owner:
            continue
        for source in flow.sources[step]:
            if source in branch.serving and source not in seen:
                seen.add(source)
                waiting.append(source)

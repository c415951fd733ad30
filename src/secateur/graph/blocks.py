"""The data flow of a forward pass, and the removable residual blocks that it contains.

A *step* is one ATen call, numbered in order of execution; a model input is a step too. A *value* is named by the step
that wrote it last, through whichever view of the memory.

`find_blocks` looks at every sum x + b from its end. The *branch* of b consists of the steps whose results are used only
by each other or by the sum. The branch is residual if b is computed from x itself. Replacing b by zeros then leaves x,
and the modules in the branch can be removed in one of two ways:

1. If one module takes x and returns the sum (perhaps after a ReLU that changes nothing, because x is the output of a
   ReLU), the whole module is replaced by a pass-through.
2. Otherwise the last modules with parameters in the branch are replaced by modules that return zeros, and those before
   them by pass-throughs. The steps between them still run, so they must map zeros to zeros.

Where neither is certain to be exact, the branch is not a block.
"""

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
"""Stands for a parameter, a buffer or any other value that no step wrote."""
_RUNS = itertools.count()


def _storage_key(tensor: torch.Tensor) -> int:
    """Return a key that all tensors on the same memory share, as long as one of them exists."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


@cache
def is_pointwise(func: Any) -> bool:
    """Return whether ATen tags an overload as elementwise."""
    return torch.Tag.pointwise in func.tags


@cache
def is_mutable(func: Any) -> bool:
    """Return whether an ATen overload writes into an argument."""
    return bool(func._schema.is_mutable)


class ValueOrigin(NamedTuple):
    """The origin of the values of a tensor.

    Attributes:
        value: The step that wrote it; `CONSTANT` if none did.
        from_input: Whether it depends on the model's input.
        fake: Whether it was not really computed, or depends on a value that was not.
    """

    value: int
    from_input: bool
    fake: bool


@dataclass(frozen=True)
class Addition:
    """A sum of two tensors of the same shape that both depend on the model's input.

    No other sums are counted: whether a linear layer adds its bias by a separate sum depends on the batch size.

    Attributes:
        number: The number of such sums before it in the forward pass.
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
        begin: The first step that ran in it.
        input: The value of its first tensor argument.
        input_shape: The shape of that tensor.
        end: The step after the last one that ran in it.
        output: The value of its first output tensor.
        output_shape: The shape of that tensor.
        items: The length of the tuple that it returns; None if it returns a tensor, 0 if it returns anything else.
        other_outputs: The values of the other tensors of that tuple.
    """

    module: str
    begin: int
    input: int = CONSTANT
    input_shape: tuple[int, ...] = ()
    end: int = -1
    output: int = CONSTANT
    output_shape: tuple[int, ...] = ()
    items: int | None = 0
    other_outputs: tuple[int, ...] = ()


@dataclass(eq=False)
class DataFlow:
    """Append-only record of the steps and the module calls of one forward pass.

    Attributes:
        names: The ATen name of each step.
        sources: The values that each step reads, one for each tensor, including `CONSTANT`.
        from_input: Whether the result of each step depends on the model's input.
        fake: Whether each step's result is fake; see `_record.make_fake_result`.
        pointwise: Whether each step works elementwise.
        call: The innermost module call that each step ran in; -1 for none.
        additions: The sums of two tensors, by step.
        calls: The module calls in order of their begin.
        returned: The values that leave the model: it returns them, or Python reads them.
    """

    names: list[str] = field(default_factory=list[str])
    sources: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    from_input: list[bool] = field(default_factory=list[bool])
    fake: list[bool] = field(default_factory=list[bool])
    pointwise: list[bool] = field(default_factory=list[bool])
    call: list[int] = field(default_factory=list[int])
    additions: dict[int, Addition] = field(default_factory=dict[int, Addition])
    calls: list[ModuleCall] = field(default_factory=list[ModuleCall])
    returned: set[int] = field(default_factory=set[int])
    _open: list[int] = field(default_factory=list[int])
    _writers: dict[int, int] = field(default_factory=dict[int, int])
    _uncomputed: set[int] = field(default_factory=set[int])
    _added: int = 0
    # The attribute that holds a tensor's step. Another one in each run, because a tensor may outlive the run.
    _mark: str = field(default_factory=lambda: f"_secateur_step_{next(_RUNS)}")

    def origin_of(self, tensor: torch.Tensor) -> ValueOrigin:
        """Return the origin of the values of a tensor.

        The memory is looked up too, because no step creates ``x.data`` and the like.
        """
        value: int = getattr(tensor, self._mark, CONSTANT)
        uncomputed = False
        if (self._writers or self._uncomputed) and tensor.layout == torch.strided:
            memory = _storage_key(tensor)
            # The later of the step that returned the tensor and of the last write into its memory, through any view.
            value = max(value, self._writers.get(memory, CONSTANT))
            uncomputed = memory in self._uncomputed
        if value < 0:
            return ValueOrigin(value, False, uncomputed)
        return ValueOrigin(value, self.from_input[value], uncomputed or self.fake[value])

    def value_of(self, tensor: torch.Tensor) -> int:
        """Return the step that wrote the values of a tensor."""
        return self.origin_of(tensor).value

    def is_fake(self, tensor: torch.Tensor) -> bool:
        """Return whether the values of a tensor are fake."""
        return self.origin_of(tensor).fake

    def add_inputs(self, example: Any) -> None:
        """Record the inputs of the model."""
        for tensor in tree_leaves(example):
            if isinstance(tensor, torch.Tensor):
                self.fake.append(False)
                self._append(INPUT, (), from_input=True, pointwise=False)
                # By its storage, because the caller's tensor must not get an attribute.
                self._writers[_storage_key(tensor)] = len(self.names) - 1

    def addition_number(self, name: str, inputs: Sequence[torch.Tensor], read: Sequence[ValueOrigin]) -> int | None:
        """Return the number of an `Addition` that is about to run; None if the call is not one."""
        if name != ADDITION or len(inputs) != 2 or inputs[0].shape != inputs[1].shape:
            return None
        return self._added if all(reading.from_input for reading in read) else None

    def add_step(
        self,
        func: Any,
        name: str,
        plain: bool,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        *,
        read: Sequence[ValueOrigin],
        fake: bool = False,
    ) -> None:
        """Record one ATen call that has just run.

        Args:
            func: The ATen overload.
            name: Its base name.
            plain: Whether it had positional arguments only (no ``alpha``).
            inputs: The tensors among its arguments.
            outputs: The tensors that it returned.
            read: The origins of the inputs, determined before the call.
            fake: Whether the call did not run, and the outputs are fake.
        """
        sources = tuple(reading.value for reading in read)
        number = len(self.names)
        added = self.addition_number(name, inputs, read)
        # Sums with ``alpha`` are counted, so that numbers agree with `ZeroBranches`, but are never residual.
        if added is not None:
            self._added += 1
            if plain:
                self.additions[number] = Addition(added, sources[0], sources[1])
        self.fake.append(fake or any(reading.fake for reading in read))
        self._append(name, sources, any(reading.from_input for reading in read), is_pointwise(func))
        if not outputs:
            # A call without a tensor as its result (`item`) gives a value to Python, which may use it for anything.
            self.returned.add(number)
        for tensor in outputs:
            setattr(tensor, self._mark, number)
        strided = [_storage_key(tensor) for tensor in outputs if tensor.layout == torch.strided]
        if is_mutable(func):
            self._writers.update(dict.fromkeys(strided, number))
        if self.fake[number]:
            self._uncomputed.update(strided)
        else:
            self._uncomputed.difference_update(strided)  # The memory was freed in the meantime, and is used again.

    def _append(self, name: str, sources: tuple[int, ...], from_input: bool, pointwise: bool) -> None:
        self.names.append(name)
        self.sources.append(sources)
        self.from_input.append(from_input)
        self.pointwise.append(pointwise)
        self.call.append(self._open[-1] if self._open else -1)

    def enter_module(self, module: str, args: Any, kwargs: Any) -> None:
        """Record that a module begins to run."""
        call = ModuleCall(module, len(self.names))
        # Stand-ins return their first tensor argument, so the value of that one is enough.
        tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
        if tensor is not None:
            # Looking up the memory is no read of values, for which the guard of fake values would take it.
            with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                call.input, call.input_shape = self.value_of(tensor), tensor.shape
        self._open.append(len(self.calls))
        self.calls.append(call)

    def leave_module(self, out: Any) -> None:
        """Record that the innermost running module has returned."""
        call = self.calls[self._open.pop()]
        call.end = len(self.names)
        first, *rest = out if type(out) is tuple and out else (out,)
        if isinstance(first, torch.Tensor):
            with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                call.output, call.output_shape = self.value_of(first), first.shape
                call.other_outputs = tuple(self.value_of(item) for item in rest if isinstance(item, torch.Tensor))
            # A stand-in can return a tuple of a tensor and None, as attention does, but no other structure.
            if all(item is None or isinstance(item, torch.Tensor) for item in rest):
                call.items = len(out) if type(out) is tuple else None

    def add_outputs(self, out: Any) -> None:
        """Record what the model has returned."""
        self.returned.update(self.value_of(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        self.returned.discard(CONSTANT)


_RESHAPING = frozenset({
    "view", "_unsafe_view", "_reshape_alias", "reshape", "expand", "slice", "split", "split_with_sizes", "chunk",
    "unbind", "select", "squeeze", "unsqueeze", "roll", "flip", "index", "index_select", "im2col",
})  # fmt: skip
_SHAPE_PRESERVING = frozenset({
    "permute", "transpose", "t", "clone", "contiguous", "alias", "detach", "_to_copy", "native_dropout", "dropout",
})  # fmt: skip
# Not sigmoid, softmax or exp, whose result is not zero where their operand is.
ZERO_PRESERVING = _RESHAPING | _SHAPE_PRESERVING | frozenset({
    "relu", "gelu", "silu", "tanh", "hardswish", "leaky_relu", "neg", "div", "mean", "sum", "avg_pool2d",
    "max_pool2d_with_indices", "_adaptive_avg_pool2d", "upsample_nearest2d", "upsample_bilinear2d",
})  # fmt: skip
"""Names of steps whose result is zero where their first operand is zero."""
_NONNEGATIVE = frozenset({"relu", "sigmoid", "hardsigmoid", "_softmax", "abs", "square"})
_KEEPS_SIGN = _RESHAPING | _SHAPE_PRESERVING | frozenset({
    "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "mean", "sum", "add", "mul", "cat", "stack",
    "upsample_nearest2d", "upsample_bilinear2d", "hardtanh",
})  # fmt: skip
"""Names of steps whose result is not negative if no operand is."""


@dataclass(frozen=True, eq=False)
class _Branch:
    """The steps whose results only one operand b of a sum x + b needs.

    Attributes:
        addition: The step of the sum.
        shortcut: The value x.
        result: The value b.
        operand: The position of b in the sum, 0 or 1.
        steps: The steps whose results nothing but b needs, including those that nothing needs.
        serving: Those of them from which b is computed.
    """

    addition: int
    shortcut: int
    result: int
    operand: int
    steps: frozenset[int]
    serving: frozenset[int]


@dataclass(frozen=True, eq=False)
class _FoundBlock:
    """A block that does not have its final name yet.

    Attributes:
        block: The block; its name is that of the module that is removed as a whole, or empty.
        call: The innermost module call that the sum runs in.
        entering: The value x that the sum adds to.
        leaving: The next value of the residual stream: what the whole module returns, or the sum.
    """

    block: Block
    call: int
    entering: int
    leaving: int


def find_blocks(flow: DataFlow, model: nn.Module, counted: Collection[str]) -> tuple[Block, ...]:
    """Return every residual block that contains multiply-accumulates, but not all of the model's.

    Args:
        flow: The data flow of the forward pass.
        model: The model that ran, for the tensors of its modules.
        counted: Names of the modules that ran an operation with multiply-accumulates.
    """
    return _BlockFinder(flow, model).blocks(counted)


def enclosing_names(name: str) -> Iterator[str]:
    """Yield the name of a module or tensor, then the names of the modules around it, innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def blocks_of_modules(blocks: Iterable[Block]) -> Callable[[str], tuple[str, ...]]:
    """Return a function from a module name to the names of the blocks that remove the module."""
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
            branch = self._find_branch(step, addition)
            if branch is None:
                continue
            self.shortcuts[step] = branch.shortcut
            one = self._make_block(branch, addition)
            if one is not None and 0 < sum(map(one.block.replaces, counted)) < len(counted):
                found.append(one)
        return self._name_blocks(found)

    def _find_branch(self, step: int, addition: Addition) -> _Branch | None:
        # Either operand may be the branch. The usual order is shortcut + branch.
        pairs = ((addition.left, addition.right, 1), (addition.right, addition.left, 0))
        for shortcut, result, operand in pairs:
            if shortcut < 0 or result <= 0 or not self.flow.from_input[shortcut] or self.users[result] != [step]:
                continue
            trunk = self._find_trunk(step, shortcut)
            # What was computed before x cannot have been computed from it.
            if result <= min(trunk):
                continue
            origin = self._find_ancestors(result, min(trunk))
            # The branch must be computed from x; otherwise removing it would lose an independent input.
            if not trunk & origin:
                continue
            steps = self._find_exclusive(step, result, min(trunk))
            return _Branch(step, shortcut, result, operand, steps, steps & origin)
        return None

    def _find_trunk(self, step: int, shortcut: int) -> set[int]:
        """Return the shortcut, and the values it equals without the branches that the same module call adds to it."""
        # In (x + f(x)) + g(x), the shortcut of the second sum is the first sum, but g reads x.
        trunk = {shortcut}
        while shortcut in self.shortcuts and self.flow.call[shortcut] == self.flow.call[step]:
            shortcut = self.shortcuts[shortcut]
            trunk.add(shortcut)
        return trunk

    def _find_ancestors(self, value: int, first: int) -> set[int]:
        """Return the steps from ``first`` on from which a value is computed, including itself."""
        seen, waiting = {value}, [value]
        while waiting:
            for source in self.flow.sources[waiting.pop()]:
                if source >= first and source not in seen:
                    seen.add(source)
                    waiting.append(source)
        return seen

    def _find_exclusive(self, step: int, result: int, after: int) -> frozenset[int]:
        steps: set[int] = set()
        # Backward, so that all users of a step are decided before it. Steps that nobody uses are included.
        for number in range(step - 1, after, -1):
            if all(user in steps or (user == step and number == result) for user in self.users[number]):
                steps.add(number)
        return frozenset(steps)

    def _make_block(self, branch: _Branch, addition: Addition) -> _FoundBlock | None:
        inside = self._calls_inside(branch)
        whole = self._find_wrapper(branch)
        if whole is not None:
            replacements = (Replacement(whole.module, StandIn.PASS_THROUGH),)
            modules = {call.module for call in inside} | {whole.module}
        else:
            replacements = self._find_silenced(branch, inside)
            modules = {call.module for call in inside}
        # A module that runs several times would be removed from its other places as well.
        if not replacements or any(self.times[r.module] > 1 for r in replacements):
            return None
        tensors = self.tensors.only_in([r.module for r in replacements])
        if tensors is None:
            return None
        name, leaving = (whole.module, whole.output) if whole is not None else ("", branch.addition)
        block = Block(name, addition.number, branch.operand, replacements, tuple(sorted(modules)), tensors)
        return _FoundBlock(block, self.flow.call[branch.addition], branch.shortcut, leaving)

    def _calls_inside(self, branch: _Branch) -> list[ModuleCall]:
        """Return the module calls whose steps all lie in the branch and of which at least one serves it."""
        first = bisect_right(self.begins, min(branch.steps) - 1)
        found: list[ModuleCall] = []
        for call in self.flow.calls[first:]:
            if call.begin >= branch.addition:
                break
            # Modules that share only some of their steps with the branch also serve something else.
            span = range(call.begin, call.end)
            if any(s in branch.serving for s in span) and all(s in branch.steps for s in span):
                found.append(call)
        return found

    def _find_wrapper(self, branch: _Branch) -> ModuleCall | None:
        """Return the call that takes x and returns x + b, if it does nothing else."""
        number = self.flow.call[branch.addition]
        if number < 0:
            return None
        call = self.flow.calls[number]
        if not call.module or call.items is not None or call.input != branch.shortcut:
            return None
        last = branch.addition
        for step in range(call.begin, call.end):
            # What remains besides the branch, the sum and unused steps must not change the value.
            if step in branch.steps or step == branch.addition or not self.users[step]:
                continue
            rectified = self.flow.names[step] == "relu" and self.positive[branch.shortcut]
            if not rectified or self.flow.sources[step] != (last,) or self.users[last] != [step]:
                return None
            last = step
        return call if call.output == last else None

    def _find_silenced(self, branch: _Branch, inside: list[ModuleCall]) -> tuple[Replacement, ...]:
        """Return stand-ins for the outermost modules with parameters; none if the result may differ from zero."""
        outermost: list[ModuleCall] = []
        for call in inside:
            if call.module in self.tensors.parameters and not (outermost and call.begin < outermost[-1].end):
                outermost.append(call)
        # Steps inside of these modules disappear with them; all others ('loose') still run.
        owner = {step: call for call in outermost for step in range(call.begin, call.end)}
        loose = sorted(step for step in branch.serving if step not in owner)
        zero: set[int] = set()
        last: list[ModuleCall] = []
        for step in _walk_back(branch, self.flow, owner):
            call = owner.get(step)
            if call is not None and call not in last:
                last.append(call)
                # The result depends on a part of the module other than its first output, such as a stored attribute.
                if step != call.output:
                    return ()
        zero.update(call.output for call in last)
        # In order of execution, so that what a step reads is decided before it.
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
        # A product is zero if any factor is; a concatenation or sum only if all parts are.
        if name == "mul":
            return any(source in zero for source in sources)
        if name in {"cat", "stack"} or step in self.flow.additions:
            return all(source in zero for source in sources)
        return name in ZERO_PRESERVING and sources[:1] != () and sources[0] in zero

    def _gives_one_tensor(self, call: ModuleCall) -> bool:
        """Return whether only the first tensor that a module returns is used outside of it."""
        others = (user for value in call.other_outputs if value != CONSTANT for user in self.users[value])
        return call.items != 0 and all(user < call.end for user in others)

    def _shapes_fit(self, loose: Iterable[int], calls: Iterable[ModuleCall]) -> bool:
        """Return whether the steps between the stand-ins accept the shapes that these return."""
        if not all(map(self._gives_one_tensor, calls)):
            return False
        # Stand-ins return the shape of their input. If that is another shape than the original's, what runs between
        # them must accept any shape.
        if all(call.input_shape == call.output_shape for call in calls):
            return True
        fed = (step for step in loose if self.flow.from_input[step])
        return all(self.flow.pointwise[step] or self.flow.names[step] in _SHAPE_PRESERVING for step in fed)

    def _name_blocks(self, found: list[_FoundBlock]) -> tuple[Block, ...]:
        sums = Counter(one.call for one in found)
        named: list[Block] = []
        taken: Counter[str] = Counter()
        leaving: dict[int, str] = {}
        for one in found:
            # The removed module, or the one in which this is the only sum, or else the largest removed module.
            name = one.block.name or (self.flow.calls[one.call].module if one.call >= 0 and sums[one.call] == 1 else "")
            if not name:
                name = max(one.block.replacements, key=lambda r: self.tensors.parameters.get(r.module, 0)).module
            taken[name] += 1
            name = name if taken[name] == 1 else f"{name}#{taken[name]}"
            named.append(replace(one.block, name=name, follows=leaving.get(one.entering)))
            leaving[one.leaving] = name
        return tuple(named)


class _TensorOwners:
    """The tensors in every module of a model, including those of inner modules.

    Attributes:
        names: All names of a tensor, by its id.
        inside: The ids of the tensors in a module, by its name, once for each name of the tensor.
        parameters: The number of parameters in a module, by its name; modules without any are left out.
    """

    def __init__(self, model: nn.Module):
        self.names: dict[int, list[str]] = {}
        self.inside: dict[str, list[int]] = {}
        self.parameters: dict[str, int] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            for module in self._enter(name, tensor):
                self.parameters[module] = self.parameters.get(module, 0) + tensor.numel()
        for name, tensor in model.named_buffers(remove_duplicate=False):
            self._enter(name, tensor)

    def _enter(self, name: str, tensor: torch.Tensor) -> list[str]:
        """Enter a tensor, and return the names of the modules around it."""
        self.names.setdefault(id(tensor), []).append(name)
        around = list(enclosing_names(name.rpartition(".")[0]))
        for module in around:
            self.inside.setdefault(module, []).append(id(tensor))
        return around

    def only_in(self, modules: Iterable[str]) -> tuple[str, ...] | None:
        """Return the first names of the tensors in some modules; None if another module shares one of them."""
        # A tensor with more names than uses inside of the modules belongs to another module too.
        held = Counter(tensor for module in modules for tensor in self.inside.get(module, ()))
        if any(times < len(self.names[tensor]) for tensor, times in held.items()):
            return None
        return tuple(self.names[tensor][0] for tensor in held)


def _needed_by(flow: DataFlow) -> list[list[int]]:
    """Return for every step the steps that need its result; the number of steps stands for the caller of the model.

    A step whose result nobody needs does not count as a user.
    """
    users: list[list[int]] = [[] for _ in flow.names]
    for value in flow.returned:
        users[value].append(len(flow.names))
    for step in range(len(flow.names) - 1, -1, -1):
        if users[step]:
            # Users come later than what they use, so going backward the empty list of a step is final.
            for source in set(flow.sources[step]) - {CONSTANT}:
                users[source].append(step)
    return users


def _find_nonnegative(flow: DataFlow) -> list[bool]:
    known: list[bool] = []
    for step, (name, sources) in enumerate(zip(flow.names, flow.sources, strict=True)):
        # A sum or product with a number may be negative.
        plain = step in flow.additions if name == "add" else len(sources) == 2 if name == "mul" else bool(sources)
        inherits = name in _KEEPS_SIGN and plain
        known.append(name in _NONNEGATIVE or (inherits and all(s >= 0 and known[s] for s in sources)))
    return known


def _walk_back(branch: _Branch, flow: DataFlow, owner: Collection[int]) -> Iterable[int]:
    """Yield the steps of the branch on the paths back from its result; paths end at the steps of owned modules."""
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

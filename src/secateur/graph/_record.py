"""Operations that need not be computed while a model is traced, because nobody reads their numbers.

A trace learns which calls are made, in which order and with which shapes. The numbers in the tensors decide that only
where somebody reads them: python (``if x.max() > 3``), an index, a mask, an operation that gives as many results as
the numbers say. So the operations that do nearly all of the arithmetic of a model are not run: tensors of the same
shape and layout stand in for what they would return, and what is computed from those is *hollow*. As soon as anybody
is about to read what is hollow, the trace is given up and made again with every number.

Run a model once and write down what happens to its channels.

One more forward pass of a traced model, to see where its values come from and go to."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur._arrays import BoolArray
from secateur._runtime import copy_model, run_isolated
from secateur.errors import ModelError, TraceError
from secateur.graph._ledger import MIXING_KINDS, Call, Ledger, ModuleOutput, Rule, base_name, tensors_in
from secateur.graph._rules_sizes import bind_sizes
from secateur.graph._size_ints import Attribute, ShapeOf, SizeInt, SizeTuple
from secateur.graph.blocks import INPUT, DataFlow, ValueOrigin, find_blocks
from secateur.graph.rules import apply_rule

VALUE_READERS = frozenset({
    "tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "_typed_storage",
})  # fmt: skip
"""Methods of a tensor that hand out its numbers without any ATen call."""
_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


class FakeValueReadError(Exception):
    """Somebody is about to read the numbers of a hollow tensor."""


def reads_values(func: Any, name: str, hollow: Sequence[Tensor]) -> bool:
    """Whether what an ATen call gives back, but for the numbers in its tensors, may depend on hollow inputs.

    Args:
        func: The ATen overload.
        name: Its base name.
        hollow: The hollow tensors among its inputs, at least one.
    """
    if func.namespace != "aten" or any(not (t.is_floating_point() or t.is_complex()) for t in hollow):
        return True  # What is no floating-point number is a mask or an index computed from one.
    # What is taken of a tensor by an index depends on that index alone.
    return name != "index" and not _TAGS.isdisjoint(func.tags)


def make_fake_result(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Tensors of the shapes and layouts that a call would return; None if there is anything unusual about it.

    What they hold is whatever lies in the memory. An operation in place returns what it is given.

    Args:
        func: The ATen overload, one of `FAKE_RESULTS`.
        args: Its positional arguments.
        kwargs: Its named arguments.
    """
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    first = tensors[0]
    plain = first.device.type == "cpu" and first.is_floating_point() and first.numel()
    alike = plain and all((t.device, t.dtype, t.layout) == (first.device, first.dtype, torch.strided) for t in tensors)
    return FAKE_RESULTS[func](*args, **kwargs) if alike else None


def _product(left: Tensor, right: Tensor) -> Tensor | None:
    """(..., n, k) @ (..., k, m)."""
    fits = left.shape[:-2] == right.shape[:-2] and left.size(-1) == right.size(-2)
    return left.new_empty((*left.shape[:-1], right.size(-1))) if fits else None


def _added_product(bias: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    made = _product(left, right)
    return made if made is not None and bias.shape in {made.shape, made.shape[1:]} else None


def _convolution(  # noqa: PLR0917
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    further: Sequence[int],
    groups: int,
) -> Tensor | None:
    """(n, in, ...) by (out, in / groups, ...), or (in, out / groups, ...) if transposed."""
    per_dim = (source.shape[2:], weight.shape[2:], stride, padding, dilation, further)
    entering, leaving = (0, 1) if transposed else (1, 0)
    channels = weight.size(leaving) * (groups if transposed else 1)
    fits = (
        len({len(amounts) for amounts in per_dim}) == 1
        # Where channels come last in memory, what comes out depends on the library that convolves.
        and _is_in_order(source)
        and _is_in_order(weight)
        and source.size(1) == weight.size(entering) * (1 if transposed else groups)
        and weight.size(0) % groups == 0
        and (bias is None or bias.shape == (channels,))
    )
    if not fits:
        return None
    length = _transposed_size if transposed else _convolved_size
    lengths = [length(*amounts) for amounts in zip(*per_dim, strict=True)]
    return source.new_empty((source.size(0), channels, *lengths)) if min(lengths) > 0 else None


def _is_in_order(tensor: Tensor) -> bool:
    """Contiguous, and its strides say so even where a dimension has one position only and any would do."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            return False
        expected *= size
    return True


def _convolved_size(size: int, kernel: int, stride: int, pad: int, dilation: int, *_: int) -> int:
    """How many places a kernel takes as it slides."""
    return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


def _transposed_size(size: int, kernel: int, stride: int, pad: int, dilation: int, *further: int) -> int:
    """How far a transposed convolution reaches."""
    return (size - 1) * stride - 2 * pad + dilation * (kernel - 1) + sum(further) + 1


def _elementwise(source: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return torch.empty_like(source) if _is_in_order(source) else None


def _in_place(source: Tensor, *_: Any, **__: Any) -> Tensor:
    return source


def _binary(left: Tensor, right: Any, **_: Any) -> Tensor | None:
    same = isinstance(right, Tensor) and left.shape == right.shape and _is_in_order(left) and _is_in_order(right)
    return torch.empty_like(left) if same else None


def _binary_in_place(left: Tensor, right: Any, **_: Any) -> Tensor | None:
    return left if isinstance(right, Tensor) and left.shape == right.shape else None


def _batch_norm(source: Tensor, *vectors_training_and_more: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """With running statistics only: those of the input are of no use to anyone then, and are empty."""
    *vectors, training, _, _ = vectors_training_and_more
    shapes = {tuple(v.shape) for v in vectors if v is not None}
    if training or source.dim() < 2 or shapes - {(source.size(1),)} or not _is_in_order(source):
        return None
    return torch.empty_like(source), source.new_empty(0), source.new_empty(0)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any
) -> tuple[Tensor, Tensor] | None:
    """(batch, heads, tokens, dimension) in the order of the query, and a sum for each of its tokens."""
    batch, heads, tokens, size = query.shape
    fits = key.shape == value.shape and key.shape == (batch, heads, key.size(2), size) and query.dtype == torch.float32
    if dropout or causal or not fits:
        return None
    sums = query.new_empty(batch, tokens, heads).transpose(1, 2)
    return torch.empty_like(query), sums


_ATEN = torch.ops.aten
FAKE_RESULTS: Mapping[Any, Callable[..., Any]] = {
    _ATEN.mm.default: _product,
    _ATEN.bmm.default: _product,
    _ATEN.addmm.default: _added_product,
    _ATEN.convolution.default: _convolution,
    _ATEN.add.Tensor: _binary,
    _ATEN.mul.Tensor: _binary,
    _ATEN.add_.Tensor: _binary_in_place,
    _ATEN.native_batch_norm.default: _batch_norm,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    **dict.fromkeys(
        (_ATEN.relu.default, _ATEN.silu.default, _ATEN.gelu.default, _ATEN.hardswish.default, _ATEN.sigmoid.default),
        _elementwise,
    ),
    **dict.fromkeys(
        (_ATEN.relu_.default, _ATEN.silu_.default, _ATEN.hardswish_.default, _ATEN.hardtanh_.default), _in_place
    ),
}
"""What may go without being computed: from the arguments of a call to what stands in for its results."""


class RecordingContext:
    """Which module is running, by which rules beyond the built-in ones, and whether every number is computed."""

    def __init__(self, rules: Mapping[str, Rule], *, computed: bool) -> None:
        self.rules = rules
        self.computed = computed
        self.was_read = False
        self.stack: list[str] = []
        self.flow = DataFlow()

    @property
    def module(self) -> str:
        """Qualified name of the innermost running module."""
        return self.stack[-1] if self.stack else ""

    def refuse(self) -> NoReturn:
        """Numbers are about to be read that were not computed. Noted too, as a model may catch what is raised."""
        self.was_read = True
        raise FakeValueReadError


class OperationRecorder(TorchDispatchMode):
    """Sees every ATen call with its real tensors and applies the channel rule."""

    def __init__(self, ledger: Ledger, where: RecordingContext) -> None:
        super().__init__()
        self.ledger = ledger
        self.where = where
        self.mixed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in(args, *kwargs.values())
        read = [self.where.flow.read(tensor) for tensor in inputs]
        name = base_name(func)
        made = None if self.where.computed else self._unread(func, name, args, kwargs, inputs, read)
        out = func(*args, **kwargs) if made is None else made
        outputs = tensors_in(out)
        self.ledger.seen.update(map(id, inputs))
        call = Call(self.ledger, func, name, self.where.module, args, kwargs, inputs, outputs, self.mixed)
        apply_rule(call, self.where.rules)
        self.mixed += name in MIXING_KINDS
        self.where.flow.step(func, name, not kwargs, inputs, outputs, read=read, hollow=made is not None)
        return out

    def _unread(  # noqa: PLR0917
        self, func: Any, name: str, args: Any, kwargs: Any, inputs: tuple[torch.Tensor, ...], read: list[ValueOrigin]
    ) -> Any:
        """What stands in for the result of the call; None if it is to be made."""
        hollow = [tensor for tensor, reading in zip(inputs, read, strict=True) if reading.hollow]
        ruled = bool(self.where.rules) and not self.where.rules.keys().isdisjoint((name, func._schema.name))
        if hollow and (ruled or reads_values(func, name, hollow)):
            self.where.refuse()
        # What does not depend on the input might be kept for later, somewhere beyond the shadow.
        fed = func in FAKE_RESULTS and not ruled and any(reading.fed for reading in read)
        return make_fake_result(func, args, kwargs) if fed else None


class SizeRecorder(TorchFunctionMode):
    """Gives shapes that remember their channels, and binds the ints that reach sized calls."""

    def __init__(self, ledger: Ledger, where: RecordingContext) -> None:
        super().__init__()
        self.ledger = ledger
        self.where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in VALUE_READERS and self.where.flow.is_hollow(args[0]):
            self.where.refuse()
        out = func(*args, **kwargs)
        if func == _SHAPE:
            return self._remember(args[0], out)
        if name == "size":
            return self._remember_size(args, kwargs, out)
        if name in {"numel", "nelement"}:
            return math.prod(self._remember(args[0], args[0].shape))
        bind_sizes(self.ledger, name, self.where.module, args, kwargs, out)
        return out

    def _remember(self, tensor: torch.Tensor, shape: torch.Size) -> Any:
        ids = self.ledger.ids_of(tensor)
        if not ids:
            return shape
        return SizeTuple(SizeInt(size, ShapeOf(ids[d])) if d in ids else size for d, size in enumerate(shape))

    def _remember_size(self, args: Any, kwargs: Any, out: Any) -> Any:
        if isinstance(out, torch.Size):
            return self._remember(args[0], out)
        dim = (args[1] if len(args) > 1 else kwargs["dim"]) % args[0].dim()
        ids = self.ledger.ids_of(args[0]).get(dim)
        return out if ids is None else SizeInt(out, ShapeOf(ids))


_SHAPE: Any = torch.Tensor.shape.__get__  # type: ignore[attr-defined]


def shadow_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode that shares only the parameters: running it leaves the model as it was."""
    shadow = copy_model(model, {id(parameter): parameter for parameter in model.parameters()})
    # `eval()` visits every module, which takes longer than the copy; it is needed only if it would change something.
    in_eval = all(
        not module.training and type(module).train is nn.Module.train and type(module).eval is nn.Module.eval
        for module in model.modules()
    )
    return shadow if in_eval else shadow.eval()


_HOLDS_INTS = frozenset({int, tuple, list})


def wrap_int_attributes(modules: Mapping[str, nn.Module]) -> dict[Attribute, int]:
    """Replace the ints held by the modules of a shadow, by name, by ints that remember where they are held."""
    values: dict[Attribute, int] = {}

    def remember(place: Attribute, value: int) -> SizeInt:
        values[place] = value
        return SizeInt(value, place)

    for name, module in modules.items():
        held = vars(module)
        for key, value in held.items():
            kind = type(value)
            if kind not in _HOLDS_INTS or key.startswith("_"):
                continue
            if kind is int:
                held[key] = remember(Attribute(name, key), value)
            elif value and all(type(item) is int for item in value):
                items = [remember(Attribute(name, key, i), item) for i, item in enumerate(value)]
                held[key] = items if kind is list else tuple(items)
    return values


def record(
    model: nn.Module, example: tuple[Any, ...], rules: Mapping[str, Rule], *, by_head: BoolArray | None = None
) -> tuple[Ledger, dict[Attribute, int]]:
    """Trace one forward pass of a shadow of the model in eval mode.

    What does most of the arithmetic is not computed, as long as nobody reads their numbers; see `_unread`.

    Args:
        model: Any module.
        example: Positional arguments, tensors already at batch 1.
        rules: The user's own, by name of the operation.
        by_head: Ids, of an earlier run of the same model, that stay or go by whole heads.

    Returns:
        The ledger, and every int attribute with its value.

    Raises:
        TraceError: If the model cannot run the example.
    """
    with contextlib.suppress(TraceError, FakeValueReadError):
        return _record_once(model, example, RecordingContext(rules, computed=False), by_head)
    return _record_once(model, example, RecordingContext(rules, computed=True), by_head)


def _record_once(
    model: nn.Module, example: tuple[Any, ...], where: RecordingContext, by_head: BoolArray | None
) -> tuple[Ledger, dict[Attribute, int]]:
    try:
        shadow = shadow_copy(model)
    except ModelError as error:
        raise TraceError(str(error)) from error
    ledger = Ledger()
    if by_head is not None:
        ledger.by_head = by_head
    for name, tensor in (*shadow.named_parameters(), *shadow.named_buffers()):
        ledger.store(name, tensor)
    modules = {n: m for n, m in shadow.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
    attributes = wrap_int_attributes(modules)
    _add_recording_hooks(modules, ledger, where)
    where.flow.feed(example)
    with run_isolated(model), torch.no_grad(), SizeRecorder(ledger, where), OperationRecorder(ledger, where):
        try:
            out = shadow(*example)
        except Exception as error:
            if where.was_read:
                raise FakeValueReadError from error
            shapes = [tuple(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__ for t in example]
            raise TraceError(
                f"the model cannot run the example input of shape {shapes} (in module {where.module or 'itself'!r}): "
                f"{error}. Give an input of the size and channels the model was made for."
            ) from error
    tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
    ledger.freeze_all([ledger.ids_of(t) for t in tensors], "reaches the model's output")
    where.flow.finish(out)
    ledger.calls = tuple(name for name in where.flow.names if name != INPUT)
    ledger.blocks = find_blocks(where.flow, shadow, {operation.module for operation in ledger.operations})
    if ledger.unseen():
        _record_training(model, shadow, example, ledger, where)
    if where.was_read:
        raise FakeValueReadError
    return ledger, attributes


def _record_training(
    model: nn.Module, shadow: nn.Module, example: tuple[Any, ...], ledger: Ledger, where: RecordingContext
) -> None:
    """Run once more in training mode: auxiliary heads, unused in evaluation, must be cut along with what they read.

    Only what must go together is kept of it. A model that cannot run so keeps what is known already.
    """
    doubled = tuple(
        torch.cat([t, t]) if isinstance(t, torch.Tensor) and t.dim() and t.size(0) == 1 else t for t in example
    )
    counted, mixed, outputs, touched = (
        len(ledger.operations),
        len(ledger.mixings),
        dict(ledger.outputs),
        len(ledger.touched),
    )
    recorders = SizeRecorder(ledger, where), OperationRecorder(ledger, where)
    where.flow.feed(doubled)
    with contextlib.suppress(Exception), run_isolated(model), torch.no_grad(), recorders[0], recorders[1]:
        out = shadow.train()(*doubled)
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        ledger.freeze_all([ledger.ids_of(t) for t in tensors], "reaches the model's output in training")
    del ledger.operations[counted:], ledger.mixings[mixed:], ledger.touched[touched:]
    ledger.outputs = outputs
    where.stack.clear()


def _add_recording_hooks(modules: Mapping[str, nn.Module], ledger: Ledger, where: RecordingContext) -> None:
    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            where.stack.append(name)
            where.flow.enter(name, args, kwargs)

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            where.stack.pop()
            where.flow.leave(out)
            leaves = (out,) if isinstance(out, torch.Tensor) else tree_leaves(out)
            tensor = next((t for t in leaves if isinstance(t, torch.Tensor)), None)
            if tensor is not None:
                known = ledger.outputs.pop(name, None)
                calls = known.calls + 1 if known else 1
                with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                    shape = tuple(tensor.shape)
                ledger.outputs[name] = ModuleOutput(name, shape, ledger.ids_of(tensor), calls)

        return hook

    for name, module in modules.items():
        module.register_forward_pre_hook(enter(name), with_kwargs=True)
        module.register_forward_hook(leave(name))


@dataclass(eq=False)
class ForwardRun:
    """One forward pass in evaluation mode.

    Attributes:
        flow: Its steps and module calls.
        mixings: Number of each call that computes over channels, to its step.
        stored: For each step, the names of the parameters and buffers that it reads itself.
    """

    flow: DataFlow = field(default_factory=DataFlow)
    mixings: dict[int, int] = field(default_factory=dict[int, int])
    stored: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])


class _ExecutionRecorder(TorchDispatchMode):
    def __init__(self, run: ForwardRun, names: dict[int, str], *, computed: bool):
        super().__init__()
        self._run, self._names, self._computed = run, names, computed
        self.was_read = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in(args, *kwargs.values())
        read = [self._run.flow.read(tensor) for tensor in inputs]
        name = base_name(func)
        made = None if self._computed else self._unread(func, name, args, kwargs, inputs, read)
        out = func(*args, **kwargs) if made is None else made
        if name in MIXING_KINDS:
            self._run.mixings[len(self._run.mixings)] = len(self._run.flow.names)
        self._run.flow.step(func, name, not kwargs, inputs, tensors_in(out), read=read, hollow=made is not None)
        self._run.stored.append(tuple(self._names[id(t)] for t in inputs if id(t) in self._names))
        return out

    def _unread(  # noqa: PLR0917
        self, func: Any, name: str, args: Any, kwargs: Any, inputs: tuple[torch.Tensor, ...], read: list[ValueOrigin]
    ) -> Any:
        """What stands in for the result of the call; None if it is to be made."""
        hollow = [tensor for tensor, reading in zip(inputs, read, strict=True) if reading.hollow]
        if hollow and reads_values(func, name, hollow):
            self.refuse()
        fed = func in FAKE_RESULTS and any(reading.fed for reading in read)
        return make_fake_result(func, args, kwargs) if fed else None

    def refuse(self) -> NoReturn:
        """Numbers are about to be read that were not computed. Noted too, as a model may catch what is raised."""
        self.was_read = True
        raise FakeValueReadError


class _ValueReadGuard(TorchFunctionMode):
    """Sees numbers handed out without any ATen call."""

    def __init__(self, watching: _ExecutionRecorder, flow: DataFlow):
        super().__init__()
        self._watching, self._flow = watching, flow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in VALUE_READERS and self._flow.is_hollow(args[0]):
            self._watching.refuse()
        return func(*args, **(kwargs or {}))


def record_execution(model: nn.Module, example: tuple[Any, ...]) -> ForwardRun:
    """Run a shadow of a model once; what nobody reads is not computed, see `_unread`.

    Args:
        model: The traced model; not modified.
        example: Positional arguments, tensors at batch 1.
    """
    with contextlib.suppress(FakeValueReadError):
        return _record_execution(model, example, computed=False)
    return _record_execution(model, example, computed=True)


def _record_execution(model: nn.Module, example: tuple[Any, ...], *, computed: bool) -> ForwardRun:
    run = ForwardRun()
    run.flow.feed(example)
    run.stored.extend(() for _ in run.flow.names)
    shadow = shadow_copy(model)

    def enter(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: run.flow.enter(name, args, kwargs)

    for name, module in shadow.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(enter(name), with_kwargs=True)
            module.register_forward_hook(lambda _module, _args, out: run.flow.leave(out))
    names = {id(tensor): name for name, tensor in (*shadow.named_parameters(), *shadow.named_buffers())}
    watching = _ExecutionRecorder(run, names, computed=computed)
    with run_isolated(model), torch.no_grad(), _ValueReadGuard(watching, run.flow), watching:
        out = shadow(*example)
    run.flow.finish(out)
    if watching.was_read:
        raise FakeValueReadError
    return run

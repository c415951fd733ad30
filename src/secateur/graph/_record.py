"""One recorded forward pass of a model: for the channel graph (`record`), or to see its data flow (`record_execution`).

A trace learns which calls are made, in which order and with which shapes. The values of the tensors matter only where
somebody reads them: Python code (``if x.max() > 3``), an index, a mask, an operation whose output shape depends on
values. So the operations that do nearly all of the arithmetic do not run: they return *fake* results, uninitialized
tensors of the right shape and layout, and everything computed from fake tensors is fake as well. As soon as a fake
value is about to be read, the pass is abandoned and repeated with all values computed.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from secateur._arrays import BoolArray
from secateur._outputs import output_tensors
from secateur._runtime import run_isolated
from secateur.errors import ModelError, TraceError
from secateur.graph._ledger import MIXING_KINDS, Call, Ledger, ModuleOutput, Rule, base_name, tensors_in
from secateur.graph._shadow import shadow_copy
from secateur.graph._size_ints import Attribute, plain_number
from secateur.graph._size_records import SizeTracker, wrap_sizes
from secateur.graph.blocks import INPUT, DataFlow, ValueOrigin, find_blocks
from secateur.graph.channel_rules.recurrent import FAKE_RECURRENT, WholeCallMode
from secateur.graph.channel_rules.sizes import UnhashableSizeError
from secateur.graph.graph import CallShapes
from secateur.graph.rules import apply_rule

VALUE_READERS = frozenset({
    "tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "_typed_storage",
})  # fmt: skip
"""Methods that return the values of a tensor without any ATen call."""
_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


class FakeValueReadError(Exception):
    """The values of a fake tensor are about to be read."""


def reads_values(func: Any, name: str, fake: Sequence[Tensor]) -> bool:
    """Return whether anything but the values of the result of an ATen call may depend on the values of its inputs.

    Args:
        func: The ATen overload.
        name: Its base name.
        fake: The fake tensors among its inputs, at least one.
    """
    # The code of a custom operation may read any value, which nobody would see.
    if func.namespace != "aten" or any(not (t.is_floating_point() or t.is_complex()) for t in fake):
        return True  # Integers and booleans computed from fake values are indices or masks.
    # `index` is tagged as data-dependent because of masks, but here only the indexed tensor is fake.
    return name != "index" and not _TAGS.isdisjoint(func.tags)


def make_fake_result(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return uninitialized tensors of the shapes and layouts that a call would return; None in any unusual case.

    An operation in place returns its input.

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
    fake = _product(left, right)
    return fake if fake is not None and bias.shape in {fake.shape, fake.shape[1:]} else None


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
        # With channels last in memory, the layout of the output depends on the library that convolves.
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
    """Return whether a tensor is contiguous with the canonical strides, also along dimensions of size one."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            return False
        expected *= size
    return True


def _convolved_size(size: int, kernel: int, stride: int, pad: int, dilation: int, *_: int) -> int:
    """Return the output size of a convolution along one dimension."""
    return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


def _transposed_size(size: int, kernel: int, stride: int, pad: int, dilation: int, *further: int) -> int:
    """Return the output size of a transposed convolution along one dimension."""
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
    """Normalize with running statistics only: then nobody uses the batch statistics, which are empty."""
    *vectors, training, _, _ = vectors_training_and_more
    shapes = {tuple(v.shape) for v in vectors if v is not None}
    if training or source.dim() < 2 or shapes - {(source.size(1),)} or not _is_in_order(source):
        return None
    return torch.empty_like(source), source.new_empty(0), source.new_empty(0)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any
) -> tuple[Tensor, Tensor] | None:
    """Return (batch, heads, tokens, dimension) in the layout of the query, and (batch, heads, tokens) log-sum-exps."""
    batch, heads, tokens, size = query.shape
    fits = key.shape == value.shape and key.shape == (batch, heads, key.size(2), size) and query.dtype == torch.float32
    if dropout or causal or not fits:
        return None
    # The CPU kernel stores them in this order of dimensions.
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
    **FAKE_RECURRENT,
    **dict.fromkeys(
        (_ATEN.relu.default, _ATEN.silu.default, _ATEN.gelu.default, _ATEN.hardswish.default, _ATEN.sigmoid.default),
        _elementwise,
    ),
    **dict.fromkeys(
        (_ATEN.relu_.default, _ATEN.silu_.default, _ATEN.hardswish_.default, _ATEN.hardtanh_.default), _in_place
    ),
}
"""The operations that need not run: functions from the arguments of a call to its fake result."""


class RecordingContext:
    """The state of one recording.

    Attributes:
        rules: The rules of the user, by name of the operation.
        computed: Whether all values are computed, so that none is fake.
        hashable: Whether sizes may be looked up in dicts and caches; see `SizeNotes`.
        value_was_read: Whether a fake value was about to be read.
        stack: The qualified names of the running modules, outermost first.
        flow: The data flow.
    """

    def __init__(self, rules: Mapping[str, Rule], *, computed: bool, hashable: bool = False) -> None:
        self.rules = rules
        self.computed = computed
        self.hashable = hashable
        self.value_was_read = False
        self.stack: list[str] = []
        self.flow = DataFlow()

    @property
    def module(self) -> str:
        """The qualified name of the innermost running module."""
        return self.stack[-1] if self.stack else ""

    def reject_fake(self) -> NoReturn:
        """Raise `FakeValueReadError`, and remember that, because the model may catch the exception."""
        self.value_was_read = True
        raise FakeValueReadError


class OperationRecorder(WholeCallMode):
    """Applies the channel rule of every ATen call."""

    def __init__(self, ledger: Ledger, context: RecordingContext) -> None:
        super().__init__()
        self.ledger = ledger
        self.context = context
        self.mixed = 0

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = tensors_in(args, *kwargs.values())
        # Before the call, because an operation in place becomes the origin of what it writes to.
        read = [self.context.flow.origin_of(tensor) for tensor in inputs]
        name = base_name(func)
        fake = None if self.context.computed else self._fake_result(func, name, args, kwargs, inputs, read)
        out = func(*args, **kwargs) if fake is None else fake
        outputs = tensors_in(out)
        # Activations are entered too, which is harmless: their `id` cannot be that of a stored tensor, as these stay
        # alive.
        self.ledger.seen.update(map(id, inputs))
        call = Call(self.ledger, func, name, self.context.module, args, kwargs, inputs, outputs, self.mixed)
        apply_rule(call, self.context.rules)
        self.mixed += name in MIXING_KINDS
        self.context.flow.add_step(func, name, not kwargs, inputs, outputs, read=read, fake=fake is not None)
        return out

    def _fake_result(  # noqa: PLR0917
        self, func: Any, name: str, args: Any, kwargs: Any, inputs: tuple[torch.Tensor, ...], read: list[ValueOrigin]
    ) -> Any:
        """Return the fake result of a call; None if the call must run."""
        fake = [tensor for tensor, reading in zip(inputs, read, strict=True) if reading.fake]
        ruled = bool(self.context.rules) and not self.context.rules.keys().isdisjoint((name, func._schema.name))
        if fake and (ruled or reads_values(func, name, fake)):
            self.context.reject_fake()
        # The model may keep a result that does not depend on the input in a place that it shares with the original.
        fed = func in FAKE_RESULTS and not ruled and any(reading.from_input for reading in read)
        return make_fake_result(func, args, kwargs) if fed else None


class SizeRecorder(TorchFunctionMode):
    """Passes every call of PyTorch to the `SizeTracker`."""

    def __init__(self, ledger: Ledger, context: RecordingContext, tracker: SizeTracker) -> None:
        super().__init__()
        self.ledger = ledger
        self.context = context
        self.tracker = tracker

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # An overload of an operation (`torch.ops.aten.view.default`) is named ``view.default``.
        name: str = getattr(func, "__name__", "").partition(".")[0]
        if name in VALUE_READERS and self.context.flow.is_fake(args[0]):
            self.context.reject_fake()
        # The packed projection (3 x width) of `nn.MultiheadAttention` is no set of heads.
        self.ledger.packed_width = plain_number(args[3]) if name == "multi_head_attention_forward" else 0
        return self.tracker.run(func, name, args, kwargs or {})


def record(
    model: nn.Module, example: tuple[Any, ...], rules: Mapping[str, Rule], *, by_head: BoolArray | None = None
) -> tuple[Ledger, dict[Attribute, int]]:
    """Record one forward pass of a shadow copy of the model in eval mode.

    Args:
        model: Any module.
        example: The positional arguments, tensors at batch 1.
        rules: The rules of the user, by name of the operation.
        by_head: (ids of an earlier run of the same model,) which of them are kept or removed by whole heads.

    Returns:
        The ledger, and every int attribute with its value.

    Raises:
        TraceError: If the model cannot run the example.
    """
    computed = hashable = False
    while True:
        try:
            return record_once(model, example, RecordingContext(rules, computed=computed, hashable=hashable), by_head)
        except (TraceError, FakeValueReadError) as error:
            # Each can be the reason only once. A model that cannot run at all is told from computed values.
            if not hashable and _was_caused_by(error, UnhashableSizeError):
                hashable = True
            elif not computed:
                computed = True
            else:
                raise


def _was_caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def record_once(
    model: nn.Module, example: tuple[Any, ...], context: RecordingContext, by_head: BoolArray | None
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
    # TorchScript modules refuse hooks.
    modules = {n: m for n, m in shadow.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
    tracker = SizeTracker(ledger, context)
    attributes = wrap_sizes(modules, dict(model.named_modules()), ledger, tracker)
    _add_recording_hooks(modules, ledger, context)
    context.flow.add_inputs(example)
    with (
        run_isolated(model),
        torch.no_grad(),
        OperationRecorder(ledger, context),
        SizeRecorder(ledger, context, tracker),
    ):
        try:
            out = shadow(*example)
        except Exception as error:
            if context.value_was_read:
                raise FakeValueReadError from error
            shapes = [tuple(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__ for t in example]
            raise TraceError(
                f"the model cannot run the example input of shape {shapes} (in module {context.module or 'itself'!r}): "
                f"{error}. Give an input of the size and channels the model was made for."
            ) from error
    try:
        tensors = output_tensors(out)
    except ModelError as error:
        raise TraceError(str(error)) from error
    ledger.freeze_all([ledger.ids_of(t) for t in tensors], "reaches the model's output")
    context.flow.add_outputs(tensors)
    ledger.calls = tuple(name for name in context.flow.names if name != INPUT)
    ledger.blocks = find_blocks(context.flow, shadow, {operation.module for operation in ledger.operations})
    if ledger.unseen():
        _record_training(model, shadow, example, ledger, context, tracker)
    tracker.notes.close()
    # The model may have caught the exception, and have returned something else.
    if context.value_was_read:
        raise FakeValueReadError
    return ledger, attributes


def _record_training(  # noqa: PLR0917
    model: nn.Module,
    shadow: nn.Module,
    example: tuple[Any, ...],
    ledger: Ledger,
    context: RecordingContext,
    tracker: SizeTracker,
) -> None:
    """Run once more in training mode: auxiliary heads that evaluation does not use must be cut with what they read.

    Only the ties and freezes of this run are kept. If the model cannot run in this mode, nothing more is recorded.
    """
    # Two items, because batch norms in training mode refuse a single value per channel (after global pooling at batch
    # 1).
    doubled = tuple(
        torch.cat([t, t]) if isinstance(t, torch.Tensor) and t.dim() and t.size(0) == 1 else t for t in example
    )
    uncounted = len(ledger.uncounted)
    module_calls = {name: [*calls] for name, calls in ledger.module_calls.items()}
    counted, mixed, outputs, touched = (
        len(ledger.operations),
        len(ledger.mixings),
        dict(ledger.outputs),
        len(ledger.touched),
    )
    # A lookup that raises would end this run unnoticed, because its errors are suppressed.
    context.hashable = True
    recorders = OperationRecorder(ledger, context), SizeRecorder(ledger, context, tracker)
    context.flow.add_inputs(doubled)
    with contextlib.suppress(Exception), run_isolated(model), torch.no_grad(), recorders[0], recorders[1]:
        out = shadow.train()(*doubled)
        ledger.freeze_all([ledger.ids_of(t) for t in output_tensors(out)], "reaches the model's output in training")
    del ledger.operations[counted:], ledger.mixings[mixed:], ledger.touched[touched:], ledger.uncounted[uncounted:]
    ledger.outputs, ledger.module_calls = outputs, module_calls
    # A run that failed leaves the names of its modules on the stack.
    context.stack.clear()


def _add_recording_hooks(modules: Mapping[str, nn.Module], ledger: Ledger, context: RecordingContext) -> None:
    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            context.stack.append(name)
            context.flow.enter_module(name, args, kwargs)

        return hook

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            context.stack.pop()
            context.flow.leave_module(out)
            leaves = (out,) if isinstance(out, torch.Tensor) else tree_leaves(out)
            tensor = next((t for t in leaves if isinstance(t, torch.Tensor)), None)
            # Otherwise the shapes would hold sizes that are followed.
            with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                ledger.module_calls[name].append(CallShapes.of(args, kwargs, out))
                shape = () if tensor is None else tuple(tensor.shape)
            if tensor is not None:
                # Taken out and put in again, so that the order is that of the last calls.
                known = ledger.outputs.pop(name, None)
                calls = known.calls + 1 if known else 1
                ledger.outputs[name] = ModuleOutput(name, shape, ledger.ids_of(tensor), calls)

        return hook

    for name, module in modules.items():
        module.register_forward_pre_hook(enter(name), with_kwargs=True)
        module.register_forward_hook(leave(name), with_kwargs=True)


@dataclass(eq=False)
class ForwardRun:
    """The data flow of one forward pass in eval mode.

    Attributes:
        flow: The steps and module calls.
        mixings: The step of each call of `MIXING_KINDS`, by the number of the call.
        stored: For each step, the names of the parameters and buffers that it reads directly.
    """

    flow: DataFlow = field(default_factory=DataFlow)
    mixings: dict[int, int] = field(default_factory=dict[int, int])
    stored: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])


class _ExecutionRecorder(WholeCallMode):
    def __init__(self, run: ForwardRun, names: dict[int, str], *, computed: bool):
        super().__init__()
        self._run, self._names, self._computed = run, names, computed
        self.value_was_read = False

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = tensors_in(args, *kwargs.values())
        read = [self._run.flow.origin_of(tensor) for tensor in inputs]
        name = base_name(func)
        fake = None if self._computed else self._fake_result(func, name, args, kwargs, inputs, read)
        out = func(*args, **kwargs) if fake is None else fake
        if name in MIXING_KINDS:
            self._run.mixings[len(self._run.mixings)] = len(self._run.flow.names)
        self._run.flow.add_step(func, name, not kwargs, inputs, tensors_in(out), read=read, fake=fake is not None)
        self._run.stored.append(tuple(self._names[id(t)] for t in inputs if id(t) in self._names))
        return out

    def _fake_result(  # noqa: PLR0917
        self, func: Any, name: str, args: Any, kwargs: Any, inputs: tuple[torch.Tensor, ...], read: list[ValueOrigin]
    ) -> Any:
        """Return the fake result of a call; None if the call must run."""
        fake = [tensor for tensor, reading in zip(inputs, read, strict=True) if reading.fake]
        if fake and reads_values(func, name, fake):
            self.reject_fake()
        fed = func in FAKE_RESULTS and any(reading.from_input for reading in read)
        return make_fake_result(func, args, kwargs) if fed else None

    def reject_fake(self) -> NoReturn:
        """Raise `FakeValueReadError`, and remember that, because the model may catch the exception."""
        self.value_was_read = True
        raise FakeValueReadError


class _ValueReadGuard(TorchFunctionMode):
    """Notices when fake values are read without any ATen call."""

    def __init__(self, recorder: _ExecutionRecorder, flow: DataFlow):
        super().__init__()
        self._recorder, self._flow = recorder, flow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in VALUE_READERS and self._flow.is_fake(args[0]):
            self._recorder.reject_fake()
        return func(*args, **(kwargs or {}))


def record_execution(model: nn.Module, example: tuple[Any, ...]) -> ForwardRun:
    """Record the data flow of one forward pass of a shadow copy of a model in eval mode.

    Args:
        model: The traced model; not modified.
        example: The positional arguments, tensors at batch 1.
    """
    with contextlib.suppress(FakeValueReadError):
        return record_execution_once(model, example, computed=False)
    return record_execution_once(model, example, computed=True)


def record_execution_once(model: nn.Module, example: tuple[Any, ...], *, computed: bool) -> ForwardRun:
    run = ForwardRun()
    run.flow.add_inputs(example)
    # Aligned with the steps, of which the inputs are the first.
    run.stored.extend(() for _ in run.flow.names)
    shadow = shadow_copy(model)

    def enter(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: run.flow.enter_module(name, args, kwargs)

    for name, module in shadow.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(enter(name), with_kwargs=True)
            module.register_forward_hook(lambda _module, _args, out: run.flow.leave_module(out))
    names = {id(tensor): name for name, tensor in (*shadow.named_parameters(), *shadow.named_buffers())}
    recorder = _ExecutionRecorder(run, names, computed=computed)
    with run_isolated(model), torch.no_grad(), recorder, _ValueReadGuard(recorder, run.flow):
        out = shadow(*example)
    run.flow.add_outputs(output_tensors(out))
    if recorder.value_was_read:
        raise FakeValueReadError
    return run

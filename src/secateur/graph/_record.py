"""Run a model once and write down what happens to its channels."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.errors import TraceError
from secateur.graph._blocks import find_blocks
from secateur.graph._call import MIXING_KINDS, Call, Rule, base_name, tensors_in
from secateur.graph._copying import copy_model
from secateur.graph._flow import INPUT, Flow, Reading
from secateur.graph._ledger import BoolArray, Ledger, ModuleOutput
from secateur.graph._rules import apply_rule
from secateur.graph._running import undisturbed
from secateur.graph._sizes import Attribute, ShapeOf, SizeInt, SizeTuple
from secateur.graph._sizing import bind_sizes
from secateur.graph._unread import READERS, STAND_INS, NumbersReadError, reads_numbers, stand_in


class Where:
    """Which module is running, by which rules beyond the built-in ones, and whether every number is computed."""

    def __init__(self, rules: Mapping[str, Rule], *, computed: bool) -> None:
        self.rules = rules
        self.computed = computed
        self.was_read = False
        self.stack: list[str] = []
        self.flow = Flow()

    @property
    def module(self) -> str:
        """Qualified name of the innermost running module."""
        return self.stack[-1] if self.stack else ""

    def refuse(self) -> NoReturn:
        """Numbers are about to be read that were not computed. Noted too, as a model may catch what is raised."""
        self.was_read = True
        raise NumbersReadError


class OperationRecorder(TorchDispatchMode):
    """Sees every ATen call with its real tensors and applies the channel rule."""

    def __init__(self, ledger: Ledger, where: Where) -> None:
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
        self, func: Any, name: str, args: Any, kwargs: Any, inputs: tuple[torch.Tensor, ...], read: list[Reading]
    ) -> Any:
        """What stands in for the result of the call; None if it is to be made."""
        hollow = [tensor for tensor, reading in zip(inputs, read, strict=True) if reading.hollow]
        ruled = bool(self.where.rules) and not self.where.rules.keys().isdisjoint((name, func._schema.name))
        if hollow and (ruled or reads_numbers(func, name, hollow)):
            self.where.refuse()
        # What does not depend on the input might be kept for later, somewhere beyond the shadow.
        fed = func in STAND_INS and not ruled and any(reading.fed for reading in read)
        return stand_in(func, args, kwargs) if fed else None


class SizeRecorder(TorchFunctionMode):
    """Gives shapes that remember their channels, and binds the ints that reach sized calls."""

    def __init__(self, ledger: Ledger, where: Where) -> None:
        super().__init__()
        self.ledger = ledger
        self.where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in READERS and self.where.flow.is_hollow(args[0]):
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


def shadow_of(model: nn.Module) -> nn.Module:
    """A copy with its own modules and buffers that shares the parameters: running it leaves the model as it was."""
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    in_eval = True
    for module in model.modules():
        kind = type(module)
        in_eval &= not module.training and kind.train is nn.Module.train and kind.eval is nn.Module.eval
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                shared[id(value)] = value
    shadow = copy_model(model, shared)
    return shadow if in_eval else shadow.eval()


_HOLDS_INTS = frozenset({int, tuple, list})


def number_attributes(modules: Mapping[str, nn.Module]) -> dict[Attribute, int]:
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
    with contextlib.suppress(TraceError, NumbersReadError):
        return _record(model, example, Where(rules, computed=False), by_head)
    return _record(model, example, Where(rules, computed=True), by_head)


def _record(
    model: nn.Module, example: tuple[Any, ...], where: Where, by_head: BoolArray | None
) -> tuple[Ledger, dict[Attribute, int]]:
    try:
        shadow = shadow_of(model)
    except Exception as error:
        raise TraceError(
            f"`model` ({type(model).__name__}) cannot be copied: {error}. Remove what it holds that is neither a "
            "tensor, a module nor plain data, such as open files or generators."
        ) from error
    ledger = Ledger()
    if by_head is not None:
        ledger.by_head = by_head
    for name, tensor in (*shadow.named_parameters(), *shadow.named_buffers()):
        ledger.store(name, tensor)
    modules = {n: m for n, m in shadow.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
    attributes = number_attributes(modules)
    _watch(modules, ledger, where)
    where.flow.feed(example)
    with undisturbed(model), torch.no_grad(), SizeRecorder(ledger, where), OperationRecorder(ledger, where):
        try:
            out = shadow(*example)
        except Exception as error:
            if where.was_read:
                raise NumbersReadError from error
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
        raise NumbersReadError
    return ledger, attributes


def _record_training(
    model: nn.Module, shadow: nn.Module, example: tuple[Any, ...], ledger: Ledger, where: Where
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
    with contextlib.suppress(Exception), undisturbed(model), torch.no_grad(), recorders[0], recorders[1]:
        out = shadow.train()(*doubled)
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        ledger.freeze_all([ledger.ids_of(t) for t in tensors], "reaches the model's output in training")
    del ledger.operations[counted:], ledger.mixings[mixed:], ledger.touched[touched:]
    ledger.outputs = outputs
    where.stack.clear()


def _watch(modules: Mapping[str, nn.Module], ledger: Ledger, where: Where) -> None:
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

"""Copies of a model that run in its place, whether their runs repeat, and what the code of a forward pass mentions.

A shadow shares the memory of the parameters until it writes to them.
"""

import contextlib
import dis
import types
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,  # pyright: ignore[reportPrivateUsage]
)
from torch.utils._pytree import tree_map_only

from secateur._outputs import Leaf, output_leaves
from secateur._runtime import add_run_context_, copy_model, run_isolated


def shadow_copy(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode that shares the memory of the parameters: running it leaves the model as it was.

    A forward pass that writes to a parameter, such as a codebook that follows its inputs, changes that of the copy.
    """
    shadow, memory = share_memory(model)
    return add_run_context_(shadow, lambda _: CopyOnWriteMode(memory))


def share_memory(model: nn.Module) -> "tuple[nn.Module, SharedMemory]":
    """Return the copy of `shadow_copy` without what protects the shared memory, which the caller must do."""
    shared = {id(parameter): _alias(parameter) for parameter in model.parameters()}
    shadow = copy_model(model, dict(shared))
    # `eval()` visits every module, which takes longer than the copy; it is needed only if it would change something.
    in_eval = all(
        not module.training and type(module).train is nn.Module.train and type(module).eval is nn.Module.eval
        for module in model.modules()
    )
    shadow = shadow if in_eval else shadow.eval()
    return shadow, SharedMemory(shadow, map(storage_key, filter(_has_storage, shared.values())))


def is_repeatable(model: nn.Module, example: tuple[Any, ...]) -> bool:
    """Return whether two runs of equal copies, under equal seeds, return the same."""
    found: list[dict[str, Leaf]] = []
    for _ in range(2):
        with run_isolated(model), torch.no_grad():
            found.append(output_leaves(shadow_copy(model)(*tree_map_only(Tensor, Tensor.clone, example))))
    first, second = found
    return list(first) == list(second) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a == b
        for a, b in zip(first.values(), second.values(), strict=True)
    )


def storage_key(tensor: Tensor) -> int:
    """Return a number that all tensors on the same memory have in common."""
    # Recorders take the access to a storage for the reading of values.
    with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
        return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    """Return a parameter on the same memory, whose gradient, flags and assigned data are its own."""
    if parameter.is_inference():
        # No recorder sees what is computed with such a tensor.
        with torch.inference_mode(mode=False):
            return nn.Parameter(parameter.clone(), parameter.requires_grad)
    if type(parameter) is not nn.Parameter:
        return parameter
    # Unlike `detach()`, `data` has a version counter of its own.
    twin = nn.Parameter(parameter.data, parameter.requires_grad)
    vars(twin).update(vars(parameter))
    return twin


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and type(tensor) is nn.Parameter


class SharedMemory:
    """The memory that a copy shares with its original.

    Before the first write into it during a run, its values are saved. After the run, the parameters of the copy get
    memory of their own, with the new values, and the saved values return to the shared memory. So views of a parameter,
    which the model may have made before it writes, see the new values during the run.

    Attributes:
        was_written: Whether any run has written to it.

    Args:
        shadow: The copy.
        keys: The `storage_key` of everything shared.
    """

    def __init__(self, shadow: nn.Module, keys: Iterable[int]) -> None:
        # A weak reference, because a cycle would keep the memory of every copy until garbage is collected.
        self._shadow = weakref.ref(shadow)
        self._keys = frozenset(keys)
        self.was_written = False
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def before_call(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Save what a call is about to write to."""
        for tensor in written_tensors(func, args, kwargs):
            key = storage_key(tensor)
            if key in self._keys and key not in self._saved:
                with _unseen():
                    storage = tensor.untyped_storage()
                    self._saved[key] = storage, storage.clone()
                self.was_written = True

    def after_run(self) -> None:
        """Give the new values to the copy, and the saved ones back."""
        shadow = self._shadow()
        if not self._saved or shadow is None:
            return
        with _unseen():
            # First the new values are copied out, then the old ones return. The other way around the new ones would be
            # lost.
            for parameter in shadow.parameters():
                if _has_storage(parameter) and storage_key(parameter) in self._saved:
                    parameter.data = parameter.data.clone()
            for storage, before in self._saved.values():
                storage.copy_(before)
        self._saved.clear()


@contextlib.contextmanager
def _unseen() -> Generator[None]:
    """Hide calls from all recorders of a run."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
        yield


class CopyOnWriteMode(TorchDispatchMode):
    """A mode in which one run of a copy does not change the memory that it shares."""

    def __init__(self, memory: SharedMemory) -> None:
        super().__init__()
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._memory.before_call(func, args, kwargs)
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._memory.after_run()


def written_tensors(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an ATen call writes to."""
    found: list[Tensor] = []
    for position, name in written_arguments(func):
        given = args[position] if position < len(args) else kwargs.get(name)
        found += [t for t in (given if isinstance(given, list | tuple) else (given,)) if isinstance(t, Tensor)]
    return [tensor for tensor in found if tensor.layout == torch.strided]


@lru_cache(4096)
def written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Return the position and name of the arguments that an ATen call writes to."""
    if not func._schema.is_mutable:
        return ()
    arguments = enumerate(func._schema.arguments)
    return tuple((n, a.name) for n, a in arguments if a.alias_info is not None and a.alias_info.is_write)


KEEPS_STATE = "<state that all instances share>"
"""Stands among the names for code that writes to global variables, or uses containers, iterators or classes there."""
_SHARED_KINDS = (list, dict, set, Iterator)
_CODE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def mentioned_names(model: nn.Module) -> frozenset[str]:
    """Return all names and texts in the code of a model's modules that is not PyTorch's own.

    These are the methods of the classes of its modules that `forward` reaches, hooks, functions that are attributes,
    and the functions that these call. PyTorch's own layers are left out: they treat every channel alike in both modes,
    and depend on nothing but their inputs, parameters and the seeded random generators.
    """
    names: set[str] = set()
    for module in model.modules():
        names |= _class_names(type(module))
        held = vars(module)
        functions = [value for value in held.values() if isinstance(value, _CODE)]
        functions += [hook for kind in ("_forward_hooks", "_forward_pre_hooks") for hook in held.get(kind, {}).values()]
        for function in functions:
            names |= _function_names(function, set())
        if isinstance(module, torch.jit.ScriptModule):
            names |= {"training", KEEPS_STATE}  # Its code is not Python's.
    return frozenset(names)


@lru_cache(1024)
def _class_names(kind: type) -> frozenset[str]:
    """Return the names in the methods that a forward pass of a class can reach, by their names."""
    names: set[str] = set()
    pending, done = {"forward", "__call__", "__getattr__", "__getattribute__"}, set[str]()
    while pending:
        name = pending.pop()
        done.add(name)
        for owner in kind.__mro__:
            if owner is object or owner.__module__.startswith("torch.") or name not in vars(owner):
                continue
            found = _function_names(vars(owner)[name], set())
            # A method that names its own class may keep a count in an attribute of the class, which all instances
            # share.
            found |= {KEEPS_STATE} if owner.__name__ in found else set()
            pending |= found - done
            names |= found
    return frozenset(names)


def _function_names(value: Any, seen: set[int]) -> set[str]:
    """Return the names and texts in the code of a function and of what it calls, or its own name if it is built in."""
    # Look behind properties, methods and decorators.
    value = getattr(value, "fget", None) or getattr(value, "__func__", None) or getattr(value, "__wrapped__", value)
    if isinstance(value, types.BuiltinFunctionType):
        return {value.__name__}
    if not isinstance(value, types.FunctionType) or id(value) in seen or value.__module__.startswith("torch."):
        return set()
    seen.add(id(value))
    names: set[str] = set()
    codes = [value.__code__]
    while codes:
        code = codes.pop()
        names.update(code.co_names, (c for c in code.co_consts if isinstance(c, str)))
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        if any(step.opname == "STORE_GLOBAL" for step in dis.get_instructions(code)):
            names.add(KEEPS_STATE)
    for name in tuple(names):
        used = value.__globals__.get(name)
        names |= {KEEPS_STATE} if isinstance(used, _SHARED_KINDS) else _function_names(used, seen)
    for cell in value.__closure__ or ():
        try:
            held = cell.cell_contents
        except ValueError:  # Not assigned yet.
            continue
        names |= {KEEPS_STATE} if isinstance(held, _SHARED_KINDS) else _function_names(held, seen)
    return names

"""What the code of a model's forward pass mentions, to tell what it cannot depend on."""

import dis
import types
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import nn

KEEPS_STATE = "<state that all instances share>"
"""Stands among the names for code that writes to global variables, or uses containers, iterators or classes there."""
_SHARED_KINDS = (list, dict, set, Iterator)


def mentioned_names(model: nn.Module) -> frozenset[str]:
    """Return all names and texts in the code of a model's modules that is not PyTorch's own.

    These are the methods of the classes of its modules, hooks, functions that are attributes, and the functions that
    these call. PyTorch's own layers are left out: they treat every channel alike in both modes and depend on nothing
    but their inputs, parameters and the seeded random generators.
    """
    names: set[str] = set()
    for module in model.modules():
        names |= _class_names(type(module))
        held = vars(module)
        functions = [value for value in held.values() if isinstance(value, types.FunctionType | types.MethodType)]
        functions += [hook for kind in ("_forward_hooks", "_forward_pre_hooks") for hook in held.get(kind, {}).values()]
        for function in functions:
            names |= _function_names(function, set())
        if isinstance(module, torch.jit.ScriptModule):
            names |= {"training", KEEPS_STATE}  # Its code is not Python's.
    return frozenset(names)


@lru_cache(1024)
def _class_names(kind: type) -> frozenset[str]:
    names: set[str] = set()
    for owner in kind.__mro__:
        if owner is object or owner.__module__.startswith("torch."):
            continue
        for name, value in vars(owner).items():
            if name not in {"__init__", "__repr__", "extra_repr"}:
                names |= _function_names(value, set())
        names |= {KEEPS_STATE} if owner.__name__ in names else set()
    return frozenset(names)


def _function_names(value: Any, seen: set[int]) -> set[str]:
    """Return the names and texts in the code of a function and of what it calls, or its own name if it is built in."""
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

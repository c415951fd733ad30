"""Deep copies of models, quicker than `copy.deepcopy` because most of what a module holds is plain or empty."""

import copy
from collections import OrderedDict
from functools import lru_cache
from typing import Any

import torch
from torch import nn

_PLAIN = frozenset({int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device, type(torch.relu)})
_CONTAINERS = frozenset({dict, OrderedDict, set, list})
_USUAL = ("__setstate__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__")
_CONVOLUTION = nn.modules.conv._ConvNd  # pyright: ignore[reportPrivateUsage]
"""Its ``__setstate__`` only adds what very old pickles lack, so that its copies are the usual ones."""


def copy_model(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy; what is in ``memo`` is taken from there.

    Args:
        model: Left as it is.
        memo: By identity, what stands for an object of the model in the copy, as for `copy.deepcopy`.
    """
    known = memo.get(id(model))
    if known is not None:
        return known
    kind = type(model)
    if not _copies_as_usual(kind):
        return copy.deepcopy(model, memo)  # it has its own idea of a copy
    twin = kind.__new__(kind)
    memo[id(model)] = twin
    held = vars(twin)
    for name, value in vars(model).items():
        kind = type(value)
        if kind in _CONTAINERS and not value:
            held[name] = memo.setdefault(id(value), kind())
        elif kind in _PLAIN or _is_plain(value):
            held[name] = value
        elif name == "_modules":
            children = value.items()
            held[name] = type(value)(
                (key, None if child is None else copy_model(child, memo)) for key, child in children
            )
        elif name in {"_parameters", "_buffers"}:
            held[name] = type(value)((key, _copy_tensor(tensor, memo)) for key, tensor in value.items())
        else:
            held[name] = copy.deepcopy(value, memo)
    return twin


@lru_cache(256)
def _copies_as_usual(kind: type[nn.Module]) -> bool:
    own = [name for name in _USUAL if getattr(kind, name, None) is not getattr(nn.Module, name, None)]
    return not own or (own == ["__setstate__"] and kind.__setstate__ is _CONVOLUTION.__setstate__)


def _copy_tensor(tensor: Any, memo: dict[int, Any]) -> Any:
    known = memo.get(id(tensor))
    if known is not None:
        return known
    plain = type(tensor) is torch.Tensor and not tensor.requires_grad and tensor.is_contiguous()
    if not plain or tensor.untyped_storage().nbytes() != tensor.nbytes:
        return copy.deepcopy(tensor, memo)  # a view must go on sharing its storage
    memo[id(tensor)] = tensor.clone()
    return memo[id(tensor)]


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_plain, value)))

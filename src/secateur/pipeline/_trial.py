"""The first run of a model that a stranger described: it runs on images of its size, within a bound of memory."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from secateur.errors import ArtifactError

MOST_BYTES = 4 * 2**30
"""Of one tensor that a layer makes."""


def check_runs(model: nn.Module, size: Sequence[int]) -> None:
    """Refuse a model that cannot run on one image, or would make a tensor of more than `MOST_BYTES`.

    Before an operation runs, its shapes alone do (on the meta device), so that nothing is allocated to find out.

    Args:
        model: In eval mode, on the CPU.
        size: Channels, height, width.

    Raises:
        ArtifactError: If it does not run, or does not give numbers for one image.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _Bounded():
            found: object = model(torch.zeros(1, *size))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ArtifactError(
            f"The model must run on an image of `input.shape`, {'x'.join(map(str, size))}, as secateur.json says; it "
            f"stopped with: {reason}. The artifact is damaged: copy it again, or make it again."
        ) from error
    del found


class _Bounded(TorchDispatchMode):
    """Stops an operation before it makes a tensor that is too large."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        settings = dict(kwargs or {})
        for tensor in _shapes_of(func, args, settings):
            if math.prod(tensor.shape) * tensor.element_size() > MOST_BYTES:
                raise ValueError(f"{func} would make a tensor of shape {tuple(tensor.shape)}")
        return func(*args, **settings)


def _shapes_of(func: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any]) -> list[Tensor]:
    """What an operation would give, as tensors without numbers; nothing if that depends on numbers."""
    found: list[Tensor] = []
    try:
        given, named = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, settings))
        if "device" in named:
            named["device"] = torch.device("meta")
        tree_map_only(torch.Tensor, found.append, func(*given, **named))
    except Exception:  # the operation itself will say what is wrong with it
        return []
    return found

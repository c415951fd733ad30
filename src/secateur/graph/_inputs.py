"""What comes in at the door: example inputs of any form, and models that cannot be traced as they are."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from secateur.errors import TraceError

Example = torch.Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""One input; a tuple of positional inputs; a mapping of inputs by name; a list is one input (as detectors take it)."""


def positional(model: nn.Module, example: Example) -> tuple[Any, ...]:
    """The example as positional arguments at batch 1.

    Of tensors that share the first dimension of the first one, only the first item is taken. What lies inside a list
    or dict is passed on as it is.

    Raises:
        TraceError: If there is no tensor, an empty one, or a name that the model's forward does not take.
    """
    if isinstance(example, Mapping):
        arguments = _by_position(model, example)
    else:
        arguments = example if isinstance(example, tuple) else (example,)
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise TraceError(f"`example` must hold at least one tensor; got {type(example).__name__}. Pass an input batch.")
    if tensors[0].numel() == 0:
        raise TraceError(
            f"`example` must hold at least one image; got a batch of shape {tuple(tensors[0].shape)}. "
            "Pass an input batch."
        )
    direct = [t for t in arguments if isinstance(t, torch.Tensor) and t.dim()]
    batch = direct[0].shape[0] if direct else 1
    return tuple(t[:1] if isinstance(t, torch.Tensor) and t.dim() and t.shape[0] == batch else t for t in arguments)


def _by_position(model: nn.Module, named: Mapping[str, Any]) -> tuple[Any, ...]:
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(**named)
    except TypeError as error:
        raise TraceError(
            f"`example` must name arguments of the model's forward{signature}; got {', '.join(named)}: {error}. "
            "A dict that is itself the one argument goes into a tuple: ({...},)."
        ) from error
    bound.apply_defaults()
    if bound.kwargs:
        raise TraceError(
            f"`example` names {', '.join(bound.kwargs)}, which the model's forward takes by keyword only. "
            "Wrap the model in a module whose forward takes it by position."
        )
    return bound.args


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be traced as it is, with the way out.

    Raises:
        TraceError: For wrapped, compiled, quantised or lazy modules, weights on the meta device, or no parameters.
    """
    absent = any(is_lazy(tensor) or tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    for name, module in model.named_modules():
        reason = _kind_of_obstacle(module) or (_absent_weights(module) if absent else None)
        if reason:
            where = f"the module {name!r} of `model`" if name else "`model`"
            raise TraceError(f"{where} ({type(module).__name__}) {reason}")
    if next(model.parameters(), None) is None:
        raise TraceError(f"`model` ({type(model).__name__}) has no parameters; there is nothing to prune.")


def _kind_of_obstacle(module: nn.Module) -> str | None:
    kind = type(module)
    origin = f"{kind.__module__}.{kind.__qualname__}"
    return next((reason for pattern, reason in _OBSTACLES.items() if origin.startswith(pattern)), None)


def _absent_weights(module: nn.Module) -> str | None:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if any(is_lazy(tensor) for tensor in own):
        return "has parameters without a shape yet. Run it once on real input first."
    if any(tensor.is_meta for tensor in own):
        return "has weights on the meta device, that is none. Load the weights first: model.to_empty(...), then load."
    return None


_OBSTACLES = {
    "torch._dynamo.eval_frame.OptimizedModule": (
        "is compiled. Pass the module that was compiled (`model._orig_mod`) and compile the result."
    ),
    "torch.nn.parallel.": "is a parallel wrapper. Pass the module inside (`model.module`) and wrap the result.",
    "torch.distributed.fsdp.": "is sharded. Prune the plain module before it is wrapped.",
    "torch.ao.nn.quantized": "is quantised. Prune the floating-point model and quantise the result.",
    "torch.ao.nn.intrinsic.quantized": "is quantised. Prune the floating-point model and quantise the result.",
}

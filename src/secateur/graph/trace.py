"""`trace` finds the channel graph of a model from one forward pass on an example input.

This module checks the model and the example, and decides whether attention is cut by whole heads or by their
dimensions. `_record` runs the model, and `_solve` derives the graph from the record.
"""

import inspect
import math
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from secateur._arrays import BoolArray, connected_components
from secateur._caller_state import in_default_state
from secateur._runtime import check_hashable
from secateur.errors import TraceError
from secateur.graph._ledger import Ledger, Rule
from secateur.graph._record import record
from secateur.graph._shadow import KEEPS_STATE, is_repeatable, mentioned_names
from secateur.graph._solve import NOT_CONSUMED, solve
from secateur.graph.graph import ChannelGraph

Example = torch.Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""One input (a list is one, as detectors take it), a tuple of positional inputs, or a mapping of inputs by name."""


def positional_arguments(model: nn.Module, example: Example) -> tuple[Any, ...]:
    """Return the example as positional arguments at batch 1.

    All tensors whose first dimension has the size of the first tensor's are reduced to their first item. Lists and
    dicts are passed unchanged.

    Raises:
        TraceError: If there is no tensor, an empty one, or a name that the model's forward does not take.
    """
    if isinstance(example, Mapping):
        arguments = _bind_by_name(model, example)
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
    # Only direct arguments define the batch: tensors in a list are separate images of different sizes.
    direct = [t for t in arguments if isinstance(t, torch.Tensor) and t.dim()]
    batch = direct[0].shape[0] if direct else 1
    return tuple(t[:1] if isinstance(t, torch.Tensor) and t.dim() and t.shape[0] == batch else t for t in arguments)


def _bind_by_name(model: nn.Module, named: Mapping[str, Any]) -> tuple[Any, ...]:
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(**named)
    except TypeError as error:
        raise TraceError(
            f"`example` must name arguments of the model's forward{signature}; got {', '.join(named)}: {error}. "
            "A dict that is itself the one argument goes into a tuple: ({...},)."
        ) from error
    # Arguments after a missing one need their defaults to be passed by position.
    bound.apply_defaults()
    if bound.kwargs:
        raise TraceError(
            f"`example` names {', '.join(bound.kwargs)}, which the model's forward takes by keyword only. "
            "Wrap the model in a module whose forward takes it by position."
        )
    return bound.args


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be traced as it is, and say what to do.

    Raises:
        TraceError: For anything but a module, for wrapped, compiled, scripted, quantized or lazy modules, for weights
            on the meta device, or without parameters.
        ModelError: For modules that PyTorch cannot list.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        exported = " Pass its module: `exported.module()`." if hasattr(model, "module") else ""
        raise TraceError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.{exported}")
    check_hashable(model)
    absent = any(is_lazy(tensor) or tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    for name, module in model.named_modules():
        reason = _find_obstacle(module) or (_absent_weights(module) if absent else None)
        if reason:
            where = f"the module {name!r} of `model`" if name else "`model`"
            raise TraceError(f"{where} ({type(module).__name__}) {reason}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(f"`model` ({type(model).__name__}) {_SCRIPTED}")
    if next(model.parameters(), None) is None:
        raise TraceError(f"`model` ({type(model).__name__}) has no parameters; there is nothing to prune.")


def _find_obstacle(module: nn.Module) -> str | None:
    kind = type(module)
    origin = f"{kind.__module__}.{kind.__qualname__}"
    named = next((reason for pattern, reason in _OBSTACLES.items() if origin.startswith(pattern)), None)
    if named is not None:
        return named
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if isinstance(module, torch.jit.ScriptModule):
        # A scripted activation has no channels of its own; any other may hold sizes in code that nobody can read.
        return _SCRIPTED if any(True for _ in module.parameters()) or any(True for _ in module.buffers()) else None
    if vars(module).get("_compiled_call_impl") is not None or hasattr(
        vars(module).get("forward"), "_torchdynamo_orig_callable"
    ):
        return "is compiled in place. Prune the module before it is compiled, and compile the result."
    packed = any(isinstance(value, torch.ScriptObject) for value in vars(module).values())
    if packed or any(tensor.is_quantized for tensor in own):
        return _QUANTIZED
    strange = next((t for t in own if _dispatch_of(type(t)) is not _dispatch_of(torch.Tensor)), None)
    if strange is not None:
        return (
            f"holds weights as {type(strange).__name__}, a type of tensor of its own (sharded, quantized). "
            "Prune the model with plain weights and convert the result."
        )
    return None


def _dispatch_of(kind: type[torch.Tensor]) -> Any:
    return getattr(kind, "__torch_dispatch__", None)


def _absent_weights(module: nn.Module) -> str | None:
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if any(is_lazy(tensor) for tensor in own):
        return "has parameters without a shape yet. Run it once on real input first."
    if any(tensor.is_meta for tensor in own):
        return "has weights on the meta device, that is none. Load the weights first: model.to_empty(...), then load."
    return None


_QUANTIZED = "is quantized. Prune the floating-point model and quantize the result."
_SCRIPTED = (
    "is TorchScript, whose code cannot be changed. Pass the eager module that was scripted or traced, and script the "
    "result."
)
_OBSTACLES = {
    "torch._dynamo.eval_frame.OptimizedModule": (
        "is compiled. Pass the module that was compiled (`model._orig_mod`) and compile the result."
    ),
    "torch.nn.parallel.": "is a parallel wrapper. Pass the module inside (`model.module`) and wrap the result.",
    "torch.distributed.fsdp.": "is sharded. Prune the plain module before it is wrapped.",
    "torch.ao.nn.quantized": _QUANTIZED,
    "torch.ao.nn.intrinsic.quantized": _QUANTIZED,
    "torch.export.unflatten.": "was exported. Pass the flat module (`exported.module()`) or the one that was exported.",
}


_UNREPEATABLE = frozenset({
    KEEPS_STATE, "__class__", "time", "time_ns", "perf_counter", "monotonic", "urandom", "default_rng", "uuid1",
    "uuid4", "secrets", "SystemRandom", "now", "today", "Random", "RandomState", "Generator", "seed",
})  # fmt: skip
"""Names in the code of a model whose runs may differ although inputs, parameters and random seeds are equal."""


def check_repeatable(model: nn.Module, example: tuple[Any, ...]) -> None:
    """Refuse a model that returns something else on every run, even under one random seed.

    Raises:
        TraceError: If it does so.
    """
    try:
        repeatable = is_repeatable(model, example)
    except Exception:
        return  # The recording runs it again, and says where it fails.
    if not repeatable:
        raise TraceError(
            f"`model` ({type(model).__name__}) must return the same for the same input and the same random seed; it "
            "does not. Its forward may use the time, a counter outside of the module, or random numbers that no seed "
            "determines. Make it repeatable in evaluation mode, because a cut of it could not be verified."
        )


class HeadUnit(Enum):
    """The unit in which attention is cut."""

    DIMENSION = "dimension"
    """The same dimensions of every head, unless that would change the scale of the attention; then whole heads."""
    HEAD = "head"
    """Whole heads."""


@in_default_state
def trace(
    model: nn.Module | Any,  # What is no module is refused below, with the reason.
    example: Example,
    *,
    heads: HeadUnit = HeadUnit.DIMENSION,
    rules: Mapping[str, Rule] = MappingProxyType({}),
    allow_not_run: bool = False,
) -> ChannelGraph:
    """Find which channels of which tensors must be kept or removed together.

    The model runs once, in eval mode, at batch 1, while every operation is recorded. Any Python control flow is
    allowed. The operations that do most of the arithmetic, such as convolutions, are computed only if the model reads
    values that depend on them. The model is not changed: a copy that shares its parameters runs in its place, and the
    random state is restored.

    Args:
        model: A trained network.
        example: One input, a tuple of positional inputs, or a mapping of inputs by name; of a batch, the first item is
            used.
        heads: The unit in which attention is cut. Where fewer dimensions per head would change the scale of the
            attention (`scaled_dot_product_attention` computes it from their number by default), whole heads are used.
        rules: Channel rules of further ATen or custom operations, by their name (``relu``, ``my_lib::my_op``); see
            docs/rules.md. They take precedence over the built-in rules.

        allow_not_run: Whether channels may be removed that a module may read which the example does not run, such as
            one of two branches. If not, all axes with as many channels as one of its weights are frozen. A module that
            no code mentions never matters.

    Returns:
        The channel graph. It also contains the channels that cannot be removed safely, with the reason.

    Raises:
        TraceError: If the model cannot run the example, or must be unwrapped or loaded first.
    """
    check_model(model)
    single = positional_arguments(model, example)
    # Two more runs take time, so only a model whose code mentions a reason is run twice.
    if not _UNREPEATABLE.isdisjoint(mentioned_names(model)):
        check_repeatable(model, single)
    ledger, attributes = record(model, single, rules)
    by_head = _find_head_ids(ledger, heads)
    # Which ids belong to attention is known only after a first run; the second one treats them by whole heads.
    if by_head.any():
        ledger, attributes = record(model, single, rules, by_head=by_head)
    graph = solve(ledger, attributes, single)
    if ledger.attended and _may_gain_from_heads(graph):
        # Try whole heads everywhere, and keep the graph in which more parameters can be removed.
        ledger, attributes = record(model, single, rules, by_head=_find_head_ids(ledger, HeadUnit.HEAD))
        # If they are equal, `max` returns its first argument, in which heads are cut by their dimensions.
        graph = max(graph, solve(ledger, attributes, single), key=_count_prunable)
    return graph if allow_not_run or not graph.unseen else _without_cuts_beside(model, graph)


def _without_cuts_beside(model: nn.Module, graph: ChannelGraph) -> ChannelGraph:
    """Return the graph without cuts that a module which did not run could not take, should it run after all."""
    names, unseen = mentioned_names(model), frozenset(graph.unseen)
    # What did not run has no ids. Only the number of its channels tells which axes it might read.
    lengths: dict[int, str] = {}
    for parameter in graph.unseen:
        owner = _largest_unseen(model, parameter, unseen)
        # Items of containers are found by the name of the container.
        spoken = [part for part in owner.split(".") if part and not part.isdecimal()]
        if spoken and spoken[-1] in names:
            # The first two dimensions carry channels; further ones are those of kernels.
            lengths.update(dict.fromkeys((extent.at(graph.sizes) for extent in graph.tensors[parameter][:2]), owner))
    met = [axis.size for axis in graph.axes]
    beside = {name: lengths[size] for name, size in zip(graph.by_name, met, strict=True) if size in lengths}
    for activation in graph.activations.values():
        owner = lengths.get(activation.shape[activation.dim])
        if owner is not None:
            beside.update((graph.axes[n].name, owner) for n in set(activation.axis.tolist()) if n >= 0)
    reason = (
        "which the example does not run, may read or add them. Trace an example that runs it, or allow_not_run=True"
    )
    return graph.with_frozen({name: f"{owner}, {reason}" for name, owner in beside.items()})


def _largest_unseen(model: nn.Module, parameter: str, unseen: frozenset[str]) -> str:
    """Return the largest module none of whose parameters was used; empty if there is none."""
    largest, path = "", parameter.rpartition(".")[0]
    while path and all(f"{path}.{name}" in unseen for name, _ in model.get_submodule(path).named_parameters()):
        largest, path = path, path.rpartition(".")[0]
    return largest


def _find_head_ids(ledger: Ledger, heads: HeadUnit) -> BoolArray:
    """Return (ids,), whether each id belongs to attention that must be cut by whole heads."""
    marked = np.zeros(ledger.count, dtype=bool)
    if not ledger.attended:
        return marked
    root = connected_components(ledger.count, ledger.ties)
    scaled = np.zeros(ledger.count, dtype=bool)
    for ids in ledger.scaled_ids():
        scaled[root[ids]] = True
    for module, vectors in ledger.attended.items():
        roots = root[np.concatenate(vectors)] if vectors else np.zeros(0, np.int64)
        if heads is HeadUnit.HEAD or module in ledger.scaling or scaled[roots].any():
            marked[roots] = True
    return marked[root]


def _may_gain_from_heads(graph: ChannelGraph) -> bool:
    """Return whether cutting whole heads might allow more than cutting their dimensions.

    This is possible if an axis has a single channel, because layers divide heads in different ways, which ties all
    channels together, or if the dimensions of queries and keys are read by no layer.
    """
    tied = (axis.size == 1 and any(site.index.size > 1 for site in axis.sites) for axis in graph.axes)
    return any(tied) or any(axis.frozen_because == NOT_CONSUMED for axis in graph.axes)


def _count_prunable(graph: ChannelGraph) -> int:
    """Return the number of parameters in tensors with at least one prunable dimension."""
    sizes = graph.sizes
    free = (extents for extents in graph.tensors.values() if any(extent.terms for extent in extents))
    return sum(math.prod(extent.at(sizes) for extent in extents) for extents in free)

"""Verification of a cut: the sliced model must equal the original in which the removed channels are zeroed."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur._runtime import copy_model, run_isolated
from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph._record import shadow_copy
from secateur.graph._rules_layers import compute_over_kept_channels_
from secateur.graph.graph import ChannelGraph
from secateur.prune.masked_reference import ExpectedCalls, zero_branches_, zero_weights_
from secateur.prune.slice import copy_with_tensors, kept_positions_by_tensor, mask_readers, mask_removed

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
"""Largest |sliced - masked| / largest |masked|. Sums of the same terms in another order differ by a few ulps per
layer; a wrong channel causes differences of percents (rolling one bias by one: 2e-2)."""
FLOAT64_TOLERANCE = 1e-9
"""Tolerance of the second comparison in float64, which is made if float32 exceeds its tolerance."""


@dataclass(frozen=True)
class Verification:
    """How closely the sliced model follows the masked original on the example input.

    Attributes:
        max_abs: Largest absolute difference of the outputs.
        max_rel: ``max_abs`` divided by the largest absolute output.
        tolerance: The bound on ``max_rel``.
        dtype: The precision of the comparison.
        frozen: (axis, reason) pairs that had to be frozen until the cut was correct.
        shape: The shape of the input: that of the example, or of a crop on which the models make the same calls.
    """

    max_abs: float
    max_rel: float
    tolerance: float
    dtype: str
    frozen: tuple[tuple[str, str], ...] = ()
    shape: tuple[int, ...] = ()

    def __repr__(self) -> str:
        names = ", ".join(name for name, _ in self.frozen[:5]) + (", ..." if len(self.frozen) > 5 else "")
        frozen = f", frozen: {names}" if self.frozen else ""
        return f"Verification(max_rel={self.max_rel:.1e} <= {self.tolerance:.0e}, {self.dtype}{frozen})"


@dataclass(frozen=True)
class Mismatch:
    """A difference between the sliced and the masked model: the module where it first occurs, and a description."""

    module: str
    what: str


def compare_outputs(
    model: nn.Module, small: nn.Module, graph: ChannelGraph, architecture: Architecture
) -> Verification | Mismatch:
    """Compare the outputs of both models on the example, in float64 if rounding may be the reason of a difference.

    Whether the channels are right does not depend on the number of pixels. So a crop of the images is enough if the
    models run on it, make the same calls as when traced, and agree. In any other case the whole example decides.
    """
    example = graph.example
    sliced = copy.copy(small) if not small.training else copy_model(small).eval()
    found = _verify_on_crop(model, sliced, graph, architecture)
    if found is not None:
        return found
    reference, masked, want = _make_reference(model, graph, architecture)
    if not want:
        raise SurgeryError("the model's output must hold a floating-point tensor to compare cuts by; it holds none.")
    try:
        got = _outputs(sliced, example)
    except Exception as error:
        return Mismatch(_find_failing_module(sliced, example), f"the cut model does not run: {error}")
    dtype = want[0].dtype
    found = _difference(want, got, TOLERANCES.get(dtype, 1e-5), dtype)
    found = found and replace(found, shape=graph.example_shape)
    if found is not None and found.max_rel <= found.tolerance:
        # Fewer channels change the order of sums, so bit-equal outputs are suspicious, unless only blocks were removed.
        doubtful = found.max_abs == 0 and (not architecture.removed_blocks or not any(t.any() for t in want))
        return _verify_features(found, masked, sliced, graph, architecture) if doubtful else found
    if found is not None and dtype == torch.float32:
        masked = reference(copy_with_tensors(model, {}).double(), graph, architecture)
        sliced = copy_model(sliced).double()
        example = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, example)
        want, got = _outputs(masked, example), _outputs(sliced, example)
        found = _difference(want, got, FLOAT64_TOLERANCE, torch.float64)
        found = found and replace(found, shape=graph.example_shape)
        if found is not None and found.max_rel <= found.tolerance:
            return found
    what = "output shapes differ" if found is None else f"outputs differ by {found.max_rel:.1e} (relative)"
    return Mismatch(_first_difference(masked, sliced, graph, architecture, example), what)


def _verify_on_crop(
    model: nn.Module, sliced: nn.Module, graph: ChannelGraph, architecture: Architecture
) -> Verification | None:
    """Compare both models on a crop of the images; return None if that is not conclusive."""
    example = tuple(map(_center_crop, graph.example))
    if all(part is whole for part, whole in zip(example, graph.example, strict=True)):
        return None
    calls = ExpectedCalls(graph.calls)
    masked = _zero_while_running(model, graph, architecture, calls)
    try:
        want, got = _outputs(masked, example), _outputs(sliced, example)
    except Exception:
        return None
    if not calls.complete or not want or not _all_finite(want):
        return None
    dtype = want[0].dtype
    found = _difference(want, got, TOLERANCES.get(dtype, 1e-5), dtype)
    shape = next(tuple(part.shape) for part in example if isinstance(part, torch.Tensor))
    return replace(found, shape=shape) if found is not None and 0 < found.max_rel <= found.tolerance else None


def _center_crop(part: Any) -> Any:
    """Crop images (n, channels, height, width) to at most half of the rows and columns, in multiples of 32."""
    if not isinstance(part, torch.Tensor) or part.dim() != 4 or not part.is_floating_point():
        return part
    height, width = (size // 64 * 32 for size in part.shape[2:])
    top, left = (part.size(2) - height) // 2, (part.size(3) - width) // 2
    middle = part[:, :, top : top + height, left : left + width]
    return middle.contiguous() if middle.numel() else part


def _zero_while_running(
    model: nn.Module, graph: ChannelGraph, architecture: Architecture, expected: ExpectedCalls | None = None
) -> nn.Module:
    """Return the model of `mask_removed` without a second set of weights: it multiplies them by 0 and 1 as it runs."""
    kept = kept_positions_by_tensor(graph, architecture)
    masked = zero_weights_(shadow_copy(model), kept, expected)
    masked = compute_over_kept_channels_(masked, graph, architecture.by_name)
    removed = [graph.blocks_by_name[name] for name in architecture.removed_blocks]
    return zero_branches_(masked, removed) if removed else masked


_Reference = Callable[[nn.Module, ChannelGraph, Architecture], nn.Module]
_REFERENCES: Sequence[_Reference] = (
    _zero_while_running,
    # A weight that is not finite stays so when multiplied by zero.
    lambda *original: mask_removed(*original).eval(),
    # A channel of zeros may be divided by its own norm. Then only what reads it is zeroed.
    lambda *original: mask_readers(*original).eval(),
)
"""Ways to make the masked original, in eval mode; the first one whose outputs are finite is used."""


def _make_reference(
    model: nn.Module, graph: ChannelGraph, architecture: Architecture
) -> tuple[_Reference, nn.Module, list[torch.Tensor]]:
    """Return the first way with finite outputs, the model that it makes, and the outputs."""
    for reference in _REFERENCES:
        masked = reference(model, graph, architecture)
        want = _outputs(masked, graph.example)
        if _all_finite(want):
            return reference, masked, want
    raise SurgeryError("the model's output on the example is not finite (NaN or inf). Check its weights and the input.")


def _verify_features(
    found: Verification, masked: nn.Module, sliced: nn.Module, graph: ChannelGraph, architecture: Architecture
) -> Verification | Mismatch:
    """Compare the outputs of all modules as well, because bit-equal outputs of the models may prove nothing.

    The output of an untrained head, for example, may be constant.
    """
    module = _first_difference(masked, sliced, graph, architecture, graph.example)
    return Mismatch(module, "features differ although the outputs are equal") if module else found


def _all_finite(tensors: list[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def _outputs(model: nn.Module, example: tuple[Any, ...]) -> list[torch.Tensor]:
    with run_isolated(model), torch.no_grad():
        torch.manual_seed(0)
        out = model(*example)
    return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _difference(
    want: list[torch.Tensor], got: list[torch.Tensor], tolerance: float, dtype: torch.dtype
) -> Verification | None:
    if [t.shape for t in want] != [t.shape for t in got] or not want:
        return None
    absolute = max(float((a - b).abs().max()) for a, b in zip(want, got, strict=True) if a.numel())
    scale = max(float(t.abs().max()) for t in want if t.numel())
    relative = absolute / scale if scale > 0 else absolute
    if math.isnan(absolute):
        relative = float("inf")
    return Verification(absolute, relative, tolerance, str(dtype).removeprefix("torch."))


def _find_failing_module(model: nn.Module, example: tuple[Any, ...]) -> str:
    """Return the innermost module whose forward was running when the model raised."""
    stack: list[str] = []
    hooks: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: stack.append(name)

    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(enter(name)))
        hooks.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        _outputs(model, example)
    except Exception:
        return stack[-1] if stack else ""
    finally:
        for hook in hooks:
            hook.remove()
    return ""


def _first_difference(
    masked: nn.Module, sliced: nn.Module, graph: ChannelGraph, architecture: Architecture, example: tuple[Any, ...]
) -> str:
    """Return the first module, in order of execution, whose kept output channels differ; empty if none."""
    seen: dict[str, torch.Tensor] = _capture_outputs(masked, graph, example)
    own = _capture_outputs(sliced, graph, example)
    # Modules in a removed branch have no effect in either model, and may differ.
    idle = {name for block in architecture.removed_blocks for name in graph.blocks_by_name[block].modules}
    masks = graph.kept_masks(architecture.by_name)
    for name, activation in graph.activations.items():
        if name not in seen or name not in own or name in idle:
            continue
        positions = torch.from_numpy(graph.kept_positions(name, architecture.by_name))
        want = seen[name].index_select(activation.dim, positions.to(seen[name].device))
        for channels in activation.others:
            want = want.index_select(channels.dim, torch.from_numpy(channels.kept(masks)).to(want.device))
        if want.shape != own[name].shape:
            return name
        scale = float(want.abs().max()) or 1.0
        if float((want - own[name]).abs().max()) / scale > 1e-4:
            return name
    return ""


def _capture_outputs(model: nn.Module, graph: ChannelGraph, example: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    hooks: list[Any] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            tensor = next((t for t in tree_leaves(out) if isinstance(t, torch.Tensor)), None)
            if tensor is not None:
                # A clone, because in-place activations that follow would overwrite it.
                found[name] = tensor.detach().clone()

        return hook

    for name, module in model.named_modules():
        if name in graph.activations:
            hooks.append(module.register_forward_hook(keep(name)))
    try:
        _outputs(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return found

"""Refit: every layer that lost inputs learns, in closed form, to give what it gave before."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph import ChannelAxis, ChannelGraph, Role, shadow_of
from secateur.surgery._cut import Wound
from secateur.surgery._patches import Sampler, follows_weight, is_plain, positions_per_image, sample_positions
from secateur.surgery._slice import KeptByDim, kept_positions_of_tensors
from secateur.surgery._widen import narrow


@dataclass(frozen=True)
class Refit:
    """Fold the removed channels into the kept ones by least squares, layer by layer.

    For a layer with weight W (output channels x patch) that lost inputs, or reads a stream to which a removed block or
    what is gone of a narrower branch had added,
    with X' the patches it now receives in the already repaired cut model, Y the outputs of the original on the same
    images (kept channels only), and W_S the sliced weight, the new weight is

        W' = argmin  ||Y - X' W'^T||^2 + ridge * mean(diag(X'^T X')) * ||W' - W_S||^2
           = (Y^T X' + r W_S) (X'^T X' + r I)^-1

    solved in float64; a bias is refitted with it as one more input that is always 1. Layers are visited in order of
    execution and see what really arrives after the repairs before them, so errors do not add up. With X' the original
    activations and one weight per channel instead of one per tap, this is the interpolative decomposition
    M = G_SS^-1 G_SP, W' = W_S + W_P M^T.

    Attributes:
        ridge: Pull towards the sliced weight, relative to the mean energy of the inputs; dimensionless, > 0.
        rows_per_unknown: Sampled output positions for each unknown of a layer (all if there are fewer).
        max_passes: Layers beyond this number share a forward pass with their neighbours, so that the cost stays
            linear in the model.

    References:
        He et al., Channel pruning for accelerating very deep networks, arXiv:1707.06168, Eq. (3) (reconstruction
        after selection); the target from the uncut network as in their Section 3.2.
    """

    ridge: float = 1e-3
    rows_per_unknown: int = 64
    max_passes: int = 32

    def heal_(self, small: nn.Module, wound: Wound) -> None:
        """Refit the weights of ``small`` in place."""
        kept = kept_positions_of_tensors(wound.graph, wound.architecture)
        samplers = self._samplers(small, wound, kept)
        if not samplers:
            return
        targets = _targets(shadow_of(wound.original), samplers, wound.images, kept)
        samplers = [sampler for sampler in samplers if sampler.module in targets]
        for group in _groups(samplers, self.max_passes):
            for module, rows in _inputs(small, group, wound.images).items():
                self._solve_(narrow(small, module), rows, targets[module])

    def _samplers(self, small: nn.Module, wound: Wound, kept: dict[str, KeptByDim]) -> list[Sampler]:
        order = layers_that_lost_inputs(small, wound, kept)
        images = sum(len(batch) for batch in wound.images)
        samplers: list[Sampler] = []
        for number, name in enumerate(order):
            shape = wound.graph.activations[name].shape
            layer = narrow(small, name)
            positions = shape[2] * shape[3] if isinstance(layer, nn.Conv2d) else _middle(shape)
            unknowns = int(layer.get_parameter("weight").numel() // layer.get_parameter("weight").size(0))
            wanted = positions_per_image(unknowns, images, self.rows_per_unknown)
            samplers.append(Sampler(name, sample_positions(positions, wanted, seed=number)))
        return samplers

    def _solve_(self, layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        weight = layer.get_parameter("weight")
        sliced = weight.detach().flatten(1).double()
        bias = layer.bias
        if isinstance(bias, Tensor):
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            sliced = torch.cat([sliced, bias.detach().double()[:, None]], 1)
        gram = (inputs.T @ inputs).double()
        cross = (inputs.T @ outputs).double()
        pull = self.ridge * gram.diagonal().mean()
        gram.diagonal().add_(pull)
        solved = torch.linalg.solve(gram, cross + pull * sliced.T).T
        if not bool(torch.isfinite(solved).all()):
            return
        with torch.no_grad():
            if isinstance(bias, Tensor):
                bias.copy_(solved[:, -1])
                solved = solved[:, :-1]
            weight.copy_(solved.reshape(weight.shape))


def _groups(samplers: Sequence[Sampler], most: int) -> list[Sequence[Sampler]]:
    """Neighbours that share a forward pass. The last layer gives the outputs, so it must see all others repaired."""
    first, last = samplers[:-1], samplers[-1:]
    size = max(1, -(-len(first) // max(most - 1, 1)))
    return [*(first[start : start + size] for start in range(0, len(first), size)), last]


def layers_that_lost_inputs(small: nn.Module, wound: Wound, kept: dict[str, KeptByDim]) -> list[str]:
    """Plain layers, in order of execution, that read fewer channels, or channels to which less is added than before."""
    gone = wound.graph.removed_modules(wound.architecture.removed_blocks)
    names = _behind_removed_blocks(wound) | _behind_narrow_branches(wound)
    for axis in wound.graph.prunable:
        for site in axis.sites:
            module, _, parameter = site.tensor.rpartition(".")
            if site.role is Role.INPUT and parameter == "weight" and site.dim in kept.get(site.tensor, {}):
                names.add(module)
    order = (name for name in wound.graph.activations if name in names and not gone(name))
    return [name for name in order if is_plain(narrow(small, name))]


def _behind_removed_blocks(wound: Wound) -> set[str]:
    """Modules that run after a removed block and whose weight reads what the block had added to."""
    graph, found = wound.graph, set[str]()
    for block in (graph.blocks_by_name[name] for name in wound.architecture.removed_blocks):
        tensors = set(block.tensors)
        for axis in graph.axes:
            if any(site.tensor in tensors and site.role is Role.OUTPUT for site in axis.sites):
                found |= _readers_behind(graph, axis, block.modules)
    return found


def _behind_narrow_branches(wound: Wound) -> set[str]:
    """Modules that run after a branch which lost channels that its stream has, and whose weight reads the stream."""
    graph, found = wound.graph, set[str]()
    widths = {**{axis.name: axis.size for axis in graph.axes}, **wound.architecture.widths}
    for axis in graph.axes:
        if axis.into is not None and widths[axis.name] < widths[axis.into]:
            found |= _readers_behind(graph, axis, (axis.outlet,))
    return found


def _readers_behind(graph: ChannelGraph, axis: ChannelAxis, modules: Iterable[str]) -> set[str]:
    """Modules that run after some others and whose weight reads an axis, or the stream that it is added into."""
    place = {name: number for number, name in enumerate(graph.activations)}
    last = max((place[module] for module in modules if module in place), default=len(place))
    stream = axis if axis.into is None else graph.by_name[axis.into]
    readers = (site.tensor.rpartition(".") for site in stream.sites if site.role is Role.INPUT)
    return {module for module, _, name in readers if name == "weight" and place.get(module, -1) > last}


def _targets(
    original: nn.Module, samplers: Sequence[Sampler], images: Sequence[Tensor], kept: dict[str, KeptByDim]
) -> dict[str, Tensor]:
    """What each layer gave in the original: sampled rows, kept output channels."""
    rows: dict[str, list[Tensor]] = {sampler.module: [] for sampler in samplers}
    skipped: set[str] = set()

    def watch(sampler: Sampler, layer: nn.Module, x: Tensor, out: Tensor) -> None:
        if not rows[sampler.module] and not follows_weight(layer, x, out):
            skipped.add(sampler.module)
        found = sampler.rows_of_output(layer, out)
        positions = kept.get(f"{sampler.module}.weight", {}).get(0)
        if positions is not None:
            found = found.index_select(1, torch.from_numpy(positions).to(found.device))
        rows[sampler.module].append(found)

    run_watched(original, samplers, images, watch)
    return {name: torch.cat(parts) for name, parts in rows.items() if name not in skipped}


def _inputs(small: nn.Module, samplers: Sequence[Sampler], images: Sequence[Tensor]) -> dict[str, Tensor]:
    """What arrives at each layer of a group now: sampled patches. The forward pass ends at the last of them."""
    rows: dict[str, list[Tensor]] = {sampler.module: [] for sampler in samplers}

    def watch(sampler: Sampler, layer: nn.Module, x: Tensor, out: Tensor) -> None:
        rows[sampler.module].append(sampler.rows_of_input(layer, x))

    run_watched(small, samplers, images, watch)
    return {name: torch.cat(parts) for name, parts in rows.items()}


class _Enough(Exception):  # noqa: N818
    """Raised inside a forward pass once everything wanted has been seen."""


def run_watched(
    model: nn.Module,
    samplers: Sequence[Sampler],
    images: Sequence[Tensor],
    watch: Callable[[Sampler, nn.Module, Tensor, Tensor], None],
) -> None:
    """Run images and hand over the input and output of some layers; stop after the last of them."""
    waiting = {sampler.module for sampler in samplers}
    seen: set[str] = set()

    def hook(sampler: Sampler) -> Any:
        def forward(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            watch(sampler, layer, args[0].detach(), out.detach())
            seen.add(sampler.module)
            if seen == waiting:
                raise _Enough

        return forward

    with torch.no_grad():
        hooks = [narrow(model, s.module).register_forward_hook(hook(s)) for s in samplers]
        try:
            for batch in images:
                seen.clear()
                try:
                    model(batch)
                except _Enough:
                    continue
        finally:
            for handle in hooks:
                handle.remove()


def _middle(shape: tuple[int, ...]) -> int:
    positions = 1
    for size in shape[1:-1]:
        positions *= size
    return positions

"""Repairs of a cut model in closed form, without training.

`Refit` solves a least-squares problem for every layer that lost inputs, so that its outputs are again what they were.
`RecalibrateBatchNorm` measures the change of the batch-norm statistics and applies it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.graph._record import shadow_copy
from secateur.graph.graph import ChannelAxis, ChannelGraph, Role
from secateur.graph.trace import Example
from secateur.prune.calibration import count_images, run_batch
from secateur.prune.cut import RepairContext
from secateur.prune.narrow_branches import original_module, original_names
from secateur.prune.slice import KeptByDim, kept_positions_by_tensor


@dataclass(frozen=True, eq=False)
class LayerSampler:
    """The output positions of a layer that are sampled, the same ones in the original and the cut model.

    Attributes:
        module: The qualified name of a convolution (2-d, one group) or linear layer.
        positions: (count,) flat indices into the output positions of one image; None for all.
    """

    module: str
    positions: Tensor | None

    def rows_of_output(self, layer: nn.Module, out: Tensor) -> Tensor:
        """Return (samples, output channels). The channels of a linear layer are always the last dimension."""
        if isinstance(layer, nn.Conv2d):
            flat = out.flatten(2)
            if self.positions is not None:
                flat = flat[:, :, self.positions.to(out.device)]
            return flat.transpose(1, 2).reshape(-1, out.size(1))
        flat = out.reshape(out.size(0), -1, out.size(-1))
        if self.positions is not None:
            flat = flat[:, self.positions.to(out.device)]
        return flat.reshape(-1, out.size(-1))

    def rows_of_input(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return (samples, input channels x kernel positions), ordered as ``weight.flatten(1)``."""
        if isinstance(layer, nn.Conv2d):
            return self._patches(layer, x)
        flat = x.reshape(x.size(0), -1, x.size(-1))
        if self.positions is not None:
            flat = flat[:, self.positions.to(x.device)]
        return flat.reshape(-1, x.size(-1))

    def _patches(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
        ph, pw = layer.padding  # type: ignore[misc]
        x = F.pad(x, (int(pw), int(pw), int(ph), int(ph)))
        width = (x.size(3) - dw * (kw - 1) - 1) // sw + 1
        height = (x.size(2) - dh * (kh - 1) - 1) // sh + 1
        where = torch.arange(height * width) if self.positions is None else self.positions
        # Gather only the patches at the sampled positions; `unfold` would make all of them.
        top, left = (where // width) * sh, (where % width) * sw
        rows = top[:, None] + torch.arange(kh).repeat_interleave(kw) * dh
        columns = left[:, None] + torch.arange(kw).repeat(kh) * dw
        index = (rows * x.size(3) + columns).to(x.device)
        taps = x.flatten(2)[:, :, index]
        return taps.permute(0, 2, 1, 3).reshape(-1, x.size(1) * kh * kw)


def is_refittable(layer: nn.Module) -> bool:
    """Return whether the layer is one whose output is weight times patches (+ bias): 2-d convolution or linear."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def computes_from_weight(layer: nn.Module, x: Tensor, out: Tensor) -> bool:
    """Return whether the layer computes what its class does; a subclass may standardize weights or pad by itself."""
    with torch.no_grad():
        # Compare with the class's own forward on one image.
        plain: Any = nn.Conv2d.forward if isinstance(layer, nn.Conv2d) else nn.Linear.forward
        want = plain(layer, x[:1])
        return want.shape == out[:1].shape and torch.allclose(want, out[:1], rtol=1e-3, atol=1e-4)


def sample_positions(count: int, wanted: int, seed: int) -> Tensor | None:
    """Return ``wanted`` of ``count`` positions from a seeded permutation, sorted; None if that is all of them."""
    if wanted >= count:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def positions_per_image(unknowns: int, images: int, rows_per_unknown: int) -> int:
    """Return the number of positions per image that gives about ``rows_per_unknown`` equations per unknown."""
    return max(1, math.ceil(unknowns * rows_per_unknown / max(images, 1)))


_BatchNorm = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True)
class RecalibrateBatchNorm:
    """Update the batch-norm statistics of the cut model by their change relative to the original on the same images.

    The running statistics of a trained model come from many batches of augmented images. Statistics that are measured
    on a few clean images differ from them even without a cut. So both models are measured on the same images with
    batch statistics, and only the *change* is applied:

        mean' = mean + (mean_cut - mean_original),   var' = var * var_cut / var_original

    A model that was not cut does not change at all.

    Attributes:
        eps: Added to both variances before dividing.

    References:
        Recalibration itself: Yu & Huang, arXiv:1903.05134, Section 3.3; Li et al. (EagleEye), arXiv:2007.02491.
        The relative form is ours.
    """

    eps: float = 1e-8

    def apply_(self, small: nn.Module, context: RepairContext) -> None:
        """Update the running statistics of ``small`` in place."""
        before = batch_statistics(context.original, context.images)
        after = batch_statistics(small, context.images)
        kept = kept_positions_by_tensor(context.graph, context.architecture)
        modules, names = dict(small.named_modules()), original_names(small)
        for place, (mean, variance) in after.items():
            name = names[place]
            if name not in before:
                continue
            old_mean, old_variance = before[name]
            # The original has statistics of all channels, the cut model only of the kept ones.
            positions = kept.get(f"{name}.running_mean", {}).get(0)
            if positions is not None:
                chosen = torch.from_numpy(positions).to(old_mean.device)
                old_mean, old_variance = old_mean[chosen], old_variance[chosen]
            layer: Any = modules[place]
            # Only the change is applied, so that nothing happens where the cut had no effect.
            layer.running_mean.add_((mean - old_mean).to(layer.running_mean.dtype))
            ratio = (variance + self.eps) / (old_variance + self.eps)
            layer.running_var.mul_(ratio.to(layer.running_var.dtype))


def _join_single_image(images: Sequence[Example]) -> list[Example]:
    """Join a last batch of one image to the one before: a single value has no variance, and torch refuses it."""
    batches = list(images)
    *_, before, last = [None, *batches][-2:]
    if isinstance(before, Tensor) and isinstance(last, Tensor) and len(last) == 1:
        batches[-2:] = [torch.cat((before, last))]
    return batches


def batch_statistics(model: nn.Module, images: Sequence[Example]) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure the mean and biased variance of every batch-norm input while all batch norms use batch statistics.

    Returns:
        By module name, ((channels,) mean, (channels,) variance), float64, over all images.
    """
    sums: dict[str, list[Any]] = {}
    model = shadow_copy(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.track_running_stats}

    def observe(name: str) -> Any:
        def hook(layer: Any, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().transpose(0, 1).flatten(1).double()
            total = sums.setdefault(name, [0.0, 0.0, 0])
            total[0], total[1] = total[0] + x.sum(1), total[1] + x.square().sum(1)
            total[2] += x.size(1)

        return hook

    for name, layer in layers.items():
        layer.register_forward_pre_hook(observe(name))
        # Without running statistics, a batch norm uses those of the batch in eval mode too.
        layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    with torch.no_grad():
        for batch in _join_single_image(images):
            run_batch(model, batch)
    return {
        name: (total / count, (squares / count - (total / count).square()).clamp_min(0))
        for name, (total, squares, count) in sums.items()
    }


@dataclass(frozen=True)
class Refit:
    """Fold the removed channels into the kept ones by least squares, layer by layer.

    Refitted are layers that lost inputs, or that read a stream to which a removed block or removed channels of a branch
    had been added. Let W_S be the sliced weight (output channels x patch), X' the patches that the layer receives in
    the cut model, whose earlier layers are repaired already, and Y the outputs of the original on the same images (kept
    channels only). The new weight is

        W' = argmin  ||Y - X' W'^T||^2 + ridge * mean(diag(X'^T X')) * ||W' - W_S||^2
           = (Y^T X' + r W_S) (X'^T X' + r I)^-1

    solved in float64; a bias is refitted as the weight of one more input that is always 1. Layers are visited in order
    of execution, with the inputs that result from the repairs before them, so errors do not add up. With X' the
    original activations and one weight per channel instead of one per tap, this is the interpolative decomposition
    M = G_SS^-1 G_SP, W' = W_S + W_P M^T.

    Attributes:
        ridge: Pull toward the sliced weight, relative to the mean energy of the inputs; dimensionless, > 0.
        rows_per_unknown: The number of sampled output positions for each unknown of a layer (all if there are fewer).
        max_passes: The number of forward passes at most. If there are more layers, neighbors share a pass, so that the
            cost is linear in the size of the model.

    References:
        He et al., Channel pruning for accelerating very deep networks, arXiv:1707.06168, Eq. (3) (reconstruction
        after selection); the target from the uncut network as in their Section 3.2.
    """

    ridge: float = 1e-3
    rows_per_unknown: int = 64
    max_passes: int = 32

    def apply_(self, small: nn.Module, context: RepairContext) -> None:
        """Refit the weights of ``small`` in place."""
        kept = kept_positions_by_tensor(context.graph, context.architecture)
        samplers = self._samplers(small, context, kept)
        if not samplers:
            return
        targets = _collect_targets(shadow_copy(context.original), samplers, context.images, kept)
        samplers = [sampler for sampler in samplers if sampler.module in targets]
        for group in _group_samplers(samplers, self.max_passes):
            for module, rows in _collect_inputs(small, group, context.images).items():
                self._solve_(original_module(small, module), rows, targets[module])

    def _samplers(self, small: nn.Module, context: RepairContext, kept: dict[str, KeptByDim]) -> list[LayerSampler]:
        order = find_layers_to_refit(small, context, kept)
        images = sum(map(count_images, context.images))
        samplers: list[LayerSampler] = []
        for number, name in enumerate(order):
            shape = context.graph.activations[name].shape
            layer = original_module(small, name)
            positions = shape[2] * shape[3] if isinstance(layer, nn.Conv2d) else _count_positions(shape)
            unknowns = int(layer.get_parameter("weight").numel() // layer.get_parameter("weight").size(0))
            wanted = positions_per_image(unknowns, images, self.rows_per_unknown)
            samplers.append(LayerSampler(name, sample_positions(positions, wanted, seed=number)))
        return samplers

    def _solve_(self, layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        weight = layer.get_parameter("weight")
        sliced = weight.detach().flatten(1).double()
        bias = layer.bias
        if isinstance(bias, Tensor):
            # The bias is the weight of an input that is always one.
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            sliced = torch.cat([sliced, bias.detach().double()[:, None]], 1)
        # The products are computed in the precision of the model, and only the small matrices in float64.
        gram = (inputs.T @ inputs).double()
        cross = (inputs.T @ outputs).double()
        pull = self.ridge * gram.diagonal().mean()
        gram.diagonal().add_(pull)
        solved = torch.linalg.solve(gram, cross + pull * sliced.T).T
        # A singular system leaves the sliced weight, which is the cut without repair.
        if not bool(torch.isfinite(solved).all()):
            return
        with torch.no_grad():
            if isinstance(bias, Tensor):
                bias.copy_(solved[:, -1])
                solved = solved[:, :-1]
            weight.copy_(solved.reshape(weight.shape))


def _group_samplers(samplers: Sequence[LayerSampler], most: int) -> list[Sequence[LayerSampler]]:
    """Group neighbors that share a forward pass; the last layer is alone, as it must see all others repaired."""
    first, last = samplers[:-1], samplers[-1:]
    size = max(1, -(-len(first) // max(most - 1, 1)))
    return [*(first[start : start + size] for start in range(0, len(first), size)), last]


def find_layers_to_refit(small: nn.Module, context: RepairContext, kept: dict[str, KeptByDim]) -> list[str]:
    """Return the layers to refit, in order of execution: those that read fewer channels, or sums of fewer branches."""
    gone = context.graph.removed_modules(context.architecture.removed_blocks)
    names = _readers_after_blocks(context) | _readers_after_branches(context)
    for axis in context.graph.prunable:
        for site in axis.sites:
            module, _, parameter = site.tensor.rpartition(".")
            if site.role is Role.INPUT and parameter == "weight" and site.dim in kept.get(site.tensor, {}):
                names.add(module)
    order = (name for name in context.graph.activations if name in names and not gone(name))
    return [name for name in order if is_refittable(original_module(small, name))]


def _readers_after_blocks(context: RepairContext) -> set[str]:
    """Return the modules that run after a removed block and whose weight reads the sum that the block was part of."""
    graph, found = context.graph, set[str]()
    for block in (graph.blocks_by_name[name] for name in context.architecture.removed_blocks):
        tensors = set(block.tensors)
        for axis in graph.axes:
            if any(site.tensor in tensors and site.role is Role.OUTPUT for site in axis.sites):
                found |= _readers_after(graph, axis, block.modules)
    return found


def _readers_after_branches(context: RepairContext) -> set[str]:
    """Return the modules that run after a branch with fewer channels than its stream, and read the stream."""
    graph, found = context.graph, set[str]()
    widths = {**{axis.name: axis.size for axis in graph.axes}, **context.architecture.widths}
    for axis in graph.axes:
        if axis.residual_axis is not None and widths[axis.name] < widths[axis.residual_axis]:
            found |= _readers_after(graph, axis, (axis.residual_output,))
    return found


def _readers_after(graph: ChannelGraph, axis: ChannelAxis, modules: Iterable[str]) -> set[str]:
    """Return the modules that run after some others and whose weight reads an axis, or its residual axis."""
    place = {name: number for number, name in enumerate(graph.activations)}
    last = max((place[module] for module in modules if module in place), default=len(place))
    stream = axis if axis.residual_axis is None else graph.by_name[axis.residual_axis]
    readers = (site.tensor.rpartition(".") for site in stream.sites if site.role is Role.INPUT)
    return {module for module, _, name in readers if name == "weight" and place.get(module, -1) > last}


def _collect_targets(
    original: nn.Module, samplers: Sequence[LayerSampler], images: Sequence[Example], kept: dict[str, KeptByDim]
) -> dict[str, Tensor]:
    """Return the outputs of each layer in the original, as (samples, kept output channels)."""
    rows: dict[str, list[Tensor]] = {sampler.module: [] for sampler in samplers}
    skipped: set[str] = set()

    def observe(sampler: LayerSampler, layer: nn.Module, x: Tensor, out: Tensor) -> None:
        if not rows[sampler.module] and not computes_from_weight(layer, x, out):
            skipped.add(sampler.module)
        found = sampler.rows_of_output(layer, out)
        positions = kept.get(f"{sampler.module}.weight", {}).get(0)
        if positions is not None:
            found = found.index_select(1, torch.from_numpy(positions).to(found.device))
        rows[sampler.module].append(found)

    run_observed(original, samplers, images, observe)
    return {name: torch.cat(parts) for name, parts in rows.items() if name not in skipped}


def _collect_inputs(small: nn.Module, samplers: Sequence[LayerSampler], images: Sequence[Example]) -> dict[str, Tensor]:
    """Return the present inputs of each layer of a group, as (samples, patch)."""
    rows: dict[str, list[Tensor]] = {sampler.module: [] for sampler in samplers}

    def observe(sampler: LayerSampler, layer: nn.Module, x: Tensor, out: Tensor) -> None:
        rows[sampler.module].append(sampler.rows_of_input(layer, x))

    run_observed(small, samplers, images, observe)
    return {name: torch.cat(parts) for name, parts in rows.items()}


class _AllSeen(Exception):  # noqa: N818
    """Ends a forward pass after the last layer of interest."""


def run_observed(
    model: nn.Module,
    samplers: Sequence[LayerSampler],
    images: Sequence[Example],
    observe: Callable[[LayerSampler, nn.Module, Tensor, Tensor], None],
) -> None:
    """Run the images and pass the input and output of some layers to ``observe``; stop after the last of them."""
    waiting = {sampler.module for sampler in samplers}
    seen: set[str] = set()

    def hook(sampler: LayerSampler) -> Any:
        def forward(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            observe(sampler, layer, args[0].detach(), out.detach())
            seen.add(sampler.module)
            if seen == waiting:
                raise _AllSeen

        return forward

    with torch.no_grad():
        hooks = [original_module(model, s.module).register_forward_hook(hook(s)) for s in samplers]
        try:
            for batch in images:
                # Each batch runs until all layers were seen once.
                seen.clear()
                try:
                    run_batch(model, batch)
                except _AllSeen:
                    continue
        finally:
            for handle in hooks:
                handle.remove()


def _count_positions(shape: tuple[int, ...]) -> int:
    positions = 1
    for size in shape[1:-1]:
        positions *= size
    return positions

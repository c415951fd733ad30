"""Repairs of a cut model in closed form, without training.

`Refit` solves a least-squares problem for every layer that lost inputs, so that its outputs are again what they were.
`RecalibrateBatchNorm` measures the change of the batch-norm statistics and applies it.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur._batches import call_model, count_images
from secateur._kinds import settings
from secateur._runtime import run_isolated
from secateur.graph._record import shadow_copy
from secateur.graph.graph import ChannelAxis, ChannelGraph, Role
from secateur.graph.trace import Example
from secateur.prune.cut import RepairContext
from secateur.prune.narrow_branches import original_module, original_names
from secateur.prune.slice import KeptByDim, kept_positions_by_tensor


@dataclass(frozen=True, eq=False)
class LayerSampler:
    """The output positions of a layer that are sampled, the same ones in the original and the cut model.

    Attributes:
        module: The qualified name of a convolution (2-d, one group) or linear layer.
        wanted: The number of output positions of one image to sample; None for all. Which ones depends on how many
            there are, so images of several sizes can be sampled.
        seed: For the choice of positions.
    """

    module: str
    wanted: int | None
    seed: int = 0

    def _positions(self, count: int) -> Tensor | None:
        """Return flat indices into the output positions of one image; None for all."""
        return None if self.wanted is None else sample_positions(count, self.wanted, self.seed)

    def rows_of_output(self, layer: nn.Module, out: Tensor) -> Tensor:
        """Return (samples, output channels). The channels of a linear layer are always the last dimension."""
        if isinstance(layer, nn.Conv2d):
            flat = out.flatten(2)
            positions = self._positions(flat.size(2))
            if positions is not None:
                flat = flat[:, :, positions.to(out.device)]
            return flat.transpose(1, 2).reshape(-1, out.size(1))
        return self._rows_of_linear(out)

    def rows_of_input(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return (samples, input channels x kernel positions), ordered as ``weight.flatten(1)``."""
        if isinstance(layer, nn.Conv2d):
            return self._patches(layer, x)
        return self._rows_of_linear(x)

    def _rows_of_linear(self, x: Tensor) -> Tensor:
        flat = x.reshape(x.size(0), -1, x.size(-1))
        positions = self._positions(flat.size(1))
        if positions is not None:
            flat = flat[:, positions.to(x.device)]
        return flat.reshape(-1, x.size(-1))

    def _patches(self, layer: nn.Conv2d, x: Tensor) -> Tensor:
        (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
        ph, pw = layer.padding  # type: ignore[misc]
        x = F.pad(x, (int(pw), int(pw), int(ph), int(ph)))
        width = (x.size(3) - dw * (kw - 1) - 1) // sw + 1
        height = (x.size(2) - dh * (kh - 1) - 1) // sh + 1
        sampled = self._positions(height * width)
        where = torch.arange(height * width) if sampled is None else sampled
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


@lru_cache(64)
def sample_positions(count: int, wanted: int, seed: int) -> Tensor | None:
    """Return ``wanted`` of ``count`` positions from a seeded permutation, sorted; None if that is all of them."""
    if wanted >= count:
        return None
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def positions_per_image(unknowns: int, images: int, rows_per_unknown: int) -> int:
    """Return the number of positions per image that gives about ``rows_per_unknown`` equations per unknown."""
    return max(1, math.ceil(unknowns * rows_per_unknown / max(images, 1)))


_LARGEST_RATIO = 1e6
"""A channel whose variance changes by more than this is constant in one of the models."""

_BatchNorm = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]


@settings
class RecalibrateBatchNorm:
    """Update the batch-norm statistics of the cut model by their change relative to the original on the same images.

    The running statistics of a trained model come from many batches of augmented images. Statistics that are measured
    on a few clean images differ from them even without a cut. So both models are measured on the same images with
    batch statistics, and only the *change* is applied:

        mean' = mean + (mean_cut - mean_original),   var' = var * var_cut / var_original

    A model that was not cut does not change at all. A channel that is constant in one of the two models and not in the
    other keeps its variance: of a quotient beyond 1e6, nothing can be learned.

    Attributes:
        eps: Added to both variances before dividing.
        known: What `batch_statistics` gives for the original and the images, where many cuts of one model are repaired
            with the same images; None measures it.

    References:
        Recalibration itself: Yu & Huang, arXiv:1903.05134, Section 3.3; Li et al. (EagleEye), arXiv:2007.02491.
        The relative form is ours.
    """

    eps: float = 1e-8
    known: Mapping[str, tuple[Tensor, Tensor]] | None = field(default=None, compare=False, repr=False)

    def apply_(self, small: nn.Module, context: RepairContext) -> dict[str, str]:
        """Update the running statistics of ``small`` in place; see `Repair.apply_` for what is returned."""
        before = batch_statistics(context.original, context.images) if self.known is None else self.known
        after = batch_statistics(small, context.images)
        kept = kept_positions_by_tensor(context.graph, context.architecture)
        modules, names = dict(small.named_modules()), original_names(small)
        skipped: dict[str, str] = {}
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
            shift = (mean - old_mean).to(layer.running_mean.dtype)
            ratio = (variance + self.eps) / (old_variance + self.eps)
            # As a product, because either variance may be zero.
            varies = torch.minimum(variance, old_variance) * _LARGEST_RATIO >= torch.maximum(variance, old_variance)
            ratio = torch.where(varies, ratio, 1.0)
            new_mean, new_variance = layer.running_mean + shift, layer.running_var * ratio.to(layer.running_var.dtype)
            if not _are_finite(new_mean, new_variance):
                skipped[place] = "its statistics are not finite on the calibration images"
                continue
            layer.running_mean.copy_(new_mean)
            layer.running_var.copy_(new_variance)
        return skipped


def _are_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _join_single_image(images: Sequence[Example]) -> list[Example]:
    """Join a last batch of one image to the one before, whose statistics are better than those of one image."""
    batches = list(images)
    *_, before, last = [None, *batches][-2:]
    if isinstance(before, Tensor) and isinstance(last, Tensor) and len(last) == 1 and before[0].shape == last[0].shape:
        batches[-2:] = [torch.cat((before, last))]
    return batches


_STATISTICS_VALUES = 2**24
"""How many inputs of a batch norm are converted to float64 at a time."""


def _sums_by_channel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (channels,) sums and sums of squares of (n, channels, ...)."""
    # In float64, because the variance is the small difference of two large sums.
    rows = x.transpose(0, 1).flatten(1).double()
    return rows.sum(1), rows.square().sum(1)


def batch_statistics(model: nn.Module, images: Sequence[Example]) -> dict[str, tuple[Tensor, Tensor]]:
    """Measure the mean and biased variance of every batch-norm input while all batch norms use batch statistics.

    Returns:
        By module name, ((channels,) mean, (channels,) variance), float64, over all images.
    """
    sums: dict[str, list[Any]] = {}
    model = shadow_copy(model)
    layers: dict[str, Any] = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats and m.running_mean is not None
    }

    def observe(name: str, running: tuple[Tensor, Tensor]) -> Any:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args or tuple(kwargs.values()))[0].detach()
            # A single value has no variance, and torch refuses to normalize by it.
            alone = x.numel() == x.size(1) if x.dim() > 1 else True
            layer.running_mean, layer.running_var = running if alone else (None, None)
            channels = max(1, _STATISTICS_VALUES * x.size(1) // max(x.numel(), 1))
            parts = [_sums_by_channel(part) for part in x.split(channels, dim=1)]
            total = sums.setdefault(name, [0.0, 0.0, 0])
            total[0], total[1] = (total[n] + torch.cat([part[n] for part in parts]) for n in range(2))
            total[2] += x.numel() // max(x.size(1), 1)

        return hook

    for name, layer in layers.items():
        running = (layer.running_mean, layer.running_var)
        layer.register_forward_pre_hook(observe(name, running), with_kwargs=True)
        # Without running statistics, a batch norm uses those of the batch in eval mode too.
        layer.track_running_stats = False
    with run_isolated(model), torch.no_grad():
        for batch in _join_single_image(images):
            call_model(model, batch)
    return {
        name: (total / count, (squares / count - (total / count).square()).clamp_min(0))
        for name, (total, squares, count) in sums.items()
    }


@settings
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
        in_one_pass: Whether every layer is refitted while a single pass goes through the model: a tenth of the time,
            for the memory of one batch with all calibration images. With several batches it has no effect. Of a layer
            that is called several times the first call is refitted.

    References:
        He et al., Channel pruning for accelerating very deep networks, arXiv:1707.06168, Eq. (3) (reconstruction
        after selection); the target from the uncut network as in their Section 3.2.
    """

    ridge: float = 1e-3
    rows_per_unknown: int = 64
    max_passes: int = 32
    in_one_pass: bool = False

    def apply_(self, small: nn.Module, context: RepairContext) -> dict[str, str]:
        """Refit the weights of ``small`` in place; see `Repair.apply_` for what is returned."""
        kept = kept_positions_by_tensor(context.graph, context.architecture)
        samplers = self._samplers(small, context, kept)
        if not samplers:
            return {}
        targets, calls = _collect_targets(shadow_copy(context.original), samplers, context.images, kept)
        skipped = {s.module: "it does not compute what its class does" for s in samplers if s.module not in targets}
        samplers = [sampler for sampler in samplers if sampler.module in targets]
        if self.in_one_pass and len(context.images) == 1:
            return skipped | self._solve_on_the_way_(small, samplers, context.images[0], targets)
        for group in _group_samplers(samplers, self.max_passes):
            for module, rows in _collect_inputs(small, group, context.images, calls).items():
                reason = self._solve_(original_module(small, module), rows, targets[module])
                if reason:
                    skipped[module] = reason
        return skipped

    def _samplers(self, small: nn.Module, context: RepairContext, kept: dict[str, KeptByDim]) -> list[LayerSampler]:
        images = sum(map(count_images, context.images))
        samplers: list[LayerSampler] = []
        for number, name in enumerate(find_layers_to_refit(small, context, kept)):
            weight = original_module(small, name).get_parameter("weight")
            unknowns = weight.numel() // max(weight.size(0), 1)
            wanted = positions_per_image(unknowns, images, self.rows_per_unknown)
            samplers.append(LayerSampler(name, wanted, seed=number))
        return samplers

    def _solve_on_the_way_(
        self, small: nn.Module, samplers: Sequence[LayerSampler], batch: Example, targets: dict[str, list[Tensor]]
    ) -> dict[str, str]:
        """Run one batch and refit each layer right before its first call, when all layers before it are repaired."""
        skipped: dict[str, str] = {}
        waiting = {sampler.module for sampler in samplers}

        def hook(sampler: LayerSampler) -> Any:
            def forward_pre(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if sampler.module not in waiting:
                    return
                waiting.remove(sampler.module)
                x = (args or tuple(kwargs.values()))[0].detach()
                if x.dim() == (3 if isinstance(layer, nn.Conv2d) else 1):
                    x = x[None]
                rows = sampler.rows_of_input(layer, x)
                # Before the layer runs, so that the layers behind it get the outputs of the new weights. Popped,
                # because the targets of all layers are in memory at once.
                reason = self._solve_(layer, [rows], targets.pop(sampler.module)[:1])
                if reason:
                    skipped[sampler.module] = reason

            return forward_pre

        layers = [(original_module(small, sampler.module), sampler) for sampler in samplers]
        hooks = [layer.register_forward_pre_hook(hook(sampler), with_kwargs=True) for layer, sampler in layers]
        try:
            with run_isolated(small), torch.no_grad():
                call_model(small, batch)
        finally:
            for handle in hooks:
                handle.remove()
        return skipped | dict.fromkeys(sorted(waiting), "no calibration image reaches it")

    def _solve_(self, layer: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
        """Refit one layer, or return why it stays as it was."""
        if [len(rows) for rows in inputs] != [len(rows) for rows in outputs]:
            return "the cut model calls it for other positions than the original"
        if not inputs:
            return "no calibration image reaches it"
        rows, wanted = torch.cat(list(inputs)), torch.cat(list(outputs))
        weight = layer.get_parameter("weight")
        sliced = weight.detach().flatten(1).double()
        bias = layer.bias
        if isinstance(bias, Tensor):
            # The bias is the weight of an input that is always one.
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            sliced = torch.cat([sliced, bias.detach().double()[:, None]], 1)
        gram, cross = _products(rows, wanted)
        if not _are_finite(gram, cross):
            return "its inputs or outputs are not finite on the calibration images"
        if not bool(gram.any()):
            return "all of its inputs are zero on the calibration images"
        solved = solve_ridge(gram, cross, sliced.T, self.ridge)
        solved = None if solved is None else solved.T.to(weight.dtype)
        if solved is None or not _are_finite(solved):
            return f"its least-squares problem has no solution in {str(weight.dtype).removeprefix('torch.')}"
        with torch.no_grad():
            if isinstance(bias, Tensor):
                bias.copy_(solved[:, -1])
                solved = solved[:, :-1]
            weight.copy_(solved.reshape(weight.shape))
        return ""


def _products(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return X^T X and X^T Y in float64, of the samples that are finite."""
    if rows.dtype in {torch.float16, torch.bfloat16}:
        rows, wanted = rows.float(), wanted.float()  # Sums of squares overflow in half precision.
    # The products are computed in the precision of the model, and only the small matrices in float64.
    gram, cross = (rows.T @ rows).double(), (rows.T @ wanted).double()
    if _are_finite(gram, cross):
        return gram, cross
    # Some samples are not finite, or squares of float32 overflow.
    usable = torch.isfinite(rows).all(1) & torch.isfinite(wanted).all(1)
    rows, wanted = rows[usable].double(), wanted[usable].double()
    return rows.T @ rows, rows.T @ wanted


def solve_ridge(gram: Tensor, cross: Tensor, start: Tensor, ridge: float) -> Tensor | None:
    """Return the weights W that minimize ||Y - X W||^2 + r ||W - start||^2, with r = ridge * mean(diag(X^T X)).

    The normal equations (X^T X + r I) W = X^T Y + r start are solved directly. Where that fails, because r is 0 or lost
    in the rounding of X^T X, the change W - start is taken from the eigenvectors of X^T X with inputs scaled to equal
    energy: directions without energy do not change.

    Args:
        gram: X^T X, (inputs, inputs) float64.
        cross: X^T Y, (inputs, outputs) float64.
        start: (inputs, outputs) float64.
        ridge: Dimensionless, >= 0.

    Returns:
        (inputs, outputs) float64, never with a larger squared error on the samples than ``start``; None if there is no
        such solution in float64.
    """
    pull = ridge * gram.diagonal().mean()
    regular = gram.clone()
    regular.diagonal().add_(pull)
    # Unlike `solve`, this says that a matrix is singular, and does not raise.
    solved, failed = torch.linalg.solve_ex(regular, cross + pull * start)
    missing = cross - gram @ start
    if not bool(failed) and _improves(solved - start, gram, missing):
        return solved
    scale = torch.where(gram.diagonal() > 0, gram.diagonal().clamp_min(_TINY).rsqrt(), 0.0)
    balanced = gram * scale * scale[:, None]
    balanced.diagonal().add_(pull * scale.square())
    if not _are_finite(balanced, missing):
        return None
    try:
        energies, vectors = torch.linalg.eigh(balanced)
    except RuntimeError:  # LinAlgError: it did not converge.
        return None
    # The threshold below which `torch.linalg.matrix_rank` takes an eigenvalue for zero.
    has_energy = energies > len(gram) * torch.finfo(gram.dtype).eps * energies.max()
    inverse = torch.where(has_energy, 1 / torch.where(has_energy, energies, 1.0), 0.0)
    change = scale[:, None] * (vectors @ (inverse[:, None] * (vectors.T @ (scale[:, None] * missing))))
    return start + change if _improves(change, gram, missing) else None


_TINY = 1e-300
"""Keeps the quotients of energies finite."""


def _improves(change: Tensor, gram: Tensor, missing: Tensor) -> bool:
    """Whether a change of the weights does not increase the squared error: tr(D^T G D) - 2 tr(D^T R) <= 0."""
    grown, gained = (change * (gram @ change)).sum(), 2 * (change * missing).sum()
    # Both sums have rounding errors, which must not refuse a change that neither gains nor loses.
    return bool(grown - gained <= 1e-6 * (grown.abs() + gained.abs()))


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
) -> tuple[dict[str, list[Tensor]], list[Counter[str]]]:
    """Return the outputs of each layer in the original, (samples, kept output channels) for each call, and the calls.

    A layer that does not compute what its class does is left out.
    """
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

    calls = run_observed(original, samplers, images, observe)
    return {name: parts for name, parts in rows.items() if name not in skipped}, calls


def _collect_inputs(
    small: nn.Module, samplers: Sequence[LayerSampler], images: Sequence[Example], calls: Sequence[Counter[str]]
) -> dict[str, list[Tensor]]:
    """Return the present inputs of each layer of a group, (samples, patch) for each call."""
    rows: dict[str, list[Tensor]] = {sampler.module: [] for sampler in samplers}

    def observe(sampler: LayerSampler, layer: nn.Module, x: Tensor, out: Tensor) -> None:
        rows[sampler.module].append(sampler.rows_of_input(layer, x))

    run_observed(small, samplers, images, observe, calls)
    return rows


class _AllSeen(Exception):  # noqa: N818
    """Ends a forward pass after the last layer of interest."""


def run_observed(
    model: nn.Module,
    samplers: Sequence[LayerSampler],
    images: Sequence[Example],
    observe: Callable[[LayerSampler, nn.Module, Tensor, Tensor], None],
    calls: Sequence[Counter[str]] | None = None,
) -> list[Counter[str]]:
    """Run the images and pass the input and output of every call of some layers to ``observe``.

    Args:
        model: The model.
        samplers: The layers.
        images: Batches.
        observe: Called with sampler, layer, input and output, both with a batch dimension.
        calls: How often each layer is called for each batch: then the run of a batch ends with the last such call. None
            runs every batch to its end.

    Returns:
        How often each layer was called for each batch.
    """
    made: list[Counter[str]] = []

    def hook(sampler: LayerSampler) -> Any:
        def forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
            x = (args or tuple(kwargs.values()))[0]
            if x.dim() == (3 if isinstance(layer, nn.Conv2d) else 1):
                x, out = x[None], out[None]  # A single image without a batch dimension.
            observe(sampler, layer, x.detach(), out.detach())
            made[-1][sampler.module] += 1
            # What comes after the last layer of interest would be computed in vain.
            if calls is not None and all(made[-1][s.module] >= calls[len(made) - 1][s.module] for s in samplers):
                raise _AllSeen

        return forward

    hooks = [original_module(model, s.module).register_forward_hook(hook(s), with_kwargs=True) for s in samplers]
    try:
        with run_isolated(model), torch.no_grad():
            for batch in images:
                made.append(Counter())
                # A run that ends early raises out of the model's forward.
                with contextlib.suppress(_AllSeen):
                    call_model(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return made

"""A supernet: one model, and every narrower or shallower architecture of it as a call with parts of its tensors.

The channels of every axis are put in order once, the most important first, so that each subnet is a prefix
(`order_by_score`, `reorder_channels`). `Supernet` runs subnets, and `measure_batch_norms` computes the running
statistics of a single one.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur._arrays import FloatArray, IntArray
from secateur._provenance import sha256_of
from secateur._runtime import evaluating
from secateur.architecture import Architecture
from secateur.errors import DataError, SurgeryError
from secateur.graph._size_records import number_at, set_number
from secateur.graph.graph import ChannelGraph, Site, SizeEdit
from secateur.nas.mixture import Mixture, MixtureHooks
from secateur.prune.narrow_branches import ExpandChannels, branch_expansions
from secateur.prune.slice import apply_architecture, block_replacements, copy_with_tensors, make_stand_in


@dataclass(frozen=True)
class Subnet:
    """One architecture of a supernet: the first channels of each axis.

    Attributes:
        widths: Channels of each prunable axis, in the order of the graph.
        removed_blocks: Names of the blocks that are left out.
    """

    widths: tuple[int, ...]
    removed_blocks: tuple[str, ...] = ()


class Supernet(nn.Module):
    """A traced model of which any narrower or shallower architecture can be called.

    The channels are put in order once, the most important first. A subnet then takes a prefix of every axis, and its
    weights are views of the supernet's. It costs what the cut model costs and computes what that computes. Its
    gradients land in the supernet's tensors, so any optimizer, autocast, accumulation and data parallelism work as for
    an ordinary module. No layer is replaced, and the model needs no code written for it.

    In training mode batch norms use the statistics of the batch. The running statistics belong to no single subnet, so
    measure a subnet's own with `measure_batch_norms` before you evaluate it.

    Args:
        model: The traced model; copied.
        graph: Its channel graph.
        order: For each axis a permutation of its channels, the most important first, see `order_by_score`. Axes that
            are not named keep their order.

    Attributes:
        model: The model with its channels in order.
        graph: The channel graph, which is valid for it too.
        order: As given, with an order for residual branches.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, order: Mapping[str, IntArray] | None = None):
        super().__init__()
        self.graph = graph
        self.order: dict[str, IntArray] = add_branch_orders(graph, order or {})
        self.model: nn.Module = reorder_channels(model, graph, self.order)
        self._slices = TensorSlices(graph)
        self._mixture_hooks = MixtureHooks.of(self.model, graph)
        self._cached = CachedAttributes(self.model)
        self.width_norms: WidthNorms | None = None

    def separate_norms_(self, candidates: Mapping[str, Sequence[int]]) -> None:
        """Give every candidate width a scale and a shift of its own at each batch norm where its channels are mixed.

        All begin as the model's. A width that is no candidate uses those of the next wider one.

        Args:
            candidates: Candidate widths by axis, ascending.

        References:
            Dong & Yang (TAS), arXiv:1905.09717, reference code (ConvBNReLU.BNs).
        """
        norms = {
            module: axis
            for module, axis in self._mixture_hooks.single.items()
            if axis in candidates and _has_affine(self.model.get_submodule(module))
        }
        self.width_norms = WidthNorms(self.model, norms, candidates)

    def merge_norms_(self) -> None:
        """Give the model the scales and shifts of the full width, if every width has its own."""
        if self.width_norms is not None:
            own = self.width_norms.tensors_at(self.graph.sizes)
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    if name in own:
                        parameter.copy_(own[name])

    @property
    def full(self) -> Subnet:
        """The whole model."""
        return Subnet(tuple(self.graph.sizes.values()))

    @property
    def mixable(self) -> frozenset[str]:
        """The axes whose widths a `Mixture` can mix: some module's output shows their channels."""
        return self._mixture_hooks.axes

    def subnet(self, widths: Mapping[str, int], removed_blocks: Iterable[str] = ()) -> Subnet:
        """Return a subnet by names; axes that are not named are whole, branches as wide as their streams.

        Raises:
            SurgeryError: For an unknown axis or block, a width out of range, or a branch wider than its stream.
        """
        sizes, removed = self.graph.sizes, set(removed_blocks)
        for name, width in widths.items():
            if name not in sizes or not 1 <= width <= sizes[name]:
                raise SurgeryError(
                    f"`widths` must name prunable axes with 1 to all of their channels; got {width} for {name!r}. "
                    f"The graph has {', '.join(f'{n} ({size})' for n, size in list(sizes.items())[:3])}, ..."
                )
        unknown = sorted(removed - {block.name for block in self.graph.removable})
        if unknown:
            raise SurgeryError(
                f"`removed_blocks` must name removable blocks; got {unknown}. Look into graph.removable."
            )
        full = {**sizes, **widths}
        for axis in self.graph.prunable:
            # A frozen stream is not in `full`: it keeps all channels, so that its branches may have any width.
            if axis.residual_axis is None or axis.residual_axis not in full:
                continue
            # Only a branch that is named can be too wide; the others are narrowed to their streams.
            if widths.get(axis.name, 1) > full[axis.residual_axis]:
                raise SurgeryError(
                    f"`widths` must not be wider for {axis.name!r} than for {axis.residual_axis!r}, its stream; "
                    f"got {full[axis.name]} and {full[axis.residual_axis]}. Narrow the branch too, or leave it out."
                )
            full[axis.name] = min(full[axis.name], full[axis.residual_axis])
        return Subnet(tuple(full[name] for name in sizes), tuple(sorted(removed)))

    def architecture(self, subnet: Subnet) -> Architecture:
        """Express the subnet in the channels of the original model."""
        kept = {
            name: self.order[name][:width] if name in self.order else range(width)
            for name, width in zip(self.graph.sizes, subnet.widths, strict=True)
        }
        return Architecture.of(kept, subnet.removed_blocks)

    def extract(self, subnet: Subnet) -> nn.Module:
        """Return the subnet as a model of its own; see `secateur.prune.apply_architecture`."""
        return apply_architecture(self.model, self.graph, self._prefix(subnet))

    def in_original_order(self) -> nn.Module:
        """Return a copy of the whole model as it is trained now, with its channels in the original order."""
        return reorder_channels(self.model, self.graph, invert_order(self.order))

    def forward(
        self,
        subnet: Subnet,
        *inputs: Any,
        mixture: Mixture | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        **named: Any,
    ) -> Any:
        """Run a subnet.

        Args:
            subnet: The architecture to run.
            inputs: Positional arguments of the model.
            mixture: Mix narrower outputs into those of the subnet, see `Mixture`.
            tensors: Use these tensors, of the subnet's shapes, instead of the model's own, by name.
            named: Keyword arguments of the model.

        Returns:
            What the model returns.
        """
        norms = self.width_norms
        own = {} if norms is None else norms.tensors_at(dict(zip(self.graph.sizes, subnet.widths, strict=True)))
        gone = self.graph.removed_modules(subnet.removed_blocks)
        own = {name: tensor for name, tensor in own.items() if not gone(name.rpartition(".")[0])}
        given: Mapping[str, Tensor] = {**self.tensors_of(subnet), **own, **(tensors or {})}
        with self._shaped_as(subnet), self._cached.restored(), ExitStack() as stack:
            if mixture is not None:
                affine_of = None if norms is None else norms.at
                hooked = self._mixture_hooks.active(
                    self.model, subnet.widths, mixture, gone, given, affine_of=affine_of
                )
                given = stack.enter_context(hooked)
            # Hooks run in the order of registration. Widening comes after mixing, because a narrow branch is mixed at
            # its own width before its channels are put where the stream has them.
            for module, hook in self._widening_hooks(subnet):
                stack.callback(self.model.get_submodule(module).register_forward_hook(hook).remove)
            return functional_call(self.model, dict(given), inputs, named)

    def tensors_of(self, subnet: Subnet) -> dict[str, Tensor]:
        """Return the parameters and buffers of a subnet that have prunable axes, by name: parts of the model's own."""
        tensors: dict[str, Tensor] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        gone = self.graph.removed_modules(subnet.removed_blocks)
        # Modules that are replaced by stand-ins are not there during the call, and neither are their tensors.
        present = {name: tensors[name] for name in self._slices.names if not gone(name.rpartition(".")[0])}
        return self._slices.take(present, subnet.widths)

    def _widening_hooks(self, subnet: Subnet) -> Iterator[tuple[str, Callable[..., Any]]]:
        """Yield the module that ends each branch narrower than its stream, and a hook that widens its output."""
        if any(axis.residual_axis for axis in self.graph.prunable):
            for widening in branch_expansions(self.graph, self._prefix(subnet)):
                # The cut model wraps the module. A hook does the same, and replaces no module of the supernet.
                widen = ExpandChannels(nn.Identity(), widening.dim, widening.missing, widening.order)
                yield widening.module, _on_output(widen)

    def _prefix(self, subnet: Subnet) -> Architecture:
        """The subnet in the channels of the reordered model."""
        kept = {name: range(width) for name, width in zip(self.graph.sizes, subnet.widths, strict=True)}
        return Architecture.of(kept, subnet.removed_blocks)

    @contextlib.contextmanager
    def _shaped_as(self, subnet: Subnet) -> Generator[None]:
        """Replace removed blocks, and set the integers that modules keep (heads, groups), for the time of one call."""
        with ExitStack() as stack:
            replacements = block_replacements(self.graph, subnet.removed_blocks)
            # Outer modules first: what lies inside a replaced module is gone with it and needs no replacement.
            for replacement in sorted(replacements, key=lambda r: r.module.count(".")):
                stack.enter_context(_swapped(self.model, replacement.module, make_stand_in(replacement)))
            stack.enter_context(self._sized(subnet))
            yield

    @contextlib.contextmanager
    def _sized(self, subnet: Subnet) -> Generator[None]:
        widths = dict(zip(self.graph.sizes, subnet.widths, strict=True))
        gone = self.graph.removed_modules(subnet.removed_blocks)
        # Filled as the attributes are set, so that a failure halfway restores those that have been changed.
        before: list[tuple[nn.Module, SizeEdit, int]] = []
        try:
            for edit in self.graph.edits:
                if gone(edit.module):
                    continue
                holder = self.model.get_submodule(edit.module)
                before.append((holder, edit, number_at(holder, edit.attribute, edit.item)))
                set_number(holder, edit.attribute, edit.item, edit.extent.at(widths))
            yield
        finally:
            for holder, edit, old in reversed(before):
                set_number(holder, edit.attribute, edit.item, old)


class WidthNorms(nn.Module):
    """Scales and shifts of batch norms, one row of each for every candidate width of the axis that they read.

    Args:
        model: Its batch norms give the first values.
        norms: Names of batch norms, each with its axis.
        candidates: Candidate widths by axis, ascending.
    """

    def __init__(self, model: nn.Module, norms: Mapping[str, str], candidates: Mapping[str, Sequence[int]]):
        super().__init__()
        self._axes = dict(norms)
        self._widths = {name: tuple(map(int, candidates[axis])) for name, axis in norms.items()}
        # Names in a ParameterDict have no dots.
        self.scales, self.shifts = (
            nn.ParameterDict(
                {
                    name.replace(".", "/"): getattr(model.get_submodule(name), kind)
                    .detach()
                    .clone()
                    .repeat(len(self._widths[name]), 1)
                    for name in norms
                }
            )
            for kind in ("weight", "bias")
        )

    def at(self, name: str, width: int) -> tuple[Tensor, Tensor] | None:
        """Return scale and shift, (width,) each, of a batch norm; None if it has only its own."""
        if name not in self._widths:
            return None
        row = next((n for n, candidate in enumerate(self._widths[name]) if candidate >= width), -1)
        key = name.replace(".", "/")
        return self.scales[key][row, :width], self.shifts[key][row, :width]

    def tensors_at(self, widths: Mapping[str, int]) -> dict[str, Tensor]:
        """Return the scales and shifts at the widths of all axes, by the names that they have in the model."""
        found: dict[str, Tensor] = {}
        for name, axis in self._axes.items():
            pair = self.at(name, widths[axis])
            assert pair is not None
            found |= {f"{name}.weight": pair[0], f"{name}.bias": pair[1]}
        return found


def _has_affine(module: nn.Module) -> bool:
    both = getattr(module, "weight", None), getattr(module, "bias", None)
    return isinstance(module, BatchNorm) and all(isinstance(each, Tensor) for each in both)


def _on_output(widen: nn.Module) -> Callable[..., Any]:
    # The order of the channels is a buffer that was made on the CPU.
    return lambda _module, _inputs, output: widen.to(output.device)(output)


@contextlib.contextmanager
def _swapped(model: nn.Module, name: str, stand_in: nn.Module) -> Generator[None]:
    path, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
        module = parent.get_submodule(leaf)
    except AttributeError:  # An enclosing module has been replaced already.
        yield
        return
    setattr(parent, leaf, stand_in)
    try:
        yield
    finally:
        setattr(parent, leaf, module)


class CachedAttributes:
    """Attributes, other than parameters and buffers, in which modules may cache what they computed.

    These are tensors, None, and dictionaries. For example, attention may look its biases up once, in the first call in
    evaluation mode, and keep them; they are those of the subnet that ran, and wrong for the next one.

    Args:
        model: The model whose modules are watched.
    """

    def __init__(self, model: nn.Module):
        self._places = [
            (module, name)
            for module in model.modules()
            for name, value in vars(module).items()
            # None as well: it may stand for a tensor that has not been computed yet.
            if name not in _MODULE_ATTRIBUTES and (value is None or isinstance(value, Tensor | dict))
        ]

    @contextlib.contextmanager
    def restored(self) -> Generator[None]:
        """Restore the attributes afterward, whatever the model caches meanwhile."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        for module, name in self._places:
            held = vars(module)
            before.append((held, name, held[name]))
            if isinstance(held[name], dict):
                # A dictionary is filled in place, so the call gets a copy, and the original is put back.
                held[name] = held[name].copy()
        try:
            yield
        finally:
            for held, name, value in before:
                held[name] = value


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


@dataclass(frozen=True, eq=False)
class _Dimension:
    """One dimension of one tensor along which channels of prunable axes run.

    Attributes:
        dim: Number of the dimension.
        size: Its full length.
        parts: (number of the axis, its positions (axis size, multiplicity)) of every axis along it.
        is_prefix: Whether the kept positions are always the first ones: one axis, whose channels own them in order.
    """

    dim: int
    size: int
    parts: tuple[tuple[int, IntArray], ...]
    is_prefix: bool

    @classmethod
    def of(cls, dim: int, size: int, sites: Sequence[tuple[int, Site]]) -> "_Dimension":
        parts = tuple((number, site.index) for number, site in sites)
        first = parts[0][1]
        # The first channels then own the first positions, also if each of them has several (after a flatten).
        is_prefix = len(parts) == 1 and np.array_equal(first.ravel(), np.arange(size))
        return cls(dim, size, parts, is_prefix)

    def take(self, tensor: Tensor, widths: Sequence[int]) -> Tensor:
        """Return the part of the tensor that is used when each axis has its first ``widths[number]`` channels."""
        if self.is_prefix:
            number, index = self.parts[0]
            length = widths[number] * index.shape[1]
            return tensor if length == self.size else tensor.narrow(self.dim, 0, length)
        if all(widths[number] == len(index) for number, index in self.parts):
            return tensor
        # Several axes share the dimension (a concatenation), so positions of no axis stay as well.
        stays = np.ones(self.size, dtype=np.bool_)
        for number, index in self.parts:
            stays[index[widths[number] :]] = False
        positions = torch.from_numpy(np.flatnonzero(stays)).to(tensor.device)
        return tensor.index_select(self.dim, positions)


class TensorSlices:
    """The parts of a model's tensors that its subnets use: views where channels lie in a row, copies elsewhere.

    Args:
        graph: The channel graph.
    """

    def __init__(self, graph: ChannelGraph):
        numbers = {axis.name: number for number, axis in enumerate(graph.prunable)}
        found: dict[str, dict[int, list[tuple[int, Site]]]] = {}
        for axis in graph.prunable:
            for site in axis.sites:
                found.setdefault(site.tensor, {}).setdefault(site.dim, []).append((numbers[axis.name], site))
        self._tensors: dict[str, tuple[_Dimension, ...]] = {
            name: tuple(
                _Dimension.of(dim, graph.tensors[name][dim].at(graph.sizes), sites) for dim, sites in dims.items()
            )
            for name, dims in found.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that have prunable axes."""
        return tuple(self._tensors)

    def take(self, tensors: Mapping[str, Tensor], widths: Sequence[int]) -> dict[str, Tensor]:
        """Take the parts of some tensors; differentiable, and gradients land in the whole tensors.

        Args:
            tensors: Whole tensors by name.
            widths: Channels of each prunable axis, in the order of the graph.
        """
        parts: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            part: Any = tensor
            for dimension in self._tensors[name]:
                part = dimension.take(part, widths)
            parts[name] = part
        return parts


def order_by_score(scores: Mapping[str, FloatArray]) -> dict[str, IntArray]:
    """Order the channels of each axis by score, the highest first; of equal ones the lower index comes first.

    Args:
        scores: Axis name to (axis size,).
    """
    return {name: np.argsort(-values, kind="stable") for name, values in scores.items()}


def reorder_channels(model: nn.Module, graph: ChannelGraph, order: Mapping[str, IntArray]) -> nn.Module:
    """Return a copy whose channels stand in another order; it computes what the model computes.

    Channel i of an axis is the original's ``order[axis][i]``, in every tensor that has the axis: rows, columns, norms
    and statistics move together, so that nothing but the order of sums changes. The graph is valid for the copy too,
    since it speaks of positions. A channel with several positions in a tensor (after a flatten, in a head) takes all
    of them along.

    Args:
        model: The traced model; not modified.
        graph: Its channel graph.
        order: Axis name to a permutation of its channels; an axis that is not named stays as it is. Branches follow
            their streams, see `add_branch_orders`.

    Raises:
        SurgeryError: If an order names an unknown axis or is no permutation.
    """
    sources = _source_positions(graph, add_branch_orders(graph, order))

    def reorder(name: str, tensor: Tensor) -> Tensor:
        for dim, positions in sources[name].items():
            tensor = tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))
        return tensor

    return copy_with_tensors(model, dict.fromkeys(sources, reorder))


def invert_order(order: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """Return the order that undoes another one."""
    # `argsort` gives the place of each channel in the permutation, which is the inverse permutation.
    return {name: np.argsort(permutation) for name, permutation in order.items()}


def order_digest(order: Mapping[str, IntArray]) -> str:
    """Return the SHA-256 of an order: trained weights of a supernet belong to one order only."""
    return sha256_of("".join(f"{name}: {permutation.tolist()}\n" for name, permutation in sorted(order.items())))


def add_branch_orders(graph: ChannelGraph, order: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """Return the order in which every independent branch has the order of its stream, whatever it says of the branch.

    A branch is added to its stream channel by channel, so both must have the same order.
    """
    into = {axis.name: axis.residual_axis for axis in graph.axes if axis.residual_axis is not None}
    found = {name: permutation for name, permutation in order.items() if name not in into}
    return {**found, **{name: found[stream] for name, stream in into.items() if stream in found}}


def _source_positions(graph: ChannelGraph, order: Mapping[str, IntArray]) -> dict[str, dict[int, IntArray]]:
    """Return, for every dimension of a tensor that changes, the old position of what comes to each position."""
    sources: dict[str, dict[int, IntArray]] = {}
    for name, permutation in order.items():
        axis = graph.by_name.get(name)
        if axis is None or not np.array_equal(np.sort(permutation), np.arange(axis.size)):
            raise SurgeryError(
                f"`order` must hold a permutation of the channels of each axis; got another one for {name!r}. "
                "Make it with order_by_score()."
            )
        for site in axis.sites:
            dims = sources.setdefault(site.tensor, {})
            if site.dim not in dims:
                dims[site.dim] = np.arange(graph.tensors[site.tensor][site.dim].at(graph.sizes))
            # All positions of a channel at once: the k-th position of channel i comes from the k-th of permutation[i].
            dims[site.dim][site.index] = site.index[permutation]
    return sources


BatchNorm = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]


def measure_batch_norms(supernet: Supernet, subnet: Subnet, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Measure the batch-norm statistics of one subnet, to be passed to it as ``tensors``.

    Every batch norm uses the statistics of the batch meanwhile; their means and unbiased variances are averaged over
    the batches. The supernet is left as it is.

    Args:
        supernet: In any mode.
        subnet: The architecture to run.
        batches: Normalized images, in batches of two or more.

    Returns:
        Buffer name to its value; empty if the subnet has no batch norms with running statistics.

    Raises:
        DataError: If there are batch norms and no images.

    References:
        Yu & Huang, arXiv:1903.05134, Section 3.3.
    """
    statistics = fresh_statistics(supernet, subnet)
    if not statistics:
        return {}
    with measuring_batch_norms(supernet), torch.no_grad():
        seen = 0
        for images in batches:
            supernet(subnet, images, tensors=statistics)
            seen += 1
    check_any_batches(seen)
    return statistics


@contextlib.contextmanager
def measuring_batch_norms(supernet: Supernet) -> Generator[None]:
    """Let batch norms use the statistics of the batch and average them plainly; all else is in evaluation mode."""
    norms = _tracking_norms(supernet)
    momenta = {norm: norm.momentum for norm in norms.values()}
    # `evaluating` restores the mode of every module afterward, but not the momenta.
    with evaluating(supernet):
        try:
            for norm in norms.values():
                # None is torch's value for the plain mean over all batches, instead of a moving average.
                norm.training, norm.momentum = True, None
            yield
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum


def fresh_statistics(supernet: Supernet, subnet: Subnet) -> dict[str, Tensor]:
    """Return initial statistics of the subnet's shapes.

    Passed as ``tensors`` to a call within `measuring_batch_norms`, they are filled in place.
    """
    gone = supernet.graph.removed_modules(subnet.removed_blocks)
    parts = supernet.tensors_of(subnet)
    whole = dict(supernet.model.named_buffers())
    fresh: dict[str, Tensor] = {}
    for norm in _tracking_norms(supernet):
        prefix = f"{norm}." if norm else ""
        # The counter must begin at 0: with momentum None, torch weights batch n by 1 / n and takes n from the counter.
        for name, start in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            key = prefix + name
            if key in whole and not gone(norm):
                # Norms over frozen axes have no part of their own, because every subnet uses all of them.
                fresh[key] = torch.full_like(parts.get(key, whole[key]), start)
    return fresh


def check_any_batches(batches: int) -> None:
    """Refuse statistics of no images.

    Raises:
        DataError: If there were no batches.
    """
    if not batches:
        raise DataError("`batches` must hold images to measure batch norms on; got none. Pass some training images.")


def _tracking_norms(supernet: Supernet) -> Mapping[str, BatchNorm]:
    return {
        name: module
        for name, module in supernet.model.named_modules()
        if isinstance(module, BatchNorm) and module.track_running_stats
    }

"""Channels in another order: the most important ones first, so that every subnet is a prefix.

What modules remember from call to call, outside of parameters and buffers.

Which part of every tensor a subnet uses: views where channels stand in a row, copies elsewhere.

A supernet: one model whose subnets are the same model called with parts of its tensors.

Batch-norm statistics of single subnets."""

import contextlib
import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur._arrays import FloatArray, IntArray
from secateur.architecture import Architecture
from secateur.errors import DataError, SurgeryError
from secateur.graph.graph import ChannelGraph, Site
from secateur.nas.mixture import Blend, Mixture
from secateur.prune.residual import Widen, widenings_of
from secateur.prune.slice import apply_architecture, copy_with, replacements_of, stand_in_of


def best_first(scores: Mapping[str, FloatArray]) -> dict[str, IntArray]:
    """For each axis the channels with the highest scores first; of equal ones those with the lower index.

    Args:
        scores: Axis name to (axis size,).
    """
    return {name: np.argsort(-values, kind="stable") for name, values in scores.items()}


def reordered(model: nn.Module, graph: ChannelGraph, order: Mapping[str, IntArray]) -> nn.Module:
    """A copy whose channels stand in another order; it computes what the model computes.

    Channel i of an axis is the original's ``order[axis][i]``, in every tensor that has the axis: rows, columns, norms
    and statistics move together, so that nothing but the order of sums changes. The graph holds for the copy too,
    since it speaks of positions. A channel with several positions in a tensor (after a flatten, in a head) takes all
    of them along.

    Args:
        model: The traced model; not modified.
        graph: Its channel graph.
        order: Axis name to a permutation of its channels; an axis that is not named stays as it is. Branches go with
            their streams, see `with_branches`.

    Raises:
        SurgeryError: If an order names an unknown axis or is no permutation.
    """
    moves = _moves(graph, with_branches(graph, order))

    def moved(name: str, tensor: Tensor) -> Tensor:
        for dim, positions in moves[name].items():
            tensor = tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))
        return tensor

    return copy_with(model, dict.fromkeys(moves, moved))


def inverse(order: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """The order that undoes another one."""
    return {name: np.argsort(permutation) for name, permutation in order.items()}


def order_digest(order: Mapping[str, IntArray]) -> str:
    """SHA-256 of an order: weights of a supernet stand in it."""
    sha = hashlib.sha256()
    for name, permutation in sorted(order.items()):
        sha.update(f"{name}: {permutation.tolist()}\n".encode())
    return sha.hexdigest()


def with_branches(graph: ChannelGraph, order: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """The order with branches in that of their streams, whose channels they have, whatever it says of them itself."""
    into = {axis.name: axis.into for axis in graph.axes if axis.into is not None}
    found = {name: permutation for name, permutation in order.items() if name not in into}
    return {**found, **{name: found[stream] for name, stream in into.items() if stream in found}}


def _moves(graph: ChannelGraph, order: Mapping[str, IntArray]) -> dict[str, dict[int, IntArray]]:
    """For every tensor and dimension that changes: where each position's content comes from."""
    moves: dict[str, dict[int, IntArray]] = {}
    for name, permutation in order.items():
        axis = graph.by_name.get(name)
        if axis is None or not np.array_equal(np.sort(permutation), np.arange(axis.size)):
            raise SurgeryError(
                f"`order` must hold a permutation of the channels of each axis; got another one for {name!r}. "
                "Make it with best_first()."
            )
        for site in axis.sites:
            dims = moves.setdefault(site.tensor, {})
            if site.dim not in dims:
                dims[site.dim] = np.arange(graph.tensors[site.tensor][site.dim].at(graph.sizes))
            dims[site.dim][site.index] = site.index[permutation]
    return moves


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Memories:
    """Attributes in which modules may keep what they computed: tensors, nothing yet, or dictionaries.

    Attention biases that are looked up once, in the first call in evaluation mode, are those of the subnet that ran.

    Args:
        model: Whose modules.
    """

    def __init__(self, model: nn.Module):
        self._places = [
            (module, name)
            for module in model.modules()
            for name, value in vars(module).items()
            if name not in _OF_EVERY_MODULE and (value is None or isinstance(value, Tensor | dict))
        ]

    @contextlib.contextmanager
    def kept_out(self) -> Generator[None]:
        """Whatever is remembered meanwhile is forgotten afterward."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        for module, name in self._places:
            held = vars(module)
            before.append((held, name, held[name]))
            if isinstance(held[name], dict):
                held[name] = held[name].copy()
        try:
            yield
        finally:
            for held, name, value in before:
                held[name] = value


@dataclass(frozen=True, eq=False)
class _Dimension:
    """One dimension of one tensor along which channels of prunable axes run.

    Attributes:
        dim: Which.
        size: Its full length.
        parts: (number of the axis, its positions (axis size, multiplicity)) of every axis along it.
        in_a_row: Whether the kept positions are always the first ones: one axis with one position per channel.
    """

    dim: int
    size: int
    parts: tuple[tuple[int, IntArray], ...]
    in_a_row: bool

    @classmethod
    def of(cls, dim: int, size: int, sites: Sequence[tuple[int, Site]]) -> "_Dimension":
        parts = tuple((number, site.index) for number, site in sites)
        first = parts[0][1]
        in_a_row = len(parts) == 1 and np.array_equal(first.ravel(), np.arange(size))
        return cls(dim, size, parts, in_a_row)

    def narrowed(self, tensor: Tensor, widths: Sequence[int]) -> Tensor:
        """The part of the tensor that is used when each axis has its first ``widths[number]`` channels."""
        if self.in_a_row:
            number, index = self.parts[0]
            length = widths[number] * index.shape[1]
            return tensor if length == self.size else tensor.narrow(self.dim, 0, length)
        if all(widths[number] == len(index) for number, index in self.parts):
            return tensor
        stays = np.ones(self.size, dtype=np.bool_)
        for number, index in self.parts:
            stays[index[widths[number] :]] = False
        positions = torch.from_numpy(np.flatnonzero(stays)).to(tensor.device)
        return tensor.index_select(self.dim, positions)


class Slices:
    """The parts of a model's tensors that its subnets use.

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

    def of(self, tensors: Mapping[str, Tensor], widths: Sequence[int]) -> dict[str, Tensor]:
        """The parts of some tensors, by name; differentiable, gradients land in the whole tensors.

        Args:
            tensors: Whole ones by name.
            widths: Channels of each prunable axis, in the order of the graph.
        """
        parts: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            part: Any = tensor
            for dimension in self._tensors[name]:
                part = dimension.narrowed(part, widths)
            parts[name] = part
        return parts


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

    The channels are put in order once, the most important first; a subnet then takes a prefix of every axis, and its
    weights are views of the whole ones. It costs what the cut model costs, computes what that computes, and its
    gradients land in the whole tensors, so that any optimizer, autocast, accumulation and data parallelism work as
    for an ordinary module. No layer is replaced, and the model is not written for it.

    In training mode batch norms use the statistics of the batch. Running statistics are of no one subnet:
    before a subnet is judged, measure its own, see `calibrated`.

    Args:
        model: The traced model; copied.
        graph: Its channel graph.
        order: For each axis a permutation of its channels, the most important first, see `best_first`; axes that are
            not named stay as they are.

    Attributes:
        model: The model with its channels in order.
        graph: The channel graph, which holds for it too.
        order: As given.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, order: Mapping[str, IntArray] | None = None):
        super().__init__()
        self.graph = graph
        self.order: dict[str, IntArray] = with_branches(graph, order or {})
        self.model: nn.Module = reordered(model, graph, self.order)
        self._slices = Slices(graph)
        self._blend = Blend.of(self.model, graph)
        self._memories = Memories(self.model)

    @property
    def full(self) -> Subnet:
        """The whole model."""
        return Subnet(tuple(self.graph.sizes.values()))

    @property
    def blended(self) -> frozenset[str]:
        """The axes whose channels a `Mixture` can interpolate: some module's output shows them."""
        return self._blend.axes

    def subnet(self, widths: Mapping[str, int], removed_blocks: Iterable[str] = ()) -> Subnet:
        """A subnet by names; axes that are not named are whole, branches as wide as their streams.

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
        known = {block.name for block in self.graph.removable}
        unknown = sorted(removed - known)
        if unknown:
            raise SurgeryError(
                f"`removed_blocks` must name removable blocks; got {unknown}. Look into graph.removable."
            )
        full = {**sizes, **widths}
        for axis in self.graph.prunable:
            if axis.into is None or axis.into not in full:
                continue
            if widths.get(axis.name, 1) > full[axis.into]:
                raise SurgeryError(
                    f"`widths` must not be wider for {axis.name!r} than for {axis.into!r}, its stream; "
                    f"got {full[axis.name]} and {full[axis.into]}. Narrow the branch too, or leave it out."
                )
            full[axis.name] = min(full[axis.name], full[axis.into])
        return Subnet(tuple(full[name] for name in sizes), tuple(sorted(removed)))

    def architecture(self, subnet: Subnet) -> Architecture:
        """The subnet in terms of the original model's channels."""
        kept = {
            name: self.order[name][:width] if name in self.order else range(width)
            for name, width in zip(self.graph.sizes, subnet.widths, strict=True)
        }
        return Architecture.of(kept, subnet.removed_blocks)

    def extract(self, subnet: Subnet) -> nn.Module:
        """The subnet as a model of its own; see `secateur.surgery.apply_architecture`."""
        return apply_architecture(self.model, self.graph, self._prefix(subnet))

    def in_original_order(self) -> nn.Module:
        """The whole model, as it is trained now, with its channels where the original has them."""
        return reordered(self.model, self.graph, inverse(self.order))

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
            subnet: Which one.
            inputs: Positional arguments of the model.
            mixture: Blend narrower outputs into those of the subnet, see `Mixture`.
            tensors: Take these, of the subnet's shapes, in the place of the model's own, by name.
            named: Named arguments of the model.

        Returns:
            What the model returns.
        """
        given: Mapping[str, Tensor] = {**self.tensors_of(subnet), **(tensors or {})}
        with self._as(subnet), self._memories.kept_out(), ExitStack() as stack:
            if mixture is not None:
                gone = self.graph.removed_modules(subnet.removed_blocks)
                given = stack.enter_context(self._blend.hooked(self.model, subnet.widths, mixture, gone, given))
            # After the blending: a narrow branch takes its place in the stream last of all.
            for outlet, hook in self._widening(subnet):
                stack.callback(self.model.get_submodule(outlet).register_forward_hook(hook).remove)
            return functional_call(self.model, dict(given), inputs, named)

    def tensors_of(self, subnet: Subnet) -> dict[str, Tensor]:
        """The parameters and buffers of a subnet that have prunable axes, by name: parts of the model's own."""
        tensors: dict[str, Tensor] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        gone = self.graph.removed_modules(subnet.removed_blocks)
        stay = {name: tensors[name] for name in self._slices.names if not gone(name.rpartition(".")[0])}
        return self._slices.of(stay, subnet.widths)

    def _widening(self, subnet: Subnet) -> Iterator[tuple[str, Callable[..., Any]]]:
        """For each branch that is narrower than its stream: its outlet, and a hook that widens what it returns."""
        if any(axis.into for axis in self.graph.prunable):
            for widening in widenings_of(self.graph, self._prefix(subnet)):
                widen = Widen(nn.Identity(), widening.dim, widening.missing, widening.order)
                yield widening.module, _on_output(widen)

    def _prefix(self, subnet: Subnet) -> Architecture:
        """The subnet in terms of the channels as they are ordered here."""
        kept = {name: range(width) for name, width in zip(self.graph.sizes, subnet.widths, strict=True)}
        return Architecture.of(kept, subnet.removed_blocks)

    @contextlib.contextmanager
    def _as(self, subnet: Subnet) -> Generator[None]:
        """Sizes and modules of the subnet, for one call."""
        with ExitStack() as stack:
            replacements = replacements_of(self.graph, subnet.removed_blocks)
            for replacement in sorted(replacements, key=lambda r: r.module.count(".")):
                stack.enter_context(_swapped(self.model, replacement.module, stand_in_of(replacement)))
            stack.enter_context(self._sized(subnet))
            yield

    @contextlib.contextmanager
    def _sized(self, subnet: Subnet) -> Generator[None]:
        widths = dict(zip(self.graph.sizes, subnet.widths, strict=True))
        gone = self.graph.removed_modules(subnet.removed_blocks)
        before: list[tuple[nn.Module, str, Any]] = []
        try:
            for edit in self.graph.edits:
                if gone(edit.module):
                    continue
                holder = self.model.get_submodule(edit.module)
                old = getattr(holder, edit.attribute)
                before.append((holder, edit.attribute, old))
                setattr(holder, edit.attribute, _with(old, edit.item, edit.extent.at(widths)))
            yield
        finally:
            for holder, attribute, old in reversed(before):
                setattr(holder, attribute, old)


def _on_output(widen: nn.Module) -> Callable[..., Any]:
    return lambda _module, _inputs, output: widen.to(output.device)(output)


def _with(old: Any, item: int | None, value: int) -> Any:
    if item is None:
        return value
    items: Sequence[Any] = [*old[:item], value, *old[item + 1 :]]
    return type(old)(items)


@contextlib.contextmanager
def _swapped(model: nn.Module, name: str, stand_in: nn.Module) -> Generator[None]:
    path, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
        module = parent.get_submodule(leaf)
    except AttributeError:  # It lies in a module that is gone already.
        yield
        return
    setattr(parent, leaf, stand_in)
    try:
        yield
    finally:
        setattr(parent, leaf, module)


BatchNorm = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]


def calibrated(supernet: Supernet, subnet: Subnet, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Batch-norm statistics of one subnet, to be passed to it as ``tensors``.

    Every batch norm uses the statistics of the batch meanwhile; their means and unbiased variances are averaged over
    the batches. The supernet is left as it is.

    Args:
        supernet: In any mode.
        subnet: Which one.
        batches: Normalized images, in batches of two or more.

    Returns:
        Buffer name to its value; empty if the subnet has no batch norms with running statistics.

    Raises:
        DataError: If there are batch norms and no images.

    References:
        Yu & Huang, arXiv:1903.05134, Section 3.3.
    """
    statistics = untouched(supernet, subnet)
    if not statistics:
        return {}
    with measuring(supernet), torch.no_grad():
        seen = 0
        for images in batches:
            supernet(subnet, images, tensors=statistics)
            seen += 1
    check_seen(seen)
    return statistics


@contextlib.contextmanager
def measuring(supernet: Supernet) -> Generator[None]:
    """Batch norms use the statistics of the batch, and average them plainly; all else is in evaluation mode."""
    training = {module: module.training for module in supernet.modules()}
    norms = _norms(supernet)
    momenta = {norm: norm.momentum for norm in norms.values()}
    supernet.eval()
    try:
        for norm in norms.values():
            norm.training, norm.momentum = True, None  # None is torch's word for the plain mean over all batches.
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in training.items():
            module.training = mode


def untouched(supernet: Supernet, subnet: Subnet) -> dict[str, Tensor]:
    """Fresh statistics of the subnet's shapes; what runs while `measuring` with them as ``tensors`` fills them."""
    gone = supernet.graph.removed_modules(subnet.removed_blocks)
    parts = supernet.tensors_of(subnet)
    whole = dict(supernet.model.named_buffers())
    fresh: dict[str, Tensor] = {}
    for norm in _norms(supernet):
        prefix = f"{norm}." if norm else ""
        for name, start in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
            key = prefix + name
            if key in whole and not gone(norm):
                fresh[key] = torch.full_like(parts.get(key, whole[key]), start)
    return fresh


def check_seen(batches: int) -> None:
    """Refuse statistics of no images.

    Raises:
        DataError: If there were no batches.
    """
    if not batches:
        raise DataError("`batches` must hold images to measure batch norms on; got none. Pass some training images.")


def _norms(supernet: Supernet) -> Mapping[str, BatchNorm]:
    return {
        name: module
        for name, module in supernet.model.named_modules()
        if isinstance(module, BatchNorm) and module.track_running_stats
    }

"""A supernet: one model whose subnets are the same model called with parts of its tensors."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph import ChannelGraph
from secateur.supernet._memory import Memories
from secateur.supernet._mixture import Blend, Mixture
from secateur.supernet._order import IntArray, inverse, reordered, with_branches
from secateur.supernet._slices import Slices
from secateur.surgery import Widen, apply_architecture, replacements_of, stand_in_of, widenings_of


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
    gradients land in the whole tensors, so that any optimiser, autocast, accumulation and data parallelism work as
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

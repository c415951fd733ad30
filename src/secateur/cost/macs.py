"""Sums of products of channel counts, compiled once and evaluated for many widths at a time.

Costs counted by running the model: independent of the channel graph, to check it against.

The cost of any architecture of a graph, from a formula: nothing is built and nothing runs."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Never, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from secateur._arrays import FloatArray, IntArray
from secateur.architecture import Architecture
from secateur.cost.budget import Cost, amount_of
from secateur.errors import SurgeryError
from secateur.graph._record import shadow_copy
from secateur.graph.graph import ChannelGraph, Extent

_CHUNK = 4096
"""Rows evaluated together: bounds the memory at about chunk * extents * 8 bytes."""
_MAX_DENOMINATOR = 1 << 20
"""A factor is a whole number over a number of groups, which is far smaller than this."""


@dataclass(frozen=True, eq=False)
class Polynomial:
    """p(w) = sum_t numerator_t / denominator * prod_k extent_{factors[t, k]}(w), each extent linear in the widths w.

    Attributes:
        slopes: (axes, extents) channels that an extent gains per channel of an axis.
        bases: (extents,) channels that are always there. The last extent is the constant 1, for padding.
        factors: (terms, most extents in a term) which extents are multiplied.
        numerators: (terms,).
        denominator: Common to all terms.
    """

    slopes: FloatArray
    bases: FloatArray
    factors: IntArray
    numerators: IntArray
    denominator: int

    @classmethod
    def of(cls, terms: Iterable[tuple[float, Sequence[Extent]]], axes: Sequence[str]) -> "Polynomial":
        """Compile (factor, extents) terms; equal products are merged.

        Args:
            terms: Each is factor * product of its extents. A factor is an exact rational in a float.
            axes: Order of the widths. Every axis named by an extent is among them.
        """
        number: dict[Extent, int] = {}
        merged: dict[tuple[int, ...], Fraction] = {}
        for factor, extents in terms:
            product = tuple(sorted(number.setdefault(extent, len(number)) for extent in extents))
            merged[product] = merged.get(product, Fraction(0)) + _exact(factor)
        column = {name: position for position, name in enumerate(axes)}
        slopes = np.zeros((len(axes), len(number) + 1))
        bases = np.ones(len(number) + 1)
        for extent, index in number.items():
            bases[index] = extent.base
            for name, multiplicity in extent.terms:
                slopes[column[name], index] += multiplicity
        longest = max((len(product) for product in merged), default=0)
        factors = np.full((len(merged), longest), len(number), dtype=np.int64)
        for row, product in enumerate(merged):
            factors[row, : len(product)] = product
        denominator = math.lcm(*(fraction.denominator for fraction in merged.values()))
        numerators = np.array([int(fraction * denominator) for fraction in merged.values()], dtype=np.int64)
        return cls(slopes, bases, factors, numerators, denominator)

    def at(self, widths: IntArray) -> IntArray:
        """Exact whole values.

        Args:
            widths: (n, axes).

        Returns:
            (n,) int64. Widths that break an axis' divisor may give a fraction; it is rounded down.
        """
        chunks = [self._at(widths[start : start + _CHUNK]) for start in range(0, len(widths), _CHUNK)]
        return np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.int64)

    def _at(self, widths: IntArray) -> IntArray:
        # Channel counts are far below 2**53, so the float product is exact, and BLAS makes it quick.
        extents = (widths.astype(np.float64) @ self.slopes + self.bases).astype(np.int64)
        products = np.broadcast_to(self.numerators, (len(widths), len(self.numerators)))
        for position in range(self.factors.shape[1]):
            products = products * extents[:, self.factors[:, position]]
        return products.sum(axis=1, dtype=np.int64) // self.denominator

    def at_tensor(self, widths: torch.Tensor) -> torch.Tensor:
        """The same for real-valued widths (..., axes), differentiable; the dtype and device of ``widths``."""

        def constant(array: FloatArray | IntArray) -> torch.Tensor:
            return torch.as_tensor(array, device=widths.device)

        extents = widths @ constant(self.slopes).to(widths.dtype) + constant(self.bases).to(widths.dtype)
        products = extents[..., constant(self.factors)].prod(dim=-1)
        return products @ (constant(self.numerators).to(widths.dtype) / self.denominator)


def _exact(factor: float) -> Fraction:
    if float(factor).is_integer():
        return Fraction(int(factor))
    return Fraction(factor).limit_denominator(_MAX_DENOMINATOR)


def counted_macs(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of one forward pass in evaluation mode at batch 1, counted operator by operator.

    Half of what torch's ``FlopCounterMode`` counts (convolutions, matrix products, attention). A copy of the model
    runs, so modes, buffers and the global random state stay as they were.

    Args:
        model: Any module.
        example: Its input, or several; only the first sample of each (dimension 0) is used.
    """
    # Imported here: it brings Triton along, a quarter of a second that only counting needs.
    from torch.utils.flop_counter import FlopCounterMode

    inputs = example if isinstance(example, tuple) else (example,)
    running = _without_gradients(shadow_copy(model))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = sorted({tensor.device.index or 0 for tensor in inputs if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            # The fast path runs a whole attention layer as one operator that the counter does not know.
            torch.backends.mha.set_fastpath_enabled(False)
            running(*(tensor[:1] for tensor in inputs))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2


def _without_gradients(shadow: nn.Module) -> nn.Module:
    """The shadow with parameters that share their numbers with the model's but require no gradient.

    The counter looks for the gradient function of every tensor that requires one, and fails where there is none.
    """
    frozen: dict[int, nn.Parameter] = {}
    for module in shadow.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            plain = frozen.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
            setattr(module, name, plain)
    return shadow


def counted_params(model: nn.Module) -> int:
    """Number of parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


class Modeled(Protocol):
    """What computes a further field of `Cost` from widths and blocks, in the columns of `CostModel`."""

    @property
    def field(self) -> str:
        """Name of the field."""
        ...

    def of_widths(self, widths: IntArray, blocks: IntArray | None = None) -> IntArray | FloatArray:
        """(n,) of whole widths (n, axes) and blocks (n or 1, blocks)."""
        ...

    def of_tensor(self, widths: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
        """(...) of real-valued widths (..., axes) and presences (..., blocks), differentiable."""
        ...


class CostModel:
    """MACs and params as functions of the widths w and of the blocks that are there, b (0 or 1 each).

    macs(w, b) = sum over operations of factor * product of extents(w) * product of b over the blocks it goes with;
    params(w, b) = sum over parameters of the product of the extents(w) of its dimensions, * the same product of b.
    Extents are linear in the widths, so both are polynomials that never decrease: more never costs less.

    Args:
        graph: Its operations, parameters, widths and blocks.
        more: What computes further fields of `Cost`, such as `LatencyModel` and `FileSize`; of the same graph.

    Attributes:
        axes: Names of the prunable axes: the columns of every width array.
        sizes: (axes,) full widths.
        blocks: Names of the removable blocks: the columns of every block array.
        present: (blocks,) 1 for the blocks that are there where no block array says otherwise; see `without`.
        original: Cost of the whole model.
    """

    def __init__(self, graph: ChannelGraph, more: Sequence[Modeled] = ()):
        self._more = tuple(more)
        self.axes: tuple[str, ...] = tuple(axis.name for axis in graph.prunable)
        self._frozen = {axis.name: axis.size for axis in graph.axes if axis.frozen_because is not None}
        self.sizes: IntArray = np.array([axis.size for axis in graph.prunable], dtype=np.int64)
        self.blocks: tuple[str, ...] = tuple(block.name for block in graph.removable)
        self.present: IntArray = np.ones(len(self.blocks), dtype=np.int64)
        columns = (*self.axes, *map(_column, self.blocks))
        known = frozenset(self.blocks)
        around: dict[str, list[str]] = {}
        for block in graph.removable:
            for name in block.tensors:
                around.setdefault(name, []).append(block.name)
        operations = ((op.factor, (*op.extents, *_factors(known.intersection(op.blocks)))) for op in graph.operations)
        tensors = ((1.0, (*graph.tensors[name], *_factors(around.get(name, ())))) for name in graph.parameters)
        self._macs = Polynomial.of(operations, columns)
        self._params = Polynomial.of(tensors, columns)
        self.original: Cost = self.cost(Architecture())

    def without(self, removed_blocks: Iterable[str]) -> "CostModel":
        """The same model in which some blocks are removed wherever no block array says otherwise.

        ``original`` stays the cost of the whole model: what a relative budget refers to.

        Raises:
            SurgeryError: If one of them is not a removable block of the graph.
        """
        fewer = copy.copy(self)
        fewer.present = self._present(removed_blocks)
        return fewer

    def cost(self, architecture: Architecture) -> Cost:
        """Cost of one architecture; blocks of `without` stay removed.

        Raises:
            SurgeryError: If it names an axis, a channel or a block that the graph does not have.
        """
        return self.cost_of(self.widths(architecture), self._present(architecture.removed_blocks))

    def cost_of(self, widths: IntArray, blocks: IntArray | None = None) -> Cost:
        """Cost of one architecture, every field that is known.

        Args:
            widths: (axes,) whole numbers.
            blocks: (blocks,) 1 or 0; None means ``present``.
        """
        row = None if blocks is None else blocks[None]
        macs, params = self.of_widths(widths[None], row)
        row = self.present[None] if row is None else row
        more = {model.field: model.of_widths(widths[None], row)[0].item() for model in self._more}
        return Cost(int(macs[0]), int(params[0]), **more)  # pyright: ignore[reportArgumentType]

    def fields(
        self, names: Iterable[str], widths: IntArray, blocks: IntArray | None = None
    ) -> dict[str, IntArray | FloatArray]:
        """Some fields of the costs of many architectures, (n,) each; see `of_widths` for the arguments.

        Raises:
            BudgetError: If nothing computes one of them.
        """
        macs, params = self.of_widths(widths, blocks)
        found: dict[str, IntArray | FloatArray] = {"macs": macs, "params": params}
        row = self.present[None] if blocks is None else blocks
        wanted = list(names)
        found.update({model.field: model.of_widths(widths, row) for model in self._more if model.field in wanted})
        return {name: found[name] if name in found else _unknown(self.original, name) for name in wanted}

    def expected(
        self, names: Iterable[str], widths: torch.Tensor, blocks: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The same for real-valued widths (..., axes) and presences (..., blocks), 0 to 1; differentiable in both.

        Raises:
            BudgetError: If nothing computes one of them.
        """
        if blocks is None:
            blocks = torch.as_tensor(self.present, dtype=widths.dtype, device=widths.device)
        known = {"macs": self.macs_of, "params": self.params_of, **{more.field: more.of_tensor for more in self._more}}
        return {name: known[name](widths, blocks) if name in known else _unknown(self.original, name) for name in names}

    def _present(self, removed_blocks: Iterable[str]) -> IntArray:
        position = {name: index for index, name in enumerate(self.blocks)}
        present = self.present.copy()
        for name in removed_blocks:
            if name not in position:
                raise SurgeryError(
                    f"`removed_blocks` must name removable blocks of this graph; got {name!r}. "
                    f"The graph has {len(self.blocks)}, such as {', '.join(self.blocks[:3]) or '(none)'}."
                )
            present[position[name]] = 0
        return present

    def widths(self, architecture: Architecture) -> IntArray:
        """(axes,) widths of an architecture; an axis it does not name is whole.

        Raises:
            SurgeryError: If it names an axis or a channel that the graph does not have.
        """
        position = {name: index for index, name in enumerate(self.axes)}
        widths = self.sizes.copy()
        for name, channels in architecture.kept:
            if self._frozen.get(name) == len(channels):
                continue  # whole, as it must be
            if name not in position:
                raise SurgeryError(
                    f"`architecture` must name prunable axes of this graph; got {name!r}. "
                    f"The graph has {len(self.axes)}, such as {', '.join(self.axes[:3]) or '(none)'}."
                )
            size = int(self.sizes[position[name]])
            if channels[-1] >= size:
                raise SurgeryError(
                    f"`architecture` must keep channels 0 to {size - 1} of axis {name!r}; got {channels[-1]}. "
                    "It was made for another model."
                )
            widths[position[name]] = len(channels)
        return widths

    def of_widths(self, widths: IntArray, blocks: IntArray | None = None) -> tuple[IntArray, IntArray]:
        """Costs of many architectures at once, exact.

        Args:
            widths: (n, axes) whole numbers, columns in the order of ``axes``.
            blocks: (n, blocks) or (1, blocks), 1 where a block is kept and 0 where it is removed, columns in the order
                of ``blocks``; None means ``present`` throughout.

        Returns:
            (macs (n,), params (n,)), int64.

        Raises:
            ValueError: If ``widths`` or ``blocks`` has another shape or is not whole numbers.
        """
        widths = _whole("widths", widths, len(self.axes), "prunable axis")
        blocks = _whole("blocks", self.present[None] if blocks is None else blocks, len(self.blocks), "removable block")
        columns = np.concatenate([widths, np.broadcast_to(blocks, (len(widths), len(self.blocks)))], axis=1)
        return self._macs.at(columns), self._params.at(columns)

    def macs_of(self, widths: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
        """MACs (...) of real-valued widths (..., axes) and presences (..., blocks), 0 to 1; for relaxed searches.

        Differentiable in both. Without ``blocks``, ``present`` holds.
        """
        return self._macs.at_tensor(self._columns(widths, blocks))

    def params_of(self, widths: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
        """Parameters (...) of real-valued widths (..., axes) and presences (..., blocks); as `macs_of`."""
        return self._params.at_tensor(self._columns(widths, blocks))

    def _columns(self, widths: torch.Tensor, blocks: torch.Tensor | None) -> torch.Tensor:
        if blocks is None:
            blocks = torch.as_tensor(self.present, dtype=widths.dtype, device=widths.device)
        return torch.cat([widths, blocks.expand(*widths.shape[:-1], len(self.blocks))], dim=-1)


def _unknown(original: Cost, name: str) -> Never:
    amount_of(original, name)
    raise AssertionError(f"nothing computes {name}, yet the whole model has it")


def _column(block: str) -> str:
    """The column of a block; no axis has such a name."""
    return f"block {block}"


def _factors(blocks: Iterable[str]) -> tuple[Extent, ...]:
    return tuple(Extent(0, ((_column(name), 1),)) for name in sorted(blocks))


def _whole(name: str, array: IntArray, columns: int, of: str) -> IntArray:
    array = np.asarray(array)
    if array.ndim != 2 or array.shape[1] != columns or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"`{name}` must be whole numbers of shape (n, {columns}), one column per {of}; "
            f"got {array.dtype} of shape {array.shape}."
        )
    return array

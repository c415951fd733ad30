"""The MACs and parameters of any architecture of a graph, from a formula: nothing is built and nothing runs.

`count_macs` and `count_params` count them by running a model, independent of the graph, to check the formula against.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any, Never, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur._arrays import FloatArray, IntArray
from secateur._batches import call_model, take
from secateur._caller_state import in_default_state, leaving_open_contexts
from secateur._runtime import without_fast_path
from secateur.architecture import Architecture
from secateur.cost.budget import Cost, amount_of
from secateur.errors import SurgeryError
from secateur.graph._record import shadow_copy
from secateur.graph.graph import ChannelGraph, Extent

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

_CHUNK = 4096
"""Rows evaluated together: bounds the memory at about chunk * extents * 8 bytes."""
_SPARSE = 64
"""Axes per axis of an extent from which extents are computed one by one instead of by a matrix product."""
_MAX_DENOMINATOR = 1 << 20
"""A factor is a whole number over a number of groups, which is far smaller than this."""


class FieldModel(Protocol):
    """A model of a further field of `Cost`, computed from widths and blocks in the columns of `CostModel`."""

    @property
    def field(self) -> str:
        """Name of the field."""
        ...

    def of_widths(self, widths: IntArray, blocks: IntArray | None = None) -> IntArray | FloatArray:
        """Return the field (n,) for whole widths (n, axes) and blocks (n or 1, blocks)."""
        ...

    def of_tensor(self, widths: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
        """Return the field (...) for real-valued widths (..., axes) and presences (..., blocks), differentiable."""
        ...


class CostModel:
    """MACs and parameters as functions of the widths w and of the kept blocks b (0 or 1 each).

    macs(w, b) = sum over operations of factor * product of extents(w) * product of b over the blocks it goes with;
    params(w, b) = sum over parameters of the product of the extents(w) of its dimensions, * the same product of b.
    Extents are linear in the widths, so both are polynomials that never decrease: more never costs less.

    Args:
        graph: Its operations, parameters, widths and blocks.
        more: Models of further fields of `Cost` for the same graph, such as `LatencyModel` and `FileSize`.

    Attributes:
        axes: Names of the prunable axes: the columns of every width array.
        sizes: (axes,) full widths.
        blocks: Names of the removable blocks: the columns of every block array.
        present: (blocks,) 1 for the blocks that are kept where no block array is given; see `without`.
        original: Cost of the whole model.
    """

    def __init__(self, graph: ChannelGraph, more: Sequence[FieldModel] = ()):
        self._more = tuple(more)
        self.axes: tuple[str, ...] = tuple(axis.name for axis in graph.prunable)
        self._frozen = {axis.name: axis.size for axis in graph.axes if axis.frozen_because is not None}
        self.sizes: IntArray = np.array([axis.size for axis in graph.prunable], dtype=np.int64)
        self.blocks: tuple[str, ...] = tuple(block.name for block in graph.removable)
        self.present: IntArray = np.ones(len(self.blocks), dtype=np.int64)
        columns = (*self.axes, *map(block_column, self.blocks))
        known = frozenset(self.blocks)
        around: dict[str, list[str]] = {}
        for block in graph.removable:
            for name in block.tensors:
                around.setdefault(name, []).append(block.name)
        operations = (
            (op.factor, (*op.extents, *block_factors(known.intersection(op.blocks)))) for op in graph.operations
        )
        tensors = ((1.0, (*graph.tensors[name], *block_factors(around.get(name, ())))) for name in graph.parameters)
        self._macs = Polynomial.of(operations, columns)
        self._params = Polynomial.of(tensors, columns)
        self.original: Cost = self.cost(Architecture())

    def without(self, removed_blocks: Iterable[str]) -> "CostModel":
        """Return this model with some blocks removed wherever no block array is given.

        ``original`` stays the cost of the whole model: what a relative budget refers to.

        Raises:
            SurgeryError: If one of them is not a removable block of the graph.
        """
        fewer = copy.copy(self)
        fewer.present = self._present(removed_blocks)
        return fewer

    def cost(self, architecture: Architecture) -> Cost:
        """Compute the cost of one architecture; blocks of `without` stay removed.

        Raises:
            SurgeryError: If it names an axis, a channel or a block that the graph does not have.
        """
        return self.cost_of(self.widths(architecture), self._present(architecture.removed_blocks))

    def cost_of(self, widths: IntArray, blocks: IntArray | None = None) -> Cost:
        """Compute the cost of one architecture, with every field that is known.

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
        """Compute some fields of the costs of many architectures, (n,) each; see `of_widths` for the arguments.

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
        """Compute some fields for real-valued widths (..., axes) and presences (..., blocks), 0 to 1; differentiable.

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
        """Return the widths (axes,) of an architecture; an axis that it does not name is whole.

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
        """Compute the exact costs of many architectures at once.

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
        columns = join_columns(widths, blocks)
        return self._macs.at(columns), self._params.at(columns)

    def macs_of(self, widths: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
        """Compute MACs (...) of real-valued widths (..., axes) and presences (..., blocks); for relaxed searches.

        Differentiable in both. Without ``blocks``, ``present`` holds.
        """
        return self._macs.at_tensor(self._columns(widths, blocks))

    def params_of(self, widths: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
        """Compute parameters (...) of real-valued widths (..., axes) and presences (..., blocks); see `macs_of`."""
        return self._params.at_tensor(self._columns(widths, blocks))

    def _columns(self, widths: torch.Tensor, blocks: torch.Tensor | None) -> torch.Tensor:
        if blocks is None:
            blocks = torch.as_tensor(self.present, dtype=widths.dtype, device=widths.device)
        return join_tensor_columns(widths, blocks)


def _unknown(original: Cost, name: str) -> Never:
    amount_of(original, name)
    raise AssertionError(f"nothing computes {name}, yet the whole model has it")


def _whole(name: str, array: IntArray, columns: int, of: str) -> IntArray:
    array = np.asarray(array)
    if array.ndim != 2 or array.shape[1] != columns or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"`{name}` must be whole numbers of shape (n, {columns}), one column per {of}; "
            f"got {array.dtype} of shape {array.shape}."
        )
    return array


@dataclass(frozen=True, eq=False)
class Polynomial:
    """p(w) = sum_t numerator_t / denominator * prod_k extent_{factors[t, k]}(w), each extent linear in the widths w.

    Attributes:
        slopes: (axes, extents) channels that an extent gains per channel of an axis.
        bases: (extents,) constant part of each extent. The last extent is the constant 1, for padding.
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
        """Compile (factor, extents) terms. Equal products are merged.

        Args:
            terms: Each is factor * product of its extents. A factor is an exact rational in a float.
            axes: Order of the widths. Every axis named by an extent is among them.
        """
        number: dict[Extent, int] = {}
        merged: dict[tuple[int, ...], Fraction] = {}
        for factor, extents in terms:
            product = tuple(sorted(number.setdefault(extent, len(number)) for extent in extents))
            merged[product] = merged.get(product, Fraction(0)) + _exact(factor)
        slopes, bases = linear_extents([*number, Extent(1)], axes)
        longest = max((len(product) for product in merged), default=0)
        factors = np.full((len(merged), longest), len(number), dtype=np.int64)
        for row, product in enumerate(merged):
            factors[row, : len(product)] = product
        denominator = math.lcm(*(fraction.denominator for fraction in merged.values()))
        numerators = np.array([int(fraction * denominator) for fraction in merged.values()], dtype=np.int64)
        return cls(slopes.astype(np.float64), bases.astype(np.float64), factors, numerators, denominator)

    def at(self, widths: IntArray) -> IntArray:
        """Evaluate at whole widths, exactly.

        Args:
            widths: (n, axes).

        Returns:
            (n,) int64. Widths that break an axis' divisor may give a fraction; it is rounded down.
        """
        chunks = [self._at(widths[start : start + _CHUNK]) for start in range(0, len(widths), _CHUNK)]
        return np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.int64)

    def _at(self, widths: IntArray) -> IntArray:
        extents = self._extents(widths)
        products = np.broadcast_to(self.numerators, (len(widths), len(self.numerators)))
        for position in range(self.factors.shape[1]):
            products = products * extents[:, self.factors[:, position]]
        return products.sum(axis=1, dtype=np.int64) // self.denominator

    def _extents(self, widths: IntArray) -> IntArray:
        """Return the extents (n, extents) of whole widths (n, axes)."""
        if self._terms is None:
            # Channel counts are far below 2**53, so the float product is exact, and BLAS makes it quick.
            return (widths.astype(np.float64) @ self.slopes + self.bases).astype(np.int64)
        extents = np.broadcast_to(self.bases.astype(np.int64), (len(widths), len(self.bases)))
        for axes, slopes in self._terms:
            extents = extents + widths[:, axes] * slopes
        return extents

    @cached_property
    def _terms(self) -> list[tuple[IntArray, IntArray]] | None:
        """The k-th axis of every extent and its slope, for each k; None where the full product is as quick.

        In deep networks nearly all slopes are 0: the product would take the square of the depth.
        """
        counts = np.count_nonzero(self.slopes, axis=0)
        most = int(counts.max(initial=0))
        if most * _SPARSE >= len(self.slopes):
            return None
        order = np.argsort(self.slopes == 0, axis=0, kind="stable")[:most]
        return [(row, self.slopes[row, np.arange(len(counts))].astype(np.int64)) for row in order]

    def at_tensor(self, widths: torch.Tensor) -> torch.Tensor:
        """Evaluate at real-valued widths (..., axes), differentiable, in the dtype and on the device of ``widths``."""

        def constant(array: FloatArray | IntArray) -> torch.Tensor:
            return torch.as_tensor(array, device=widths.device)

        extents = widths @ constant(self.slopes).to(widths.dtype) + constant(self.bases).to(widths.dtype)
        products = extents[..., constant(self.factors)].prod(dim=-1)
        return products @ (constant(self.numerators).to(widths.dtype) / self.denominator)


def _exact(factor: float) -> Fraction:
    if float(factor).is_integer():
        return Fraction(int(factor))
    return Fraction(factor).limit_denominator(_MAX_DENOMINATOR)


def linear_extents(extents: Sequence[Extent], columns: Sequence[str]) -> tuple[IntArray, IntArray]:
    """Return slopes (columns, extents) and bases (extents,) of extents: ``widths @ slopes + bases``."""
    position = {name: number for number, name in enumerate(columns)}
    slopes = np.zeros((len(columns), len(extents)), dtype=np.int64)
    for number, extent in enumerate(extents):
        for name, multiplicity in extent.terms:
            slopes[position[name], number] += multiplicity
    return slopes, np.array([extent.base for extent in extents], dtype=np.int64)


def block_column(block: str) -> str:
    """Return the name of the column of a block; no axis has such a name."""
    return f"block {block}"


def block_factors(blocks: Iterable[str]) -> tuple[Extent, ...]:
    """Return the factors of a term that is there only if all of some blocks are."""
    return tuple(Extent(0, ((block_column(name), 1),)) for name in sorted(blocks))


def join_columns(widths: IntArray, blocks: IntArray) -> IntArray:
    """Put widths (n, axes) and blocks (n or 1, blocks) side by side."""
    return np.concatenate([widths, np.broadcast_to(blocks, (len(widths), blocks.shape[1]))], axis=1)


def join_tensor_columns(widths: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Put real-valued widths (..., axes) and presences (blocks,) or (..., blocks) side by side."""
    return torch.cat([widths, blocks.expand(*widths.shape[:-1], blocks.shape[-1])], dim=-1)


@in_default_state
def count_macs(model: nn.Module, example: Any) -> int:
    """Count the multiply-accumulates of one forward pass in eval mode at batch 1, operator by operator.

    Convolutions, products of matrices and vectors, attention and recurrent layers are counted, whichever kernel this
    version of torch runs them with (see `flop_counter`). A copy of the model runs, so modes, buffers and the global
    random state do not change.

    Args:
        model: Any module.
        example: Its input, a tuple of several, a mapping by name, or a list of images; only the first sample is used.
    """
    tensors = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    running = _without_gradients(shadow_copy(model))
    devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.is_cuda})
    # The fast path runs a whole attention layer as one operator that the counter does not know.
    forked = torch.random.fork_rng(devices=devices)
    with forked, torch.no_grad(), without_fast_path(), flop_counter() as counter, leaving_open_contexts():
        call_model(running, take(example, slice(1)))
    return counter.get_total_flops() // 2


def flop_counter() -> "FlopCounterMode":
    """torch's ``FlopCounterMode`` (two FLOPs per multiply-accumulate), with formulas for what some versions leave out.

    An operator without a formula silently counts as zero. torch 2.9 to 2.14 have no formula for the CPU's attention
    kernel, and no version has them for products with vectors, bilinear layers, and recurrent layers that run as one
    operator. The alternative, attention on its math backend while counting, would fail for a model that selects a
    backend itself, need memory for the scores of all heads, and set global switches.
    """
    # Imported here: it brings Triton along, a quarter of a second that only counting needs.
    from torch.utils.flop_counter import FlopCounterMode

    # Operators come and go between versions of torch: what this one lacks cannot run either.
    known = {_find_operator(name): formula for name, formula in _FORMULAS.items()}
    return FlopCounterMode(
        display=False, custom_mapping={operator: formula for operator, formula in known.items() if operator is not None}
    )


def _find_operator(name: str) -> Any:
    namespace, _, base = name.rpartition("::")
    return getattr(getattr(torch.ops, namespace or "aten"), base, None)


_Shape = Sequence[int]
"""Shape of one argument of an operator."""


def _attention(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    """Scores = query key^T, and scores times value, for every head; masks are not made use of."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _product_of_vectors(left: _Shape, _right: _Shape, *_: Any, **__: Any) -> int:
    """(k) . (k), and (n, k) @ (k): every element of the first factor is multiplied once."""
    return 2 * math.prod(left)


def _added_product_of_vectors(_added: _Shape, left: _Shape, _right: _Shape, *_: Any, **__: Any) -> int:
    """A sum + (n, k) @ (k)."""
    return 2 * math.prod(left)


def _summed_batched_product(_added: _Shape, left: _Shape, right: _Shape, *_: Any, **__: Any) -> int:
    """A sum + the sum over the batch of (batch, n, k) @ (batch, k, m)."""
    return 2 * math.prod(left) * right[-1]


def _bilinear(left: _Shape, weight: _Shape, _right: _Shape, *_: Any, **__: Any) -> int:
    """``nn.Bilinear``, (n, i) and (o, i, j) and (n, j): every weight is used once per sample."""
    return 2 * left[0] * math.prod(weight)


def _deformable_convolution(_source: _Shape, weight: _Shape, *_: Any, out_shape: _Shape, **__: Any) -> int:
    """A convolution by (o, i / groups, kernel); the interpolation between pixels is not counted."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _convolution_over_time(_source: _Shape, weight: _Shape, *_: Any, out_shape: _Shape, **__: Any) -> int:
    """(time, batch, i) by (kernel, i, o)."""
    return 2 * math.prod(out_shape) * math.prod(weight[:2])


def _recurrent_layer(inputs: _Shape, of_inputs: _Shape, of_hidden: _Shape, *_: Any, **__: Any) -> int:
    """One direction of one recurrent layer on the CPU: (steps, batch, features), a matrix each for input and hidden."""
    return 2 * math.prod(inputs[:2]) * (math.prod(of_inputs) + math.prod(of_hidden))


def _recurrent_network(inputs: _Shape, weights: Sequence[_Shape], *_: Any, **__: Any) -> int:
    """All layers and directions of a recurrent network on the GPU: every matrix is used once per step and sample."""
    return 2 * math.prod(inputs[:2]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


_FORMULAS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_attention_math_for_mps": _attention,
    "dot": _product_of_vectors,
    "vdot": _product_of_vectors,
    "mv": _product_of_vectors,
    "addmv": _added_product_of_vectors,
    "addbmm": _summed_batched_product,
    "_trilinear": _bilinear,
    "conv_tbc": _convolution_over_time,
    "torchvision::deform_conv2d": _deformable_convolution,
    "mkldnn_rnn_layer": _recurrent_layer,
    "_cudnn_rnn": _recurrent_network,
}
"""FLOPs by name of the ATen operator, from the shapes of its arguments."""


def _without_gradients(shadow: nn.Module) -> nn.Module:
    """Replace the parameters of a shadow by ones that share their values but require no gradient.

    The counter looks for the gradient function of every tensor that requires a gradient, and fails where it has none.
    """
    frozen: dict[int, nn.Parameter] = {}
    for module in shadow.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            plain = frozen.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
            setattr(module, name, plain)
    return shadow


def count_params(model: nn.Module) -> int:
    """Count the parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())

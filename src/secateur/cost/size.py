"""The size of the weights file of any architecture of a graph, without writing it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from secateur._arrays import IntArray
from secateur.cost.macs import Polynomial
from secateur.graph.graph import ChannelGraph, Extent

_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of safetensors, in the order in which a file holds its tensors; of one dtype they are sorted by name."""
_LENGTH = 8
"""Bytes of the length that a file begins with; the header behind it is filled up to a multiple of as many."""
_POWERS = 10 ** np.arange(1, 19, dtype=np.int64)
_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class FileSize:
    """Bytes of a safetensors file as a function of the widths and of the blocks that are there.

    bytes(w, b) = 8 + h(w, b) + sum over tensors of bytes per number * product of the extents(w) of its dimensions,

    for those whose blocks are all there, with h the length of the JSON header: each tensor's name, dtype, shape and
    place, written in decimal digits, filled up with spaces to a multiple of 8. Parameters and buffers are counted as an
    artifact holds them: shared ones once, buffers outside of the state dict too. Conventions are those of `CostModel`.

    Exact if no branch is narrower than its stream. For an untied graph (`secateur.graph.untie`) it is an upper bound:
    that every branch is narrower and needs an index of its places.

    Attributes:
        axes: Names of the prunable axes: the columns of every width array.
        blocks: Names of the removable blocks: the columns of every block array.
        tensors: In the order of the file.
    """

    axes: tuple[str, ...]
    blocks: tuple[str, ...]
    tensors: "tuple[Stored, ...]"

    field = "size_bytes"
    """The field of `Cost` that this computes."""

    @classmethod
    def of(cls, model: nn.Module, graph: ChannelGraph) -> "FileSize":
        """The file of a traced model.

        Args:
            model: For the dtypes, and for buffers outside of the state dict.
            graph: Its channel graph.
        """
        ranks = {name: rank for rank, name in enumerate(_DTYPES.values())}
        found = sorted(_stored(model, graph), key=lambda stored: (ranks[stored.dtype], stored.name.encode()))
        axes, blocks = tuple(axis.name for axis in graph.prunable), tuple(block.name for block in graph.removable)
        return cls(axes, blocks, tuple(found))

    def of_widths(self, widths: IntArray, blocks: IntArray | None = None) -> IntArray:
        """Bytes of many architectures at once.

        Args:
            widths: (n, axes) whole numbers, columns in the order of ``axes``.
            blocks: (n, blocks) or (1, blocks), 1 where a block is kept and 0 where it is removed; None keeps all.

        Returns:
            (n,) int64.
        """
        if blocks is None:
            blocks = np.ones((1, len(self.blocks)), dtype=np.int64)
        columns = np.concatenate([widths, np.broadcast_to(blocks, (len(widths), len(self.blocks)))], axis=1)
        chunks = [self._of(columns[start : start + _CHUNK]) for start in range(0, len(columns), _CHUNK)]
        return np.concatenate(chunks) if chunks else np.zeros(0, dtype=np.int64)

    def _of(self, columns: IntArray) -> IntArray:
        place = np.zeros(len(columns), dtype=np.int64)
        header, count = np.full_like(place, 2), np.zeros_like(place)
        slopes, bases, first = self._extents
        extents = columns @ slopes + bases
        for number, stored in enumerate(self.tensors):
            there = columns[:, self._there[number]].prod(axis=1)
            dims = extents[:, first[number] : first[number + 1]]
            end = place + there * stored.each * dims.prod(axis=1)
            entry = stored.entry + _digits(dims).sum(axis=1) + _digits(place) + _digits(end)
            header, count, place = header + there * entry, count + there, end
        header += np.maximum(count - 1, 0)
        return _LENGTH + -(-header // _LENGTH) * _LENGTH + place

    def of_tensor(self, widths: Tensor, blocks: Tensor | None = None) -> Tensor:
        """Bytes (...) of real-valued widths (..., axes) and presences (..., blocks), 0 to 1, with the whole header."""
        if blocks is None:
            blocks = torch.ones(len(self.blocks), dtype=widths.dtype, device=widths.device)
        columns = torch.cat([widths, blocks.expand(*widths.shape[:-1], len(self.blocks))], dim=-1)
        return self._header + self._data.at_tensor(columns)

    @cached_property
    def _header(self) -> int:
        """Bytes of the header when nothing is removed, which is the longest."""
        header = 2 + sum(stored.entry for stored in self.tensors) + max(len(self.tensors) - 1, 0)
        return _LENGTH + -(-header // _LENGTH) * _LENGTH

    @cached_property
    def _data(self) -> Polynomial:
        factors = {name: Extent(0, ((f"block {name}", 1),)) for name in self.blocks}
        terms = (
            (float(each.each), (*each.extents, *(factors[name] for name in each.blocks if name in factors)))
            for each in self.tensors
        )
        return Polynomial.of(terms, (*self.axes, *(f"block {name}" for name in self.blocks)))

    @cached_property
    def _extents(self) -> tuple[IntArray, IntArray, list[int]]:
        """Slopes (columns, extents) and bases (extents,) of all dimensions, and where each tensor's begin."""
        column = {name: number for number, name in enumerate(self.axes)}
        extents = [extent for stored in self.tensors for extent in stored.extents]
        slopes = np.zeros((len(self.axes) + len(self.blocks), len(extents)), dtype=np.int64)
        for number, extent in enumerate(extents):
            for name, multiplicity in extent.terms:
                slopes[column[name], number] += multiplicity
        first = np.cumsum([0, *(len(stored.extents) for stored in self.tensors)]).tolist()
        return slopes, np.array([extent.base for extent in extents], dtype=np.int64), first

    @cached_property
    def _there(self) -> list[list[int]]:
        column = {name: len(self.axes) + number for number, name in enumerate(self.blocks)}
        return [[column[name] for name in stored.blocks if name in column] for stored in self.tensors]


@dataclass(frozen=True)
class Stored:
    """A tensor of the file.

    Attributes:
        name: In the file.
        dtype: Name of safetensors.
        each: Bytes of one number.
        extents: Of its dimensions.
        blocks: Names of the blocks that it goes with.
    """

    name: str
    dtype: str
    each: int
    extents: tuple[Extent, ...]
    blocks: tuple[str, ...]

    @property
    def entry(self) -> int:
        """Bytes of its part of the header, without the digits."""
        text = f'{json.dumps(self.name, ensure_ascii=False)}:{{"dtype":"{self.dtype}","shape":[],"data_offsets":[,]}}'
        return len(text.encode()) + max(len(self.extents) - 1, 0)


def _stored(model: nn.Module, graph: ChannelGraph) -> Iterator[Stored]:
    around: dict[str, list[str]] = {}
    for block in graph.removable:
        for name in block.tensors:
            around.setdefault(name, []).append(block.name)
    outlets = [axis.residual_output for axis in graph.prunable if axis.into is not None]
    seen: set[int] = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            extents = graph.tensors.get(name, tuple(Extent(size) for size in tensor.shape))
            dtype, blocks = _DTYPES[tensor.dtype], tuple(sorted(around.get(name, ())))
            yield Stored(_wrapped(name, outlets), dtype, tensor.element_size(), extents, blocks)
    for axis in graph.prunable:
        if axis.into is not None:
            size = Extent(graph.by_name[axis.into].size)
            yield Stored(f"{axis.residual_output}.index", _DTYPES[torch.int64], 8, (size,), ())


def _wrapped(name: str, outlets: list[str]) -> str:
    """The name of a tensor once what widens a branch is around its module."""
    for outlet in sorted(outlets, key=len, reverse=True):
        if name.startswith(f"{outlet}."):
            return f"{outlet}.inner{name[len(outlet) :]}"
    return name


def _digits(values: IntArray) -> IntArray:
    """Decimal digits of numbers that are not negative."""
    return np.searchsorted(_POWERS, values, side="right") + 1

"""The size of the weights file of any architecture of a graph, without writing it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from secateur._arrays import IntArray
from secateur.cost.macs import (
    Polynomial,
    block_column,
    block_factors,
    join_columns,
    join_tensor_columns,
    linear_extents,
)
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
"""Names of dtypes in safetensors, in the order in which a file holds its tensors; within one, by name."""
_LENGTH = 8
"""Bytes of the length at the beginning of a file; the header behind it is padded to a multiple of this."""
_POWERS = 10 ** np.arange(1, 19, dtype=np.int64)
_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class FileSize:
    """The bytes of a safetensors file as a function of the widths w and of the kept blocks b.

    bytes(w, b) = 8 + h(w, b) + sum over tensors of bytes per number * product of the extents(w) of its dimensions,

    over those whose blocks are all kept, with h the length of the JSON header: each tensor's name, dtype, shape and
    offsets, in decimal digits, padded with spaces to a multiple of 8. Parameters and buffers are counted as an
    artifact holds them: shared ones once, and also buffers outside of the state dict. Conventions are those of
    `CostModel`.

    The result is exact if no branch is narrower than its stream. For an untied graph (`secateur.graph.untie`) it is an
    upper bound, for which every branch is narrower and needs an index of its positions.

    Attributes:
        axes: Names of the prunable axes: the columns of every width array.
        blocks: Names of the removable blocks: the columns of every block array.
        tensors: In the order of the file.
    """

    axes: tuple[str, ...]
    blocks: tuple[str, ...]
    tensors: "tuple[TensorSize, ...]"

    def __repr__(self) -> str:
        return f"FileSize({len(self.tensors)} tensors, {len(self.axes)} axes, {len(self.blocks)} blocks)"

    field = "size_bytes"
    """The field of `Cost` that this computes."""

    @classmethod
    def of(cls, model: nn.Module, graph: ChannelGraph) -> "FileSize":
        """Return the model of the file of a traced model.

        Args:
            model: The model, for its dtypes and for buffers outside of the state dict.
            graph: Its channel graph.
        """
        ranks = {name: rank for rank, name in enumerate(_DTYPES.values())}
        found = sorted(_stored(model, graph), key=lambda stored: (ranks[stored.dtype], stored.name.encode()))
        axes, blocks = tuple(axis.name for axis in graph.prunable), tuple(block.name for block in graph.removable)
        return cls(axes, blocks, tuple(found))

    def of_widths(self, widths: IntArray, blocks: IntArray | None = None) -> IntArray:
        """Compute the bytes of many architectures at once.

        Args:
            widths: (n, axes) whole numbers, columns in the order of ``axes``.
            blocks: (n, blocks) or (1, blocks), 1 where a block is kept and 0 where it is removed; None keeps all.

        Returns:
            (n,) int64.
        """
        if blocks is None:
            blocks = np.ones((1, len(self.blocks)), dtype=np.int64)
        columns = join_columns(widths, blocks)
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
            end = place + there * stored.itemsize * dims.prod(axis=1)
            entry = stored.entry + _digits(dims).sum(axis=1) + _digits(place) + _digits(end)
            header, count, place = header + there * entry, count + there, end
        header += np.maximum(count - 1, 0)
        return _LENGTH + -(-header // _LENGTH) * _LENGTH + place

    def of_tensor(self, widths: Tensor, blocks: Tensor | None = None) -> Tensor:
        """Compute bytes (...) of real-valued widths (..., axes) and presences (..., blocks), with the whole header."""
        if blocks is None:
            blocks = torch.ones(len(self.blocks), dtype=widths.dtype, device=widths.device)
        return self._header + self._data.at_tensor(join_tensor_columns(widths, blocks))

    @cached_property
    def _header(self) -> int:
        """Bytes of the header when nothing is removed, which is the longest."""
        header = 2 + sum(stored.entry for stored in self.tensors) + max(len(self.tensors) - 1, 0)
        return _LENGTH + -(-header // _LENGTH) * _LENGTH

    @cached_property
    def _data(self) -> Polynomial:
        removable = frozenset(self.blocks)
        terms = (
            (float(each.itemsize), (*each.extents, *block_factors(removable.intersection(each.blocks))))
            for each in self.tensors
        )
        return Polynomial.of(terms, (*self.axes, *map(block_column, self.blocks)))

    @cached_property
    def _extents(self) -> tuple[IntArray, IntArray, list[int]]:
        """Slopes and bases of all dimensions (see `linear_extents`), and the first one of each tensor."""
        extents = [extent for stored in self.tensors for extent in stored.extents]
        first = np.cumsum([0, *(len(stored.extents) for stored in self.tensors)]).tolist()
        return *linear_extents(extents, (*self.axes, *map(block_column, self.blocks))), first

    @cached_property
    def _there(self) -> list[list[int]]:
        column = {name: len(self.axes) + number for number, name in enumerate(self.blocks)}
        return [[column[name] for name in stored.blocks if name in column] for stored in self.tensors]


@dataclass(frozen=True)
class TensorSize:
    """A tensor of the file and its size.

    Attributes:
        name: In the file.
        dtype: Name of safetensors.
        itemsize: Bytes of one element.
        extents: Of its dimensions.
        blocks: Names of the blocks that it is removed with.
    """

    name: str
    dtype: str
    itemsize: int
    extents: tuple[Extent, ...]
    blocks: tuple[str, ...]

    @property
    def entry(self) -> int:
        """Bytes of its entry in the header, without the digits."""
        text = f'{json.dumps(self.name, ensure_ascii=False)}:{{"dtype":"{self.dtype}","shape":[],"data_offsets":[,]}}'
        return len(text.encode()) + max(len(self.extents) - 1, 0)


def _stored(model: nn.Module, graph: ChannelGraph) -> Iterator[TensorSize]:
    around: dict[str, list[str]] = {}
    for block in graph.removable:
        for name in block.tensors:
            around.setdefault(name, []).append(block.name)
    outlets = [axis.residual_output for axis in graph.prunable if axis.residual_axis is not None]
    seen: set[int] = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            extents = graph.tensors.get(name, tuple(Extent(size) for size in tensor.shape))
            dtype, blocks = _DTYPES[tensor.dtype], tuple(sorted(around.get(name, ())))
            yield TensorSize(_wrapped(name, outlets), dtype, tensor.element_size(), extents, blocks)
    for axis in graph.prunable:
        if axis.residual_axis is not None:
            size = Extent(graph.by_name[axis.residual_axis].size)
            yield TensorSize(f"{axis.residual_output}.index", _DTYPES[torch.int64], 8, (size,), ())


def _wrapped(name: str, outlets: list[str]) -> str:
    """Return the name of a tensor once the module that expands a branch is around its own."""
    for outlet in sorted(outlets, key=len, reverse=True):
        if name.startswith(f"{outlet}."):
            return f"{outlet}.inner{name[len(outlet) :]}"
    return name


def _digits(values: IntArray) -> IntArray:
    """Count the decimal digits of numbers that are not negative."""
    return np.searchsorted(_POWERS, values, side="right") + 1

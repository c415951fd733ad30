"""Which part of every tensor a subnet uses: views where channels stand in a row, copies elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.graph import ChannelGraph, Site

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


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

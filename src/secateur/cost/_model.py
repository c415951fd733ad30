"""The cost of any architecture of a graph, from a formula: nothing is built and nothing runs."""

import numpy as np
import torch

from secateur.architecture import Architecture
from secateur.cost._cost import Cost
from secateur.cost._polynomial import IntArray, Polynomial
from secateur.errors import SurgeryError
from secateur.graph import ChannelGraph


class CostModel:
    """MACs and params as functions of the widths.

    macs(w) = sum over operations of factor * product of extents(w);
    params(w) = sum over parameters of the product of the extents(w) of its dimensions. Extents are linear in the
    widths, so both are polynomials that never decrease: more channels never cost less.

    Attributes:
        axes: Names of the prunable axes: the columns of every width array.
        sizes: (axes,) full widths.
        original: Cost of the whole model.
    """

    def __init__(self, graph: ChannelGraph):
        self.axes: tuple[str, ...] = tuple(axis.name for axis in graph.prunable)
        self._frozen = {axis.name: axis.size for axis in graph.axes if axis.frozen_because is not None}
        self.sizes: IntArray = np.array([axis.size for axis in graph.prunable], dtype=np.int64)
        self._macs = Polynomial.of(((op.factor, op.extents) for op in graph.operations), self.axes)
        self._params = Polynomial.of(((1.0, graph.tensors[name]) for name in graph.parameters), self.axes)
        self.original: Cost = self.cost(Architecture())

    def cost(self, architecture: Architecture) -> Cost:
        """Cost of one architecture.

        Raises:
            SurgeryError: If it names an axis or a channel that the graph does not have.
        """
        widths = self.widths(architecture)
        macs, params = self.of_widths(widths[None])
        return Cost(macs=int(macs[0]), params=int(params[0]))

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

    def of_widths(self, widths: IntArray) -> tuple[IntArray, IntArray]:
        """Costs of many architectures at once, exact.

        Args:
            widths: (n, axes) whole numbers, columns in the order of ``axes``.

        Returns:
            (macs (n,), params (n,)), int64.

        Raises:
            ValueError: If ``widths`` has another shape or is not whole numbers.
        """
        widths = np.asarray(widths)
        if widths.ndim != 2 or widths.shape[1] != len(self.axes) or not np.issubdtype(widths.dtype, np.integer):
            raise ValueError(
                f"`widths` must be whole numbers of shape (n, {len(self.axes)}), one column per prunable axis; "
                f"got {widths.dtype} of shape {widths.shape}."
            )
        return self._macs.at(widths), self._params.at(widths)

    def macs_of(self, widths: torch.Tensor) -> torch.Tensor:
        """MACs (...) of real-valued widths (..., axes), differentiable in the widths; for relaxed searches."""
        return self._macs.at_tensor(widths)

    def params_of(self, widths: torch.Tensor) -> torch.Tensor:
        """Parameters (...) of real-valued widths (..., axes), differentiable in the widths; for relaxed searches."""
        return self._params.at_tensor(widths)

"""Sums of products of channel counts, compiled once and evaluated for many widths at a time."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from secateur.graph import Extent

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

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

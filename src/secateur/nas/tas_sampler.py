"""The distribution over candidate widths and depths that TAS learns, and what is drawn from it in a step."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from secateur._arrays import BoolArray, IntArray
from secateur.errors import BudgetError
from secateur.nas.common import Depths, ReferenceDepths, Widths
from secateur.nas.mixture import Mixture, WidthExpansion
from secateur.nas.supernet import Subnet, Supernet
from secateur.search.base import SearchContext
from secateur.search.space import Streams


@dataclass(frozen=True, eq=False)
class WidthCandidates:
    """All candidates of a search as tables, whose rows are padded with the last candidate.

    Attributes:
        axes: (n,) numbers of the prunable axes that have a choice.
        widths: (n, candidates) ascending.
        open_widths: (n, candidates) False for padding.
        chains: (m,) numbers of the chains of the graph that have a choice.
        depths: (m, candidates) numbers of blocks kept, ascending.
        open_depths: (m, candidates) False for padding.
        streams: The widths that depend on each other.
    """

    axes: IntArray
    widths: IntArray
    open_widths: BoolArray
    chains: IntArray
    depths: IntArray
    open_depths: BoolArray
    streams: Streams

    @classmethod
    def of(
        cls,
        context: SearchContext,
        widths: Widths | None,
        depths: Depths | ReferenceDepths | None,
        seen: frozenset[str],
    ) -> "WidthCandidates":
        """Return the candidates of a search.

        Args:
            context: The allowed widths and the chains of blocks.
            widths: Candidate widths; None leaves all axes whole.
            depths: Candidate depths; None keeps all blocks.
            seen: Names of the axes that can be searched; the others stay whole.

        Raises:
            BudgetError: If nothing has two candidates.
        """
        names = context.costs.axes
        by_axis = {
            number: widths.of(levels)
            for number, levels in enumerate(context.levels)
            if widths is not None and names[number] in seen
        }
        by_chain = {} if depths is None else dict(enumerate(depths.of_chains(context.inputs.graph)))
        by_axis, by_chain = (
            {number: found for number, found in rows.items() if len(found) > 1} for rows in (by_axis, by_chain)
        )
        if not by_axis and not by_chain:
            raise BudgetError(
                "`space` must leave some axis two widths, or some chain of blocks two depths; got none with a choice. "
                "Lower divisor, min_width or min_kept_fraction, or search depths too (for a net with residual blocks)."
            )
        return cls(*_table(by_axis), *_table(by_chain), context.streams)


def _table(rows: dict[int, tuple[int, ...]]) -> tuple[IntArray, IntArray, BoolArray]:
    longest = max(map(len, rows.values()), default=1)
    table = np.array([(*row, *[row[-1]] * (longest - len(row))) for row in rows.values()], dtype=np.int64)
    valid = np.array([[column < len(row) for column in range(longest)] for row in rows.values()], dtype=np.bool_)
    return np.array(list(rows), dtype=np.int64), table.reshape(-1, longest), valid.reshape(-1, longest)


class WidthDistribution(nn.Module):
    """Logits of every candidate: p = softmax(logits) row by row, padding has probability 0.

    Attributes:
        widths: (axes with a choice, candidates).
        depths: (chains with a choice, candidates).

    Args:
        candidates: The candidates.
        deviation: Standard deviation of the first logits; 0.01 in the reference code of TAS.
        seed: Seed of the first logits.
    """

    def __init__(self, candidates: WidthCandidates, deviation: float = 0.0, seed: int = 0):
        super().__init__()
        self.candidates = candidates
        random = torch.Generator().manual_seed(seed)
        self.widths, self.depths = (
            nn.Parameter(deviation * torch.randn(table.shape, generator=random))
            for table in (candidates.widths, candidates.depths)
        )

    @property
    def log_widths(self) -> Tensor:
        """log p of the widths; -inf for padding."""
        return _log_softmax(self.widths, torch.from_numpy(self.candidates.open_widths))

    @property
    def log_depths(self) -> Tensor:
        """log p of the depths; -inf for padding."""
        return _log_softmax(self.depths, torch.from_numpy(self.candidates.open_depths))

    @property
    def entropy(self) -> float:
        """Mean over all rows of H(p) / log(candidates): 1 is undecided, 0 is decided."""
        with torch.no_grad():
            # A row of one candidate is decided: clamping the count keeps log(1) = 0 out of the denominator.
            parts: list[Tensor] = []
            for log_p in (self.log_widths, self.log_depths):
                # p log p is 0 where p is 0, but 0 * -inf would be NaN.
                p = log_p.exp()
                count = (p > 0).sum(1).clamp_min(2)
                parts.append(-(p * log_p.clamp_min(-1e3)).sum(1) / count.log())
            return float(torch.cat(parts).mean())


def _log_softmax(logits: Tensor, valid: Tensor) -> Tensor:
    return logits.masked_fill(~valid.to(logits.device), -math.inf).log_softmax(1)


def gumbel(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Draw standard Gumbel noise -log(-log u), on the CPU."""
    # Never 0 or 1, so that the noise is finite.
    u = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return -torch.log(-torch.log(u))


def draw_two(log_p: Tensor, temperature: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw two different candidates of every row, and return them with their weights.

    With z = (log p + g) / tau, g Gumbel noise, two candidates are drawn without replacement from softmax(z), and
    weighted by the softmax of their two z. Drawing without replacement is taking the two highest of z + g', g' fresh
    Gumbel noise: nothing underflows when tau is small.

    Args:
        log_p: (rows, candidates), -inf where there is none; at least two others in each row.
        temperature: tau > 0.
        generator: Random numbers of the noise, on the CPU: the draws are the same on every device.

    Returns:
        (rows, 2) indices, the lower one first, and (rows, 2) weights, differentiable, that sum to 1.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, Eq. (2), (3) and the sampling after them.
    """
    noise, order = gumbel(log_p.shape, generator), gumbel(log_p.shape, generator)
    z = (log_p + noise.to(log_p)) / temperature
    # Which two are drawn has no gradient; their weights have. Candidates are ascending, so that after sorting the first
    # one is the narrower.
    drawn = (z.detach() + order.to(log_p)).topk(2, dim=1).indices.sort(dim=1).values
    return drawn, z.gather(1, drawn).softmax(1)


def draw_all(log_p: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw a weight for every candidate: softmax((log p + g) / tau), g Gumbel noise; (rows, candidates).

    References:
        Dong & Yang (TAS), arXiv:1905.09717, Eq. (3), for depths, Eq. (5).
    """
    return ((log_p + gumbel(log_p.shape, generator).to(log_p)) / temperature).softmax(1)


@dataclass(frozen=True, eq=False)
class SampledWidths:
    """One draw: the subnet to run, and the narrower widths and depths to blend into it."""

    subnet: Subnet
    mixture: Mixture


def draw(
    supernet: Supernet,
    choice: WidthDistribution,
    temperature: float,
    expansion: WidthExpansion,
    generator: torch.Generator,
) -> SampledWidths:
    """Draw two widths of every axis, and weights for all depths of every chain."""
    candidates, sizes = choice.candidates, list(supernet.graph.sizes.values())
    wide, narrow = list(sizes), list(sizes)
    device = choice.widths.device
    # Axes without candidates are whole: all weight is on the wider of two equal widths.
    weights = torch.tensor([[0.0, 1.0]], device=device).repeat(len(sizes), 1)
    if len(candidates.axes):
        drawn, shares = draw_two(choice.log_widths, temperature, generator)
        picked = torch.from_numpy(candidates.widths).gather(1, drawn.cpu()).tolist()
        for number, (small, large) in zip(candidates.axes.tolist(), picked, strict=True):
            narrow[number], wide[number] = small, large
        weights = weights.index_copy(0, torch.from_numpy(candidates.axes).to(device), shares)
    # What depends on a stream follows it, before the narrower widths are limited by the wider ones.
    wide = candidates.streams.fitted(np.array([wide]))[0].tolist()
    narrow = [min(few, many) for few, many in zip(narrow, wide, strict=True)]
    depths: tuple[Tensor, ...] = ()
    if len(candidates.chains):
        depths = _spread(supernet, choice, draw_all(choice.log_depths, temperature, generator))
    return SampledWidths(Subnet(tuple(wide)), Mixture(tuple(narrow), weights, depths, expansion))


def _spread(supernet: Supernet, choice: WidthDistribution, shares: Tensor) -> tuple[Tensor, ...]:
    """Return for each chain of the graph the weight of every number of blocks."""
    found = [_all_of(len(chain), shares) for chain in supernet.graph.chains]
    for row, number in enumerate(choice.candidates.chains.tolist()):
        depths = torch.from_numpy(choice.candidates.depths[row]).to(shares.device)
        # Added, because padding repeats the last depth, with share 0.
        found[number] = torch.zeros_like(found[number]).index_add(0, depths, shares[row])
    return tuple(found)


def _all_of(blocks: int, like: Tensor) -> Tensor:
    weights = torch.zeros(blocks + 1).to(like)
    weights[-1] = 1
    return weights

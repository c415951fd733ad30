"""What the relaxed choice is expected to cost, and the loss that draws it to the budget."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.cost import Cost
from secateur.search._problem import Problem
from secateur.search._tas._candidates import Candidates
from secateur.search._tas._choice import Choice


@dataclass(frozen=True, eq=False)
class Price:
    """The cost of a choice.

    Attributes:
        problem: Costs and limits.
        candidates: What there is to choose from.
        tolerance: How far under the budget is near enough, as a fraction of the whole model's cost.
    """

    problem: Problem
    candidates: Candidates
    tolerance: float

    def expected(self, choice: Choice) -> dict[str, Tensor]:
        """E[cost] by limited field, in its own unit, float64, differentiable.

        Widths are replaced by their expectations under p and every block by the probability that it is kept. For
        operations whose factors are different axes (all but those that have one axis, or a stream and its branch, at
        both ends) and blocks that do not lie in each other this is the expectation itself, since costs are multilinear
        and choices independent. In an untied graph a branch counts with E[min] of its own width and the stream's, and
        a stream that is nothing but the sum of its branches with E[max] of theirs. A latency between well aligned
        widths is interpolated, so its steps do not show here; what is most likely is priced with them.
        """
        costs, device = self.problem.costs, choice.widths.device
        widths = torch.as_tensor(costs.sizes, dtype=torch.float64, device=device)
        if len(self.candidates.axes):
            table = torch.as_tensor(self.candidates.widths, dtype=torch.float64, device=device)
            means = (choice.log_widths.double().exp() * table).sum(1)
            widths = widths.index_copy(0, torch.as_tensor(self.candidates.axes, device=device), means)
        streams = self.problem.streams
        for branch, stream in streams.branches.tolist():
            if stream not in self.candidates.axes:
                continue
            narrower = -_expected_maximum([(-w, p) for w, p in self._drawn(choice, (branch, stream))])
            widths = widths.index_put((torch.tensor([branch], device=device),), narrower)
        for stream, branches in streams.sums:
            widest = _expected_maximum(self._drawn(choice, branches.tolist()))
            widths = widths.index_put((torch.tensor([stream], device=device),), widest)
        return costs.expected(self.problem.limits, widths, self.presence(choice))

    def _drawn(self, choice: Choice, axes: Iterable[int]) -> list[tuple[Tensor, Tensor]]:
        """The widths of each axis and their probabilities; axes without a choice are whole."""
        row = {axis: number for number, axis in enumerate(self.candidates.axes.tolist())}
        p = choice.log_widths.double().exp()
        table = torch.as_tensor(self.candidates.widths, dtype=torch.float64, device=p.device)
        whole = torch.as_tensor(self.problem.costs.sizes, dtype=torch.float64, device=p.device)
        one = p.new_ones(1)
        return [(table[row[axis]], p[row[axis]]) if axis in row else (whole[axis].view(1), one) for axis in axes]

    def presence(self, choice: Choice) -> Tensor:
        """(blocks,) probability that each removable block is kept."""
        costs = self.problem.costs
        present = torch.as_tensor(costs.present, dtype=torch.float64, device=choice.depths.device)
        column = {name: index for index, name in enumerate(costs.blocks)}
        p = choice.log_depths.double().exp()
        for row, number in enumerate(self.candidates.chains.tolist()):
            depths = torch.as_tensor(self.candidates.depths[row], device=p.device)
            for place, block in enumerate(self.problem.evidence.graph.chains[number], 1):
                kept = (p[row] * (depths >= place)).sum()
                present = present.index_put((torch.tensor([column[block.name]], device=p.device),), kept)
        return present

    def most_likely(self, choice: Choice) -> Cost:
        """Cost of the architecture of the most likely candidates."""
        widths, blocks = self.widths_at(self.top(choice.log_widths)), self.blocks_at(self.top(choice.log_depths))
        return self.problem.costs.cost_of(self.problem.streams.fitted(widths[None])[0], blocks)

    @staticmethod
    def top(log_p: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """The most likely candidate of every row."""
        return log_p.detach().cpu().argmax(1).numpy().astype(np.int64)

    def widths_at(
        self, picked: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """(axes,) widths of all prunable axes when each choice takes a candidate by number."""
        widths = self.problem.costs.sizes.copy()
        widths[self.candidates.axes] = self.candidates.widths[np.arange(len(picked)), picked]
        return widths

    def blocks_at(
        self, picked: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """(blocks,) 1 for every removable block that is kept when each chain takes a candidate by number."""
        costs = self.problem.costs
        column = {name: index for index, name in enumerate(costs.blocks)}
        present = costs.present.copy()
        for row, number in enumerate(self.candidates.chains.tolist()):
            for block in self.problem.evidence.graph.chains[number][self.candidates.depths[row, picked[row]] :]:
                present[column[block.name]] = 0
        return present

    def loss(self, choice: Choice) -> Tensor:
        """+log E if the most likely architecture costs more than the budget, -log E if less by over the tolerance.

        With several limits the one counts whose budget is fullest. E is relative to the whole model's cost, which
        changes no gradient.

        References:
            Dong & Yang (TAS), arXiv:1905.09717, Eq. (8), with the lower bound R - t * F_full of the reference code
            (the paper writes (1 - t) R).
        """
        original, limits = self.problem.costs.original, self.problem.limits
        now = self.most_likely(choice)
        field = max(limits, key=lambda name: getattr(now, name) / max(limits[name], 1e-300))
        expected = torch.log(self.expected(choice)[field] / (getattr(original, field) or 1))
        cost, limit = getattr(now, field), limits[field]
        if cost > limit:
            return expected
        if cost < limit - self.tolerance * getattr(original, field):
            return -expected
        return 0 * expected

    def fractions(self, cost: Mapping[str, float] | Cost) -> dict[str, float]:
        """Limited fields as fractions of the whole model's."""
        original = self.problem.costs.original
        values = cost if isinstance(cost, Mapping) else {name: getattr(cost, name) for name in self.problem.limits}
        return {name: value / (getattr(original, name) or 1) for name, value in values.items()}


def _expected_maximum(drawn: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """E[max] of independent draws = sum_v v * (F(v) - F(v-)), F(v) the product of their P(value <= v).

    Args:
        drawn: Values and probabilities of each.
    """
    values = torch.cat([each for each, _ in drawn]).unique()
    below = torch.stack([(p[:, None] * (each[:, None] <= values)).sum(0) for each, p in drawn]).prod(0)
    return (values * torch.diff(below, prepend=below.new_zeros(1))).sum()

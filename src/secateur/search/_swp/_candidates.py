"""Candidates of every stage, and what is known of them."""

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.search._problem import FloatArray
from secateur.search._space import IntArray
from secateur.search._swp._options import Options, Rows, StageOptions
from secateur.search._swp._sweep import undominated
from secateur.search._swp._table import CostArray, Table

_TRIES = 20
"""So many draws for each candidate that is wanted; a space that is nearly used up gives fewer."""


class Candidates:
    """The candidates of every stage that were judged, their losses, and which ones to judge next.

    Args:
        options: The choices.
        seed: Of what is drawn.

    Attributes:
        rounds: Rounds judged.
        rows: For each stage its candidates, in the order in which they were judged.
        losses: For each stage their losses.
    """

    def __init__(self, options: Options, seed: int):
        self._options, self._seed = options, seed
        self.rounds = 0
        self.rows: list[list[IntArray]] = [[] for _ in options.of_stage]
        self.losses: list[list[float]] = [[] for _ in options.of_stage]

    def proposed(self, count: int) -> list[Rows]:
        """Up to ``count`` networks with a new candidate in every stage that has any left.

        In the first round the candidates are spread over all sizes. Later ones descend from those that no other one of
        their stage beats in loss and size: each choice comes from one of two parents, and some move by a step.

        Where a stage has no new candidate its first is taken again.
        """
        draw = np.random.default_rng((self._seed, self.rounds))
        new = [self._new(number, count, draw) for number in range(len(self._options.of_stage))]
        most = max(map(len, new))
        firsts = [(self.rows[n] or new[n])[0] for n in range(len(new))]
        return [
            tuple(rows[at] if at < len(rows) else first for rows, first in zip(new, firsts, strict=True))
            for at in range(most)
        ]

    def judged(self, proposed: Sequence[Rows], losses: FloatArray) -> None:
        """Enter what was proposed.

        Args:
            proposed: By `proposed`.
            losses: (networks, stages).
        """
        for stage, (rows, known) in enumerate(zip(self.rows, self.losses, strict=True)):
            seen = {tuple(row.tolist()) for row in rows}
            for number, network in enumerate(proposed):
                row = network[stage]
                if tuple(row.tolist()) not in seen:
                    seen.add(tuple(row.tolist()))
                    rows.append(row)
                    known.append(float(losses[number, stage]))
        self.rounds += 1

    def network(self, picked: Sequence[int]) -> Rows:
        """The candidates of these numbers, one of each stage."""
        return tuple(rows[number] for rows, number in zip(self.rows, picked, strict=True))

    def table(self) -> Table:
        """Losses and costs of all candidates so far."""
        problem, options = self._options.problem, self._options
        tiny = self._costs([options.tiny])
        base = {field: values[0].item() for field, values in tiny.items()}
        costs: dict[str, list[CostArray]] = {field: [] for field in base}
        for stage, rows in enumerate(self.rows):
            networks = [(*options.tiny[:stage], row, *options.tiny[stage + 1 :]) for row in rows]
            for field, values in self._costs(networks).items():
                costs[field].append(np.maximum(values - base[field], 0))
        losses = tuple(np.array(known, dtype=np.float64) for known in self.losses)
        return Table(losses, {field: tuple(found) for field, found in costs.items()}, base, problem.limits)

    def _costs(self, networks: Sequence[Rows]) -> Mapping[str, CostArray]:
        """Cost of whole networks by field, (networks,) each."""
        both = [self._options.network(rows) for rows in networks]
        widths, blocks = np.stack([widths for widths, _ in both]), np.stack([blocks for _, blocks in both])
        problem = self._options.problem
        return problem.costs.fields({"macs", *problem.limits}, widths, blocks)

    def _new(self, stage: int, count: int, draw: np.random.Generator) -> list[IntArray]:
        options, seen = self._options.of_stage[stage], {tuple(row.tolist()) for row in self.rows[stage]}
        found: list[IntArray] = []
        parents = self._parents(stage)
        first = [options.tops, np.zeros_like(options.tops)] if self.rounds == 0 else []
        for number in range(count * _TRIES):
            if len(found) == min(count, options.size - len(self.rows[stage])):
                break
            if number < len(first):
                row = first[number]
            else:
                row = _child(options, parents, draw) if len(parents) else _spread(options, draw)
            if tuple(row.tolist()) not in seen:
                seen.add(tuple(row.tolist()))
                found.append(row)
        return found

    def _parents(self, stage: int) -> list[IntArray]:
        """The candidates of a stage that no other one beats in loss and limited costs, from the best loss on."""
        if self.rounds == 0 or not self.rows[stage]:
            return []
        table = self.table()
        whole = table.whole
        costs = np.stack([whole.costs[field][stage] for field in table.limits])
        best = undominated(whole.losses[stage], costs)
        best = best[np.argsort(whole.losses[stage][best], kind="stable")]
        return [self.rows[stage][number] for number in best.tolist()]

    def to_json(self) -> dict[str, object]:
        """Everything, as plain data."""
        rows = [[row.tolist() for row in stage] for stage in self.rows]
        return {"rounds": self.rounds, "rows": rows, "losses": self.losses}

    def restore(self, saved: Mapping[str, list[list[object]]]) -> None:
        """Inverse of `to_json`."""
        self.rounds = int(saved["rounds"])  # type: ignore[call-overload]
        self.rows = [[np.array(row, dtype=np.int64) for row in stage] for stage in saved["rows"]]
        self.losses = [[float(loss) for loss in stage] for stage in saved["losses"]]  # type: ignore[arg-type]


def _spread(options: StageOptions, draw: np.random.Generator) -> IntArray:
    """A candidate about a size that is drawn: independent choices alone would nearly all have the middle size."""
    middle, width = draw.uniform(-0.25, 1.25), 0.35
    noise = draw.uniform(-width, width, len(options.tops))
    return np.rint(np.clip(middle + noise, 0, 1) * options.tops).astype(np.int64)


def _child(options: StageOptions, parents: Sequence[IntArray], draw: np.random.Generator) -> IntArray:
    """Each choice from one of two neighbouring parents, about one and a half of them moved by up to two steps."""
    at = int(draw.integers(len(parents)))
    other = min(max(at + int(draw.integers(-2, 3)), 0), len(parents) - 1)
    genes = np.where(draw.random(len(options.tops)) < 0.5, parents[at], parents[other])
    moved = draw.random(len(options.tops)) < 1.5 / max(len(options.tops), 1)
    steps = draw.choice([-2, -1, 1, 2], len(options.tops), p=[0.15, 0.35, 0.35, 0.15])
    return np.clip(np.where(moved, genes + steps, genes), 0, options.tops).astype(np.int64)

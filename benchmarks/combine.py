"""Measure the seconds of combining stages exactly under a budget, and the gap of evolution to the exact result.

    python benchmarks/combine.py

The tables are random but shaped like those of a network: a candidate has three widths, its costs are products of them,
and its loss decreases with each width, with noise. The limits are half of the largest cost. Times are process seconds
with one thread for numpy (the solver uses its own). Writes results/combine.json and results/combine.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from _record import RESULTS, surroundings, table, write_record

from secateur.nas import Evolution, ExactKnapsack, StageChoice, StageTable, pareto_front

CASES = ((4, 200, 1), (4, 200, 2), (4, 200, 3), (8, 200, 1), (8, 200, 2), (8, 200, 3))
FIELDS = ("macs", "params", "latency_s")


def made(stages: int, candidates: int, fields: int, seed: int) -> StageTable:
    """Make a random table of some stages, with limits on the first fields."""
    draw = np.random.default_rng(seed)
    width = draw.uniform(0.1, 1, (stages, candidates, 3))
    macs = np.rint((width[..., 0] * width[..., 1] + width[..., 1] * width[..., 2]) * 5e6).astype(np.int64)
    params = np.rint((width[..., 0] + width[..., 2] ** 2) * 1e5 * (1 + np.arange(stages))[:, None]).astype(np.int64)
    losses = ((1 - width) ** 2).sum(-1) * draw.uniform(0.5, 2, (stages, 1)) + draw.uniform(0, 0.05, macs.shape)
    costs = {"macs": macs, "params": params, "latency_s": macs / 1e9 * draw.uniform(0.8, 1.2, macs.shape)}
    names = FIELDS[:fields]
    limits = {name: 0.5 * float(costs[name].max(axis=1).sum()) for name in names}
    return StageTable(tuple(losses), {name: tuple(costs[name]) for name in names}, dict.fromkeys(names, 0), limits)


def timed(act: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a call, and its process seconds."""
    began = time.process_time()
    found = act()
    return found, time.process_time() - began


def measure(stages: int, candidates: int, fields: int, tables: int) -> dict[str, Any]:
    """Measure one size of table, over several tables."""
    exact_s, evolution_s, front_s, gaps, points = [], [], [], [], []
    for seed in range(tables):
        case = made(stages, candidates, fields, seed)
        best: StageChoice
        best, seconds = timed(lambda case=case: ExactKnapsack().combine(case, 0))
        exact_s.append(seconds)
        evolved, seconds = timed(lambda case=case, seed=seed: Evolution().combine(case, seed))
        evolution_s.append(seconds)
        assert case.allows(best)
        assert case.allows(evolved)
        gaps.append(evolved.loss / best.loss - 1)
        if fields == 1:
            front, seconds = timed(lambda case=case: pareto_front(case))
            front_s.append(seconds)
            points.append(len(front.choices))
            assert front.choices[-1] == best
    return {
        "stages": stages,
        "candidates": candidates,
        "limits": fields,
        "tables": tables,
        "exact_s": {"median": statistics.median(exact_s), "most": max(exact_s)},
        "evolution_s": {"median": statistics.median(evolution_s), "most": max(evolution_s)},
        "evolution_gap": {"median": statistics.median(gaps), "most": max(gaps), "least": min(gaps)},
        "evolution_found_the_best": sum(gap == 0 for gap in gaps),
        "front_s": max(front_s, default=None),
        "front_points": max(points, default=None),
    }


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=10)
    tables = parser.parse_args().tables
    # Modules that are imported at first use must not be timed.
    ExactKnapsack().combine(made(2, 5, 1, 0), 0)
    Evolution(population=4, generations=2).combine(made(2, 5, 1, 0), 0)
    rows = [measure(*case, tables) for case in CASES]
    header = [
        "stages x candidates",
        "limits",
        "exact, s (most)",
        "evolution, s",
        "evolution's gap (most)",
        "found the best",
    ]
    cells = [
        [
            f"{r['stages']} x {r['candidates']}",
            ", ".join(FIELDS[: r["limits"]]),
            f"{r['exact_s']['median']:.3f} ({r['exact_s']['most']:.3f})",
            f"{r['evolution_s']['median']:.2f}",
            f"{r['evolution_gap']['median']:.2%} ({r['evolution_gap']['most']:.2%})",
            f"{r['evolution_found_the_best']} of {r['tables']}",
        ]
        for r in rows
    ]
    text = table(header, cells)
    print(text)
    (RESULTS / "combine.md").write_text(text)
    print(write_record("combine", {"surroundings": surroundings(), "rows": rows}))


if __name__ == "__main__":
    main()

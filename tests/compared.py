"""Comparisons and their records, for tests of what is made of them."""

import math
from typing import Any

from secateur.report.comparison import ComparedRun, Comparison, find_winner
from secateur.tasks.classification import TOP1

WIDTHS = {"conv1": (16, 8), "layer1.0.conv1": (16, 12), "<script>alert(1)</script>": (32, 31)}


def run_of(strategy: str, budget: str = "macs<=50%", seed: int = 0, score: float = 0.9, **others: Any) -> ComparedRun:
    """A finished run with ten validation images."""
    right = round(10 * score)
    settings: dict[str, Any] = {
        "round": 0,
        "epochs": 2,
        "search_epochs": 0,
        "seconds": 3.0,
        "train_seconds": 2.0,
        "score": score,
        "n": 10,
        "test_score": score - 0.01,
        "test_n": 100,
        "macs": 20_000,
        "params": 300,
        "size_bytes": 1300,
        "latency_s": 1e-3,
        "speedup": 1.5,
        "verified": True,
        "widths": WIDTHS,
        "right": "1" * right + "0" * (10 - right),
    }
    return ComparedRun(strategy, budget, seed, **(settings | others))


def failed_run(strategy: str, budget: str = "macs<=50%", seed: int = 0) -> ComparedRun:
    """A run that ended with an error."""
    return ComparedRun(strategy, budget, seed, 0, 2, 0, 1.0, error="BudgetError: out of <b>reach</b>")


def comparison_of(*runs: ComparedRun, **others: Any) -> Comparison:
    """The comparison of some runs, with an original that is right on all images."""
    budgets = list(dict.fromkeys(run.budget for run in runs))
    original = run_of("original", "", score=1.0, macs=40_000, widths={})
    winners = tuple(find_winner(budget, [run for run in runs if run.budget == budget], TOP1) for budget in budgets)
    return Comparison("net", "digits: 10 images", TOP1, original, runs, winners, **others)


def many(count: int, layers: int = 60) -> Comparison:
    """A comparison of many runs of a network with many layers."""
    widths = {f"layer{n // 4}.{n % 4}.conv": (64, 16 + n % 48) for n in range(layers)}
    runs = [
        run_of(
            f"strategy {n % 5}",
            f"macs<={20 + 10 * (n % 4)}%",
            n // 20,
            0.8 + 0.15 * math.sin(n) ** 2,
            macs=10_000 + 137 * n,
            widths=widths,
        )
        for n in range(count)
    ]
    return comparison_of(*runs)

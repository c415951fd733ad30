"""What a stage-wise search had to choose from: for each stage its candidates, by cost and loss."""

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.report._plots import Point, Tick, round_steps
from secateur.report._run import JudgedStage

_MOST_POINTS = 400
"""More could not be told apart; the best ones are always drawn."""


@dataclass(frozen=True)
class StagePlot:
    """The candidates of one stage: the cheaper the further left, the better the lower.

    Attributes:
        title: The stage.
        points: Candidates that another one beats in both.
        front: Those that none beats, ascending in cost.
        chosen: The one that was taken.
        x_ticks: MACs in percent of the original's.
        y_ticks: Losses.
    """

    title: str
    points: tuple[Point, ...]
    front: tuple[Point, ...]
    chosen: Point
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]

    @property
    def path(self) -> str:
        """SVG path data of the front, in a box of 100 by 100: steps, since nothing lies between two candidates."""
        corners = [f"M{self.front[0].x:.2f} {self.front[0].y:.2f}"]
        corners += [f"H{point.x:.2f} V{point.y:.2f}" for point in self.front[1:]]
        return " ".join(corners)


def stage_plots(stages: Sequence[JudgedStage]) -> tuple[StagePlot, ...]:
    """One picture for each stage with more than one candidate."""
    return tuple(_plot(stage) for stage in stages if len(stage.losses) > 1)


def _plot(stage: JudgedStage) -> StagePlot:
    x_steps = round_steps(0.0, 100 * max(stage.macs) or 1.0, 4)
    y_steps = round_steps(0.0, max(stage.losses) or 1.0, 4)

    def at(number: int) -> Point:
        macs, loss = 100 * stage.macs[number], stage.losses[number]
        words = f"{macs:.3g} % of the MACs, loss {loss:.4g}"
        return Point(100 * macs / x_steps[-1], 100 - 100 * loss / y_steps[-1], words)

    front = _front(stage)
    others = [number for number in range(len(stage.losses)) if number not in set(front)]
    every = -(-len(others) // _MOST_POINTS) or 1
    return StagePlot(
        title=f"{stage.name}, ends at {stage.cut}" if stage.cut else f"{stage.name}, ends at the output",
        points=tuple(at(number) for number in others[::every]),
        front=tuple(at(number) for number in front),
        chosen=at(stage.chosen),
        x_ticks=tuple(Tick(100 * step / x_steps[-1], f"{step:g}") for step in x_steps),
        y_ticks=tuple(Tick(100 - 100 * step / y_steps[-1], f"{step:g}") for step in y_steps),
    )


def _front(stage: JudgedStage) -> list[int]:
    """The candidates that no other one beats in both, the cheapest first."""
    found: list[int] = []
    for number in sorted(range(len(stage.losses)), key=lambda n: (stage.macs[n], stage.losses[n])):
        if not found or stage.losses[number] < stage.losses[found[-1]]:
            found.append(number)
    return found

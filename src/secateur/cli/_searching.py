"""From the flags that say how an architecture is found to a strategy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from secateur.cli._choices import importance_of
from secateur.cli._options import CombinationName, ImportanceName, SearchedName, StrategyName
from secateur.errors import ChoiceError

if TYPE_CHECKING:
    from secateur.search import SWP, TAS, Depths, Strategy, Widths
    from secateur.train import Schedule

_FLAGS: Mapping[str, tuple[str, frozenset[StrategyName]]] = {
    "epochs": ("--search-epochs", frozenset({StrategyName.TAS, StrategyName.SWP})),
    "over": ("--search-over", frozenset({StrategyName.TAS, StrategyName.SWP})),
    "learning_rate": ("--search-learning-rate", frozenset({StrategyName.TAS, StrategyName.SWP})),
    "candidates": ("--search-candidates", frozenset({StrategyName.SWP})),
    "combination": ("--combine", frozenset({StrategyName.SWP})),
    "cuts": ("--stage-end", frozenset({StrategyName.SWP})),
    "ray": ("--ray", frozenset({StrategyName.SWP})),
}
"""The flag of each field of `Searching`, and the strategies that it has an effect on."""


@dataclass(frozen=True)
class Searching:
    """What the flags say about a search that learns; None where they say nothing.

    Attributes:
        epochs: Of the search.
        over: What is searched.
        learning_rate: Of the weights.
        candidates: Judged in every stage.
        combination: How one of every stage is chosen.
        cuts: Modules that end a stage.
        ray: Where candidates are judged, as `secateur.workers.OnRay` has it.
    """

    epochs: int | None = None
    over: SearchedName | None = None
    learning_rate: float | None = None
    candidates: int | None = None
    combination: CombinationName | None = None
    cuts: tuple[str, ...] | None = None
    ray: str | None = None

    def check(self, name: StrategyName) -> None:
        """Refuse flags without an effect.

        Raises:
            ChoiceError: With the strategies that they have one on.
        """
        for part in fields(self):
            flag, strategies = _FLAGS[part.name]
            if getattr(self, part.name) is not None and name not in strategies:
                raise ChoiceError(
                    f"`{flag}` must go with --strategy {' or '.join(sorted(strategies))}; got {name.value}. "
                    "Leave it out, or say another strategy."
                )


def strategy_of(
    name: StrategyName,
    importance: ImportanceName | None,
    removed_blocks: float | None = None,
    searching: Searching = Searching(),
    usual_blocks: float = 0.0,
) -> Strategy:
    """The strategy of a name, with an importance or with its usual one.

    Args:
        name: Of the strategy for widths.
        importance: Which channels stay; None for its usual one.
        removed_blocks: Largest fraction of the residual blocks that may go, 0 for none; None for the usual one.
        searching: For a search that learns.
        usual_blocks: Of a strategy that does not search depths itself.

    Raises:
        ChoiceError: If a flag has no effect on this strategy.
    """
    from secateur.search import SWP, TAS, Shallower

    searching.check(name)
    learning = {StrategyName.TAS: TAS, StrategyName.SWP: SWP}
    if name not in learning:
        widths, blocks = _widths_of(name, importance), usual_blocks if removed_blocks is None else removed_blocks
        return Shallower(widths, most=blocks) if blocks else widths
    if removed_blocks:
        raise ChoiceError(
            f"`--remove-blocks` must be left out with --strategy {name.value}, which searches depths itself; got "
            f"{removed_blocks:g}. Say --search-over depths, or both."
        )
    found = _tas_of(searching) if name is StrategyName.TAS else _swp_of(searching)
    return found if importance is None else replace(found, importance=importance_of(importance))


def _tas_of(searching: Searching) -> TAS:
    from secateur.search import TAS

    widths, depths = _over(searching)
    return TAS(widths=widths, depths=depths, schedule=_schedule(searching, TAS().schedule))


def _swp_of(searching: Searching) -> SWP:
    from secateur.search import SWP, Evolution, Exact
    from secateur.workers import InProcess, OnRay

    usual, (widths, depths) = SWP(), _over(searching)
    return SWP(
        widths=widths,
        depths=depths,
        cuts=searching.cuts,
        schedule=_schedule(searching, usual.schedule),
        candidates=usual.candidates if searching.candidates is None else searching.candidates,
        combination=Evolution() if searching.combination is CombinationName.EVOLUTION else Exact(),
        workers=InProcess() if searching.ray is None else OnRay(searching.ray),
    )


def _over(searching: Searching) -> tuple[Widths | None, Depths | None]:
    from secateur.search import Depths, Widths

    return (
        None if searching.over is SearchedName.DEPTHS else Widths(),
        Depths() if searching.over in (SearchedName.DEPTHS, SearchedName.BOTH) else None,
    )


def _schedule(searching: Searching, usual: Schedule) -> Schedule:
    given = {"epochs": searching.epochs, "learning_rate": searching.learning_rate}
    return replace(usual, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _widths_of(name: StrategyName, importance: ImportanceName | None) -> Strategy:
    from secateur.search import Activations, GlobalImportance, Knapsack, PCASlimming, Uniform

    usual: Knapsack | PCASlimming | GlobalImportance | Uniform = {
        StrategyName.KNAPSACK: Knapsack(),
        StrategyName.PCA: PCASlimming(),
        StrategyName.PCA_ACTIVATIONS: PCASlimming(source=Activations()),
        StrategyName.GLOBAL: GlobalImportance(),
        StrategyName.UNIFORM: Uniform(),
    }[name]  # TAS and SWP are no strategies for widths alone.
    return usual if importance is None else replace(usual, importance=importance_of(importance))

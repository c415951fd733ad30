"""Which search under a bound on latency is taken: of several divisors, that whose healed network is nearest."""

import contextlib
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from secateur.cost import Budget, LatencyModel
from secateur.errors import BudgetError
from secateur.graph import ChannelGraph
from secateur.importance import L2
from secateur.latency import LatencyFit
from secateur.pipeline._measured import Measurements
from secateur.pipeline._plan import Plan
from secateur.pipeline._start import HEAL
from secateur.pipeline._timed import Timed, Trial, best_of, limit_of, noted, spaces_of
from secateur.search import Found, SearchSpace, Strategy, Uniform, search
from secateur.surgery import OutputDistance, cut

_JUDGED_IMAGES = 256
"""Calibration images that candidates are healed and compared on."""

Search = Callable[[Strategy, Budget, SearchSpace, LatencyModel, Path | None], Found]
"""The search of the plan with another strategy, budget, space, latency model and place for checkpoints."""


def search_on_time(
    plan: Plan,
    original: nn.Module,
    graph: ChannelGraph,
    images: Sequence[Tensor],
    *,
    searching: Search,
    checkpoint: Path | None,
    kept: Measurements,
) -> Found:
    """Find an architecture whose measured latency is within the bound, and near to it.

    Every divisor is searched for, and its networks are measured. A strategy that trains searches with one divisor only:
    that for which uniform widths keep most MACs within the bound; what is measured corrects what it derives from its
    training.

    Args:
        plan: The run; its budget limits the latency.
        original: In eval mode, on the device of the run.
        graph: Its channel graph.
        images: Calibration batches, on the device of the run.
        searching: The search.
        checkpoint: Where the search keeps its checkpoints, or None.
        kept: What this run has measured; what is measured now is added.

    Raises:
        BudgetError: If nothing within the bound is found.
        ExportError: If a model cannot be brought to the target.
    """
    sample = images[0][: plan.target.batch].detach().cpu()
    timed = Timed(original, graph, plan.target, sample, plan.budget, plan.cache, plan.tell, kept)
    spaces = spaces_of(plan.space, graph)
    fit = timed.fit(spaces[0])
    # Six digits: more would be shown in errors, and are far below what can be measured.
    within = replace(plan.budget, latency=float(f"{limit_of(plan.budget, float(fit.measured[0])):.6g}"))
    if plan.strategy.trains:
        spaces = [_roomiest(original, graph, within, spaces, fit)]
    trials: list[Trial] = []
    refused: BudgetError | None = None
    with _folder(checkpoint, plan.strategy.trains) as folder:
        for space in spaces:

            def again(strategy: Strategy, space: SearchSpace, latency: LatencyModel) -> Found:
                return searching(strategy, within, space, latency, folder)

            try:
                trials += timed.within(space, fit, plan.strategy, again)
            except BudgetError as error:
                refused = refused or error
                plan.tell(f"Divisor {space.divisor}: {error}")
    if not trials:
        assert refused is not None
        raise refused
    judged = _Judge(original, graph, images)
    best, distances = best_of(trials, judged.distance)
    tried = {"trials": [trial.to_json() for trial in trials], "distance": {str(d): v for d, v in distances.items()}}
    return noted(best, fit, plan.budget, tried)


def _roomiest(
    original: nn.Module, graph: ChannelGraph, budget: Budget, spaces: Sequence[SearchSpace], fit: LatencyFit
) -> SearchSpace:
    """The space in which uniform widths keep most MACs within the bound."""
    kept: dict[SearchSpace, int] = {}
    for space in spaces:
        with contextlib.suppress(BudgetError):
            latency = fit.model.scaled(fit.scale)
            found = search(original, graph, Uniform(L2()), budget=budget, space=space, latency=latency)
            kept[space] = found.cost.macs
    return max(kept, key=lambda space: kept[space], default=spaces[0])


class _Judge:
    """How far cut and healed networks are from the original."""

    def __init__(self, original: nn.Module, graph: ChannelGraph, images: Sequence[Tensor]):
        self._original, self._graph = original, graph
        self._images, left = list[Tensor](), _JUDGED_IMAGES
        for batch in images:
            if left > 0:
                self._images.append(batch[:left])
                left -= len(self._images[-1])
        self._measure = OutputDistance(original, self._images)

    def distance(self, trial: Trial) -> float:
        """Of the outputs, see `secateur.surgery.OutputDistance`."""
        made = cut(self._original, self._graph, trial.found.architecture, calibration=self._images, heal=HEAL)
        return self._measure.of(made.model)


@contextlib.contextmanager
def _folder(checkpoint: Path | None, trains: bool) -> Generator[Path | None]:
    """Where a search keeps its checkpoints: a strategy that trains needs a place to go on from."""
    if checkpoint is not None or not trains:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "search"

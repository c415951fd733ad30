"""What a run has measured and decides by: kept with its work, so that it decides the same when it goes on.

A search under a bound on latency: predicted, cut, measured, corrected, and measured again.

Which search under a bound on latency is taken: of several divisors, that whose repaired network is nearest."""

import contextlib
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor, nn

from secateur._files import atomic_file, disk_errors
from secateur.architecture import Architecture
from secateur.cost.budget import Budget, Limit, format_cost
from secateur.cost.latency_model import TERMS, LatencyModel
from secateur.cost.measure import Cache, LatencyRecord, measure_pairs
from secateur.cost.targets import Target
from secateur.errors import ArtifactError, BudgetError
from secateur.graph.graph import ChannelGraph
from secateur.pipeline.config import DEFAULT_REPAIRS, Plan
from secateur.prune.cut import OutputDistance, cut
from secateur.prune.slice import apply_architecture
from secateur.search.base import SearchResult, Strategy, search_architecture
from secateur.search.importance import L2
from secateur.search.latency_fit import LatencyFit, fit_latency
from secateur.search.ranking import Uniform
from secateur.search.space import SearchSpace


@dataclass(eq=False)
class Measurements:
    """The measured numbers of one run.

    A time is never the same twice. A run that is interrupted and measured again would find another network than it
    would have found; so it does not.

    Attributes:
        path: The file; None keeps them in memory alone.
        seconds: Of layers and whole models, by what was measured, as a `secateur.latency.Cache` has them.
        pairs: The original and a candidate side by side, by the digest of the candidate's architecture.
    """

    path: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    pairs: dict[str, LatencyRecord] = field(default_factory=dict[str, LatencyRecord])

    @classmethod
    def at(cls, path: Path | None) -> "Measurements":
        """Those of a file that `Measurements` wrote; none if it is not there.

        Raises:
            ArtifactError: If it is damaged.
        """
        if path is None or not path.is_file():
            return cls(path)
        try:
            content = cast(dict[str, Any], json.loads(path.read_text()))
            seconds = {str(what): float(value) for what, value in content["seconds"].items()}
            pairs = {str(name): LatencyRecord.from_json(record) for name, record in content["pairs"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ArtifactError(
                f"The unfinished run in {path.parent} is damaged ({path.name}: {error}). Begin again with --restart."
            ) from error
        return cls(path, seconds, pairs)

    def keep(self, seconds: Mapping[str, float]) -> None:
        """Keep what was measured of layers and whole models.

        Raises:
            ArtifactError: If it cannot be written.
        """
        if dict(seconds) != self.seconds:
            self.seconds = dict(seconds)
            self._write()

    def pair(self, architecture: Architecture, measured: Callable[[], LatencyRecord]) -> LatencyRecord:
        """The original and a candidate side by side, measured now if it never was.

        Raises:
            ArtifactError: If it cannot be written.
        """
        name = hashlib.sha256(json.dumps(architecture.to_json(), sort_keys=True).encode()).hexdigest()
        if name not in self.pairs:
            self.pairs[name] = measured()
            self._write()
        return self.pairs[name]

    def _write(self) -> None:
        if self.path is None:
            return
        content = {"seconds": self.seconds, "pairs": {name: record.to_json() for name, record in self.pairs.items()}}
        with disk_errors(self.path.parent), atomic_file(self.path) as part:
            part.write_text(json.dumps(content, indent=1))


DIVISORS = (8, 16, 32)
"""Widths that kernels are made for; which of them pays is measured."""
_ROUNDS = 5
"""Most searches with one divisor: each corrects the prediction by what was measured of those before."""
_AIM = 0.98
"""Of the bound: what is aimed at, as a measurement has a spread."""
_NEAR = 0.955
"""Of the bound: near enough to it."""

Searching = Callable[[Strategy, SearchSpace, LatencyModel], SearchResult]
"""Searches in a space with a latency model."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One search and what its network really takes.

    Attributes:
        space: The widths that were allowed.
        found: Within the budget as predicted.
        predicted: Seconds, before any correction.
        record: Original and cut network, measured in pairs.
        used: Measured latency / bound.
    """

    space: SearchSpace
    found: SearchResult
    predicted: float
    record: LatencyRecord
    used: float

    def to_json(self) -> dict[str, object]:
        """A JSON object."""
        return {
            "divisor": self.space.divisor,
            "predicted_s": self.predicted,
            "measured_s": self.record.after.median,
            "speedup": self.record.speedup.median,
            "of_the_bound": self.used,
            "macs": self.found.cost.macs,
        }


@dataclass(frozen=True, eq=False)
class LatencySearch:
    """A search under a bound on latency.

    Attributes:
        original: The uncut model, in eval mode.
        graph: Its channel graph.
        target: What the bound is on.
        images: Samples of the input, on the CPU.
        budget: As the user gave it; limits the latency.
        cache: Of measurements; None means the user's.
        tell: Receives one sentence per step.
        kept: What this run measured before it was interrupted, and measures now.
    """

    original: nn.Module
    graph: ChannelGraph
    target: Target
    images: Tensor
    budget: Budget
    cache: Cache | None
    tell: Callable[[str], None]
    kept: Measurements = field(default_factory=Measurements)

    def fit(self, space: SearchSpace) -> LatencyFit:
        """What predicts the latency of widths of a space."""
        cache = Cache.of(self.target) if self.cache is None else self.cache
        cache.seconds.update(self.kept.seconds)
        found = fit_latency(self.original, self.graph, self.target, self.images, space=space, cache=cache)
        self.kept.keep({**self.kept.seconds, **found.seconds})
        worst = 100 * float(abs(found.errors).max())
        self.tell(
            f"The original takes {format_cost('latency_s', found.measured[0])} ({self.target.key}). Predicted from its "
            f"layers, {len(found.measured)} whole models are at most {worst:.1f} % off."
        )
        return found

    def within(self, space: SearchSpace, fit: LatencyFit, strategy: Strategy, searching: Searching) -> Iterator[Trial]:
        """Search, measure, correct, and search again, until the measured latency is near the bound and not above it.

        Each search is allowed a predicted latency; the first one what the whole model tells, later ones see `_allowed`.
        Later ones stay near to what the first has found, see `Strategy.again`.
        """
        original = float(fit.measured[0])
        limit = limit_of(self.budget, original)
        aim = 1.0 if original <= limit else _AIM
        allowed, trials = aim * limit / fit.scale, list[Trial]()
        for _ in range(_ROUNDS):
            factor = limit / allowed
            found = _next([trial.found for trial in trials], strategy, space, fit.model.scaled(factor), searching)
            if any(found.architecture == trial.found.architecture for trial in trials):
                return
            assert found.cost.latency_s is not None
            trial = self._measured(space, found, found.cost.latency_s / factor)
            predicted = format_cost("latency_s", aim * factor * trial.predicted)
            self.tell(
                f"Divisor {space.divisor}: predicted {predicted}, measured "
                f"{format_cost('latency_s', trial.record.after.median)}, {100 * trial.used:.1f} % of the bound."
            )
            yield trial
            if _NEAR <= trial.used <= 1:
                return
            trials.append(trial)
            allowed = _allowed(trials, aim)

    def _measured(self, space: SearchSpace, found: SearchResult, predicted: float) -> Trial:
        def measured() -> LatencyRecord:
            small = apply_architecture(self.original, self.graph, found.architecture)
            return measure_pairs(self.original, small, self.target, self.images)

        record = self.kept.pair(found.architecture, measured)
        return Trial(space, found, predicted, record, used(self.budget, record))


def limit_of(budget: Budget, original_s: float) -> float:
    """The bound on latency in seconds, for an original that takes ``original_s``."""
    limit = _limit(budget)
    return limit.value * original_s / 100 if limit.relative else limit.value


def used(budget: Budget, record: LatencyRecord) -> float:
    """Measured latency / bound. For a relative bound from the ratio of pairs, in which drift of the machine cancels."""
    limit = _limit(budget)
    return 100 / (record.speedup.median * limit.value) if limit.relative else record.after.median / limit.value


def lower_quartile_ratio(budget: Budget, record: LatencyRecord) -> float:
    """The same for the quartile that is on the quick side: what is not above 1 is not above the bound for certain."""
    limit = _limit(budget)
    return 100 / (record.speedup.upper * limit.value) if limit.relative else record.after.lower / limit.value


def _next(
    before: Sequence[SearchResult], strategy: Strategy, space: SearchSpace, latency: LatencyModel, searching: Searching
) -> SearchResult:
    """The next architecture: near to the first one, unless that leads nowhere."""
    if before:
        first = before[0]
        with contextlib.suppress(BudgetError):
            near = searching(strategy.again(first.architecture), space, latency)
            return replace(near, strategy=first.strategy, notes={**first.notes, **near.notes})
    return searching(strategy, space, latency)


def _allowed(trials: Sequence[Trial], aim: float) -> float:
    """The predicted latency, in seconds, at which a part ``aim`` of the bound is expected to be used.

    What was measured rises faster or slower than what was predicted, p: it is taken for a power of p between the two
    trials around the aim, and for proportional to p as long as all lie on one side of it.
    """
    nearest = min(trials, key=lambda trial: abs(math.log(trial.used / aim)))
    under = max((trial for trial in trials if trial.used < aim), key=lambda trial: trial.used, default=nearest)
    over = min((trial for trial in trials if trial.used >= aim), key=lambda trial: trial.used, default=nearest)
    if under.predicted < over.predicted:
        part = math.log(aim / under.used) / math.log(over.used / under.used)
        return under.predicted * (over.predicted / under.predicted) ** part
    return nearest.predicted * aim / nearest.used


def _limit(budget: Budget) -> Limit:
    return next(limit for limit in budget.of_cost if limit.field == LatencyModel.field)


def spaces_of(space: SearchSpace, graph: ChannelGraph) -> list[SearchSpace]:
    """The spaces to try: that of the user if it has a divisor, else one for each of `DIVISORS`.

    A space is left out if it allows the same widths as one before it, or no axis a choice; the user's is tried if none
    is left.
    """
    tried: dict[tuple[tuple[int, ...], ...], SearchSpace] = {}
    for divisor in DIVISORS if space.divisor == 1 else ():
        coarse = replace(space, divisor=divisor)
        levels = tuple(tuple(mine.tolist()) for mine in coarse.levels(graph))
        if any(len(mine) > 1 for mine in levels):
            tried.setdefault(levels, coarse)
    return [*tried.values()] or [space]


def best_of(trials: Iterable[Trial], distance: Callable[[Trial], float]) -> tuple[Trial, Mapping[int, float]]:
    """The trial that is taken: of each space the one that fills the bound best, of these the nearest to the original.

    Args:
        trials: Of all spaces, at least one.
        distance: How far the outputs of a trial's network are from the original's; asked only if there is a choice.

    Returns:
        It, and the distances by divisor.

    Raises:
        BudgetError: If none is within the bound.
    """
    tried = list(trials)
    fitting: dict[SearchSpace, Trial] = {}
    for trial in tried:
        if trial.used <= 1 and trial.used >= (fitting[trial.space].used if trial.space in fitting else 0):
            fitting[trial.space] = trial
    if not fitting:
        least = min(tried, key=lambda trial: trial.used)
        raise BudgetError(
            "`budget` must be within reach; the quickest network that was found takes "
            f"{format_cost('latency_s', least.record.after.median)} when measured, {100 * least.used:.1f} % of the "
            "bound. Raise the bound on latency, or let the search go lower (--min-kept, --remove-blocks)."
        )
    if len(fitting) == 1:
        return next(iter(fitting.values())), {}
    distances = {space.divisor: distance(trial) for space, trial in fitting.items()}
    return min(fitting.values(), key=lambda trial: distances[trial.space.divisor]), distances


def noted(trial: Trial, fit: LatencyFit, budget: Budget, notes: Mapping[str, object]) -> SearchResult:
    """What a search found, with measured latencies in the place of predicted ones, and how they came about."""
    found, original = trial.found, float(fit.measured[0])
    said = {
        "target": fit.target,
        "divisor": trial.space.divisor,
        "prediction": fit.to_json(),
        "parts": _parts(trial, fit),
        **notes,
    }
    return replace(
        found,
        cost=replace(found.cost, latency_s=trial.used * limit_of(budget, original)),
        original=replace(found.original, latency_s=original),
        budget=budget,
        notes={**found.notes, "latency": said},
    )


def _parts(trial: Trial, fit: LatencyFit) -> dict[str, float]:
    """The shares of the terms of the predicted latency."""
    architecture, model = trial.found.architecture, fit.model
    gone = set(architecture.removed_blocks)
    widths = [architecture.widths.get(name, size) for name, size in zip(model.axes, model.sizes.tolist(), strict=True)]
    blocks = [int(name not in gone) for name in model.blocks]
    terms = model.terms(np.array([widths], dtype=np.int64), np.array([blocks], dtype=np.int64).reshape(1, -1))[0]
    parts = terms * np.array(model.coefficients)
    return dict(zip(TERMS, (parts / parts.sum()).tolist(), strict=True))


_JUDGED_IMAGES = 256
"""Calibration images that candidates are repaired and compared on."""

Search = Callable[[Strategy, Budget, SearchSpace, LatencyModel, Path | None], SearchResult]
"""The search of the plan with another strategy, budget, space, latency model and place for checkpoints."""


def search_within_latency(
    plan: Plan,
    original: nn.Module,
    graph: ChannelGraph,
    images: Sequence[Tensor],
    *,
    searching: Search,
    checkpoint: Path | None,
    kept: Measurements,
) -> SearchResult:
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
    timed = LatencySearch(original, graph, plan.target, sample, plan.budget, plan.run.latency_cache, plan.log, kept)
    spaces = spaces_of(plan.cut.space, graph)
    fit = timed.fit(spaces[0])
    # Six digits: more would be shown in errors, and are far below what can be measured.
    within = replace(plan.budget, latency=float(f"{limit_of(plan.budget, float(fit.measured[0])):.6g}"))
    if plan.strategy.trains:
        spaces = [_roomiest(original, graph, within, spaces, fit)]
    trials: list[Trial] = []
    refused: BudgetError | None = None
    with _folder(checkpoint, plan.strategy.trains) as folder:
        for space in spaces:

            def again(strategy: Strategy, space: SearchSpace, latency: LatencyModel) -> SearchResult:
                return searching(strategy, within, space, latency, folder)

            try:
                trials += timed.within(space, fit, plan.strategy, again)
            except BudgetError as error:
                refused = refused or error
                plan.log(f"Divisor {space.divisor}: {error}")
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
            found = search_architecture(original, graph, Uniform(L2()), budget=budget, space=space, latency=latency)
            kept[space] = found.cost.macs
    return max(kept, key=lambda space: kept[space], default=spaces[0])


class _Judge:
    """How far cut and repaired networks are from the original."""

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
        made = cut(
            self._original, self._graph, trial.found.architecture, calibration=self._images, repairs=DEFAULT_REPAIRS
        )
        return self._measure.of(made.model)


@contextlib.contextmanager
def _folder(checkpoint: Path | None, trains: bool) -> Generator[Path | None]:
    """Where a search keeps its checkpoints: a strategy that trains needs a place to go on from."""
    if checkpoint is not None or not trains:
        yield checkpoint
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "search"

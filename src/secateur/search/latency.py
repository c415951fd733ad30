"""Search under a bound on latency: predict, cut, measure, correct the prediction, and search again.

`WithinLatency` is a strategy around another one, which it lets search for several divisors of the widths. The latency
of candidates is predicted from a table of layers (`secateur.search.fit_latency`) and then measured on the target.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from secateur._files import disk_errors, temporary_folder, write_atomic
from secateur._kinds import settings
from secateur._provenance import sha256_of_json
from secateur.architecture import Architecture
from secateur.cost.budget import Budget, Limit, format_cost
from secateur.cost.denormals import flush_denormals_
from secateur.cost.latency_model import TERMS, LatencyModel
from secateur.cost.measure import LatencyCache, LatencyRecord, measure_pairs
from secateur.cost.runtimes import OnnxRuntime, Target
from secateur.errors import ArtifactError, BudgetError, DataError
from secateur.graph.graph import ChannelGraph
from secateur.prune.calibration import split_calibration
from secateur.prune.cut import Repair
from secateur.prune.slice import apply_architecture
from secateur.search.base import ProgressCallback, Proposal, SearchContext, SearchResult, Strategy, cost_model
from secateur.search.importance import L2
from secateur.search.latency_fit import LatencyFit, fit_latency
from secateur.search.ranking import Knapsack, Uniform
from secateur.search.repaired import QUICK_REPAIRS, RepairedNetworks
from secateur.search.space import SearchSpace

_LOGGER = logging.getLogger("secateur")

DIVISORS = (8, 16, 32)
"""Divisors of widths that kernels are made for; which of them pays is measured."""
_ROUNDS = 5
"""Most searches with one divisor; each corrects the prediction by the measurements of those before."""
_AIM = 0.98
"""The part of the bound that is aimed at, because a measurement has a spread."""
_NEAR = 0.955
"""The part of the bound from which on a network needs no further search."""
_FITTED, _COMPARED = 0.25, 0.9
"""The fractions of a search after which predictions are fitted, and candidates of all divisors are measured."""
_SEARCHED, _TIMED = 0.5, 0.6
"""The fractions of the trials with one divisor after the first search, and after the first measurement."""
_KEEP_S = 1.0
"""Seconds after which new times of layers are kept for a resumed run."""


@settings
class WithinLatency(Strategy):
    """Find an architecture whose measured latency is within the bound, and near to it, by another strategy.

    For every divisor of the widths the inner strategy searches under a predicted latency, its network is cut and
    measured in pairs with the original, and the prediction is corrected, until at least 95.5 % of the bound are used
    and not more than all of it. All searches after the first one stay near to what that has found (see
    `Strategy.again`): they remove the same blocks, for example. Of each divisor the network that uses most of the
    bound is taken; of these the one whose repaired outputs are nearest to the original's.

    A strategy that trains searches with one divisor only: the one for which uniform widths keep most MACs.

    Attributes:
        inner: Finds the architectures.
        target: The runtime, threads and batch size of the bound.
        cache: Stored measurements of layers and models; None means those of this machine in the user's cache folder.
        measurements: Everything that a run measures, kept in a file, so that a resumed run decides the same again;
            None forgets it.
        one_divisor: Whether any strategy searches with one divisor only.
        repairs: Repairs before the candidates of several divisors are compared.
    """

    inner: Strategy = field(default_factory=Knapsack)
    target: Target = OnnxRuntime()
    cache: LatencyCache | None = None
    measurements: "Measurements | None" = None
    one_divisor: bool = False
    repairs: tuple[Repair, ...] = QUICK_REPAIRS

    def find(self, context: SearchContext) -> Proposal:
        """Notes: those of the inner strategy, and ``latency``: the prediction and every trial."""
        result = self.search(context)
        return Proposal(result.architecture, result.notes, result.weights)

    def search(self, context: SearchContext) -> SearchResult:
        """See `Strategy.search`; the costs of the result hold measured latencies.

        Raises:
            BudgetError: If no network within the bound is found.
            ExportError: If a model cannot be brought to the target.
            DataError: If there are no images.
        """
        graph = context.inputs.graph
        spaces = spaces_of(context.space, graph)
        measuring = _Measuring(self, context, self.measurements or Measurements(), self.target.for_cuts())
        fit = measuring.fit(spaces[0], _part(context.progress, 0.0, _FITTED))
        bound = limit_of(context.budget, float(fit.measured[0]))
        # Six digits: more would be shown in errors, and are far below what can be measured.
        budget = replace(context.budget, latency=float(f"{bound:.6g}"))
        if self.inner.trains or self.one_divisor:
            spaces = [_roomiest(replace(context, budget=budget), spaces, fit)]
        trials: list[Trial] = []
        refused: BudgetError | None = None
        with _resumable(replace(context, budget=budget), self.inner.trains) as context_within:
            for number, space in enumerate(spaces):
                share = (_COMPARED - _FITTED) / len(spaces)
                told = _part(context.progress, _FITTED + number * share, _FITTED + (number + 1) * share)
                try:
                    first = trials[0].result if trials else None
                    trials += measuring.trials(replace(context_within, space=space, progress=told), fit, first)
                except BudgetError as error:
                    refused = refused or error
                    _LOGGER.info(f"Divisor {space.divisor}: {error}")
        if not trials:
            assert refused is not None
            raise refused
        context.progress(_COMPARED, "comparing divisors")
        split = split_calibration([images for images, _ in context.inputs.batches])
        networks = RepairedNetworks(context, self.repairs, split.fit, split.held_out)
        best, distances = best_of(
            trials, lambda trial: networks.distance.of(networks.cut(trial.result.architecture).model)
        )
        notes = {"trials": [trial.to_json() for trial in trials], "distance": {str(d): v for d, v in distances.items()}}
        return _with_measured_latency(best, fit, context.budget, notes)

    @property
    def trains(self) -> bool:
        """Whether the inner strategy trains."""
        return self.inner.trains


@dataclass(frozen=True, eq=False)
class Trial:
    """One search and the measured latency of its network.

    Attributes:
        space: The widths that were allowed.
        result: Within the budget as predicted.
        predicted: Predicted seconds, before any correction.
        record: Original and cut network, measured in pairs.
        used: Measured latency / bound.
    """

    space: SearchSpace
    result: SearchResult
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
            "macs": self.result.cost.macs,
        }


@dataclass(eq=False)
class Measurements:
    """Everything that one run has measured.

    Measured times never repeat exactly, so a resumed run that measured again might find another network than the
    interrupted run would have found. It reads these instead.

    Attributes:
        path: The file; None keeps them in memory only.
        seconds: Times of layers and whole models, with the keys of a `secateur.cost.LatencyCache`.
        pairs: Measurements of the original and a candidate in pairs, by the digest of the candidate's architecture.
    """

    path: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    pairs: dict[str, LatencyRecord] = field(default_factory=dict[str, LatencyRecord])

    @classmethod
    def at(cls, path: Path | None) -> "Measurements":
        """Read a file that `Measurements` wrote; return none if it is not there.

        Raises:
            ArtifactError: If it is damaged.
        """
        if path is None or not path.is_file():
            return cls(path)
        try:
            content = cast(dict[str, Any], json.loads(path.read_text()))
            seconds = {str(what): float(value) for what, value in content["seconds"].items()}
            pairs = {str(name): LatencyRecord.from_json(record) for name, record in content["pairs"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"The unfinished run in {path.parent} is damaged ({path.name}: {error}). Begin again with --restart."
            ) from error
        return cls(path, seconds, pairs)

    def keep(self, seconds: Mapping[str, float]) -> None:
        """Store the times of layers and whole models.

        Raises:
            ArtifactError: If it cannot be written.
        """
        if dict(seconds) != self.seconds:
            self.seconds = dict(seconds)
            self._write()

    def pair(self, architecture: Architecture, measured: Callable[[], LatencyRecord]) -> LatencyRecord:
        """Return the measurement of the original and a candidate, which is made now if there is none.

        Raises:
            ArtifactError: If it cannot be written.
        """
        name = sha256_of_json(architecture.to_json())
        if name not in self.pairs:
            self.pairs[name] = measured()
            self._write()
        return self.pairs[name]

    def _write(self) -> None:
        if self.path is None:
            return
        content = {"seconds": self.seconds, "pairs": {name: record.to_json() for name, record in self.pairs.items()}}
        with disk_errors(self.path.parent):
            write_atomic(self.path, json.dumps(content, indent=1))


@dataclass(frozen=True, eq=False)
class _Measuring:
    """Predicts and measures the latency of candidates.

    Attributes:
        strategy: The inner strategy.
        context: The search, with the budget as the user gave it.
        measurements: What was measured before and is measured now.
        target: What is measured on.
    """

    strategy: WithinLatency
    context: SearchContext
    measurements: Measurements
    target: Target

    @property
    def sample(self) -> Tensor:
        """A batch of the target's size, on the CPU."""
        if not self.context.inputs.batches:
            raise DataError("`batches` must hold images to measure latency on; got none. Pass calibration data.")
        images, _ = self.context.inputs.batches[0]
        return images[: self.target.batch].detach().cpu()

    def fit(self, space: SearchSpace, progress: ProgressCallback) -> LatencyFit:
        """Return what predicts the latency of the widths of a space."""
        target, inputs = self.target, self.context.inputs
        cache = LatencyCache.of(target) if self.strategy.cache is None else self.strategy.cache
        cache.seconds.update(self.measurements.seconds)
        kept_at = time.monotonic()

        def keep() -> None:
            nonlocal kept_at
            known = {what: cache.seconds[what] for what in cache.asked}
            self.measurements.keep({**self.measurements.seconds, **known})
            kept_at = time.monotonic()

        def tell(fraction: float, what: str) -> None:
            progress(fraction, what)
            if time.monotonic() - kept_at > _KEEP_S:
                keep()

        try:
            fit = fit_latency(inputs.model, inputs.graph, target, self.sample, space=space, cache=cache, tell=tell)
        finally:
            keep()  # Also when the run is interrupted, which may have taken minutes by now.
        worst = fit.largest_error
        off = (
            ""
            if worst is None
            else f" Predicted from its layers, {len(fit.measured)} whole models are at most {100 * worst:.1f} % off."
        )
        _LOGGER.info(f"The original takes {format_cost('latency_s', fit.measured[0])} ({target.key}).{off}")
        return fit

    def trials(self, context: SearchContext, fit: LatencyFit, first: SearchResult | None = None) -> Iterator[Trial]:
        """Search in one space, measure, correct, and search again, until the measured latency is near to the bound.

        Each search is allowed a predicted latency: the first one what the whole model suggests, later ones see
        `_allowed`. Later ones stay near to what the first has found, also in another space, see `Strategy.again`.
        """
        original, trials = float(fit.measured[0]), list[Trial]()
        limit = limit_of(self.context.budget, original)
        aim = 1.0 if original <= limit else _AIM
        allowed = aim * limit / fit.scale
        for number in range(_ROUNDS):
            factor = limit / allowed
            done = _TIMED + (1 - _TIMED) * (number - 1) / _ROUNDS if number else 0.0
            told = _part(context.progress, done, max(done, _SEARCHED))
            costs = cost_model(context.inputs, context.budget, fit.model.scaled(factor))
            within = replace(context, costs=costs, progress=told)
            result = _next(first, self.strategy.inner, within)
            first = first or result
            if any(result.architecture == trial.result.architecture for trial in trials):
                return
            assert result.cost.latency_s is not None
            context.progress(max(done, _SEARCHED), f"timing a network with divisor {context.space.divisor}")
            record = self._record(result.architecture)
            used_part = used(self.context.budget, record)
            trial = Trial(context.space, result, result.cost.latency_s / factor, record, used_part)
            _LOGGER.info(
                f"Divisor {context.space.divisor}: predicted {format_cost('latency_s', aim * factor * trial.predicted)}"
                f", measured {format_cost('latency_s', record.after.median)}, {100 * used_part:.1f} % of the bound."
            )
            yield trial
            if _NEAR <= used_part <= 1:
                return
            trials.append(trial)
            allowed = _allowed(trials, aim)

    def _record(self, architecture: Architecture) -> LatencyRecord:
        """The original and its cut, measured in pairs."""
        inputs = self.context.inputs

        def measured() -> LatencyRecord:
            # Repairs will replace most of its weights, so that denormal numbers say nothing about it.
            small = flush_denormals_(apply_architecture(inputs.model, inputs.graph, architecture))
            return measure_pairs(inputs.model, small, self.target, self.sample)

        return self.measurements.pair(architecture, measured)


def _part(progress: ProgressCallback, begin: float, end: float) -> ProgressCallback:
    """Return a callback for a part of the work, whose fractions are those between two of the whole."""
    return lambda fraction, what: progress(begin + (end - begin) * min(max(fraction, 0.0), 1.0), what)


def limit_of(budget: Budget, original_s: float) -> float:
    """Return the bound on latency in seconds, for an original that takes ``original_s``."""
    limit = _limit(budget)
    return limit.value * original_s / 100 if limit.relative else limit.value


def used(budget: Budget, record: LatencyRecord) -> float:
    """Return measured latency / bound, for a relative bound from the ratio of pairs, in which drift cancels."""
    limit = _limit(budget)
    return 100 / (record.speedup.median * limit.value) if limit.relative else record.after.median / limit.value


def lower_quartile_ratio(budget: Budget, record: LatencyRecord) -> float:
    """Return lower quartile of the measured latency / bound: up to 1, the model may well be within the bound."""
    limit = _limit(budget)
    return 100 / (record.speedup.upper * limit.value) if limit.relative else record.after.lower / limit.value


def _next(first: SearchResult | None, strategy: Strategy, context: SearchContext) -> SearchResult:
    """The next architecture: near to the first one, unless that leads nowhere."""
    if first is not None:
        with contextlib.suppress(BudgetError):
            near = strategy.again(first.architecture).search(context)
            return replace(near, strategy=first.strategy, notes={**first.notes, **near.notes})
    return strategy.search(context)


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
    for divisor in DIVISORS if space.divisor is None else ():
        coarse = replace(space, divisor=divisor)
        levels = tuple(tuple(mine.tolist()) for mine in coarse.levels(graph))
        if any(len(mine) > 1 for mine in levels):
            tried.setdefault(levels, coarse)
    return [*tried.values()] or [space]


def best_of(trials: Iterable[Trial], distance: Callable[[Trial], float]) -> tuple[Trial, Mapping[int | None, float]]:
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
    distances: dict[int | None, float] = {space.divisor or 1: distance(trial) for space, trial in fitting.items()}
    return min(fitting.values(), key=lambda trial: distances[trial.space.divisor or 1]), distances


def _with_measured_latency(trial: Trial, fit: LatencyFit, budget: Budget, notes: Mapping[str, object]) -> SearchResult:
    """The result of a trial, with measured latencies instead of predicted ones, and how they came about."""
    result, original = trial.result, float(fit.measured[0])
    latency = {
        "target": fit.target,
        "divisor": trial.space.divisor,
        "prediction": fit.to_json(),
        "parts": _parts(trial, fit),
        **notes,
    }
    return replace(
        result,
        cost=replace(result.cost, latency_s=trial.used * limit_of(budget, original)),
        original=replace(result.original, latency_s=original),
        budget=budget,
        notes={**result.notes, "latency": latency},
    )


def _parts(trial: Trial, fit: LatencyFit) -> dict[str, float]:
    """The shares of the terms of the predicted latency."""
    architecture, model = trial.result.architecture, fit.model
    gone = set(architecture.removed_blocks)
    widths = [architecture.widths.get(name, size) for name, size in zip(model.axes, model.sizes.tolist(), strict=True)]
    blocks = [int(name not in gone) for name in model.blocks]
    terms = model.terms(np.array([widths], dtype=np.int64), np.array([blocks], dtype=np.int64).reshape(1, -1))[0]
    parts = terms * np.array(model.coefficients)
    return dict(zip(TERMS, (parts / max(parts.sum(), 1e-300)).tolist(), strict=True))


def _roomiest(context: SearchContext, spaces: Sequence[SearchSpace], fit: LatencyFit) -> SearchSpace:
    """The space in which uniform widths keep most MACs within the bound."""
    kept: dict[SearchSpace, int] = {}
    costs = cost_model(context.inputs, context.budget, fit.model.scaled(fit.scale))
    for space in spaces:
        with contextlib.suppress(BudgetError):
            result = Uniform(L2()).search(replace(context, costs=costs, space=space))
            kept[space] = result.cost.macs
    return max(kept, key=lambda space: kept[space], default=spaces[0])


@contextlib.contextmanager
def _resumable(context: SearchContext, trains: bool) -> Generator[SearchContext]:
    """Yield a context with a folder for checkpoints, by which later searches of a strategy that trains are short."""
    if context.run.folder is not None or not trains:
        yield context
        return
    with temporary_folder("secateur-search-") as folder:
        yield replace(context, run=replace(context.run, folder=folder / "search"))

"""Choose among the networks of several strategies and divisors: the fastest one whose outputs are still near.

`Fastest` is a strategy around others. Its candidates are searched, cut, repaired, judged on images that neither scored
nor fitted, and timed on the target in turns with the original.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from secateur._batches import count_images, first_images
from secateur._files import disk_errors, write_atomic
from secateur._kinds import settings
from secateur._provenance import sha256_of_json
from secateur.cost.budget import Cost, format_cost
from secateur.cost.denormals import flush_denormals_
from secateur.cost.measure import LatencyRecord, measure_against
from secateur.cost.runtimes import OnnxRuntime, Target, TorchEager
from secateur.errors import ArtifactError, BudgetError, DataError
from secateur.export._common import InputTensors
from secateur.graph.trace import Example
from secateur.prune.calibration import split_calibration
from secateur.prune.cut import Repair
from secateur.prune.slice import apply_architecture
from secateur.search.base import Proposal, ScoreCache, SearchContext, SearchResult, Strategy, stable_repr
from secateur.search.depth import Without, blocks_by_worth
from secateur.search.pca import PCASlimming
from secateur.search.ranking import Knapsack, Uniform
from secateur.search.repaired import QUICK_REPAIRS, RepairedNetworks
from secateur.search.space import SearchSpace

_LOGGER = logging.getLogger("secateur")

DIVISORS = (1, 4, 8, 16)
"""Divisors of the widths that are compared; which of them pays depends on network and machine."""
MARGIN = 1.15
"""The error of the network that is taken / the least error among those that pay; docs/decisions.md has the numbers."""
FEWER_BLOCKS = (1 / 8, 1 / 4, 3 / 8)
"""Fractions of the residual blocks that are removed in further candidates, as long as these stay within the margin."""
_PAID = 0.5
"""A network pays if its time has fallen by at least this part of what its MACs have fallen by."""
_RULED_DIVISOR = 8
"""The divisor that is taken where no time can be measured."""
_BLOCK_IMAGES = 32
_ROUNDS, _WARMUP = 15, 2


@dataclass(eq=False)
class Candidate:
    """One network that was searched, repaired and judged.

    Attributes:
        strategy: What found it.
        space: The widths that were allowed.
        result: Its architecture and costs.
        error: The largest distance among its outputs after repair, on held-out images; see `secateur.prune`.
        record: Original and candidate, measured in turns; None until then, or if no time can be measured.
    """

    strategy: Strategy
    space: SearchSpace
    result: SearchResult
    error: float
    record: LatencyRecord | None = None

    @property
    def name(self) -> str:
        """Strategy, divisor and removed blocks in words."""
        strategy, removed = self.strategy, len(self.result.architecture.removed_blocks)
        if isinstance(strategy, Without):
            strategy = strategy.strategy
        blocks = f", {removed} block{'s' if removed > 1 else ''} fewer" if removed else ""
        return f"{type(strategy).__name__}, divisor {self.space.divisor or 1}{blocks}"

    @property
    def speedup(self) -> float:
        """Time of the original / its own; 1 if nothing was measured."""
        return 1.0 if self.record is None else self.record.speedup.median

    @property
    def pays(self) -> bool:
        """Whether the time fell by at least half of what the MACs fell by."""
        gone = 1 - self.result.cost.macs / max(self.result.original.macs, 1)
        return 1 - 1 / self.speedup >= _PAID * gone

    def __str__(self) -> str:
        macs = 100 * self.result.cost.macs / max(self.result.original.macs, 1)
        words = f"{self.name}: error {self.error:.3f}, {macs:.1f} % of the MACs"
        if self.record is None:
            return words
        return f"{words}, {format_cost('latency_s', self.record.after.median)} ({self.speedup:.2f} times the speed)"

    def to_json(self) -> dict[str, object]:
        """A JSON object."""
        return {
            "strategy": stable_repr(self.strategy),
            "divisor": self.space.divisor,
            "removed_blocks": len(self.result.architecture.removed_blocks),
            "error": self.error,
            "macs": self.result.cost.macs,
            "params": self.result.cost.params,
            "latency_s": None if self.record is None else self.record.after.median,
            "speedup": None if self.record is None else self.speedup,
            "runtime": None if self.record is None else self.record.runtime,
        }


@dataclass(eq=False)
class CandidateRecords:
    """What one run has found out about candidates, by the digest of their architectures.

    Measured times never repeat exactly, so a resumed run that measured again might choose another network than the
    interrupted run would have. It reads these instead.

    Attributes:
        path: The file; None keeps them in memory only.
        errors: Judged errors.
        pairs: Measurements of the original and the candidate.
        untimed: Why no time can be measured; empty if it can.
    """

    path: Path | None = None
    errors: dict[str, float] = field(default_factory=dict[str, float])
    pairs: dict[str, LatencyRecord] = field(default_factory=dict[str, LatencyRecord])
    untimed: str = ""

    @classmethod
    def at(cls, path: Path | None) -> "CandidateRecords":
        """Read a file that `CandidateRecords` wrote; return none if it is not there.

        Raises:
            ArtifactError: If it is damaged.
        """
        if path is None or not path.is_file():
            return cls(path)
        try:
            content = cast(dict[str, Any], json.loads(path.read_text()))
            errors = {str(name): float(error) for name, error in content["errors"].items()}
            pairs = {str(name): LatencyRecord.from_json(record) for name, record in content["pairs"].items()}
            return cls(path, errors, pairs, str(content["untimed"]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"The unfinished run in {path.parent} is damaged ({path.name}: {error}). Begin again with --restart."
            ) from error

    def write(self) -> None:
        """Write the file.

        Raises:
            ArtifactError: If it cannot be written.
        """
        if self.path is None:
            return
        pairs = {name: record.to_json() for name, record in self.pairs.items()}
        content = {"errors": self.errors, "pairs": pairs, "untimed": self.untimed}
        with disk_errors(self.path.parent):
            write_atomic(self.path, json.dumps(content, indent=1))


def _default_strategies() -> tuple[Strategy, ...]:
    return (Knapsack(), PCASlimming(), Uniform())


@settings
class Fastest(Strategy):
    """Compare the networks of several strategies and divisors, and take the fastest of those that are near the best.

    A candidate is a strategy and a divisor. Its error is the distance of its outputs from the original's (the worst
    output's, see `secateur.prune.OutputDistance`), after repair, on images that neither scored nor fitted.

    1. The first strategy searches with every divisor (1, 4, 8, 16, or only that of the space if it has one).
    2. The other strategies search with the divisor that is ahead. If one of them is ahead then, it searches with the
       other divisors too.
    3. With the strategy and the divisor that are ahead, the residual blocks that matter least are removed: an eighth, a
       quarter, three eighths of them, as long as the error stays within the margin. The widths are found anew.

    Of the candidates whose time has fallen by at least half of what their MACs have fallen by (if there are none: that
    are faster than the original; if there are none: of all), e is the least error. The fastest with an error up to
    ``margin`` * e is taken. Candidates with a larger error than one of the other strategies in step 2 are left out
    before: so the result is never worse than `Uniform` there.

    Errors are the same in every run with the same seed. Times are not; they decide between networks that are about as
    good. Where no time can be measured, the divisor is 8, and no block is removed.

    Attributes:
        strategies: Those that are compared, at least one.
        target: The runtime that counts.
        margin: Largest error of the network that is taken / least error, at least 1.
        fewer_blocks: Fractions of the residual blocks that step 3 removes, ascending; none leaves it out.
        repairs: Repairs before candidates are judged. The network that is taken is repaired anew by who asked for it.
        records: What was found out before and is found out now, kept in a file; None forgets it.
        held_out: Batches to judge by. Without any, a quarter of the images of the search is held out.
    """

    strategies: tuple[Strategy, ...] = field(default_factory=_default_strategies)
    target: Target = OnnxRuntime()
    margin: float = MARGIN
    fewer_blocks: tuple[float, ...] = FEWER_BLOCKS
    repairs: tuple[Repair, ...] = QUICK_REPAIRS
    records: CandidateRecords | None = field(default=None, compare=False)
    held_out: tuple[Example, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.strategies:
            raise BudgetError("`strategies` must be at least one strategy; got none. Leave it out for the default.")
        if not self.margin >= 1:
            raise BudgetError(f"`margin` must be at least 1, which takes the least error; got {self.margin!r}.")

    def find(self, context: SearchContext) -> Proposal:
        """Notes: those of the strategy that is taken, its ``divisor``, and ``candidates``."""
        result = self.search(context)
        return Proposal(result.architecture, result.notes)

    def search(self, context: SearchContext) -> SearchResult:
        """See `Strategy.search`; the result is that of the candidate that is taken.

        Raises:
            BudgetError: If the budget is out of reach for every strategy and divisor.
            DataError: If there are no images.
        """
        if context.budget.allows(context.costs.original, context.costs.original):
            return super().search(context)
        comparison = _Comparison(self, context)
        try:
            taken = self._chosen(comparison)
        except _NotExactError as stopped:
            # Whoever cuts it freezes what is not exact, and searches again.
            return stopped.result
        compared = [f"{'Taken' if one is taken else 'Compared'}: {one}" for one in comparison.found]
        for line in compared:
            _LOGGER.info(f"{line}.")
        notes = {
            "divisor": taken.space.divisor or 1,
            "candidates": [{**one.to_json(), "taken": one is taken} for one in comparison.found],
            "compared": compared,
        }
        return replace(taken.result, notes={**taken.result.notes, **notes})

    def least(self, context: SearchContext) -> Cost:
        """Return the cost of the smallest architecture of the first strategy with the finest widths."""
        return self.strategies[0].least(replace(context, space=candidate_spaces(context)[0]))

    def _chosen(self, comparison: "_Comparison") -> Candidate:
        """The three steps."""
        spaces = candidate_spaces(comparison.context)
        first, *others = self.strategies
        mine = comparison.divisors(first, spaces)
        while not mine and others:
            first, *others = others
            mine = comparison.divisors(first, spaces)
        if not mine:
            first.search(replace(comparison.context, space=spaces[0]))  # It says why there is none.
            raise BudgetError("`budget` must be within reach; no strategy found a network within it. Raise it.")
        ahead = self._taken(comparison.timed(mine))
        rivals = [one for one in (comparison.judge(other, ahead.space) for other in others) if one is not None]
        start = self._taken([ahead, *comparison.timed(rivals)])
        if start is not ahead:
            mine += comparison.timed(comparison.divisors(start.strategy, spaces))
        limit = min((one.error for one in rivals), default=math.inf)
        if comparison.is_timed:
            mine += comparison.timed(self._without_blocks(comparison, start, mine))
        # One of the rivals is within the limit.
        within = [one for one in dict.fromkeys((*mine, *rivals)) if one.error <= limit]
        return self._taken(within or mine)

    def _without_blocks(
        self, comparison: "_Comparison", start: Candidate, others: Sequence[Candidate]
    ) -> list[Candidate]:
        """Step 3."""
        order = comparison.blocks() if self.fewer_blocks else []
        least, found = min(one.error for one in _paying(others)), list[Candidate]()
        for fraction in self.fewer_blocks if order else ():
            count = round(fraction * len(comparison.context.costs.blocks))
            if not 0 < count <= len(order):
                continue
            tried = comparison.judge(Without(start.strategy, tuple(order[:count])), start.space)
            if tried is None or tried.error > self.margin * least:
                break
            least = min(least, tried.error)
            found.append(tried)
        return found

    def _taken(self, candidates: Sequence[Candidate]) -> Candidate:
        """The fastest within the margin of the least error, both of those that pay."""
        if all(one.record is None for one in candidates):
            return min(candidates, key=_by_rule)
        paying = _paying(candidates)
        least = min(paying, key=lambda one: one.error)
        near = (one for one in paying if one is least or one.error <= self.margin * least.error)
        return max(near, key=lambda one: one.speedup)


def _paying(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates that pay; if none do, that are faster than the original; if none are, all."""
    timed = [one for one in candidates if one.record is not None] or list(candidates)
    return [one for one in timed if one.pays] or [one for one in timed if one.speedup > 1] or timed


def _by_rule(candidate: Candidate) -> tuple[int, float]:
    """How far the divisor is from the one that usually pays, then the error."""
    return abs((candidate.space.divisor or 1) - _RULED_DIVISOR), candidate.error


def candidate_spaces(context: SearchContext) -> list[SearchSpace]:
    """The spaces to search in: one for every divisor that allows other widths than those before, or the given one.

    Finer ones come first.
    """
    if context.space.divisor is not None:
        return [context.space]
    tried: dict[tuple[tuple[int, ...], ...], SearchSpace] = {}
    for divisor in DIVISORS:
        space = replace(context.space, divisor=divisor)
        levels = tuple(tuple(mine.tolist()) for mine in space.levels(context.inputs.graph))
        tried.setdefault(levels, space)
    return list(tried.values())


class _NotExactError(Exception):
    """The cut of a candidate is not exact.

    Attributes:
        result: The candidate.
    """

    def __init__(self, result: SearchResult) -> None:
        super().__init__()
        self.result = result


class _Comparison:
    """Searches, judges and times candidates of one search.

    Attributes:
        context: The search, without the images that judge.
        found: All candidates with different architectures, in the order in which they were judged.
    """

    def __init__(self, strategy: Fastest, context: SearchContext) -> None:
        inputs = context.inputs
        if not inputs.batches:
            raise DataError("`batches` must hold images to compare networks on; got none. Pass calibration data.")
        held_out = strategy.held_out
        if not held_out:
            split = split_calibration(inputs.batches)
            inputs = replace(inputs, batches=split.fit)
            held_out = tuple(images for images, _ in split.held_out)
        self._strategy, self._target = strategy, strategy.target.for_cuts()
        self._records = CandidateRecords() if strategy.records is None else strategy.records
        # Scores from other images than those of the caller's searches.
        self.context = replace(context, inputs=inputs, score_cache=ScoreCache())
        self.found: list[Candidate] = []
        self._repaired = RepairedNetworks(context, strategy.repairs, [each for each, _ in inputs.batches], held_out)
        others = len(strategy.strategies) - 1 + len(strategy.fewer_blocks)
        self._expected = len(candidate_spaces(self.context)) + others

    def divisors(self, strategy: Strategy, spaces: Iterable[SearchSpace]) -> list[Candidate]:
        """Judge what a strategy finds in each space; later searches stay near to the first, see `Strategy.again`."""
        found: list[Candidate] = []
        for space in spaces:
            near = strategy.again(found[0].result.architecture) if found else strategy
            candidate = self.judge(near, space)
            if candidate is not None:
                found.append(candidate)
        return found

    def judge(self, strategy: Strategy, space: SearchSpace) -> Candidate | None:
        """Judge what a strategy finds, once for each network; None if the budget is out of its reach."""
        self._progress(f"network {len(self.found) + 1}, widths divisible by {space.divisor or 1}")
        try:
            result = strategy.search(replace(self.context, space=space, progress=_silent))
        except BudgetError:
            return None
        for same in self.found:
            if same.result.architecture == result.architecture:
                return same
        candidate = Candidate(strategy, space, result, self._error(result))
        self.found.append(candidate)
        return candidate

    def _error(self, result: SearchResult) -> float:
        """The error after repair, which is known already in a resumed run."""
        name = _digest(result)
        if name not in self._records.errors:
            made = self._repaired.cut(result.architecture)
            if made.verification.frozen:
                raise _NotExactError(result)
            self._records.errors[name] = self._repaired.distance.worst(made.model)
            self._records.write()
        return self._records.errors[name]

    @property
    def is_timed(self) -> bool:
        """Whether times can be measured."""
        return not self._records.untimed

    def timed(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The same candidates; those that have no time yet are measured now, in turns with the original."""
        missing = [one for one in candidates if _digest(one.result) not in self._records.pairs]
        if missing and self.is_timed:
            self._measure(missing)
            self._records.write()
        for one in candidates:
            one.record = self._records.pairs.get(_digest(one.result))
        return list(candidates)

    def _progress(self, what: str) -> None:
        """Say what is done next; done are the networks found so far, of as many as the three steps usually judge."""
        self.context.progress(min(len(self.found) / self._expected, 0.95), what)

    def _measure(self, candidates: Sequence[Candidate]) -> None:
        """Measure on the target; where that fails, in PyTorch; where that fails too, not at all."""
        self._progress(f"measuring the time of {len(candidates)} network{'s' if len(candidates) > 1 else ''}")
        inputs, target = self.context.inputs, self._target
        # Repairs will replace most of the weights, so that denormal numbers say nothing about a candidate.
        cuts = [
            flush_denormals_(apply_architecture(inputs.model, inputs.graph, one.result.architecture))
            for one in candidates
        ]
        reasons: list[str] = []
        eager = TorchEager(target.threads, target.batch)
        for place in (target,) if target == eager else (target, eager):
            try:
                sample = _sample(inputs.batches[0][0], place)
                found = measure_against(inputs.model, cuts, place, sample, rounds=_ROUNDS, warmup=_WARMUP)
            except Exception as error:  # Whatever a runtime cannot do must not end the search.
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                named = self._strategy.target if place is target else place
                reasons.append(f"{type(named).__name__}: {reason}")
                continue
            if reasons:
                _LOGGER.info(f"Networks are compared by their time in PyTorch, because of {reasons[0]}")
            self._records.pairs |= {_digest(one.result): record for one, record in zip(candidates, found, strict=True)}
            return
        self._records.untimed = "; ".join(reasons)
        _LOGGER.info(f"No time could be measured, so the divisor is {_RULED_DIVISOR} by rule: {self._records.untimed}")

    def blocks(self) -> list[str]:
        """Names of the blocks that can be removed, the one that matters least for its cost first."""
        if not self.context.inputs.graph.removable:
            return []
        return blocks_by_worth(self.context, first_images(self._repaired.held_out, _BLOCK_IMAGES))


def describe_choice(notes: Mapping[str, object]) -> tuple[str, ...]:
    """Return what was compared and taken, in words, from the notes of a result; none if nothing was compared."""
    compared = cast(Sequence[str], notes.get("compared", ()))
    if len(compared) < 2:
        return ()
    return (
        f"{len(compared)} networks were compared, by their outputs on images that neither scored nor fitted (error, 0 "
        f"to about 1) and by time. {'. '.join(compared)}.",
    )


def _digest(result: SearchResult) -> str:
    return sha256_of_json(result.architecture.to_json())


def _sample(batch: Example, target: Target) -> InputTensors:
    """A batch as a target takes it.

    Raises:
        DataError: If it is neither a tensor nor a tuple of tensors.
    """
    parts = (batch,) if isinstance(batch, Tensor) else batch
    if not isinstance(parts, tuple) or not all(isinstance(part, Tensor) for part in parts):
        raise DataError(f"`batches` must be tensors or tuples of tensors to be timed; got a {type(batch).__name__}.")
    count = min(count_images(batch), target.batch)
    return tuple(part[:count] if part.dim() else part for part in cast(InputTensors, parts))


def _silent(fraction: float, what: str) -> None:
    """Report no progress: the inner strategy knows only its own part."""

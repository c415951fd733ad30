"""The first half of a run without any training: trace, search, cut and repair; and the masks of single weights."""

import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from secateur._batches import batch_length, take
from secateur._runtime import copy_model
from secateur.architecture import Architecture
from secateur.cost.budget import Budget, Cost, format_count, limits_latency
from secateur.data.dataset import draw_calibration
from secateur.errors import ArtifactError, BudgetError, ModelError
from secateur.graph.graph import ChannelGraph
from secateur.pipeline.config import CutInput, CutStudent, Plan
from secateur.pipeline.workspace import CutState, RunDirectory
from secateur.prune.cut import Cut, RepairResult
from secateur.prune.described_widths import update_described_widths_
from secateur.prune.masks import make_permanent_, nonzero_params
from secateur.prune.slice import apply_architecture
from secateur.prune.verify import Verification
from secateur.prune.weight_pruning import Sparsify
from secateur.report.verdict import without_settings
from secateur.search.base import SearchResult, Strategy, search_architecture
from secateur.search.candidates import CandidateRecords, Fastest
from secateur.search.depth import RemoveBlocks
from secateur.search.latency import Measurements, WithinLatency
from secateur.train.checkpoint import tensors_of, write_tensors_
from secateur.train.config import RunSettings
from secateur.train.device import fabric_precision, open_fabric

if TYPE_CHECKING:
    from lightning_fabric import Fabric

ImageBatches = tuple[tuple[Tensor, Tensor], ...]

_EVERY_S = 20.0
_FIRST_S = 3.0
"""Seconds after which a search that can estimate says for the first time how long it will take."""
_ESTIMATED_EVERY_S = 10.0
_HELD_OUT, _FEWEST_HELD_OUT, _HELD_OUT_BATCH = 256, 32, 64
"""Training images that candidates are judged by: at most, at least, and in a batch."""


def search_and_cut(plan: Plan, original: nn.Module, batches: ImageBatches, work: RunDirectory | None) -> CutStudent:
    """Find an architecture, cut the model to it and repair it, or take over what an interrupted run has left.

    An axis that turns out not to be cut exactly is frozen, which changes what fits the budget: the search begins again,
    with checkpoints of its own, because those of another graph cannot be resumed.

    Args:
        plan: The run.
        original: A copy of the model in eval mode, on the device of the run.
        batches: Calibration images and labels from the training split, on the device of the run.
        work: Where to keep checkpoints of the search and the result for a resumed run.
    """
    began = time.perf_counter()
    inputs = batches[0][0]
    # A list of images has no batch dimension: costs are those of all its images, and must be those of one.
    graph = plan.cut.trace(original, take(inputs, slice(1 if isinstance(inputs, list) else 2)))
    plan.log(
        f"Traced {plan.name} in {time.perf_counter() - began:.1f} s: {len(graph.axes)} channel axes, "
        f"{len(graph.prunable)} prunable{f' ({plan.cut})' if str(plan.cut) else ''}."
    )
    left = None if work is None else work.read()
    if left is not None:
        plan.log("Continuing the interrupted run: its architecture and weights are taken as they were.")
        return _restored(original, graph, left)
    strategy, number = _strategy(plan, work), 0
    while True:
        began = time.perf_counter()
        folder = None if work is None else work.search_checkpoint(number)
        result = _search(plan, original, graph, batches, strategy=strategy, folder=folder)
        plan.log(f"Found an architecture in {time.perf_counter() - began:.1f} s: {_describe(result)}.")
        if result.frozen:
            plan.log(f"Could not be cut exactly and stays whole: {', '.join(name for name, _ in result.frozen)}.")
            graph = graph.with_inexact(result.frozen)
        began = time.perf_counter()
        plan.log("Cutting the network and checking the cut; repairs after it can take a few minutes.")
        images = [images for images, _ in batches]
        trained = _trained(original, result)
        uncut = CutInput(original, trained, graph, images, plan.run.seed, partial(_more_images, plan))
        pruned = plan.cut.init.cut(uncut, result.architecture)
        if not pruned.verification.frozen:
            break
        graph, number = pruned.graph, number + 1
        names = ", ".join(name for name, _ in pruned.verification.frozen)
        plan.log(f"Could not be cut exactly and stays whole: {names}. Searching again.")
    seconds = time.perf_counter() - began
    plan.log(
        f"{plan.cut.init.done.capitalize()} in {seconds:.1f} s; sliced equals masked within "
        f"{pruned.verification.max_rel:.1e} (tolerance {pruned.verification.tolerance:.0e})."
    )
    for repair in pruned.repairs:
        plan.log(describe_repair(replace(repair, repair=without_settings(repair.repair))))
    result = replace(result, weights=None)  # The cut has taken what it needs of them.
    if work is not None:
        work.write(_state(result, pruned))
    return CutStudent(
        original, pruned.model, pruned.graph, result, pruned.verification, pruned.repairs, pruned.described
    )


def _strategy(plan: Plan, work: RunDirectory | None) -> Strategy:
    """The strategy of the plan, with a place to keep what it measures; it measures if the budget limits the latency."""
    if isinstance(plan.strategy, Fastest):
        records = CandidateRecords.at(None if work is None else work.choice)
        return replace(plan.strategy, records=records, held_out=_held_out(plan))
    if not limits_latency(plan.budget) or isinstance(plan.strategy, WithinLatency):
        return plan.strategy
    measurements = Measurements.at(None if work is None else work.measurements)
    return WithinLatency(plan.strategy, plan.target, plan.run.latency_cache, measurements)


def _held_out(plan: Plan) -> tuple[Any, ...]:
    """Training images beside those that score and repair; none if there are too few, and some of those are held out."""
    calibration = plan.cut.calibration_images
    more = min(_HELD_OUT, len(plan.data.train) - calibration)
    return () if more < _FEWEST_HELD_OUT else _drawn_after(plan, calibration, more)


def _more_images(plan: Plan, count: int) -> tuple[Any, ...]:
    """Up to so many training images beside those that score, repair and judge."""
    used = plan.cut.calibration_images + _HELD_OUT
    more = min(count, len(plan.data.train) - used)
    return () if more < 1 else _drawn_after(plan, used, more)


def _drawn_after(plan: Plan, start: int, count: int) -> tuple[Any, ...]:
    """Batches of ``count`` training images, those after the first ``start`` of the order in which they are drawn."""
    drawn = draw_calibration(plan.data.train, start + count, device=plan.device, seed=plan.run.seed)
    if all(isinstance(inputs, Tensor) for inputs, _ in drawn):
        return torch.cat([images for images, _ in drawn])[start:].split(_HELD_OUT_BATCH)
    found: list[Any] = []
    for inputs, _ in drawn:
        size = batch_length(inputs)
        if start < size:
            found.append(take(inputs, slice(start, None)))
        start = max(0, start - size)
    return tuple(found)


def _search(
    plan: Plan,
    original: nn.Module,
    graph: ChannelGraph,
    batches: ImageBatches,
    *,
    strategy: Strategy,
    folder: Path | None,
) -> SearchResult:
    """Search; if no architecture is within the budget, the error names what the user selected.

    Raises:
        BudgetError: If no architecture that the selection and the space leave is within the budget.
    """
    progress = ProgressLog(plan.log, estimating=isinstance(strategy, WithinLatency | Fastest))
    try:
        with progress.beating():
            return search_architecture(
                original,
                graph,
                strategy,
                budget=plan.budget,
                batches=batches,
                space=plan.cut.space,
                seed=plan.run.seed,
                data=plan.data,
                run=RunSettings(folder, plan.run.checkpoints, callbacks=plan.run.callbacks, fabric=_alone(plan.fabric)),
                progress=progress,
            )
    except BudgetError as error:
        ways = [f"Or loosen what you selected: {plan.cut}."] if str(plan.cut) else []
        if graph.removable:
            ways += _with_fewer_blocks(plan.strategy)
        if not ways:
            raise
        raise BudgetError(" ".join((str(error), *ways))) from error


class ProgressLog:
    """Logs how far a search is, at most every twenty seconds, so that a short one logs nothing.

    Args:
        log: Called with a sentence.
        clock: Returns seconds.
        estimating: Whether to say every ten seconds how long it will take, also while a single step takes longer; see
            `beating`.
    """

    def __init__(
        self, log: Callable[[str], None], clock: Callable[[], float] = time.monotonic, *, estimating: bool = False
    ) -> None:
        self._log, self._clock = log, clock
        self._every = _ESTIMATED_EVERY_S if estimating else _EVERY_S
        self._estimating = estimating
        self._last = self._began = self._reached = clock()
        self._state: tuple[float, str] | None = None
        self._told = False

    def __call__(self, fraction: float, what: str) -> None:
        """Called by the search with the finished fraction and what is being done."""
        # Parts that take no time were estimated too high: what was done once stays done.
        before, now = self._state, self._clock()
        self._state = (max(fraction, before[0]) if before and self._estimating else fraction, what)
        if before is None or self._state[0] > before[0]:
            self._reached = now
        self._tell(now)

    def _tell(self, now: float) -> None:
        if self._state is None:
            return
        soon = self._estimating and not self._told and self._state[0] > 0
        if now - self._last < (min(_FIRST_S, self._every) if soon else self._every):
            return
        self._last, self._told = now, True
        fraction, what = self._state
        left = self._left(fraction, now) if self._estimating else ""
        self._log(f"Searching, {100 * fraction:.0f} % done{left}: {what}.")

    def _left(self, fraction: float, now: float) -> str:
        """How long the rest takes at the speed until now, in words; none before the first part is finished.

        Only finished parts say how fast the search is. Within a part the time runs down, until the part has taken
        longer than everything was to take; then as long again is expected.
        """
        if fraction <= 0:
            return ""
        within = now - self._reached
        left = max((self._reached - self._began) / fraction * (1 - fraction) - within, within)
        return f", about {left / 60:.0f} min left" if left >= 90 else f", about {max(left, 1):.0f} s left"

    @contextmanager
    def beating(self) -> Generator[None]:
        """Log within the block also while nothing is finished, by a thread that sleeps in between."""
        if not self._estimating:
            yield
            return
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self._every / 10):
                self._tell(self._clock())

        thread = threading.Thread(target=beat, name="progress of the search", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _trained(original: nn.Module, result: SearchResult) -> nn.Module:
    """The original, or a copy of it with the weights that the search trained.

    Raises:
        ModelError: If they are not those of the whole model.
    """
    if result.weights is None:
        return original
    model = copy_model(original)
    try:
        model.load_state_dict(dict(result.weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ModelError(
            f"`weights` of the search must be those of the whole model, by their names in its state_dict; got others: "
            f"{reason}. Correct {result.strategy}."
        ) from error
    return model


def _alone(fabric: "Fabric") -> "Fabric":
    """Device and precision of this process: where a run has several processes, only the first one searches."""
    return fabric if fabric.world_size == 1 else open_fabric(fabric_precision(fabric), device=fabric.device)


def _with_fewer_blocks(strategy: Strategy) -> list[str]:
    """A way out that takes more blocks than a strategy does, if there is one."""
    if not isinstance(strategy, RemoveBlocks):
        return ["Or let residual blocks go too (--remove-blocks; in Python: RemoveBlocks)."]
    if strategy.max_fraction < 1:
        return [
            f"Or let more of the residual blocks go (--remove-blocks, now {strategy.max_fraction:g}; in Python: "
            "RemoveBlocks)."
        ]
    return []


def describe_repair(repair: RepairResult) -> str:
    """One repair in words."""
    where = "held-out images" if repair.held_out else "the images it was fitted to (too few to hold any out)"
    words = f"{repair.repair}: distance from the uncut outputs on {where} {repair.before:.3f} -> {repair.after:.3f}"
    words += "" if repair.kept else "; undone, because it made things worse"
    if repair.skipped:
        (layer, reason), count = repair.skipped[0], len(repair.skipped)
        others = f" and {count - 1} more" if count > 1 else ""
        words += f"; {layer}{others} left as cut, because {reason}"
    return words + "."


def _describe(result: SearchResult) -> str:
    """What is left of blocks, MACs and parameters, in words."""
    removed, cost, original = len(result.architecture.removed_blocks), result.cost, result.original
    blocks = f"{removed} block{'s' if removed > 1 else ''} removed, " if removed else ""
    return (
        f"{blocks}{format_count(cost.macs)} of {format_count(original.macs)} MACs "
        f"({100 * cost.macs / max(original.macs, 1):.1f} %), "
        f"{format_count(cost.params)} of {format_count(original.params)} parameters "
        f"({100 * cost.params / max(original.params, 1):.1f} %)"
    )


def _state(result: SearchResult, pruned: Cut) -> CutState:
    """What a resumed run takes over."""
    return CutState(
        search=result.to_json(),
        frozen=tuple((axis.name, axis.frozen_because) for axis in pruned.graph.axes if axis.frozen_because),
        kept_blocks=tuple((block.name, block.kept_because) for block in pruned.graph.blocks if block.kept_because),
        architecture=pruned.architecture.to_json(),
        verification=asdict(pruned.verification),
        repairs=tuple(asdict(repair) for repair in pruned.repairs),
        student=tensors_of(pruned.model),
        widths_follow=bool(pruned.described.followed),
    )


def _restored(original: nn.Module, graph: ChannelGraph, left: CutState) -> CutStudent:
    """The cut student of an interrupted run."""
    graph = graph.with_frozen({name: why for name, why in left.frozen if graph.by_name[name].frozen_because is None})
    graph = graph.with_kept_blocks(dict(left.kept_blocks))
    student = apply_architecture(original, graph, Architecture.from_json(left.architecture)).eval()
    described = update_described_widths_(original, student, graph)
    if described.followed and not left.widths_follow:
        student = apply_architecture(original, graph, Architecture.from_json(left.architecture)).eval()
        described = described.undone()
    _fill_(student, left)
    fields = cast(Mapping[str, Any], left.verification)
    verification = Verification(
        fields["max_abs"],
        fields["max_rel"],
        fields["tolerance"],
        fields["dtype"],
        shape=tuple(fields.get("shape", ())),
        second_shape=tuple(fields.get("second_shape", ())),
        in_training=bool(fields.get("in_training", False)),
        not_run=tuple(fields.get("not_run", ())),
    )
    repairs = tuple(RepairResult.from_json(repair) for repair in left.repairs)
    return CutStudent(original, student, graph, SearchResult.from_json(left.search), verification, repairs, described)


def _fill_(student: nn.Module, left: CutState) -> None:
    """Also the buffers that a state_dict leaves out.

    Raises:
        ArtifactError: If they are not those of the student.
    """
    wanted = {name: tensor.shape for name, tensor in tensors_of(student).items()}
    if wanted != {name: tensor.shape for name, tensor in left.student.items()}:
        raise ArtifactError(
            "The unfinished run is damaged: its weights are not those of its architecture. Begin again with --restart."
        )
    write_tensors_(student, left.student)


def zeros_for(plan: Plan, cut_student: CutStudent, batches: Sequence[tuple[Tensor, Tensor]]) -> Sparsify | None:
    """The masks that the recovery trains under; None if the budget asks for none, or the channels meet it alone.

    Raises:
        BudgetError: If what may not be pruned is more than the budget allows.
    """
    limit = plan.budget.nonzero_limit(cut_student.search.original)
    if plan.cut.weight_pruning is None or limit is None:
        return None
    density = plan.cut.weight_pruning.density_within(cut_student.student, limit)
    if density == 1:
        plan.log("The channels alone meet the bound on non-zero parameters: no single weight is pruned.")
        return None
    plan.log(
        f"Pruning single weights: {100 * density:.1f} % of those that may go stay, "
        f"so that at most {format_count(limit)} parameters are not zero."
    )
    return Sparsify(density, plan.cut.weight_pruning, tuple(batches))


def with_zeros(masked: nn.Module) -> nn.Module:
    """A copy without masks: an ordinary model with zeros in it."""
    return make_permanent_(copy_model(masked)).eval()


def within(budget: Budget, student: nn.Module, original: Cost) -> tuple[bool, str]:
    """Whether a student has as few non-zero parameters as it must, and that in words; empty if nothing is asked."""
    limit = budget.nonzero_limit(original)
    if limit is None:
        return True, ""
    count = nonzero_params(student)
    return count <= limit, f", {100 * count / max(original.params, 1):.2f} % of the parameters not zero"

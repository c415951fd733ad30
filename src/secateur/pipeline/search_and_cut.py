"""Word of long work, not more often than somebody wants to read it.

The first half of a run: trace, search, cut, heal. No training.

The second half of a budget: single weights at zero, after the channels."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from secateur._runtime import copy_model
from secateur.architecture import Architecture
from secateur.cost.budget import Budget, Cost, format_count, is_timed
from secateur.cost.latency_model import LatencyModel
from secateur.errors import ArtifactError, BudgetError, ModelError
from secateur.graph.graph import ChannelGraph
from secateur.pipeline.config import CutInput, CutStudent, Plan
from secateur.pipeline.latency import Measurements, search_within_latency
from secateur.pipeline.workspace import CutState, RunDirectory
from secateur.prune.cut import Cut, RepairResult
from secateur.prune.masks import make_permanent_, nonzero_params
from secateur.prune.slice import apply_architecture
from secateur.prune.verify import Verification
from secateur.prune.weight_pruning import Sparsify
from secateur.search.base import ScoreCache, SearchResult, SearchTraining, Strategy, search_architecture
from secateur.search.depth import RemoveBlocks
from secateur.search.space import SearchSpace
from secateur.train.checkpoint import tensors_of, write_tensors_
from secateur.train.device import fabric_precision, open_fabric

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_EVERY_S = 20.0


class Paced:
    """Tells how far a search is, at most every twenty seconds, so that a short one is silent."""

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._tell, self._clock = tell, clock
        self._told = clock()

    def __call__(self, fraction: float, what: str) -> None:
        """Called whenever a search has something to say."""
        now = self._clock()
        if now - self._told >= _EVERY_S:
            self._told = now
            self._tell(f"Searching, {100 * fraction:.0f} % done: {what}.")


ImageBatches = tuple[tuple[Tensor, Tensor], ...]


def search_and_cut(plan: Plan, original: nn.Module, batches: ImageBatches, work: RunDirectory | None) -> CutStudent:
    """Find an architecture, cut the model to it and repair it, or take up what an interrupted run has left.

    Args:
        plan: The run.
        original: Our copy of the model, in eval mode, on the device of the run.
        batches: Calibration images and labels from the training split, on the device of the run.
        work: Where to keep checkpoints of the search and the result for a resume.
    """
    began = time.perf_counter()
    graph = plan.cut.trace(original, batches[0][0][:2])
    plan.log(
        f"Traced {plan.name} in {time.perf_counter() - began:.1f} s: {len(graph.axes)} channel axes, "
        f"{len(graph.prunable)} prunable{f' ({plan.cut})' if str(plan.cut) else ''}."
    )
    left = None if work is None else work.read()
    if left is not None:
        plan.log("Going on with the interrupted run: its architecture and weights are taken as they were.")
        return _take_up(original, graph, left)
    found, pruned = _search_until_exact(plan, original, graph, batches, work)
    if work is not None:
        work.write(_cutting(found, pruned))
    return CutStudent(original, pruned.model, pruned.graph, found, pruned.verification, pruned.repairs)


def _search_until_exact(
    plan: Plan, original: nn.Module, graph: ChannelGraph, batches: ImageBatches, work: RunDirectory | None
) -> tuple[SearchResult, Cut]:
    """Search and cut until nothing had to be frozen: an axis that cannot be cut right changes what fits the budget.

    Every search has checkpoints of its own: they cannot be continued with another graph.
    """
    images = [images for images, _ in batches]
    kept = Measurements.at(None if work is None else work.measurements)
    for number in itertools.count():
        began = time.perf_counter()
        checkpoint = None if work is None else work.search_checkpoint(number)
        found = _search(plan, original, graph, batches, checkpoint=checkpoint, kept=kept)
        plan.log(f"Found an architecture in {time.perf_counter() - began:.1f} s: {_against(found)}.")
        began = time.perf_counter()
        uncut = CutInput(original, _searched(original, found), graph, images, plan.run.seed)
        pruned = plan.cut.init.cut(uncut, found.architecture)
        if not pruned.verification.frozen:
            seconds = time.perf_counter() - began
            plan.log(
                f"{plan.cut.init.done.capitalize()} in {seconds:.1f} s; sliced equals masked within "
                f"{pruned.verification.max_rel:.1e} (tolerance {pruned.verification.tolerance:.0e})."
            )
            for repair in pruned.repairs:
                plan.log(describe_repair(repair))
            return replace(found, weights=None), pruned  # The cut has what it needs of them.
        graph = pruned.graph
        names = ", ".join(name for name, _ in pruned.verification.frozen)
        plan.log(f"Could not be cut exactly and stays whole: {names}. Searching again.")
    raise AssertionError("counting ended")


def _searched(original: nn.Module, found: SearchResult) -> nn.Module:
    """The original, or a copy of it with the weights that the search trained.

    Raises:
        ModelError: If they are not those of the whole model.
    """
    if found.weights is None:
        return original
    model = copy_model(original)
    try:
        model.load_state_dict(dict(found.weights))
    except RuntimeError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ModelError(
            f"`weights` of the search must be those of the whole model, by their names in its state_dict; got others: "
            f"{reason}. Mend {found.strategy}."
        ) from error
    return model


def _search(
    plan: Plan,
    original: nn.Module,
    graph: ChannelGraph,
    batches: ImageBatches,
    *,
    checkpoint: Path | None,
    kept: Measurements,
) -> SearchResult:
    """Search; a budget out of reach may be so because of what was chosen, and then the error says it.

    Raises:
        BudgetError: If no architecture that the choices and the space leave is within the budget.
    """

    remembered, paced = ScoreCache(), Paced(plan.log)

    def searching(
        strategy: Strategy, budget: Budget, space: SearchSpace, latency: LatencyModel | None, folder: Path | None
    ) -> SearchResult:
        return search_architecture(
            original,
            graph,
            strategy,
            budget=budget,
            batches=batches,
            space=space,
            seed=plan.run.seed,
            progress=paced,
            training=SearchTraining(plan.data, folder, plan.run.checkpoints, plan.run.callbacks, _alone(plan.fabric)),
            latency=latency,
            remembered=remembered,
        )

    try:
        if not is_timed(plan.budget):
            return searching(plan.strategy, plan.budget, plan.cut.space, None, checkpoint)
        images = [images for images, _ in batches]
        return search_within_latency(
            plan, original, graph, images, searching=searching, checkpoint=checkpoint, kept=kept
        )
    except BudgetError as error:
        ways = [f"Or loosen what you chose: {plan.cut}."] if str(plan.cut) else []
        if graph.removable:
            ways += _with_fewer_blocks(plan.strategy)
        if not ways:
            raise
        raise BudgetError(" ".join((str(error), *ways))) from error


def _alone(fabric: "Fabric") -> "Fabric":
    """Device and precision of this process: where a run has several processes, only the first one searches."""
    return fabric if fabric.world_size == 1 else open_fabric(fabric_precision(fabric), device=fabric.device)


def _with_fewer_blocks(strategy: Strategy) -> list[str]:
    """A way out that takes more blocks than a strategy does, if there is one."""
    if not isinstance(strategy, RemoveBlocks):
        return ["Or let residual blocks go too (--remove-blocks; in Python: RemoveBlocks)."]
    if strategy.most < 1:
        return [
            f"Or let more of the residual blocks go (--remove-blocks, now {strategy.most:g}; in Python: RemoveBlocks)."
        ]
    return []


def describe_repair(repair: RepairResult) -> str:
    """One repair in words."""
    words = f"{repair.repair}: distance from the uncut logits {repair.before:.3f} -> {repair.after:.3f}"
    return words + ("." if repair.kept else "; undone, because it made things worse.")


def _against(found: SearchResult) -> str:
    removed = len(found.architecture.removed_blocks)
    blocks = f"{removed} block{'s' if removed > 1 else ''} removed, " if removed else ""
    return (
        f"{blocks}{format_count(found.cost.macs)} of {format_count(found.original.macs)} MACs "
        f"({100 * found.cost.macs / max(found.original.macs, 1):.1f} %), "
        f"{format_count(found.cost.params)} of {format_count(found.original.params)} parameters "
        f"({100 * found.cost.params / max(found.original.params, 1):.1f} %)"
    )


def _cutting(found: SearchResult, pruned: Cut) -> CutState:
    graph_frozen = tuple((axis.name, axis.frozen_because) for axis in pruned.graph.axes if axis.frozen_because)
    return CutState(
        found=found.to_json(),
        frozen=graph_frozen,
        kept_blocks=tuple((block.name, block.kept_because) for block in pruned.graph.blocks if block.kept_because),
        architecture=pruned.architecture.to_json(),
        verification=asdict(pruned.verification),
        repairs=tuple(asdict(repair) for repair in pruned.repairs),
        student=tensors_of(pruned.model),
    )


def _take_up(original: nn.Module, graph: ChannelGraph, left: CutState) -> CutStudent:
    graph = graph.with_frozen({name: why for name, why in left.frozen if graph.by_name[name].frozen_because is None})
    graph = graph.with_kept_blocks(dict(left.kept_blocks))
    student = apply_architecture(original, graph, Architecture.from_json(left.architecture)).eval()
    _fill_(student, left)
    fields = cast(Mapping[str, Any], left.verification)
    verification = Verification(fields["max_abs"], fields["max_rel"], fields["tolerance"], fields["dtype"])
    repairs = tuple(RepairResult(**cast(dict[str, Any], dict(repair))) for repair in left.repairs)
    return CutStudent(original, student, graph, _found(left.found), verification, repairs)


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


def _found(data: Mapping[str, object]) -> SearchResult:
    fields = cast(Mapping[str, Any], data)
    return SearchResult(
        architecture=Architecture.from_json(fields["architecture"]),
        cost=Cost.from_json(fields["cost"]),
        original=Cost.from_json(fields["original"]),
        budget=Budget.parse(fields["budget"]),
        strategy=fields["strategy"],
        notes=dict(fields["notes"]),
    )


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

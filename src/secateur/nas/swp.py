"""SWP, stage-wise pruning: train a supernet stage by stage, score candidates of every stage, combine the best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from secateur._arrays import FloatArray
from secateur._kinds import settings
from secateur._runtime import torch_threads
from secateur.cost.budget import Cost
from secateur.errors import BudgetError, DataError
from secateur.graph.stages import Stage, find_stages
from secateur.nas.common import (
    Depths,
    OriginalWeights,
    Pretrained,
    RandomInit,
    SupernetWeights,
    Widths,
    check_searched_task,
    set_aside,
    settings_of_task,
)
from secateur.nas.stagewise import measure_stage_batch_norms, run_stages, stage_effects, stage_features
from secateur.nas.supernet import Subnet, Supernet, measure_batch_norms, order_by_score, order_digest
from secateur.nas.swp_candidates import CandidateSpace, StageCandidates
from secateur.nas.swp_knapsack import ExactKnapsack, fill_budget
from secateur.nas.swp_table import Combination, StageChoice
from secateur.nas.swp_train import (
    InPlace,
    SandwichSampler,
    SubnetSampler,
    SupernetStep,
    Supervision,
    SupervisionTarget,
    SWPSearchConfig,
)
from secateur.search.base import Proposal, SearchContext, Strategy, stable_repr
from secateur.search.history import SearchHistory
from secateur.search.importance import Importance
from secateur.search.importance_data import Reconstruction
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification
from secateur.train.callbacks import Silent
from secateur.train.checkpoint import Checkpoint, checkpointing, model_sha256
from secateur.train.config import Batches, RunSettings, TrainConfig
from secateur.train.device import Precision, autocast, channels_last, copy_to_device, fabric_precision, open_fabric
from secateur.train.trainer import Trainer
from secateur.workers import InProcess, Workers

if TYPE_CHECKING:
    from lightning_fabric import Fabric


_CALIBRATION = 4
"""Image batches for the batch norms of a candidate."""

_PROBES = 16
"""Networks that the weights of the stages' losses are measured with."""


@settings
class SWP(Strategy):
    """Train all networks of a space together, stage by stage; score many candidates; combine the best exactly.

    The model is divided into stages. In every step the full net learns from the labels, and the smallest net and some
    random ones learn beside it: each of their stages gets the full net's features as input and learns to give the
    output of the full net's stage, so that one pass trains a candidate of every stage. Candidates of all stages are
    then scored on held-out images by the same loss, one of every stage in a pass, times the effect of the stage on the
    output (`stage_effects`). Losses and costs add up over the stages, so that the best combination within the budget is
    a multiple-choice knapsack. Axes whose channels cross the end of a stage stay whole (see
    `secateur.graph.find_stages`); untie the graph to search residual branches as well.

    Attributes:
        widths: Candidate widths; None leaves them alone.
        depths: Candidate depths of chains of residual blocks; None keeps all blocks.
        cuts: Modules that end a stage; None finds them, () is the ablation without stages.
        sampler: Which networks learn in a step: `SandwichSampler`, or `RandomSampler`, the ablation.
        supervision: What they learn from: `InPlace`; without stages also `SoftLabels` and `Labels`.
        train: Training of the supernet: epochs, batch size, learning rate, optimizer. Its seed is replaced by that of
            the search.
        candidates: Candidates scored in every stage, over all rounds.
        rounds: Rounds of scoring. The first draws from the whole space, the others near the best candidates so far.
        held_out: The number of training images that no weights learn from, for scoring.
        combination: How one candidate of every stage is chosen: `ExactKnapsack`, or `Evolution` as in the paper.
        importance: The order of the channels: every width keeps the first ones.
        init: The weights that the training begins with.
        student_weights: The weights that the student is cut from.
        workers: Where candidates are scored: `InProcess`, or `OnRay`. The result has the same bits; see
            `held_out_losses`.
        task: The loss of the full net. `secateur.compress` puts its own task here.

    Raises:
        BudgetError: If neither widths nor depths are searched, or a number is out of range.

    References:
        Zhang, Rong, Yu & Ou (SWP), arXiv:2011.04908. The exact combination is ours, as is what the paper leaves open:
        where stages end, the loss and its weight, how candidates are drawn (docs/decisions.md).
    """

    widths: Widths | None = Widths()
    depths: Depths | None = None
    cuts: tuple[str, ...] | None = None
    sampler: SubnetSampler = SandwichSampler()
    supervision: Supervision = InPlace()
    train: TrainConfig = TrainConfig(epochs=1, batch_size=64, learning_rate=0.02)
    candidates: int = 128
    rounds: int = 4
    # The paper holds out 200 images of each class of CIFAR-10.
    held_out: int = 2000
    combination: Combination = ExactKnapsack()
    importance: Importance = field(default_factory=Reconstruction)
    init: Pretrained | RandomInit = Pretrained()
    student_weights: OriginalWeights | SupernetWeights = OriginalWeights()
    workers: Workers = InProcess()
    task: Task = field(default=Classification(), repr=False)

    def __post_init__(self) -> None:
        if self.widths is None and self.depths is None:
            raise BudgetError("`widths` or `depths` must be given, or there is nothing to search; got None for both.")
        if self.rounds < 1 or self.candidates < 2 * self.rounds:
            raise BudgetError(
                f"`candidates` must be at least two for each of the `rounds`; got {self.candidates} in {self.rounds}."
            )
        if self.held_out < 1:
            raise BudgetError(f"`held_out` must be at least 1 image; got {self.held_out}. 2000 are usual.")

    @property
    def trains(self) -> bool:
        """See `Strategy.trains`."""
        return True

    def least(self, context: SearchContext) -> Cost:
        """Return the cost of the smallest candidates of all stages."""
        options = self._options(context)
        widths, blocks = options.network_sizes(options.smallest)
        return context.costs.cost_of(widths, blocks)

    def find(self, context: SearchContext) -> Proposal:
        """Search, see `Strategy.find`. What the chosen candidates leave of the budget is filled by widening them.

        The notes are ``training``: a record of every epoch; ``fairness``: how evenly channels were trained; ``stages``:
        for each stage its end, its axes and blocks, the number of its candidates and of those trained, the losses and
        costs of the scored ones, and the chosen one; ``loss``: the sum of the chosen losses; ``weights``: what the
        losses of each stage were multiplied by.

        Raises:
            DataError: If there are no training images or calibration batches, or images cannot be held out.
            BudgetError: If there is nothing to choose, or no combination of the candidates is within the budget.
            TrainingError: If a loss is no longer finite; the checkpoint of the last epoch stays.
        """
        if context.training is None:
            raise DataError("`data` must hold training images for SWP; got none. Pass data=secateur.load_data(...).")
        check_searched_task(self.task, context, "SWP")
        self.student_weights.check(context)
        # Modules made in inference mode could not be trained.
        with torch.inference_mode(mode=False), torch.enable_grad():
            return self._find(context)

    def _options(self, context: SearchContext) -> CandidateSpace:
        stages = find_stages(context.inputs.model, context.inputs.graph, self.cuts)
        self.supervision.check(stages)
        return CandidateSpace.of(context, stages, self.widths, self.depths)

    def _find(self, context: SearchContext) -> Proposal:
        inputs, data = context.inputs, context.training
        assert data is not None
        # First, so that a space or cuts that cannot be searched are refused before anything is trained.
        options = self._options(context)
        fabric = open_fabric(self.train.precision) if context.run.fabric is None else context.run.fabric
        order = order_by_score(context.scores(self.importance))
        supernet = copy_to_device(Supernet(self.init.of(inputs.model, inputs.seed), inputs.graph, order), fabric.device)
        learned, scored = set_aside(data.train, self.held_out, inputs.seed)
        train = replace(self.train, seed=inputs.seed)
        config = SWPSearchConfig(
            options, self.sampler, self.supervision, learned, data.augment, train, fabric, self.task
        )
        calibration = tuple(images.to(fabric.device) for images, _ in inputs.batches[:_CALIBRATION])
        if not calibration:
            raise DataError("`batches` must hold training images for SWP, to measure batch norms on; got none.")
        search = StagewiseSearch(
            SupernetStep(config, supernet),
            StageCandidates(options, inputs.seed),
            context.run,
            {
                **self._settings(context),
                "precision": fabric_precision(fabric).name,
                "stages": ", ".join(stage.cut for stage in options.stages),
                "order": order_digest(supernet.order),
                "images": f"{len(learned)} and {len(scored)}",
                "augment": repr(data.augment),
                "calibration": f"{sum(map(len, calibration))} images",
            },
        )
        search.restore()
        search.train()
        scorer = CandidateScorer.of(
            supernet,
            stages=options.stages,
            supervision=self.supervision,
            calibration=calibration,
            images=scored,
            fabric=fabric,
        )
        # Seeded here, so that a resumed search has the same probes, and with them the same weights.
        draw = np.random.default_rng((inputs.seed, _PROBES))
        scorer = scorer.weighted([options.subnet(options.sample(draw)) for _ in range(_PROBES)])
        search.score(scorer, self.workers, self.rounds, self.candidates // self.rounds)
        choice = self._combined(context, options, search.candidates)
        # The best combination of so few candidates may leave several percent of the budget unused.
        rows = fill_budget(options, search.candidates.rows_of(choice.picked))
        architecture = supernet.architecture(options.subnet(rows))
        notes = {**search.notes(choice), "weights": np.asarray(scorer.weights).tolist()}
        history = SearchHistory.of_records(notes, inputs.graph.sizes, context.costs.original.macs)
        return Proposal(architecture, notes, self.student_weights.of(supernet, calibration, context), history)

    def _combined(self, context: SearchContext, options: CandidateSpace, candidates: StageCandidates) -> StageChoice:
        """Return a combination that is within the budget as a whole network too.

        What a stage adds to the size of a file depends on the others, by some digits of the header: where a combination
        is over a limit by so much, it must leave so much room.
        """
        table = candidates.table()
        # Ends, because every round lowers a limit below the cost of the combination before.
        while True:
            choice = self.combination.combine(table, context.inputs.seed)
            cost = context.costs.cost_of(*options.network_sizes(candidates.rows_of(choice.picked)))
            over = {field: getattr(cost, field) - limit for field, limit in context.limits.items()}
            tighter = {
                # A small excess may vanish in the rounding; the next smaller float is below the cost in any case.
                field: min(choice.cost[field] - excess, math.nextafter(choice.cost[field], 0))
                for field, excess in over.items()
                if excess > 0
            }
            if not tighter:
                return choice
            table = replace(table, limits={**table.limits, **tighter})

    def _settings(self, context: SearchContext) -> Mapping[str, str]:
        """Return everything that must be equal for a search to be resumed; workers and combination may change."""
        # Neither changes what is trained or scored.
        same = replace(self, workers=InProcess(), combination=ExactKnapsack())
        return {
            "strategy": stable_repr(same),
            "budget": str(context.budget),
            "space": repr(context.space),
            "seed": str(context.inputs.seed),
            "model": model_sha256(context.inputs.model),
            **settings_of_task(self.task),
        }


@dataclass(frozen=True, eq=False)
class CandidateScorer:
    """Scores candidates by their losses on held-out images, without training them.

    Attributes:
        supernet: Trained, in eval mode.
        stages: Of its model.
        supervision: The loss of every stage.
        calibration: Image batches for the batch norms of every candidate.
        held_out: Batches of images that no weights have learned from, and their labels.
        full: Batch-norm statistics of the full net.
        precision: Precision of the forward passes; losses are in float32 at least.
        weights: (stages,) what each stage's losses are multiplied by, see `weighted`; None leaves them as they are.
    """

    supernet: Supernet
    stages: tuple[Stage, ...]
    supervision: Supervision
    calibration: tuple[Tensor, ...]
    held_out: tuple[tuple[Tensor, Tensor], ...]
    full: Mapping[str, Tensor]
    precision: Precision
    weights: FloatArray | None = None

    @classmethod
    def of(
        cls,
        supernet: Supernet,
        *,
        stages: tuple[Stage, ...],
        supervision: Supervision,
        calibration: Sequence[Tensor],
        images: Batches,
        fabric: "Fabric",
    ) -> "CandidateScorer":
        """Return a scorer that has the batch-norm statistics of the full net.

        Args:
            supernet: Trained; put into eval mode.
            stages: The stages of its model.
            supervision: The loss of every stage.
            calibration: Image batches.
            images: The held-out images.
            fabric: Device and precision.
        """
        supernet.eval()
        # Batches of nearly equal size, so that the mean over batches is the mean over images.
        size = -(-len(images) // max(round(len(images) / _BATCH), 1))
        held_out = tuple((channels_last(x), y) for x, y in images.batches(size, device=fabric.device))
        batches, precision = tuple(channels_last(images) for images in calibration), fabric_precision(fabric)
        # The precision of the training: bfloat16 takes half of the time, and the losses of the stages of ResNet-20
        # differ by 2e-4 of their size.
        with autocast(precision, fabric.device):
            full = measure_batch_norms(supernet, supernet.full, batches)
        return cls(supernet, stages, supervision, batches, held_out, full, precision)

    def weighted(self, subnets: Sequence[Subnet]) -> "CandidateScorer":
        """Return a scorer that multiplies the losses of a stage by their effect on the output, see `stage_effects`.

        Args:
            subnets: Subnets drawn from the space. The effect is measured on a calibration batch, because held-out
                images are for scoring alone.
        """
        with autocast(self.precision, self.device):
            effects = stage_effects(self.supernet, subnets, self.stages, self.calibration[0])
        return replace(self, weights=effects.numpy())

    @property
    def device(self) -> torch.device:
        """The device of the held-out images."""
        return self.held_out[0][0].device


_BATCH = 250
"""Held-out images per batch, about."""


def held_out_losses(scorer: CandidateScorer, subnets: Sequence[Subnet]) -> FloatArray:
    """Return the losses of the stages of some subnets on the held-out images, each fed with the full net's features.

    One thread computes, whatever the process has: the last bits depend on the number of threads, which differs between
    this process and the workers of Ray, and two candidates may differ by less.

    The full net runs once for all subnets, so the more at a time the better. The batch norms of a subnet are first
    measured on the calibration images, stage by stage too.

    Args:
        scorer: Supernet, images and loss.
        subnets: Any widths and blocks of the stages.

    Returns:
        (subnets, stages) means over the batches, weighted by stages, float64.
    """
    total = np.zeros((len(subnets), len(scorer.stages)))
    with torch.no_grad(), torch_threads(1), autocast(scorer.precision, scorer.device):
        statistics = measure_stage_batch_norms(scorer.supernet, subnets, scorer.stages, scorer.calibration, scorer.full)
        for images, labels in scorer.held_out:
            logits, stage_inputs = stage_features(scorer.supernet, scorer.stages, images, tensors=scorer.full)
            target = SupervisionTarget.of((*stage_inputs, logits), labels)
            for number, subnet in enumerate(subnets):
                outputs = run_stages(
                    scorer.supernet, subnet, scorer.stages, images, stage_inputs, tensors=statistics[number]
                )
                total[number] += scorer.supervision.losses(outputs, target).double().cpu().numpy()
    return total / len(scorer.held_out) * (1.0 if scorer.weights is None else scorer.weights)


_CHUNK = 8
"""Networks scored at a time: the full net runs once for all of them."""


class StagewiseSearch:
    """A search in progress: the training of the supernet, then rounds of candidates.

    There is a checkpoint after every epoch and after every round, and within long ones.

    Args:
        step: What is trained.
        candidates: The candidates scored so far.
        run: Checkpoints and callbacks.
        settings: Everything that must be equal for a search to be the same search.

    Attributes:
        candidates: As given.
    """

    def __init__(
        self, step: SupernetStep, candidates: StageCandidates, run: RunSettings, settings: Mapping[str, str]
    ) -> None:
        self.candidates = candidates
        self._step, self._trainer = step, Trainer(step)
        self._run, self._settings = run, settings
        self._scored: dict[int, FloatArray] = {}

    def restore(self) -> None:
        """Resume an interrupted search, if there is one."""
        saved = self._trainer.resume(self._run.folder, self._settings)
        if saved is not None:
            self.candidates.restore(saved.numbers["candidates"])
            # The chunks of the interrupted round that were scored already.
            scored: Mapping[str, list[list[float]]] = saved.numbers["scored"]
            self._scored = {int(number): np.array(losses) for number, losses in scored.items()}

    def train(self) -> None:
        """Train the supernet to the last epoch.

        Raises:
            TrainingError: If a loss is no longer finite; the last checkpoints stay.
            Stopped: If that was requested.
        """
        if self._trainer.epoch < self._step.train.epochs:
            self._trainer.run(self._run, self._state)

    def score(self, scorer: CandidateScorer, workers: Workers, rounds: int, each: int) -> None:
        """Score candidates, round by round, in chunks of the same networks wherever they are scored.

        Args:
            scorer: Supernet, images and loss.
            workers: Where candidates are scored.
            rounds: The number of rounds in all.
            each: Candidates per stage and round.

        Raises:
            Stopped: If that was requested.
        """
        if self.candidates.rounds == rounds:
            return
        options, steps = self._step.config.options, -(-each // _CHUNK)
        done, fabric = self.candidates.rounds, self._step.fabric
        callbacks = self._run.callbacks if fabric.is_global_zero else Silent()
        with (
            checkpointing(self._run.folder, self._run.checkpoints, fabric) as checkpointer,
            workers.running(held_out_losses, scorer) as pool,
            callbacks.start("judge", epochs=rounds, steps=steps, done=done) as shown,
        ):
            while self.candidates.rounds < rounds:
                # The same networks after a resume, because they depend on nothing but the seed and the losses recorded
                # so far.
                proposed = self.candidates.propose(each)
                subnets = [options.subnet(rows) for rows in proposed]
                chunks = [subnets[first : first + _CHUNK] for first in range(0, len(subnets), _CHUNK)]
                left = [number for number in range(len(chunks)) if number not in self._scored]
                for place, losses in pool.map([chunks[number] for number in left]):
                    self._scored[left[place]] = losses
                    least = {"least_loss": float(losses.sum(1).min())}
                    shown.step(self.candidates.rounds + 1, len(self._scored), least)
                    checkpointer.between(self._state)
                # In the order of the chunks, whichever was ready first: candidates are recorded in one order only.
                ordered = [self._scored[number] for number in range(len(chunks))]
                # `concatenate` wants an array even if the round has no new candidates.
                empty = np.zeros((0, len(options.stages)))
                self.candidates.record(proposed, np.concatenate([empty, *ordered]))
                self._scored = {}
                numbers, line = self._report(rounds)
                # Before the checkpoint, so that no round of it is missing in a log.
                shown.epoch(self.candidates.rounds, numbers, line)
                checkpointer.save(self._state)

    def _report(self, rounds: int) -> tuple[Mapping[str, float], str]:
        counts = [len(losses) for losses in self.candidates.losses]
        line = f"round {self.candidates.rounds}/{rounds}  candidates of each stage {', '.join(map(str, counts))}"
        return {"candidates": float(sum(counts))}, line

    def _state(self) -> Checkpoint:
        """Return everything that changes, from which the search can be resumed."""
        saved, rounds = self._trainer.saved(self._settings), self.candidates.rounds
        scored = {number: losses.tolist() for number, losses in self._scored.items()}
        numbers = {**saved.numbers, "candidates": self.candidates.to_json(), "scored": scored}
        # Rounds follow the epochs in the names of the checkpoints, as chunks follow the steps.
        return replace(saved, epoch=saved.epoch + rounds, numbers=numbers, step=saved.step + len(scored))

    def notes(self, choice: StageChoice) -> dict[str, object]:
        """Return what the search has found, as plain data; see `SWP.find`."""
        options, counts = self._step.config.options, self._step.counts
        table = self.candidates.table()
        stages = [
            {
                "name": stage.name,
                "cut": stage.cut,
                "axes": len(of.axes),
                "blocks": sum(map(len, of.chains)),
                "candidates": counted,
                "losses": losses.tolist(),
                "costs": {field: costs[number].tolist() for field, costs in table.costs.items()},
                "chosen": choice.picked[number],
            }
            for number, (stage, of, counted, losses) in enumerate(
                zip(options.stages, options.of_stage, counts.candidates, table.losses, strict=True)
            )
        ]
        return {
            "training": self._trainer.history,
            "fairness": counts.fairness,
            "stages": stages,
            "base": dict(table.base),
            "loss": choice.loss,
        }

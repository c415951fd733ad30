"""What candidates are worth, without training them: one pass judges one of every stage.

A search from its first step to its last candidate: train, judge, and go on where it was interrupted.

SWP: stage-wise pruning, on any traced model."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from secateur._arrays import FloatArray
from secateur.cost.budget import Cost
from secateur.errors import BudgetError, DataError
from secateur.graph.stages import Stage, stages_of
from secateur.nas.common import Depths, OriginalWeights, Pretrained, RandomInit, SupernetWeights, Widths, held_out
from secateur.nas.stagewise import calibrated_stages, features, run_stages, stage_effects
from secateur.nas.supernet import Subnet, Supernet, best_first, calibrated, order_digest
from secateur.nas.swp_candidates import Options, StageCandidates
from secateur.nas.swp_knapsack import Exact, filled
from secateur.nas.swp_table import Combination, StageChoice
from secateur.nas.swp_train import (
    InPlace,
    SandwichSampler,
    SubnetSampler,
    SupernetTraining,
    Supervision,
    SWPSearchConfig,
    Target,
)
from secateur.search.base import Proposal, SearchContext, Strategy, describe
from secateur.search.importance import Importance
from secateur.search.importance_data import Reconstruction
from secateur.train.checkpoint import Checkpointer, Saved, digest, keeping, load_checkpoint
from secateur.train.config import Batches, TrainConfig
from secateur.train.device import Precision, autocast, channels_last, open_fabric, placed, precision_of
from secateur.workers import InProcess, Workers

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True, eq=False)
class CandidateScorer:
    """Everything that it takes to judge candidates.

    Attributes:
        supernet: Trained, in eval mode.
        stages: Of its model.
        supervision: What the candidates are judged by.
        calibration: Image batches for the batch norms of every candidate.
        held_out: Batches of images that no weights have learned from, and their labels.
        full: Batch-norm statistics of the full net.
        precision: Of the forward passes; losses are in float32 at least.
        weights: (stages,) what each stage's losses are multiplied by, see `weighing`; None leaves them as they are.
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
        """A judge who has looked at the full net.

        Args:
            supernet: Trained; put into eval mode.
            stages: Of its model.
            supervision: What the candidates are judged by.
            calibration: Image batches.
            images: The images held out.
            fabric: Device and precision.
        """
        supernet.eval()
        # An equal number in every batch, as far as it goes: the mean over batches is the mean over images.
        size = -(-len(images) // max(round(len(images) / _BATCH), 1))
        held_out = tuple((channels_last(x), y) for x, y in images.batches(size, device=fabric.device))
        batches, precision = tuple(channels_last(images) for images in calibration), precision_of(fabric)
        with autocast(precision, fabric.device):
            full = calibrated(supernet, supernet.full, batches)
        return cls(supernet, stages, supervision, batches, held_out, full, precision)

    def weighing(self, subnets: Sequence[Subnet]) -> "CandidateScorer":
        """The same judge, who multiplies losses by what arrives of them at the output, see `stage_effects`.

        Args:
            subnets: Some that are drawn from the space. Images held out are for judging alone: the effect is measured
                on a calibration batch.
        """
        with autocast(self.precision, self.device):
            effects = stage_effects(self.supernet, subnets, self.stages, self.calibration[0])
        return replace(self, weights=effects.numpy())

    @property
    def device(self) -> torch.device:
        """Where it judges."""
        return self.held_out[0][0].device


_BATCH = 250


def losses_of(judge: CandidateScorer, subnets: Sequence[Subnet]) -> FloatArray:
    """The losses of the stages of some subnets on the images held out, each fed with the full net's features.

    The full net runs once for all of them, so the more at a time the better. A subnet's batch norms are measured on
    the calibration images first, in the stage-wise pass too.

    Args:
        judge: Who judges.
        subnets: Any widths and blocks of the stages.

    Returns:
        (subnets, stages) means over the batches, weighted by stages, float64.
    """
    total = np.zeros((len(subnets), len(judge.stages)))
    with torch.no_grad(), autocast(judge.precision, judge.device):
        statistics = calibrated_stages(judge.supernet, subnets, judge.stages, judge.calibration, judge.full)
        for images, labels in judge.held_out:
            logits, handed_on = features(judge.supernet, judge.stages, images, tensors=judge.full)
            target = Target.of((*handed_on, logits), labels)
            for number, subnet in enumerate(subnets):
                outputs = run_stages(
                    judge.supernet, subnet, judge.stages, images, handed_on, tensors=statistics[number]
                )
                total[number] += judge.supervision.losses(outputs, target).double().cpu().numpy()
    return total / len(judge.held_out) * (1.0 if judge.weights is None else judge.weights)


_CHUNK = 8
"""Networks judged at a time: the full net runs once for all of them."""


class StagewiseSearch:
    """A search in progress: the training of the supernet, then rounds of candidates.

    There is a checkpoint after every epoch and after every round, and within long ones.

    Args:
        run: The training.
        candidates: Those judged so far.
        settings: Everything that must be equal for a search to be the same search.

    Attributes:
        run: As given.
        candidates: As given.
    """

    def __init__(self, run: SupernetTraining, candidates: StageCandidates, settings: Mapping[str, str]):
        self.run, self.candidates = run, candidates
        self._settings = settings
        self._problem = run.course.options.problem
        self._judging: dict[int, FloatArray] = {}

    def restore(self) -> None:
        """Take up what an interrupted search has left, if there is anything."""
        folder = self._problem.checkpoint
        saved = None if folder is None else load_checkpoint(folder, self._settings)
        if saved is not None:
            self.run.restore(saved)
            self.candidates.restore(saved.numbers["candidates"])
            # Of the round that was interrupted: the losses of those chunks of networks that were judged.
            judging: Mapping[str, list[list[float]]] = saved.numbers.get("judging", {})
            self._judging = {int(number): np.array(losses) for number, losses in judging.items()}

    def train(self) -> None:
        """Train the supernet to the end.

        Raises:
            TrainingError: If a loss is no longer finite; the last checkpoints stay.
            Stopped: If that was asked for.
        """
        epochs, steps = self.run.course.schedule.epochs, self.run.course.steps
        if self.run.epoch == epochs:
            return
        with (
            self._keeping() as keeper,
            self._problem.watch.watch("search", epochs=epochs, steps=steps, done=self.run.epoch) as meter,
        ):
            while self.run.epoch < epochs:
                self.run.train_epoch(meter, lambda: keeper.between(self._state))
                keeper.save(self._state)

    def judge(self, judge: CandidateScorer, workers: Workers, rounds: int, each: int) -> None:
        """Judge candidates, round by round, in chunks of the same networks wherever they are judged.

        Args:
            judge: Who judges.
            workers: Where.
            rounds: How many rounds in all.
            each: Candidates per stage and round.

        Raises:
            Stopped: If that was asked for.
        """
        if self.candidates.rounds == rounds:
            return
        options, steps = self.run.course.options, -(-each // _CHUNK)
        done = self.candidates.rounds
        with (
            self._keeping() as keeper,
            workers.running(losses_of, judge) as pool,
            self._problem.watch.watch("judge", epochs=rounds, steps=steps, done=done) as meter,
        ):
            while self.candidates.rounds < rounds:
                proposed = self.candidates.proposed(each)
                subnets = [options.subnet(rows) for rows in proposed]
                chunks = [subnets[first : first + _CHUNK] for first in range(0, len(subnets), _CHUNK)]
                left = [number for number in range(len(chunks)) if number not in self._judging]
                for place, losses in pool.map([chunks[number] for number in left]):
                    self._judging[left[place]] = losses
                    least = {"least_loss": float(losses.sum(1).min())}
                    meter.step(self.candidates.rounds + 1, len(self._judging), least)
                    keeper.between(self._state)
                ordered = [self._judging[number] for number in range(len(chunks))]
                empty = np.zeros((0, len(options.stages)))
                self.candidates.judged(proposed, np.concatenate([empty, *ordered]))
                self._judging = {}
                numbers, line = self._round(rounds)
                meter.epoch(self.candidates.rounds, numbers, line)  # Before the checkpoint: a log misses nothing of it.
                keeper.save(self._state)

    def _round(self, rounds: int) -> tuple[Mapping[str, float], str]:
        counts = [len(losses) for losses in self.candidates.losses]
        line = f"round {self.candidates.rounds}/{rounds}  candidates of each stage {', '.join(map(str, counts))}"
        return {"candidates": float(sum(counts))}, line

    def _keeping(self) -> AbstractContextManager[Checkpointer]:
        return keeping(self._problem.checkpoint, self._problem.saving, self.run.course.fabric)

    def _state(self) -> Saved:
        """Everything that changes, to go on from here."""
        saved, rounds = self.run.saved(self._settings), self.candidates.rounds
        judging = {number: losses.tolist() for number, losses in self._judging.items()}
        numbers = {**saved.numbers, "candidates": self.candidates.to_json(), "judging": judging}
        return replace(saved, epoch=saved.epoch + rounds, numbers=numbers, step=saved.step + len(judging))

    def notes(self, choice: StageChoice) -> dict[str, object]:
        """Everything that was learned on the way, as plain data."""
        options, tally = self.run.course.options, self.run.tally
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
                zip(options.stages, options.of_stage, tally.candidates, table.losses, strict=True)
            )
        ]
        return {
            "training": self.run.history,
            "fairness": tally.fairness,
            "stages": stages,
            "base": dict(table.base),
            "loss": choice.loss,
        }


_CALIBRATION = 4
"""Image batches that the batch norms of a candidate are measured on."""

_PROBES = 16
"""Networks by which the weight of each stage's losses is measured."""


@dataclass(frozen=True)
class SWP(Strategy):
    """Train the networks of a space a little, all at once and stage by stage; judge many; combine the best exactly.

    The model is divided into stages. In every step the full net learns from the labels, and the tiny net and some that
    are drawn learn beside it: each of their stages is fed with the full net's feature and learns to give what the full
    net's stage gives, so that one pass trains a candidate of every stage. Candidates of all stages are then judged on
    images held out, by the same loss, one of every stage in a pass, times what arrives of it at the output
    (`stage_effects`). Their losses and their costs add up, so that the best combination within the budget is a
    multiple-choice knapsack. Axes whose channels are seen where stages meet stay whole (see
    `secateur.graph.stages_of`); untie the graph to search residual branches as well.

    Attributes:
        widths: Candidate widths; None leaves them alone.
        depths: Candidate depths of chains of residual blocks; None keeps all blocks.
        cuts: Modules that end a stage; None finds them, () is the ablation without stages.
        nets: Which networks learn in a step: `SandwichSampler`, or `SampledWidths`, the ablation.
        supervision: What they learn from: `InPlace`; without stages also `SoftLabels` and `Labels`.
        schedule: Of the training: epochs, batch size, learning rate, optimizer. Its seed is replaced by the search's.
        candidates: Judged in every stage, over all rounds.
        rounds: The first draws from the whole space, the others near the best of the rounds before.
        held_out: Training images that no weights learn from, to judge on.
        combination: How one candidate of every stage is chosen: `Exact`, or `Evolution` as in the paper.
        importance: The order of the channels: every width keeps the first ones.
        begin: The weights that the training begins with.
        hand_on: The weights that the student is cut from.
        workers: Where candidates are judged: `InProcess`, or `OnRay`; the same bits if these compute with as many
            threads as this process.

    Raises:
        BudgetError: If neither widths nor depths are searched, or a number is out of range.

    References:
        Zhang, Rong, Yu & Ou (SWP), arXiv:2011.04908. The exact combination is ours, as is what the paper leaves open:
        where stages end, the loss and its weight, how candidates are drawn (docs/decisions.md).
    """

    widths: Widths | None = Widths()  # noqa: RUF009 -- frozen
    depths: Depths | None = None
    cuts: tuple[str, ...] | None = None
    nets: SubnetSampler = SandwichSampler()  # noqa: RUF009 -- frozen
    supervision: Supervision = InPlace()  # noqa: RUF009 -- frozen
    schedule: TrainConfig = TrainConfig(epochs=1, batch_size=64, learning_rate=0.02)  # noqa: RUF009 -- frozen
    candidates: int = 128
    rounds: int = 4
    held_out: int = 2000
    combination: Combination = Exact()  # noqa: RUF009 -- frozen
    importance: Importance = field(default_factory=Reconstruction)
    begin: Pretrained | RandomInit = Pretrained()  # noqa: RUF009 -- frozen
    hand_on: OriginalWeights | SupernetWeights = OriginalWeights()  # noqa: RUF009 -- frozen
    workers: Workers = InProcess()  # noqa: RUF009 -- frozen

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

    def least(self, problem: SearchContext) -> Cost:
        """Cost of the smallest candidates of all stages."""
        options = self._options(problem)
        widths, blocks = options.network(options.tiny)
        return problem.costs.cost_of(widths, blocks)

    def find(self, problem: SearchContext) -> Proposal:
        """Notes.

        ``training``: what every epoch looked like, with how fairly channels were trained; ``stages``: for each one
        where it ends, its axes and blocks, how many candidates it has, how many were trained, the judged ones' losses
        and costs, and which was chosen; ``loss``, their sum; ``weights``, what the losses of each stage were
        multiplied by. What the chosen ones leave of the budget is then filled by widening them (`filled`).

        Raises:
            DataError: If there are no training images or calibration batches, or images cannot be held out.
            BudgetError: If there is nothing to choose, or no combination of the candidates is within the budget.
            TrainingError: If a loss is no longer finite; the checkpoint of the last epoch stays.
        """
        if problem.training is None:
            raise DataError("`data` must hold training images for SWP; got none. Pass data=secateur.load_data(...).")
        self.hand_on.check(problem)
        # Modules made in inference mode could not be trained.
        with torch.inference_mode(mode=False), torch.enable_grad():
            return self._find(problem)

    def _options(self, problem: SearchContext) -> Options:
        stages = stages_of(problem.evidence.model, problem.evidence.graph, self.cuts)
        self.supervision.check(stages)
        return Options.of(problem, stages, self.widths, self.depths)

    def _find(self, problem: SearchContext) -> Proposal:
        evidence, data = problem.evidence, problem.training
        assert data is not None
        options = self._options(problem)
        fabric = open_fabric(self.schedule.precision) if problem.fabric is None else problem.fabric
        order = best_first(problem.scores(self.importance))
        supernet = placed(Supernet(self.begin.of(evidence.model, evidence.seed), evidence.graph, order), fabric.device)
        learned, judged = held_out(data.train, self.held_out, evidence.seed)
        schedule = replace(self.schedule, seed=evidence.seed)
        course = SWPSearchConfig(options, self.nets, self.supervision, learned, data.augment, schedule, fabric)
        calibration = tuple(images.to(fabric.device) for images, _ in evidence.batches[:_CALIBRATION])
        if not calibration:
            raise DataError("`batches` must hold training images for SWP, to measure batch norms on; got none.")
        hunt = StagewiseSearch(
            SupernetTraining(course, supernet),
            StageCandidates(options, evidence.seed),
            {
                **self._settings(problem),
                "precision": precision_of(fabric).name,
                "stages": ", ".join(stage.cut for stage in options.stages),
                "order": order_digest(supernet.order),
                "images": f"{len(learned)} and {len(judged)}",
                "augment": repr(data.augment),
                "calibration": f"{sum(map(len, calibration))} images",
            },
        )
        hunt.restore()
        hunt.train()
        judge = CandidateScorer.of(
            supernet,
            stages=options.stages,
            supervision=self.supervision,
            calibration=calibration,
            images=judged,
            fabric=fabric,
        )
        draw = np.random.default_rng((evidence.seed, _PROBES))
        probes = [options.subnet(options.drawn(draw)) for _ in range(_PROBES)]
        judge = judge.weighing(probes)
        hunt.judge(judge, self.workers, self.rounds, self.candidates // self.rounds)
        choice = self._combined(problem, options, hunt.candidates)
        rows = filled(options, hunt.candidates.network(choice.picked))
        architecture = supernet.architecture(options.subnet(rows))
        notes = {**hunt.notes(choice), "weights": np.asarray(judge.weights).tolist()}
        return Proposal(architecture, notes, self.hand_on.of(supernet, calibration, problem))

    def _combined(self, problem: SearchContext, options: Options, candidates: StageCandidates) -> StageChoice:
        """The combination, within the budget as a whole network too.

        What a stage adds to the size of a file depends on the others, by some digits of the header: where a combination
        is over a limit by so much, it must leave so much room.
        """
        table = candidates.table()
        while True:
            choice = self.combination.combine(table, problem.evidence.seed)
            cost = problem.costs.cost_of(*options.network(candidates.network(choice.picked)))
            over = {field: getattr(cost, field) - limit for field, limit in problem.limits.items()}
            tighter = {
                field: min(choice.cost[field] - excess, math.nextafter(choice.cost[field], 0))
                for field, excess in over.items()
                if excess > 0
            }
            if not tighter:
                return choice
            table = replace(table, limits={**table.limits, **tighter})

    def _settings(self, problem: SearchContext) -> Mapping[str, str]:
        """Where candidates are judged and how they are combined may change when a search goes on."""
        same = replace(self, workers=InProcess(), combination=Exact())
        return {
            "strategy": describe(same),
            "budget": str(problem.budget),
            "space": repr(problem.space),
            "seed": str(problem.evidence.seed),
            "model": digest(problem.evidence.model),
        }
